"""Read many byte ranges of a store's objects into given memory.

`LocalRanges` serves files: positioned reads, no kernel read-ahead on the random pattern, and
explicit look-ahead over the next requests instead (measured: many large reads at random offsets
of one descriptor defeat the kernel's own read-ahead; WILLNEED over 32 stripes restores 2.4 GB/s).
Looking ahead costs a tenth of a read from the page cache, so it starts with the first read that
the cache does not serve, and ends when it has served all of the last `COLD_FOR`.
Bytes go to their places row by row where the platform can (`vectored`), and two threads share
the work: one copies about 5 GB/s. `actstore.remote_ranges` serves any other storage.
"""

import collections
import concurrent.futures
import contextlib
import errno
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import UInt64

from actstore import vectored
from actstore.manifest import FormatError
from actstore.storage import LocalStorage, Storage

LOOK_AHEAD = 16
"""Requests the kernel is told of before they are read, times the threads that read."""

COLD_FOR = 1024
"""Requests to look ahead for after one that the page cache did not serve."""

MAX_OPEN = 256
"""Files kept open."""

THREADS = 2
"""Threads that read local files."""


class Request(NamedTuple):
    """One range of one object."""

    path: str
    """Object, relative to the store."""
    part: int
    """Part it belongs to."""
    offset: int
    """First byte."""
    length: int
    """Bytes."""
    tag: Any
    """What the caller wants to know it by."""


Place = Callable[[Request], UInt64[np.ndarray, "n 2"] | memoryview | None]
"""Gives the memory of a request, or address and bytes of the places it is scattered to.

None has the bytes lent to `Done`; so does a storage that cannot read into given memory.
"""

Done = Callable[[Request, memoryview], None]
"""Called with the bytes of a request that was not scattered; they are valid until it returns."""


class Ranges(Protocol):
    """Reads requests; `read` is called by one thread, `place` and `done` by several."""

    def read(
        self, requests: Sequence[Request], place: Place, done: Done, upcoming: Sequence[Request]
    ) -> None:
        """Fulfil every request; `upcoming` ones will probably come next.

        Raises
        ------
        FileNotFoundError, FormatError
            When an object is missing, ends early or is a link that leaves the store; the message
            names part and remedy.
        """

    def close(self) -> None:
        """Give up files and threads."""


class _Line:
    """Requests that threads take one after the other, and those the kernel was told of."""

    def __init__(self, requests: Sequence[Request], upcoming: Sequence[Request], far: int) -> None:
        self._all = [*requests, *upcoming[:far]]
        self._numbers = iter(range(len(requests)))  # its next() is atomic
        self._advised = 0
        self._far = far

    def take(self) -> tuple[int, Request] | None:
        """Return the next request and its number."""
        number = next(self._numbers, None)
        return None if number is None else (number, self._all[number])

    def ahead(self, number: int) -> Sequence[Request]:
        """Return those of the requests from a number on that nobody was told of yet."""
        last = min(len(self._all), number + self._far)
        new = self._all[max(self._advised, number) : last]  # two threads may tell twice: no harm
        self._advised = max(self._advised, last)
        return new


class LocalRanges:
    """Ranges of local files."""

    def __init__(self, storage: LocalStorage) -> None:
        self._storage = storage
        self._open: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._scratch = np.empty(0, dtype=np.uint8)
        self._tells_cold = hasattr(os, "RWF_NOWAIT")
        self._cold = 0

    def read(
        self, requests: Sequence[Request], place: Place, done: Done, upcoming: Sequence[Request]
    ) -> None:
        """See `Ranges.read`."""
        self.serve(_Line(requests, upcoming, LOOK_AHEAD), place, done)

    def serve(self, line: _Line, place: Place, done: Done) -> None:
        """Fulfil requests of a line that other threads may share, until none is left."""
        while (taken := line.take()) is not None:
            number, request = taken
            if self._cold:
                self._cold -= 1
                self._look_ahead(line, number)
            places: Any = place(request)
            if not vectored.AVAILABLE and not isinstance(places, memoryview):
                places = None
            if places is None:
                places, view = self._lent(request.length)
            else:
                view = None
            start = self._from_cache(request, places)
            if start < request.length:
                self._cold = COLD_FOR
                self._look_ahead(line, number)
                self._fill(request, places, start)
            if view is not None:
                done(request, view)

    def _lent(self, length: int) -> tuple[Any, memoryview]:
        """Return own memory for a request: as a place, and as a view."""
        if len(self._scratch) < length:
            self._scratch = np.empty(length, dtype=np.uint8)
        view = self._scratch.data[:length]
        if not vectored.AVAILABLE:
            return view, view
        return np.array([[self._scratch.ctypes.data, length]], dtype=np.uint64), view

    def close(self) -> None:
        """See `Ranges.close`."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _from_cache(self, request: Request, places: Any) -> int:
        """Read what the page cache holds; return how many bytes that was."""
        if not self._tells_cold:
            return 0
        try:
            return self._read(request, places, 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self._tells_cold = False  # a file system that cannot tell: always look ahead
            return 0

    def _fill(self, request: Request, places: Any, start: int) -> None:
        while start < request.length:
            reached = self._read(request, places, start, 0)
            if reached == start:
                raise truncated(self._storage, request, start)
            start = reached

    def _read(self, request: Request, places: Any, start: int, flags: int) -> int:
        descriptor = self._file(request)
        if isinstance(places, memoryview):
            part = [places[start:]]
            return start + os.preadv(descriptor, part, request.offset + start, flags)
        return vectored.read_scattered(descriptor, request.offset, places, start, flags)

    def _look_ahead(self, line: _Line, number: int) -> None:
        """Tell the kernel of the requests up to `LOOK_AHEAD` after a number."""
        if not hasattr(os, "posix_fadvise"):
            return
        for request in line.ahead(number):
            with contextlib.suppress(FileNotFoundError):  # reported when its turn comes
                os.posix_fadvise(
                    self._file(request), request.offset, request.length, os.POSIX_FADV_WILLNEED
                )

    def _file(self, request: Request) -> int:
        try:
            return self._descriptor(request.path)
        except FileNotFoundError as error:
            raise missing(self._storage, request) from error

    def _descriptor(self, path: str) -> int:
        descriptor = self._open.get(path)
        if descriptor is not None:
            self._open.move_to_end(path)
            return descriptor
        while len(self._open) >= MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        descriptor = self._storage.open(path)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        self._open[path] = descriptor
        return descriptor


class ThreadedRanges:
    """Local ranges shared by the caller and some threads, each with files and memory of its own.

    They take requests from one line, so that none waits while another has work left.
    """

    def __init__(self, storage: LocalStorage, threads: int = THREADS) -> None:
        self._parts = [LocalRanges(storage) for _ in range(threads)]
        self._threads = concurrent.futures.ThreadPoolExecutor(max(1, threads - 1), "actstore-range")

    def read(
        self, requests: Sequence[Request], place: Place, done: Done, upcoming: Sequence[Request]
    ) -> None:
        """See `Ranges.read`."""
        line = _Line(requests, upcoming, LOOK_AHEAD * len(self._parts))
        mine, *others = self._parts
        jobs = [self._threads.submit(part.serve, line, place, done) for part in others]
        try:
            mine.serve(line, place, done)
        finally:
            concurrent.futures.wait(jobs)  # they write to the caller's memory
        for job in jobs:
            job.result()

    def close(self) -> None:
        """See `Ranges.close`."""
        self._threads.shutdown(cancel_futures=True)
        for part in self._parts:
            part.close()


def open_ranges(storage: Storage, *, large: bool = True) -> Ranges:
    """Return what reads ranges of a storage fastest, large ones or those of single rows."""
    if not isinstance(storage, LocalStorage):
        from actstore.remote_ranges import open_remote

        return open_remote(storage, fetch=large)
    return ThreadedRanges(storage) if large else LocalRanges(storage)


def missing(storage: Storage, request: Request) -> FileNotFoundError:
    """Return the error for a committed part whose object is gone."""
    return FileNotFoundError(
        f"{storage.uri(request.path)} is missing although part {request.part} is committed; "
        f"`actstore repair {storage.url}` harvests the part again"
    )


def truncated(storage: Storage, request: Request, found: int) -> FormatError:
    """Return the error for an object that ends inside of a stripe."""
    return FormatError(
        f"{storage.uri(request.path)} of part {request.part} is truncated: it ends at byte "
        f"{request.offset + found} and a stripe reaches {request.offset + request.length}; "
        f"`actstore repair {storage.url}` harvests the part again"
    )


def damaged(storage: Storage, request: Request, stripe: int) -> FormatError:
    """Return the error for a stripe whose checksum is wrong."""
    return FormatError(
        f"{storage.uri(request.path)} of part {request.part} is damaged: the checksum of stripe "
        f"{stripe} differs; `actstore repair {storage.url}` harvests the part again"
    )
