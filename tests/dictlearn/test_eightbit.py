"""Picks by an 8-bit product are those of float32, whatever the data; the loops and their twins."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from dictlearn import eightbit
from dictlearn.eightbit import largest_exact, multiplies_int8

pytestmark = pytest.mark.skipif(not multiplies_int8(), reason="no 8-bit product on this CPU")

Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
ROWS, WIDTH, LATENTS = 150, 52, 1024


def drawn(seed: int = 0) -> Data:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    weight = torch.randn(LATENTS, WIDTH, generator=generator)
    return x, weight, torch.randn(LATENTS, generator=generator)


def outlier_channels(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Data:
    x[:, 3] *= 1000
    x[:, 7] += 300
    return x, w, b


def outlier_tokens(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Data:
    x[::7] *= 1e6
    x[1::7] *= 1e-25
    x[2::7, 5] = 1e4
    return x, w, b


def uneven_latents(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Data:
    w *= torch.logspace(-4, 3, LATENTS)[:, None]
    w[::50] = 0
    return x, w, b


def ones(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Data:
    """Rounding errors that all have the same sign."""
    return x.sign() * 0.1 + x.abs().clamp(max=1), w.abs(), b - 20


def few_positive(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Data:
    return x, w, b - 19


@pytest.mark.parametrize("k", [1, 16])
@pytest.mark.parametrize("chunk", [64, 1000])
@pytest.mark.parametrize(
    "change",
    [lambda *data: data, outlier_channels, outlier_tokens, uneven_latents, ones, few_positive],
)
def test_what_is_kept_is_what_float32_keeps(
    change: Callable[..., Data], chunk: int, k: int
) -> None:
    x, weight, bias = change(*drawn())
    latent, pre, count = largest_exact(x, weight, bias, k, chunk)
    exact = F.linear(x, weight, bias)
    least = 1e-5 * (x.norm(dim=1) * weight.norm(dim=1).max() + bias.abs().max())
    for row in range(ROWS):
        n = int(count[row])
        best = exact[row].topk(k).values.relu()
        kept = torch.zeros(k)
        kept[:n] = pre[row, :n].sort(descending=True).values.relu()
        assert len(set(latent[row, :n].tolist())) == n
        torch.testing.assert_close(kept, best, rtol=1e-5, atol=float(least[row]))
        here = exact[row, latent[row, :n]]
        torch.testing.assert_close(pre[row, :n], here, rtol=1e-5, atol=float(least[row]))


@pytest.mark.parametrize("bound", [0.0, 1.0])
def test_the_bound_is_what_makes_it_exact(bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eightbit, "_ROUNDING", bound)
    monkeypatch.setattr(eightbit, "_X_TOP", 3)  # coarse, so that the order changes
    x, weight, _ = drawn()
    x, weight = x[:20], weight[:200]
    latent, _, _ = largest_exact(x, weight, torch.zeros(200), 6, 64, compile_loop=lambda f: f)
    exact = F.linear(x, weight).topk(6).indices
    same = latent.sort().values.equal(exact.sort().values)
    assert same is (bound == 1.0)


def test_the_compiled_loops_equal_their_plain_twins() -> None:
    x, weight, bias = drawn(1)
    fast = largest_exact(x[:70], weight[:200], bias[:200], 5, 32)
    plain = largest_exact(x[:70], weight[:200], bias[:200], 5, 32, compile_loop=lambda f: f)
    order_fast, order_plain = fast[0].argsort(), plain[0].argsort()
    assert torch.equal(fast[0].gather(1, order_fast), plain[0].gather(1, order_plain))
    values = fast[1].gather(1, order_fast), plain[1].gather(1, order_plain)
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
    assert torch.equal(fast[2], plain[2])


def test_ties_and_zeros() -> None:
    x = torch.zeros(5, 12)
    x[1:3] = 1
    weight = torch.ones(40, 12)
    latent, pre, count = largest_exact(x, weight, torch.zeros(40), 6, 64)
    assert (pre[1:3] == 12).all()
    assert (count[1:3] == 6).all()
    assert all(len(set(row.tolist())) == 6 for row in latent[1:3])
    assert not pre[[0, 3, 4]].any()
    _, pre, count = largest_exact(x, weight, torch.arange(-34.0, 6.0), 6, 64)
    assert pre[0, : count[0]].relu().sort().values.tolist()[-5:] == [1, 2, 3, 4, 5]
    assert not largest_exact(x, 0 * weight, torch.zeros(40), 6, 64)[1].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_stay_seen_and_alone(bad: float) -> None:
    x, weight, bias = drawn(2)
    x[3, 1] = bad
    _, pre, _ = largest_exact(x, weight, bias, 4, 64)
    rest = [row for row in range(ROWS) if row != 3]
    best = F.linear(x, weight, bias).topk(4).values
    assert not pre[3].isfinite().all()
    torch.testing.assert_close(pre[rest].sort(descending=True).values, best[rest])
    weight[9, 2] = bad
    assert not largest_exact(x, weight, bias, 4, 64)[1][rest].isfinite().all()


def test_few_tokens_are_multiplied_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outlier channels, too, leave fewer latents than the limit."""
    x, weight, bias = outlier_channels(*drawn(3))
    done: list[int] = []
    linear = F.linear

    def counted(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        done.append(len(x))
        return linear(x, *rest)

    monkeypatch.setattr("dictlearn.eightbit.F.linear", counted)
    largest_exact(x, weight, bias, 16, 64)
    assert sum(done) < ROWS / 10


def test_the_operators_of_oneDNN() -> None:
    """What this file relies on: whole numbers exactly, times the step of each latent."""
    value = torch.randint(1, 128, (10, 33), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (7, 33), dtype=torch.int8)
    value[0], weight[0] = 127, 127  # pairs of products that just fit 16 bits
    step = torch.rand(7)
    packed = torch.ops.onednn.qlinear_prepack(weight.clone(), [10, 33])
    expected = ((value.double() - 64) @ weight.double().T).float() * step
    torch.testing.assert_close(eightbit._product(value, packed, step), expected)
