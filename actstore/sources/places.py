"""Lists of files by path, brace pattern, glob or folder, local or by fsspec URL."""

import contextlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from actstore.credentials import public, refuse_credentials

MAX_FILES = 1_000_000
"""A brace pattern that stands for more files is refused."""

_BRACES = re.compile(r"\{([^{}]*)\}")


def absolute(url: str) -> str:
    """Return a URL as it is and a local path as an absolute one, fit for a manifest.

    Raises
    ------
    ValueError
        When the URL holds a password or the key of a signed request: it would be written down.
    """
    if "://" not in url:
        return os.path.abspath(url)
    return refuse_credentials(url)


def expand_braces(pattern: str) -> list[str]:
    """Return the names that ``a-{000..012}.tar`` or ``{train,val}.tar`` stands for, in order.

    Numbers keep the width of the first one; both ends are included.

    Raises
    ------
    ValueError
        For unbalanced braces, a range that runs backwards, or more than `MAX_FILES` names.
    """
    pieces = _BRACES.split(pattern)
    if any("{" in text or "}" in text for text in pieces):
        raise ValueError(f"unbalanced or nested braces in {pattern!r}; write x-{{000..012}}.tar")
    choices: list[list[str]] = []
    total = 1
    for number, text in enumerate(pieces):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", text) if number % 2 else None
        if span:
            first, last = int(span[1]), int(span[2])
            if last < first:
                raise ValueError(f"{pattern!r}: the range {text} runs backwards")
            total *= last - first + 1
            _check(total, pattern)
            choices.append([str(i).zfill(len(span[1])) for i in range(first, last + 1)])
        else:
            choices.append(text.split(",") if number % 2 else [text])
            total *= len(choices[-1])
            _check(total, pattern)
    return ["".join(parts) for parts in itertools.product(*choices)]


def _check(total: int, pattern: str) -> None:
    if total > MAX_FILES:
        raise ValueError(f"{pattern!r} stands for more than {MAX_FILES:,} files")


@contextlib.contextmanager
def reached(url: str) -> Iterator[None]:
    """Say what to do where the storage of a URL refuses or does not answer.

    Raises
    ------
    PermissionError
        When it denies access.
    ConnectionError
        For the errors of its own that every file system of fsspec has.
    """
    try:
        yield
    except PermissionError:
        raise PermissionError(
            f"{url}: its storage denied access; check the credentials (storage options key and "
            "secret, or those of the environment) and their rights"
        ) from None
    except ValueError as error:
        if not str(error).startswith("Protocol not known"):
            raise
        raise ValueError(
            f"{public(url)}: no storage is called {url.partition('://')[0]!r}; there are local "
            "paths, s3://, gs://, az://, https://, hf:// and what else fsspec knows"
        ) from None
    except ImportError as error:
        raise ValueError(f"{public(url)} needs a package that is not installed: {error}") from None
    except FileNotFoundError as error:
        if url in str(error):
            raise
        raise FileNotFoundError(
            f"{public(url)} does not exist ({error}); check its spelling, and the storage option "
            "endpoint_url where it lies on a server that is not Amazon's"
        ) from None
    except OSError:
        raise
    except Exception as error:
        if "://" not in url:
            raise
        raise ConnectionError(
            f"{url}: its storage cannot be reached ({type(error).__name__}); check the storage "
            "option endpoint_url, or the network"
        ) from None


def find_files(
    url: str, storage_options: Mapping[str, Any] | None, extensions: tuple[str, ...]
) -> tuple[Any, list[str], list[int]]:
    """Return the file system, the paths on it in order, and their sizes in bytes.

    Parameters
    ----------
    url
        Path or fsspec URL of a file or a folder; may hold braces and the glob signs ``*?[``.
    storage_options
        Options of fsspec.
    extensions
        Which files of a folder are meant.

    Raises
    ------
    FileNotFoundError
        When a file, or any file of a folder or glob, is not there.
    """
    found: dict[str, int] = {}
    fs = None
    for name in expand_braces(absolute(url)):
        with reached(name):
            fs, path = fsspec.core.url_to_fs(name, **dict(storage_options or {}))
            sizes = _matching(fs, path, extensions)
        if not sizes:
            raise nothing_at(fs, name, " or ".join(e.lstrip(".") for e in extensions))
        found.update((p, sizes[p]) for p in sorted(sizes))
    return fs, list(found), list(found.values())


def nothing_at(fs: Any, url: str, kind: str) -> FileNotFoundError:
    """Return the error for a place without files of a kind; of S3 the bucket may be missing."""
    bucket = url.partition("://")[2].partition("/")[0]
    with reached(url):
        if url.startswith(("s3://", "s3a://")) and not fs.exists(bucket):
            return FileNotFoundError(
                f"{url}: there is no bucket {bucket!r}; check its spelling, and the storage option "
                "endpoint_url where it lies on a server that is not Amazon's"
            )
    return FileNotFoundError(f"{url}: no {kind} file there")


def _matching(fs: Any, path: str, extensions: tuple[str, ...]) -> dict[str, int]:
    """Return the sizes of the files of a path, folder or glob."""
    if any(sign in path for sign in "*?["):
        return {p: int(info["size"]) for p, info in fs.glob(path, detail=True).items()}
    if fs.isdir(path):
        found = file_sizes(fs, path)
        return {p: size for p, size in found.items() if p.lower().endswith(extensions)}
    return {path: int(fs.info(path)["size"])} if fs.exists(path) else {}


def file_sizes(fs: Any, folder: str) -> dict[str, int]:
    """Return the size in bytes of every file below a folder, links followed; 0 where they break.

    On a local disk without fsspec's description of each file, which takes three times as long.
    """
    if not isinstance(fs, LocalFileSystem) or not os.path.isdir(folder):
        return {path: int(info["size"]) for path, info in fs.find(folder, detail=True).items()}
    sizes = {}
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                try:
                    if entry.is_dir():
                        waiting.append(entry.path)
                    else:
                        sizes[entry.path] = entry.stat().st_size
                except OSError:  # a link to nothing, or to itself
                    sizes[entry.path] = 0
    return sizes
