"""timm's CaiT: talking heads over patches, then class attention.

The stream ``blocks.L`` holds patches only; ``cls.blocks.L`` holds the class token, which looks at
itself and the patches. Heads are mixed before and after softmax: ``pattern`` is what multiplies v;
``softmax_in`` and ``softmax_out`` are the two sides of the softmax between the mixings.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitmodels.attention import PARTS, AttentionTap
from vitmodels.spec import TokenGrid
from vitmodels.taps import HeadOutTap, InputTap, MidStreamTap, OutputTap, PositionTap, Tap
from vitmodels.timm_columnar import Columnar, head_taps

SQUARE = ("head", "query", "key")


def read_part(qkv: Tensor, *, index: int, heads: int) -> Tensor:
    """Read q, k or v (0, 1, 2) from a fused projection ``[B, T, 3 * H * K]``."""
    part = qkv.chunk(3, dim=-1)[index]
    return part.reshape(*part.shape[:2], heads, -1)


def write_part(qkv: Tensor, value: Tensor, *, index: int) -> Tensor:
    """Write q, k or v back."""
    parts = list(qkv.chunk(3, dim=-1))
    parts[index] = value.flatten(2)
    return torch.cat(parts, dim=-1)


def scaled(block: Any, gamma: str, module: nn.Module, **options: Any) -> OutputTap:
    """Return the tap of a branch whose LayerScale is a bare parameter of the block."""
    return OutputTap(
        module=module,
        read=lambda output: getattr(block, gamma) * output,
        write=lambda _, value: value / getattr(block, gamma),
        **options,
    )


def mlp_taps(block: Any, **options: Any) -> dict[str, Tap]:
    """Return the taps of an MLP of timm."""
    return {
        "mlp_in": InputTap(module=block.mlp, **options),
        "mlp_pre": OutputTap(module=block.mlp.fc1, **options),
        "mlp_post": InputTap(module=block.mlp.fc2, **options),
    }


def talking_block(name: str, block: Any) -> dict[str, Tap]:
    """Return the taps of a block over patches."""
    attn, heads = block.attn, int(block.attn.num_heads)
    taps: dict[str, Tap] = {
        "resid_pre": InputTap(module=block),
        "attn_in": InputTap(module=attn),
    }
    for index, part in enumerate("qkv"):
        taps[part] = OutputTap(
            module=attn.qkv,
            read=partial(read_part, index=index, heads=heads),
            write=partial(write_part, index=index),
        )
    for part, site in (("scores", "softmax_in"), ("pattern", "softmax_out")):
        taps[site] = AttentionTap(scope=attn, part=part, softmax=True, axes=SQUARE)
    taps |= {
        "pattern": OutputTap(
            module=attn.proj_w,
            read=lambda output: output.permute(0, 3, 1, 2),
            write=lambda _, value: value.permute(0, 2, 3, 1),
        ),
        "z": InputTap(
            module=attn.proj,
            read=lambda flat: flat.reshape(*flat.shape[:2], heads, -1),
            write=lambda _, value: value.flatten(2),
        ),
        "head_out": HeadOutTap(module=attn.proj, heads=heads),
        "attn_out": scaled(block, "gamma_1", attn),
        "resid_mid": MidStreamTap(
            branch=block.norm2,
            branch_out=block.mlp,
            block=block,
            gain=lambda added: block.gamma_2 * added,
        ),
        **mlp_taps(block),
        "mlp_out": scaled(block, "gamma_2", block.mlp),
        "resid_post": OutputTap(module=block),
    }
    return {f"{name}.{part}": tap for part, tap in taps.items()}


def class_block(name: str, block: Any, both: TokenGrid) -> dict[str, Tap]:
    """Return the taps of a block of the class token; `both` counts it and the patches."""
    attn = block.attn
    one = TokenGrid(cls=1, register=0, patch=(0, 0))
    taps: dict[str, Tap] = {
        "resid_pre": InputTap(module=block, argument=1, grid=one),
        "attn_in": InputTap(module=attn, grid=both),
    }
    for part in PARTS if attn.fused_attn else ():
        taps[part] = AttentionTap(scope=attn, part=part, grid=both if part in "kv" else one)
    taps |= {
        "head_out": HeadOutTap(module=attn.proj, heads=attn.num_heads, grid=one),
        "attn_out": scaled(block, "gamma_1", attn, grid=one),
        "resid_mid": MidStreamTap(
            branch=block.norm2,
            branch_out=block.mlp,
            block=block,
            gain=lambda added: block.gamma_2 * added,
            grid=one,
        ),
        **mlp_taps(block, grid=one),
        "mlp_out": scaled(block, "gamma_2", block.mlp, grid=one),
        "resid_post": OutputTap(module=block, grid=one),
    }
    return {f"{name}.{part}": tap for part, tap in taps.items()}


class TimmCait(Columnar):
    """timm's ``Cait``."""

    name = "timm_cait"
    modules = ("cait",)
    classes = ("Cait",)

    def grid(self, module: Any) -> TokenGrid:
        """Return the tokens of the first stack: patches."""
        return TokenGrid(
            cls=0, register=0, patch=tuple(int(n) for n in module.patch_embed.grid_size)
        )

    def embed(self, module: Any, grid: TokenGrid) -> dict[str, Tap]:
        """Return the taps before the blocks."""
        return {
            "patch_embed": OutputTap(module=module.patch_embed),
            "pos_embed": PositionTap(model=module, after=module.pos_drop, skip=0),
            "embed": InputTap(module=module.pos_drop),
        }

    def block(self, name: str, block: Any) -> dict[str, Tap]:
        """Return the taps of one block over patches."""
        return talking_block(name, block)

    def heads(self, module: Any) -> dict[str, Tap]:
        """Return the class blocks and what is behind them."""
        patch = self.grid(module).patch
        both = TokenGrid(cls=1, register=0, patch=patch)
        taps: dict[str, Tap] = {}
        for i, block in enumerate(module.blocks_token_only):
            taps |= class_block(f"cls.blocks.{i}", block, both)
        return {**taps, **head_taps(module), "final": OutputTap(module=module.norm, grid=both)}

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return small models pooled by CLS and by mean."""

        def small(**options: Any) -> Callable[[], nn.Module]:
            def make() -> nn.Module:
                from timm.models.cait import Cait

                sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24}
                module: nn.Module = Cait(
                    **{**sizes, "num_classes": 7, **options}, depth=2, num_heads=4, init_values=0.5
                )
                return module

            return make

        return {"token": small(), "no_head": small(num_classes=0)}


FAMILY = TimmCait()
