"""Scores of heads that are built to have them, and rollout by hand."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

import vitmodels
from dictlearn.circuits.attention import attention_patterns, head_statistics, rollout
from dictlearn.circuits.attention_masks import coordinates, successors
from vitmodels.registry import families
from vitmodels.spec import TokenGrid
from vitmodels.weights import seeded


def variant(family: str, name: str | None = None) -> tuple[vitmodels.VisionModel, Tensor]:
    found = next(f for f in families() if f.name == family)
    makers: Mapping[str, object] = found.conformance()
    with seeded(0):
        module = found.conformance()[name or next(iter(makers))]()
    model = vitmodels.wrap(module, family=family, id=f"{family}/{name}")
    generator = torch.Generator().manual_seed(1)
    return model, torch.randn(3, *model.spec.input_shape, generator=generator)


@pytest.fixture(scope="module")
def digits() -> tuple[vitmodels.VisionModel, Tensor]:
    x = torch.randn(10, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    return vitmodels.load("toy/digits-2l"), x


def scores_of(
    model: vitmodels.VisionModel, x: Tensor, heads: dict[int, Tensor]
) -> dict[str, np.ndarray]:
    """Score of each head with its pattern in layer 1 replaced by a given one."""

    def edit(value: Tensor) -> Tensor:
        for head, pattern in heads.items():
            value[:, head] = pattern
        return value

    with model.editing({"blocks.1.pattern": edit}):
        found = head_statistics(model, x)
    return {str(name): found[name].sel(layer=1).values for name in found.data_vars}


def one_hot(target: Tensor, size: int) -> Tensor:
    return torch.nn.functional.one_hot(target, size).float()


def test_heads_that_are_built_for_a_score(
    digits: tuple[vitmodels.VisionModel, Tensor],
) -> None:
    model, x = digits
    token = torch.arange(26)
    left = torch.where((token - 1) % 5 > 0, token - 1, token)
    left[0] = 0
    corner = torch.full_like(token, 25)
    heads = {
        0: one_hot(torch.zeros_like(token), 26),
        1: one_hot(left, 26),
        2: one_hot(corner, 26),
        3: torch.full((26, 26), 1 / 26),
    }
    got = scores_of(model, x, heads)
    assert got["cls"] == pytest.approx([1, 0, 0, 1 / 26], abs=1e-6)
    assert got["left"] == pytest.approx([0, 1, 0, 1 / 26], abs=1e-6)
    assert got["itself"] == pytest.approx([0, 5 / 25, 1 / 25, 1 / 26], abs=1e-6)
    assert got["corner"] == pytest.approx([0, 4 / 25, 1, 4 / 26], abs=1e-6)
    assert got["edge"][2:] == pytest.approx([1, 16 / 26], abs=1e-6)
    assert got["entropy"] == pytest.approx([0, 0, 0, math.log(26)], abs=1e-4)
    assert got["distance"][1] == pytest.approx(20 / 25)
    places = coordinates(TokenGrid(patch=(5, 5))).float()
    far = (places - places[-1]).norm(dim=-1).mean()
    assert got["distance"][2] == pytest.approx(float(far))
    assert got["fixed"][:3] == pytest.approx([1, 1, 1], abs=1e-4)
    found = head_statistics(model, x)
    assert found["cls"].dims == ("layer", "head")
    assert found["corner"].attrs["uniform"] == pytest.approx(4 / 26)
    assert found["left"].attrs["uniform"] == pytest.approx(1 / 26)
    assert "previous_frame" not in found
    assert "register" not in found
    assert "induction" not in found
    assert bool((found["fixed"] < 1).all())
    assert "fixed" not in head_statistics(model, x[:1])


def test_batches_do_not_change_statistics(digits: tuple[vitmodels.VisionModel, Tensor]) -> None:
    """Ten items go in two batches; the mean of each alone is the same."""
    model, x = digits
    whole = head_statistics(model, x)
    each = [head_statistics(model, x[i : i + 1]) for i in range(10)]
    for name in ("entropy", "distance", "edge", "above"):
        mean = np.mean([e[name].values for e in each], axis=0)
        assert whole[name].values == pytest.approx(mean, abs=1e-5)
    patterns = attention_patterns(model, x)
    values = patterns.values
    residual = values - values.mean(0)
    share = 1 - (residual**2).sum((0, 3, 4)) / ((values - 1 / 26) ** 2).sum((0, 3, 4))
    assert whole["fixed"].values == pytest.approx(share, abs=1e-3)


def test_patterns_and_rollout(digits: tuple[vitmodels.VisionModel, Tensor]) -> None:
    model, x = digits
    patterns = attention_patterns(model, x[:2])
    assert patterns.dims == ("item", "layer", "head", "query", "key")
    assert patterns["kind"].values[0] == "cls"
    assert patterns.sum("key").values == pytest.approx(1, abs=1e-5)
    rolled = rollout(patterns)
    a, b = (0.5 * patterns.values[0, i].mean(0) + 0.5 * np.eye(26) for i in (0, 1))
    assert rolled.isel(item=0).values == pytest.approx(b @ a, abs=1e-5)
    assert rolled.sum("key").values == pytest.approx(1, abs=1e-5)
    peak = rollout(patterns, heads="max", residual=0)
    assert peak.sum("key").values == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="mean, max or min"):
        rollout(patterns, heads="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="residual must be in"):
        rollout(patterns, residual=1.0)


def test_clips_have_scores_in_time() -> None:
    model, x = variant("jepa_video", "tubelet_2")
    grid = model.spec.grid
    found = head_statistics(model, x)
    for name in ("previous_frame", "next_frame", "same_frame", "time_distance", "induction"):
        assert bool(np.isfinite(found[name]).all()), name
    size, frame = grid.n_tokens, math.prod(grid.patch[1:])
    before = (torch.arange(size) - frame).clamp_min(0)
    site = "blocks.0.pattern"
    with model.editing({site: lambda value: one_hot(before, size).expand_as(value)}):
        built = head_statistics(model, x, site)
    assert built["previous_frame"].values == pytest.approx(1, abs=1e-6)
    assert built["same_frame"].values == pytest.approx(1 / 3, abs=1e-6)  # the first frame
    assert built["next_frame"].values == pytest.approx(0, abs=1e-6)


def test_a_head_that_copies_what_came_next() -> None:
    """Contents a b c | x y z | b a c: the third frame finds the first, and looks at y x z."""
    grid = TokenGrid(cls=0, patch=(3, 1, 3))
    content = torch.eye(6)[[0, 1, 2, 3, 4, 5, 1, 0, 2]][None]
    target, allowed = successors(content, grid)
    assert target[0, 6:].tolist() == [4, 3, 5]
    assert not allowed[:6].any()
    assert allowed[6].tolist() == [False] * 3 + [True] * 3 + [False] * 3
    model, x = variant("hf_timesformer", "joint")
    grid = model.spec.grid
    assert grid.patch[0] == 3
    site = "blocks.0.pattern"
    with torch.no_grad():
        embedded = model.run(x, "patch_embed" if "patch_embed" in model.anatomy.taps else "embed")
        rows = next(iter(embedded.values()))
        rows = rows if rows.shape[1] == grid.count("patch") else rows[:, grid.slice("patch")]
    wanted, _ = successors(rows, grid)
    start = grid.slice("patch").start
    target = torch.zeros(len(x), grid.n_tokens, dtype=torch.long)
    target[:, grid.slice("patch")] = wanted + start
    pattern = one_hot(target, grid.n_tokens)[:, None]
    with model.editing({site: lambda value: pattern.expand_as(value).clone()}):
        found = head_statistics(model, x, site)
    assert found["induction"].values == pytest.approx(1, abs=1e-6)
    assert bool((found["induction_chance"] < 0.7).all())


def test_bad_input_says_what_to_do(digits: tuple[vitmodels.VisionModel, Tensor]) -> None:
    model, x = digits
    with pytest.raises(ValueError, match="is no pattern"):
        head_statistics(model, x, "blocks.0.z")
    with pytest.raises(ValueError, match=r"no site matches 'blocks.5.pattern'"):
        attention_patterns(model, x, "blocks.5.pattern")
    swin, y = variant("timm_swin")
    with pytest.raises(ValueError, match=r"stage by stage|windows"):
        attention_patterns(swin, y)
