"""Substitution loss: what heads say when a site is replaced by what a dictionary makes of it.

For every image one clean pass gives the sites read; the dictionary's output for the token kinds in
question then replaces the sites written, and the pass is run again. Zero and mean ablation replace
the same tokens, so the costs compare. ``error`` replaces them by the dictionary's output plus its
error on the clean pass (Marks et al. 2024, arXiv:2403.19647, section 2): the model must then do
what it did, so that any difference is one of wiring or rounding. Heads: `dictlearn.heads`.

Shapes: N images, T tokens of a site, t those replaced, d channels, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dictlearn.dictionary import Dictionary
from dictlearn.heads import Head, model_heads
from dictlearn.report import Substitution

if TYPE_CHECKING:
    from actstore.selection import Split
    from actstore.store import Store
    from vitmodels.spec import SiteInfo

log = logging.getLogger(__name__)

CONDITIONS = ("clean", "spliced", "error", "zero", "mean")
_IMAGES_AT_ONCE = 64


def substitute(
    dictionary: Dictionary,
    store: Store,
    *,
    model: Any = True,
    heads: Sequence[Head] | None = None,
    data: Any = None,
    kinds: Sequence[str],
    items: Split | np.ndarray | None = None,
    images: int | None = 1000,
) -> list[Substitution]:
    """Cross-entropy, top-1 and KL under every condition, for every head from the same passes.

    Images are the first of the store's table, which is a random order of the data set unless it was
    harvested from a stream.

    Raises
    ------
    ValueError
        The model has no head, a site is not editable, or model or data is not the store's.
    """
    model = _model(store, model)
    infos = model.sites()
    chosen_heads = list(model_heads(model) if heads is None else heads)
    for head in chosen_heads:
        if head.site not in infos:
            raise ValueError(f"{head.name!r} reads {head.site!r}, which {model.spec.id} lacks")
    for site in dictionary.config.writes:
        if not infos[site].editable:
            raise ValueError(f"{site} of {model.spec.id} is read-only: {infos[site].reason}")
    dictionary.to(model.device)
    source = _source(store, data)
    rows = _rows(store, items, images)
    means = {s: _kind_means(store, s, kinds) for s in dictionary.config.writes}
    tallies = [_Tally(head, [row["label"] for row in rows]) for head in chosen_heads]
    for start in range(0, len(rows), _IMAGES_AT_ONCE):
        chosen = rows[start : start + _IMAGES_AT_ONCE]
        x = torch.stack([_image(model, source, row["source"]) for row in chosen]).to(model.device)
        with torch.inference_mode():
            sites = list(dict.fromkeys(head.site for head in chosen_heads))
            values = _conditions(dictionary, model, x, infos, kinds, means, sites)
            for tally in tallies:
                tally.add(values, infos, start)
    return [tally.result(kinds) for tally in tallies]


class _Tally:
    """Sums of one head over the images."""

    def __init__(self, head: Head, labels: Sequence[int | None]) -> None:
        self.head, self.labels = head, labels
        self.sums = {c: np.zeros(3) for c in CONDITIONS}
        self.has_labels: bool | None = None

    def add(
        self,
        values: Mapping[str, Mapping[str, Tensor]],
        infos: Mapping[str, SiteInfo],
        start: int,
    ) -> None:
        """Add a batch whose first image is number `start`; `values` by condition and site."""
        site = self.head.site
        log_p = {c: self.head(v[site], infos[site]).log_softmax(-1) for c, v in values.items()}
        clean_NC = log_p["clean"]
        if self.has_labels is None:
            classes = clean_NC.shape[1]
            self.has_labels = all(v is not None and 0 <= v < classes for v in self.labels)
        target_N = clean_NC.argmax(-1)
        if self.has_labels:
            here = list(self.labels[start : start + len(clean_NC)])
            target_N = torch.tensor(here, device=clean_NC.device)
        for name, log_NC in log_p.items():
            self.sums[name] += [
                float(F.nll_loss(log_NC, target_N, reduction="sum")),
                float((log_NC.argmax(-1) == target_N).sum()),
                float((clean_NC.exp() * (clean_NC - log_NC)).sum()),
            ]

    def result(self, kinds: Sequence[str]) -> Substitution:
        """Divide the sums."""
        n = max(1, len(self.labels))
        ce, top1, kl = ({c: float(self.sums[c][i]) / n for c in CONDITIONS} for i in range(3))
        return Substitution(
            images=len(self.labels),
            target="labels" if self.has_labels else "clean prediction",
            kinds=tuple(kinds),
            head=self.head.name,
            ce=ce,
            top1=top1,
            kl=kl,
        )


def _conditions(
    dictionary: Dictionary,
    model: Any,
    x: Tensor,
    infos: Mapping[str, SiteInfo],
    kinds: Sequence[str],
    means: Mapping[str, Mapping[str, Tensor]],
    sites: Sequence[str],
) -> dict[str, dict[str, Tensor]]:
    """Values of `sites` for a batch under every condition."""
    config = dictionary.config
    wanted = list(dict.fromkeys([*config.reads, *config.writes, *sites]))
    clean = model.run(x, sites=wanted)
    found = {"clean": {s: clean[s] for s in sites}}
    taken = [_take(clean[s], infos[s], kinds).float() for s in config.reads]
    images, tokens = taken[0].shape[:2]
    x_Br = torch.cat([v.flatten(0, 1) for v in taken], dim=1)
    out = dictionary.split(dictionary.decode_entries(dictionary.encode_entries(x_Br), x_Br))
    spliced = {s: v.view(images, tokens, -1) for s, v in out.items()}
    target = {s: _take(clean[s], infos[s], kinds).float() for s in config.writes}
    error = {s: v + (target[s] - v) for s, v in spliced.items()}
    zero = {s: torch.zeros_like(v) for s, v in spliced.items()}
    mean = {
        s: torch.cat(
            [means[s][k].to(v).expand(images, _positions(infos[s], k).numel(), -1) for k in kinds],
            dim=1,
        )
        for s, v in spliced.items()
    }
    for name, new in (("spliced", spliced), ("error", error), ("zero", zero), ("mean", mean)):
        edits = {s: _put(infos[s], kinds, v) for s, v in new.items()}
        with model.editing(edits):
            found[name] = dict(model.run(x, sites=list(sites)))
    return found


def _positions(info: SiteInfo, kind: str) -> Tensor:
    """Token numbers of a kind at a site."""
    if info.grid is None:
        return torch.zeros(1, dtype=torch.long)
    cut = info.grid.slice(kind)
    return torch.arange(cut.start, cut.stop)


def _take(value: Tensor, info: SiteInfo, kinds: Sequence[str]) -> Tensor:
    """Tokens of some kinds as [N, t, d], laid out as a store does."""
    axis = info.token_axis
    if axis is None:
        return value.reshape(len(value), 1, -1)
    index = torch.cat([_positions(info, k) for k in kinds]).to(value.device)
    return value.movedim(axis + 1, 1)[:, index].flatten(2)


def _put(info: SiteInfo, kinds: Sequence[str], new: Tensor) -> Callable[[Tensor], Tensor]:
    """Inverse of `_take`, as an edit: the other tokens keep their values."""
    index = torch.cat([_positions(info, k) for k in kinds])

    def edit(value: Tensor) -> Tensor:
        fitting = new.to(device=value.device, dtype=value.dtype)
        axis = info.token_axis
        if axis is None:
            return fitting.view(value.shape)
        rows = value.movedim(axis + 1, 1).clone()
        rows[:, index.to(value.device)] = fitting.reshape(*fitting.shape[:2], *rows.shape[2:])
        return rows.movedim(1, axis + 1)

    return edit


def _kind_means(store: Store, site: str, kinds: Sequence[str]) -> dict[str, Tensor]:
    return {k: torch.from_numpy(store.stats(site, k).mean).float() for k in kinds}


def store_model(
    store: Store, weights: str | None = None, classes: Sequence[str] | None = None
) -> Any:
    """Load the model of a store's manifest at the input size it was harvested with.

    Parameters
    ----------
    store
        Harvested from a model.
    weights
        Local file of its weights.
    classes
        Class names: a zero-shot classifier over them behind an image tower of open_clip.

    Raises
    ------
    ValueError
        The store was not harvested from a model, or what loads is another one.
    """
    from actstore.verify import check_model

    described = store.manifest.model
    if described is None:
        raise ValueError(
            f"{store.url} was not harvested from a model, so none can be loaded; pass model="
        )
    import vitmodels
    from vitmodels.zeroshot import load_zero_shot

    options: dict[str, Any] = {"weights": weights}

    def load(**more: Any) -> Any:
        if classes is None:
            return vitmodels.load(str(described["id"]), **options, **more)
        return load_zero_shot(str(described["id"]), classes, **options, **more)

    model = load()
    shape = tuple(described["input_shape"])
    if tuple(model.spec.input_shape) != shape and len(shape) == 3:
        model = load(img_size=shape[-1])
    check_model(store, model)
    return model


def _model(store: Store, model: Any) -> Any:
    from actstore.verify import check_model

    if model is True:
        return store_model(store)
    check_model(store, model)
    return model


def _source(store: Store, data: Any) -> Any:
    from actstore.sources import check_source, open_source, reopen_source

    if data is None:
        return reopen_source(store.manifest.data)
    source = open_source(data)
    check_source(source, store.manifest.data)
    return source


def _rows(store: Store, items: Split | np.ndarray | None, images: int | None) -> list[Any]:
    from actstore.selection import Selection

    table = store.table().select(["position", "source", "label"])
    if items is not None:
        selection = Selection(store, store.sites[0], items=items)
        size = store.manifest.items_per_part
        wanted: set[int] = set()
        for part, count in zip(selection.parts.tolist(), selection.counts.tolist(), strict=True):
            rows = selection.rows(part)
            numbers = np.arange(count) if rows is None else rows
            wanted.update((part * size + numbers).tolist())
        mask = [p in wanted for p in table["position"].to_pylist()]
        table = table.filter(mask)
    rows_: list[Any] = table.slice(0, images).to_pylist()
    if not rows_:
        raise ValueError(f"{store.url} has no item left to run the model on")
    return rows_


def _image(model: Any, source: Any, index: int) -> Tensor:
    image = source.image(index)
    if isinstance(image, Tensor | np.ndarray):
        return torch.as_tensor(image)
    out: Tensor = model.transform(image)
    return out
