"""Fetch the bytes of items: what is missing is told apart from storage that fails.

An item that is not there, or holds no image, is a fact about the data set: it is skipped. Storage
that does not answer says nothing about the item. It is asked again, and then the harvest stops, so
that an outage never becomes a store with items missing.
"""

import os
import time
from collections.abc import Callable
from typing import Any

from actstore.sources.base import Undecodable, Unreachable

ATTEMPTS = 3
"""Tries to fetch bytes from storage that is not a local disk."""

PAUSE = 0.3
"""Seconds before the second try; each further pause is as much longer."""

GONE = frozenset({404, 410, 451})
"""Answers of a web server that say of one item that it is not to be had."""


class Denied(Unreachable):
    """A web server denies one item (403); whether it denies all is for the caller to find out."""


_NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


def is_local(fs: Any) -> bool:
    """Whether a file system of fsspec is that of this machine."""
    names = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    return bool({"file", "local"} & set(names))


def fetch(fs: Any, path: str, start: int | None = None, end: int | None = None) -> bytes:
    """Return the bytes of a file, or a range of them.

    Raises
    ------
    Undecodable
        When there is no such file.
    Unreachable
        When its storage fails, of one elsewhere `ATTEMPTS` times; `Denied` where it is a web
        server that answers 403.
    """
    data: bytes = persistently(lambda: fs.cat_file(path, start=start, end=end), fs, path)
    return data


def persistently(read: Callable[[], Any], fs: Any, path: str) -> Any:
    """Return what `read` returns, calling it again where storage elsewhere fails.

    Raises
    ------
    Undecodable, Unreachable
        As for `fetch`.
    """
    name = os.path.basename(path.partition("?")[0])
    tries = 1 if is_local(fs) else ATTEMPTS
    for attempt in range(1, tries + 1):
        try:
            return read()
        except (Undecodable, Unreachable):
            raise
        except _NO_FILE:
            raise Undecodable("file is missing") from None
        except Exception as error:  # every file system of fsspec has errors of its own
            if getattr(error, "status", None) in GONE:
                raise Undecodable(f"is not to be had: the server says {_reason(error)}") from None
            if isinstance(error, ValueError) and not isinstance(error, OSError):
                raise Undecodable(f"cannot be asked for: {type(error).__name__}") from None
            denied = isinstance(error, PermissionError)
            if denied or attempt == tries:
                # No cause: what a client says may repeat an address that holds a key.
                kind = Denied if getattr(error, "status", None) == 403 else Unreachable
                raise kind(f"{name} cannot be fetched: {_reason(error)}") from None
            time.sleep(PAUSE * attempt)
    raise AssertionError  # the last attempt returns or raises


class Watched:
    """A binary file for libraries that read by themselves, whose storage fails loudly.

    They report a damaged file and a failing medium by the same errors; here the second is an
    `Unreachable`, kept in `failure` because some of them drop what a file raises.
    """

    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path = fs, path
        self._file = persistently(lambda: fs.open(path, "rb"), fs, path)
        self.failure: Unreachable | None = None
        self.name = os.path.basename(path)

    def read(self, size: int = -1) -> bytes:
        """Read from the present place on, again where storage elsewhere fails."""
        at = self._file.tell()

        def once() -> bytes:
            self._file.seek(at)
            data: bytes = self._file.read(size)
            return data

        try:
            data: bytes = persistently(once, self._fs, self._path)
        except Unreachable as error:
            self.failure = error
            raise
        return data

    def check(self) -> None:
        """Raise the failure of the storage, if there was one."""
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def seek(self, offset: int, whence: int = 0) -> int:
        """See `io.IOBase.seek`."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """See `io.IOBase.tell`."""
        return int(self._file.tell())

    def close(self) -> None:
        """See `io.IOBase.close`."""
        self._file.close()

    @property
    def closed(self) -> bool:
        """See `io.IOBase.closed`."""
        return bool(self._file.closed)

    def readable(self) -> bool:
        """See `io.IOBase.readable`."""
        return True

    def seekable(self) -> bool:
        """See `io.IOBase.seekable`."""
        return True

    def writable(self) -> bool:
        """See `io.IOBase.writable`."""
        return False

    def __enter__(self) -> "Watched":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _reason(error: Exception) -> str:
    """Return one line that repeats no address: a URL may hold a key."""
    status = getattr(error, "status", None)
    words = getattr(error, "strerror", None) or getattr(error, "message", None)
    found = f"{status} {words or ''}".strip() if status else (words or type(error).__name__)
    return " ".join(str(found).split())[:120]
