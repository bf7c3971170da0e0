"""Attribution, ablation and path patching against what they are by definition."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import actstore
import vitmodels
from dictlearn.circuits import metrics
from dictlearn.circuits.ablation import ablate, store_means
from dictlearn.circuits.attribution import attribution_patching, integrated_gradients
from dictlearn.circuits.patching import activation_patching, agreement
from dictlearn.circuits.path_patching import patch_paths
from vitmodels.edits import at_heads, replace

Pair = tuple[vitmodels.VisionModel, Tensor, Tensor]
METRIC = metrics.logit_difference([0, 1, 2], 5)


@pytest.fixture(scope="module")
def pair() -> Pair:
    model = vitmodels.load("toy/digits-2l")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 20, 20, generator=generator)
    return model, x, x + 0.3 * torch.randn(3, 1, 20, 20, generator=generator)


def test_attribution_is_exact_for_a_linear_part(pair: Pair) -> None:
    """From pooled to a logit there is one linear map: gradient times difference is the change."""
    model, clean, corrupted = pair
    args = (model, clean, corrupted, "pooled", metrics.logit(3))
    for direction in ("denoise", "noise"):
        exact = activation_patching(*args, direction=direction, per_item=True)  # type: ignore[arg-type]
        for method in (attribution_patching, integrated_gradients):
            found = method(*args, direction=direction, per_item=True)  # type: ignore[operator]
            assert found["pooled"].dims == ("item",)
            assert found["pooled"].values == pytest.approx(exact["pooled"].values, abs=1e-4)
            assert found.attrs == exact.attrs


def test_attribution_is_the_derivative_of_patching(pair: Pair) -> None:
    """For a small difference of the inputs the two agree cell by cell, in every kind of site."""
    model, clean, _ = pair
    near = clean + 1e-2 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(5))
    sites = "embed, blocks.*.{resid_post,z,pattern,mlp_out,attn_out}"
    exact = activation_patching(model, clean, near, sites, METRIC)
    found = attribution_patching(model, clean, near, sites, METRIC)
    assert {k: v.dims for k, v in exact.items()} == {k: v.dims for k, v in found.items()}
    both = agreement(exact, found)
    assert both["pearson"].sel(part="all") > 0.99
    groups = {"two": [3, 7], "cls": "cls"}
    grouped = attribution_patching(
        model, clean, near, "blocks.0.z", METRIC, positions=groups, over=("head",)
    )
    summed = found["z"].sel(layer=0, position=[3, 7]) - found.attrs["corrupted"]
    assert grouped["z"].sel(position="two").values[0] == pytest.approx(
        summed.sum("position").values + found.attrs["corrupted"], abs=1e-4
    )


def test_integrated_gradients_sum_to_the_change_of_the_whole_site(pair: Pair) -> None:
    model, clean, corrupted = pair
    sites = "blocks.0.{resid_post,z}"
    whole = activation_patching(model, clean, corrupted, sites, METRIC, over=())
    found = integrated_gradients(model, clean, corrupted, sites, METRIC, steps=64, rows=50)
    first = attribution_patching(model, clean, corrupted, sites, METRIC)
    start = whole.attrs["corrupted"]
    for part in ("resid_post", "z"):
        change = float(whole[part][0]) - start
        total = float((found[part] - start).sum())
        assert total == pytest.approx(change, rel=0.03, abs=0.02)
        assert abs(total - change) < abs(float((first[part] - start).sum()) - change)
    some = integrated_gradients(model, clean, corrupted, sites, METRIC, steps=4, rows=3)
    many = integrated_gradients(model, clean, corrupted, sites, METRIC, steps=4, rows=100)
    assert some["z"].values == pytest.approx(many["z"].values, abs=1e-4)


def test_metrics_without_a_gradient_are_refused(pair: Pair) -> None:
    model, clean, corrupted = pair
    for method in (attribution_patching, integrated_gradients):
        with pytest.raises(ValueError, match="no gradient"):
            method(model, clean, corrupted, "embed", metrics.accuracy(1))  # type: ignore[operator]
    with pytest.raises(ValueError, match="at least one step"):
        integrated_gradients(model, clean, corrupted, "embed", METRIC, steps=0)


def test_ablation_by_zero_mean_and_other_items(pair: Pair) -> None:
    model, x, _ = pair
    name = "blocks.1.z"
    with torch.no_grad():
        value = model.run(x, name)[name]

    def wanted(new: Tensor) -> Tensor:
        whole = new.expand_as(value)
        with torch.no_grad(), model.editing({name: at_heads(2, replace(whole[:, :, 2:3]))}):
            return METRIC(model(x))

    def got(**options: object) -> np.ndarray:
        found = ablate(model, x, name, METRIC, over=("head",), per_item=True, **options)  # type: ignore[arg-type]
        return found["z"].sel(layer=1, head=2).values

    assert got(mode="zero") == pytest.approx(wanted(torch.zeros(())).numpy(), abs=1e-4)
    assert got(mode="mean") == pytest.approx(wanted(value.mean(0, keepdim=True)).numpy(), abs=1e-4)
    others = [wanted(value[rows]).numpy() for rows in ([1, 2, 0], [2, 0, 1])]
    found = got(mode="resample", seed=3)
    assert any(found == pytest.approx(other, abs=1e-4) for other in others)
    assert got(mode="resample", reference=x[:1]) == pytest.approx(
        wanted(value[:1]).numpy(), abs=1e-4
    )
    with pytest.raises(ValueError, match="zero, mean or resample"):
        got(mode="median")
    with pytest.raises(ValueError, match="two items"):
        ablate(model, x[:1], name, METRIC, mode="resample")


@pytest.fixture(scope="module")
def toy_store(tmp_path_factory: pytest.TempPathFactory) -> actstore.Store:
    folder: Path = tmp_path_factory.mktemp("toy")
    return actstore.harvest(
        model=vitmodels.load("toy/digits-2l"),
        data="digits",
        sites=["blocks.1.{resid_post,z}", "pooled"],
        out=folder / "acts.zarr",
        limit=40,
        dtype="float32",
    )


def test_means_of_a_store(pair: Pair, toy_store: actstore.Store) -> None:
    model, x, _ = pair
    infos = {n: model.sites()[n] for n in ("blocks.1.resid_post", "blocks.1.z", "pooled")}
    means = store_means(model, toy_store, infos)
    for name, info in infos.items():
        assert tuple(means[name].shape) == info.shape
    patches = toy_store.items(np.arange(40), "blocks.1.z", "patch").reshape(40, 25, 4, 16)
    assert means["blocks.1.z"][5].numpy() == pytest.approx(patches.mean((0, 1)), abs=1e-4)
    found = ablate(model, x, "blocks.1.z", METRIC, reference=toy_store, over=("head",))
    assert found["z"].sizes == {"layer": 1, "head": 4}
    with pytest.raises(KeyError, match=r"blocks.0.z"):
        ablate(model, x, "blocks.0.z", METRIC, reference=toy_store)
    with pytest.raises(ValueError, match="means only"):
        ablate(model, x, "blocks.1.z", METRIC, reference=toy_store, mode="resample")
    other = vitmodels.load("toy/digits-2l", pretrained=False, seed=7)
    with pytest.raises(ValueError, match="not the one"):
        ablate(other, x, "blocks.1.z", METRIC, reference=toy_store)


def test_the_direct_path_to_the_logits_is_the_tail_of_the_stream(pair: Pair) -> None:
    model, clean, corrupted = pair
    found = patch_paths(
        model, clean, corrupted, "blocks.0.z", "logits", METRIC, over=("head",), per_item=True
    )
    site, last = "blocks.0.head_out", "blocks.1.resid_post"
    with torch.no_grad():
        other, base = model.run(clean, site)[site], model.run(corrupted, [site, last])
        for head in range(4):
            stream = base[last] + (other - base[site])[:, :, head]
            with model.editing({last: replace(stream)}):
                wanted = METRIC(model(corrupted))
            got = found["z"].sel(layer=0, head=head).values
            assert got == pytest.approx(wanted.numpy(), abs=1e-3)


def test_the_path_to_a_head_goes_through_it_alone(pair: Pair) -> None:
    model, clean, corrupted = pair
    found = patch_paths(
        model,
        clean,
        corrupted,
        "blocks.0.{z,mlp_out}",
        "blocks.1.{q,k}",
        METRIC,
        over=("head",),
        receiver_heads=[3],
        rows=7,
        per_item=True,
    )
    last = "blocks.1.resid_pre"
    sites = ["blocks.0.head_out", "blocks.0.mlp_out", last]
    with torch.no_grad():
        other, base = model.run(clean, sites), model.run(corrupted, sites)
        deltas = {("z", h): (other[sites[0]] - base[sites[0]])[:, :, h] for h in range(4)}
        deltas["mlp_out", 0] = other[sites[1]] - base[sites[1]]
        for (part, head), delta in deltas.items():
            with model.editing({last: replace(base[last] + delta)}):
                got = model.run(corrupted, "blocks.1.{q,k}")
            edits = {n: at_heads(3, replace(v[:, :, 3:4])) for n, v in got.items()}
            with model.editing(edits):
                wanted = METRIC(model(corrupted))
            cell = found[part].sel(layer=0)
            cell = cell.sel(head=head) if part == "z" else cell
            assert cell.values == pytest.approx(wanted.numpy(), abs=1e-3)


def test_paths_that_are_not_there(pair: Pair) -> None:
    model, clean, corrupted = pair
    with pytest.raises(ValueError, match="no path between"):
        patch_paths(model, clean, corrupted, "blocks.1.z", "blocks.0.q", METRIC)
    with pytest.raises(ValueError, match="has no heads"):
        patch_paths(
            model, clean, corrupted, "blocks.0.z", "blocks.1.mlp_in", METRIC, receiver_heads=[0]
        )
