"""Steering, clamping, probes; dictionaries of another model or store."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import actstore
import vitmodels
from dictlearn.circuits.heads import fit_probe, with_probe
from dictlearn.circuits.steering import check_dictionary, clamp, load_for, steer
from dictlearn.config import Input, Sparsify, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.formats.native import save
from vitmodels.registry import families

SITE = "blocks.1.resid_post"


@pytest.fixture(scope="module")
def model() -> vitmodels.VisionModel:
    return vitmodels.load("toy/digits-2l")


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(3, 1, 20, 20, generator=torch.Generator().manual_seed(0))


def sae(site: str = SITE, writes: str | None = None, **options: object) -> Dictionary:
    sparsify: Sparsify = TopK(8)
    made = Dictionary(
        {site: 64},
        {writes: 64} if writes else None,
        latents=96,
        sparsify=sparsify,
        **options,  # type: ignore[arg-type]
    )
    with torch.no_grad():
        made.b_dec.normal_(generator=torch.Generator().manual_seed(1))
        if made.config.decode_scale:
            made.scale.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    return made


def test_steering_adds_the_decoder_direction_where_it_should(
    model: vitmodels.VisionModel, x: Tensor
) -> None:
    d = sae(decode_scale=True)
    with torch.no_grad():
        plain = model.run(x, SITE)[SITE]
        with model.editing(steer(model, d, {5: 2.0, 7: -1.0}, positions="patch")):
            got = model.run(x, SITE)[SITE]
        push = 2 * d.scale[5] * d.W_dec[5] - d.scale[7] * d.W_dec[7]
    assert torch.equal(got[:, :1], plain[:, :1])
    torch.testing.assert_close(got[:, 1:], plain[:, 1:] + push)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decode_scale": True, "latent_norm": True},
        {"input": Input(center="b_dec", norm="layer_norm", denormalize=True)},
        {"writes": "blocks.1.mlp_out", "site": "blocks.1.mlp_in", "skip": True},
    ],
    ids=["plain", "scales", "normalised", "transcoder"],
)
def test_a_clamp_changes_the_decoded_part_and_keeps_the_error(
    model: vitmodels.VisionModel, x: Tensor, options: dict[str, object]
) -> None:
    d = sae(**options)  # type: ignore[arg-type]
    read, write = next(iter(d.config.reads)), next(iter(d.config.writes))
    with torch.no_grad():
        plain = model.run(x, [read, write])
        rows = plain[read].flatten(0, 1)
        acts = d.encode(rows)
        latent = int((acts > 0).sum(0).argmax())
        new = acts.clone()
        new[:, latent] = 3.0
        change = (d.decode(new, rows) - d.decode(acts, rows)).view(plain[write].shape)
        edits = clamp(model, d, {latent: 3.0}, positions=[0, 4])
        with model.editing(edits):
            got = model.run(x, write)[write]
            again = model.run(x.flip(0), write)[write]
    moved = [0, 4]
    torch.testing.assert_close(got[:, moved], (plain[write] + change)[:, moved])
    torch.testing.assert_close(again, got.flip(0))
    still = [t for t in range(26) if t not in moved]
    assert torch.equal(got[:, still], plain[write][:, still])
    with torch.no_grad(), model.editing(clamp(model, d, {latent: float(acts[2, latent])})):
        same = model.run(x, write)[write]
    torch.testing.assert_close(same[0, 2], plain[write][0, 2])


def test_a_crosscoder_needs_the_values_of_a_plain_run(
    model: vitmodels.VisionModel, x: Tensor
) -> None:
    sites = {"blocks.0.resid_post": 64, SITE: 64}
    d = Dictionary(sites, latents=96, sparsify=TopK(8))
    with pytest.raises(ValueError, match=r"behind blocks.0.resid_post.*reads=model.run"):
        clamp(model, d, {1: 0.0})
    with torch.no_grad():
        reads = model.run(x, list(sites))
        rows = torch.cat([v.flatten(0, 1) for v in reads.values()], 1)
        acts = d.encode(rows)
        latent = int((acts > 0).sum(0).argmax())
        with model.editing(clamp(model, d, {latent: 0.0}, reads=reads)):
            got = model.run(x, "blocks.0.resid_post")["blocks.0.resid_post"]
        gone = (acts[:, latent, None] * d.W_dec[latent, :64]).view(got.shape)
    torch.testing.assert_close(got, reads["blocks.0.resid_post"] - gone)


def test_dictionaries_of_another_model_or_store(
    model: vitmodels.VisionModel, tmp_path: Path
) -> None:
    about = {"model": model.spec.to_json(), "store": "a" * 64}
    save(sae(), tmp_path / "mine", about)
    assert load_for(model, tmp_path / "mine").latents == 96
    with pytest.raises(ValueError, match=r"(?s)another model.*digits-2l.*digits-3l.*load that"):
        load_for(vitmodels.load("toy/digits-3l"), tmp_path / "mine")
    values = {SITE: {"patch": np.ones((4, 2, 64), np.float32)}}
    store = actstore.write_arrays(tmp_path / "acts.zarr", values)
    with pytest.raises(ValueError, match=f"fingerprint {'a' * 64}, not on .*{store.fingerprint}"):
        load_for(model, tmp_path / "mine", store)
    with pytest.raises(ValueError, match=r"takes 32 channels at .*has 64 there"):
        check_dictionary(model, Dictionary({SITE: 32}, latents=8, sparsify=TopK(2)))
    with pytest.raises(ValueError, match=r"no site matches 'blocks.7.resid_post'"):
        check_dictionary(model, sae("blocks.7.resid_post"))
    with pytest.raises(ValueError, match="no latent 96"):
        steer(model, sae(), {96: 1.0})
    with pytest.raises(ValueError, match="no latent was given"):
        clamp(model, sae(), {})


def test_a_probe_off_a_store_makes_a_head(tmp_path: Path) -> None:
    family = next(f for f in families() if f.name == "timm_vit")
    bare = vitmodels.wrap(family.conformance()["no_head"](), family="timm_vit", id="none/bare")
    width = bare.spec.d_model
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    features = (rng.normal(size=(3, width))[labels] + 0.3 * rng.normal(size=(90, width))).astype(
        np.float32
    )
    store = actstore.write_arrays(
        tmp_path / "a.zarr",
        {"pooled": {"item": features[:, None]}, "embed": {"patch": features[:, None]}},
        table={"label": labels},
    )
    weight, bias = fit_probe(store)
    guessed = (torch.from_numpy(features) @ weight.T + bias).argmax(1).numpy()
    assert (guessed == labels).mean() > 0.95
    model = with_probe(bare, weight, bias)
    assert model.sites()["logits"].shape == (3,)
    x = torch.randn(2, *bare.spec.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(x), bare(x) @ weight.T + bias)
        assert model.run(x, "logits")["logits"].shape == (2, 3)
    with pytest.raises(ValueError, match="has tokens"):
        fit_probe(store, "embed")
    with pytest.raises(ValueError, match="has a head of 3 classes"):
        with_probe(model, weight)
    with pytest.raises(ValueError, match="the probe takes 5 numbers"):
        with_probe(bare, torch.zeros(3, 5))
    nameless = actstore.write_arrays(tmp_path / "b.zarr", {"pooled": {"item": features[:, None]}})
    with pytest.raises(ValueError, match="no labels"):
        fit_probe(nameless)
