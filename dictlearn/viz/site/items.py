"""Pages of items: their pictures, the latents they stand for, and what the model does on some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from actstore.sources import Undecodable
from dictlearn.viz.site.inside import Inside
from dictlearn.viz.site.passes import Pass
from dictlearn.viz.site.pictures import LARGE, THUMB, Pictures, encode, middle
from dictlearn.viz.site.shards import Shelf, short

if TYPE_CHECKING:
    from actstore.store import Store
    from dictlearn.viz.site.build import SiteOptions

SHARD = 64
"""Items a data file: those whose store positions share ``position // SHARD``."""


class ItemPages:
    """Writes everything of the items that occur on any page.

    Parameters
    ----------
    store, rows, labels
        The store, its readable rows, and the label index of each.
    passes
        Of the dictionaries.
    pictures, inside
        None where the data set or the model is away.
    options
        How many.
    """

    def __init__(
        self,
        store: Store,
        rows: Sequence[Mapping[str, Any]],
        labels: np.ndarray,
        passes: Sequence[Pass],
        pictures: Pictures | None,
        inside: Inside | None,
        options: SiteOptions,
    ) -> None:
        self.store, self.rows, self.labels, self.passes = store, rows, labels, passes
        self.pictures, self.inside, self.options = pictures, inside, options
        self.notes: list[str] = []
        first: dict[int, None] = {}
        for one in passes:
            first.update(dict.fromkeys(one.pages.shown().tolist()))
        self.shown = list(first) or list(range(min(len(rows), options.items)))
        self.chosen = self._choose(options.items)

    def _choose(self, count: int) -> list[int]:
        """Rows that get a page: on most pages of latents, each label in turn."""
        by_label: dict[int, list[int]] = {}
        for row in self.shown:
            by_label.setdefault(int(self.labels[row]), []).append(row)
        chosen: list[int] = []
        turn = 0
        while len(chosen) < min(count, len(self.shown)):
            fresh = [rows[turn] for rows in by_label.values() if turn < len(rows)]
            chosen += fresh[: count - len(chosen)]
            turn += 1
        return chosen

    def write(self, shelf: Shelf, tell: Callable[[str, int, int], None]) -> dict[str, Any]:
        """Write all of it; return what the page needs to know of the items as a whole."""
        pictured, frames = self._pictures(shelf, tell)
        paged = self._pages(shelf, tell)
        appearances = {one.folder: one.pages.appearances() for one in self.passes}
        shards: dict[int, dict[str, Any]] = {}
        for row in self.shown:
            known = self.rows[row]
            position = int(known["position"])
            record: dict[str, Any] = {
                "key": str(known.get("key") or f"item {position}"),
                "label": int(self.labels[row]),
                "source": known.get("source"),
                "picture": row in pictured,
                "page": row in paged,
                "frames": frames.get(row, 0),
                "best": {folder: seen.get(position, []) for folder, seen in appearances.items()},
            }
            shards.setdefault(position // SHARD, {})[str(position)] = record
        for number, records in shards.items():
            shelf.put(f"items/{number}", records)
        unseen = len(self.shown) - len(pictured)
        if self.pictures is not None and unseen:
            self.notes.append(f"{unseen:,} items have no picture (--thumbs {self.options.thumbs})")
        return {
            "shard": SHARD,
            "shown": len(self.shown),
            "pages": [int(self.rows[row]["position"]) for row in self.chosen if row in paged],
            "pictures": len(pictured) if len(pictured) < len(self.shown) else True,
        }

    def _pictures(
        self, shelf: Shelf, tell: Callable[[str, int, int], None]
    ) -> tuple[set[int], dict[int, int]]:
        """Write thumbnails, and larger pictures (all frames of a clip) of items with a page."""
        done: set[int] = set()
        frames: dict[int, int] = {}
        if self.pictures is None:
            return done, frames
        wanted = list(dict.fromkeys([*self.chosen, *self.shown]))[: self.options.thumbs]
        chosen = set(self.chosen)
        for number, row in enumerate(wanted):
            if not number % 20:
                tell("pictures", number, len(wanted))
            try:
                pictures = self.pictures.frames(int(self.rows[row]["source"]))
            except (Undecodable, OSError) as error:
                self.notes.append(f"{self.rows[row].get('key')}: no picture, {error}")
                continue
            position = int(self.rows[row]["position"])
            name = f"{position // 1000}/{position}"
            shelf.write(f"thumbs/{name}.webp", encode(middle(pictures), THUMB))
            done.add(row)
            if row in chosen:
                frames[row] = len(pictures)
                for t, picture in enumerate(pictures):
                    shelf.write(f"pictures/{name}-{t}.webp", encode(picture, LARGE))
        tell("pictures", len(wanted), len(wanted))
        return done, frames

    def _pages(self, shelf: Shelf, tell: Callable[[str, int, int], None]) -> set[int]:
        """Write active latents of every token, and what is inside of the model."""
        done: set[int] = set()
        for number, row in enumerate(self.chosen):
            tell("items", number, len(self.chosen))
            position = int(self.rows[row]["position"])
            for one in self.passes:
                shelf.put(f"{one.folder}/codes/{position}", self.codes(one, position))
            if self.inside is not None and self.pictures is not None:
                try:
                    x = self.pictures.input(int(self.rows[row]["source"]))
                except (Undecodable, OSError) as error:
                    self.notes.append(f"{self.rows[row].get('key')}: nothing inside, {error}")
                else:
                    page, attention = self.inside.item(x)
                    shelf.put(f"model/{position}", page)
                    for layer, packed in attention.items():
                        shelf.put(f"attention/{position}-{layer}", packed)
            done.add(row)
        tell("items", len(self.chosen), len(self.chosen))
        return done

    @torch.no_grad()
    def codes(self, one: Pass, position: int) -> dict[str, Any]:
        """Return the active latents of every token of an item, strongest first."""
        out: dict[str, Any] = {}
        for kind in one.kinds:
            reads = [self.store.items(position, s, kind)[0] for s in one.dictionary.config.reads]
            x_Tr = torch.cat([torch.from_numpy(np.asarray(v, np.float32)) for v in reads], dim=1)
            entries = one.dictionary.encode_entries(x_Tr)
            active = entries.value != 0
            token, value = entries.row[active].numpy(), entries.value[active].numpy()
            latent = entries.latent[active].numpy()
            order = np.lexsort((-value, token))
            start = np.searchsorted(token[order], np.arange(len(x_Tr) + 1))
            for t in range(len(x_Tr)):
                mine = order[start[t] : start[t + 1]]
                out[str(one.first[kind][0] + t)] = [
                    latent[mine].tolist(),
                    [short(v, 3) for v in value[mine]],
                ]
        return out
