"""Compiled and bfloat16 dense steps against the plain one."""

from typing import Any

import pytest
import torch

from actstore.store import Store
from dictlearn.config import Gated, JumpReLU, Matryoshka, ReLU, Sparsify, TopK
from dictlearn.densestep import compiled_losses
from dictlearn.dictionary import Dictionary
from dictlearn.kernels import Step, dense_step
from dictlearn.losses import AuxK
from dictlearn.schedule import TrainConfig
from dictlearn.trainer import train

SITE = {"blocks.0.resid_post": 16}


def build(sparsify: Sparsify, **options: Any) -> Dictionary:
    return Dictionary({"a": 12}, latents=30, sparsify=sparsify, seed=1, **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: build(TopK(4), latent_norm=True),
        lambda: build(Gated(l1=0.1, k=5)),
        lambda: build(JumpReLU(l0=0.1, positive=False)),
    ],
)
def test_a_compiled_dense_step_equals_the_plain_one(make: Any) -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(len(list(graph.graph.nodes)))
        return graph.forward

    compiled = compiled_losses(backend)
    plain, other = make(), make()
    generator = torch.Generator().manual_seed(0)
    dead = torch.arange(30) < 6
    after_first = 0
    for number in range(4):
        x = torch.randn(20, 12, generator=generator)
        aux = AuxK(dead_F=dead, k=3, coefficient=0.1) if number else None
        rest: dict[str, Any] = {"penalty_scale": 0.3 + 0.2 * number, "aux": aux}
        one = dense_step(plain, x, x, Step(**rest))
        two = dense_step(other, x, x, Step(**rest, compiled=compiled))
        assert one.losses.keys() == two.losses.keys()
        for name, loss in one.losses.items():
            torch.testing.assert_close(two.losses[name], loss)
        for a, b in zip(plain.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad)
        after_first = after_first or len(graphs)
    assert after_first > 0
    assert len(graphs) == after_first  # compiled once, for all steps


def test_a_compiled_run(store: Store) -> None:
    def run(compile: str) -> Dictionary:
        d = Dictionary(SITE, latents=32, sparsify=TopK(3), latent_norm=True)
        config = TrainConfig(steps=4, batch_size=64, compile=compile)  # type: ignore[arg-type]
        train(store, d, config)
        return d

    torch.testing.assert_close(run("eager").W_dec, run("none").W_dec)


def test_bfloat16_is_close() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 12, generator=generator)
    found = []
    for backend in ("default", "bfloat16"):
        d = build(ReLU(l1=0.01))
        result = dense_step(d, x, x, Step(backend=backend))  # type: ignore[arg-type]
        assert d.W_enc.grad is not None
        assert d.W_enc.grad.dtype == torch.float32
        found.append((result.losses["mse"], d.W_enc.grad))
    assert not torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=2e-2, atol=0)
    assert (found[0][1] - found[1][1]).norm() < 0.05 * found[0][1].norm()


@pytest.mark.parametrize(
    "options",
    [{"sparsify": ReLU(p_end=0.5)}, {"sparsify": TopK(2), "matryoshka": Matryoshka(sampled=1)}],
)
def test_what_differs_at_every_step_is_not_compiled(store: Store, options: Any) -> None:
    d = Dictionary(SITE, latents=32, **options)
    with pytest.raises(ValueError, match=r"differ at every step .* leave compile out"):
        train(store, d, TrainConfig(steps=2, batch_size=64, compile="eager"))
