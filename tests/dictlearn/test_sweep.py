"""A sweep: one pass, every combination, the same results as single runs, a table."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from actstore.store import Store
from dictlearn import evaluation
from dictlearn.config import BatchTopK, JumpReLU, Matryoshka, ReLU, TopK
from dictlearn.formats import load
from dictlearn.progress import TrainEvent
from dictlearn.schedule import TrainConfig
from dictlearn.sweep import Candidate, grid, sweep
from dictlearn.trainer import train

A, B = {"blocks.0.resid_post": 16}, {"blocks.1.resid_post": 24}
CONFIG = TrainConfig(steps=40, batch_size=64, holdout=0.2, lr=5e-3, checkpoint_every=20)


def test_a_sweep_equals_single_runs(store: Store, tmp_path: Path) -> None:
    candidates = [
        *grid([(A, None), (A, B)], [TopK(2), TopK(4), ReLU()], expansions=(2,), seeds=(0, 1)),
        Candidate(reads=A | B, latents=40, sparsify=BatchTopK(3), lr=1e-2),
    ]
    assert len(candidates) == 13
    table = sweep(store, candidates, CONFIG, out=tmp_path)
    assert table.num_rows == 13
    assert set(table["failed"].to_pylist()) == {""}
    assert pq.read_table(tmp_path / "results.parquet").equals(table)
    text = (tmp_path / "results.md").read_text()
    assert text.count("\n") == 15
    assert (tmp_path / "pareto.png").stat().st_size > 1000
    for i in (0, 3, 7):
        single = candidates[i].build()
        train(store, single, CONFIG)
        found = load(tmp_path / candidates[i].name)
        for name, value in single.state_dict().items():
            assert torch.equal(found.state_dict()[name], value)
    fvu = dict(zip(table["name"].to_pylist(), table["fvu"].to_pylist(), strict=True))
    assert fvu[candidates[2].name] < fvu[candidates[0].name]  # k 4 against k 2


def test_one_that_fails_leaves_the_others(store: Store, tmp_path: Path) -> None:
    candidates = grid([(A, None)], [TopK(2)], expansions=(2,), lrs=(5e-3, 1e30))
    config = TrainConfig(steps=20, batch_size=64, checkpoint_every=10, warmup=0)
    table = sweep(store, candidates, config, out=tmp_path)
    good, bad = table.to_pylist()
    assert not good["failed"]
    assert good["fvu"] < 1
    assert "Lower the learning rate" in bad["failed"]
    assert bad["fvu"] is None


def test_threads_give_what_single_runs_give(store: Store, tmp_path: Path) -> None:
    candidates = grid([(A, None)], [TopK(2), BatchTopK(3)], expansions=(2,), seeds=(0, 1))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sweep(store, candidates, CONFIG, out=tmp_path, workers=2)
        torch.set_num_threads(1)
        assert json.loads((tmp_path / "run.json").read_text())["threads"] == 1
        for candidate in candidates:
            single = candidate.build()
            train(store, single, CONFIG)
            found = load(tmp_path / candidate.name).state_dict()
            assert all(torch.equal(found[k], v) for k, v in single.state_dict().items())
    finally:
        torch.set_num_threads(before)


def test_resumed_after_a_kill_while_training_and_while_evaluating(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates = grid([(A, None)], [TopK(2), TopK(4)], expansions=(2,))
    whole = sweep(store, candidates, CONFIG, out=tmp_path / "whole")

    class Killed(BaseException):
        pass

    def kill(event: TrainEvent) -> None:
        if event.kind == "checkpoint":
            raise Killed

    out = tmp_path / "again"
    with pytest.raises(Killed):
        sweep(store, candidates, CONFIG, out=out, on_event=kill)
    assert not (out / "results.md").exists()
    calls: list[str] = []
    real = evaluation.evaluate

    def evaluate(*args: Any, **options: Any) -> Any:
        if len(calls) == 1:
            calls.append("killed")
            raise Killed
        calls.append("done")
        return real(*args, **options)

    monkeypatch.setattr("dictlearn.sweep.evaluate", evaluate)
    with pytest.raises(Killed):
        sweep(store, candidates, CONFIG, out=out)
    assert sweep(store, candidates, CONFIG, out=out).equals(whole)
    assert calls == ["done", "killed", "done"]  # the first was not evaluated again
    assert sweep(store, candidates, CONFIG, out=out, limit=100).num_rows == 2
    assert len(calls) == 5  # what was asked of the evaluation changed


def test_names_tell_settings_apart() -> None:
    jump = Candidate(reads=A, latents=32, sparsify=JumpReLU(bandwidth=0.2))
    nested = Candidate(
        reads=A, latents=32, sparsify=TopK(2), matryoshka=Matryoshka(prefixes=(4, 8))
    )
    assert jump.name == "blocks.0.resid_post-JumpReLU-l00.001-bandwidth0.2-F32-s0"
    assert nested.name == "blocks.0.resid_post-TopK-k2-F32-matryoshka4.8-s0"
    assert Candidate(reads=A, latents=32, sparsify=ReLU(l1=0)).name.split("-")[2] == "l10"


def test_candidates_must_differ(store: Store, tmp_path: Path) -> None:
    candidates = grid([(A, None), (A, None)], [TopK(2)])
    with pytest.raises(ValueError, match=r"these are there twice: \['blocks.0.resid_post-TopK-k2"):
        sweep(store, candidates, CONFIG, out=tmp_path)
