"""The smallest set is what trying every set one after the other finds."""

import itertools

import pytest
import torch
from torch import Tensor

import vitmodels
from dictlearn.circuits.metrics import Metric, logit_difference
from dictlearn.circuits.patching import activation_patching, patched_logits
from dictlearn.circuits.search import smallest_set

SITES = "blocks.*.{attn_out,mlp_out}"
METRIC = logit_difference(0, 7)


@pytest.fixture(scope="module")
def pair() -> tuple[vitmodels.VisionModel, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(3, 1, 20, 20, generator=generator) for _ in range(2))
    return vitmodels.load("toy/digits-2l"), x, y


def by_hand(
    model: vitmodels.VisionModel, clean: Tensor, corrupted: Tensor, metric: Metric
) -> dict[tuple[str, ...], float]:
    with torch.no_grad():
        source = model.run(clean, SITES)
    return {
        some: float(metric(patched_logits(model, corrupted, {s: source[s] for s in some})).mean())
        for size in (1, 2, 3)
        for some in itertools.combinations(source, size)
    }


def test_every_set_is_tried(pair: tuple[vitmodels.VisionModel, Tensor, Tensor]) -> None:
    model, clean, corrupted = pair
    values = by_hand(model, clean, corrupted, METRIC)
    by_size = {k: max(v for s, v in values.items() if len(s) == k) for k in (1, 2, 3)}
    goal = by_size[2] - 1e-3
    assert goal > by_size[1]
    found = smallest_set(model, clean, corrupted, SITES, METRIC, goal, over=(), rows=10)
    assert found.reached
    assert found.exhaustive
    assert tuple(sorted(p.site for p in found.places)) == tuple(
        sorted(next(s for s, v in values.items() if v == pytest.approx(by_size[2], abs=1e-4)))
    )
    assert found.value == pytest.approx(by_size[2], abs=1e-4)
    assert found.best == pytest.approx({1: by_size[1], 2: by_size[2]}, abs=1e-4)
    assert found.tried == 4 + 6
    assert found.equals == sum(v >= goal for s, v in values.items() if len(s) == 2)
    unreached = smallest_set(model, clean, corrupted, SITES, METRIC, 1e9, over=())
    assert not unreached.reached
    assert unreached.best[3] == pytest.approx(by_size[3], abs=1e-4)


def test_a_budget_keeps_the_best_and_says_so(
    pair: tuple[vitmodels.VisionModel, Tensor, Tensor],
) -> None:
    model, clean, corrupted = pair
    found = smallest_set(model, clean, corrupted, SITES, METRIC, 1e9, over=(), largest=2, budget=4)
    assert not found.exhaustive
    assert found.tried == 4 + 3
    single = activation_patching(model, clean, corrupted, SITES, METRIC, over=())
    flat = {
        f"blocks.{layer}.{part}": float(single[part].sel(layer=layer))
        for part in ("attn_out", "mlp_out")
        for layer in (0, 1)
    }
    best = sorted(flat, key=lambda s: -flat[s])[:3]
    assert {p.site for p in found.places} <= set(best)
    with pytest.raises(ValueError, match="at least 1"):
        smallest_set(model, clean, corrupted, SITES, METRIC, 0.0, largest=0)
