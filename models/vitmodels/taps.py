"""Taps: how a site is read from, and written back into, a module that stays as it is.

A tap knows one place of one module. It is attached to a :class:`Wiring` together with a
:class:`Wire`, the function every passing value goes through; the wiring owns the hooks and
takes every one of them off again. Without a wiring there is no hook on the module at all.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitmodels.spec import TokenGrid

Edit = Callable[[Tensor], Tensor]
"""An edit: takes the value of a site, returns a tensor of the same shape."""


class StopForward(Exception):
    """Raised when the last value asked for has been read; caught in ``run``."""


class Wire:
    """What happens to the value of one site during a forward pass."""

    def __init__(
        self,
        name: str,
        *,
        edits: Sequence[Edit] = (),
        keep: dict[str, Tensor] | None = None,
        outstanding: set[str] | None = None,
        differentiable: bool = False,
    ) -> None:
        self.name = name
        self.edits = tuple(edits)
        self.keep = keep
        self.outstanding = outstanding
        self.differentiable = differentiable
        self.writes = bool(edits) or differentiable
        """Whether the tap must put the returned value back."""

    def __call__(self, value: Tensor) -> Tensor:
        """Edit, record, and stop the pass if nothing more is wanted."""
        for edit in self.edits:
            new = edit(value.clone())  # an edit in place must not reach what was read before
            if not isinstance(new, Tensor) or new.shape != value.shape:
                got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise ValueError(
                    f"the edit of site {self.name!r} returned {got}, "
                    f"but must return a tensor of shape {tuple(value.shape)}"
                )
            value = new.to(device=value.device, dtype=value.dtype)
        if self.differentiable:
            # A view, so that the recorded tensor is the one the output depends on.
            value = (
                value.view_as(value)
                if value.requires_grad
                else (value.detach().requires_grad_(True))
            )
        if self.keep is not None:
            self.keep[self.name] = value
        if self.outstanding is not None:
            self.outstanding.discard(self.name)
            if not self.outstanding:
                raise StopForward
        return value


class Wiring:
    """The hooks of one set of wires; a context manager that leaves nothing behind."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._late: list[tuple[nn.Module, Callable[..., Any]]] = []
        self.modules: set[nn.Module] = set()
        """Modules with a hook of this wiring."""
        self.shared: dict[Any, Any] = {}
        """State that taps of one wiring share, by a key of their own."""

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Call ``hook(module, args, kwargs)`` before `module`; it may return (args, kwargs)."""
        self.modules.add(module)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, hook: Callable[..., Any], *, always: bool = False) -> None:
        """Call ``hook(module, args, output)`` after `module`; it may return a new output.

        `always`: also when the module raised.
        """
        self.modules.add(module)
        self._handles.append(module.register_forward_hook(hook, always_call=always))

    def after_all(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Like :meth:`after`, but behind the hooks of every other tap on `module`."""
        self._late.append((module, hook))

    def attach(self, taps: Mapping[str, "Tap"], wires: Iterable[Wire]) -> Self:
        """Attach every wire to the tap of its name, in the order given."""
        try:
            for wire in wires:
                taps[wire.name].attach(wire, self)
            while self._late:
                self.after(*self._late.pop(0))
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Take every hook off."""
        while self._handles:
            self._handles.pop().remove()
        self.modules.clear()
        self.shared.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class Tap(ABC):
    """One site of one module: subclasses say where it is."""

    axes: tuple[str, ...] = ()
    """Dimensions after the batch; empty for the usual ones of the site's name."""
    grid: TokenGrid | None = None
    """Tokens at this site where they differ from the model's."""
    reason: str = ""
    """Why the site cannot be edited; empty when it can."""

    @abstractmethod
    def attach(self, wire: Wire, wiring: Wiring) -> None:
        """Register the hooks that pass the site's value through `wire`."""


def _same(container: Any) -> Tensor:
    """Read a tensor, or the first of a tuple or list."""
    value = container[0] if isinstance(container, tuple | list) else container
    if not isinstance(value, Tensor):
        raise ValueError(f"expected a tensor, found {type(value).__name__}: give the tap a read=")
    return value


def _replace(container: Any, value: Tensor) -> Any:
    """Put a tensor back where :func:`_same` took it."""
    if isinstance(container, tuple | list):
        return type(container)((value, *container[1:]))
    return value


@dataclass(frozen=True, kw_only=True)
class OutputTap(Tap):
    """The output of a module (of a tuple: its first entry)."""

    module: nn.Module
    """Whose output it is."""
    read: Callable[[Any], Tensor] = field(default=_same)
    """Output -> value of the site."""
    write: Callable[[Any, Tensor], Any] = field(default=_replace)
    """(output, new value) -> new output."""

    def attach(self, wire: Wire, wiring: Wiring) -> None:
        """Pass the output through the wire."""

        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            value = wire(self.read(output))
            return self.write(output, value) if wire.writes else None

        wiring.after(self.module, hook)


@dataclass(frozen=True, kw_only=True)
class InputTap(Tap):
    """An argument of a module."""

    module: nn.Module
    """Whose input it is."""
    argument: int | str = 0
    """Position, or name for one that is passed by keyword."""
    read: Callable[[Any], Tensor] = field(default=_same)
    """Argument -> value of the site."""
    write: Callable[[Any, Tensor], Any] = field(default=_replace)
    """(argument, new value) -> new argument."""

    def attach(self, wire: Wire, wiring: Wiring) -> None:
        """Pass the argument through the wire."""
        key = self.argument

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = args[key] if isinstance(key, int) else kwargs[key]
            value = wire(self.read(given))
            if not wire.writes:
                return None
            new = self.write(given, value)
            if isinstance(key, int):
                return (*args[:key], new, *args[key + 1 :]), kwargs
            return args, {**kwargs, key: new}

        wiring.before(self.module, hook)


@dataclass(frozen=True, kw_only=True)
class MidStreamTap(Tap):
    """The residual stream between the two branches of a block.

    No module sees it alone: in ``x = x + f(norm2(x))`` it goes into `branch` and, past it,
    into the sum. It is read at the input of `branch`; an edit gives the edited value to
    `branch` and rebuilds the block's output as ``edited + branch_out``.
    """

    branch: nn.Module
    """Module that is called on the stream first (the second norm)."""
    branch_out: nn.Module
    """Module whose output is what the branch adds (the last one before the sum)."""
    block: nn.Module
    """Module whose output is the sum."""
    gain: Callable[[Tensor], Tensor] = field(default=lambda added: added)
    """Applied to the output of `branch_out` before the sum (a bare LayerScale parameter)."""
    to_site: Callable[[Tensor], Tensor] = field(default=lambda value: value)
    """The module's layout -> value of the site."""
    from_site: Callable[[Tensor], Tensor] = field(default=lambda value: value)
    """The inverse of `to_site`."""

    def attach(self, wire: Wire, wiring: Wiring) -> None:
        """Read at the branch; with an edit, also rebuild the block's output."""
        held: dict[str, Tensor] = {}

        def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            value = wire(self.to_site(args[0]))
            if not wire.writes:
                return None
            value = self.from_site(value)
            held["stream"] = value
            return (value, *args[1:]), kwargs

        def added(_module: nn.Module, _args: Any, output: Any) -> None:
            held["added"] = _same(output)

        def leave(_module: nn.Module, _args: Any, output: Any) -> Any:
            total = held.pop("stream") + self.gain(held.pop("added"))
            return _replace(output, total.reshape(_same(output).shape))

        wiring.before(self.branch, enter)
        if wire.writes:
            wiring.after_all(self.branch_out, added)  # as other edits leave it
            wiring.after(self.block, leave)


@dataclass(frozen=True, kw_only=True)
class HeadOutTap(Tap):
    """What each head adds: its z through its columns of the output projection, no bias.

    ``head_out[b, t, h] = W_O[:, h] z[b, t, h]``, so that the projection's output is the sum
    over h plus its bias. LayerScale and post-norms come after it.
    """

    module: nn.Linear
    """The output projection."""
    heads: int
    """Number of heads."""
    to_site: Callable[[Tensor], Tensor] | None = None
    """Batch and tokens of the module -> those of the site (windows folded into the batch)."""
    from_site: Callable[[Tensor], Tensor] | None = None
    """The inverse of `to_site`."""

    def attach(self, wire: Wire, wiring: Wiring) -> None:
        """Pass the heads' shares through the wire."""

        def hook(module: nn.Linear, args: Any, output: Tensor) -> Tensor | None:
            z_BTHK = args[0].reshape(*args[0].shape[:-1], self.heads, -1)
            w_DHK = module.weight.reshape(module.out_features, self.heads, -1)
            shares = torch.einsum("...hk,dhk->...hd", z_BTHK, w_DHK)
            value = wire(self.to_site(shares) if self.to_site else shares)
            if not wire.writes:
                return None
            value = self.from_site(value) if self.from_site else value
            total = value.sum(dim=-2)
            return total if module.bias is None else total + module.bias

        wiring.after(self.module, hook)


@dataclass(frozen=True, kw_only=True)
class PositionTap(Tap):
    """A learned position embedding, repeated over the batch; its edits shift the embedding."""

    model: Any
    """Has the parameter: ``[1, tokens, D]`` or ``[tokens, D]``."""
    attribute: str = "pos_embed"
    """Its name."""
    after: nn.Module
    """Module that takes the embedded tokens."""
    skip: int
    """Leading tokens of the embedding that have no position."""

    def attach(self, wire: Wire, wiring: Wiring) -> None:
        """Shift the input of the module after the sum."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tokens = args[0]
            value = getattr(self.model, self.attribute).expand(tokens.shape[0], -1, -1)
            new = wire(value)
            if not wire.writes:
                return None
            shift = nn.functional.pad(new - value, (0, 0, self.skip, 0))
            return (tokens + shift, *args[1:]), kwargs

        wiring.before(self.after, hook)
