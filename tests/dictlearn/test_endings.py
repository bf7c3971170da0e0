"""The threshold of BatchTopK fits the final weights, however short the run."""

from pathlib import Path

import pytest
import torch

from actstore.loader import TokenLoader
from actstore.store import Store
from dictlearn.config import BatchTopK, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.schedule import TrainConfig
from dictlearn.trainer import train

SITE = {"blocks.0.resid_post": 16}


def l0(dictionary: Dictionary, store: Store) -> float:
    loader = TokenLoader(store, list(SITE), 540, epochs=1)
    (batch,) = list(loader)
    return float((dictionary.encode(batch.acts) > 0).sum(1).float().mean())


def trained(store: Store, out: Path | None = None, **options: object) -> Dictionary:
    d = Dictionary(SITE, latents=48, sparsify=BatchTopK(4), latent_norm=bool(options.pop("ln", 0)))
    config = TrainConfig(steps=12, batch_size=64, lr=2e-2, checkpoint_every=5, **options)  # type: ignore[arg-type]
    train(store, d, config, out=out)
    return d


@pytest.mark.parametrize("options", [{}, {"ema": 0.8}, {"ln": 1}])
def test_l0_at_inference_is_k_after_a_short_run(store: Store, options: dict[str, float]) -> None:
    assert l0(trained(store, **options), store) == pytest.approx(4.0, rel=0.06)
    lagging = l0(trained(store, **options, threshold_batches=0), store)
    assert abs(lagging - 4.0) > 0.4  # what a running mean over the training gives


def test_a_resumed_run_finds_the_same_threshold(store: Store, tmp_path: Path) -> None:
    first = trained(store, tmp_path / "run")
    again = trained(store, tmp_path / "run")
    alone = trained(store)
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
        assert torch.equal(alone.state_dict()[name], value)


def test_batches_of_the_threshold_must_agree(store: Store) -> None:
    both = [Dictionary(SITE, latents=32, sparsify=s) for s in (TopK(2), BatchTopK(2))]
    configs = [TrainConfig(steps=2, batch_size=64, threshold_batches=n) for n in (1, 2)]
    with pytest.raises(ValueError, match="threshold_batches must agree"):
        train(store, both, configs)
