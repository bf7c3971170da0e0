"""The same weights through timm and through transformers: the residual streams agree.

At the native size: the two libraries resample positions differently. The names of one library's
tensors are translated here, and nowhere in the package.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vitmodels
from vitmodels.hf_backend import small
from vitmodels.model import VisionModel

pytest.importorskip("transformers")

State = dict[str, Tensor]
DEPTH, HEADS, WIDTH = 3, 4, 24
SIZES: dict[str, Any] = {"image_size": 32, "patch_size": 8}
TIMM: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "mlp_ratio": 2.0,
}


def blocks(state: State, where: str, names: dict[str, str], qkv: str) -> State:
    """Return the blocks by timm's names: the three projections packed, the rest renamed."""
    found: State = {}
    for i in range(DEPTH):
        block = f"{where}.{i}."
        for kind in ("weight", "bias"):
            parts = [state[f"{block}{qkv}.{p}_proj.{kind}"] for p in "qkv"]
            found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            for timm, other in names.items():
                found[f"blocks.{i}.{timm}.{kind}"] = state[f"{block}{other}.{kind}"]
    return found


MLP = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
VIT = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    **MLP,
}


def vit(state: State, top: str = "vit") -> State:
    embed = f"{top}.embeddings"
    found = blocks(state, f"{top}.layers", VIT, "attention")
    for kind in ("weight", "bias"):
        patch = state[f"{embed}.patch_embeddings.projection.{kind}"]
        found[f"patch_embed.proj.{kind}"] = patch
        found[f"norm.{kind}"] = state[f"{top}.layernorm.{kind}"]
    found["cls_token"] = state[f"{embed}.cls_token"]
    found["pos_embed"] = state[f"{embed}.position_embeddings"]
    return found


def vit_classifier(state: State) -> State:
    heads = {f"head.{kind}": state[f"classifier.{kind}"] for kind in ("weight", "bias")}
    return vit(state) | heads


def deit(state: State) -> State:
    found = vit(state, "deit")
    found["dist_token"] = state["deit.embeddings.distillation_token"]
    for kind in ("weight", "bias"):
        found[f"head.{kind}"] = state[f"cls_classifier.{kind}"]
        found[f"head_dist.{kind}"] = state[f"distillation_classifier.{kind}"]
    return found


def clip(state: State) -> State:
    top = "vision_model."
    names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
    found = blocks(state, f"{top}encoder.layers", names | MLP, "self_attn")
    for kind in ("weight", "bias"):
        found[f"norm_pre.{kind}"] = state[f"{top}pre_layrnorm.{kind}"]
        found[f"norm.{kind}"] = state[f"{top}post_layernorm.{kind}"]
    found["patch_embed.proj.weight"] = state[f"{top}embeddings.patch_embedding.weight"]
    found["cls_token"] = state[f"{top}embeddings.class_embedding"][None, None]
    found["pos_embed"] = state[f"{top}embeddings.position_embedding.weight"][None]
    found["head.weight"] = state["visual_projection.weight"]
    return found


def dinov2(state: State) -> State:
    names = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.o_proj"}
    found = blocks(state, "encoder.layer", names | MLP, "attention")
    for i in range(DEPTH):
        for n in (1, 2):
            scale = state[f"encoder.layer.{i}.layer_scale{n}.lambda1"]
            found[f"blocks.{i}.ls{n}.gamma"] = scale
    for kind in ("weight", "bias"):
        patch = state[f"embeddings.patch_embeddings.projection.{kind}"]
        found[f"patch_embed.proj.{kind}"] = patch
        found[f"norm.{kind}"] = state[f"layernorm.{kind}"]
    positions = state["embeddings.position_embeddings"]
    found["cls_token"] = state["embeddings.cls_token"]
    found["pos_embed"] = positions
    if "embeddings.register_tokens" in state:  # timm adds the position of CLS to CLS itself
        found["cls_token"] = found["cls_token"] + positions[:, :1]
        found["reg_token"] = state["embeddings.register_tokens"]
        found["pos_embed"] = positions[:, 1:]
    return found


def timm_vit(cls: str = "VisionTransformer", **options: Any) -> nn.Module:
    from timm.models import deit as deit_module
    from timm.models import vision_transformer

    module = vision_transformer if cls == "VisionTransformer" else deit_module
    made: nn.Module = getattr(module, cls)(**{**TIMM, **options})
    return made


def quick_gelu() -> type[nn.Module]:
    from timm.layers import QuickGELU

    return QuickGELU


PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable]] = {
    "vit": (
        small("ViTForImageClassification", num_labels=7, intermediate_size=48, **SIZES),
        lambda: timm_vit(num_classes=7, norm_layer=partial(nn.LayerNorm, eps=1e-12)),
        vit_classifier,
    ),
    "deit": (
        small("DeiTForImageClassificationWithTeacher", num_labels=7, intermediate_size=48, **SIZES),
        lambda: timm_vit(
            "VisionTransformerDistilled",
            num_classes=7,
            norm_layer=partial(nn.LayerNorm, eps=1e-12),
        ),
        deit,
    ),
    "clip": (
        small("CLIPVisionModelWithProjection", projection_dim=20, intermediate_size=48, **SIZES),
        lambda: timm_vit(
            num_classes=20, pre_norm=True, act_layer=quick_gelu(), norm_layer=nn.LayerNorm
        ),
        clip,
    ),
    "clip_gelu": (
        small(
            "CLIPVisionModelWithProjection",
            projection_dim=20,
            intermediate_size=48,
            hidden_act="gelu",
            **SIZES,
        ),
        lambda: timm_vit(num_classes=20, pre_norm=True, norm_layer=nn.LayerNorm),
        clip,
    ),
    "dinov2": (
        small("Dinov2Model", mlp_ratio=2, **SIZES),
        lambda: timm_vit(num_classes=0, init_values=1e-5),
        dinov2,
    ),
    "dinov2_registers": (
        small("Dinov2WithRegistersModel", mlp_ratio=2, num_register_tokens=4, **SIZES),
        lambda: timm_vit(num_classes=0, init_values=1e-5, reg_tokens=4, no_embed_class=True),
        dinov2,
    ),
}


@cache
def build(name: str) -> tuple[VisionModel, VisionModel]:
    make, make_timm, convert = PAIRS[name]
    module, timm = make(), make_timm()
    state = convert({k: v.detach().clone() for k, v in module.state_dict().items()})
    missing, unexpected = timm.load_state_dict(state, strict=False)
    assert set(missing) <= {"head.bias"}, missing  # CLIP's projection has none
    assert not unexpected
    if missing:
        nn.init.zeros_(timm.get_parameter("head.bias"))
    return vitmodels.wrap(module), vitmodels.wrap(timm)


@pytest.mark.parametrize("name", PAIRS)
def test_the_residual_streams_agree(name: str) -> None:
    hf, timm = build(name)
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a = hf.run(x, list(hf.sites()), stop_early=False)
        b = timm.run(x, list(timm.sites()), stop_early=False)
        outputs = hf(x), timm(x)
    assert hf.spec.grid == timm.spec.grid
    close = {"rtol": 0.0, "atol": 1e-5}
    for layer in range(DEPTH):
        for part in ("resid_post", "resid_mid", "attn_out", "mlp_out", "z", "pattern", "q"):
            site = f"blocks.{layer}.{part}"
            torch.testing.assert_close(a[site], b[site], **close, msg=lambda m, s=site: f"{s}: {m}")
    torch.testing.assert_close(a["embed"], b["embed"], **close)
    torch.testing.assert_close(*outputs, **close)
    assert a[f"blocks.{DEPTH - 1}.resid_post"].std() > 0.1


def test_quick_gelu_is_not_gelu() -> None:
    """The activation matters at this tolerance: with another one the outputs differ."""
    hf, timm = build("clip")
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = [block.mlp.act for block in timm.module.blocks]
    try:
        for block in timm.module.blocks:
            block.mlp.act = nn.GELU()
        with torch.no_grad():
            assert (timm(x) - hf(x)).abs().max() > 1e-4
    finally:
        for block, act in zip(timm.module.blocks, before, strict=True):
            block.mlp.act = act
