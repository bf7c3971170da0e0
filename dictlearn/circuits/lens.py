"""Logit lens: what the model's own head makes of the stream at every layer, and at every token.

::

    logit[l]      = tail(x_l)                      the stream of layer l, read as the last is
    token[l, t]   = tail(x_l[t] at every token)    one token's stream alone

The tail is everything behind the last block: final norm, pooling, head (linear, zero-shot,
attention pooling). To read a single token the stream is that token everywhere: a head on CLS then
reads it as CLS, an average over patches is that patch, and attention pooling sees it alone, so one
definition serves every head. nostalgebraist 2020; for vision transformers Vilas et al. 2023.

Shape legend: B items, L layers, T tokens, D channels, C classes, R rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from dictlearn.circuits.places import position_coords, require_logits
from dictlearn.circuits.stacked import Batch, n_items, rewriting
from vitmodels.model import VisionModel
from vitmodels.names import Site
from vitmodels.spec import TokenGrid, expand_sites

AT_ONCE = 16384
"""Tokens of one pass through the tail."""
Translate = Callable[[str, Tensor], Tensor]
"""(site, stream ``[..., D]``) -> stream as of the last layer: a tuned lens."""

_FEW: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


class Tail:
    """Everything behind the last block of a model, as a function of the stream.

    Parameters
    ----------
    model
        With a head.

    Raises
    ------
    ValueError
        No head; or the model's logits are not a function of the stream behind its last block.
    """

    def __init__(self, model: VisionModel) -> None:
        require_logits(model)
        self.model = model
        sites = [name for name in model.anatomy.taps if name.endswith(".resid_post")]
        self.site = sites[-1]
        """The last ``resid_post``."""
        info = model.sites()[self.site]
        if info.axes != ("token", "channel") or info.grid is None:
            raise ValueError(f"{self.site} of {model.spec.id} is not a stream of tokens: {info}")
        self.grid: TokenGrid = info.grid
        self.tokens, self.width = info.shape
        self._one = torch.zeros(1, *model.spec.input_shape, device=model.device)
        self._check()

    def __call__(self, stream_RTD: Float[Tensor, "rows tokens d"]) -> Float[Tensor, "rows classes"]:
        """Logits of streams; differentiable where gradients are enabled."""
        # One empty input is carried up to the last block, whose output is then replaced.
        with rewriting(self.model, self.site, lambda _value: stream_RTD):
            return self.model(self._one)

    def of_tokens(self, token_RD: Float[Tensor, "rows d"]) -> Float[Tensor, "rows classes"]:
        """Logits of single tokens: streams in which every token is that one."""
        count = self.enough()
        return self(token_RD[:, None].expand(-1, count, -1))

    def reads(self) -> str:
        """Which tokens the head reads: ``class token``, ``patches`` or ``all tokens``."""
        generator = torch.Generator().manual_seed(0)
        stream = torch.randn(1, self.tokens, self.width, generator=generator).to(
            self.model.device, self.model.dtype
        )
        with torch.enable_grad():
            stream.requires_grad_(True)
            (grad,) = torch.autograd.grad(self(stream)[0, 0], stream)
        used = (grad[0] != 0).any(-1)
        kinds = {kind for kind in self.grid.kinds if bool(used[self.grid.slice(kind)].any())}
        names = {frozenset({"cls"}): "class token", frozenset({"patch"}): "patches"}
        return names.get(frozenset(kinds), "all tokens")

    def _check(self) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, *self.model.spec.input_shape, generator=generator)
        with torch.no_grad():
            found = self.model.run(x, [self.site, "logits"])
            try:
                got = self(found[self.site])
            except (RuntimeError, ValueError, IndexError) as error:
                raise self._unfit(str(error)) from error
        wanted = found["logits"]
        if not torch.allclose(got, wanted, rtol=1e-3, atol=1e-4):
            raise self._unfit(f"the logits differ by {float((got - wanted).abs().max()):.3g}")

    def _unfit(self, why: str) -> ValueError:
        return ValueError(
            f"the head of {self.model.spec.id} (family {self.model.spec.family}) cannot be run on "
            f"{self.site} alone: {why}. A lens needs a head that reads the last stream"
        )

    def enough(self) -> int:
        """Return how often a single token must be repeated: prefix tokens and one patch, or all."""
        module = self.model.module
        if module not in _FEW:
            generator = torch.Generator().manual_seed(1)
            row = torch.randn(1, 1, self.width, generator=generator)
            row = row.to(self.model.device, self.model.dtype)
            few = min(self.tokens, self.grid.cls + self.grid.register + 1)
            with torch.no_grad():
                whole = self(row.expand(-1, self.tokens, -1))
                try:
                    got = self(row.expand(-1, few, -1))
                    same = got.shape == whole.shape and bool(
                        torch.allclose(got, whole, rtol=1e-3, atol=1e-4)
                    )
                except (RuntimeError, ValueError, IndexError):
                    same = False
            _FEW[module] = few if same else self.tokens
        return _FEW[module]


def logit_lens(
    model: VisionModel,
    x: Batch,
    sites: str | Sequence[str] = "blocks.*.resid_post",
    *,
    class_names: Sequence[str] | None = None,
    keep: Sequence[int] | None = None,
    tokens: bool = True,
    translate: Translate | None = None,
    at_once: int = AT_ONCE,
) -> xr.Dataset:
    """Return logits by layer, and by layer and token.

    Parameters
    ----------
    model
        With a head; `vitmodels.zeroshot.load_zero_shot` gives one of class names as text.
    x
        B inputs.
    sites
        Places in the stream, in the order of layers.
    class_names
        Names of all classes, to label the dimension class.
    keep
        Only these classes.
    tokens
        Also read every token by itself.
    translate
        A `dictlearn.circuits.tuned_lens.TunedLens`.
    at_once
        Tokens of one pass through the head.

    Returns
    -------
    xarray.Dataset
        ``logit`` [item, layer, class] and ``token`` [item, layer, position, class]; the attribute
        ``reads`` says which tokens the head reads.

    Raises
    ------
    ValueError
        No head; a site that is absent or no stream like the last one; a head that does not read
        the last stream.
    """
    tail = Tail(model)
    names = expand_sites(sites, model.anatomy.taps)
    infos = model.sites()
    for name in names:
        if infos[name].shape != (tail.tokens, tail.width) or ".resid_" not in name:
            raise ValueError(
                f"{name} of {model.spec.id} is {list(infos[name].shape)}, the stream behind the "
                f"last block ({tail.site}) is {[tail.tokens, tail.width]}: the head cannot read "
                "it. Ask for places in the stream of the last stage"
            )
    count = infos["logits"].shape[-1]
    if class_names is not None and len(class_names) != count:
        raise ValueError(f"{len(class_names)} class names for {count} classes of {model.spec.id}")
    chosen = list(range(count)) if keep is None else list(keep)
    if bad := [c for c in chosen if not 0 <= c < count]:
        raise ValueError(f"class {bad[0]} is not among the {count} of {model.spec.id}")
    with torch.no_grad():
        values = {name: v.clone() for name, v in model.run(x, names).items()}
        if translate is not None:
            values = {name: translate(name, value) for name, value in values.items()}
        stream_LBTD = torch.stack([values[name] for name in names])
        whole = _by(tail, stream_LBTD.flatten(0, 1), at_once // tail.tokens, chosen)
        parsed = [Site.parse(name) for name in names]
        coords: dict[str, object] = {
            "layer": [site.layer for site in parsed],
            "site": ("layer", names),
            "class": chosen if class_names is None else [class_names[c] for c in chosen],
        }
        dims = ("layer", "item", "class")
        shape = (len(names), n_items(x))
        variables: dict[str, object] = {"logit": (dims, whole.reshape(*shape, len(chosen)))}
        if tokens:
            size = at_once // tail.enough()
            single = _by(tail.of_tokens, stream_LBTD.flatten(0, 2), size, chosen)
            each = single.reshape(*shape, tail.tokens, len(chosen))
            variables["token"] = (("layer", "item", "position", "class"), each)
            numbers = list(range(tail.tokens))
            coords |= {"position": numbers, **position_coords(tail.grid, numbers)}
    found = xr.Dataset(variables, coords=coords).transpose("item", "layer", ...)
    return found.assign_attrs(reads=tail.reads(), model=model.spec.id)


def _by(
    read: Callable[[Tensor], Tensor], rows: Tensor, size: int, keep: Sequence[int]
) -> np.ndarray:
    parts = [read(some)[:, list(keep)].float().cpu() for some in torch.split(rows, max(1, size))]
    array: np.ndarray = torch.cat(parts).numpy()
    return array


def top_classes(lens: xr.Dataset, count: int = 3, variable: str = "token") -> xr.Dataset:
    """Return the classes of largest logit along a new dimension rank.

    Returns
    -------
    xarray.Dataset
        ``name`` (the class coordinate) and ``probability``, softmax over the classes kept.
    """
    values = lens[variable].transpose(..., "class")
    array = values.values - values.values.max(-1, keepdims=True)
    share = np.exp(array) / np.exp(array).sum(-1, keepdims=True)
    order = np.argsort(-share, axis=-1, kind="stable")[..., :count]
    dims = (*values.dims[:-1], "rank")
    kept: Mapping[object, object] = {
        name: coord for name, coord in values.coords.items() if "class" not in coord.dims
    }
    return xr.Dataset(
        {
            "name": (dims, values["class"].values[order]),
            "probability": (dims, np.take_along_axis(share, order, axis=-1)),
        },
        coords=dict(kept),
    )
