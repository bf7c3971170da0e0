"""Fill one part while another is written: buffers that go round between caller and writer."""

import errno
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import pyarrow as pa

from actstore.commit import Commit
from actstore.manifest import Manifest
from actstore.storage import LocalStorage, Storage
from actstore.writer import PartBuffer, write_part

IO_THREADS = 4
"""Threads that write objects and sum values of a part."""


class PartPipeline:
    """Context that writes parts behind the caller's back, in the order they come.

    ``buffer = next_buffer()``, fill it, ``submit(part, buffer, rows)``. With two buffers one is
    filled while one is written; `next_buffer` waits when both are busy. Leaving the context
    waits for all writes and raises what failed first.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        *,
        buffers: int = 2,
        on_commit: Callable[[Commit], None] | None = None,
    ) -> None:
        self._storage = storage
        self._manifest = manifest
        self._on_commit = on_commit
        self._unborn = buffers
        self._free: deque[PartBuffer] = deque()
        self._writing: deque[tuple[int, PartBuffer, Future[Commit]]] = deque()
        # One part at a time keeps a disk busy; an object store idles while small objects and the
        # record of a part make their round trips, unless the next part is on its way.
        local = isinstance(storage, LocalStorage)
        self._order = ThreadPoolExecutor(1 if local else buffers, "commit")
        self._io = ThreadPoolExecutor(IO_THREADS if local else 2 * IO_THREADS, "write")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            while self._writing and error is None:
                self._settle()
        finally:
            self._order.shutdown(cancel_futures=True)
            self._io.shutdown()

    def next_buffer(self) -> PartBuffer:
        """Return an empty buffer, waiting for the oldest write when all are in use."""
        while self._writing and self._writing[0][2].done():
            self._settle()
        if not self._free and self._unborn:
            self._unborn -= 1
            return PartBuffer(self._manifest)
        if not self._free:
            self._settle()
        buffer = self._free.popleft()
        buffer.clear()
        return buffer

    def submit(
        self, part: int, buffer: PartBuffer, rows: Sequence[Mapping[str, Any]] | pa.Table
    ) -> None:
        """Write and commit a part from a filled buffer, which comes back by itself."""
        future = self._order.submit(
            write_part, self._storage, self._manifest, part, buffer, rows, self._io
        )
        self._writing.append((part, buffer, future))

    def _settle(self) -> None:
        """Wait for the oldest write and take its buffer back."""
        part, buffer, future = self._writing.popleft()
        try:
            commit = future.result()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                errno.ENOSPC,
                f"the disk of {self._storage.url} is full while part {part} was written; what was "
                "committed stays: free some space and run the same command again",
            ) from error
        self._free.append(buffer)
        if self._on_commit is not None:
            self._on_commit(commit)
