"""Dictionaries on disk: the native format, those of other libraries, and published weights.

Names are loaded on first use: listing published weights needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = [
    "convert",
    "detect",
    "formats",
    "list_pretrained",
    "load",
    "load_pretrained",
    "push_to_hub",
    "save",
]

_WHERE = {
    "convert": "dictlearn.formats.registry",
    "detect": "dictlearn.formats.registry",
    "formats": "dictlearn.formats.registry",
    "list_pretrained": "dictlearn.formats.pretrained",
    "load": "dictlearn.formats.registry",
    "load_pretrained": "dictlearn.formats.hub",
    "push_to_hub": "dictlearn.formats.hub",
    "save": "dictlearn.formats.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__dir__()}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_WHERE)
