"""``run.json``: what a run was asked to do and what it decided; it goes on only as it began."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dictlearn.dictionary import Dictionary

NAME = "run.json"


def digest(dictionary: Dictionary) -> str:
    """Short hash of the weights, to tell one initialisation from another."""
    sha = hashlib.sha256()
    for name, value in dictionary.state_dict().items():
        sha.update(name.encode())
        sha.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def default_names(dictionaries: Sequence[Dictionary]) -> list[str]:
    """Name each dictionary by its sites; the second of a name gets ``-2`` and so on."""
    names: list[str] = []
    for d in dictionaries:
        reads, writes = list(d.config.reads), list(d.config.writes)
        base = "+".join(reads) if reads == writes else f"{'+'.join(reads)}-to-{'+'.join(writes)}"
        base = base if len(base) <= 100 else f"{base[:80]}-{len(d.config.sites)}-sites"
        name, number = base, 1
        while name in names:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return names


def read(folder: Path) -> dict[str, Any] | None:
    """Return the description of the run in a folder, or None."""
    path = folder / NAME
    if not path.is_file():
        return None
    there: dict[str, Any] = json.loads(path.read_text())
    return there


def write(folder: Path, run: Mapping[str, Any]) -> None:
    """Write the description of a run, all at once."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{NAME}.tmp"
    temporary.write_text(json.dumps(run, indent=1, sort_keys=True) + "\n")
    temporary.replace(folder / NAME)


def check_same(there: Mapping[str, Any], asked: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with a run that was asked to do something else.

    Raises
    ------
    ValueError
        The message names every field that differs.
    """
    found, wanted = _flat(_json(there)), _flat(_json(asked))
    known = {k: v for k, v in found.items() if k.split(".")[0] in asked}
    differing = [
        f"{key}: {known.get(key, 'nothing')} -> {wanted.get(key, 'nothing')}"
        for key in sorted(known.keys() | wanted.keys())
        if known.get(key) != wanted.get(key)
    ]
    if not differing:
        return
    hint = (
        "The activations changed since this run began (another store fingerprint). "
        if any(d.startswith("store:") for d in differing)
        else ""
    )
    raise ValueError(
        f"{folder} holds another run; these differ (there -> asked):\n  "
        + "\n  ".join(differing[:12])
        + f"\n{hint}Choose another out, or ask for what is there"
    )


def _json(value: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = json.loads(json.dumps(value))
    return out


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = {str(i): v for i, v in enumerate(value)}.items()
    else:
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, inner in items:
        out |= _flat(inner, f"{prefix}.{key}" if prefix else key)
    return out
