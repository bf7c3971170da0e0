"""open_clip: towers equal the library's own, with the weights, activation and pixels of a tag."""

import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import vitmodels
from vitmodels import open_clip_names
from vitmodels.registry import resolve

open_clip = pytest.importorskip("open_clip")

TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
TOWER = {"image_size": 32, "layers": 2, "width": 24, "head_width": 6, "patch_size": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 20, "vision_cfg": TOWER, "text_cfg": TEXT},
    "tiny-quickgelu": {
        "embed_dim": 20,
        "quick_gelu": True,
        "vision_cfg": TOWER,
        "text_cfg": TEXT,
    },
    "tiny-coca": {
        "embed_dim": 20,
        "vision_cfg": {
            **TOWER,
            "attentional_pool": True,
            "attn_pooler_heads": 4,
            "output_tokens": True,
        },
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
        "custom_text": True,
    },
    "tiny-timm": {
        "embed_dim": 192,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 224,
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "token",
            "timm_proj": "none",
        },
        "text_cfg": {**TEXT, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
}


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Register small configurations, and write a checkpoint of each as open_clip saves it."""
    path = tmp_path_factory.mktemp("open_clip")
    (path / "configs").mkdir()
    for name, config in CONFIGS.items():
        (path / "configs" / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(path / "configs")
    fast = torch.backends.mha.get_fastpath_enabled()
    for name in CONFIGS:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            clip = open_clip.create_model(name)
            with torch.no_grad():
                for parameter in clip.parameters():
                    parameter.add_(0.05 * torch.randn(parameter.shape))
        save_file(clip.state_dict(), path / f"{name}.safetensors")
    yield path
    for name in CONFIGS:  # open_clip has no way to take a configuration back
        open_clip.factory._MODEL_CONFIGS.pop(name)
    open_clip.factory._MODEL_CONFIG_PATHS.remove(path / "configs")
    torch.backends.mha.set_fastpath_enabled(fast)


def theirs(folder: Path, name: str, **options: Any) -> nn.Module:
    """Build by open_clip, frozen as ours are: torch folds a batch into the rows of a matrix
    product where the weights require gradients, and that moves the last bits."""
    torch.backends.mha.set_fastpath_enabled(False)
    clip = open_clip.create_model(name, pretrained=str(folder / f"{name}.safetensors"), **options)
    return clip.eval().requires_grad_(False)


def ours(folder: Path, name: str, **options: Any) -> vitmodels.VisionModel:
    return vitmodels.load(f"open_clip/{name}", weights=folder / f"{name}.safetensors", **options)


def pixels(size: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def tokens() -> Tensor:
    return open_clip.tokenize(["a cat", "two dogs"], context_length=8)


def encode_image(clip: nn.Module, x: Tensor) -> Tensor:
    return clip.encode_image(x, normalize=False)


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_are_open_clips_to_the_last_bit(folder: Path, name: str) -> None:
    x = pixels(CONFIGS[name]["vision_cfg"]["image_size"])
    model, clip = ours(folder, name), theirs(folder, name)
    with torch.no_grad():
        expected = encode_image(clip, x)
        assert torch.equal(model(x), expected)
        (got,) = model.run(x, "projection", stop_early=False).values()
        assert torch.equal(got, expected)
        text = vitmodels.load(f"open_clip_text/{name}", weights=folder / f"{name}.safetensors")
        assert torch.equal(text(tokens()), clip.encode_text(tokens(), normalize=False))


def test_quick_gelu_is_not_gelu(folder: Path) -> None:
    state = folder / "tiny.safetensors"
    plain = vitmodels.load("open_clip/tiny", weights=state)
    quick = vitmodels.load("open_clip/tiny-quickgelu", weights=state)
    with torch.no_grad():
        difference = (plain(pixels()) - quick(pixels())).abs().max()
    assert difference > 1e-4


def _activation(model: vitmodels.VisionModel) -> str:
    return type(model.module.transformer.resblocks[0].mlp.gelu).__name__


@pytest.mark.parametrize(
    ("id", "activation"),
    [
        ("ViT-B-32@openai", "QuickGELU"),
        ("ViT-B-32-quickgelu@openai", "QuickGELU"),
        ("ViT-B-32@laion2b_s34b_b79k", "GELU"),
        ("ViT-B-32@laion400m_e32", "QuickGELU"),
        ("ViT-B-16@laion400m_e32", "GELU"),
        ("ViT-L-14@metaclip_fullcc", "QuickGELU"),
        ("ViT-H-14@dfn5b", "QuickGELU"),
        ("ViT-H-14-378@dfn5b", "QuickGELU"),
        ("roberta-ViT-B-32@laion2b_s12b_b32k", "QuickGELU"),
        ("ViT-B-32", "GELU"),
        ("ViT-B-32-quickgelu", "QuickGELU"),
    ],
)
def test_the_tag_decides_the_activation(id: str, activation: str) -> None:
    assert _activation(vitmodels.load(f"open_clip/{id}", device="meta")) == activation


def test_every_tag_has_the_activation_of_open_clips_table() -> None:
    for config, tag in open_clip.list_pretrained():
        told = open_clip.get_pretrained_cfg(config, tag)
        own = open_clip.get_model_config(config).get("quick_gelu", False)
        known = open_clip_names.checkpoint(f"{config}@{tag}")
        assert known.model_cfg["quick_gelu"] == told.get("quick_gelu", own)


def test_plain_hooked_tapped_and_differentiated_passes_agree(folder: Path) -> None:
    torch.backends.mha.set_fastpath_enabled(True)
    model, x = ours(folder, "tiny"), pixels()
    assert not torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        plain = model(x)
        hooked = model.run(x, "blocks.*.resid_post,projection", stop_early=False)["projection"]
        tapped = model.run(x, "blocks.*.pattern,blocks.*.z,projection")["projection"]
    differentiated = model(x.requires_grad_(True))
    for other in (hooked, tapped, differentiated):
        assert torch.equal(plain, other)


def test_heads_sum_to_the_attention(folder: Path) -> None:
    model, x = ours(folder, "tiny"), pixels()
    bias = model.module.transformer.resblocks[1].attn.out_proj.bias
    with torch.no_grad():
        acts = model.run(x, "blocks.1.{attn_in,q,k,v,z,head_out,attn_out}")
        total = acts["blocks.1.head_out"].sum(-2) + bias
        torch.testing.assert_close(total, acts["blocks.1.attn_out"], rtol=1e-4, atol=1e-6)

        def first_only(heads: Tensor) -> Tensor:
            heads[:, :, 1:] = 0
            return heads

        with model.editing({"blocks.1.head_out": first_only}):
            edited = model.run(x, "blocks.1.{z,attn_out}")
    expected = acts["blocks.1.head_out"][:, :, 0] + bias
    torch.testing.assert_close(edited["blocks.1.attn_out"], expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(edited["blocks.1.z"], acts["blocks.1.z"])


def test_one_edit_of_the_norm_reaches_query_key_and_value(folder: Path) -> None:
    model, x = ours(folder, "tiny"), pixels()
    with torch.no_grad(), model.editing({"blocks.0.attn_in": torch.zeros_like}):
        acts = model.run(x, "blocks.0.{q,k,v}")
    q, k, v = model.module.transformer.resblocks[0].attn.in_proj_bias.chunk(3)
    for part, bias in zip("qkv", (q, k, v), strict=True):
        value = acts[f"blocks.0.{part}"].flatten(-2)
        torch.testing.assert_close(value, bias.expand_as(value))


def test_a_file_with_one_tower_is_enough(folder: Path, tmp_path: Path) -> None:
    clip = theirs(folder, "tiny")
    save_file(clip.visual.state_dict(), tmp_path / "visual.safetensors")
    alone = vitmodels.load("open_clip/tiny", weights=tmp_path / "visual.safetensors")
    whole = ours(folder, "tiny")
    assert alone.spec == whole.spec
    assert alone.spec.weights.startswith("sha256:")


def test_another_size_is_resampled_as_open_clip_does(folder: Path) -> None:
    model = ours(folder, "tiny", img_size=48)
    clip = theirs(folder, "tiny", force_image_size=48)
    assert model.spec.grid.patch == (6, 6)
    with torch.no_grad():
        assert torch.equal(model(pixels(48)), encode_image(clip, pixels(48)))
    assert model.transform(Image.new("RGB", (90, 60))).shape == (3, 48, 48)


@pytest.mark.parametrize(
    ("id", "expected"),
    [
        ("ViT-B-32@laion2b_s34b_b79k", "shortest"),
        ("ViT-L-14@laion2b_s32b_b82k", "shortest"),
        ("ViT-L-14-CLIPA@datacomp1b", "squash"),
        ("ViT-H-14@dfn5b", "squash"),
        ("ViT-B-16-SigLIP2-256@webli", "squash"),
    ],
)
def test_preprocessing_is_open_clips(id: str, expected: str) -> None:
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    model = vitmodels.load(f"open_clip/{id}", device="meta")
    config, tag = id.split("@")
    told = open_clip.get_pretrained_cfg(config, tag)
    size = open_clip.get_model_config(config)["vision_cfg"]["image_size"]
    merged = {**merge_preprocess_dict(PreprocessCfg(), told), "size": size}
    reference = image_transform_v2(PreprocessCfg(**merged), is_train=False)
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    assert torch.equal(model.transform(image), reference(image))
    assert torch.equal(pickle.loads(pickle.dumps(model.transform))(image), reference(image))
    assert model.transform.describe()["resize_mode"] == expected


def test_coca_pools_by_queries(folder: Path) -> None:
    model = ours(folder, "tiny-coca")
    sites = model.sites()
    assert sites["pool_tokens"].shape == (256, 20)
    assert sites["pool_tokens"].kinds == ("cls", "register")
    assert sites["pooled"].shape == (20,)
    assert "final" not in sites


def test_a_whole_clip_can_be_wrapped(folder: Path) -> None:
    clip = theirs(folder, "tiny")
    model = vitmodels.wrap(clip)
    assert model.spec.family == "open_clip_vit"
    with torch.no_grad():
        assert torch.equal(model(pixels()), encode_image(clip, pixels()))


def test_timm_trunks_keep_their_sites(folder: Path) -> None:
    model = ours(folder, "tiny-timm")
    assert model.spec.family == "open_clip_timm"
    sites = model.sites()
    assert "logits" not in sites
    assert sites["blocks.11.pattern"].shape == (3, 197, 197)
    assert sites["projection"].shape == (192,)


def test_big_towers_build_without_memory() -> None:
    model = vitmodels.load("open_clip/ViT-bigG-14@laion2b_s39b_b160k", device="meta")
    assert len(model.sites()) > 700
    eva = vitmodels.load("open_clip/EVA02-E-14-plus@laion2b_s9b_b144k", device="meta")
    assert eva.sites()["projection"].shape == (1024,)


# Bad input


def test_weights_that_do_not_fit_name_the_first_key(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"does not fit open_clip/ViT-S-32: .*\(24,\)"):
        vitmodels.load("open_clip/ViT-S-32", weights=folder / "tiny.safetensors")
    with pytest.raises(ValueError, match=r"does not fit open_clip/tiny-coca: .*missing"):
        vitmodels.load("open_clip_text/tiny-coca", weights=folder / "tiny.safetensors")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.safetensors"):
        vitmodels.load("open_clip/tiny", weights=tmp_path / "no.safetensors")


def test_an_unreachable_hub_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> str:
        raise FileNotFoundError("Failed to download file (open_clip_model.safetensors)")

    monkeypatch.setattr(open_clip, "download_pretrained", refuse)
    with pytest.raises(FileNotFoundError) as error:
        vitmodels.load("open_clip/ViT-B-32@laion2b_s34b_b79k")
    for word in ("ViT-B-32@laion2b_s34b_b79k", "Failed to download", "weights=", "HF_HUB_CACHE"):
        assert word in str(error.value)


def test_the_right_repository_is_asked_where_open_clips_table_errs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def record(cfg: dict[str, Any], **options: Any) -> str:
        asked.append(cfg["hf_hub"])
        raise FileNotFoundError("no hub here")

    monkeypatch.setattr(open_clip, "download_pretrained", record)
    for tag in ("laion400m_e31", "laion400m_e32"):
        with pytest.raises(FileNotFoundError):
            vitmodels.load(f"open_clip/ViT-B-16-plus-240@{tag}")
    assert [hub.rstrip("/").rpartition("_")[2] for hub in asked] == ["e31", "e32"]


@pytest.mark.parametrize(
    ("id", "message"),
    [
        ("open_clip/ViT-B-32", "names no checkpoint; tags: openai"),
        ("open_clip/ViT-B-32@laion2b_s34b_b79", "no checkpoint .*tags: .*laion2b_s34b_b79k"),
        ("open_clip/RN50@openai", "ResNet"),
        ("open_clip/convnext_base@laion400m_s13b_b51k", "timm's convnext_base"),
        ("open_clip/ViT-B-33", "no configuration 'ViT-B-33'; nearest: .*ViT-B-32"),
        ("open_clip_text/roberta-ViT-B-32", "roberta-base of transformers"),
    ],
)
def test_names_that_cannot_be_served(id: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vitmodels.load(id)


def test_everything_else_works_where_open_clip_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "open_clip"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert vitmodels.list_models("open_clip/*")  # verified names are shown; loading says what to do
    assert vitmodels.list_models("toy/*")
    for id in (
        "open_clip/ViT-B-32@openai",
        "open_clip_text/ViT-B-32",
        "open-clip:laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    ):
        with pytest.raises(
            ValueError, match=r"not installed; run: pip install 'actstore\[openclip"
        ):
            vitmodels.load(id)
    with pytest.raises(ValueError, match="no family describes"):
        vitmodels.wrap(nn.Linear(2, 2))


def test_open_clips_own_spelling_of_a_tag_is_understood() -> None:
    assert resolve("open_clip/ViT-B-32:laion2b_s34b_b79k")[0].name == "open_clip_vit"
    model = vitmodels.load("open_clip/ViT-B-32:laion2b-s34b-b79k", device="meta")
    assert model.spec.d_model == 768


@pytest.mark.parametrize(
    ("name", "width", "length", "kinds"),
    [
        ("ViT-B-32@openai", 512, 77, ("patch",)),
        ("coca_ViT-B-32@laion2b_s13b_b90k", 512, 77, ("patch", "cls")),
        ("EVA02-B-16@merged2b_s8b_b131k", 512, 77, ("patch",)),
        ("ViT-B-16-SigLIP@webli", 768, 64, ("patch",)),
        ("TinyCLIP-ViT-61M-32@laion400m", 512, 77, ("patch",)),
    ],
)
def test_text_towers_build_without_memory(
    name: str, width: int, length: int, kinds: tuple[str, ...]
) -> None:
    text = vitmodels.load(f"open_clip_text/{name}", device="meta")
    assert (text.spec.d_model, text.spec.grid.n_tokens) == (width, length)
    assert text.spec.grid.kinds == kinds
    sites = text.sites()
    assert sites["text.blocks.0.resid_post"].shape == (length, width)
    image = vitmodels.load(f"open_clip/{name}", device="meta")
    assert image.sites()["projection"].shape == sites["text.projection"].shape
