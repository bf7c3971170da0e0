"""Sparse autoencoders, transcoders and crosscoders trained off activation stores.

Names are loaded on first use, so that ``import dictlearn`` and ``dictlearn.config`` need no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["Dictionary", "ReLU", "TopK", "TrainConfig", "evaluate", "load", "sparsity", "train"]

_WHERE = {
    "BatchTopK": "dictlearn.config",
    "Dictionary": "dictlearn.dictionary",
    "Gated": "dictlearn.config",
    "Input": "dictlearn.config",
    "JumpReLU": "dictlearn.config",
    "Matryoshka": "dictlearn.config",
    "ReLU": "dictlearn.config",
    "TopK": "dictlearn.config",
    "TrainConfig": "dictlearn.schedule",
    "evaluate": "dictlearn.evaluation",
    "load": "dictlearn.formats",
    "save": "dictlearn.formats",
    "sparsity": "dictlearn.analysis",
    "train": "dictlearn.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'dictlearn' has no attribute {name!r}; it has {__dir__()}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(_WHERE)
