"""Open a store and find what is in it; reading itself lives in `reader` and `dask`."""

import dataclasses
import difflib
import functools
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Int64

from actstore import compact, layout, segments
from actstore.commit import Commit, index_path, read_sidecar
from actstore.crc import crc32c
from actstore.index import OK, concat_rows, decode_index_rows
from actstore.manifest import MAX_JSON_BYTES, MAX_OBJECT_BYTES, ArraySpec, FormatError, Manifest
from actstore.metadata import write_metadata, write_scales
from actstore.part_cache import cached
from actstore.stats import ChannelStats
from actstore.storage import Storage, open_storage
from actstore.subsample import Positions

if TYPE_CHECKING:
    import zarr

    from vitmodels.spec import TokenGrid


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """Where the stripes of one part of one array lie."""

    array: ArraySpec
    """The array."""
    part: int
    """Number of the part."""
    items: int
    """Valid items, at the front of every stripe."""
    path: str
    """Object relative to the store."""
    uri: str
    """Local path or URL of the object."""
    codec: str
    """Codec profile of the stripes; ``raw`` ones are plain values."""
    dtype: str
    """Activation dtype."""
    stripe_shape: tuple[int, int, int]
    """Shape (S, t, d) of a stripe, valid rows first."""
    spans: Int64[np.ndarray, "stripe 2"]
    """Offset and length in bytes of every stripe."""


class Store:
    """A store opened for reading; holds what was committed when it was opened.

    Attributes
    ----------
    url : str
        Where the store lies, as given.
    manifest : Manifest
        The description of the store.
    storage : Storage
        The medium.
    part_items : int64 array [part]
        Valid items of every part; -1 for a part that is not committed.
    """

    def __init__(
        self, storage: Storage, manifest: Manifest, *, without: Collection[int] = ()
    ) -> None:
        self._without = frozenset(without)
        self.storage = storage
        self.url = storage.url
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self._arrays = {(a.site, a.kind): a for a in manifest.arrays}
        self.part_items: Int64[np.ndarray, " part"]
        self.refresh()

    def refresh(self) -> None:
        """Look again for committed parts: a harvest may be running."""
        self.parts = segments.load(self.storage, self.manifest, self._without)
        self.part_items = self.parts.items

    # What is in it

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in model order."""
        return tuple(dict.fromkeys(a.site for a in self.manifest.arrays))

    def kinds(self, site: str) -> tuple[str, ...]:
        """Return the token kinds stored of a site, in the order of its tokens."""
        self._check_site(site)
        arrays = sorted((a for a in self.manifest.arrays if a.site == site), key=lambda a: a.first)
        return tuple(a.kind for a in arrays)

    def spec(self, site: str, kind: str) -> ArraySpec:
        """Return the description of one array; KeyError names what there is."""
        self._check_site(site)
        if (site, kind) not in self._arrays:
            raise KeyError(
                f"site {site} of {self.url} has no tokens of kind {kind!r}; stored are "
                f"{', '.join(self.kinds(site))}"
            )
        return self._arrays[site, kind]

    def _check_site(self, site: str) -> None:
        if site in self.sites:
            return
        near = difflib.get_close_matches(site, self.sites, n=3, cutoff=0.3)
        raise KeyError(
            f"{self.url} has no site {site!r}; nearest: {', '.join(near) or 'none'}; "
            f"`actstore info {self.url}` lists all {len(self.sites)}"
        )

    def grid(self, site: str) -> "TokenGrid":
        """Return how the tokens of a site are laid out."""
        from vitmodels.spec import TokenGrid

        self._check_site(site)
        grid = self.manifest.sites.get(site, {}).get("grid")
        if grid is None:
            raise KeyError(f"site {site} of {self.url} has no token grid")
        return TokenGrid.from_json(grid)

    # How complete it is

    @property
    def n_items(self) -> int:
        """Number of items whose activations can be read."""
        return int(self.part_items.clip(min=0).sum())

    @property
    def missing_parts(self) -> tuple[int, ...]:
        """Parts that are planned and not committed."""
        return tuple(np.flatnonzero(self.part_items < 0).tolist())

    @property
    def is_complete(self) -> bool:
        """Whether every planned part is committed."""
        return not (self.part_items < 0).any()

    def commit(self, part: int) -> Commit:
        """Return the record of a committed part; KeyError when it is not committed."""
        if part in self.parts.commits:
            return self.parts.commits[part]
        if not 0 <= part < len(self.part_items) or self.part_items[part] < 0:
            raise KeyError(f"part {part} of {self.url} is not committed")
        return segments.record_of(self.storage, self.parts, part)

    def _committed(self) -> list[int]:
        return [int(part) for part in np.flatnonzero(self.part_items >= 0)]

    # Where values lie

    def shard(self, site: str, kind: str, part: int) -> Shard:
        """Return where the stripes of one committed part lie."""
        array = self.spec(site, kind)
        manifest = self.manifest
        path = layout.shard_path(array, part)
        if not 0 <= part < len(self.part_items) or self.part_items[part] < 0:
            raise KeyError(f"part {part} of {self.url} is not committed")
        return Shard(
            array=array,
            part=part,
            items=int(self.part_items[part]),
            path=path,
            uri=self.storage.uri(path),
            codec=manifest.codec,
            dtype=manifest.dtype,
            stripe_shape=(manifest.items_per_part, array.stripe_tokens, array.channels),
            spans=self._spans(array, path, part),
        )

    def _spans(self, array: ArraySpec, path: str, part: int) -> np.ndarray:
        """Return where stripes lie: computed for raw shards, read from the index of others."""
        if self.manifest.codec == "raw":
            return layout.raw_spans(self.manifest, array)
        size, tail = self.commit(part).objects[path]["bytes"], layout.index_bytes(array)
        data = self.storage.read_range(path, max(0, size - tail), tail)
        return layout.decode_index(bytes(data), array, size)

    def array(self, site: str, kind: str) -> "zarr.Array[Any]":
        """Return the array as zarr-python sees it: [planned item, token, channel], read-only."""
        import zarr

        return zarr.open_array(self.storage.zarr(), path=self.spec(site, kind).path, mode="r")

    # Beside the values

    def stats(self, site: str, kind: str) -> ChannelStats:
        """Return the moments of every channel over the committed parts."""
        array = self.spec(site, kind)
        found = compact.read_stats(self, array) if self._is_large else None
        return found or self.merged_stats(array)

    @property
    def _is_large(self) -> bool:
        """Whether what was compacted is read instead of the parts."""
        return self.is_complete and self.manifest.n_parts > segments.SPAN

    def merged_stats(self, array: ArraySpec) -> ChannelStats:
        """Return the moments of an array, merged from its parts."""
        total = ChannelStats.empty(array.channels)
        for sidecar in self._sidecars:
            total = total.merge(sidecar.stats(array))
        return total

    @functools.cached_property
    def _sidecars(self) -> list[Any]:
        return [
            read_sidecar(self.storage, commit) for commit in map(self.commit, self._committed())
        ]

    def index(self) -> pa.Table:
        """Return the index of the committed parts, skipped items included."""
        found = compact.read_index(self) if self._is_large else None
        return self.merged_index() if found is None else found

    def merged_index(self) -> pa.Table:
        """Return the index, put together from its parts."""
        tables = []
        for part in self._committed():
            commit = self.commit(part)
            path = index_path(part)
            data = self.storage.read(path, limit=MAX_OBJECT_BYTES)
            if crc32c(data) != commit.objects.get(path, {}).get("crc32c"):
                raise FormatError(f"{self.storage.uri(path)} is damaged: checksum differs")
            tables.append(
                decode_index_rows(data, self.storage.uri(path), self.manifest.planned(part))
            )
        return concat_rows(tables)

    def table(self) -> pa.Table:
        """Return the index of the readable items, in the order of the rows of `dask`."""
        index = self.index()
        return index.filter(pc.equal(index["status"], OK))

    def compact(self) -> None:
        """Write the index and the statistics of a complete store as one object each.

        Raises
        ------
        ValueError
            When parts are missing.
        """
        if not self.is_complete:
            raise ValueError(f"{self.url} lacks {len(self.missing_parts)} parts")
        compact.write_compact(self)

    # Reading, see `actstore.reader` and `actstore.dask`

    def batches(self, sites: str | Sequence[str], batch_size: int, **options: Any) -> Iterator[Any]:
        """Iterate over shuffled batches; see `actstore.reader.batches`."""
        from actstore import reader

        batches: Iterator[Any] = reader.batches(self, sites, batch_size, **options)
        return batches

    def items(self, positions: Any, site: str, kind: str) -> np.ndarray:
        """Return whole items by store position, [item, token, channel]; see `actstore.reader`."""
        from actstore import reader

        values: np.ndarray = reader.items(self, positions, site, kind)
        return values

    def tokens(self, positions: Any, site: str, kind: str) -> np.ndarray:
        """Return which tokens of items are stored: numbers in the site's full order [item, slot].

        Items by store position, as for `items`; the numbers are those of `Batch.token`.
        """
        wanted = np.atleast_1d(np.asarray(positions, dtype=np.int64))
        return Positions(self).tokens(self.spec(site, kind), wanted)

    def dask(self, site: str, kind: str) -> Any:
        """Return a lazy dask array of the readable items, one chunk a part."""
        from actstore import dask

        return dask.array(self, site, kind)

    def __repr__(self) -> str:
        parts = f"{len(self._committed())}/{self.manifest.n_parts} parts"
        return f"<Store {self.url}: {self.n_items} items, {len(self.sites)} sites, {parts}>"


def read_manifest(storage: Storage) -> Manifest | None:
    """Return the manifest of the store at a root, None when there is none.

    Raises
    ------
    FormatError
        When `zarr.json` is damaged, not a store, or of another format version.
    """
    try:
        data = storage.read("zarr.json", limit=MAX_JSON_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    uri = storage.uri("zarr.json")
    try:
        attributes = json.loads(data)["attributes"]
        value = attributes["actstore"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{uri} does not describe an actstore store") from error
    manifest = Manifest.from_json(value)
    if attributes.get("fingerprint") != manifest.fingerprint:
        raise FormatError(f"{uri} was changed by hand: its fingerprint does not match")
    return manifest


def create_store(
    storage: Storage, manifest: Manifest, provenance: Mapping[str, Any] | None = None
) -> None:
    """Write the metadata of a new store, or find that an equal one is there.

    `provenance` is kept beside the manifest, for people: it is not part of the fingerprint.

    Raises
    ------
    ValueError
        When the place holds another store; the message names the fields that differ.
    """
    check_same(storage, manifest)
    write_metadata(storage, manifest)
    attributes = {
        "actstore": manifest.to_json(),
        "fingerprint": manifest.fingerprint,
        "provenance": dict(provenance or {}),
    }
    root = json.dumps(layout.group_metadata(attributes), indent=1, sort_keys=True).encode()
    check_same(storage, manifest)
    if not storage.create("zarr.json", root):
        check_same(storage, manifest)
    write_scales(storage, manifest)


def check_same(storage: Storage, manifest: Manifest) -> bool:
    """Return whether this very store is already there; ValueError when it is another one."""
    there = read_manifest(storage)
    if there is None:
        return False
    if differences := there.diff(manifest):
        raise ValueError(
            f"{storage.url} holds another store; these fields differ (there -> asked):\n  "
            + "\n  ".join(differences)
            + "\nchoose another --out, or ask for what is there"
        )
    return True


def open_store(
    url: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    *,
    without: Collection[int] = (),
    cache_dir: str | os.PathLike[str] | None = None,
    cache_bytes: int | None = None,
) -> Store:
    """Open a store for reading; parts in `without` are taken for uncommitted, unread.

    Shards of a remote store may be kept in `cache_dir`; see `actstore.part_cache.cached`.

    Raises
    ------
    FileNotFoundError, FormatError
        When there is no store, or it is damaged or of a format this version does not know.
    """
    storage = open_storage(url, storage_options)
    manifest = read_manifest(storage)
    if manifest is None:
        raise FileNotFoundError(
            f"no store at {os.fspath(url)}: `actstore harvest --out {os.fspath(url)} ...` makes one"
        )
    return cached(Store(storage, manifest, without=without), cache_dir, cache_bytes)
