"""CLIP's image towers in transformers, with or without the projection.

Those of OpenAI, of MetaCLIP, of TinyCLIP, and open_clip's checkpoints in transformers' layout.
CLIP norms only the CLS token at the end; ``final`` gives the norm of every token, and its CLS
row is the one that is read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitmodels.family import Anatomy
from vitmodels.hf_anatomy import Head, classifier, numbers
from vitmodels.hf_backend import BASE, HALF, HUGE, LARGE, Checkpoint, HFFamily, small
from vitmodels.hf_preprocess import image_transform
from vitmodels.hf_taps import Call, PositionTap, hf_block_taps, patches_tap
from vitmodels.spec import TokenGrid
from vitmodels.taps import OutputTap, Tap, Wire, Wiring

_TOWER = "CLIPVisionModelWithProjection"


def _clip(
    config: Mapping[str, Any], patch: int, side: int = 224, act: str = "quick_gelu", **more: Any
) -> Checkpoint:
    resize = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    kept = {"patch_size": patch, "image_size": side, "hidden_act": act, **config, **more}
    processor = resize | (kept.pop("processor", {}))
    return Checkpoint(cls=_TOWER, config=kept, processor=processor)


def _rows() -> dict[str, Checkpoint]:
    large = LARGE | {"projection_dim": 768}
    huge = HUGE | {"projection_dim": 1024}
    giant = huge | {"hidden_size": 1408, "num_hidden_layers": 40, "intermediate_size": 6144}
    big = {
        "hidden_size": 1664,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "intermediate_size": 8192,
        "projection_dim": 1280,
    }
    tiny = {
        "hidden_size": 256,
        "num_hidden_layers": 10,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    }
    medium = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048}
    rows = {
        "openai/clip-vit-base-patch32": _clip(BASE, 32),
        "openai/clip-vit-base-patch16": _clip(BASE, 16),
        "openai/clip-vit-large-patch14": _clip(large, 14),
        "openai/clip-vit-large-patch14-336": _clip(large, 14, 336),
        "kandinsky-community/kandinsky-2-1-prior:image_encoder": _clip(large, 14),
        "wkcn/TinyCLIP-ViT-8M-16-Text-3M-YFCC15M": _clip(tiny, 16, act="gelu"),
        "wkcn/TinyCLIP-ViT-39M-16-Text-19M-YFCC15M": _clip(medium, 16, act="gelu"),
        "laion/CLIP-ViT-L-14-laion2B-s32B-b82K": _clip(large, 14, act="gelu", processor=HALF),
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _clip(huge, 14, act="gelu"),
        "laion/CLIP-ViT-g-14-laion2B-s12B-b42K": _clip(giant, 14, act="gelu"),
        "laion/CLIP-ViT-g-14-laion2B-s34B-b88K": _clip(giant, 14, act="gelu"),
        "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": _clip(big, 14, act="gelu"),
        "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K": _clip(large, 14, act="gelu"),
        "facebook/metaclip-h14-fullcc2.5b": _clip(huge, 14),
    }
    for tag, patch in {
        "B-32-laion2B-s34B-b79K": 32,
        "B-16-laion2B-s34B-b88K": 16,
        "B-32-DataComp.XL-s13B-b90K": 32,
        "B-16-DataComp.XL-s13B-b90K": 16,
    }.items():
        rows[f"laion/CLIP-ViT-{tag}"] = _clip(BASE, patch, act="gelu")
    for data in ("400m", "fullcc2.5b"):
        rows[f"facebook/metaclip-b32-{data}"] = _clip(BASE, 32)
        rows[f"facebook/metaclip-b16-{data}"] = _clip(BASE, 16)
        rows[f"facebook/metaclip-l14-{data}"] = _clip(large, 14)
    return rows


@dataclass(frozen=True, kw_only=True)
class NormOfAllTap(Tap):
    """The last norm of every token, where the library takes it of the CLS token only.

    ``final[b, p] = norm(resid_post[b, p])``. The library's own value goes on; an edit of the
    CLS row replaces it. Other rows are read by nobody.
    """

    encoder: nn.Module
    """Returns the stream after the last block as ``last_hidden_state``."""
    norm: nn.Module
    """The norm that the library applies to ``[B, D]``."""

    def attach(self, wire: Wire, wiring: Wiring) -> None:
        """Remember the stream, then pass its norm through the wire."""
        held: dict[str, Tensor] = {}

        def remember(_module: nn.Module, _args: Any, output: Any) -> None:
            held["stream"] = output.last_hidden_state

        def hook(module: Any, _args: Any, output: Tensor) -> Tensor | None:
            stream_BPD = held.pop("stream")
            others_BPD = F.layer_norm(
                stream_BPD[:, 1:], module.normalized_shape, module.weight, module.bias, module.eps
            )
            value = wire(torch.cat([output[:, None], others_BPD], dim=1))
            return value[:, 0] if wire.writes else None

        wiring.after(self.encoder, remember)
        wiring.after(self.norm, hook)


def tower_taps(body: Any, grid: TokenGrid, *, native: bool) -> dict[str, Tap]:
    """Return the taps of the embedding and the blocks of a tower of CLIP or SigLIP."""
    embeddings = body.embeddings
    taps: dict[str, Tap] = {"patch_embed": patches_tap(embeddings.patch_embedding, grid)}
    if native:
        table = embeddings.position_embedding
        taps["pos_embed"] = PositionTap(module=embeddings, position=lambda: table.weight[None])
    taps["embed"] = OutputTap(module=embeddings)
    for i, block in enumerate(body.encoder.layers):
        taps |= hf_block_taps(
            f"blocks.{i}",
            block=block,
            attn=block.self_attn,
            proj=block.self_attn.out_proj,
            norm1=block.layer_norm1,
            norm2=block.layer_norm2,
            mlp=block.mlp,
            mlp_first=block.mlp.fc1,
            mlp_last=block.mlp.fc2,
            heads=int(body.config.num_attention_heads),
        )
    return taps


def _embedding(module: Any, body: Any) -> Head:
    """Return the normed CLS token, and its projection where the model has one."""
    taps: dict[str, Tap] = {
        "final": NormOfAllTap(encoder=body.encoder, norm=body.post_layernorm),
        "pooled": OutputTap(module=body.post_layernorm),
    }
    if not hasattr(module, "visual_projection"):
        return Head(taps, Call(field="pooler_output"))
    taps["projection"] = OutputTap(module=module.visual_projection)
    return Head(taps, Call(field="image_embeds"))


class HFClip(HFFamily):
    """Image towers of CLIP as transformers builds them."""

    name = "hf_clip"
    checkpoints = _rows()
    classes = (_TOWER, "CLIPVisionModel", "CLIPForImageClassification")
    processor = "CLIPImageProcessor"

    def native_size(self, config: Any) -> tuple[int, int]:
        """Return the tower's size, also from the configuration of a whole model."""
        return super().native_size(getattr(config, "vision_config", config))

    def anatomy(self, module: Any) -> Anatomy:
        """Describe the module."""
        body = getattr(module, "vision_model", module)
        config, origin = body.config, self.origin(module)
        patch = int(config.patch_size)
        grid = TokenGrid(patch=(origin.size[0] // patch, origin.size[1] // patch))
        native = origin.size == self.native_size(config)
        taps = tower_taps(body, grid, native=native)
        # A classifier reads the mean of the patches, not normed.
        head = classifier(module) or _embedding(module, body)
        return Anatomy(
            taps=taps | head.taps,
            grid=grid,
            n_classes=head.n_classes,
            input_shape=(int(config.num_channels), *origin.size),
            transform=image_transform(origin.processor),
            call=head.call.resampled(not native),
            **numbers(config),
        )

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return one small tower of every kind."""
        sizes: dict[str, Any] = {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
        return {
            "projection": small(_TOWER, projection_dim=20, **sizes),
            "gelu": small(_TOWER, projection_dim=20, hidden_act="gelu", **sizes),
            "no_projection": small("CLIPVisionModel", **sizes),
            "classifier": small("CLIPForImageClassification", num_labels=7, vision=sizes),
        }


FAMILY = HFClip()
