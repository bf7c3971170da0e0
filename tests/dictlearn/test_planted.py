"""Every kind, and every wiring, finds the atoms that made the data.

32 channels, 48 unit atoms (half again as many as channels), 3 active a token on average, weights in
[0.5, 1.5], noise 0.02: after Sharkey et al. 2022 ("Taking features out of superposition").
Dictionaries have twice as many latents as there are atoms.
"""

import functools
from typing import Any

import pytest
import torch

from dictlearn.config import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, Sparsify, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.learner import Learner
from dictlearn.schedule import TrainConfig
from dictlearn.starts import _start

WIDTH, ATOMS, ACTIVE, BATCH = 32, 48, 3, 256


@functools.cache
def atoms(site: str = "a") -> torch.Tensor:
    """Directions of the atoms at a site."""
    generator = torch.Generator().manual_seed(77 + "abc".index(site))
    return torch.nn.functional.normalize(torch.randn(ATOMS, WIDTH, generator=generator), dim=1)


@functools.cache
def codes(number: int) -> torch.Tensor:
    """Which atoms are active in a batch, and how much: the same at every site."""
    generator = torch.Generator().manual_seed(1000 + number)
    keep = torch.rand(BATCH, ATOMS, generator=generator) < ACTIVE / ATOMS
    return keep * (0.5 + torch.rand(BATCH, ATOMS, generator=generator))


@functools.cache
def batch(number: int, sites: str = "a") -> torch.Tensor:
    """Activations of some sites, side by side, of about unit variance a channel."""
    generator = torch.Generator().manual_seed(5000 + number)
    clean = torch.cat([codes(number) @ atoms(site) for site in sites], dim=1)
    return 3.3 * (clean + 0.02 * torch.randn(clean.shape, generator=generator))


def recovered(d: Dictionary, sites: str = "a") -> float:
    """Share of the atoms that some decoder row has a cosine above 0.95 with."""
    true = torch.nn.functional.normalize(torch.cat([atoms(s) for s in sites], dim=1), dim=1)
    cosine = torch.nn.functional.normalize(d.W_dec.detach(), dim=1) @ true.T
    return float((cosine.amax(0) > 0.95).float().mean())


def trained(d: Dictionary, reads: str, writes: str, **options: Any) -> Dictionary:
    """Train a dictionary; with archetypes it starts from tokens that are not trained on."""
    config = TrainConfig(**{"steps": 1000, "lr": 1e-2, "batch_size": BATCH} | options)
    learner = Learner(name="planted", dictionary=d, config=config)
    if config.archetypes:
        drawn = torch.cat([batch(300 + i) for i in range(1 + config.archetypes // BATCH)])
        _start(learner, drawn, {"a": slice(0, WIDTH)}, config.archetypes)
    for number in range(config.steps):
        x = batch(number % 300, reads)
        learner.train_step(x, x if reads == writes else batch(number % 300, writes), number)
    return d


CASES: list[tuple[Sparsify, Matryoshka | None]] = [
    (TopK(3), None),
    (BatchTopK(3), None),
    (ReLU(l1=0.03), None),
    (ReLU(l1=0.03, p_end=0.5), None),
    (JumpReLU(l0=0.03, threshold=0.5, bandwidth=0.5), None),
    (JumpReLU(l0=0.03, penalty="tanh"), None),
    (Gated(l1=0.1), None),
    (ReLU(l1=0.03, decoder_norm=False), None),
    (TopK(3), Matryoshka(prefixes=(32,))),
    (TopK(3), Matryoshka(sampled=1)),
    (BatchTopK(3), Matryoshka(sampled=1)),
]


@pytest.mark.parametrize(("sparsify", "matryoshka"), CASES, ids=str)
def test_planted_atoms_are_recovered(sparsify: Sparsify, matryoshka: Matryoshka | None) -> None:
    d = Dictionary({"a": WIDTH}, latents=2 * ATOMS, sparsify=sparsify, matryoshka=matryoshka)
    assert recovered(d) < 0.05
    assert recovered(trained(d, "a", "a")) >= 0.95


def test_batch_top_k_with_a_fixed_prefix_takes_longer() -> None:
    """In 1,000 steps at 1e-2 it finds 85 to 98 % of them, depending on the seed."""
    prefix = Matryoshka(prefixes=(64,))
    d = Dictionary({"a": WIDTH}, latents=2 * ATOMS, sparsify=BatchTopK(3), matryoshka=prefix)
    assert recovered(trained(d, "a", "a", steps=3000, lr=5e-3)) >= 0.95


WIRINGS: list[tuple[str, str, Sparsify]] = [
    ("a", "b", TopK(3)),  # transcoders
    ("a", "b", BatchTopK(3)),
    ("a", "b", ReLU(l1=0.03)),
    ("ab", "ab", BatchTopK(3)),  # crosscoders
    ("abc", "abc", TopK(3)),
    ("a", "abc", TopK(3)),  # cross-layer transcoders
    ("b", "bc", JumpReLU(l0=0.03, threshold=0.5, bandwidth=0.5)),
]


@pytest.mark.parametrize(("reads", "writes", "sparsify"), WIRINGS, ids=str)
def test_every_wiring_recovers_what_it_writes(reads: str, writes: str, sparsify: Sparsify) -> None:
    """A decoder row is the same atom at every site written, side by side."""
    widths = [dict.fromkeys(sites, WIDTH) for sites in (reads, writes)]
    d = Dictionary(*widths, latents=2 * ATOMS, sparsify=sparsify)
    assert recovered(d, writes) < 0.05
    assert recovered(trained(d, reads, writes), writes) >= 0.95


def test_a_skip_transcoder_answers_an_atom_with_its_output() -> None:
    """Rows are known only up to what the linear path takes over, so what both write is compared."""
    d = Dictionary({"a": WIDTH}, {"b": WIDTH}, latents=2 * ATOMS, sparsify=TopK(3), skip=True)
    trained(d, "a", "b")
    x, y = (torch.cat([batch(i, site) for i in range(40)]) for site in "ab")
    linear = atoms("a") @ torch.linalg.lstsq(x, y).solution
    with torch.no_grad():
        answer = d(3.3 * atoms("a")) - d.b_dec
    for found, least, most in ((linear, 0.0, 0.1), (answer, 0.95, 1.0)):
        cosine = torch.cosine_similarity(found, atoms("b"), dim=1)
        assert least <= (cosine > 0.95).float().mean() <= most


@pytest.mark.parametrize("sparsify", [TopK(3), BatchTopK(3)], ids=str)
def test_atoms_that_lie_near_the_hull_are_recovered(sparsify: Sparsify) -> None:
    """Archetypal: rows within half a mean norm of the hull of 800 tokens."""
    d = Dictionary({"a": WIDTH}, latents=2 * ATOMS, sparsify=sparsify)
    assert recovered(trained(d, "a", "a", archetypes=800, relax=0.5)) >= 0.95
