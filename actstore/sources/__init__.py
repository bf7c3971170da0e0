"""Data sets to harvest from, found by a word, a path, a URL or an object."""

import difflib
import os
from collections.abc import Mapping
from typing import Any

from actstore.sources.base import Source, Undecodable, Unreachable

__all__ = ["Source", "Undecodable", "Unreachable", "open_source", "reopen_source"]


def open_source(data: Any, storage_options: Mapping[str, Any] | None = None) -> Source:
    """Return the source that `data` names.

    Parameters
    ----------
    data
        ``"digits"``, a folder of images or of videos, a parquet file, folder or glob, WebDataset
        tars (``train-{000..012}.tar``), a CSV or parquet table with a column `path` or `url`,
        an fsspec URL of any of these, a `Source`, or any map-style data set object.
        ``"video:folder?stride=4"`` says how clips are taken from videos.
    storage_options
        Options of fsspec for URLs.

    Raises
    ------
    FileNotFoundError
        When nothing is at the path.
    ValueError
        When what is there is no data set.
    """
    if hasattr(data, "describe") and hasattr(data, "image") and hasattr(data, "row"):
        source: Source = data
        return source
    if not isinstance(data, str | os.PathLike):
        from actstore.sources.python import MapStyle

        return MapStyle(data)
    name = os.fspath(data)
    if name == "digits":
        from actstore.sources.digits import Digits

        return Digits()
    options = dict(storage_options or {})
    if "://" in name and not name.removeprefix("video:").startswith(("s3://", "s3a://")):
        options.pop("endpoint_url", None)  # of the store's S3 server, if one is given for both
    if _is_parquet(name):
        from actstore.sources.parquet import Parquet
        from actstore.sources.table import Table, names_files

        return Table(name, options) if names_files(name, options) else Parquet(name, options)
    if name.lower().endswith((".csv", ".tsv")):
        from actstore.sources.table import Table

        return Table(name, options)
    if _is_tar(name):
        from actstore.sources.webdataset import WebDataset

        return WebDataset(name, options)
    from actstore.sources.video import PREFIX, VideoFolder, holds_videos

    if name.startswith(PREFIX):
        return VideoFolder.parse(name, options)
    if "://" not in name and holds_videos(name):
        return VideoFolder(name, None, options)
    if "://" not in name and not os.path.isdir(name):
        hint = " (did you mean 'digits'?)" if difflib.get_close_matches(name, ["digits"]) else ""
        kind = "is a file of a kind no source reads" if os.path.exists(name) else "does not exist"
        raise FileNotFoundError(
            f"data {name!r} {kind}{hint}; allowed: digits, a folder of images or videos, a "
            ".parquet file, folder or glob of them, WebDataset .tar files, a .csv or .parquet "
            "table of paths or URLs, or an fsspec URL of one"
        )
    from actstore.sources.folder import Folder

    return Folder(name, options)


def _is_parquet(name: str) -> bool:
    return name.endswith(".parquet") or _holds(name, ".parquet")


def _is_tar(name: str) -> bool:
    endings = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
    return name.lower().endswith(endings) or _holds(name, ".tar")


def _holds(name: str, ending: str) -> bool:
    """Whether a local folder has a file of an ending directly in it."""
    if "://" in name or not os.path.isdir(name):
        return False
    with os.scandir(name) as entries:
        return any(entry.name.endswith(ending) for entry in entries)


def reopen_source(
    description: Mapping[str, Any], storage_options: Mapping[str, Any] | None = None
) -> Source:
    """Return the source a manifest describes, checked to be the same.

    Raises
    ------
    ValueError
        When it is an object of Python, or its fingerprint changed.
    """
    kind = description.get("kind")
    if kind == "digits":
        source = open_source("digits")
    elif kind == "video":
        from actstore.sources.video import VideoFolder

        source = VideoFolder.reopen(description, storage_options)
    elif kind in ("folder", "parquet", "table", "webdataset"):
        source = open_source(str(description["url"]), storage_options)
    else:
        raise ValueError(
            f"the data of this store ({description.get('name', kind)}) cannot be opened again "
            "from its description: pass it as data="
        )
    check_source(source, description)
    return source


def check_source(source: Source, description: Mapping[str, Any]) -> None:
    """Refuse a source that is not the one described; ValueError says what differs."""
    found = source.describe()
    for field in ("kind", "items", "fingerprint"):
        if found.get(field) != description.get(field):
            raise ValueError(
                f"the data set changed since the harvest: {field} was "
                f"{description.get(field)!r}, is {found.get(field)!r}"
            )
