"""timm's MViTv2: queries are pooled where a stage begins, keys and values always.

q, k and v are those after pooling and norm. There is no z: the pooled query is added to it before
the output projection, inside of one expression; ``head_out`` holds both.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from vitmodels import timm_backend
from vitmodels.attention import AttentionTap
from vitmodels.family import Anatomy
from vitmodels.spec import TokenGrid
from vitmodels.taps import HeadOutTap, InputTap, MidStreamTap, OutputTap, Tap
from vitmodels.timm_columnar import Columnar


def _swap(value: Tensor) -> Tensor:
    return value.transpose(1, 2)


def pooled(grid: TokenGrid, pool: Any) -> TokenGrid:
    """Return the grid behind a pooling convolution (None: none)."""
    if pool is None:
        return grid
    geometry = zip(grid.patch, pool.kernel_size, pool.stride, pool.padding, strict=True)
    patch = tuple((n + 2 * p - k) // s + 1 for n, k, s, p in geometry)
    return TokenGrid(cls=grid.cls, register=0, patch=patch)


def mvit_block(name: str, block: Any, before: TokenGrid) -> tuple[dict[str, Tap], TokenGrid]:
    """Return the taps of one block, and the grid of the tokens it gives."""
    attn = block.attn
    after = pooled(before, attn.pool_q)
    keys = pooled(before, attn.pool_k)
    taps: dict[str, Tap] = {
        "resid_pre": InputTap(module=block, grid=before),
        "attn_in": InputTap(module=attn, grid=before),
    }
    for part, grid in (("q", after), ("k", keys), ("v", keys)):
        norm = getattr(attn, f"norm_{part}")
        if norm is not None:
            taps[part] = OutputTap(
                module=norm, read=_swap, write=lambda _, new: _swap(new), grid=grid
            )
    for part in ("scores", "pattern"):
        taps[part] = AttentionTap(scope=attn, part=part, softmax=True, grid=after)
    taps["head_out"] = HeadOutTap(module=attn.proj, heads=attn.num_heads, grid=after)
    taps["attn_out"] = OutputTap(module=block.drop_path1, grid=after)
    if block.shortcut_proj_mlp is None:
        taps["resid_mid"] = MidStreamTap(
            branch=block.norm2, branch_out=block.drop_path2, block=block, grid=after
        )
    else:  # both ways go through the norm
        taps["resid_mid"] = InputTap(module=block.norm2, grid=after)
    taps |= {
        "mlp_in": InputTap(module=block.mlp, grid=after),
        "mlp_pre": OutputTap(module=block.mlp.fc1, grid=after),
        "mlp_post": InputTap(module=block.mlp.fc2, grid=after),
        "mlp_out": OutputTap(module=block.drop_path2, grid=after),
        "resid_post": OutputTap(module=block, grid=after),
    }
    return {f"{name}.{part}": tap for part, tap in taps.items()}, after


class TimmMViT(Columnar):
    """timm's ``MultiScaleVit``."""

    name = "timm_mvit"
    modules = ("mvitv2",)
    classes = ("MultiScaleVit",)

    def anatomy(self, module: Any) -> Anatomy:
        """Describe the module."""
        blocks = [block for stage in module.stages for block in stage.blocks]
        first = blocks[0]
        size = tuple(int(n) for n in module.stages[0].feat_size)
        if first.attn.pool_q is not None:
            size = tuple(n * s for n, s in zip(size, first.attn.pool_q.stride, strict=True))
        grid = TokenGrid(cls=int(module.cls_token is not None), register=0, patch=size)
        patches = TokenGrid(cls=0, register=0, patch=size)
        taps: dict[str, Tap] = {"patch_embed": OutputTap(module=module.patch_embed, grid=patches)}
        taps["embed"] = InputTap(module=module.stages[0])
        here = grid
        for i, block in enumerate(blocks):
            more, here = mvit_block(f"blocks.{i}", block, here)
            taps |= more
        taps["final"] = OutputTap(module=module.norm, grid=here)
        taps["pooled"] = InputTap(module=module.head)
        if module.num_classes:
            taps["logits"] = OutputTap(module=module)
        patch = module.patch_embed.proj
        shape = (int(patch.in_channels), size[0] * patch.stride[0], size[1] * patch.stride[1])
        heads = int(first.attn.num_heads)
        return Anatomy(
            taps=taps,
            grid=grid,
            d_model=int(first.dim),
            n_layers=len(blocks),
            n_heads=heads,
            d_head=int(first.attn.head_dim),
            d_mlp=int(first.mlp.fc2.in_features),
            n_classes=int(module.num_classes),
            input_shape=shape,
            transform=timm_backend.transform(module, shape),
            revision=timm_backend.revision(module),
        )

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return small models with and without CLS and expansion inside of the attention."""

        def small(**options: Any) -> Callable[[], nn.Module]:
            def make() -> nn.Module:
                from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

                cfg = MultiScaleVitCfg(depths=(1, 2), embed_dim=8, num_heads=1, **options)
                module: nn.Module = MultiScaleVit(cfg, img_size=(32, 32), num_classes=7)
                return module

            return make

        return {
            "small": small(),
            "cls": small(use_cls_token=True),
            "expand_in_mlp": small(expand_attn=False),
        }


FAMILY = TimmMViT()
