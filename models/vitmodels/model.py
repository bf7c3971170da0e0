"""A vision model: the backend's own module, with names for its insides."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitmodels.family import Anatomy
from vitmodels.spec import ModelSpec, SiteInfo, expand_sites
from vitmodels.taps import Edit, OutputTap, StopForward, Wire, Wiring
from vitmodels.transforms import Transform

_HEADS = ("token", "head", "channel")
_USUAL_AXES: dict[str, tuple[str, ...]] = {
    "q": _HEADS,
    "k": _HEADS,
    "v": _HEADS,
    "z": _HEADS,
    "head_out": _HEADS,
    "scores": ("head", "query", "key"),
    "pattern": ("head", "query", "key"),
    "pooled": ("channel",),
    "projection": ("channel",),
    "logits": ("class",),
}


def _axes(name: str) -> tuple[str, ...]:
    return _USUAL_AXES.get(name.rpartition(".")[2], ("token", "channel"))


class VisionModel:
    """A module of timm, open_clip or transformers with named, readable, editable sites.

    Made by :func:`vitmodels.load` or :func:`vitmodels.wrap`. There is no hook on the module
    except during :meth:`run` and inside of :meth:`editing`.
    """

    def __init__(self, *, module: nn.Module, anatomy: Anatomy, spec: ModelSpec) -> None:
        self.module = module
        self.anatomy = anatomy
        self.spec = spec
        self._sites: dict[str, SiteInfo] | None = None
        self._edits: list[Mapping[str, Edit]] = []
        self._wiring: Wiring | None = None
        self._compiled: set[nn.Module] = set()
        self._busy = False

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.module.parameters()).dtype

    @property
    def transform(self) -> Transform:
        """PIL image (or frames) to one input."""
        return self.anatomy.transform

    def __repr__(self) -> str:
        return f"VisionModel({self.spec.id!r}, {len(self.anatomy.taps)} sites, {self.device})"

    def sites(self) -> dict[str, SiteInfo]:
        """Return every site in model order; shapes come from a pass on the meta device."""
        if self._sites is None:
            values = self._shapes()
            self._sites = {}
            for name, tap in self.anatomy.taps.items():
                axes = tap.axes or _axes(name)
                has_tokens = "token" in axes or "query" in axes
                self._sites[name] = SiteInfo(
                    name=name,
                    axes=axes,
                    shape=tuple(values[name].shape[1:]),
                    editable=not tap.reason,
                    reason=tap.reason,
                    grid=(tap.grid or self.anatomy.grid) if has_tokens else None,
                )
        return dict(self._sites)

    def run(
        self,
        x: Float[Tensor, "batch ..."] | Mapping[str, Tensor],
        sites: str | Sequence[str],
        *,
        stop_early: bool = True,
        grad_of: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Run a batch and return the values of some sites.

        Parameters
        ----------
        x
            A batch as the module takes it, moved to the model's device and dtype.
        sites
            Names or patterns, see :func:`vitmodels.expand_sites`.
        stop_early
            Stop the pass after the last value asked for.
        grad_of
            ``logits -> scalar``: also return its gradient at every site asked for, under
            ``"<site>.grad"``.

        Returns
        -------
        dict[str, Tensor]
            Canonical site name -> value, in model order. Inside of :meth:`editing`, values
            are those after the edits. Values are what the module computes, not copies.

        Raises
        ------
        ValueError
            A site that is not there (the message names the nearest), or an input of the
            wrong shape.
        """
        names = expand_sites(sites, self.anatomy.taps)
        batch = self._prepare(x)
        kept: dict[str, Tensor] = {}
        if grad_of is not None and torch.is_inference_mode_enabled():
            raise ValueError("grad_of needs autograd: call run() outside of torch.inference_mode()")
        if grad_of is None:
            outstanding = set(names) if stop_early else None
            with self._reading(names, kept, outstanding=outstanding):
                self._call_until_stop(batch)
        else:
            with torch.enable_grad(), self._reading(names, kept, differentiable=True):
                target = grad_of(self.anatomy.call(self.module, batch))
                if target.dim():
                    raise ValueError(f"grad_of must return a scalar, not {tuple(target.shape)}")
        if missing := [name for name in names if name not in kept]:
            raise ValueError(
                f"site {missing[0]} was not reached in this forward pass of {self.spec.id}: its "
                "module was not called. Call the module the way its family does"
            )
        values = {name: kept[name] for name in names}
        if grad_of is None:
            return values
        grads = torch.autograd.grad(target, list(values.values()), allow_unused=True)
        result = {name: value.detach() for name, value in values.items()}
        for name, grad in zip(names, grads, strict=True):
            result[f"{name}.grad"] = torch.zeros_like(result[name]) if grad is None else grad
        return result

    def editing(self, edits: Mapping[str, Edit]) -> AbstractContextManager[None]:
        """Edit sites inside of a ``with``.

        Parameters
        ----------
        edits
            Site name or pattern -> function from the value to a new value of the same shape
            (it gets a copy, and may change it in place). Contexts nest: at one site the outer
            edit comes first. One function may serve several sites.

        Raises
        ------
        ValueError
            A site that is not there or that is read-only (with the reason).
        """
        chosen: dict[str, Edit] = {}
        for pattern, edit in edits.items():
            if not callable(edit):
                raise ValueError(
                    f"the edit of {pattern!r} must be a function, not {type(edit).__name__}"
                )
            for name in expand_sites(pattern, self.anatomy.taps):
                if reason := self.anatomy.taps[name].reason:
                    raise ValueError(f"site {name} of {self.spec.id} is read-only: {reason}")
                if name in chosen:
                    raise ValueError(f"two edits of site {name}; nest two editing() instead")
                chosen[name] = edit
        return self._editing(chosen)

    def __call__(self, x: Float[Tensor, "batch ..."] | Mapping[str, Tensor]) -> Tensor:
        """Return the logits of a batch, or the features of a model without a head."""
        return self.anatomy.call(self.module, self._prepare(x))

    def compile(self, **options: Any) -> None:
        """Compile every block by ``torch.compile(**options)``, once and for good.

        Sites at the borders of blocks and outside of them are read and edited with the compiled
        blocks. Compiled code does not call hooks inside of a block: while a site in there is read
        or edited, all blocks run uncompiled.
        """
        for name, tap in self.anatomy.taps.items():
            if name.endswith(".resid_post") and isinstance(tap, OutputTap):
                block: Any = tap.module
                if block not in self._compiled:
                    block.forward = torch.compile(block.forward, **options)
                self._compiled.add(block)
        if not self._compiled:
            raise ValueError(f"{self.spec.id} has no blocks that can be compiled one by one")

    def _stance(self, wiring: Wiring | None) -> AbstractContextManager[Any]:
        """Run uncompiled where a hook is inside of a compiled block."""
        if self._compiled and wiring is not None:
            inside = {child for block in self._compiled for child in block.modules()}
            if wiring.modules & (inside - self._compiled):
                stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
                return stance
        return nullcontext()

    @contextmanager
    def _editing(self, chosen: Mapping[str, Edit]) -> Iterator[None]:
        self._edits.append(chosen)
        try:
            self._rewire()
            with self._stance(self._wiring):
                yield
        finally:
            self._edits = [other for other in self._edits if other is not chosen]
            self._rewire()

    @contextmanager
    def _reading(
        self,
        names: Sequence[str],
        kept: dict[str, Tensor],
        *,
        outstanding: set[str] | None = None,
        differentiable: bool = False,
    ) -> Iterator[None]:
        """Wire reads beside the edits that are active."""
        if self._busy:
            raise ValueError(
                f"run() of {self.spec.id} was called while another run() of it is under way, from "
                "an edit or another thread; get the values first, then edit with them"
            )
        self._busy = True
        self._unwire()
        asked = set(names)
        try:
            with Wiring() as wiring:
                wires = []
                for name in self.anatomy.taps:
                    edits = [chosen[name] for chosen in self._edits if name in chosen]
                    if name in asked:
                        wires.append(
                            Wire(
                                name,
                                edits=edits,
                                keep=kept,
                                outstanding=outstanding,
                                differentiable=differentiable,
                            )
                        )
                    elif edits:
                        wires.append(Wire(name, edits=edits))
                wiring.attach(self.anatomy.taps, wires)
                with self._stance(wiring):
                    yield
        finally:
            self._busy = False
            self._rewire()

    def _unwire(self) -> None:
        if self._wiring is not None:
            self._wiring.close()
            self._wiring = None

    def _rewire(self) -> None:
        """Put the hooks of the active edits on, and no others."""
        self._unwire()
        if not self._edits:
            return
        wires = []
        for name in self.anatomy.taps:
            edits = [chosen[name] for chosen in self._edits if name in chosen]
            if edits:
                wires.append(Wire(name, edits=edits))
        self._wiring = Wiring().attach(self.anatomy.taps, wires)

    def _call_until_stop(self, batch: Any) -> None:
        with suppress(StopForward):
            self.anatomy.call(self.module, batch)

    def _prepare(self, x: Any) -> Any:
        if isinstance(x, Mapping):
            return {key: self._move(value) for key, value in x.items()}
        if not isinstance(x, Tensor):
            raise ValueError(
                f"expected a batch tensor, got {type(x).__name__}; see model.transform"
            )
        wanted = self.spec.input_shape
        if x.dim() != len(wanted) + 1:
            kind = "clips" if len(wanted) == 4 else "images"
            given = {4: "images", 5: "clips"}.get(x.dim(), "something else")
            raise ValueError(
                f"{self.spec.id} takes {kind} of shape [batch, {', '.join(map(str, wanted))}]; "
                f"got {tuple(x.shape)}, which looks like {given}"
            )
        if not self.anatomy.dynamic and tuple(x.shape[1:]) != tuple(wanted):
            raise ValueError(
                f"{self.spec.id} takes inputs of {tuple(wanted)}, got {tuple(x.shape[1:])}; "
                "preprocess with model.transform, or load it with img_size= for another size"
            )
        return self._move(x)

    def _move(self, x: Tensor) -> Tensor:
        dtype = self.dtype if x.is_floating_point() else None
        return x.to(device=self.device, dtype=dtype, non_blocking=True)

    def _shapes(self) -> dict[str, Tensor]:
        """Run every tap on the meta device; the module's own weights are not touched."""
        module = _Caller(self.module, self.anatomy.call)
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        empty = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
        dtype = torch.long if self.anatomy.vocabulary else self.dtype
        x = torch.empty(1, *self.spec.input_shape, dtype=dtype, device="meta")
        kept: dict[str, Tensor] = {}
        edits, self._edits = self._edits, []
        try:
            with (
                torch.no_grad(),
                _replaced(self.anatomy.without_effect_on_shapes),
                self._reading(list(self.anatomy.taps), kept),
            ):
                torch.func.functional_call(module, empty, (x,))
        finally:
            self._edits = edits
            self._rewire()
        if missing := [name for name in self.anatomy.taps if name not in kept]:
            raise ValueError(
                f"family {self.spec.family} lists {len(missing)} sites of {self.spec.id} that no "
                f"forward pass reaches, the first is {missing[0]}"
            )
        return kept


@contextmanager
def _replaced(methods: Sequence[tuple[nn.Module, str]]) -> Iterator[None]:
    """Let methods of single modules return their first argument."""
    with ExitStack() as stack:
        for module, name in methods:
            setattr(module, name, _first)  # on the instance, hiding the method of its class
            stack.callback(delattr, module, name)
        yield


def _first(first: Any, *_others: Any, **_named: Any) -> Any:
    return first


class _Caller(nn.Module):
    """Makes a family's way of calling a module a module, for ``functional_call``."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.module = module
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.module, x)
