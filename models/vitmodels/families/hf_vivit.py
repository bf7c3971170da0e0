"""ViViT in transformers: joint space-time attention over tubelets, with CLS.

One input is a clip ``[frames, channels, height, width]``; patches run over time, height and
width in this order.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vitmodels.family import Anatomy
from vitmodels.hf_anatomy import classifier, numbers, pooler, vit_block_taps
from vitmodels.hf_backend import BASE, LARGE, Checkpoint, HFFamily, small
from vitmodels.hf_preprocess import clip_transform
from vitmodels.hf_taps import learned_positions, patches_tap
from vitmodels.spec import TokenGrid
from vitmodels.taps import OutputTap, Tap


def _rows() -> dict[str, Checkpoint]:
    classes = {"num_labels": 400}
    return {
        f"google/vivit-{letter}-16x2-kinetics400": Checkpoint(
            cls="VivitForVideoClassification", config=sizes | classes
        )
        for letter, sizes in (("b", BASE), ("l", LARGE))
    }


class HFVivit(HFFamily):
    """ViViT (model 1) as transformers builds it."""

    name = "hf_vivit"
    checkpoints = _rows()
    classes = ("VivitForVideoClassification", "VivitModel")
    processor = "VivitVideoProcessor"
    resizes = False

    def anatomy(self, module: Any) -> Anatomy:
        """Describe the module."""
        body, config = module.base_model, module.config
        origin = self.origin(module)
        time, height, width = config.tubelet_size
        frames = int(config.num_frames)
        grid = TokenGrid(patch=(frames // time, origin.size[0] // height, origin.size[1] // width))
        heads = int(config.num_attention_heads)
        taps: dict[str, Tap] = {
            "patch_embed": patches_tap(body.embeddings.patch_embeddings, grid),
            "pos_embed": learned_positions(body.embeddings, grid, None),
            "embed": OutputTap(module=body.embeddings),
        }
        for i, block in enumerate(body.layers):
            taps |= vit_block_taps(f"blocks.{i}", block, heads)
        taps["final"] = OutputTap(module=body.layernorm)
        head = classifier(module) or pooler(body)
        return Anatomy(
            taps=taps | head.taps,
            grid=grid,
            n_classes=head.n_classes,
            input_shape=(frames, int(config.num_channels), *origin.size),
            transform=clip_transform(origin.processor, frames),
            call=head.call,
            **numbers(config),
        )

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return a small classifier, and small bodies."""
        sizes: dict[str, Any] = {"intermediate_size": 48, "image_size": 32, "num_frames": 4}
        sizes["tubelet_size"] = [2, 8, 8]
        return {
            "classifier": small("VivitForVideoClassification", num_labels=7, **sizes),
            "pooler": small("VivitModel", **sizes),
            "body": small("VivitModel", options={"add_pooling_layer": False}, **sizes),
        }


FAMILY = HFVivit()
