"""DINOv2 in transformers, with and without registers.

Published for 518 x 518 pixels and preprocessed to 224 x 224: the library resamples the
positions to the input.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vitmodels.family import Anatomy
from vitmodels.hf_anatomy import Head, classifier, numbers
from vitmodels.hf_backend import IMAGENET, Checkpoint, HFFamily, small
from vitmodels.hf_preprocess import image_transform
from vitmodels.hf_taps import Call, cls_tap, hf_block_taps, learned_positions, patches_tap
from vitmodels.spec import TokenGrid
from vitmodels.taps import OutputTap, Tap

_SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 384, "num_attention_heads": 6},
    "base": {},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "giant": {
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 24,
        "use_swiglu_ffn": True,
    },
}


def _rows() -> dict[str, Checkpoint]:
    rows: dict[str, Checkpoint] = {}
    processor = IMAGENET | {"size": {"shortest_edge": 256}}
    for kind, cls in (("dinov2", "Dinov2"), ("dinov2-with-registers", "Dinov2WithRegisters")):
        for size, widths in _SIZES.items():
            config = widths | {"image_size": 518, "patch_size": 14}
            rows[f"facebook/{kind}-{size}"] = Checkpoint(
                cls=f"{cls}Model", config=config, processor=processor
            )
            rows[f"facebook/{kind}-{size}-imagenet1k-1-layer"] = Checkpoint(
                cls=f"{cls}ForImageClassification",
                config=config | {"num_labels": 1000},
                processor=processor,
            )
    return rows


class HFDinov2(HFFamily):
    """DINOv2 as transformers builds it."""

    name = "hf_dinov2"
    checkpoints = _rows()
    classes = (
        "Dinov2Model",
        "Dinov2ForImageClassification",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
    )
    processor = "BitImageProcessor"

    def anatomy(self, module: Any) -> Anatomy:
        """Describe the module."""
        body, config = module.base_model, module.config
        origin = self.origin(module)
        patch = int(config.patch_size)
        grid = TokenGrid(
            register=int(getattr(config, "num_register_tokens", 0)),
            patch=(origin.size[0] // patch, origin.size[1] // patch),
        )
        resampled = None if origin.size == self.native_size(config) else origin.size
        heads = int(config.num_attention_heads)
        taps: dict[str, Tap] = {
            "patch_embed": patches_tap(body.embeddings.patch_embeddings, grid),
            "pos_embed": learned_positions(body.embeddings, grid, resampled, grid.register),
            "embed": OutputTap(module=body.embeddings),
        }
        for i, block in enumerate(body.encoder.layer):
            gated = hasattr(block.mlp, "down_proj")
            taps |= hf_block_taps(
                f"blocks.{i}",
                block=block,
                attn=block.attention,
                proj=block.attention.o_proj,
                norm1=block.norm1,
                norm2=block.norm2,
                mlp=block.mlp,
                mlp_first=None if gated else block.mlp.fc1,
                mlp_last=block.mlp.down_proj if gated else block.mlp.fc2,
                heads=heads,
                attn_added=block.layer_scale1,
                mlp_added=block.layer_scale2,
            )
        taps["final"] = OutputTap(module=body.layernorm)
        mlp = body.encoder.layer[0].mlp
        # A classifier reads CLS and the mean of the patches.
        body_head = Head({"pooled": cls_tap(body.layernorm)}, Call(field="pooler_output"))
        head = classifier(module) or body_head
        own = int((mlp.down_proj if hasattr(mlp, "down_proj") else mlp.fc2).in_features)
        return Anatomy(
            taps=taps | head.taps,
            grid=grid,
            n_classes=head.n_classes,
            input_shape=(int(config.num_channels), *origin.size),
            transform=image_transform(origin.processor),
            call=head.call,
            **numbers(config, d_mlp=own),
        )

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return one small module of every kind."""
        sizes: dict[str, Any] = {"mlp_ratio": 2, "image_size": 32, "patch_size": 8}
        registers = sizes | {"num_register_tokens": 4}
        return {
            "plain": small("Dinov2Model", **sizes),
            "swiglu": small("Dinov2Model", use_swiglu_ffn=True, **sizes),
            "classifier": small("Dinov2ForImageClassification", num_labels=7, **sizes),
            "registers": small("Dinov2WithRegistersModel", **registers),
            "registers_classifier": small(
                "Dinov2WithRegistersForImageClassification", num_labels=7, **registers
            ),
        }


FAMILY = HFDinov2()
