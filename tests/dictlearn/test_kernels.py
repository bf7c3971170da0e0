"""The sparse step against the plain losses under autograd: values and gradients."""

import pytest
import torch

from dictlearn.config import (
    BatchTopK,
    Gated,
    Input,
    JumpReLU,
    Matryoshka,
    ReLU,
    Sparsify,
    TopK,
)
from dictlearn.dictionary import Dictionary
from dictlearn.kernels import Step, dense_step, sparse_step, step
from dictlearn.losses import AuxK
from dictlearn.segments import ByLatent, sort_by_latent

KINDS: list[Sparsify] = [
    TopK(4),
    TopK(4, relu=False),
    TopK(4, group_max=True),
    ReLU(l1=0.01),
    ReLU(l1=0.01, decoder_norm=False),
    ReLU(l1=0.01, p_end=0.5),
    ReLU(l1=0.01, function="tanh_relu"),
    BatchTopK(4),
    JumpReLU(l0=0.01, bandwidth=0.8, threshold=0.5),
    JumpReLU(l0=0.01, bandwidth=0.8, threshold=0.5, penalty="tanh"),
    Gated(l1=0.01),
]
WIRINGS = {
    "sae": ({"a": 12}, {"a": 12}, False, None),
    "sae-free-input": ({"a": 12}, {"a": 12}, False, Input(center="none")),
    "skip-transcoder": ({"a": 12}, {"b": 7}, True, None),
    "crosscoder": ({"a": 5, "b": 7}, {"a": 5, "b": 7}, False, None),
    "cross-layer": ({"a": 12}, {"b": 5, "c": 6}, False, None),
}


def build(sparsify: Sparsify, wiring: str, matryoshka: Matryoshka | None = None) -> Dictionary:
    reads, writes, skip, options = WIRINGS[wiring]
    d = Dictionary(
        reads,
        writes,
        latents=40,
        sparsify=sparsify,
        skip=skip,
        input=options,
        matryoshka=matryoshka,
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in d.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        d.W_dec.mul_(torch.rand(40, 1, generator=generator) + 0.5)
    return d.double()


def data(d: Dictionary, rows: int = 33) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(rows, d.config.d_read, generator=generator, dtype=torch.float64)
    if d.config.reads == d.config.writes:
        return x, x
    return x, torch.randn(rows, d.config.d_write, generator=generator, dtype=torch.float64)


def compare(d: Dictionary, options: Step) -> None:
    x, target = data(d)
    plain = dense_step(d, x, target, options)
    wanted = {n: p.grad.clone() for n, p in d.named_parameters() if p.grad is not None}
    if isinstance(d.config.sparsify, Gated):
        wanted.setdefault("b_enc", torch.zeros(40))
    fast = sparse_step(d, x, target, options)
    assert fast is not None
    assert fast.sparse
    assert fast.losses.keys() == plain.losses.keys()
    for name, value in plain.losses.items():
        torch.testing.assert_close(fast.losses[name], value, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(fast.error, plain.error)
    assert torch.equal(fast.fired_F, plain.fired_F)
    found = {n: p.grad for n, p in d.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, atol=1e-7, rtol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
        assert value.abs().max() > 0, f"{name} has no gradient: the comparison says nothing"


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("sparsify", KINDS, ids=str)
def test_sparse_step_equals_autograd(sparsify: Sparsify, wiring: str) -> None:
    compare(build(sparsify, wiring), Step(max_density=1.0, penalty_scale=0.7, progress=0.6))


@pytest.mark.parametrize("sparsify", KINDS, ids=str)
def test_matryoshka_prefixes(sparsify: Sparsify) -> None:
    d = build(sparsify, "skip-transcoder", Matryoshka(prefixes=(3, 11)))
    compare(d, Step(max_density=1.0, prefixes=[3, 11, 40]))


@pytest.mark.parametrize("sparsify", KINDS, ids=str)
@pytest.mark.parametrize("k", [2, 30])
def test_auxiliary_loss_of_dead_latents(sparsify: Sparsify, k: int) -> None:
    d = build(sparsify, "sae")
    dead = torch.zeros(40, dtype=torch.bool)
    dead[5:12] = True
    compare(d, Step(max_density=1.0, aux=AuxK(dead_F=dead, k=k, coefficient=0.3)))


def test_dense_fall_back_is_chosen_by_density() -> None:
    d = build(ReLU(), "sae")
    x, target = data(d)
    assert not step(d, x, target, Step(max_density=0.1)).sparse
    assert step(d, x, target, Step(max_density=0.9)).sparse


def test_float32_gradients_agree_to_1e5() -> None:
    d = Dictionary({"a": 64}, latents=512, sparsify=TopK(8))
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    dense_step(d, x, x, Step())
    wanted = {n: p.grad.clone() for n, p in d.named_parameters() if p.grad is not None}
    sparse_step(d, x, x, Step())
    for name, value in wanted.items():
        error = (dict(d.named_parameters())[name].grad - value).abs().max()
        assert error <= 1e-5 * value.abs().max(), name


def test_batch_topk_falls_back_when_the_bound_is_too_high() -> None:
    d = build(BatchTopK(4), "sae")
    x, _ = data(d)
    x = x.clone()
    x[1:] *= 0.01  # the first chunk's sample says nothing about how few entries pass
    with torch.no_grad():
        d.b_enc.fill_(-0.3)
    plain = dense_step(d, x, x, Step())
    d.sparsify.threshold.fill_(-1.0)
    fast = sparse_step(d, x, x, Step(max_density=1.0))
    assert fast is not None
    torch.testing.assert_close(fast.losses["mse"], plain.losses["mse"])


@pytest.mark.parametrize("latents", [5, 70_000, 200_000])
def test_sort_by_latent_is_a_stable_argsort(latents: int) -> None:
    latent = torch.randint(0, latents, (5000,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(sort_by_latent(latent, latents), latent.argsort(stable=True))


def test_sums_by_latent() -> None:
    latent = torch.tensor([2, 0, 2, 4])
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    table = torch.arange(6.0).reshape(3, 2)
    index = torch.tensor([0, 1, 2, 2])
    plan = ByLatent.plan(latent, 5)
    wanted = torch.zeros(5, 2).index_add_(0, latent, weight[:, None] * table[index])
    assert torch.equal(plan.outer(weight, index, table), wanted)
    assert plan.total(weight).tolist() == [2.0, 0.0, 4.0, 0.0, 4.0]
