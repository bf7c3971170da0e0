"""timm's ``VisionTransformerRelPos``: relative positions as a bias or an MLP, no absolute ones."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vitmodels.spec import TokenGrid
from vitmodels.taps import InputTap, OutputTap, Tap
from vitmodels.timm_columnar import Columnar


class TimmRelPos(Columnar):
    """timm's ``VisionTransformerRelPos``, pre-norm and with norms behind the branches."""

    name = "timm_relpos"
    modules = ("vision_transformer_relpos",)
    classes = ("VisionTransformerRelPos",)

    def embed(self, module: Any, grid: TokenGrid) -> dict[str, Tap]:
        """Return the taps before the blocks: there is no position to add."""
        patches = TokenGrid(cls=0, register=0, patch=grid.patch)
        return {
            "patch_embed": OutputTap(module=module.patch_embed, grid=patches),
            "embed": InputTap(module=module.blocks[0]),
        }

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return one small model for each kind of positions and blocks."""

        def small(block: str = "RelPosBlock", **options: Any) -> Callable[[], nn.Module]:
            def make() -> nn.Module:
                from timm.models import vision_transformer_relpos as timm_relpos

                sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2}
                module: nn.Module = timm_relpos.VisionTransformerRelPos(
                    **sizes,
                    num_heads=4,
                    num_classes=7,
                    block_fn=getattr(timm_relpos, block),
                    **{"init_values": 0.5, **options},
                )
                return module

            return make

        return {
            "mlp": small(),
            "bias": small(rel_pos_type="bias", fc_norm=True),
            "shared": small(rel_pos_type="mlp", shared_rel_pos=True, rel_pos_dim=16),
            "cls": small(class_token=True, global_pool="token"),
            "post_norm": small(block="ResPostRelPosBlock"),
        }


FAMILY = TimmRelPos()
