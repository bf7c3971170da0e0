"""timm's ``NaFlexVit`` on whole images: the patch grid follows the size of the image.

Batches of patches of several image sizes (dicts with coordinates) have no one token grid, and
are refused by the shape check: pass images.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vitmodels import timm_backend
from vitmodels.family import Request
from vitmodels.spec import TokenGrid
from vitmodels.taps import InputTap, Tap
from vitmodels.timm_columnar import Columnar, columnar_block


class TimmNaFlex(Columnar):
    """timm's ``NaFlexVit``."""

    name = "timm_naflex"
    modules = ("naflexvit",)
    classes = ("NaFlexVit",)

    def build(self, request: Request) -> nn.Module:
        """Build by timm's factory; remember the image size, which the module does not."""
        module: Any = timm_backend.build(request)
        size = request.img_size
        if size is not None:
            module.naflex_size = (size, size) if isinstance(size, int) else tuple(size)
        built: nn.Module = module
        return built

    def shape(self, module: Any) -> tuple[int, int, int]:
        """Return the size asked for, or that of the checkpoint, in whole patches."""
        size = getattr(module, "naflex_size", None)
        config = getattr(module, "pretrained_cfg", None) or {}
        if size is None:
            size = config.get("input_size", (3, 256, 256))[1:]
        patch = module.embeds.patch_size
        height, width = (int(n) // int(p) * int(p) for n, p in zip(size, patch, strict=True))
        return int(module.in_chans), height, width

    def grid(self, module: Any) -> TokenGrid:
        """Return the tokens at that size."""
        patch = module.embeds.patch_size
        height, width = self.shape(module)[1:]
        return TokenGrid(
            cls=int(module.has_class_token),
            register=int(module.num_reg_tokens),
            patch=(height // int(patch[0]), width // int(patch[1])),
        )

    def embed(self, module: Any, grid: TokenGrid) -> dict[str, Tap]:
        """Return the taps before the blocks."""
        del grid
        return {"embed": InputTap(module=module.norm_pre)}

    def block(self, name: str, block: Any) -> dict[str, Tap]:
        """Return the taps of one block."""
        return columnar_block(name, block)

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return one small model for each kind of positions and pooling."""

        def small(**options: Any) -> Callable[[], nn.Module]:
            def make() -> nn.Module:
                from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

                sizes: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 2}
                cfg = NaFlexVitCfg(**{**sizes, "num_heads": 4, **options})
                module: Any = NaFlexVit(cfg, num_classes=7, img_size=32)
                module.naflex_size = (32, 40)
                built: nn.Module = module
                return built

            return make

        return {
            "gap": small(pos_embed_grid_size=(4, 4), reg_tokens=4, global_pool="avg"),
            "map": small(pos_embed_grid_size=(4, 4), global_pool="map", init_values=0.5),
            "factorized": small(pos_embed="factorized", pos_embed_grid_size=(4, 4)),
            "rope": small(
                pos_embed="none",
                rope_type="axial",
                rope_ref_feat_shape=(4, 4),
                class_token=True,
                global_pool="token",
                attn_type="rope",
            ),
        }


FAMILY = TimmNaFlex()
