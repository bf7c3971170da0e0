"""Data parallel training with gloo: 2 and 4 processes equal one on the same global batches."""

from pathlib import Path

import pytest
from gloo import beside, in_worlds, needs_gloo, same_weights

import actstore
from actstore.store import Store
from dictlearn.config import BatchTopK, JumpReLU, Matryoshka, ReLU, TopK
from dictlearn.dictionary import Dictionary
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
    in_worlds(
        rank,
        out,
        lambda world: train(actstore.open(url), dictionaries(), CONFIG, out=f"{out}/{world}"),
    )


def close(a: Path, b: Path) -> None:
    for one, other in zip(*same_weights(a, b, 5), strict=True):
        assert one["step"] == other["step"]
        for key in ("mse", "fvu", "l0", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=5e-3, abs=1e-4), key


@needs_gloo
def test_ranks_equal_one_process(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone() -> None:
        train(store, dictionaries(), CONFIG, out=tmp_path / "1")

    beside(work, (store.url, str(tmp_path)), alone, monkeypatch)
    close(tmp_path / "1", tmp_path / "2")
    close(tmp_path / "1", tmp_path / "4")


def test_ranks_that_do_not_divide_the_streams(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dictlearn.distributed import Ranks

    monkeypatch.setattr(Ranks, "current", classmethod(lambda cls: cls(rank=0, world=3)))
    with pytest.raises(ValueError, match=r"4 streams cannot be shared by 3 ranks"):
        train(store, dictionaries()[0], CONFIG)
