"""Data parallel training with gloo: 2 and 4 processes equal one on the same global batches."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import actstore
from actstore.store import Store
from dictlearn.config import BatchTopK, JumpReLU, Matryoshka, ReLU, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.formats import load
from dictlearn.runlog import read_log
from dictlearn.schedule import TrainConfig
from dictlearn.trainer import train

SITE = {"blocks.0.resid_post": 16}
CONFIG = TrainConfig(
    steps=12,
    batch_size=64,
    streams=4,
    lr=5e-3,
    log_every=6,
    checkpoint_every=6,
    target_l0=5.0,
    dead_after=200,
    resample_every=5,
    holdout=0.2,
    validate_every=6,
    validation_batches=1,
)


def dictionaries() -> list[Dictionary]:
    kinds = [TopK(4), BatchTopK(4), ReLU(l1=0.01), JumpReLU(l0=0.01)]
    out = [Dictionary(SITE, latents=48, sparsify=kind) for kind in kinds]
    nested = Matryoshka(prefixes=(16,), sampled=1)
    return [*out, Dictionary(SITE, latents=48, sparsify=TopK(4), matryoshka=nested)]


def work(rank: int, url: str, out: str) -> None:
    """Train with 4 processes, then with the first 2 of them."""
    torch.set_num_threads(1)
    for world in (4, 2):
        if rank < world:
            init = f"file://{out}/rendezvous-{world}"
            dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world)
            train(actstore.open(url), dictionaries(), CONFIG, out=f"{out}/{world}")
            dist.destroy_process_group()


def close(a: Path, b: Path) -> None:
    names = sorted(p.parent.name for p in a.glob("*/config.json"))
    assert len(names) == 5
    for name in names:
        one, other = load(a / name).state_dict(), load(b / name).state_dict()
        for key, value in one.items():
            torch.testing.assert_close(other[key], value, atol=2e-4, rtol=2e-3, msg=f"{name} {key}")
    for one_row, other_row in zip(
        read_log(a / "log.jsonl"), read_log(b / "log.jsonl"), strict=True
    ):
        assert one_row["step"] == other_row["step"]
        for key in ("mse", "fvu", "l0", "grad_norm"):
            assert other_row[key] == pytest.approx(one_row[key], rel=5e-3, abs=1e-4), key


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_ranks_equal_one_process(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dictlearn.trainer", "dictlearn.commands", "actstore.store"])
    arguments = (store.url, str(tmp_path))
    processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(4)]
    for process in processes:
        process.start()
    train(store, dictionaries(), CONFIG, out=tmp_path / "1")
    for process in processes:
        process.join(200)
        assert process.exitcode == 0
    close(tmp_path / "1", tmp_path / "2")
    close(tmp_path / "1", tmp_path / "4")


def test_ranks_that_do_not_divide_the_streams(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dictlearn.distributed import Ranks

    monkeypatch.setattr(Ranks, "current", classmethod(lambda cls: cls(rank=0, world=3)))
    with pytest.raises(ValueError, match=r"4 streams cannot be shared by 3 ranks"):
        train(store, dictionaries()[0], CONFIG)
