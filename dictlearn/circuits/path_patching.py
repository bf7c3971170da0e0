"""Path patching: the effect of a sender on a receiver along the direct path between them.

::

    1  run the base input, a sender's value being that of the other input and the outputs of all
       other attention layers and MLPs being frozen at the base; keep what the receivers then get
    2  run the base input with the receivers given that

With ``logits`` as the receiver, 1 is the answer: the direct effect. Wang et al. 2022
(arXiv:2211.00593), Goldowsky-Dill et al. 2023 (arXiv:2304.05969).

Shape legend: B items, K senders, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from dictlearn.circuits.metrics import Metric, values_of
from dictlearn.circuits.patching import Direction, baseline, check_pair, ends
from dictlearn.circuits.places import (
    AXES,
    Place,
    Positions,
    dataset,
    editable_sites,
    grid_places,
    require_logits,
    token_numbers,
)
from dictlearn.circuits.stacked import ROWS, Batch, chunks, copies_of, n_items, place_edits, stacked
from vitmodels.model import VisionModel
from vitmodels.names import Site
from vitmodels.spec import SiteInfo
from vitmodels.taps import Edit

_INTO_ATTENTION = {"attn_in", "q", "k", "v", "scores", "pattern", "z", "head_out"}
_INTO_MLP = {"mlp_in", "mlp_pre", "mlp_post"}


def patch_paths(
    model: VisionModel,
    clean: Batch,
    corrupted: Batch,
    senders: str | Sequence[str],
    receivers: str | Sequence[str],
    metric: Metric,
    *,
    direction: Direction = "denoise",
    over: Sequence[str] = AXES,
    positions: Positions | None = None,
    receiver_heads: Sequence[int] | None = None,
    receiver_positions: str | int | Sequence[int] | None = None,
    freeze_mlps: bool = True,
    rows: int = ROWS,
    per_item: bool = False,
) -> xr.Dataset:
    """Return the metric after patching each sender into the receivers only.

    Parameters
    ----------
    model, clean, corrupted, metric, direction, rows, per_item
        As in `dictlearn.circuits.activation_patching`.
    senders
        Sites whose places are tried one by one: ``"blocks.*.z"`` (heads), ``"blocks.*.mlp_out"``.
    over, positions
        How the senders are cut.
    receivers
        Sites that get the effect, all at once: ``"blocks.3.q"``, ``"blocks.3.mlp_in"``, or
        ``"logits"``. Senders that do not come before every receiver have no effect on it.
    receiver_heads, receiver_positions
        Restrict the receivers.
    freeze_mlps
        Freeze MLPs between; False counts paths through MLPs as direct, as Wang et al. do.

    Returns
    -------
    xarray.Dataset
        As `activation_patching`, over the senders.

    Raises
    ------
    ValueError
        As `activation_patching`; a sender behind all receivers; a model without sites for the
        outputs of its attention.
    """
    require_logits(model)
    check_pair(clean, corrupted)
    infos = editable_sites(model, senders)
    ends_at = editable_sites(model, receivers)
    order = list(model.anatomy.taps)
    last = max(order.index(name) for name in ends_at)
    if late := [name for name in infos if order.index(name) >= last]:
        raise ValueError(
            f"sender {late[0]} does not come before a receiver ({', '.join(ends_at)}), so there "
            "is no path between them"
        )
    places = grid_places(infos, over, positions)
    base, other = ends(clean, corrupted, direction)
    frozen_names = _branches(model, freeze_mlps)
    with torch.no_grad():
        source = model.run(other, list(infos))
        frozen = {name: v.clone() for name, v in model.run(base, frozen_names).items()}
    items = n_items(base)
    direct = set(ends_at) == {"logits"}
    result: list[Tensor] = [torch.empty(0)] * len(places)
    with torch.no_grad():
        for chunk in chunks(places, max(1, rows // items)):
            chosen = [place for _, place in chunk]
            own = {name for p in chosen if (name := _own_branch(p.site)) is not None}
            freeze = {n: _frozen(v) for n, v in frozen.items() if n not in own}
            edits = place_edits(chosen, source, infos)
            with (
                stacked(model, base, len(chosen), chosen[0].site, freeze) as batch,
                model.editing(edits),
            ):
                got = model.run(batch, list(ends_at))
            logits = (
                got["logits"]
                if direct
                else _second(
                    model, base, got, ends_at, len(chosen), receiver_heads, receiver_positions
                )
            )
            copies = copies_of(logits, len(chosen))
            for (number, _), logits_BC in zip(chunk, copies, strict=True):
                result[number] = values_of(metric, logits_BC)
    values = torch.stack(result)
    found = dataset(places, values if per_item else values.mean(1), infos)
    return found.assign_attrs(
        clean=baseline(model, clean, metric),
        corrupted=baseline(model, corrupted, metric),
        direction=direction,
        receivers=list(ends_at),
        model=model.spec.id,
    )


def _second(
    model: VisionModel,
    base: Batch,
    got: Mapping[str, Tensor],
    infos: Mapping[str, SiteInfo],
    count: int,
    heads: Sequence[int] | None,
    positions: str | int | Sequence[int] | None,
) -> Tensor:
    """Logits of the base input with the receivers given what the first pass found for them."""
    edits = {}
    for name, info in infos.items():
        tokens = None if positions is None else token_numbers(info, positions)
        if heads is not None and "head" not in info.axes:
            raise ValueError(f"receiver {name} has no heads to choose from: {info.axes}")
        cells = [
            Place(site=name, head=head, tokens=tokens).index(info.axes)
            for head in ([None] if heads is None else heads)
        ]
        edits[name] = _given(got[name], cells)
    with stacked(model, base, count, next(iter(infos)), edits) as batch:
        return model(batch)


def _given(new: Tensor, cells: Sequence[tuple[Any, ...]]) -> Edit:
    def edit(value: Tensor) -> Tensor:
        for index in cells:
            value[index] = new[index]
        return value

    return edit


def _frozen(value: Tensor) -> Edit:
    def edit(now: Tensor) -> Tensor:
        return value.expand(len(now) // len(value), *value.shape).reshape(now.shape)

    return edit


def _branches(model: VisionModel, mlps: bool) -> list[str]:
    """Every site whose value a block adds to the stream."""
    found = [
        name
        for name, tap in model.anatomy.taps.items()
        if not tap.reason and (name.endswith("attn_out") or (mlps and name.endswith("mlp_out")))
    ]
    if not any(name.endswith("attn_out") for name in found):
        raise ValueError(
            f"{model.spec.id} has no site attn_out, so attention cannot be frozen between sender "
            "and receiver; use activation_patching"
        )
    return found


def _own_branch(site: str) -> str | None:
    """Branch that a sender is inside of: freezing it would hide the sender."""
    parsed = Site.parse(site)
    stem = site.removesuffix(parsed.part)
    if parsed.part in _INTO_ATTENTION:
        return f"{stem}attn_out"
    return f"{stem}mlp_out" if parsed.part in _INTO_MLP else None
