"""timm's ``Beit``: BEiT and BEiT v2. The relative-position bias is part of the scores."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vitmodels.spec import TokenGrid
from vitmodels.taps import Tap
from vitmodels.timm_columnar import Columnar, embed_taps


class TimmBeit(Columnar):
    """timm's ``Beit``."""

    name = "timm_beit"
    modules = ("beit",)
    classes = ("Beit",)

    def embed(self, module: Any, grid: TokenGrid) -> dict[str, Tap]:
        """Return the taps before the blocks: tokens are complete before ``pos_drop``."""
        return embed_taps(module, grid, after=module.pos_drop)

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return one small model for each kind of positions and MLP."""

        def small(**options: Any) -> Callable[[], nn.Module]:
            def make() -> nn.Module:
                from timm.models.beit import Beit

                sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2}
                module: nn.Module = Beit(**sizes, num_heads=4, num_classes=7, **options)
                return module

            return make

        return {
            "relative": small(use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.5),
            "shared": small(use_abs_pos_emb=False, use_shared_rel_pos_bias=True),
            "absolute": small(use_abs_pos_emb=True, global_pool="token"),
            "swiglu": small(swiglu_mlp=True, scale_mlp=True, init_values=0.5),
        }


FAMILY = TimmBeit()
