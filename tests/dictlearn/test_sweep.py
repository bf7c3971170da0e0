"""A sweep: one pass, every combination, the same results as single runs, a table."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from actstore.store import Store
from dictlearn.config import BatchTopK, ReLU, TopK
from dictlearn.formats import load
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


def test_candidates_must_differ(store: Store, tmp_path: Path) -> None:
    candidates = grid([(A, None), (A, None)], [TopK(2)])
    with pytest.raises(ValueError, match=r"these are there twice: \['blocks.0.resid_post-TopK-k2"):
        sweep(store, candidates, CONFIG, out=tmp_path)
