"""Dictionaries over stores in int8 that keep some patches of each item."""

from pathlib import Path

import numpy as np
import pytest
import torch

import actstore
import vitmodels
from dictlearn.analysis import sparsity
from dictlearn.config import TopK
from dictlearn.dictionary import Dictionary
from dictlearn.evaluation import evaluate

SITE = "blocks.0.resid_post"


def test_a_report_goes_by_the_true_positions(tmp_path: Path) -> None:
    model = vitmodels.load("toy/digits-1l", pretrained=False, seed=0)
    store = actstore.harvest(
        model=model, data="digits", sites=SITE, out=tmp_path / "a", limit=120,
        dtype="int8", tokens_per_item=5, batch_size=32,
    )  # fmt: skip
    patch = store.spec(SITE, "patch")
    assert (patch.tokens, patch.span) == (5, 25)
    sae = Dictionary({SITE: patch.channels}, latents=32, sparsify=TopK(3), seed=1)
    report = evaluate(sae, store, tokens="cls,patch", batch_size=100)
    assert report.tokens == 120 * 6
    values = store.items(range(120), SITE, "patch")
    token = store.tokens(range(120), SITE, "patch")
    with torch.no_grad():
        active = (sae.encode(torch.from_numpy(values).flatten(0, 1)) != 0).numpy()
    l0 = active.sum(axis=1).reshape(120, 5)
    assert sorted(report.l0_by_position) == [0, *sorted(set(token.ravel().tolist()))]
    for position in np.unique(token).tolist():
        truth = l0[token == position].mean()
        assert report.l0_by_position[position] == pytest.approx(truth, abs=0.05)
    with pytest.raises(ValueError, match=r"keeps 5 of 25 patch tokens of each item: places of"):
        sparsity(store, sae)
    assert sparsity(store, sae, tokens="cls", scheduler="sync").tokens.tolist() == [120]
