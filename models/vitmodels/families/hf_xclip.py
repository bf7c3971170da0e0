"""X-CLIP's video tower in transformers: frames that exchange messages.

Each frame runs through a CLIP tower. At the beginning of a block every frame makes a message
from its CLS token; the messages attend to each other (``message.*``, one token a frame); then
CLS, patches and message of a frame attend to each other (``spatial.*``), and the message is
dropped. Tokens of the stream are one CLS a frame, then the patches; in ``spatial.*`` the
messages follow, as registers. ``pooled`` has one row a frame: what integrates the frames comes
after the tower.

Shape legend: B batch, T frames, N patches a frame, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitmodels.attention import PARTS, AttentionTap
from vitmodels.families.hf_clip import NormOfAllTap
from vitmodels.family import Anatomy
from vitmodels.hf_anatomy import numbers
from vitmodels.hf_backend import BASE, IMAGENET, LARGE, Checkpoint, HFFamily, small
from vitmodels.hf_preprocess import clip_transform
from vitmodels.hf_taps import Call, PositionTap, read_map, write_map
from vitmodels.layouts import ClipLayouts, LaidOutTap, Layout, queries
from vitmodels.spec import TokenGrid
from vitmodels.taps import HeadOutTap, InputTap, MidStreamTap, OutputTap, Tap

_EQUAL = (
    "before the first block every frame has the same CLS token, so all messages are equal and "
    "where they attend to has no effect; edit message.v or message.z"
)


def _rows() -> dict[str, Checkpoint]:
    rows: dict[str, Checkpoint] = {}
    wide = {"mit_hidden_size": 768, "mit_num_attention_heads": 12, "mit_intermediate_size": 3072}
    for name, sizes, patch, frames, side in (
        ("base-patch32", BASE, 32, 8, 224),
        ("base-patch32-16-frames", BASE, 32, 16, 224),
        ("base-patch16", BASE, 16, 8, 224),
        ("base-patch16-16-frames", BASE, 16, 16, 224),
        ("base-patch16-zero-shot", BASE, 16, 32, 224),
        ("large-patch14", LARGE | wide, 14, 8, 224),
        ("large-patch14-16-frames", LARGE | wide, 14, 16, 336),
    ):
        rows[f"microsoft/xclip-{name}"] = Checkpoint(
            cls="XCLIPVisionModel",
            config=sizes | {"patch_size": patch, "num_frames": frames, "image_size": side},
            processor=IMAGENET
            | {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}},
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class _Frames(Call):
    """Fold the frames into the batch, and the batch of results out of it."""

    def __call__(self, module: Any, x: Any) -> Tensor:
        """``[B, T, C, H, W] -> [B, T, D]``."""
        field = super().__call__(module, x.flatten(0, 1))
        return field.reshape(*x.shape[:2], -1)


def with_message(frames: int, patches: int) -> Layout:
    """``[B T, 1 + N + 1, ...] <-> [B, T + T N + T, ...]``: every CLS, patches, every message."""
    framed = ClipLayouts(frames=frames, patches=patches).framed
    n_stream = frames * (patches + 1)

    def to_site(x: Tensor) -> Tensor:
        message = x[:, -1].reshape(-1, frames, *x.shape[2:])
        return torch.cat([framed.to_site(x[:, :-1]), message], dim=1)

    def from_site(x: Tensor) -> Tensor:
        message = x[:, n_stream:].flatten(0, 1)
        return torch.cat([framed.from_site(x[:, :n_stream]), message[:, None]], dim=1)

    return Layout(to_site=to_site, from_site=from_site)


class HFXClip(HFFamily):
    """The video tower of X-CLIP as transformers builds it."""

    name = "hf_xclip"
    checkpoints = _rows()
    classes = ("XCLIPVisionModel",)
    wholes: ClassVar[Mapping[str, tuple[str, str]]] = {"xclip": ("XCLIPModel", "vision_model")}
    processor = "VideoMAEVideoProcessor"
    resizes = False

    def native_size(self, config: Any) -> tuple[int, int]:
        """Return the tower's size, also from the configuration of a whole model."""
        return super().native_size(getattr(config, "vision_config", config))

    def anatomy(self, module: Any) -> Anatomy:
        """Describe the module."""
        config, origin = module.config, self.origin(module)
        frames, patch = int(config.num_frames), int(config.patch_size)
        area = (frames, origin.size[0] // patch, origin.size[1] // patch)
        grid = TokenGrid(cls=frames, patch=area)
        layouts = ClipLayouts(frames=frames, patches=area[1] * area[2])
        embeddings, table = module.embeddings, module.embeddings.position_embedding
        patches = OutputTap(module=embeddings.patch_embedding, read=read_map, write=write_map)
        positions = PositionTap(module=embeddings, position=lambda: table.weight[None])
        taps: dict[str, Tap] = {
            "patch_embed": LaidOutTap(
                inner=patches, layout=layouts.images, grid=TokenGrid(cls=0, patch=area)
            ),
            "pos_embed": LaidOutTap(inner=positions, layout=layouts.framed),
            "embed": LaidOutTap(inner=OutputTap(module=embeddings), layout=layouts.framed),
        }
        for i, block in enumerate(module.encoder.layers):
            taps |= _block(f"blocks.{i}", block, layouts, grid, first=i == 0)
        norm = module.post_layernorm
        final = NormOfAllTap(encoder=module.encoder, norm=norm)
        taps["final"] = LaidOutTap(inner=final, layout=layouts.framed)
        taps["pooled"] = LaidOutTap(
            inner=OutputTap(module=norm),
            layout=Layout(
                to_site=lambda x: x.reshape(-1, frames, x.shape[-1]),
                from_site=lambda x: x.flatten(0, 1),
            ),
            axes=("token", "channel"),
            grid=TokenGrid(cls=frames, patch=(0, 0)),
        )
        return Anatomy(
            taps=taps,
            grid=grid,
            input_shape=(frames, int(config.num_channels), *origin.size),
            transform=clip_transform(origin.processor, frames),
            call=_Frames(field="pooler_output"),
            **numbers(config),
        )

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return small towers of two clip lengths."""
        sizes: dict[str, Any] = {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
        return {
            "tower": small("XCLIPVisionModel", num_frames=3, **sizes),
            "gelu": small("XCLIPVisionModel", num_frames=2, hidden_act="gelu", **sizes),
        }


def _block(
    name: str, block: Any, layouts: ClipLayouts, grid: TokenGrid, *, first: bool
) -> dict[str, Tap]:
    """Return the taps of one block, in the order of its forward pass."""
    frames = layouts.frames

    def laid(tap: Tap) -> LaidOutTap:
        return LaidOutTap(inner=tap, layout=layouts.framed)

    taps: dict[str, Tap] = {"resid_pre": laid(InputTap(module=block))}
    message = TokenGrid(cls=0, register=frames, patch=(0, 0))
    attention = block.message_attn
    taps["message.resid_pre"] = InputTap(
        module=block.message_ln,
        grid=message,
        reason="the messages are summed inside of the block; edit message.attn_out or resid_pre",
    )
    taps["message.attn_in"] = OutputTap(module=block.message_ln, grid=message)
    for part in PARTS:
        idle = first and part in ("q", "k", "scores")
        taps[f"message.{part}"] = AttentionTap(
            scope=attention, part=part, grid=message, reason=_EQUAL if idle else ""
        )
    heads = int(attention.num_heads)
    out = HeadOutTap(module=attention.out_proj, heads=heads, grid=message)
    taps["message.head_out"] = out
    taps["message.attn_out"] = OutputTap(module=attention, grid=message)

    wide = TokenGrid(
        cls=frames, register=frames, patch=grid.patch, order=("cls", "patch", "register")
    )
    layout, attention = with_message(frames, layouts.patches), block.self_attn
    normed = OutputTap(module=block.layer_norm1)
    taps["spatial.attn_in"] = LaidOutTap(inner=normed, layout=layout, grid=wide)
    for part in PARTS:
        tap = AttentionTap(scope=attention, part=part)
        how = queries(layout) if part in ("scores", "pattern") else layout
        taps[f"spatial.{part}"] = LaidOutTap(inner=tap, layout=how, grid=wide)
    out = HeadOutTap(module=attention.out_proj, heads=heads)
    taps["spatial.head_out"] = LaidOutTap(inner=out, layout=layout, grid=wide)
    added = OutputTap(module=attention)
    taps["spatial.attn_out"] = LaidOutTap(inner=added, layout=layout, grid=wide)

    middle = MidStreamTap(branch=block.layer_norm2, branch_out=block.mlp, block=block)
    after = {
        "resid_mid": middle,
        "mlp_in": OutputTap(module=block.layer_norm2),
        "mlp_pre": OutputTap(module=block.mlp.fc1),
        "mlp_post": InputTap(module=block.mlp.fc2),
        "mlp_out": OutputTap(module=block.mlp),
        "resid_post": OutputTap(module=block),
    }
    taps |= {part: laid(tap) for part, tap in after.items()}
    return {f"{name}.{part}": tap for part, tap in taps.items()}


FAMILY = HFXClip()
