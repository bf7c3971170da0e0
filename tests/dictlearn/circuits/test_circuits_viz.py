"""Figures show the numbers they are given."""

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import vitmodels
from dictlearn.circuits import (
    activation_patching,
    attention_patterns,
    attribute_logits,
    attribution_patching,
    head_statistics,
    logit_lens,
    rollout,
)
from dictlearn.circuits.metrics import logit_difference
from dictlearn.viz import attention, lens, patching

X = torch.randn(2, 1, 20, 20, generator=torch.Generator().manual_seed(0))
Y = torch.randn(2, 1, 20, 20, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def axes() -> Axes:
    made: Axes = Figure().subplots()
    return made


@pytest.fixture(scope="module")
def model() -> vitmodels.VisionModel:
    return vitmodels.load("toy/digits-2l")


def test_patching_maps(model: vitmodels.VisionModel, axes: Axes) -> None:
    found = activation_patching(model, X, Y, "blocks.*.{resid_post,z}", logit_difference(1, 2))
    image = patching.patching_map(axes, found["resid_post"], middle=found.attrs["corrupted"])
    assert np.array_equal(np.asarray(image.get_array()), found["resid_post"].values)
    assert axes.get_xlabel() == "position"
    low, high = image.get_clim()
    assert (low + high) / 2 == pytest.approx(found.attrs["corrupted"])
    with pytest.raises(ValueError, match=r"take .sel"):
        patching.patching_map(axes, found["z"])
    over = patching.patch_grid_map(axes, found["resid_post"].sel(layer=0), np.zeros((20, 20)))
    grid = np.asarray(over.get_array())
    assert grid.shape == (5, 5)
    assert grid[1, 2] == pytest.approx(float(found["resid_post"].sel(layer=0, position=8)))
    with pytest.raises(ValueError, match=r"expected \[position\]"):
        patching.patch_grid_map(axes, found["resid_post"])
    figure = Figure().subplots()
    estimate = attribution_patching(model, X, Y, "blocks.*.{resid_post,z}", logit_difference(1, 2))
    patching.agreement_scatter(figure, found, estimate)
    assert [len(line.get_xdata()) for line in figure.lines[:2]] == [208, 52]  # z, resid_post
    found["z"].sel(layer=0).plot(ax=Figure().subplots())  # xarray's own plot works too


def test_logit_bars(model: vitmodels.VisionModel, axes: Axes) -> None:
    parts = attribute_logits(model, X, [3])
    patching.logit_parts(axes, parts, item=1)
    widths = [bar.get_width() for bar in axes.patches]
    assert sum(widths[:-1]) == pytest.approx(widths[-1], abs=1e-4)
    assert "heads 1" in [text.get_text() for text in axes.get_yticklabels()]


def test_lens_figures(model: vitmodels.VisionModel, axes: Axes) -> None:
    found = logit_lens(model, X, class_names=[f"digit {i}" for i in range(10)])
    lens.lens_by_layer(axes, found, count=2)
    assert len(axes.lines) == 2
    with torch.no_grad():
        share = model(X)[0].softmax(-1)
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(float(share.max()), abs=1e-5)
    image = lens.lens_by_patch(axes, found, layer=1, which="digit 4")
    token = found["token"].isel(item=0).sel(layer=1, position=1)
    wanted = float(token.sel({"class": "digit 4"}) - token.mean("class"))
    assert np.asarray(image.get_array())[0, 0] == pytest.approx(wanted, abs=1e-5)


def test_attention_figures(model: vitmodels.VisionModel, axes: Axes) -> None:
    patterns = attention_patterns(model, X)
    one = patterns.isel(item=0, layer=1, head=2)
    image = attention.attention_row(axes, one, query=0, picture=np.zeros((20, 20)))
    assert np.asarray(image.get_array())[4, 4] == pytest.approx(float(one[0, 25]))
    attention.attention_row(axes, rollout(patterns).isel(item=0))
    with pytest.raises(ValueError, match="choose one item"):
        attention.attention_row(axes, patterns)
    statistics = head_statistics(model, X)
    drawn = attention.head_scores(axes, statistics, "cls")
    assert np.array_equal(np.asarray(drawn.get_array()), statistics["cls"].values)
    with pytest.raises(KeyError, match="there are entropy"):
        attention.head_scores(axes, statistics, "corners")
