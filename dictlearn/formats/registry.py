"""Which formats there are, which one a path is of, and reading and writing them.

A module of this package with a ``PEER`` is a format: nothing is listed here. ``native`` is this
project's own (`dictlearn.formats.native`).
"""

from __future__ import annotations

import difflib
import functools
import importlib
import json
import os
import pkgutil
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dictlearn.formats as package
from actstore.manifest import FormatError
from dictlearn.formats import native
from dictlearn.formats.peer import UNNAMED, Checkpoint, Peer

if TYPE_CHECKING:
    import torch

    from dictlearn.dictionary import Dictionary

NATIVE = "native"


@functools.cache
def peers() -> dict[str, Peer]:
    """Return the formats of other libraries by name, found by scanning this package."""
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        peer = getattr(module, "PEER", None)
        if isinstance(peer, Peer):
            found[peer.name] = peer
    return found


def formats() -> list[str]:
    """Names of all formats, ``native`` first."""
    return [NATIVE, *peers()]


def _peer(name: str) -> Peer:
    if name not in peers():
        near = difflib.get_close_matches(name, formats(), n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown format {name!r}; nearest: {near!r}; all: {', '.join(formats())}")
    return peers()[name]


def detect(path: str | Path) -> str:
    """Return the name of the format of a folder or file.

    Raises
    ------
    FileNotFoundError
        There is nothing at `path`.
    FormatError
        It is of no format known, or could be of several.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no dictionary at {path}: there is no such folder or file. Published weights go by "
            "name: dictlearn pretrained"
        )
    if _is_native(path):
        return NATIVE
    fitting = [name for name, peer in peers().items() if peer.recognise(path)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise FormatError(f"{path} could be of {' or '.join(fitting)}: say format=")
    raise FormatError(_no_format(path))


def _is_native(path: Path) -> bool:
    if not (path / native.WEIGHTS).is_file():
        try:
            content = json.loads((path / native.CONFIG).read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(content, dict) and content.get("format") == native.FORMAT
    return True


def _no_format(path: Path) -> str:
    lines = [f"{path} is of no format known."]
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir())
        lines.append(
            f"It holds {', '.join(inside[:12]) or 'nothing'}{' ...' * (len(inside) > 12)}."
        )
        below = [
            p.name
            for p in sorted(path.iterdir())[:200]
            if p.is_dir() and (_is_native(p) or any(x.recognise(p) for x in peers().values()))
        ]
        if below:
            lines.append(
                f"These folders in it are dictionaries, load one: {', '.join(below[:12])}."
            )
    lines.append("Formats: " + "; ".join(f"{n}: {p.files}" for n, p in peers().items()))
    return " ".join(lines)


def read(path: str | Path, format: str | None = None, **told: Any) -> Checkpoint:
    """Read a checkpoint of another library, its provenance included.

    Parameters
    ----------
    path
        Folder or file.
    format
        Name of the format; None looks.
    told
        ``reads`` and ``writes`` name the sites; the rest are the format's options (`Peer.told`).

    Raises
    ------
    FileNotFoundError, FormatError
        No file, or not what the format says.
    ValueError
        Unknown format or option, or an option without which the file is ambiguous.
    """
    path = Path(path)
    name = format or detect(path)
    if not path.exists():
        detect(path)
    peer = _peer(name)
    reads, writes = told.pop("reads", None), told.pop("writes", None)
    for option in told:
        allowed = ["reads", "writes", *peer.told]
        if option not in allowed:
            near = difflib.get_close_matches(option, allowed, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"the format {name!r} has no option {option!r}; nearest: {near!r}; "
                f"all: {', '.join(allowed)}"
            )
    return peer.read(path, **told).at(reads, writes)


def load(
    path: str | Path,
    format: str | None = None,
    *,
    device: str | torch.device = "cpu",
    **told: Any,
) -> Dictionary:
    """Load a dictionary of any format; see `read` for the parameters and errors.

    Weights are float32 whatever the file holds. A site that the file does not record is named
    ``unnamed`` until ``reads=`` (and ``writes=``) tell it.
    """
    if (format or detect(path)) == NATIVE:
        if told:
            raise ValueError(f"the native format records everything; it takes no {sorted(told)}")
        return native.load(path, device)
    return read(path, format, **told).build(device)


def save(
    dictionary: Dictionary,
    path: str | Path,
    format: str = NATIVE,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write a dictionary into the folder `path`; the folder is complete or as it was.

    Parameters
    ----------
    dictionary, path
        What, and the folder.
    format
        ``native``, or a format of another library that can hold it.
    about
        Provenance; other formats take ``model`` and ``tokens`` from it.

    Raises
    ------
    ValueError
        Unknown format, one that is only read, or one that cannot hold this dictionary.
    """
    if format == NATIVE:
        return native.save(dictionary, path, about=dict(about or {}))
    peer = _peer(format)
    if peer.write is None:
        raise ValueError(f"the format {format!r} is read only")
    folder = Path(path)
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        peer.write(dictionary, scratch, about or {})
        folder.mkdir(parents=True, exist_ok=True)
        (plain := scratch / ".mode").touch()  # safetensors makes files only their owner can read
        for file in scratch.iterdir():
            shutil.copymode(plain, file)
        plain.unlink()
        for file in sorted(scratch.iterdir(), key=lambda f: f.suffix == ".json"):
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def convert(
    source: str | Path,
    target: str | Path,
    format: str = NATIVE,
    from_format: str | None = None,
    **told: Any,
) -> Path:
    """Rewrite a checkpoint of any format in another; provenance goes along.

    Raises
    ------
    FileNotFoundError, FormatError, ValueError
        As `read` and `save`.
    """
    name = from_format or detect(source)
    if name == NATIVE:
        dictionary = load(source, NATIVE, **told)
        about = native.describe(source).get("about") or {}
        return save(dictionary, target, format, about)
    found = read(source, name, **told)
    about = {"model": found.about.get("model"), "tokens": found.about.get("tokens")}
    if format == NATIVE:
        about["source"] = found.about
    return save(found.build(), target, format, {k: v for k, v in about.items() if v is not None})


def is_named(dictionary: Dictionary) -> bool:
    """Whether every site has a name."""
    return not any(site.startswith(UNNAMED) for site in dictionary.config.sites)
