"""Token subsampling: which positions of a kind an item keeps, and where that is written down.

An array of `tokens` slots of a kind that has `of` positions holds, for every item, a keyed
random subset of the positions in ascending order. Row r of part p is dealt its positions from a
shuffled deck: with the period ``P = of / gcd(tokens, of)`` and the cycle ``c = r // P``,

    deck  = keyed permutation of range(of), key = first 8 bytes of sha256("<seed> <p> <c>")
    slots = sorted(deck[((r mod P) tokens + k) mod of] for k in range(tokens))

so that every subset is a uniform one, and P consecutive items keep every position equally
often. The slots stand in the store too, as ``position/<kind>``: other readers need them, and in
a store that was packed anew they are the only source. Legend: S items of a part, k slots.
"""

import functools
import hashlib
import math
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int32, Int64

from actstore.crc import crc32c
from actstore.manifest import ArraySpec, FormatError, Manifest
from actstore.order import keyed_permutation

if TYPE_CHECKING:
    from actstore.sampling import Pool
    from actstore.selection import Selection
    from actstore.store import Store

_CACHED = 256
"""Parts whose positions a reader remembers."""


def deal(seed: int, part: int, rows: int, tokens: int, of: int) -> Int32[np.ndarray, "rows tokens"]:
    """Return the positions that the first rows of a part keep, ascending in each row."""
    out = np.empty((rows, tokens), dtype=np.int32)
    period = of // math.gcd(tokens, of)
    slot = np.arange(tokens)
    for start in range(0, rows, period):
        text = f"{seed} {part} {start // period}"
        key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        deck = keyed_permutation(np.arange(of), of, key)
        row = np.arange(min(period, rows - start))
        out[start : start + period] = deck[(row[:, None] * tokens + slot) % of]
    out.sort(axis=1)
    return out


def sampled(manifest: Manifest) -> dict[str, ArraySpec]:
    """Return, for every kind of which tokens were chosen, one of its arrays."""
    return {a.kind: a for a in manifest.arrays if a.of}


def position_path(kind: str) -> str:
    """Return the folder of the array [item, slot] that holds the positions of a kind."""
    return f"position/{kind}"


def chunk_path(kind: str, part: int) -> str:
    """Return the object that holds the positions of a part: int32 [S, slot], little-endian."""
    return f"{position_path(kind)}/c.{part}.0"


def deal_part(manifest: Manifest, part: int) -> dict[str, Int32[np.ndarray, "S slot"]]:
    """Return the positions of all rows of a part, by kind.

    Raises
    ------
    FormatError
        When the manifest does not say by which key.
    """
    found = sampled(manifest)
    seed = manifest.order.get("seed")
    if found and type(seed) is not int:
        raise FormatError("tokens were chosen, and the order in the manifest has no seed for it")
    size = manifest.items_per_part
    return {k: deal(int(seed or 0), part, size, a.tokens, a.of) for k, a in found.items()}


def read_positions(store: "Store", kind: str, part: int) -> Int32[np.ndarray, "S slot"]:
    """Return the positions of a committed part as the store holds them.

    Raises
    ------
    FormatError
        When the object is damaged.
    """
    array = sampled(store.manifest)[kind]
    path = chunk_path(kind, part)
    data = store.storage.read(path, limit=4 * store.manifest.items_per_part * array.tokens)
    if crc32c(data) != store.commit(part).objects.get(path, {}).get("crc32c"):
        raise FormatError(
            f"{store.storage.uri(path)} is damaged: its checksum differs; "
            f"`actstore repair {store.url} --parts {part}` makes the part again"
        )
    found = np.frombuffer(data, "<i4")
    shape = (store.manifest.items_per_part, array.tokens)
    if found.size != shape[0] * shape[1] or not ((found >= 0) & (found < array.of)).all():
        raise FormatError(f"{store.storage.uri(path)} does not hold positions {list(shape)}")
    return found.reshape(shape)


class Positions:
    """Token numbers of slots, remembered by part: computed where the key is known, else read."""

    def __init__(self, store: "Store") -> None:
        self._store = store
        self._dealt = type(store.manifest.order.get("seed")) is int
        self.of_part = functools.lru_cache(_CACHED)(self._find)
        """Positions [S, slot] of a kind and a part."""

    def _find(self, kind: str, part: int) -> Int32[np.ndarray, "S slot"]:
        if self._dealt:
            return deal_part(self._store.manifest, part)[kind]
        return read_positions(self._store, kind, part)

    def tokens(
        self, array: ArraySpec, positions: Int64[np.ndarray, " item"]
    ) -> Int32[np.ndarray, "item slot"]:
        """Return the token numbers, in the site's full order, of items by store position."""
        if not array.of:
            token = np.arange(array.first, array.first + array.tokens, dtype=np.int32)
            return np.broadcast_to(token, (len(positions), array.tokens)).copy()
        part, row = np.divmod(positions, self._store.manifest.items_per_part)
        out = np.empty((len(positions), array.tokens), dtype=np.int32)
        for number in np.unique(part).tolist():
            mine = part == number
            out[mine] = self.of_part(array.kind, number)[row[mine]] + array.first
        return out


class Relabel:
    """Turns slot numbers into token numbers for the rows of pools."""

    def __init__(self, selection: "Selection") -> None:
        self._positions = Positions(selection.store)
        self._size = selection.store.manifest.items_per_part
        self._arrays = [column.stripes[0].array for column in selection.columns]
        self.needed = any(array.of for array in self._arrays)

    def __call__(
        self, pool: "Pool", item: Int64[np.ndarray, " row"], token: Int32[np.ndarray, " row"]
    ) -> None:
        """Replace slots, counted as tokens from the first of the kind, in rows by stripe."""
        edges = pool.offset.tolist()
        for j, g in enumerate(pool.column.tolist()):
            array, rows = self._arrays[g], slice(edges[j], edges[j + 1])
            if array.of and edges[j + 1] > edges[j]:
                part = int(item[edges[j]]) // self._size
                known = self._positions.of_part(array.kind, part)
                slot = token[rows] - array.first
                token[rows] = known[item[rows] - part * self._size, slot] + array.first
