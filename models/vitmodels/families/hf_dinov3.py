"""DINOv3's ViTs in transformers: rotary positions, registers, LayerScale.

Query and key are those after the rotation; CLS and registers are not rotated.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vitmodels.family import Anatomy
from vitmodels.hf_anatomy import numbers
from vitmodels.hf_backend import HUGE, LARGE, SMALL, Checkpoint, HFFamily, small
from vitmodels.hf_preprocess import image_transform
from vitmodels.hf_taps import Call, cls_tap, hf_block_taps, patches_tap
from vitmodels.spec import TokenGrid
from vitmodels.taps import OutputTap, Tap

_GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
_BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
_7B = {
    "hidden_size": 4096,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "intermediate_size": 8192,
    "query_bias": False,
    "value_bias": False,
}


def _rows() -> dict[str, Checkpoint]:
    sizes: dict[str, Mapping[str, Any]] = {
        "vits16": SMALL,
        "vits16plus": SMALL | _GATED,
        "vitb16": _BASE,
        "vitl16": LARGE,
        "vith16plus": HUGE | _GATED | {"num_attention_heads": 20},
        "vit7b16": _7B | _GATED,
    }
    satellite = {"image_mean": [0.430, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143]}
    rows = {
        f"facebook/dinov3-{size}-pretrain-lvd1689m": Checkpoint(
            cls="DINOv3ViTModel", config={**config, "num_register_tokens": 4}
        )
        for size, config in sizes.items()
    }
    for size in ("vitl16", "vit7b16"):
        rows[f"facebook/dinov3-{size}-pretrain-sat493m"] = Checkpoint(
            cls="DINOv3ViTModel",
            config={**sizes[size], "num_register_tokens": 4},
            processor=satellite,
        )
    return rows


class HFDinov3(HFFamily):
    """DINOv3's ViTs as transformers builds them."""

    name = "hf_dinov3"
    checkpoints = _rows()
    classes = ("DINOv3ViTModel",)
    processor = "DINOv3ViTImageProcessor"

    def anatomy(self, module: Any) -> Anatomy:
        """Describe the module."""
        config, origin = module.config, self.origin(module)
        patch = int(config.patch_size)
        grid = TokenGrid(
            register=int(config.num_register_tokens),
            patch=(origin.size[0] // patch, origin.size[1] // patch),
        )
        heads = int(config.num_attention_heads)
        taps: dict[str, Tap] = {
            "patch_embed": patches_tap(module.embeddings.patch_embeddings, grid),
            "embed": OutputTap(module=module.embeddings),
        }
        for i, block in enumerate(module.model.layer):
            taps |= hf_block_taps(
                f"blocks.{i}",
                block=block,
                attn=block.attention,
                proj=block.attention.o_proj,
                norm1=block.norm1,
                norm2=block.norm2,
                mlp=block.mlp,
                mlp_first=None if config.use_gated_mlp else block.mlp.up_proj,
                mlp_last=block.mlp.down_proj,
                heads=heads,
                attn_added=block.layer_scale1,
                mlp_added=block.layer_scale2,
            )
        taps["final"] = OutputTap(module=module.norm)
        taps["pooled"] = cls_tap(module.norm)
        return Anatomy(
            taps=taps,
            grid=grid,
            input_shape=(int(config.num_channels), *origin.size),
            transform=image_transform(origin.processor),
            call=Call(field="pooler_output"),
            **numbers(config),
        )

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return a plain and a gated small module."""
        sizes: dict[str, Any] = {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
        sizes |= {"hidden_size": 32, "num_register_tokens": 4}
        gated, bare = sizes | _GATED, sizes | {"num_register_tokens": 0}
        return {
            "plain": small("DINOv3ViTModel", **sizes),
            "gated": small("DINOv3ViTModel", **gated),
            "no_registers": small("DINOv3ViTModel", **bare),
        }


FAMILY = HFDinov3()
