"""timm's XCiT: attention between channels, a local convolution, then class attention.

A pattern says how the channels of a head look at each other: ``channel_pattern`` is
``[head, channel, channel]``, an image has one and tokens have none. A block adds three things:
``attn_out``, ``local_out`` and ``mlp_out``.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vitmodels.attention import PARTS, AttentionTap
from vitmodels.families.timm_cait import mlp_taps
from vitmodels.spec import TokenGrid
from vitmodels.taps import HeadOutTap, InputTap, MidStreamTap, OutputTap, Tap
from vitmodels.timm_columnar import Columnar, head_taps

CHANNELS = ("head", "channel", "channel")
_LOCAL = "the local convolution and the MLP follow it; edit attn_out or resid_local"


def channel_block(name: str, block: Any) -> dict[str, Tap]:
    """Return the taps of a block over patches."""
    attn, heads = block.attn, int(block.attn.num_heads)
    taps: dict[str, Tap] = {
        "resid_pre": InputTap(module=block),
        "attn_in": InputTap(module=attn),
    }
    for part in ("scores", "pattern"):
        taps[f"channel_{part}"] = AttentionTap(
            scope=attn, part=part, softmax=not attn.fused_attn, axes=CHANNELS
        )
    taps |= {
        "z": InputTap(
            module=attn.proj,
            read=lambda flat: flat.reshape(*flat.shape[:2], heads, -1),
            write=lambda _, value: value.flatten(2),
        ),
        "head_out": HeadOutTap(module=attn.proj, heads=heads),
        "attn_out": OutputTap(module=block.drop_path1),
        "resid_attn": InputTap(module=block.norm3, reason=_LOCAL),
        "local_in": InputTap(module=block.local_mp),
        "local_out": OutputTap(module=block.drop_path3),
        "resid_local": MidStreamTap(branch=block.norm2, branch_out=block.drop_path2, block=block),
        **mlp_taps(block),
        "mlp_out": OutputTap(module=block.drop_path2),
        "resid_post": OutputTap(module=block),
    }
    return {f"{name}.{part}": tap for part, tap in taps.items()}


def class_block(name: str, block: Any, both: TokenGrid) -> dict[str, Tap]:
    """Return the taps of a block in which CLS looks at all tokens."""
    attn = block.attn
    one = TokenGrid(cls=1, register=0, patch=(0, 0))
    taps: dict[str, Tap] = {
        "resid_pre": InputTap(module=block, grid=both),
        "attn_in": InputTap(module=attn, grid=both),
    }
    for part in PARTS if attn.fused_attn else ():
        taps[part] = AttentionTap(scope=attn, part=part, grid=both if part in "kv" else one)
    taps |= {
        "head_out": HeadOutTap(module=attn.proj, heads=attn.num_heads, grid=one),
        "attn_out": OutputTap(module=block.drop_path1, grid=both),
        **mlp_taps(block, grid=one),
        "mlp_out": OutputTap(module=block.drop_path2, grid=both),
        "resid_post": OutputTap(module=block, grid=both),
    }
    return {f"{name}.{part}": tap for part, tap in taps.items()}


class TimmXcit(Columnar):
    """timm's ``Xcit``."""

    name = "timm_xcit"
    modules = ("xcit",)
    classes = ("Xcit",)

    def grid(self, module: Any) -> TokenGrid:
        """Return the tokens of the first stack: patches."""
        height, width = module.patch_embed.img_size
        patch = int(module.patch_embed.patch_size)
        return TokenGrid(cls=0, register=0, patch=(int(height) // patch, int(width) // patch))

    def embed(self, module: Any, grid: TokenGrid) -> dict[str, Tap]:
        """Return the taps before the blocks."""
        taps: dict[str, Tap] = {"patch_embed": OutputTap(module=module.patch_embed)}
        return {**taps, "embed": InputTap(module=module.pos_drop)}

    def block(self, name: str, block: Any) -> dict[str, Tap]:
        """Return the taps of one block over patches."""
        return channel_block(name, block)

    def heads(self, module: Any) -> dict[str, Tap]:
        """Return the class blocks and what is behind them."""
        both = TokenGrid(cls=1, register=0, patch=self.grid(module).patch)
        taps: dict[str, Tap] = {}
        for i, block in enumerate(module.cls_attn_blocks):
            taps |= class_block(f"cls.blocks.{i}", block, both)
        return {**taps, **head_taps(module), "final": OutputTap(module=module.norm, grid=both)}

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return small models with norms of CLS alone and of all tokens."""

        def small(**options: Any) -> Callable[[], nn.Module]:
            def make() -> nn.Module:
                from timm.models.xcit import Xcit

                sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24}
                module: nn.Module = Xcit(**sizes, depth=2, num_heads=4, num_classes=7, **options)
                return module

            return make

        return {"small": small(), "tokens_norm": small(tokens_norm=True, eta=0.5)}


FAMILY = TimmXcit()
