"""timm's Hiera: mask units, query pooling, and tokens in an order of its own.

Inside, tokens are unrolled so that pooling is a maximum over contiguous pieces. Sites have them
in image order. Where a stage begins, queries are pooled inside of the attention: ``attn_in``, k and
v have the grid before, the rest of the block the grid after. Patterns of mask-unit attention have,
as keys, the tokens of the query's own unit in the model's order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitmodels import timm_backend
from vitmodels.attention import PARTS, AttentionTap
from vitmodels.family import Anatomy
from vitmodels.spec import TokenGrid
from vitmodels.taps import HeadOutTap, InputTap, MidStreamTap, OutputTap, Tap
from vitmodels.timm_columnar import Columnar


@dataclass(frozen=True, kw_only=True)
class Order:
    """Where the tokens of the image stand inside of the model."""

    index: Tensor
    """``image[:, i] = inside[:, index[i]]``."""
    inverse: Tensor
    """``inside[:, i] = image[:, inverse[i]]``."""

    def roll(self, value: Tensor, dim: int = 1) -> Tensor:
        """Bring a dimension from the model's order into that of the image."""
        return value.index_select(dim, self.index.to(value.device))

    def unroll(self, value: Tensor, dim: int = 1) -> Tensor:
        """Bring a dimension from the order of the image into the model's."""
        return value.index_select(dim, self.inverse.to(value.device))


def order_after(model: Any, block: int) -> tuple[Order, TokenGrid]:
    """Return order and grid of the tokens that a block gives."""
    size = [int(n) for n in model.reroll.schedule[block][1]]
    n_tokens = size[0] * size[1]
    numbers = torch.arange(n_tokens, dtype=torch.float64, device="cpu").reshape(1, -1, 1)
    index = model.reroll(numbers, block).reshape(-1).long()
    grid = TokenGrid(cls=0, register=0, patch=(size[0], size[1]))
    return Order(index=index, inverse=index.argsort()), grid


def attention(
    attn: Any, before: tuple[Order, TokenGrid], after: tuple[Order, TokenGrid]
) -> dict[str, Tap]:
    """Return the taps of q, k, v, scores, pattern and z."""
    units = bool(attn.use_mask_unit_attn)

    def convert(order: Order) -> dict[str, Any]:
        """Between ``[B, heads, (units,) n, K]`` and ``[B, token, heads, K]``."""

        def to_site(value: Tensor) -> Tensor:
            tokens = value.transpose(1, 3).flatten(1, 2) if units else value.transpose(1, 2)
            return order.roll(tokens)

        def from_site(value: Tensor) -> Tensor:
            tokens = order.unroll(value)
            if not units:
                return tokens.transpose(1, 2)
            n_units = tokens.shape[1] // unit_size(order)
            return tokens.reshape(tokens.shape[0], -1, n_units, *tokens.shape[2:]).transpose(1, 3)

        return {"to_site": to_site, "from_site": from_site}

    def unit_size(order: Order) -> int:
        pooled = order is after[0]
        return int(attn.window_size) if pooled else int(attn.window_size * attn.q_stride)

    def square() -> dict[str, Any]:
        queries = convert(after[0])

        def to_site(value: Tensor) -> Tensor:
            rows = queries["to_site"](value).transpose(1, 2)
            return rows if units else before[0].roll(rows, dim=3)

        def from_site(value: Tensor) -> Tensor:
            rows = value if units else before[0].unroll(value, dim=3)
            rolled: Tensor = queries["from_site"](rows.transpose(1, 2))
            return rolled

        return {"to_site": to_site, "from_site": from_site}

    taps: dict[str, Tap] = {}
    for part in PARTS:
        side = before if part in ("k", "v") else after
        layout = square() if part in ("scores", "pattern") else convert(side[0])
        taps[part] = AttentionTap(scope=attn, part=part, grid=side[1], **layout)
    return taps


def hiera_block(
    name: str, block: Any, before: tuple[Order, TokenGrid], after: tuple[Order, TokenGrid]
) -> dict[str, Tap]:
    """Return the taps of one block between two orders of the tokens."""

    def ordered(side: tuple[Order, TokenGrid]) -> dict[str, Any]:
        order, grid = side
        return {"read": order.roll, "write": lambda _, new: order.unroll(new), "grid": grid}

    taps: dict[str, Tap] = {
        "resid_pre": InputTap(module=block, **ordered(before)),
        "attn_in": InputTap(module=block.attn, **ordered(before)),
    }
    if block.attn.fused_attn:
        taps |= attention(block.attn, before, after)
    taps |= {
        "head_out": HeadOutTap(
            module=block.attn.proj,
            heads=block.attn.heads,
            grid=after[1],
            to_site=after[0].roll,
            from_site=after[0].unroll,
        ),
        "attn_out": OutputTap(module=block.drop_path1, **ordered(after)),
        "resid_mid": MidStreamTap(
            branch=block.norm2,
            branch_out=block.drop_path2,
            block=block,
            to_site=after[0].roll,
            from_site=after[0].unroll,
            grid=after[1],
        ),
        "mlp_in": InputTap(module=block.mlp, **ordered(after)),
        "mlp_pre": OutputTap(module=block.mlp.fc1, **ordered(after)),
        "mlp_post": InputTap(module=block.mlp.fc2, **ordered(after)),
        "mlp_out": OutputTap(module=block.drop_path2, **ordered(after)),
        "resid_post": OutputTap(module=block, **ordered(after)),
    }
    return {f"{name}.{part}": tap for part, tap in taps.items()}


class TimmHiera(Columnar):
    """timm's ``Hiera`` on images."""

    name = "timm_hiera"
    modules = ("hiera",)
    classes = ("Hiera",)

    def accepts(self, module: Any) -> bool:
        """Accept the image models (video ones have three dimensions)."""
        return super().accepts(module) and len(module.tokens_spatial_shape) == 2

    def anatomy(self, module: Any) -> Anatomy:
        """Describe the module."""
        high, wide = (int(n) for n in module.tokens_spatial_shape)
        grid = TokenGrid(cls=0, register=0, patch=(high, wide))
        taps: dict[str, Tap] = {
            "patch_embed": OutputTap(module=module.patch_embed),
            "embed": InputTap(module=module.unroll),
        }
        before = order_after(module, 0)
        for i, block in enumerate(module.blocks):
            after = order_after(module, i)
            taps |= hiera_block(f"blocks.{i}", block, before, after)
            before = after
        taps["pooled"] = InputTap(module=module.head.fc)
        if module.num_classes:
            taps["logits"] = OutputTap(module=module)
        first = module.blocks[0]
        stride = module.patch_stride
        shape = (int(module.in_chans), high * int(stride[0]), wide * int(stride[1]))
        return Anatomy(
            taps=taps,
            grid=grid,
            d_model=int(first.dim_out),
            n_layers=len(module.blocks),
            n_heads=int(first.attn.heads),
            d_head=int(first.attn.head_dim),
            d_mlp=int(first.mlp.fc2.in_features),
            n_classes=int(module.num_classes),
            input_shape=shape,
            transform=timm_backend.transform(module, shape),
            revision=timm_backend.revision(module),
        )

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return small models with pooling inside of units and over the image."""

        def small(**options: Any) -> Callable[[], nn.Module]:
            def make() -> nn.Module:
                from timm.models.hiera import Hiera

                sizes: dict[str, Any] = {"img_size": (64, 64), "embed_dim": 8, "num_classes": 7}
                module: nn.Module = Hiera(
                    **sizes, stages=(1, 2, 2), q_pool=2, mask_unit_size=(4, 4), **options
                )
                return module

            return make

        return {
            "units": small(mask_unit_attn=(True, True, False)),
            "global": small(mask_unit_attn=(True, False, False), init_values=0.5),
            "no_projection": small(mask_unit_attn=(True, True, False), use_expand_proj=False),
        }


FAMILY = TimmHiera()
