"""``run.json``: what a run was asked to do and what it decided; it goes on only as it began."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dictlearn.config import DictionaryConfig
from dictlearn.dictionary import Dictionary
from dictlearn.schedule import TrainConfig

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
    """Return the description of the run in a folder, or None.

    Raises
    ------
    FileExistsError
        A file is there instead of a folder.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; a run needs a folder, which may be new")
    path = folder / NAME
    if not path.is_file():
        return None
    there: dict[str, Any] = json.loads(path.read_text())
    return there


def write(folder: Path, run: Mapping[str, Any]) -> None:
    """Write the description of a run, all at once; dictionaries stay in the order of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{NAME}.tmp"
    temporary.write_text(json.dumps({**run, "names": list(run["dictionaries"])}, indent=1) + "\n")
    temporary.replace(folder / NAME)


def described_in(file: Path) -> tuple[dict[str, DictionaryConfig], list[TrainConfig]]:
    """Return the dictionaries that a ``run.json`` describes, by name, and how each is trained.

    Raises
    ------
    ValueError
        It is not the description of a run.
    """
    try:
        run = json.loads(file.read_text())
        configs = [TrainConfig.from_json(c) for c in run["train"]]
        described = {n: DictionaryConfig.from_json(d) for n, d in run["dictionaries"].items()}
        named = "names" in run
        if len(configs) != len(described):
            raise ValueError(f"{len(described)} dictionaries, {len(configs)} configurations")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"no entry {error}" if isinstance(error, KeyError) else error
        raise ValueError(
            f"{file} does not describe a run ({what}); give the {NAME} that `dictlearn train` or "
            "`dictlearn sweep` wrote into its --out"
        ) from error
    if not named and len({json.dumps(c.to_json()) for c in configs}) > 1:
        raise ValueError(
            f"{file} is of an earlier version, which did not keep the order of its dictionaries, "
            "and these are trained in different ways; begin the run anew from its command"
        )
    return described, configs


def check_same(there: Mapping[str, Any], asked: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with a run that was asked to do something else.

    A field that the run's version did not know has its default there.

    Raises
    ------
    ValueError
        The message names every field that differs.
    """
    names = list(asked["dictionaries"])
    known = {k: v for k, v in _filled(there).items() if k in asked}
    found, wanted = _fields(known, names), _fields(_json(asked), names)
    differing: dict[str, list[str]] = {}
    for key in sorted(found.keys() | wanted.keys()):
        name, field = key
        before, after = found.get(key, "nothing"), wanted.get(key, "nothing")
        if before != after:
            differing.setdefault(f"{field}: {before} -> {after}", []).append(name)
    if not differing:
        return
    lines = [
        f"{change} ({_those(of, names)})" if of[0] else change for change, of in differing.items()
    ]
    described = [line for line in lines if not line.startswith("initial weights")]
    lines = described or lines  # weights differ because what they belong to does
    if len(lines) > _SHOWN:
        lines = [*lines[:_SHOWN], f"and {len(lines) - _SHOWN} more"]
    hint = (
        "The activations changed since this run began (another store fingerprint). "
        if any(line.startswith("store:") for line in lines)
        else ""
    )
    raise ValueError(
        f"{folder} holds another run; these differ (there -> asked):\n  "
        + "\n  ".join(lines)
        + f"\n{hint}Choose another out, or ask for what is there"
    )


_SHOWN = 12
"""Differences named in a message."""


def _those(some: Sequence[str], every: Sequence[str]) -> str:
    if len(some) == len(every) > 1:
        return f"all {len(every)} dictionaries"
    more = f" and {len(some) - 3} more" if len(some) > 3 else ""
    return ", ".join(some[:3]) + more


def _filled(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description as this version would have written it."""
    out = _json(run)
    out["dictionaries"] = {n: _as_now(DictionaryConfig, d) for n, d in run["dictionaries"].items()}
    out["train"] = [_as_now(TrainConfig, c) for c in run["train"]]
    return out


def _as_now(kind: type[DictionaryConfig | TrainConfig], described: Any) -> Any:
    try:
        return _json(kind.from_json(described).to_json())
    except (ValueError, KeyError, TypeError):  # a field that is gone: the comparison names it
        return described


def _json(value: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = json.loads(json.dumps(value))
    return out


def _fields(run: Mapping[str, Any], names: Sequence[str]) -> dict[tuple[str, str], Any]:
    """Every value of a description by dictionary ("" for the run) and field."""
    out: dict[tuple[str, str], Any] = {}
    for section, value in run.items():
        if section == "dictionaries":
            of, label = value, ""
        elif isinstance(value, list) and len(value) == len(names):
            of = dict(zip(names, value, strict=True))
            label = "initial weights" if section == "initial" else section
        else:
            of, label = {"": value}, section
        for name, inner in of.items():
            out |= {(name, field): v for field, v in _flat(inner, label).items()}
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
