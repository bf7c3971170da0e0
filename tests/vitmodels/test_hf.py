"""Models of transformers: loading from folders, files and nowhere; preprocessing; outputs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hf_offline import offline, save  # noqa: F401 - offline is a fixture that applies by itself
from PIL import Image
from torch import Tensor

import vitmodels
from vitmodels import hf_backend
from vitmodels.hf_backend import HFFamily, small
from vitmodels.registry import families, resolve

transformers = pytest.importorskip("transformers")

HF = {family.name: family for family in families() if isinstance(family, HFFamily)}
IDS = {
    "hf_vit": "google/vit-base-patch16-224",
    "hf_dinov2": "facebook/dinov2-small",
    "hf_dinov3": "facebook/dinov3-vits16-pretrain-lvd1689m",
    "hf_clip": "openai/clip-vit-base-patch32",
    "hf_siglip": "google/siglip-base-patch16-224",
    "hf_beit": "microsoft/beit-base-patch16-224",
    "hf_vivit": "google/vivit-b-16x2-kinetics400",
    "hf_videomae": "MCG-NJU/videomae-small-finetuned-ssv2",
    "hf_vjepa2": "facebook/vjepa2-vitl-fpc16-256-ssv2",
    "hf_timesformer": "facebook/timesformer-base-finetuned-k400",
    "hf_xclip": "microsoft/xclip-base-patch32",
}
SMALL = {"image_size": 32, "patch_size": 8, "intermediate_size": 48}
VARIANTS = [(name, variant) for name, family in HF.items() for variant in family.conformance()]


def outputs(model: vitmodels.VisionModel) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, *model.spec.input_shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        last = f"blocks.{model.spec.n_layers - 1}.resid_post"
        return model(x), model.run(x, last, stop_early=False)[last]


def test_every_family_is_tried_here() -> None:
    assert set(IDS) == set(HF)


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_a_folder_that_the_library_wrote_loads_to_the_same_model(
    name: str, variant: str, tmp_path: Path
) -> None:
    module = HF[name].conformance()[variant]()
    want = outputs(vitmodels.wrap(module, id="direct"))
    save(module, tmp_path)
    by_id = vitmodels.load(f"hf/{IDS[name]}", weights=tmp_path)
    assert type(by_id.module) is type(module)
    by_folder = vitmodels.load("hf/mine/finetuned", weights=tmp_path)
    for model in (by_id, by_folder):
        for got, expected in zip(outputs(model), want, strict=True):
            assert torch.equal(got, expected)
        assert model.spec.weights == by_id.spec.weights
    assert by_id.spec.family == name
    assert by_folder.spec.id == "hf/mine/finetuned"


def test_one_file_of_weights_fits_the_configuration_of_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = hf_backend.Checkpoint(
        cls="ViTForImageClassification",
        config={**SMALL, "hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2},
        processor={"size": {"height": 32, "width": 32}},
    )
    family = HF["hf_vit"]
    monkeypatch.setattr(type(family), "checkpoints", {**family.checkpoints, "a/b": row})
    module = small("ViTForImageClassification", num_hidden_layers=2, **SMALL)()
    save(module, tmp_path)
    model = vitmodels.load("hf/a/b", weights=tmp_path / "model.safetensors")
    for got, want in zip(outputs(model), outputs(vitmodels.wrap(module)), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match=r"is no verified id.*nearest verified ids: google/vit-"):
        vitmodels.load("hf/google/vit-base-p16-224", weights=tmp_path / "model.safetensors")


def test_the_tower_is_taken_out_of_a_whole_clip(tmp_path: Path) -> None:
    sizes = {**SMALL, "hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = {**sizes, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config={k: v for k, v in text.items() if k not in ("image_size", "patch_size")},
        vision_config={**sizes, "projection_dim": 20},
        projection_dim=20,
    )
    whole = hf_backend.randomised(transformers.CLIPModel(config)).eval()
    save(whole, tmp_path)
    model = vitmodels.load("hf/openai/clip-vit-base-patch32", weights=tmp_path)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = whole.visual_projection(whole.vision_model(x).pooler_output)
    assert torch.equal(model.run(x, "projection")["projection"], want)


def test_the_tower_is_taken_out_of_a_whole_xclip(tmp_path: Path) -> None:
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    sizes |= {"intermediate_size": 48}
    mit = {"mit_hidden_size": 20, "mit_num_attention_heads": 4, "mit_intermediate_size": 40}
    video = {**sizes, "num_frames": 3, "image_size": 32, "patch_size": 8}
    config = transformers.XCLIPConfig(
        text_config={**sizes, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**video, **mit},
        projection_dim=20,
    )
    whole = hf_backend.randomised(transformers.XCLIPModel(config)).eval()
    save(whole, tmp_path)
    for id in ("hf/microsoft/xclip-base-patch32", "hf/mine/xclip"):
        model = vitmodels.load(id, weights=tmp_path)
        x = torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            want = whole.vision_model(x.flatten(0, 1)).pooler_output.reshape(2, 3, 24)
            acts = model.run(x, "blocks.*.message.*,pooled", stop_early=False)
        assert torch.equal(model(x), want)
        assert torch.equal(acts["pooled"], want)
        first = acts["blocks.0.message.attn_in"]
        # Equal but for the last bits: threads may sum the frames in another order.
        torch.testing.assert_close(first[:, 0], first[:, 2], atol=1e-6, rtol=1e-5)
        later = acts["blocks.1.message.attn_in"]
        assert not torch.allclose(later[:, 0], later[:, 2])


def test_the_encoder_is_taken_out_of_a_pretraining_model(tmp_path: Path) -> None:
    """As published: ``facebook/vit-mae-base`` has its decoder, ``MCG-NJU/videomae-base`` too."""
    decoder = {"decoder_hidden_size": 24, "decoder_num_hidden_layers": 1}
    decoder |= {"decoder_num_attention_heads": 4, "decoder_intermediate_size": 48}
    whole = small("ViTMAEForPreTraining", **SMALL, **decoder)()
    save(whole, tmp_path / "mae")
    model = vitmodels.load("hf/facebook/vit-mae-base", weights=tmp_path / "mae")
    other = vitmodels.load("hf/some/mae", weights=tmp_path / "mae")
    assert type(model.module).__name__ == type(other.module).__name__ == "ViTMAEModel"
    state = whole.vit.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.module.state_dict().items())
    video = {**SMALL, **decoder, "num_frames": 4, "use_mean_pooling": False}
    whole = small("VideoMAEForPreTraining", **video)()
    save(whole, tmp_path / "videomae")
    model = vitmodels.load("hf/MCG-NJU/videomae-base", weights=tmp_path / "videomae")
    state = whole.videomae.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.module.state_dict().items())


def test_mae_keeps_every_patch_in_order() -> None:
    model = vitmodels.wrap(small("ViTMAEModel", **SMALL)())
    ratio = model.module.config.mask_ratio
    plain = small("ViTModel", options={"add_pooling_layer": False}, **SMALL)()
    plain.load_state_dict(model.module.state_dict())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    got = model.run(x, "final")["final"]
    assert torch.equal(got, vitmodels.wrap(plain).run(x, "final")["final"])
    assert model.module.config.mask_ratio == ratio > 0


@pytest.mark.parametrize("name", ["hf_vit", "hf_clip", "hf_vjepa2"])
def test_random_weights_depend_on_the_seed_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = next(iter(HF[name].conformance().values()))
    config = make().config.to_diff_dict()
    row = hf_backend.Checkpoint(cls=HF[name].classes[0], config=config)
    monkeypatch.setattr(type(HF[name]), "checkpoints", {"a/b": row})
    digests = [
        vitmodels.load("hf/a/b", pretrained=False, seed=seed).spec.weights for seed in (0, 0, 1)
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(("name", "id"), IDS.items())
def test_verified_ids_list_their_sites_without_memory(name: str, id: str) -> None:
    """One id a family; the table of all models builds every one of them."""
    model = vitmodels.load(f"hf/{id}", device="meta")
    assert model.spec.family == name
    assert model.spec.weights == "meta"
    sites = model.sites()
    last = f"blocks.{model.spec.n_layers - 1}.resid_post"
    assert sites[last].shape == (model.spec.grid.n_tokens, model.spec.d_model)
    assert resolve(id) == (HF[name], id), "the bare id of the hub serves too"


# Preprocessing


def picture(height: int = 61, width: int = 83) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_preprocessing_is_that_of_the_folder(tmp_path: Path) -> None:
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 40},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.1, 0.2, 0.3],
        image_std=[0.5, 0.6, 0.7],
    )
    folder = save(small("ViTModel", **SMALL)(), tmp_path, processor)
    model = vitmodels.load("hf/google/vit-base-patch16-224-in21k", weights=folder)
    want = processor(images=picture(), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(model.transform(picture()), want)
    told = model.spec.transform
    assert told["image_mean"] == [0.1, 0.2, 0.3]
    assert told["size"] == {"shortest_edge": 40}
    grey = Image.fromarray(np.arange(61 * 83, dtype=np.uint8).reshape(61, 83))
    assert model.transform(grey).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("id", "mean", "size"),
    [
        ("google/vit-base-patch16-224", 0.5, {"height": 224, "width": 224}),
        ("facebook/dino-vits8", 0.485, {"height": 224, "width": 224}),
        ("facebook/dinov2-base", 0.485, {"shortest_edge": 256}),
        ("openai/clip-vit-large-patch14-336", 0.48145466, {"shortest_edge": 336}),
        ("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", 0.5, {"shortest_edge": 224}),
        ("google/siglip2-base-patch16-384", 0.5, {"height": 384, "width": 384}),
        ("facebook/deit-base-distilled-patch16-384", 0.485, {"height": 438, "width": 438}),
        ("facebook/vjepa2-vitg-fpc64-384", 0.485, {"shortest_edge": 438}),
        ("facebook/timesformer-hr-finetuned-k400", 0.45, {"shortest_edge": 448}),
    ],
)
def test_preprocessing_of_ids(id: str, mean: float, size: dict[str, int]) -> None:
    told = vitmodels.load(f"hf/{id}", device="meta").spec.transform
    assert told["image_mean"][0] == pytest.approx(mean)
    assert told["size"] == size


def test_the_transform_gives_what_the_model_takes() -> None:
    for id in ("facebook/dinov2-small", "openai/clip-vit-base-patch32"):
        model = vitmodels.load(f"hf/{id}", device="meta")
        assert tuple(model.transform(picture()).shape) == model.spec.input_shape


# Other sizes of the input


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("hf_vit", "classifier"),
        ("hf_vit", "deit_distilled"),
        ("hf_vit", "mae"),
        ("hf_vit", "ijepa"),
        ("hf_clip", "projection"),
        ("hf_siglip", "pooled"),
        ("hf_dinov2", "registers"),
        ("hf_dinov3", "plain"),
        ("hf_beit", "classifier"),
    ],
)
def test_another_image_size_is_resampled_by_the_library(
    name: str, variant: str, tmp_path: Path
) -> None:
    module = HF[name].conformance()[variant]()
    save(module, tmp_path)
    model = vitmodels.load("hf/mine/model", weights=tmp_path, img_size=(48, 64))
    assert model.spec.input_shape == (3, 48, 64)
    assert model.spec.grid.patch == (6, 8)
    assert tuple(model.transform(picture()).shape) == (3, 48, 64)
    x = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        acts = model.run(x, list(model.sites()), stop_early=False)
        out = model(x)
    assert torch.isfinite(out).all()
    assert acts["embed"].shape[1] == model.spec.grid.n_tokens
    if "pos_embed" in acts and name not in ("hf_dinov2", "hf_vit"):
        pytest.fail("resampled positions of this family are not tapped")
    if "pos_embed" in acts:
        prefix = model.spec.grid.cls
        patches = acts["patch_embed"] + acts["pos_embed"][:, prefix:]
        torch.testing.assert_close(
            acts["embed"][:, model.spec.grid.slice("patch")], patches, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    "name", ["hf_vivit", "hf_videomae", "hf_vjepa2", "hf_timesformer", "hf_xclip"]
)
def test_video_models_refuse_another_size(name: str, tmp_path: Path) -> None:
    save(next(iter(HF[name].conformance().values()))(), tmp_path)
    with pytest.raises(ValueError, match=r"takes inputs of 32 x 32 only.*img_size=64"):
        vitmodels.load("hf/mine/video", weights=tmp_path, img_size=64)


# Numbers


def test_quick_gelu_is_that_of_the_library() -> None:
    """The towers run as the library builds them: the difference is none at all."""
    model = vitmodels.wrap(HF["hf_clip"].conformance()["projection"]())
    assert model.module.config.hidden_act == "quick_gelu"
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sites = ["blocks.*.mlp_pre", "blocks.*.mlp_post", "projection"]
    with torch.no_grad():
        want = model.module(pixel_values=x).image_embeds
        acts = model.run(x, sites, stop_early=False)
    assert torch.equal(model(x), want)
    assert torch.equal(acts["projection"], want)
    pre, post = acts["blocks.1.mlp_pre"], acts["blocks.1.mlp_post"]
    torch.testing.assert_close(post, pre * torch.sigmoid(1.702 * pre))
    assert (post - torch.nn.functional.gelu(pre)).abs().max() > 1e-3


def test_final_of_clip_norms_every_token() -> None:
    model = vitmodels.wrap(HF["hf_clip"].conformance()["projection"]())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        acts = model.run(x, "blocks.2.resid_post,final,pooled", stop_early=False)
        want = model.module.vision_model.post_layernorm(acts["blocks.2.resid_post"])
    assert torch.equal(acts["final"][:, 0], acts["pooled"])
    torch.testing.assert_close(acts["final"], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(HF))
def test_reads_and_edits_work_in_half_precision(name: str) -> None:
    module = next(iter(HF[name].conformance().values()))().to(torch.bfloat16)
    model = vitmodels.wrap(module)
    x = torch.randn(1, *model.spec.input_shape, generator=torch.Generator().manual_seed(0))
    sites = [s for s in model.sites() if s.startswith("blocks.1.")]
    with torch.no_grad():
        plain = model(x)
        acts = model.run(x, sites)
        assert all(a.dtype == torch.bfloat16 for a in acts.values())
        with model.editing({"blocks.1.resid_post": lambda a: a * 2}):
            assert not torch.equal(model(x), plain)
        assert torch.equal(model(x), plain)
