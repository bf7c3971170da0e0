"""Checkpoints of a training run: a folder of safetensors and JSON that appears all at once.

``checkpoints/<step, 9 digits>/`` holds ``learner-<i>.safetensors`` (weights, Adam, counters,
generator of dictionary i) and ``state.json`` (global batch number, loader state, failures). It is
written beside its name, synced and renamed, so a process killed at any instant leaves complete
checkpoints only. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from dictlearn.learner import Learner

_STATE = "state.json"


def write(
    folder: Path,
    number: int,
    learners: Sequence[Learner],
    state: dict[str, Any],
    tensors: Sequence[Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write the checkpoint after `number` steps into ``folder/checkpoints``.

    `tensors` are the states of the learners, where these had to be gathered.
    """
    states = [learner.state() for learner in learners] if tensors is None else tensors
    root = folder / "checkpoints"
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f".writing-{os.getpid()}"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    for i, found in enumerate(states):
        saved = {k: v.detach().cpu().contiguous() for k, v in found.items()}
        save_file(saved, temporary / f"learner-{i}.safetensors")
    failed = {learner.name: learner.failed for learner in learners if learner.failed}
    stopped = {learner.name: learner.stopped for learner in learners if learner.stopped}
    record = {**state, "step": number, "failed": failed, "stopped": stopped}
    (temporary / _STATE).write_text(json.dumps(record))
    for file in temporary.iterdir():
        _sync(file)
    _sync(temporary)
    final = root / f"{number:09d}"
    if final.exists():  # written before a resume from an older checkpoint
        shutil.rmtree(final)
    temporary.replace(final)
    _sync(root)
    return final


def latest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    found = [p for p in _all(folder) if (p / _STATE).is_file()]
    return found[-1] if found else None


def read(path: Path, learners: Sequence[Learner]) -> dict[str, Any]:
    """Load every learner from a checkpoint and return its state."""
    state: dict[str, Any] = json.loads((path / _STATE).read_text())
    for i, learner in enumerate(learners):
        learner.load_state(load_file(path / f"learner-{i}.safetensors"))
        learner.failed = state["failed"].get(learner.name, "")
        learner.stopped = state["stopped"].get(learner.name, "")
    return state


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what a killed writer left."""
    for path in _all(folder)[:-keep]:
        shutil.rmtree(path)
    for path in (folder / "checkpoints").glob(".writing-*"):
        shutil.rmtree(path)


def _all(folder: Path) -> list[Path]:
    return sorted(p for p in (folder / "checkpoints").glob("[0-9]*") if p.name.isdigit())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
