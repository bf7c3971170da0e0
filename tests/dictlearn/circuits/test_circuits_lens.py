"""Lenses: the last layer is the model, single tokens are read as defined, tuning lowers KL."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import actstore
import vitmodels
from actstore.manifest import FormatError
from dictlearn.circuits.lens import Tail, logit_lens, top_classes
from dictlearn.circuits.tuned_lens import LensConfig, TunedLens, fit_tuned_lens
from vitmodels.edits import replace
from vitmodels.registry import families
from vitmodels.weights import seeded


def variant(family: str, name: str) -> tuple[vitmodels.VisionModel, Tensor]:
    found = next(f for f in families() if f.name == family)
    with seeded(0):
        module = found.conformance()[name]()
    model = vitmodels.wrap(module, family=family, id=f"{family}/{name}")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, torch.randn(2, *model.spec.input_shape, generator=generator)


@pytest.mark.parametrize(
    ("family", "name", "reads"),
    [
        ("timm_vit", "plain", "class token"),
        ("timm_vit", "registers", "class token"),
        ("timm_vit", "no_cls_gap", "patches"),
        ("timm_vit", "siglip_map", "patches"),
        ("timm_beit", "relative", "patches"),
        ("timm_vit", "distilled", "class token"),
        ("hf_vit", "classifier", "class token"),
        ("hf_dinov2", "registers_classifier", "all tokens"),
        ("hf_vivit", "classifier", "class token"),
        ("hf_timesformer", "divided", "class token"),
        ("hf_videomae", "mean_classifier", "patches"),
    ],
)
def test_the_lens_at_the_last_layer_is_the_model(family: str, name: str, reads: str) -> None:
    model, x = variant(family, name)
    lens = logit_lens(model, x, at_once=40)
    assert lens.attrs["reads"] == reads
    with torch.no_grad():
        logits = model(x)
    last = lens["logit"].isel(layer=-1)
    assert last.dims == ("item", "class")
    assert last.values == pytest.approx(logits.numpy(), abs=1e-4)
    # an inner layer's stream, put in place of the last one in a whole pass
    sites = [n for n in model.anatomy.taps if n.endswith("resid_post")]
    with torch.no_grad():
        stream = model.run(x, sites[0])[sites[0]]
        with model.editing({sites[-1]: replace(stream)}):
            wanted = model(x)
        assert lens["logit"].isel(layer=0).values == pytest.approx(wanted.numpy(), abs=1e-4)
        token = 3
        alone = stream[:, token : token + 1].expand_as(stream)
        with model.editing({sites[-1]: replace(alone)}):
            wanted = model(x)
    got = lens["token"].isel(layer=0, position=token)
    assert got.values == pytest.approx(wanted.numpy(), abs=1e-4)
    assert lens["token"].sizes["position"] == stream.shape[1]
    assert not [m for m in model.module.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_tokens_of_a_linear_head_by_hand() -> None:
    model = vitmodels.load("toy/digits-2l")
    x = torch.randn(2, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    names = [f"digit {i}" for i in range(10)]
    lens = logit_lens(model, x, "blocks.0.resid_{pre,mid,post}", class_names=names, keep=[1, 8])
    assert lens["class"].values.tolist() == ["digit 1", "digit 8"]
    with torch.no_grad():
        stream = model.run(x, "blocks.0.resid_mid")["blocks.0.resid_mid"]
        wanted = model.module.head(model.module.norm(stream))[..., [1, 8]]
    assert lens["token"].isel(layer=1).values == pytest.approx(wanted.numpy(), abs=1e-4)
    assert lens["site"].values[1] == "blocks.0.resid_mid"
    assert lens["kind"].values[:2].tolist() == ["cls", "patch"]
    tops = top_classes(lens, 1)
    assert tops["name"].sizes == {"item": 2, "layer": 3, "position": 26, "rank": 1}
    best = int(wanted[1, 4].argmax())
    assert tops["name"].isel(item=1, layer=1, position=4, rank=0) == f"digit {[1, 8][best]}"
    assert float(tops["probability"].isel(item=1, layer=1, position=4, rank=0)) == pytest.approx(
        float(wanted[1, 4].softmax(-1).max()), abs=1e-5
    )


def test_bad_input_says_what_to_do() -> None:
    swin, x = variant("timm_swin", "v1")
    with pytest.raises(ValueError, match=r"blocks.0.resid_post .*the head cannot read it"):
        logit_lens(swin, x)
    bare, x = variant("timm_vit", "no_head")
    with pytest.raises(ValueError, match=r"no classification head.*probe.*load_zero_shot"):
        logit_lens(bare, x)
    model, x = variant("timm_vit", "plain")
    with pytest.raises(ValueError, match="cannot read"):
        logit_lens(model, x, "blocks.0.mlp_out")
    with pytest.raises(ValueError, match="3 class names for 7 classes"):
        logit_lens(model, x, class_names=["a", "b", "c"])
    with pytest.raises(ValueError, match="class 7 is not among the 7"):
        logit_lens(model, x, keep=[7])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> actstore.Store:
    return actstore.harvest(
        model=vitmodels.load("toy/digits-2l"),
        data="digits",
        sites="blocks.*.resid_post",
        out=tmp_path_factory.mktemp("lens") / "acts.zarr",
        limit=400,
    )


def test_a_tuned_lens_is_nearer_to_the_model_than_the_logit_lens(
    store: actstore.Store, tmp_path: Path
) -> None:
    model = vitmodels.load("toy/digits-2l")
    config = LensConfig(steps=60, batch_size=128, lr=3e-3, holdout=0.2)
    lens, found = fit_tuned_lens(model, store, config=config)
    assert found["layer"].values.tolist() == [0]
    assert float(found["tuned_lens"][0]) < 0.7 * float(found["logit_lens"][0])
    path = lens.save(tmp_path / "lens.safetensors")
    again = TunedLens.load(path, model)
    x = torch.randn(2, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    tuned = logit_lens(model, x, translate=again)
    plain = logit_lens(model, x)
    assert np.array_equal(tuned["logit"].isel(layer=1), plain["logit"].isel(layer=1))
    assert not np.allclose(tuned["logit"].isel(layer=0), plain["logit"].isel(layer=0))
    with torch.no_grad():
        site = "blocks.0.resid_post"
        stream = model.run(x, site)[site]
        a, b = lens.maps[site]
        wanted = Tail(model)(stream + stream @ a.T + b)
    assert tuned["logit"].isel(layer=0).values == pytest.approx(wanted.numpy(), abs=1e-4)
    other = vitmodels.load("toy/digits-2l", pretrained=False, seed=3)
    with pytest.raises(ValueError, match=r"belongs to toy/digits-2l.*train one by fit_tuned_lens"):
        TunedLens.load(path, other)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "no.safetensors")
    with pytest.raises(FormatError, match="no tuned lens"):
        TunedLens.load(tmp_path / "no.safetensors")


def test_what_a_tuned_lens_needs(store: actstore.Store, tmp_path: Path) -> None:
    model = vitmodels.load("toy/digits-2l")
    with pytest.raises(ValueError, match="last layer itself"):
        fit_tuned_lens(model, store, "blocks.1.resid_post")
    with pytest.raises(ValueError, match="not the one"):
        fit_tuned_lens(vitmodels.load("toy/digits-2l", pretrained=False, seed=3), store)
    short = actstore.harvest(
        model=model,
        data="digits",
        sites="blocks.0.resid_post",
        out=tmp_path / "short.zarr",
        limit=20,
    )
    with pytest.raises(ValueError, match=r"does not hold blocks.1.resid_post.*Harvest it too"):
        fit_tuned_lens(model, short)
    with pytest.raises(ValueError, match="holdout must be a fraction"):
        LensConfig(holdout=1.0)
