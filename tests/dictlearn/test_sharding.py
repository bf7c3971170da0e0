"""Latents divided over 2 and 4 processes equal one process; checkpoints go on anywhere."""

import shutil
from pathlib import Path

import pytest
import torch
from gloo import beside, in_worlds, needs_gloo, same_weights

import actstore
from actstore.store import Store
from dictlearn.config import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.distributed import Ranks
from dictlearn.schedule import TrainConfig
from dictlearn.sharding import latent_axis, shards_of
from dictlearn.trainer import train

A, B = {"blocks.0.resid_post": 16}, {"blocks.1.resid_post": 24}
CONFIG = TrainConfig(
    steps=6,
    batch_size=64,
    lr=5e-3,
    log_every=1,
    checkpoint_every=3,
    keep=2,
    target_l0=5.0,
    dead_after=60,
    aux_k=6,
    clip=0.05,
    ema=0.5,
    threshold_batches=2,
    shard_latents=True,
    gemm="default",
)


def dictionaries() -> list[Dictionary]:
    kinds = [TopK(4), BatchTopK(4), JumpReLU(l0=0.01, penalty="tanh"), Gated(l1=0.01)]
    nested = Matryoshka(prefixes=(10, 30), sampled=1)
    return [
        *(Dictionary(A, latents=48, sparsify=kind) for kind in kinds),
        Dictionary(A, latents=48, sparsify=TopK(4), matryoshka=nested),
        Dictionary(A, B, latents=48, sparsify=ReLU(l1=0.01), skip=True),
    ]


def work(rank: int, url: str, out: str) -> None:
    def run(world: int) -> None:
        done = train(actstore.open(url), dictionaries(), CONFIG, out=f"{out}/{world}")
        assert all(one.dictionary.latents == 48 for one in done)

    in_worlds(rank, out, run)


def close(a: Path, b: Path) -> None:
    rows, others = same_weights(a, b, 6)
    assert any(row.get("aux", 0) > 0 for row in rows)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for key in set(row) - {"name"}:
            assert other[key] == pytest.approx(row[key], rel=5e-3, abs=1e-4), (row["name"], key)


@needs_gloo
def test_divided_latents_equal_one_process(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone() -> None:
        train(store, dictionaries(), CONFIG, out=tmp_path / "1")

    beside(work, (store.url, str(tmp_path)), alone, monkeypatch)
    close(tmp_path / "1", tmp_path / "2")
    close(tmp_path / "1", tmp_path / "4")
    shutil.rmtree(tmp_path / "4" / "checkpoints" / "000000006")
    train(store, dictionaries(), CONFIG, out=tmp_path / "4")  # from step 3, in one process
    close(tmp_path / "1", tmp_path / "4")


def test_a_share_of_every_tensor() -> None:
    d = Dictionary(A, B, latents=12, sparsify=Gated(), skip=True)
    assert {n for n, v in d.state_dict().items() if latent_axis(n, v) is None} == {
        "b_dec",
        "b_in",
        "W_skip",
    }
    shares = [shards_of(d.config, "a", rank, 3) for rank in range(3)]
    cut = [s.cut(d) for s in shares]
    assert [c.latents for c in cut] == [4, 4, 4]
    assert torch.equal(torch.cat([c.W_enc for c in cut], 1), d.W_enc)
    assert torch.equal(torch.cat([c.W_dec for c in cut]), d.W_dec)
    moments = {"adam.W_enc.exp_avg": torch.arange(24.0).view(12, 2), "adam.b_dec.step": d.b_dec[0]}
    assert shares[1].share(moments)["adam.W_enc.exp_avg"].tolist()[0] == [8.0, 9.0]


@pytest.mark.parametrize(
    ("dictionary", "message"),
    [
        (Dictionary(A, latents=49, sparsify=TopK(4)), "49 latents .* 2 ranks; make them 50"),
        (Dictionary(A, latents=48, sparsify=TopK(40)), "k = 40 is more than the 24 latents"),
        (Dictionary(A, latents=48, sparsify=TopK(4), latent_norm=True), "has no sparse step"),
        (Dictionary(A, latents=48, sparsify=TopK(4, group_max=True)), "group_max"),
    ],
)
def test_what_cannot_be_divided(
    store: Store, monkeypatch: pytest.MonkeyPatch, dictionary: Dictionary, message: str
) -> None:
    monkeypatch.setattr(Ranks, "current", classmethod(lambda cls: cls(rank=0, world=2)))
    monkeypatch.setattr(Ranks, "same", lambda self, value: value)
    with pytest.raises(ValueError, match=message):
        train(store, dictionary, CONFIG)


def test_options_that_need_every_latent_on_one_rank() -> None:
    with pytest.raises(ValueError, match="shard_latents excludes resample_every"):
        TrainConfig(shard_latents=True, resample_every=5)
    with pytest.raises(ValueError, match="shard_latents excludes init_decoder"):
        TrainConfig(shard_latents=True, init_decoder="points")
