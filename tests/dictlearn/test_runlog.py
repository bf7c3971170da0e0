"""Where the rows of a run go: trackers are imported when asked for, and see every step once."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from actstore.store import Store
from dictlearn.config import TopK
from dictlearn.dictionary import Dictionary
from dictlearn.runlog import TRACKERS, RunLog, read_log
from dictlearn.schedule import TrainConfig
from dictlearn.trainer import train

SITE = {"blocks.0.resid_post": 16}


class Fake(types.ModuleType):
    """Stands for wandb or trackio: ``init`` gives a run with ``log`` and ``finish``."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.runs: list[dict[str, Any]] = []

    def init(self, **options: Any) -> Any:
        run: dict[str, Any] = {"options": options, "rows": [], "finished": 0}
        self.runs.append(run)

        def log(row: dict[str, float], step: int) -> None:
            run["rows"].append((step, dict(row)))

        def finish() -> None:
            run["finished"] += 1

        return types.SimpleNamespace(log=log, finish=finish)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_gets_what_the_log_has(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fake = Fake(name)
    monkeypatch.setitem(sys.modules, name, fake)
    d = [Dictionary(SITE, latents=32, sparsify=TopK(2), seed=s) for s in (0, 1)]
    config = TrainConfig(steps=6, batch_size=64, log_every=2)
    train(store, d, config, out=tmp_path / "run", names=["a", "b"], log_to=[name])
    (run,) = fake.runs
    assert run["finished"] == 1
    assert run["options"]["name"] == "run"
    assert run["options"]["config"]["train"][0]["steps"] == 6
    assert ("id" in run["options"]) == (name == "wandb")
    rows = read_log(tmp_path / "run" / "log.jsonl")
    expected = {
        step: {
            (f"{k}/{row['name']}" if row["name"] else k): v
            for row in rows
            if row["step"] == step
            for k, v in row.items()
            if k not in ("step", "name")
        }
        for step in (2, 4, 6)
    }
    assert run["rows"] == list(expected.items())


def test_trackers_are_not_imported_unless_asked_for(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in TRACKERS:
        monkeypatch.setitem(sys.modules, name, None)  # importing it now fails
    d = Dictionary(SITE, latents=32, sparsify=TopK(2))
    config = TrainConfig(steps=2, batch_size=64)
    train(store, d, config, out=tmp_path / "run")
    with pytest.raises(ValueError, match=r"needs wandb, .*pip install 'actstore\[wandb\]'"):
        train(store, d, config, out=tmp_path / "other", log_to=["wandb"])
    with pytest.raises(ValueError, match=r"'wanb' is not one of wandb, trackio; nearest: wandb"):
        train(store, d, config, out=tmp_path / "other", log_to=["wanb"])
    monkeypatch.setitem(sys.modules, "wandb", Fake("wandb"))
    with pytest.raises(ValueError, match="needs out"):
        train(store, d, config, log_to=["wandb"])


def test_rows_after_the_step_of_a_resume_are_written_again(tmp_path: Path) -> None:
    with RunLog(tmp_path) as first:
        for step in (1, 2, 3):
            first.row(step, "a", {"fvu": float(step)})
    with RunLog(tmp_path, 2) as second:
        second.row(3, "a", {"fvu": 30.0})
    assert [(r["step"], r["fvu"]) for r in read_log(tmp_path / "log.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
