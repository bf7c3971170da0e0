"""Segment records: what opening a store of very many parts reads instead of their records.

::

    segments/00000.json     parts 0 .. 1023: valid items, and CRC-32C of each commit record

A segment is made when all parts of its range are committed, and says nothing that their records
do not: they stay the truth. Stores of at most `SPAN` parts have none. A segment that is damaged,
of another manifest or of parts without a record is passed over or refused, never believed, and
`actstore gc` makes it again. Whoever removes a record removes its segment first (`unseal`).
"""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Int64

from actstore.commit import Commit, committed_parts, parse_record, record_path
from actstore.crc import crc32c
from actstore.manifest import MAX_JSON_BYTES, FormatError, Manifest
from actstore.storage import LocalStorage, Storage

if TYPE_CHECKING:
    from actstore.store import Store

log = logging.getLogger(__name__)

SPAN = 1024
"""Parts of a segment."""

IN_FLIGHT = 16
"""Small objects read at once from a storage that is not local."""

_NAME = re.compile(r"(\d{5,})\.json\Z")
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclasses.dataclass(kw_only=True, eq=False)
class Parts:
    """What is known of the parts of a store."""

    items: Int64[np.ndarray, " part"]
    """Valid items; -1 for a part that is not committed."""
    record: Int64[np.ndarray, " part"]
    """CRC-32C of the commit record; -1 for a part that is not committed."""
    commits: dict[int, Commit]
    """Records that were read, those of ranges without a segment."""


def segment_path(number: int) -> str:
    """Return the path of a segment record."""
    return f"segments/{number:05d}.json"


def span_of(manifest: Manifest, number: int) -> range:
    """Return the parts of a segment; the last one is shorter."""
    return range(number * SPAN, min((number + 1) * SPAN, manifest.n_parts))


def load(storage: Storage, manifest: Manifest, without: Collection[int] = ()) -> Parts:
    """Return the committed parts: from segments where there are some, else from records.

    Raises
    ------
    FormatError
        When a record is damaged, of another manifest or of no part of the plan.
    """
    nothing = np.full(manifest.n_parts, -1, dtype=np.int64)
    parts = Parts(items=nothing, record=nothing.copy(), commits={})
    left = set(range(-(-manifest.n_parts // SPAN)))
    if manifest.n_parts > SPAN:
        for number, items, record in _read_all(storage, manifest):
            span = span_of(manifest, number)
            parts.items[span.start : span.stop] = items
            parts.record[span.start : span.stop] = record
            left.discard(number)
    # All ranges sealed: the names of a million records need not be listed either.
    found = committed_parts(storage) if left else []
    single = [p for p in found if p not in without and (p // SPAN in left or p >= len(nothing))]
    for part, data in zip(single, _fetch(storage, map(record_path, single)), strict=True):
        commit = parse_record(data, storage, part)
        _check(storage, manifest, commit)
        parts.commits[part] = commit
        parts.items[part], parts.record[part] = commit.items, crc32c(data)
    for part in without:
        if 0 <= part < len(nothing):
            parts.items[part] = parts.record[part] = -1
    return parts


def _check(storage: Storage, manifest: Manifest, commit: Commit) -> None:
    part = commit.part
    if part >= manifest.n_parts or commit.items > manifest.planned(part):
        raise FormatError(f"{storage.url}: part {part} is not part of this store's plan")
    if commit.fingerprint != manifest.fingerprint:
        raise FormatError(
            f"{storage.url}: part {part} was committed under another manifest "
            f"({commit.fingerprint[:12]}, the store has {manifest.fingerprint[:12]})"
        )


def _numbers(storage: Storage, manifest: Manifest) -> list[int]:
    """Return the numbers of the segments that are there, those of the plan only."""
    found = (_NAME.match(name) for name in storage.list("segments"))
    numbers = sorted(int(match.group(1)) for match in found if match)
    return [n for n in numbers if n * SPAN < manifest.n_parts]


def _read_all(storage: Storage, manifest: Manifest) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield number, items and checksums of every sound segment; others are logged."""
    numbers = _numbers(storage, manifest)
    for number, data in zip(numbers, _fetch(storage, map(segment_path, numbers)), strict=True):
        try:
            yield number, *_parse(data, manifest, number)
        except FormatError as error:
            uri = storage.uri(segment_path(number))
            log.warning("%s is passed over: %s; `actstore gc` makes it again", uri, error)


def _parse(data: bytes, manifest: Manifest, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return items and record checksums of a segment; FormatError when it is not sound."""
    span = span_of(manifest, number)
    try:
        value: Any = json.loads(data)
        items = np.array(value["items"], dtype=np.int64)
        record = np.array(value["records"], dtype=np.int64)
        same = value["segment"] == number and value["fingerprint"] == manifest.fingerprint
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise FormatError(f"not a segment record ({error!r})") from error
    if not same or items.shape != (len(span),) or record.shape != (len(span),):
        raise FormatError("a segment of another store or range")
    planned = np.full(len(span), manifest.items_per_part)
    planned[-1] = manifest.planned(span[-1])
    if (items < 0).any() or (items > planned).any() or (record < 0).any():
        raise FormatError("numbers that no part of the plan can have")
    return items, record


def record_of(storage: Storage, parts: Parts, part: int) -> Commit:
    """Return the record of a committed part that a segment stands for.

    Raises
    ------
    FormatError
        When the record is gone or is not the one of the segment.
    """
    path = record_path(part)
    remedy = f"`actstore gc {storage.url}` makes the segment again, `actstore verify` says more"
    try:
        data = storage.read(path, limit=MAX_JSON_BYTES)
    except FileNotFoundError as error:
        raise FormatError(
            f"{storage.uri(path)} is missing although a segment names it: {remedy}"
        ) from error
    if crc32c(data) != parts.record[part]:
        raise FormatError(f"{storage.uri(path)} is not the record its segment names: {remedy}")
    return parse_record(data, storage, part)


def _encode(manifest: Manifest, number: int, items: np.ndarray, record: np.ndarray) -> bytes:
    value = {
        "segment": number,
        "fingerprint": manifest.fingerprint,
        "items": items.tolist(),
        "records": record.tolist(),
    }
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _fetch(storage: Storage, paths: Iterable[str]) -> Iterator[bytes]:
    """Yield small objects in order; of a remote storage several are under way at once."""

    def read(path: str) -> bytes:
        return storage.read(path, limit=MAX_JSON_BYTES)

    if isinstance(storage, LocalStorage):
        yield from map(read, paths)
        return
    with ThreadPoolExecutor(IN_FLIGHT, "records") as pool:
        yield from _ahead(pool, read, paths)


def _ahead(
    pool: ThreadPoolExecutor, call: Callable[[_In], _Out], values: Iterable[_In]
) -> Iterator[_Out]:
    """Map in order with a bounded number of calls under way."""
    todo = list(values)
    for start in range(0, len(todo), SPAN):
        yield from pool.map(call, todo[start : start + SPAN])


def seal(storage: Storage, manifest: Manifest, number: int) -> bool:
    """Make the segment of a range from its records, if all are there; return whether it is.

    Several harvesters may do so at once: all write the same bytes, and the first one counts.
    """
    if manifest.n_parts <= SPAN:
        return False
    if storage.size(segment_path(number)) is not None:
        return True
    span = span_of(manifest, number)
    items, record = [], []
    try:
        for part, data in zip(span, _fetch(storage, map(record_path, span)), strict=True):
            commit = parse_record(data, storage, part)
            _check(storage, manifest, commit)
            items.append(commit.items)
            record.append(crc32c(data))
    except FileNotFoundError:
        return False
    data = _encode(manifest, number, np.array(items), np.array(record))
    storage.create(segment_path(number), data)
    return True


def seal_all(store: "Store") -> int:
    """Make the missing segments of all complete ranges of an opened store; return how many."""
    storage, manifest, parts = store.storage, store.manifest, store.parts
    if manifest.n_parts <= SPAN:
        return 0
    there, made = set(_numbers(storage, manifest)), 0
    for number in range(-(-manifest.n_parts // SPAN)):
        span = span_of(manifest, number)
        items = parts.items[span.start : span.stop]
        if number not in there and (items >= 0).all():
            data = _encode(manifest, number, items, parts.record[span.start : span.stop])
            made += storage.create(segment_path(number), data)
    return made


def unseal(storage: Storage, part: int) -> None:
    """Remove the segment of a part whose record is about to go."""
    storage.delete(segment_path(part // SPAN))


def stale(storage: Storage, manifest: Manifest, committed: Collection[int]) -> list[str]:
    """Return the segments that do not say what the records say."""
    found = []
    for number in _numbers(storage, manifest):
        span = span_of(manifest, number)
        try:
            _, record = _parse(
                storage.read(segment_path(number), limit=MAX_JSON_BYTES), manifest, number
            )
            sound = (
                all(part in committed for part in span)
                and [crc32c(data) for data in _fetch(storage, map(record_path, span))]
                == record.tolist()
            )
        except (FormatError, FileNotFoundError):
            sound = False
        if not sound:
            found.append(segment_path(number))
    return found
