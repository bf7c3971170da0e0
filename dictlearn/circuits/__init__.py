"""Look inside of a model: patching, ablation, steering, lenses, attribution, attention, circuits.

Results are xarray objects with dimensions such as layer, head and position. Names are loaded on
first use, so that ``import dictlearn.circuits`` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["activation_patching"]

_WHERE = {
    "activation_patching": "dictlearn.circuits.patching",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(
            f"module 'dictlearn.circuits' has no attribute {name!r}; it has {__dir__()}"
        )
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_WHERE)
