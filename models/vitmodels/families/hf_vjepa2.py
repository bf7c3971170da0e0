"""V-JEPA 2's encoder in transformers: rotary positions over time, height and width, no CLS.

Query and key are those after the rotation. The predictor of the pretraining is not run.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from vitmodels.family import Anatomy
from vitmodels.hf_anatomy import Head, classifier, numbers
from vitmodels.hf_backend import Checkpoint, HFFamily, small
from vitmodels.hf_preprocess import clip_transform
from vitmodels.hf_taps import Call, hf_block_taps, patches_tap
from vitmodels.spec import TokenGrid
from vitmodels.taps import OutputTap, Tap

_SIZES: dict[str, dict[str, Any]] = {
    "vitl": {},
    "vith": {"hidden_size": 1280, "num_hidden_layers": 32},
    "vitg": {
        "hidden_size": 1408,
        "num_hidden_layers": 40,
        "num_attention_heads": 22,
        "mlp_ratio": 48 / 11,
    },
}


def _rows() -> dict[str, Checkpoint]:
    rows: dict[str, Checkpoint] = {}
    for size, side in (("vitl", 256), ("vith", 256), ("vitg", 256), ("vitg", 384)):
        rows[f"facebook/vjepa2-{size}-fpc64-{side}"] = _row("VJEPA2Model", size, 64, side)
    for size, frames, side, data, labels in (
        ("vitl", 16, 256, "ssv2", 174),
        ("vitg", 64, 384, "ssv2", 174),
        ("vitl", 32, 256, "diving48", 48),
        ("vitg", 32, 384, "diving48", 48),
    ):
        rows[f"facebook/vjepa2-{size}-fpc{frames}-{side}-{data}"] = _row(
            "VJEPA2ForVideoClassification", size, frames, side, num_labels=labels
        )
    return rows


def _row(cls: str, size: str, frames: int, side: int, **more: Any) -> Checkpoint:
    return Checkpoint(
        cls=cls,
        config={**_SIZES[size], "frames_per_clip": frames, "crop_size": side, **more},
        processor={
            "size": {"shortest_edge": int(side * 256 / 224)},
            "crop_size": {"height": side, "width": side},
        },
    )


class HFVJepa2(HFFamily):
    """The encoder of V-JEPA 2 as transformers builds it."""

    name = "hf_vjepa2"
    checkpoints = _rows()
    classes = ("VJEPA2Model", "VJEPA2ForVideoClassification")
    processor = "VJEPA2VideoProcessor"
    size_field = "crop_size"
    resizes = False

    def anatomy(self, module: Any) -> Anatomy:
        """Describe the module."""
        encoder, config = module.base_model.encoder, module.config
        origin = self.origin(module)
        frames, patch = int(config.frames_per_clip), int(config.patch_size)
        grid = TokenGrid(
            cls=0,
            patch=(
                frames // int(config.tubelet_size),
                origin.size[0] // patch,
                origin.size[1] // patch,
            ),
        )
        heads = int(config.num_attention_heads)
        taps: dict[str, Tap] = {
            "patch_embed": patches_tap(encoder.embeddings.patch_embeddings, grid),
            "embed": OutputTap(module=encoder.embeddings),
        }
        for i, block in enumerate(encoder.layer):
            taps |= hf_block_taps(
                f"blocks.{i}",
                block=block,
                attn=block.attention,
                proj=block.attention.proj,
                norm1=block.norm1,
                norm2=block.norm2,
                mlp=block.mlp,
                mlp_first=block.mlp.fc1,
                mlp_last=block.mlp.fc2,
                heads=heads,
            )
        taps["final"] = OutputTap(module=encoder.layernorm)
        body = Call(field="last_hidden_state", options={"skip_predictor": True})
        head = classifier(module) or Head({}, body)  # a classifier reads the attentive pooler
        return Anatomy(
            taps=taps | head.taps,
            grid=grid,
            n_classes=head.n_classes,
            input_shape=(frames, int(config.in_chans), *origin.size),
            transform=clip_transform(origin.processor, frames),
            call=replace(head.call, argument="pixel_values_videos"),
            **numbers(config, d_mlp=int(encoder.layer[0].mlp.fc2.in_features)),
            without_effect_on_shapes=[
                (block.attention, method)
                for block in encoder.layer
                for method in ("get_position_ids", "apply_rotary_embeddings")
            ],
        )

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return a small encoder and a small classifier."""
        sizes: dict[str, Any] = {"crop_size": 32, "patch_size": 8, "frames_per_clip": 4}
        sizes |= {"mlp_ratio": 2.0, "pred_hidden_size": 24, "pred_num_hidden_layers": 1}
        sizes |= {"pred_num_attention_heads": 4, "num_pooler_layers": 1}
        return {
            "encoder": small("VJEPA2Model", **sizes),
            "classifier": small("VJEPA2ForVideoClassification", num_labels=7, **sizes),
        }


FAMILY = HFVJepa2()
