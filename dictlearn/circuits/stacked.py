"""Many small edits in one forward pass: every edit has a copy of the batch of its own.

A chunk of K places makes a batch of K x B rows, row ``k * B + b`` being item b edited at place k.
Blocks before the first place of a chunk see B rows only: the batch grows, by copies, at the last
border of blocks before it. Where a module cannot bear that (checked once for each place in the
model, against the plain pass) the whole pass has K x B rows.

Shape legend: K places, B items, C classes.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dictlearn.circuits.metrics import Metric, values_of
from dictlearn.circuits.places import Place
from vitmodels.layouts import LaidOutTap
from vitmodels.model import VisionModel
from vitmodels.spec import SiteInfo
from vitmodels.taps import Edit, InputTap, OutputTap

log = logging.getLogger(__name__)

Batch = Tensor | Mapping[str, Tensor]
ROWS = 64
"""Rows of a forward pass."""

_GROWS: weakref.WeakKeyDictionary[nn.Module, dict[str, bool]] = weakref.WeakKeyDictionary()


def n_items(x: Batch) -> int:
    """Return the number of items of a batch."""
    return len(next(iter(x.values()))) if isinstance(x, Mapping) else len(x)


def repeated(x: Batch, times: int) -> Batch:
    """Return the batch `times` times over."""
    if isinstance(x, Mapping):
        return {key: value.repeat(times, *[1] * (value.dim() - 1)) for key, value in x.items()}
    return x.repeat(times, *[1] * (x.dim() - 1))


def copies_of(value: Tensor, count: int) -> Tensor:
    """View ``[K * B, ...]`` as ``[K, B, ...]``."""
    return value.view(count, len(value) // count, *value.shape[1:])


@contextmanager
def rewriting(model: VisionModel, site: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change a site's value to one with any number of rows (`editing` keeps their number).

    Raises
    ------
    ValueError
        The site is not the input or output of a module.
    """
    tap = model.anatomy.taps[site]
    to_site: Callable[[Tensor], Tensor] = _same
    from_site: Callable[[Tensor], Tensor] = _same
    if isinstance(tap, LaidOutTap):
        to_site, from_site, tap = tap.layout.to_site, tap.layout.from_site, tap.inner
    if isinstance(tap, OutputTap):
        output_tap = tap

        def after(_module: nn.Module, _args: Any, output: Any) -> Any:
            value = change(to_site(output_tap.read(output)))
            return output_tap.write(output, from_site(value))

        handle = tap.module.register_forward_hook(after)
    elif isinstance(tap, InputTap):
        input_tap, key = tap, tap.argument

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = args[key] if isinstance(key, int) else kwargs[key]
            new = input_tap.write(given, from_site(change(to_site(input_tap.read(given)))))
            if isinstance(key, int):
                return (*args[:key], new, *args[key + 1 :]), kwargs
            return args, {**kwargs, key: new}

        handle = tap.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        raise ValueError(f"the rows of site {site} of {model.spec.id} cannot change in number")
    try:
        yield
    finally:
        handle.remove()


def _same(value: Tensor) -> Tensor:
    return value


def _growing(model: VisionModel, site: str, times: int) -> AbstractContextManager[None]:
    return rewriting(model, site, lambda value: value.repeat(times, *[1] * (value.dim() - 1)))


def grows_at(model: VisionModel, x: Batch, first: str) -> str | None:
    """Return the last border of blocks at or before a site if the batch may grow there, or None.

    The candidate is tried: two copies must give the logits of the plain pass.
    """
    site = None
    for name in model.anatomy.taps:
        if name.endswith((".resid_pre", ".resid_post")):
            site = name
        if name == first:
            break
    if site is None:
        return None
    known = _GROWS.setdefault(model.module, {})
    if site not in known:
        one = {k: v[:1] for k, v in x.items()} if isinstance(x, Mapping) else x[:1]
        try:
            with torch.no_grad():
                plain = model(one)
                with _growing(model, site, 2):
                    grown = model(one)
            scale = max(1.0, float(plain.abs().max()))
            known[site] = grown.shape[0] == 2 and bool(
                torch.allclose(grown, plain.expand_as(grown), rtol=1e-3, atol=1e-4 * scale)
            )
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError):
            known[site] = False
        if not known[site]:
            log.info("the batch of %s cannot grow at %s", model.spec.id, site)
    return site if known[site] else None


@contextmanager
def stacked(
    model: VisionModel, x: Batch, times: int, first: str, edits: Mapping[str, Edit]
) -> Iterator[Batch]:
    """Give a batch such that the sites from `first` on see `times` copies of `x`, edited."""
    site = grows_at(model, x, first) if times > 1 else None
    # The growth is hooked before the edits, which therefore see all rows.
    with _growing(model, site, times) if site else nullcontext(), model.editing(edits):
        yield x if site or times == 1 else repeated(x, times)


def place_edits(
    places: Sequence[Place | Sequence[Place]],
    source: Mapping[str, Tensor],
    infos: Mapping[str, SiteInfo],
) -> dict[str, Edit]:
    """Return edits of K x B rows: copy k takes the source's values at place k, or at several.

    Parameters
    ----------
    places
        K of them, or K sets of them.
    source
        Site -> ``[B, *shape]``.
    infos
        Sites by name.
    """
    by_site: dict[str, list[tuple[int, Place]]] = {}
    for k, given in enumerate(places):
        for place in [given] if isinstance(given, Place) else given:
            by_site.setdefault(place.site, []).append((k, place))
    count = len(places)

    def make(site: str, mine: Sequence[tuple[int, Place]]) -> Edit:
        new = source[site]
        cells = [(k, place.index(infos[site].axes)) for k, place in mine]

        def edit(value: Tensor) -> Tensor:
            rows = copies_of(value, count)
            for k, index in cells:
                rows[k][index] = new[index]
            return value

        return edit

    return {site: make(site, mine) for site, mine in by_site.items()}


def chunks(places: Sequence[Place], size: int) -> Iterator[list[tuple[int, Place]]]:
    """Cut numbered places into chunks of at most `size` that never hold two layers."""
    numbered = list(enumerate(places))
    layered = itertools.groupby(numbered, key=lambda pair: pair[1].site.rpartition(".")[0])
    for _, group in layered:
        rest = list(group)
        for start in range(0, len(rest), size):
            yield rest[start : start + size]


def run_places(
    model: VisionModel,
    x: Batch,
    places: Sequence[Place],
    source: Mapping[str, Tensor],
    metric: Metric,
    *,
    infos: Mapping[str, SiteInfo],
    rows: int = ROWS,
) -> Tensor:
    """Return the metric ``[places, B]`` of runs of `x` edited at one place each.

    Parameters
    ----------
    x
        B items.
    places, source, infos
        See :func:`place_edits`.
    metric
        ``logits [B, C] -> [B]``.
    rows
        Largest number of rows of a pass (at least one place of all items).
    """
    items = n_items(x)
    result: list[Tensor | None] = [None] * len(places)
    with torch.no_grad():
        for chunk in chunks(places, max(1, rows // items)):
            chosen = [place for _, place in chunk]
            edits = place_edits(chosen, source, infos)
            with stacked(model, x, len(chosen), chosen[0].site, edits) as batch:
                logits = copies_of(model(batch), len(chosen))
            for (number, _), logits_BC in zip(chunk, logits, strict=True):
                result[number] = values_of(metric, logits_BC)
    return torch.stack([value for value in result if value is not None])


def run_sets(
    model: VisionModel,
    x: Batch,
    sets: Sequence[Sequence[Place]],
    source: Mapping[str, Tensor],
    metric: Metric,
    *,
    infos: Mapping[str, SiteInfo],
    rows: int = ROWS,
) -> Tensor:
    """Return the metric ``[sets, B]`` of runs of `x` edited at all places of one set each.

    Parameters are those of :func:`run_places`.
    """
    items = n_items(x)
    order = {name: number for number, name in enumerate(model.anatomy.taps)}
    size = max(1, rows // items)
    result: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, len(sets), size):
            chosen = sets[start : start + size]
            first = min((p.site for places in chosen for p in places), key=order.__getitem__)
            edits = place_edits(chosen, source, infos)
            with stacked(model, x, len(chosen), first, edits) as batch:
                logits = copies_of(model(batch), len(chosen))
            result += [values_of(metric, logits_BC) for logits_BC in logits]
    return torch.stack(result)
