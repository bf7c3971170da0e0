"""timm's ``Eva``: EVA, EVA02, DINOv3, Perception Encoder, RoPE-ViT, Sapiens 2 and others.

Rotary positions are applied to q and k inside of the attention: the sites q and k hold them.
LayerScale is a bare parameter of the block; what is added passes ``drop_path1`` and
``drop_path2``, and is read there.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vitmodels.timm_columnar import Columnar


class TimmEva(Columnar):
    """timm's ``Eva``, pre-norm and post-norm."""

    name = "timm_eva"
    modules = ("eva",)
    classes = ("Eva",)

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return one small model for each thing that may differ."""

        def small(**options: Any) -> Callable[[], nn.Module]:
            def make() -> nn.Module:
                from timm.models.eva import Eva

                sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2}
                module: nn.Module = Eva(**{**sizes, "num_heads": 4, "num_classes": 7, **options})
                return module

            return make

        rope: dict[str, Any] = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
        dinov3: dict[str, Any] = {
            **{"rope_type": "dinov3", "num_reg_tokens": 4, "use_abs_pos_emb": False},
            **{"use_rot_pos_emb": True, "init_values": 0.5, "rope_rotate_half": True},
            **{"num_classes": 0, "qkv_bias": False, "use_fc_norm": False},
        }
        return {
            "eva": small(init_values=0.5, use_fc_norm=True, global_pool="avg"),
            "eva02": small(**rope, swiglu_mlp=True, scale_mlp=True, init_values=0.5),
            "eva02_tiny": small(**rope, swiglu_mlp=True, qkv_fused=False),
            "eva02_clip": small(
                **rope,
                scale_attn_inner=True,
                qkv_fused=False,
                scale_mlp=True,
                swiglu_mlp=True,
                global_pool="token",
            ),
            "post_norm": small(use_post_norm=True, global_pool="token"),
            "dinov3": small(**dinov3),
            "perception": small(
                **rope,
                use_pre_transformer_norm=True,
                attn_type="rope",
                global_pool="map",
                use_fc_norm=False,
            ),
            "rope_mixed": small(
                use_rot_pos_emb=True,
                rope_type="mixed",
                attn_type="rope",
                use_abs_pos_emb=False,
                init_values=0.5,
            ),
            "rope_registers": small(
                **rope, attn_type="rope", num_reg_tokens=4, no_embed_class=True
            ),
            "grouped_query": small(
                **rope,
                attn_type="rope",
                num_kv_heads=2,
                qkv_fused=False,
                qk_norm=True,
                init_values=0.5,
                attn_only_layer_scale=True,
            ),
        }


FAMILY = TimmEva()
