"""TimeSformer in transformers: attention over time, then over space, in every block.

The library orders patches by height, width, time; sites give them by time, height, width, as
everywhere here. With divided attention a block has

- ``temporal.*`` (its tokens are the patches alone): each patch attends to the same place in
  every frame; ``temporal.attn_out`` is what is added to the stream, after ``temporal_dense``;
- ``spatial.*``: each frame attends within itself and to its copy of CLS. The tokens are the
  copies of CLS, one a frame, then the patches; the block adds the mean of the copies.
  ``spatial.resid_pre`` is the stream between the two attentions;
- the MLP as usual.

Patterns are ``[head, query, key]`` with the keys of the query's own line or frame: T of them
for time; CLS and the frame's patches for space.

Shape legend: B batch, T frames, N patches a frame, D width, H heads, K channels a head.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitmodels.attention import AttentionTap
from vitmodels.family import Anatomy
from vitmodels.hf_anatomy import classifier, first_token, numbers
from vitmodels.hf_backend import Checkpoint, HFFamily, small
from vitmodels.hf_preprocess import clip_transform
from vitmodels.hf_taps import PositionTap
from vitmodels.layouts import ClipLayouts, LaidOutTap, Layout, keys, queries
from vitmodels.spec import TokenGrid
from vitmodels.taps import HeadOutTap, InputTap, MidStreamTap, OutputTap, Tap


def qkv_tap(module: nn.Module, which: int, heads: int) -> OutputTap:
    """Return q, k or v, ``[batch, tokens, H, K]``, from the output of the packed projection."""

    def read(output: Tensor) -> Tensor:
        return output.reshape(*output.shape[:-1], 3, heads, -1)[..., which, :, :]

    def write(output: Tensor, value: Tensor) -> Tensor:
        parts = list(output.reshape(*output.shape[:-1], 3, heads, -1).unbind(-3))
        parts[which] = value
        return torch.stack(parts, dim=-3).flatten(-3)

    return OutputTap(module=module, read=read, write=write)


def z_tap(module: nn.Module, heads: int) -> InputTap:
    """Return z, ``[batch, tokens, H, K]``, from the input of the output projection."""
    return InputTap(
        module=module,
        read=lambda x: x.reshape(*x.shape[:-1], heads, -1),
        write=lambda _x, value: value.flatten(-2),
    )


def attention_taps(
    name: str, attention: Any, layout: Layout, pattern: Layout, heads: int, grid: TokenGrid
) -> dict[str, Tap]:
    """Return q, k, v, scores, pattern, z and head_out of one attention module."""
    inner, proj = attention.attention, attention.output.dense
    taps: dict[str, Tap] = {
        part: LaidOutTap(inner=qkv_tap(inner.qkv, i, heads), layout=layout, grid=grid)
        for i, part in enumerate("qkv")
    }
    for part in ("scores", "pattern"):
        tap = AttentionTap(scope=inner, part=part, softmax=True)
        taps[part] = LaidOutTap(inner=tap, layout=pattern, grid=grid)
    taps["z"] = LaidOutTap(inner=z_tap(proj, heads), layout=layout, grid=grid)
    out = HeadOutTap(module=proj, heads=heads)
    taps["head_out"] = LaidOutTap(inner=out, layout=layout, grid=grid)
    return {f"{name}.{part}": tap for part, tap in taps.items()}


def _rows() -> dict[str, Checkpoint]:
    rows: dict[str, Checkpoint] = {}
    for kind, frames, side in (("base", 8, 224), ("hr", 16, 448)):
        for data, labels in (("k400", 400), ("k600", 600), ("ssv2", 174)):
            rows[f"facebook/timesformer-{kind}-finetuned-{data}"] = Checkpoint(
                cls="TimesformerForVideoClassification",
                config={"num_frames": frames, "image_size": side, "num_labels": labels},
                processor={
                    "size": {"shortest_edge": side},
                    "crop_size": {"height": side, "width": side},
                    "image_mean": [0.45, 0.45, 0.45],
                    "image_std": [0.225, 0.225, 0.225],
                },
            )
    return rows


class HFTimesformer(HFFamily):
    """TimeSformer as transformers builds it."""

    name = "hf_timesformer"
    checkpoints = _rows()
    classes = ("TimesformerForVideoClassification", "TimesformerModel")
    processor = "TimesformerVideoProcessor"
    resizes = False

    def anatomy(self, module: Any) -> Anatomy:
        """Describe the module.

        Raises
        ------
        ValueError
            Attention of type ``space_only``, which gives no tokens of a clip.
        """
        body, config = module.base_model, module.config
        kind = config.attention_type
        if kind not in ("divided_space_time", "joint_space_time"):
            raise ValueError(
                f"TimeSformer with attention_type={kind!r} has no taps; with "
                "'divided_space_time' or 'joint_space_time' it has"
            )
        size, frames = self.origin(module).size, int(config.num_frames)
        patch = int(config.patch_size)
        grid = TokenGrid(patch=(frames, size[0] // patch, size[1] // patch))
        layouts = ClipLayouts(frames=frames, patches=grid.patch[1] * grid.patch[2])
        taps = self._embed(body.embeddings, grid, layouts)
        heads = int(config.num_attention_heads)
        for i, block in enumerate(body.encoder.layer):
            taps |= _block(f"blocks.{i}", block, grid, layouts, heads)
        norm = body.layernorm
        taps["final"] = LaidOutTap(inner=OutputTap(module=norm), layout=layouts.stream)
        head = classifier(module) or first_token(norm)
        return Anatomy(
            taps=taps | head.taps,
            grid=grid,
            n_classes=head.n_classes,
            input_shape=(frames, int(config.num_channels), *size),
            transform=clip_transform(self.origin(module).processor, frames),
            call=head.call,
            **numbers(config),
        )

    def _embed(self, embeddings: Any, grid: TokenGrid, layouts: ClipLayouts) -> dict[str, Tap]:
        def position() -> Tensor:
            """Each patch has the position of its place plus that of its frame."""
            place, time = embeddings.position_embeddings, embeddings.time_embeddings
            patches = (place[:, 1:, None] + time[:, None]).flatten(1, 2)
            return torch.cat([place[:, :1], patches], dim=1)

        inner = {
            "pos_embed": PositionTap(module=embeddings, position=position),
            "embed": OutputTap(module=embeddings),
        }
        taps: dict[str, Tap] = {
            "patch_embed": LaidOutTap(
                inner=OutputTap(module=embeddings.patch_embeddings),
                layout=layouts.images,
                grid=TokenGrid(cls=0, patch=grid.patch),
            )
        }
        for name, tap in inner.items():
            taps[name] = LaidOutTap(inner=tap, layout=layouts.stream)
        return taps

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return a small module of every kind."""
        sizes: dict[str, Any] = {"intermediate_size": 48, "image_size": 32, "patch_size": 8}
        sizes["num_frames"] = 3
        joint = sizes | {"attention_type": "joint_space_time"}
        return {
            "divided": small("TimesformerForVideoClassification", num_labels=7, **sizes),
            "divided_body": small("TimesformerModel", **sizes),
            "joint": small("TimesformerForVideoClassification", num_labels=7, **joint),
        }


def _block(
    name: str, block: Any, grid: TokenGrid, layouts: ClipLayouts, heads: int
) -> dict[str, Tap]:
    """Return the taps of one block, in the order of its forward pass."""
    stream = layouts.stream

    def laid(tap: Tap) -> LaidOutTap:
        return LaidOutTap(inner=tap, layout=stream)

    taps: dict[str, Tap] = {f"{name}.resid_pre": laid(InputTap(module=block))}
    if hasattr(block, "temporal_attention"):
        taps |= _temporal(f"{name}.temporal", block, grid, layouts, heads)
        taps |= _spatial(f"{name}.spatial", block, grid, layouts, heads)
    else:
        taps[f"{name}.attn_in"] = laid(OutputTap(module=block.layernorm_before))
        both = keys(stream)
        taps |= attention_taps(name, block.attention, stream, both, heads, grid)
        taps[f"{name}.attn_out"] = laid(OutputTap(module=block.attention))
    middle = MidStreamTap(branch=block.layernorm_after, branch_out=block.output, block=block)
    after = {
        "resid_mid": middle,
        "mlp_in": OutputTap(module=block.layernorm_after),
        "mlp_pre": OutputTap(module=block.intermediate.dense),
        "mlp_post": InputTap(module=block.output.dense),
        "mlp_out": OutputTap(module=block.output),
        "resid_post": OutputTap(module=block),
    }
    return taps | {f"{name}.{part}": laid(tap) for part, tap in after.items()}


def _temporal(
    name: str, block: Any, grid: TokenGrid, layouts: ClipLayouts, heads: int
) -> dict[str, Tap]:
    patches = TokenGrid(cls=0, patch=grid.patch)
    folded = layouts.folded
    normed = OutputTap(module=block.temporal_layernorm)
    taps: dict[str, Tap] = {
        f"{name}.attn_in": LaidOutTap(inner=normed, layout=folded, grid=patches)
    }
    attention = block.temporal_attention
    inside = attention_taps(name, attention, folded, queries(folded), heads, patches)
    inside.pop(f"{name}.head_out")  # a second linear map stands between it and the stream
    added = OutputTap(module=block.temporal_dense)
    taps |= inside
    taps[f"{name}.attn_out"] = LaidOutTap(inner=added, layout=layouts.lines, grid=patches)
    return taps


def _spatial(
    name: str, block: Any, grid: TokenGrid, layouts: ClipLayouts, heads: int
) -> dict[str, Tap]:
    copies = TokenGrid(cls=layouts.frames, patch=grid.patch)
    framed = layouts.framed
    taps: dict[str, Tap] = {
        f"{name}.resid_pre": LaidOutTap(
            inner=InputTap(module=block.layernorm_before),
            layout=framed,
            grid=copies,
            reason=(
                "no module between the two attentions sees all of the stream: an edit here would "
                "miss the residual path; edit temporal.attn_out or resid_pre"
            ),
        ),
        f"{name}.attn_in": LaidOutTap(
            inner=OutputTap(module=block.layernorm_before), layout=framed, grid=copies
        ),
    }
    taps |= attention_taps(name, block.attention, framed, queries(framed), heads, copies)
    added = OutputTap(module=block.attention)
    taps[f"{name}.attn_out"] = LaidOutTap(inner=added, layout=framed, grid=copies)
    return taps


FAMILY = HFTimesformer()
