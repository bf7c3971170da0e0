"""Whole shards of a remote store kept in a local folder, for repeated epochs.

::

    <cache_dir>/<fingerprint>/<site>.<kind>.<part>.<bytes>.<crc32c>     a shard, checked
    <cache_dir>/partial/<host>-<pid>-<n>                                one being fetched
    <cache_dir>/lock                                                    held while room is made

A name says what the content must be, as the commit record of the part has it: another store, an
older harvest or a damaged copy has another name or another sum. A shard is fetched into
`partial`, at its full length from the start so that it counts, and renamed when its checksum is
right. A process holds a lock on what it fetches; without its owner it is removed. A shard is
checked again when a process first uses it.

The bound holds over all processes. To make room, shards that were not used for the longest time
go first, and never those of the store being read: a pass over more than fits would otherwise
drop every shard just before its turn. What does not fit is read from afar as without a cache.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import logging
import os
import queue
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actstore.crc import extend
from actstore.manifest import FormatError, validate_name
from actstore.storage import LocalStorage, Storage

if TYPE_CHECKING:
    from actstore.store import Store

log = logging.getLogger(__name__)

FETCH_CHUNK = 16 << 20
"""Bytes fetched and checked at a time."""

FETCHERS = 2
"""Shards fetched at once."""

Describe = Callable[[str, int], tuple[int, int]]
"""Gives bytes and CRC-32C of an object of a committed part."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """A shard as its commit record describes it."""

    path: str
    """Object, relative to the store."""
    size: int
    """Bytes."""
    crc: int
    """CRC-32C of all of them."""

    @property
    def name(self) -> str:
        """File name in the folder of its store."""
        _, site, kind, shard = self.path.split("/")
        part = int(shard.split(".")[1])
        return f"{site}.{kind}.{part}.{self.size}.{self.crc:08x}"


class PartCache:
    """A folder of shards within a bound of bytes, shared by any number of processes.

    Raises
    ------
    ValueError
        When the bound is not positive or the folder cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int | None = None) -> None:
        self.folder = Path(folder).absolute()
        self._serial = itertools.count()
        try:
            (self.folder / "partial").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cache_dir {os.fspath(folder)} cannot be used: {error.strerror}; give a folder "
                "on a local disk that may be written"
            ) from error
        if limit is None:
            free = shutil.disk_usage(self.folder).free
            limit = (free + sum(size for _, size, _ in self._entries())) // 2
        if limit <= 0:
            raise ValueError(f"cache_bytes must be positive, not {limit}")
        self.limit = limit

    def find(self, store: str, wanted: Wanted) -> Path | None:
        """Return the checked file of a shard, or None; one that is wrong is removed."""
        path = self.folder / store / wanted.name
        try:
            if path.stat().st_size == wanted.size and _sum(path) == wanted.crc:
                os.utime(path)
                return path
        except OSError:
            return None
        log.warning("%s is not what its name says and is fetched again", path)
        path.unlink(missing_ok=True)
        return None

    def fetch(self, store: str, wanted: Wanted, storage: Storage) -> Path | None:
        """Fetch a shard; None when there is no room for it.

        Raises
        ------
        FormatError
            When the shard is not what the commit record says; nothing is kept then.
        """
        validate_name(store, "fingerprint")
        room = self._reserve(store, wanted.size)
        if room is None:
            return None
        temporary, descriptor = room
        try:
            crc = 0
            for start in range(0, wanted.size, FETCH_CHUNK):
                length = min(FETCH_CHUNK, wanted.size - start)
                data = memoryview(storage.read_range(wanted.path, start, length))
                if len(data) != length:
                    raise FormatError(f"{storage.uri(wanted.path)} is shorter than {wanted.size}")
                crc = extend(crc, data)
                _write_at(descriptor, data, start)
            if crc != wanted.crc:
                raise FormatError(
                    f"{storage.uri(wanted.path)} is damaged: its checksum is not that of the "
                    f"commit record; `actstore verify {storage.url}` says more"
                )
            target = self.folder / store / wanted.name
            target.parent.mkdir(exist_ok=True)
            os.rename(temporary, target)
            return target
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)

    def _reserve(self, store: str, size: int) -> tuple[Path, int] | None:
        """Return a locked temporary file of `size` bytes within the bound, or None."""
        with self._locked():
            entries = sorted(self._entries(), key=lambda entry: entry[2])
            total = sum(length for _, length, _ in entries)
            mine = self.folder / store
            others = [e for e in entries if e[0].parent not in (mine, self.folder / "partial")]
            if total + size - sum(length for _, length, _ in others) > self.limit:
                return None
            for path, length, _ in others:
                if total + size <= self.limit:
                    break
                path.unlink(missing_ok=True)
                total -= length
            name = f"{socket.gethostname()}-{os.getpid()}-{id(self):x}-{next(self._serial)}"
            path = self.folder / "partial" / name
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, size)
            return path, descriptor

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the folder; remove what killed processes left."""
        with open(self.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for path in (self.folder / "partial").iterdir():
                with contextlib.suppress(OSError), open(path, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            yield

    def _entries(self) -> Iterator[tuple[Path, int, float]]:
        """Yield path, bytes and time of last use of every file of the cache."""
        for folder in self.folder.iterdir():
            if not folder.is_dir():
                continue
            for path in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    yield path, status.st_size, status.st_mtime


class CachedStorage:
    """A remote storage whose shards are looked for in a cache, and fetched into it meanwhile."""

    def __init__(
        self, storage: Storage, cache: PartCache, fingerprint: str, describe: Describe
    ) -> None:
        self.remote, self._cache = storage, cache
        self.url = storage.url
        self._fingerprint, self._describe = fingerprint, describe
        self._ready: dict[str, str | None] = {}
        self._queue: queue.SimpleQueue[Wanted] = queue.SimpleQueue()
        self._started = False
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.remote, name)  # all but shards read in bulk comes from afar

    def __reduce__(self) -> Any:
        return _itself, (self.remote,)  # another process or machine opens a cache of its own

    def __repr__(self) -> str:
        return f"CachedStorage({self.remote!r}, {str(self._cache.folder)!r})"

    def local(self, path: str, part: int, *, fetch: bool) -> str | None:
        """Return the local file of a shard, or None; with `fetch` it will be there later."""
        if path in self._ready:
            return self._ready[path]
        size, crc = self._describe(path, part)
        wanted = Wanted(path=path, size=size, crc=crc)
        found = self._cache.find(self._fingerprint, wanted)
        if found is not None:
            self._ready[path] = str(found)
            return self._ready[path]
        if fetch:
            self._ready[path] = None
            self._start()
            self._queue.put(wanted)
        return None

    def forget(self, path: str) -> None:
        """Look for a shard again: another process has removed it."""
        self._ready.pop(path, None)

    def _start(self) -> None:
        with self._lock:
            if self._started:
                return
            self._started = True
            for _ in range(FETCHERS):
                threading.Thread(target=self._run, name="actstore-cache", daemon=True).start()

    def _run(self) -> None:
        while True:
            wanted = self._queue.get()
            try:
                found = self._cache.fetch(self._fingerprint, wanted, self.remote)
            except (OSError, ValueError) as error:  # the reader goes on from afar
                log.warning("%s is not cached: %s", self.remote.uri(wanted.path), error)
                continue
            if found is not None:
                self._ready[wanted.path] = str(found)


def cached(
    store: "Store", folder: str | os.PathLike[str] | None, limit: int | None = None
) -> "Store":
    """Have a store keep its shards in `folder`, at most `limit` bytes of it.

    Without a limit it is half of what the disk has free. Nothing changes without a folder, or
    when the store lies on this machine.

    Raises
    ------
    ValueError
        When the folder cannot be used, or a limit has no folder.
    """
    if folder is None:
        if limit is not None:
            raise ValueError("cache_bytes bounds a cache, and cache_dir does not say where it is")
        return store
    if isinstance(store.storage, LocalStorage):
        return store

    def describe(path: str, part: int) -> tuple[int, int]:
        entry = store.commit(part).objects[path]
        return entry["bytes"], entry["crc32c"]

    storage: Any = CachedStorage(
        store.storage, PartCache(folder, limit), store.fingerprint, describe
    )
    store.storage = storage
    return store


def _itself(storage: Storage) -> Storage:
    return storage


def _sum(path: Path) -> int:
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while data := file.read(FETCH_CHUNK):
            crc = extend(crc, data)
    return crc


def _write_at(descriptor: int, data: memoryview, start: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], start + done)
