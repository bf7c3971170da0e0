"""Read byte ranges of a storage that is not a folder: few large requests, many at once.

A request costs an object store about as much as a megabyte, so requests that lie side by side in
one object, or nearly so, go out as one. They stay under way across pools: while the rest of one
arrives, those of the next are asked for, and nothing waits for the slowest of a pool. What is
under way or not yet taken is bounded by `BYTES_AHEAD`.
"""

import collections
import concurrent.futures
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from actstore.part_cache import CachedStorage
from actstore.ranges import Done, Place, Ranges, Request, ThreadedRanges, missing, truncated
from actstore.storage import LocalStorage, Storage

IN_FLIGHT = 32
"""Requests under way at once."""

BYTES_AHEAD = 48 << 20
"""Bytes asked for and not yet taken, unless a single request is larger."""

MAX_SPAN = 16 << 20
"""Bytes of a joined request."""

MAX_GAP = 256 << 10
"""Bytes between two requests that are read and thrown away to join them."""


class Span(NamedTuple):
    """Requests that are one range of one object."""

    path: str
    """Object, relative to the store."""
    offset: int
    """First byte."""
    length: int
    """Bytes."""
    requests: list[Request]
    """What is in it, by offset."""

    @property
    def key(self) -> tuple[str, int, int]:
        """What tells a range from others."""
        return self.path, self.offset, self.length


def join(requests: Sequence[Request]) -> Iterator[Span]:
    """Yield requests in their order, those that follow each other in an object as one span."""
    group: list[Request] = []
    end = 0
    for request in requests:
        if group:
            first = group[0]
            gap = request.offset - end
            reach = max(end, request.offset + request.length) - first.offset
            if request.path != first.path or not 0 <= gap <= MAX_GAP or reach > MAX_SPAN:
                yield Span(first.path, first.offset, end - first.offset, group)
                group = []
        group.append(request)
        end = request.offset + request.length
    if group:
        yield Span(group[0].path, group[0].offset, end - group[0].offset, group)


class StorageRanges:
    """Ranges of any storage; `read` is called by one thread."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._threads = concurrent.futures.ThreadPoolExecutor(IN_FLIGHT, "actstore-range")
        self._pending: collections.deque[tuple[Span, concurrent.futures.Future[bytes]]]
        self._pending = collections.deque()
        self._bytes = 0

    def read(
        self, requests: Sequence[Request], place: Place, done: Done, upcoming: Sequence[Request]
    ) -> None:
        """See `actstore.ranges.Ranges.read`; all bytes are lent."""
        del place
        spans = list(join(requests))
        self._keep(spans)
        todo = itertools.chain(spans[len(self._pending) :], join(upcoming))
        try:
            self._submit(todo)
            for span in spans:
                data = self._take(span)
                self._submit(todo)
                self._hand_out(span, memoryview(data), done)
        except BaseException:
            self._drop()  # asked again, a failed request is sent again
            raise

    def _hand_out(self, span: Span, view: memoryview, done: Done) -> None:
        for request in span.requests:
            start = request.offset - span.offset
            found = view[start : start + request.length]
            if len(found) != request.length:
                raise truncated(self._storage, request, len(found))
            done(request, found)

    def close(self) -> None:
        """See `actstore.ranges.Ranges.close`."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._pending.clear()

    def _keep(self, spans: Sequence[Span]) -> None:
        """Forget what was asked for ahead unless it is the beginning of `spans`."""
        ahead = [span.key for span, _ in self._pending]
        if ahead != [span.key for span in spans[: len(ahead)]]:
            self._drop()

    def _drop(self) -> None:
        for _, job in self._pending:
            job.cancel()
        self._pending.clear()
        self._bytes = 0

    def _submit(self, todo: Iterator[Span]) -> None:
        """Ask for further spans as long as the bounds allow."""
        while len(self._pending) < IN_FLIGHT and (not self._pending or self._bytes < BYTES_AHEAD):
            span = next(todo, None)
            if span is None:
                return
            job = self._threads.submit(
                self._storage.read_range, span.path, span.offset, span.length
            )
            self._pending.append((span, job))
            self._bytes += span.length

    def _take(self, span: Span) -> bytes:
        """Return the bytes of the oldest span asked for."""
        _, job = self._pending[0]
        try:
            data = job.result()
        except FileNotFoundError as error:
            raise missing(self._storage, span.requests[0]) from error
        self._pending.popleft()
        self._bytes -= span.length
        return data


class CachedRanges:
    """Ranges of a remote storage with a cache: local where the shard is there, else from afar."""

    def __init__(self, storage: CachedStorage, *, fetch: bool) -> None:
        self._storage, self._fetch = storage, fetch
        self._remote = StorageRanges(storage.remote)
        self._files = _Files(storage.url)
        self._local = ThreadedRanges(self._files)

    def read(
        self, requests: Sequence[Request], place: Place, done: Done, upcoming: Sequence[Request]
    ) -> None:
        """See `actstore.ranges.Ranges.read`."""
        near, far = self._split(requests)
        near_next, far_next = self._split(upcoming)
        self._remote.read(far, place, done, far_next)
        try:
            self._local.read(near, place, done, near_next)
        except FileNotFoundError:  # another process made room; rows are written again
            for request in near:
                self._storage.forget(request.path)
            self._remote.read(near, place, done, [])

    def close(self) -> None:
        """See `actstore.ranges.Ranges.close`."""
        self._remote.close()
        self._local.close()

    def _split(self, requests: Sequence[Request]) -> tuple[list[Request], list[Request]]:
        near, far = [], []
        for request in requests:
            path = self._storage.local(request.path, request.part, fetch=self._fetch)
            if path is None:
                far.append(request)
            else:
                self._files.paths[request.path] = path
                near.append(request)
        return near, far


class _Files(LocalStorage):
    """Cached files by the path of their object."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.paths: dict[str, str] = {}

    def uri(self, path: str) -> str:
        """Return the cached file of an object."""
        return self.paths[path]

    def open(self, path: str) -> int:
        """Open the cached file of an object."""
        return os.open(self.paths[path], os.O_RDONLY | os.O_CLOEXEC)


def open_remote(storage: Storage, *, fetch: bool) -> Ranges:
    """Return what reads ranges of a storage that is no folder; `fetch` fills its cache."""
    if isinstance(storage, CachedStorage):
        return CachedRanges(storage, fetch=fetch)
    return StorageRanges(storage)
