"""Durable objects under one root: the few operations a store needs from its medium.

`LocalStorage` keeps them in a folder. Every write is a temporary file, fsync, rename or link,
fsync of the directory: after a power loss an object is there in full or not at all.
"""

import contextlib
import errno
import fcntl
import itertools
import math
import mmap
import os
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Shaped

from actstore.credentials import public
from actstore.links import Links

Buffer = Any
"""Anything `memoryview` accepts with contiguous bytes."""

WRITE_CHUNK = 1 << 20
"""Bytes of one write call through the page cache."""

DIRECT_CHUNK = 16 << 20
"""Bytes of one direct write call."""

DIRECT_BYTES = 4 << 20
"""Objects from this size on are written past the page cache where that is possible."""

DIRECT_ALIGN = 4096
"""Alignment of direct writes, in bytes."""


class Storage(Protocol):
    """What a store asks from the medium it lies on; paths are relative with ``/``."""

    url: str
    """Root, as the user gave it."""

    def read(self, path: str, *, limit: int | None = None) -> bytes:
        """Return a whole object; FileNotFoundError when absent, ValueError above `limit`."""

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """Return `length` bytes of an object from `offset`; fewer at its end."""

    def size(self, path: str) -> int | None:
        """Return the bytes of an object, or None when it is absent."""

    def create(self, path: str, data: bytes) -> bool:
        """Write an object that must not exist yet; return False when it does."""

    def replace(self, path: str, pieces: Iterable[Buffer]) -> None:
        """Write an object from consecutive buffers, atomically and durably."""

    def delete(self, path: str) -> None:
        """Remove an object; nothing happens when it is absent."""

    def list(self, folder: str) -> Iterator[str]:
        """Yield the names of the objects directly inside `folder`, in no order."""

    def uri(self, path: str) -> str:
        """Return the local path or URL of an object."""

    def zarr(self) -> Any:
        """Return a read-only store object for zarr-python."""


class LocalStorage:
    """Objects as files of one folder; links that leave it are refused with a FormatError."""

    TEMPORARY = "tmp"
    """Folder of unfinished files: same file system, so that rename and link are atomic."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.url = os.fspath(root)
        self._root = Path(root).absolute()
        self._links = Links(str(self._root))
        self._serial = itertools.count()

    def _path(self, path: str) -> Path:
        return self._root / path

    def read(self, path: str, *, limit: int | None = None) -> bytes:
        """See `Storage.read`."""
        with open(self.open(path), "rb") as file:
            if limit is not None and os.fstat(file.fileno()).st_size > limit:
                raise ValueError(f"{self.uri(path)} is larger than the {limit} bytes allowed")
            return file.read()

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        """See `Storage.read_range`."""
        descriptor = self.open(path)
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def open(self, path: str) -> int:
        """Return a descriptor of an object, to be closed by the caller; see `Links.open`."""
        return self._links.open(path)

    def size(self, path: str) -> int | None:
        """See `Storage.size`."""
        self._links.check_folder(path)
        try:
            found = os.lstat(self._path(path))
            if stat.S_ISLNK(found.st_mode):
                found = os.stat(self._links.resolve(path))
        except FileNotFoundError:
            return None
        return found.st_size

    def create(self, path: str, data: bytes) -> bool:
        """See `Storage.create`: a finished temporary file is linked to the new name."""
        self._links.check_folder(path)
        temporary = self._write([data])
        target = self._path(path)
        try:
            self._make_folder(target.parent)
            os.link(temporary, target)
        except FileExistsError:
            return False
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        sync_folder(target.parent)
        return True

    def replace(self, path: str, pieces: Iterable[Buffer]) -> None:
        """See `Storage.replace`: a finished temporary file is renamed."""
        self._links.check_folder(path)
        temporary = self._write(pieces)
        target = self._path(path)
        self._make_folder(target.parent)
        os.rename(temporary, target)
        sync_folder(target.parent)

    def delete(self, path: str) -> None:
        """See `Storage.delete`; of a link the link itself goes."""
        self._links.check_folder(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(path))

    def list(self, folder: str) -> Iterator[str]:
        """See `Storage.list`."""
        self._links.check_folder(f"{folder}/")
        try:
            with os.scandir(self._path(folder)) as entries:
                yield from (entry.name for entry in entries if entry.is_file())
        except FileNotFoundError:
            return

    def uri(self, path: str) -> str:
        """See `Storage.uri`."""
        return str(self._path(path))

    def zarr(self) -> Any:
        """See `Storage.zarr`."""
        from actstore.local_zarr import GuardedStore

        return GuardedStore(self._root)

    def _write(self, pieces: Iterable[Buffer]) -> Path:
        """Write a durable temporary file; remove it when that fails."""
        self._links.check_folder(f"{self.TEMPORARY}/")
        folder = self._path(self.TEMPORARY)
        self._make_folder(folder)
        name = f"{socket.gethostname()}-{os.getpid()}-{id(self):x}-{next(self._serial)}"
        path = folder / name
        try:
            with open(path, "xb", buffering=0) as file:
                for piece in pieces:
                    _write_all(file.fileno(), memoryview(piece).cast("B"))
                os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            raise
        return path

    def _make_folder(self, folder: Path) -> None:
        """Make a folder and its parents durably."""
        if folder.is_dir():
            return
        self._make_folder(folder.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        sync_folder(folder.parent)


def _write_all(descriptor: int, data: memoryview) -> None:
    """Append bytes to a file; large aligned ones past the page cache.

    Direct writes spare the copy into the page cache (0.07 s of kernel time a gigabyte instead of
    0.7 to 2) and do not evict what others read. They need an aligned address, length and offset:
    `aligned_zeros` gives the first; what does not fit goes the usual way, as does everything
    where the file system knows no direct writes.
    """
    start = 0
    direct = len(data) // DIRECT_ALIGN * DIRECT_ALIGN
    if direct >= DIRECT_BYTES and _aligned(descriptor, data):
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
            while start < direct:
                start += os.write(descriptor, data[start : min(direct, start + DIRECT_CHUNK)])
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        finally:
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)
    while start < len(data):
        start += os.write(descriptor, data[start : start + WRITE_CHUNK])


def _aligned(descriptor: int, data: memoryview) -> bool:
    if not hasattr(os, "O_DIRECT"):
        return False
    address = np.frombuffer(data, np.uint8).ctypes.data
    return address % DIRECT_ALIGN == 0 and os.lseek(descriptor, 0, os.SEEK_CUR) % DIRECT_ALIGN == 0


def aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Shaped[np.ndarray, "..."]:
    """Return zeros at an address that direct writes accept, in large pages where there are any.

    First touching small pages took 1.2 s a gigabyte on a virtual machine, large ones a tenth.
    """
    count = math.prod(shape)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, max(1, count * dtype.itemsize), flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux; its kernel may be built without
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype, count).reshape(shape)


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_storage(url: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Storage:
    """Return the storage that a URL or a local path names.

    Raises
    ------
    ValueError
        For a URL scheme that is not supported.
    """
    text = os.fspath(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return LocalStorage(text)
    if scheme in ("file", "local"):
        return LocalStorage(rest)
    if scheme in ("s3", "s3a"):
        try:
            from actstore.remote import S3Storage
        except ImportError:
            raise ValueError(f"{text}: S3 needs `pip install 'actstore[s3]'`") from None
        return S3Storage(text, options)
    raise ValueError(
        f"{public(text)}: a store lies in a local folder or on S3; scheme {scheme!r} is not "
        "supported"
    )
