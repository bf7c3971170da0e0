"""timm's Swin and Swin v2: windows, and stages of different width and number of tokens.

Blocks are numbered through all stages. Sites carry the grid of their stage; between stages
patches are merged, so that ``resid_pre`` of a stage's first block is not ``resid_post`` before it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitmodels import timm_backend
from vitmodels.attention import PARTS, AttentionTap
from vitmodels.family import Anatomy
from vitmodels.spec import TokenGrid
from vitmodels.taps import HeadOutTap, InputTap, MidStreamTap, OutputTap, Tap
from vitmodels.timm_columnar import Columnar, flatten_patches, unflatten_patches
from vitmodels.windows import Windows


def read_part(qkv: Tensor, *, index: int, heads: int, windows: Windows) -> Tensor:
    """Read q, k or v (0, 1, 2) from a fused projection ``[B * nW, n, 3 * heads * K]``."""
    part = qkv.chunk(3, dim=-1)[index]
    return windows.to_image(part.reshape(*part.shape[:2], heads, -1))


def write_part(qkv: Tensor, value: Tensor, *, index: int, windows: Windows) -> Tensor:
    """Write q, k or v back."""
    parts = list(qkv.chunk(3, dim=-1))
    parts[index] = windows.from_image(value).reshape(parts[index].shape)
    return torch.cat(parts, dim=-1)


def window_taps(attn: Any, windows: Windows, *, fused_qkv: bool) -> dict[str, Tap]:
    """Return the taps inside of a windowed attention."""
    heads = int(attn.num_heads)
    image: dict[str, Any] = {
        "to_site": windows.heads_to_image,
        "from_site": windows.heads_from_image,
    }
    square: dict[str, Any] = {
        "to_site": windows.pattern_to_image,
        "from_site": windows.pattern_from_image,
    }
    if getattr(attn, "fused_attn", False):
        taps: dict[str, Tap] = {
            part: AttentionTap(
                scope=attn, part=part, **(square if part in ("scores", "pattern") else image)
            )
            for part in PARTS
        }
    else:
        taps = {}
        if fused_qkv:
            for index, part in enumerate("qkv"):
                taps[part] = OutputTap(
                    module=attn.qkv,
                    read=partial(read_part, index=index, heads=heads, windows=windows),
                    write=partial(write_part, index=index, windows=windows),
                )
        taps["scores"] = InputTap(
            module=attn.softmax,
            read=windows.pattern_to_image,
            write=lambda _, value: windows.pattern_from_image(value),
        )
        taps["pattern"] = OutputTap(
            module=attn.softmax,
            read=windows.pattern_to_image,
            write=lambda _, value: windows.pattern_from_image(value),
        )
        taps["z"] = InputTap(
            module=attn.proj,
            read=lambda flat: windows.to_image(flat.reshape(*flat.shape[:2], heads, -1)),
            write=lambda flat, value: windows.from_image(value).reshape(flat.shape),
        )
    taps["head_out"] = HeadOutTap(
        module=attn.proj, heads=heads, to_site=windows.to_image, from_site=windows.from_image
    )
    return taps


def swin_block(name: str, block: Any, *, v2: bool) -> dict[str, Tap]:
    """Return the taps of one block; v2 has its norms behind the branches."""
    high, wide = (int(n) for n in block.input_resolution)
    grid = TokenGrid(cls=0, register=0, patch=(high, wide))
    flat: dict[str, Any] = {"read": flatten_patches, "write": unflatten_patches}
    window, shift = tuple(block.window_size), tuple(block.shift_size)
    whole = high % window[0] == 0 and wide % window[1] == 0
    windows = Windows(grid=(high, wide), window=window, shift=shift) if whole else None
    taps: dict[str, Tap] = {"resid_pre": InputTap(module=block, **flat)}
    if not v2:
        taps["attn_in"] = OutputTap(module=block.norm1, **flat)
    elif windows is not None:
        taps["attn_in"] = InputTap(
            module=block.attn,
            read=windows.to_image,
            write=lambda _, value: windows.from_image(value),
        )
    if windows is not None:
        taps |= window_taps(block.attn, windows, fused_qkv=not v2)
    taps |= {
        "attn_out": OutputTap(module=block.drop_path1, **flat),
        "resid_mid": MidStreamTap(
            branch=block.mlp if v2 else block.norm2, branch_out=block.drop_path2, block=block
        ),
        "mlp_in": InputTap(module=block.mlp),
        "mlp_pre": OutputTap(module=block.mlp.fc1),
        "mlp_post": InputTap(module=block.mlp.fc2),
        "mlp_out": OutputTap(module=block.drop_path2),
        "resid_post": OutputTap(module=block, **flat),
    }
    return {f"{name}.{part}": with_grid(tap, grid) for part, tap in taps.items()}


def with_grid(tap: Tap, grid: TokenGrid) -> Tap:
    """Return a tap on another grid than the model's."""
    return dataclasses.replace(tap, grid=grid)


class TimmSwin(Columnar):
    """timm's ``SwinTransformer`` and ``SwinTransformerV2``."""

    name = "timm_swin"
    modules = ("swin_transformer", "swin_transformer_v2")
    classes = ("SwinTransformer", "SwinTransformerV2")

    def anatomy(self, module: Any) -> Anatomy:
        """Describe the module."""
        v2 = type(module).__name__ == "SwinTransformerV2"
        blocks = [block for stage in module.layers for block in stage.blocks]
        first = blocks[0]
        grid = TokenGrid(cls=0, register=0, patch=tuple(module.patch_embed.grid_size))
        last = TokenGrid(cls=0, register=0, patch=tuple(blocks[-1].input_resolution))
        flat: dict[str, Any] = {"read": flatten_patches, "write": unflatten_patches}
        taps: dict[str, Tap] = {"embed": OutputTap(module=module.patch_embed, **flat)}
        for i, block in enumerate(blocks):
            taps |= swin_block(f"blocks.{i}", block, v2=v2)
        taps["final"] = OutputTap(module=module.norm, grid=last, **flat)
        taps["pooled"] = InputTap(module=module.head.fc)
        if module.num_classes:
            taps["logits"] = OutputTap(module=module)
        shape = timm_backend.input_shape(module)
        width, heads = int(first.mlp.fc2.out_features), int(first.attn.num_heads)
        return Anatomy(
            taps=taps,
            grid=grid,
            d_model=width,
            n_layers=len(blocks),
            n_heads=heads,
            d_head=int(first.attn.proj.in_features) // heads,
            d_mlp=int(first.mlp.fc2.in_features),
            n_classes=int(module.num_classes),
            input_shape=shape,
            transform=timm_backend.transform(module, shape),
            revision=timm_backend.revision(module),
        )

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return small models of both versions, with shifted windows."""

        def v1(**options: Any) -> Callable[[], nn.Module]:
            def make() -> nn.Module:
                from timm.models.swin_transformer import SwinTransformer

                sizes = {"img_size": 64, "patch_size": 4, "embed_dim": 16, "depths": (2, 2)}
                module: nn.Module = SwinTransformer(
                    **sizes, num_heads=(2, 4), window_size=4, num_classes=7, **options
                )
                return module

            return make

        def v2() -> nn.Module:
            from timm.models.swin_transformer_v2 import SwinTransformerV2

            sizes = {"img_size": 64, "patch_size": 4, "embed_dim": 16, "depths": (2, 2)}
            module: nn.Module = SwinTransformerV2(
                **sizes, num_heads=(2, 4), window_size=4, num_classes=7
            )
            return module

        def fused() -> nn.Module:
            from timm.layers import set_fused_attn, use_fused_attn

            before = int(use_fused_attn()) + int(use_fused_attn(experimental=True))
            set_fused_attn(True, experimental=True)
            try:
                return v1()()
            finally:
                set_fused_attn(before > 0, experimental=before > 1)

        def padded() -> nn.Module:
            from timm.models.swin_transformer import SwinTransformer

            sizes = {"img_size": 40, "patch_size": 4, "embed_dim": 16, "depths": (2,)}
            module: nn.Module = SwinTransformer(
                **sizes, num_heads=(2,), window_size=4, num_classes=7
            )
            return module

        return {"v1": v1(), "fused": fused, "head_dim": v1(head_dim=6), "padded": padded, "v2": v2}


FAMILY = TimmSwin()
