"""Every kind finds the atoms that made the data.

32 channels, 48 unit atoms (half again as many as channels), 3 active a token on average, weights in
[0.5, 1.5], noise 0.02: after Sharkey et al. 2022 ("Taking features out of superposition").
Dictionaries have twice as many latents as there are atoms.
"""

import functools

import pytest
import torch

from dictlearn.config import BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, Sparsify, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.learner import Learner
from dictlearn.schedule import TrainConfig

WIDTH, ATOMS, ACTIVE, BATCH = 32, 48, 3, 256


@functools.cache
def atoms() -> torch.Tensor:
    generator = torch.Generator().manual_seed(77)
    return torch.nn.functional.normalize(torch.randn(ATOMS, WIDTH, generator=generator), dim=1)


@functools.cache
def batch(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + number)
    keep = torch.rand(BATCH, ATOMS, generator=generator) < ACTIVE / ATOMS
    codes = keep * (0.5 + torch.rand(BATCH, ATOMS, generator=generator))
    x = codes @ atoms() + 0.02 * torch.randn(BATCH, WIDTH, generator=generator)
    return x * 3.3  # about unit variance a channel


CASES: list[tuple[Sparsify, Matryoshka | None]] = [
    (TopK(3), None),
    (BatchTopK(3), None),
    (ReLU(l1=0.03), None),
    (ReLU(l1=0.03, p_end=0.5), None),
    (JumpReLU(l0=0.03, threshold=0.5, bandwidth=0.5), None),
    (JumpReLU(l0=0.03, penalty="tanh"), None),
    (Gated(l1=0.1), None),
    (TopK(3), Matryoshka(prefixes=(32,))),
]


@pytest.mark.parametrize(("sparsify", "matryoshka"), CASES, ids=str)
def test_planted_atoms_are_recovered(sparsify: Sparsify, matryoshka: Matryoshka | None) -> None:
    d = Dictionary({"a": WIDTH}, latents=2 * ATOMS, sparsify=sparsify, matryoshka=matryoshka)
    start = (torch.nn.functional.normalize(d.W_dec.detach(), dim=1) @ atoms().T).amax(0)
    assert (start > 0.95).float().mean() < 0.05
    steps = 1000
    config = TrainConfig(steps=steps, lr=1e-2, batch_size=BATCH)
    learner = Learner(name="planted", dictionary=d, config=config)
    for number in range(steps):
        x = batch(number % 300)
        learner.train_step(x, x, number)
    best = (torch.nn.functional.normalize(d.W_dec.detach(), dim=1) @ atoms().T).amax(0)
    assert (best > 0.95).float().mean() >= 0.95, f"{(best > 0.95).float().mean():.2f}"
