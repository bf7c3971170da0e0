"""Columnar ViTs of timm: ``VisionTransformer`` with one attention and one MLP a block.

ViT, DeiT (distilled too), DeiT-3, DINO, DINOv2 (with and without registers), CLIP, SigLIP 1
and 2, MAE, I-JEPA, AIMv2, hybrids and others: with or without CLS, registers, LayerScale, gated
MLP, q/k norm; norms before or behind the branches.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vitmodels.families.timm_parallel import is_parallel
from vitmodels.spec import TokenGrid
from vitmodels.taps import InputTap, Tap
from vitmodels.timm_columnar import Columnar, head_taps


class TimmViT(Columnar):
    """timm's ``VisionTransformer`` and its distilled form."""

    name = "timm_vit"
    modules = ("vision_transformer", "deit", "vision_transformer_hybrid")
    classes = ("VisionTransformer", "VisionTransformerDistilled")

    def serves(self, name: str) -> bool:
        """Leave parallel blocks to their own family."""
        return not is_parallel(name)

    def refusal(self, name: str) -> str | None:
        """Explain architectures of timm that no family describes."""
        import timm

        arch = name.partition(".")[0]
        if not timm.is_model(arch):
            return None
        where = timm.model_entrypoint(arch).__module__
        return (
            f"no family describes the architectures of {where}. Columnar and the commonest "
            "hierarchical transformers are served; docs/adding-a-model.md says how to add one"
        )

    def accepts(self, module: Any) -> bool:
        """Accept the two classes where the blocks have ``attn`` and ``mlp``."""
        return super().accepts(module) and hasattr(module.blocks[0], "attn")

    def grid(self, module: Any) -> TokenGrid:
        """Count the distillation token as a class token: a head reads it."""
        registers = int(module.num_reg_tokens)
        return TokenGrid(
            cls=int(module.num_prefix_tokens) - registers,
            register=registers,
            patch=tuple(int(n) for n in module.patch_embed.grid_size),
        )

    def heads(self, module: Any) -> dict[str, Tap]:
        """Add what the second head of a distilled model takes."""
        taps = head_taps(module)
        if hasattr(module, "head_dist"):
            pooled_dist = {"pooled_dist": InputTap(module=module.head_dist, axes=("channel",))}
            taps = {"final": taps.pop("final"), "pooled": taps.pop("pooled"), **pooled_dist, **taps}
        return taps

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return one small model for each thing that may differ."""

        def small(**options: Any) -> Callable[[], nn.Module]:
            def make() -> nn.Module:
                from timm.models.vision_transformer import VisionTransformer

                sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3}
                sizes |= {"num_heads": 4, "num_classes": 7}
                module: nn.Module = VisionTransformer(**{**sizes, **options})
                return module

            return make

        def swiglu() -> nn.Module:
            from timm.layers import SwiGLUPacked

            return small(mlp_layer=SwiGLUPacked, init_values=0.5)()

        def distilled() -> nn.Module:
            from timm.models.deit import VisionTransformerDistilled

            sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2}
            module: nn.Module = VisionTransformerDistilled(**sizes, num_heads=4, num_classes=7)
            return module

        def post_norm() -> nn.Module:
            from timm.models.vision_transformer import ResPostBlock

            return small(block_fn=ResPostBlock, class_token=False, global_pool="avg")()

        def hybrid() -> nn.Module:
            from timm.layers import HybridEmbed

            def embed(img_size: Any, in_chans: int, embed_dim: int, **_: Any) -> nn.Module:
                stem: Any = nn.Conv2d(in_chans, 8, kernel_size=8, stride=8)
                stem.num_features = 8
                made: nn.Module = HybridEmbed(
                    backbone=stem,
                    img_size=img_size,
                    in_chans=in_chans,
                    embed_dim=embed_dim,
                    feature_size=(4, 4),
                    feature_ratio=8,
                )
                return made

            return small(embed_layer=embed)()

        return {
            "plain": small(),
            "distilled": distilled,
            "post_norm": post_norm,
            "hybrid": hybrid,
            "differential": small(attn_layer="diff"),
            "layer_scale": small(init_values=0.5),
            "registers": small(reg_tokens=4, no_embed_class=True, init_values=0.5),
            "no_cls_gap": small(class_token=False, global_pool="avg", fc_norm=True),
            "clip": small(pre_norm=True, norm_layer=nn.LayerNorm),
            "siglip_map": small(class_token=False, global_pool="map"),
            "qk_norm": small(qk_norm=True),
            "scale_norm": small(scale_attn_norm=True, scale_mlp_norm=True),
            "swiglu": swiglu,
            "no_head": small(num_classes=0),
            "no_position": small(pos_embed="none"),
            "dynamic": small(dynamic_img_size=True),
            "wide_image": small(img_size=(16, 40)),
        }


FAMILY = TimmViT()
