"""Direct logit attribution: a logit as an exact sum over the parts of the model.

With the denominators of all norms held at their values for the input, the logit is affine in what
the blocks add to the stream, so that::

    logit = embed + sum of heads + biases of attention + sum of MLPs + bias
          and a part is  grad . value,  grad taken along the residual path alone

A head's part is its z through the output projection (LayerScale, and norms behind it, included). A
dictionary at a site splits the site's part into its latents, its constant terms and its error.
``bias`` is what the logit is when everything else is zero. Nothing is a remainder: every part is
computed by itself, and the sum is checked against the logit. Elhage et al. 2021, "A mathematical
framework for transformer circuits".

Shape legend: B items, C classes, T tokens, H heads, F latents, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from dictlearn.circuits.latent_parts import coded, latent_parts
from dictlearn.circuits.places import position_coords, require_logits
from dictlearn.circuits.replacement_norms import frozen, recording
from dictlearn.circuits.stacked import Batch
from dictlearn.dictionary import Dictionary
from vitmodels.model import VisionModel
from vitmodels.names import Site
from vitmodels.taps import Edit
from vitmodels.zeroshot import ZeroShotHead

TOLERANCE = 1e-4
"""Largest error of the sum, in units of the largest logit (at least of 1)."""
_BRANCHES = {"attn_out": "attn", "mlp_out": "mlp", "local_out": "local"}
_MANY_CLASSES = 32


@dataclass(kw_only=True)
class _Cuts:
    """Values at which the graph is cut: leaves behind the cut, what arrived before it."""

    leaves: dict[str, Tensor] = field(default_factory=dict)
    arrived: dict[str, Tensor] = field(default_factory=dict)

    def edit(self, site: str, *, zero: bool) -> Edit:
        def cut(value: Tensor) -> Tensor:
            self.arrived[site] = value
            new = torch.zeros_like(value) if zero else value.detach().requires_grad_(True)
            self.leaves[site] = new
            return new

        return cut

    def edits(self, sites: Sequence[str], *, zero: bool = False) -> dict[str, Edit]:
        return {site: self.edit(site, zero=zero) for site in sites}


def attribute_logits(
    model: VisionModel,
    x: Batch,
    classes: Sequence[int] | None = None,
    *,
    dictionaries: Sequence[Dictionary] = (),
    by_position: bool = False,
    class_names: Sequence[str] | None = None,
) -> xr.Dataset:
    """Return the parts of logits, which sum to them.

    Parameters
    ----------
    model
        With a head that is affine behind its norms: linear on CLS, on averaged patches, on both;
        or a zero-shot head (its cosine's length is held fixed too).
    x
        B inputs.
    classes
        Classes to attribute; by default all, where there are at most 32.
    dictionaries
        Dictionaries to split sites by: they write ``mlp_out``, ``attn_out`` (SAEs, transcoders),
        or a place in the stream, which then stands for all that came before it.
    by_position
        Keep the token that a part was written to, except for latents.
    class_names
        Names of all classes, to label the dimension class.

    Returns
    -------
    xarray.Dataset
        Dimensions item and class, and: ``embed``; ``heads`` [layer, head] (``attn`` [layer] where
        heads cannot be told apart); ``attn_bias`` [layer]; ``mlp`` [layer]; ``bias``; with
        dictionaries ``latents`` [dictionary, latent], ``code_bias`` [site], ``error`` [site].
        Branches with names of their own keep them (``temporal.heads``). The coordinate ``logit``
        is the model's own; the attribute ``gap`` the largest difference of the sum.

    Raises
    ------
    ValueError
        No head; a model whose logit is not affine in its parts (attention pooling, max-pooling
        between stages); a dictionary of another model.
    """
    require_logits(model)
    chosen = _classes(model, classes)
    infos = model.sites()
    branches, start = _branches(model)
    codes = [coded(model, x, dictionary) for dictionary in dictionaries]
    places = [s for code in codes for s in code.outputs if s not in branches]
    if len(set(places)) > 1:
        raise ValueError(
            f"several dictionaries stand in the stream ({', '.join(sorted(set(places)))}), and "
            "the later replaces the earlier; give one of them"
        )
    heads = {b: z for b in branches if (z := _z_of(model, b)) is not None}
    cut = list(dict.fromkeys([start, *heads.values(), *branches, *places]))
    known = _Cuts()
    with torch.no_grad(), _recording(model) as held:
        logits_BC = model(x)[:, chosen]
    with torch.enable_grad(), held(), model.editing(known.edits(cut)):
        frozen_BC = model(x)[:, chosen]
    nothing = _Cuts()
    with torch.no_grad(), held(), model.editing(nothing.edits(cut, zero=True)):
        bias_BC = model(x)[:, chosen]
    streams = [start, *branches, *places]
    grads = _gradients(frozen_BC, [known.leaves[site] for site in streams])
    grad = dict(zip(streams, grads, strict=True))  # site -> [C, B, ...] or None if cut off
    parts: dict[str, list[tuple[int | None, Tensor]]] = {}
    split = {site for code in codes for site in code.outputs}
    for site in streams:
        slope = grad[site]
        if slope is None or site in split:
            continue
        name, layer = _variable(site, start)
        if site in heads:
            found = _head_parts(known, nothing, site, heads[site], slope)
            if found is not None:
                head_name = name.removesuffix("attn") + "heads"
                parts.setdefault(head_name, []).append((layer, found[0]))
                parts.setdefault(f"{name}_bias", []).append((layer, found[1]))
                continue
        parts.setdefault(name, []).append((layer, _dot(slope, known.leaves[site], 2)))
    variables = {name: _labelled(name, values, by_position) for name, values in parts.items()}
    variables["bias"] = xr.DataArray(_array(bias_BC.double()), dims=("item", "class"))
    if codes:
        variables |= latent_parts(codes, grad, known.leaves)
    result = xr.Dataset(variables)
    if by_position and (grid := infos[start].grid) is not None and "position" in result.dims:
        tokens = list(range(result.sizes["position"]))
        result = result.assign_coords(position=tokens, **position_coords(grid, tokens))
    names = chosen if class_names is None else [class_names[c] for c in chosen]
    result = result.assign_coords({"class": names, "logit": (("item", "class"), _array(logits_BC))})
    gap = float(np.abs(total(result) - result["logit"]).max())
    _check(model, gap, logits_BC, frozen_BC)
    return result.assign_attrs(gap=gap, model=model.spec.id)


def total(parts: xr.Dataset) -> xr.DataArray:
    """Return the sum of all parts [item, class]."""
    sums = [
        value.sum([d for d in value.dims if d not in ("item", "class")])
        for value in parts.data_vars.values()
    ]
    result: xr.DataArray = sum(sums[1:], start=sums[0])
    return result.transpose("item", "class")


def _check(model: VisionModel, gap: float, logits_BC: Tensor, frozen_BC: Tensor) -> None:
    scale = max(1.0, float(logits_BC.abs().max()))
    if gap <= TOLERANCE * scale:
        return
    if float((frozen_BC.detach() - logits_BC).abs().max()) > TOLERANCE * scale:
        why = "its norms cannot be held fixed: a pass with fixed denominators gives other logits"
    else:
        why = (
            "its logit is not affine in what its blocks add: the head pools by attention or has a "
            "nonlinearity, or the stream is pooled or mixed between blocks"
        )
    raise ValueError(
        f"direct logit attribution does not hold for {model.spec.id} (family "
        f"{model.spec.family}): {why}. The parts miss the logit by {gap:.3g}. Use "
        "attribution_patching or activation_patching, which assume nothing"
    )


def _classes(model: VisionModel, classes: Sequence[int] | None) -> list[int]:
    count = model.sites()["logits"].shape[-1]
    if classes is None:
        if count > _MANY_CLASSES:
            raise ValueError(
                f"{model.spec.id} has {count} classes; name those to attribute: classes=[...]"
            )
        return list(range(count))
    if bad := [c for c in classes if not 0 <= c < count]:
        raise ValueError(f"class {bad[0]} is not among the {count} of {model.spec.id}")
    return [int(c) for c in classes]


def _branches(model: VisionModel) -> tuple[list[str], str]:
    """Sites whose values are added to the stream, and the site where the stream starts."""
    names = list(model.anatomy.taps)
    starts = [n for n in names if n.endswith(".resid_pre")]
    found = [n for n in names if n.rpartition(".")[2] in _BRANCHES]
    layers = {n.rpartition(".resid_post")[0] for n in names if n.endswith(".resid_post")}
    bare = [b for b in layers if not any(n.startswith(f"{b}.") for n in found)]
    read_only = [n for n in [*starts[:1], *found] if model.anatomy.taps[n].reason]
    if not starts or bare or read_only:
        why = (
            f"{read_only[0]} cannot be written: {model.anatomy.taps[read_only[0]].reason}"
            if read_only
            else f"{min(bare) if bare else 'it'} has no sites for what its branches add"
        )
        raise ValueError(
            f"direct logit attribution does not hold for {model.spec.id} (family "
            f"{model.spec.family}): {why}. Use activation_patching"
        )
    return found, starts[0]


def _z_of(model: VisionModel, branch: str) -> str | None:
    if not branch.endswith("attn_out"):
        return None
    tap = model.anatomy.taps.get(branch.removesuffix("attn_out") + "z")
    return None if tap is None or tap.reason else branch.removesuffix("attn_out") + "z"


def _variable(site: str, start: str) -> tuple[str, int | None]:
    if site == start:
        return "embed", None
    parsed = Site.parse(site)
    stem, _, last = parsed.part.rpartition(".")
    words = [w for w in (parsed.prefix, stem, _BRANCHES.get(last, last)) if w]
    return ".".join(words), parsed.layer


def _gradients(values_BC: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradient of every class's logits at every leaf ``[C, *leaf]``; None where there is none."""
    if not values_BC.requires_grad:
        return [None] * len(leaves)
    by_class = [
        torch.autograd.grad(column.sum(), leaves, retain_graph=True, allow_unused=True)
        for column in values_BC.unbind(1)
    ]
    return [
        None if any(g is None for g in grads) else torch.stack([g for g in grads if g is not None])
        for grads in zip(*by_class, strict=True)
    ]


def _dot(grad: Tensor, value: Tensor, kept: int) -> Float[Tensor, "class item ..."]:
    """Product summed over all dimensions of a site's value but its first `kept` - 1."""
    product = grad.double() * value.detach().double()
    return product.flatten(kept + 1).sum(-1) if product.dim() > kept + 1 else product


def _head_parts(
    known: _Cuts, nothing: _Cuts, branch: str, z: str, grad: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Parts ``[C, B, T, H]`` of the heads and ``[C, B, T]`` of the biases, None if z is not all."""
    if not known.arrived[branch].requires_grad:
        return None
    leaf = known.leaves[z]
    at_z = [
        torch.autograd.grad(known.arrived[branch], leaf, g, retain_graph=True, allow_unused=True)[0]
        for g in grad
    ]
    if any(g is None for g in at_z):
        return None
    product = torch.stack([g for g in at_z if g is not None]).double() * leaf.detach().double()
    heads_CBTH = product.sum(-1)
    bias_CBT = _dot(grad, nothing.arrived[branch], 2)
    whole_CBT = _dot(grad, known.arrived[branch], 2)
    if heads_CBTH.shape[:3] != whole_CBT.shape:
        return None
    gap = (heads_CBTH.sum(-1) + bias_CBT - whole_CBT).sum(-1).abs().max()
    # Not affine in z (a gate that depends on the input): the attention stays one part.
    return (heads_CBTH, bias_CBT) if float(gap) <= TOLERANCE / 10 * _scale(whole_CBT) else None


def _scale(value: Tensor) -> float:
    return max(1.0, float(value.sum(-1).abs().max()))


def _labelled(
    name: str, values: Sequence[tuple[int | None, Tensor]], by_position: bool
) -> xr.DataArray:
    """Stack ``[C, B, T(, H)]`` of the layers."""
    dims = ["class", "item", "position", *(["head"] if name.endswith("heads") else [])]
    tensors = [value for _, value in values]
    if by_position and len({t.shape for t in tensors}) > 1:
        raise ValueError(f"layers of {name} differ in tokens: leave by_position out")
    if not by_position:
        tensors, dims = [t.sum(2) for t in tensors], [d for d in dims if d != "position"]
    layers = [layer for layer, _ in values]
    if layers == [None]:
        return xr.DataArray(_array(tensors[0]), dims=dims)
    arrays = [xr.DataArray(_array(t), dims=dims) for t in tensors]
    if "head" in dims:  # stages of a hierarchical model differ in heads: NaN where there is none
        arrays = [a.assign_coords(head=np.arange(a.sizes["head"])) for a in arrays]
    along = xr.DataArray(layers, dims="layer", name="layer")
    return xr.concat(arrays, dim=along, join="outer")


def _array(value: Tensor) -> np.ndarray:
    array: np.ndarray = value.detach().cpu().numpy()
    return array


@contextmanager
def _recording(model: VisionModel) -> Iterator[Any]:
    """Record norms, and the lengths of zero-shot features; gives a context that holds them."""
    lengths: dict[nn.Module, Tensor] = {}

    def measure(module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
        lengths[module] = args[0].norm(dim=-1, keepdim=True).clamp_min(1e-12)

    heads = [m for m in model.module.modules() if isinstance(m, ZeroShotHead)]
    handles = [m.register_forward_hook(measure) for m in heads]

    @contextmanager
    def held() -> Iterator[None]:
        def affine(module: ZeroShotHead, args: tuple[Any, ...], _output: Any) -> Tensor:
            cosines_BC: Tensor = args[0] / lengths[module] @ module.weight_CE.T
            return cosines_BC * module.scale + module.bias

        mine = [m.register_forward_hook(affine) for m in heads]
        try:
            with frozen(recorded):
                yield
        finally:
            for handle in mine:
                handle.remove()

    try:
        with recording(model.module) as recorded:
            yield held
    finally:
        for handle in handles:
            handle.remove()
