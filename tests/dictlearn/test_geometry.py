"""Directions of latents on dictionaries whose answer is known."""

import numpy as np
import pytest
import torch

from dictlearn.config import TopK
from dictlearn.dictionary import Dictionary
from dictlearn.geometry import decoder_cosines, match

SITE = {"a": 24}


def made(latents: int = 64, seed: int = 0, width: int = 24) -> Dictionary:
    return Dictionary({"a": width}, latents=latents, sparsify=TopK(4), seed=seed)


def permuted(d: Dictionary, seed: int = 1) -> tuple[Dictionary, np.ndarray]:
    """Return a dictionary whose latent i is latent order[i] of `d`."""
    order = np.random.default_rng(seed).permutation(d.latents)
    other = Dictionary.from_config(d.config, seed=9)
    with torch.no_grad():
        other.W_dec.copy_(d.W_dec[order])
        other.W_enc.copy_(d.W_enc[:, order])
    return other, order


@pytest.mark.parametrize("exact", [True, False])
def test_a_permutation_has_stability_one(exact: bool) -> None:
    d = made()
    other, order = permuted(d)
    found = match(d, other, exact=exact)
    assert found.exact is exact
    assert found.stability == pytest.approx(1, abs=1e-6)
    assert found.shared == 1
    assert np.array_equal(order[found.second_N], found.first_N)
    assert found.table().num_rows == 64


def test_independent_dictionaries_share_nothing_and_half_share_half() -> None:
    wide = [made(width=256, seed=s) for s in (0, 1)]
    found = match(*wide)
    assert found.shared == 0
    assert 0 < found.stability < 0.35
    mixed, order = permuted(wide[0])
    with torch.no_grad():
        mixed.W_dec[:32], mixed.W_enc[:, :32] = wide[1].W_dec[:32], wide[1].W_enc[:, :32]
    half = match(wide[0], mixed)
    assert half.shared == pytest.approx(0.5)
    pairs = dict(zip(half.first_N.tolist(), half.second_N.tolist(), strict=True))
    assert all(pairs[int(order[i])] == i for i in range(32, 64))


def test_sparse_matching_equals_the_exact_one_where_pairs_are_clear() -> None:
    d, noise = made(latents=200), torch.Generator().manual_seed(3)
    other, _ = permuted(d)
    with torch.no_grad():
        other.W_dec += 0.1 * torch.randn(200, 24, generator=noise)
    a, b = match(d, other, exact=True), match(d, other, exact=False)
    assert np.array_equal(a.first_N, b.first_N)
    assert np.array_equal(a.second_N, b.second_N)
    assert a.stability == pytest.approx(b.stability)
    assert 0.5 < a.stability < 0.99


def test_dead_latents_can_be_left_out() -> None:
    d = made()
    other, order = permuted(d)
    dead = np.arange(64) < 16
    with torch.no_grad():
        other.W_dec[dead[order]] = made(seed=5).W_dec[dead[order]]
    assert match(d, other).stability < 0.95
    found = match(d, other, alive_F=~dead, alive_G=~dead[order])
    assert found.candidates == 48
    assert found.stability == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="mask of living latents has 3 entries, not 64"):
        match(d, other, alive_F=np.ones(3, bool))


def test_other_sites_cannot_be_matched() -> None:
    with pytest.raises(ValueError, match=r"same sites and widths.*'a': 24.*'a': 16"):
        match(made(), made(width=16))


def test_decoder_cosines_find_planted_duplicates() -> None:
    d = made(width=128)
    with torch.no_grad():
        d.W_dec[7] = 3 * d.W_dec[40]  # length does not matter
        d.W_dec[50] = -d.W_dec[12]  # an opposite direction is no duplicate
    found = decoder_cosines(d)
    assert found.duplicates.tolist() == [[7, 40]]
    assert found.largest_F[7] == pytest.approx(1, abs=1e-6)
    assert (found.nearest_F[7], found.nearest_F[40]) == (40, 7)
    assert sum(found.histogram) == 64
    assert found.histogram[-1] == 2
    assert found.table()["cosine"].to_numpy()[12] < 0.6
    plain = (
        torch.nn.functional.normalize(d.W_dec, dim=1)
        @ torch.nn.functional.normalize(d.W_dec, dim=1).T
    )
    plain.fill_diagonal_(-1)
    assert np.allclose(found.largest_F, plain.max(1).values.detach().numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="two latents at least"):
        decoder_cosines(Dictionary(SITE, latents=1, sparsify=TopK(1)))
