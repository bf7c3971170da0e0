"""The native format: a folder with ``dictionary.safetensors`` and ``config.json``.

``config.json`` holds ``{"format": "dictlearn", "version": 1, "dictionary": DictionaryConfig,
"about": {...}}``. `about` is free JSON: the store's fingerprint, the model, the training
configuration, the report. Tensors carry the names of the module's state dict, row-major, in the
shapes its docstring gives. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dictlearn.config import DictionaryConfig
from dictlearn.dictionary import Dictionary

FORMAT = "dictlearn"
VERSION = 1
WEIGHTS = "dictionary.safetensors"
CONFIG = "config.json"


def save(dictionary: Dictionary, path: str | Path, about: dict[str, Any] | None = None) -> Path:
    """Write a dictionary into the folder `path`, replacing one that is there.

    Weights go first and the description last, each by rename, so that a folder with a
    ``config.json`` is complete.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "dictionary": dictionary.config.to_json(),
        "about": about or {},
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in dictionary.state_dict().items()}
    weights = folder / f".{WEIGHTS}.{os.getpid()}"
    description = folder / f".{CONFIG}.{os.getpid()}"
    save_file(tensors, weights, metadata={"format": "pt"})
    description.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    shutil.copymode(description, weights)  # safetensors makes files only their owner can read
    _publish(weights, folder / WEIGHTS)
    _publish(description, folder / CONFIG)
    return folder


def load(path: str | Path, device: str | torch.device = "cpu") -> Dictionary:
    """Read a dictionary from the folder `path`.

    Raises
    ------
    FileNotFoundError
        There is no ``config.json`` or no weights.
    FormatError
        The folder is of another or a newer format, or tensors are missing, extra or misshapen.
    """
    config = DictionaryConfig.from_json(describe(path)["dictionary"])
    dictionary = Dictionary.from_config(config)
    weights = Path(path) / WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"{path} has a {CONFIG} but no {WEIGHTS}")
    with safe_open(weights, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    wanted = {k: list(v.shape) for k, v in dictionary.state_dict().items()}
    found = {k: list(v.shape) for k, v in tensors.items()}
    if wanted != found:
        differing = [
            f"{k}: expected {wanted.get(k, 'nothing')}, found {found.get(k, 'nothing')}"
            for k in sorted(wanted.keys() | found.keys())
            if wanted.get(k) != found.get(k)
        ]
        raise _format_error(f"{weights} does not fit its {CONFIG}: {'; '.join(differing)}")
    dictionary.load_state_dict(tensors)
    return dictionary.to(device)


def describe(path: str | Path) -> dict[str, Any]:
    """Return the content of ``config.json`` after checking its format and version."""
    file = Path(path) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"no dictionary at {path}: {CONFIG} is missing")
    try:
        config: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise _format_error(f"{file} is not JSON: {error}") from error
    if config.get("format") != FORMAT:
        raise _format_error(
            f"{file} is not of the native format (its 'format' is {config.get('format')!r}, "
            f"expected {FORMAT!r})"
        )
    if config.get("version", 0) > VERSION:
        raise _format_error(
            f"{file} has version {config['version']}; this release reads up to {VERSION}. "
            "Upgrade: pip install -U actstore"
        )
    return config


def _publish(temporary: Path, final: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(final)


def _format_error(message: str) -> ValueError:
    from actstore.manifest import FormatError

    return FormatError(message)
