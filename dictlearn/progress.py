"""What a training run reports while it goes, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dictlearn.dictionary import Dictionary


@dataclass(frozen=True, kw_only=True)
class TrainEvent:
    """What a run reports while it goes."""

    kind: str
    """``start``, ``resume``, ``log``, ``checkpoint``, ``failed``, ``stopped`` or ``finished``."""
    step: int
    """Steps taken so far."""
    steps: int
    """Steps of the run."""
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Latest metrics by dictionary: loss terms, fvu, l0, dead, lr, grad_norm."""
    tokens_per_second: float = 0.0
    """Since the last event of kind ``log``."""
    data_wait: float = 0.0
    """Share of that time spent waiting for the store."""
    message: str = ""
    """What failed, or where the run resumed."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One dictionary of a finished run."""

    name: str
    """Its name: the folder in `out`, the rows of the log."""
    dictionary: Dictionary
    """In raw units: it takes activations as they are stored."""
    metrics: Mapping[str, float]
    """Of the last step that was logged."""
    path: Path | None = None
    """Where it was saved."""
    failed: str = ""
    """Why it stopped early, if it did; the weights are those of the last good step."""
