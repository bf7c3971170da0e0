"""Absorption built on purpose, and its absence."""

from pathlib import Path

import numpy as np
import pytest
import torch

import actstore
from actstore.selection import Split
from actstore.store import Store
from dictlearn.absorption import absorption
from dictlearn.config import Input, ReLU
from dictlearn.dictionary import Dictionary
from dictlearn.heads import features

A = "blocks.0.resid_post"
PARENT, CHILD, OTHER = 0, 1, 2


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, np.ndarray]:
    """Class 1 items hold the parent's direction, few of them the child's too; class 0 another."""
    rng = np.random.default_rng(0)
    label = np.arange(600) % 2
    child = np.arange(600) % 50 == 1
    x = np.zeros((600, 1, 16), np.float32)
    x[:, 0, PARENT] = label
    x[:, 0, CHILD] = child
    x[:, 0, OTHER] = 1 - label
    x[:, 0, 3:] = 0.02 * rng.normal(size=(600, 13))
    store = actstore.write_arrays(
        tmp_path_factory.mktemp("labelled") / "acts.zarr",
        {A: {"cls": x}},
        items_per_part=100,
        table={"label": label},
    )
    return store, child


def sae(absorbing: bool) -> Dictionary:
    """Both reconstruct everything: parent, child and other each by one latent.

    The absorbing one has a parent that is silent where the child is, and a child that writes both.
    """
    d = Dictionary({A: 16}, latents=3, sparsify=ReLU(), input=Input(center="none"))
    with torch.no_grad():
        d.W_enc.zero_()
        d.W_dec.zero_()
        for latent in (PARENT, CHILD, OTHER):
            d.W_enc[latent, latent] = d.W_dec[latent, latent] = 1.0
        d.b_enc.fill_(-0.2)
        if absorbing:
            d.W_enc[CHILD, PARENT] = -1.0
            d.W_dec[CHILD, PARENT] = 1.0
    return d


def test_a_child_that_speaks_for_its_parent_is_found(labelled: tuple[Store, np.ndarray]) -> None:
    store, child = labelled
    found = absorption(store, sae(absorbing=True))
    position = features(store, A, "cls", Split(half="validation", holdout=0.5))[1]
    examined = store.table()["source"].to_numpy()[position]
    one = found.classes.to_pylist()[1]
    assert found.probe_accuracy == 1
    assert one["main"] == [PARENT]
    assert one["absorber"] == CHILD
    assert one["missed"] == one["absorbed"] == int(child[examined].sum()) > 2
    assert one["positives"] == int((examined % 2).sum())
    zero = found.classes.to_pylist()[0]
    assert (zero["main"], zero["missed"], zero["absorbed"]) == ([OTHER], 0, 0)
    assert zero["absorber"] is None
    assert found.rate == found.missed == pytest.approx(one["absorbed"] / len(examined))


def test_a_parent_that_always_fires_is_not_absorbed(
    labelled: tuple[Store, np.ndarray], tmp_path: Path
) -> None:
    found = absorption(labelled[0], sae(absorbing=False))
    assert found.rate == 0
    assert found.missed == 0
    import pyarrow.parquet as pq

    assert pq.read_table(found.save(tmp_path / "a.parquet")).equals(found.classes)


def test_missed_without_a_latent_that_speaks_is_not_absorbed(
    labelled: tuple[Store, np.ndarray],
) -> None:
    d = sae(absorbing=True)
    with torch.no_grad():
        d.W_dec[CHILD, PARENT] = 0.0  # the child no longer writes the parent's direction
        d.W_dec[CHILD, CHILD] = -1.0  # and nothing that the probe could have learned from it
    one = absorption(labelled[0], d).classes.to_pylist()[1]
    assert one["missed"] > 0
    assert one["absorbed"] == 0


def test_what_has_no_absorption(store: Store, labelled: tuple[Store, np.ndarray]) -> None:
    b = "blocks.1.resid_post"
    with pytest.raises(ValueError, match="reads and writes one site"):
        absorption(store, Dictionary({A: 16}, {b: 24}, latents=8, sparsify=ReLU()))
    with pytest.raises(ValueError, match="has 8 channels"):
        absorption(labelled[0], Dictionary({A: 8}, latents=8, sparsify=ReLU()))
