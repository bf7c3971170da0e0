"""VideoMAE in transformers: joint space-time attention over tubelets, without CLS.

Models that pool by the mean have no final norm: the norm comes after the mean. The pretrained
ones run with all patches; masking and decoder are for their pretraining.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vitmodels.family import Anatomy
from vitmodels.hf_anatomy import Head, classifier, numbers
from vitmodels.hf_backend import BASE, HUGE, LARGE, SMALL, Checkpoint, HFFamily, small
from vitmodels.hf_preprocess import clip_transform
from vitmodels.hf_taps import Call, PositionTap, hf_block_taps, patches_tap
from vitmodels.spec import TokenGrid
from vitmodels.taps import OutputTap, Tap


def _rows() -> dict[str, Checkpoint]:
    tuned: dict[str, tuple[Mapping[str, int], int]] = {
        "small-finetuned-kinetics": (SMALL, 400),
        "small-finetuned-ssv2": (SMALL, 174),
        "base-finetuned-kinetics": (BASE, 400),
        "base-finetuned-ssv2": (BASE, 174),
        "base-short-finetuned-kinetics": (BASE, 400),
        "base-short-finetuned-ssv2": (BASE, 174),
        "large-finetuned-kinetics": (LARGE, 400),
        "huge-finetuned-kinetics": (HUGE, 400),
    }
    rows = {
        f"MCG-NJU/videomae-{name}": Checkpoint(
            cls="VideoMAEForVideoClassification", config={**sizes, "num_labels": labels}
        )
        for name, (sizes, labels) in tuned.items()
    }
    for name, sizes in {
        "base": BASE,
        "base-short": BASE,
        "base-ssv2": BASE,
        "base-short-ssv2": BASE,
        "large": LARGE,
    }.items():
        rows[f"MCG-NJU/videomae-{name}"] = Checkpoint(
            cls="VideoMAEModel", config=sizes | {"use_mean_pooling": False}
        )
    return rows


class HFVideoMAE(HFFamily):
    """VideoMAE as transformers builds it."""

    name = "hf_videomae"
    checkpoints = _rows()
    classes = ("VideoMAEModel", "VideoMAEForVideoClassification")
    processor = "VideoMAEVideoProcessor"
    resizes = False

    def anatomy(self, module: Any) -> Anatomy:
        """Describe the module."""
        body, config = module.base_model, module.config
        origin = self.origin(module)
        frames, patch = int(config.num_frames), int(config.patch_size)
        grid = TokenGrid(
            cls=0,
            patch=(
                frames // int(config.tubelet_size),
                origin.size[0] // patch,
                origin.size[1] // patch,
            ),
        )
        heads = int(config.num_attention_heads)
        embeddings = body.embeddings
        taps: dict[str, Tap] = {
            "patch_embed": patches_tap(embeddings.patch_embeddings, grid),
            "pos_embed": PositionTap(
                module=embeddings, position=lambda: embeddings.position_embeddings
            ),
            "embed": OutputTap(module=embeddings),
        }
        for i, block in enumerate(body.encoder.layer):
            taps |= hf_block_taps(
                f"blocks.{i}",
                block=block,
                attn=block.attention,
                scope=block.attention.attention,
                proj=block.attention.output.dense,
                norm1=block.layernorm_before,
                norm2=block.layernorm_after,
                mlp=block.intermediate,
                mlp_first=block.intermediate.dense,
                mlp_last=block.output.dense,
                mlp_added=block.output.dense,  # `output` adds the stream itself
                heads=heads,
            )
        if body.layernorm is not None:
            taps["final"] = OutputTap(module=body.layernorm)
        head = classifier(module) or Head({}, Call(field="last_hidden_state"))
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
        """Return a small module of every kind."""
        sizes: dict[str, Any] = {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
        sizes |= {"num_frames": 4, "tubelet_size": 2}
        return {
            "mean_classifier": small("VideoMAEForVideoClassification", num_labels=7, **sizes),
            "first_token_classifier": small(
                "VideoMAEForVideoClassification", num_labels=7, use_mean_pooling=False, **sizes
            ),
            "body": small("VideoMAEModel", use_mean_pooling=False, **sizes),
            "body_without_norm": small("VideoMAEModel", **sizes),
        }


FAMILY = HFVideoMAE()
