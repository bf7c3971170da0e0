"""Substitution loss: the model's own head with a site replaced by what a dictionary makes of it.

For every image one clean pass gives the sites read; the dictionary's output for the token kinds in
question then replaces the sites written, and the pass is run again. Zero and mean ablation replace
the same tokens, so the three costs compare.

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
from dictlearn.report import Substitution

if TYPE_CHECKING:
    from actstore.selection import Split
    from actstore.store import Store
    from vitmodels.spec import SiteInfo

log = logging.getLogger(__name__)

CONDITIONS = ("clean", "spliced", "zero", "mean")
_IMAGES_AT_ONCE = 64


def substitute(
    dictionary: Dictionary,
    store: Store,
    *,
    model: Any = True,
    data: Any = None,
    kinds: Sequence[str],
    items: Split | np.ndarray | None = None,
    images: int | None = 1000,
) -> Substitution:
    """Cross-entropy, top-1 and KL: clean, spliced, zero-ablated, mean-ablated.

    Images are the first of the store's table, which is a random order of the data set unless it was
    harvested from a stream.

    Raises
    ------
    ValueError
        The model has no head, a site is not editable, or model or data is not the store's.
    """
    model = _model(store, model)
    infos = model.sites()
    if "logits" not in infos:
        raise ValueError(
            f"{model.spec.id} has no classification head, so it has no loss to compare; evaluate "
            "without model="
        )
    for site in dictionary.config.writes:
        if not infos[site].editable:
            raise ValueError(f"{site} of {model.spec.id} is read-only: {infos[site].reason}")
    dictionary.to(model.device)
    source = _source(store, data)
    rows = _rows(store, items, images)
    labels = [row["label"] for row in rows]
    classes = int(np.prod(infos["logits"].shape))
    has_labels = all(v is not None and 0 <= v < classes for v in labels)
    sums: dict[str, np.ndarray] = {c: np.zeros(3) for c in CONDITIONS}
    means = {s: _kind_means(store, s, kinds) for s in dictionary.config.writes}
    for start in range(0, len(rows), _IMAGES_AT_ONCE):
        chosen = rows[start : start + _IMAGES_AT_ONCE]
        x = torch.stack([_image(model, source, row["source"]) for row in chosen]).to(model.device)
        with torch.inference_mode():
            logits = _conditions(dictionary, model, x, infos, kinds, means)
            clean_NC = logits["clean"].log_softmax(-1)
            target_N = clean_NC.argmax(-1)
            if has_labels:
                target_N = torch.tensor([r["label"] for r in chosen], device=model.device)
            for name, value_NC in logits.items():
                log_NC = value_NC.log_softmax(-1)
                sums[name] += [
                    float(F.nll_loss(log_NC, target_N, reduction="sum")),
                    float((log_NC.argmax(-1) == target_N).sum()),
                    float((clean_NC.exp() * (clean_NC - log_NC)).sum()),
                ]
    n = max(1, len(rows))
    return Substitution(
        images=len(rows),
        target="labels" if has_labels else "clean prediction",
        kinds=tuple(kinds),
        ce={c: float(sums[c][0]) / n for c in CONDITIONS},
        top1={c: float(sums[c][1]) / n for c in CONDITIONS},
        kl={c: float(sums[c][2]) / n for c in CONDITIONS},
    )


def _conditions(
    dictionary: Dictionary,
    model: Any,
    x: Tensor,
    infos: Mapping[str, SiteInfo],
    kinds: Sequence[str],
    means: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Logits [N, C] of a batch under every condition, in float32."""
    config = dictionary.config
    read = model.run(x, sites=[*config.reads, "logits"], stop_early=False)
    logits = {"clean": read["logits"].float()}
    taken = [_take(read[s], infos[s], kinds).float() for s in config.reads]
    images, tokens = taken[0].shape[:2]
    x_Br = torch.cat([v.flatten(0, 1) for v in taken], dim=1)
    out = dictionary.split(dictionary.decode_entries(dictionary.encode_entries(x_Br), x_Br))
    spliced = {s: v.view(images, tokens, -1) for s, v in out.items()}
    zero = {s: torch.zeros_like(v) for s, v in spliced.items()}
    mean = {
        s: torch.cat(
            [means[s][k].to(v).expand(images, _positions(infos[s], k).numel(), -1) for k in kinds],
            dim=1,
        )
        for s, v in spliced.items()
    }
    for name, new in (("spliced", spliced), ("zero", zero), ("mean", mean)):
        edits = {s: _put(infos[s], kinds, v) for s, v in new.items()}
        with model.editing(edits):
            logits[name] = model(x).float()
    return logits


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


def _model(store: Store, model: Any) -> Any:
    from actstore.verify import check_model

    if model is True:
        described = store.manifest.model
        if described is None:
            raise ValueError(
                f"{store.url} was not harvested from a model, so none can be loaded; pass model="
            )
        import vitmodels

        model = vitmodels.load(str(described["id"]))
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
