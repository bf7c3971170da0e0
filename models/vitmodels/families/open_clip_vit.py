"""open_clip's own image towers: ``VisionTransformer``, also those of CoCa.

Attention is ``nn.MultiheadAttention``, whose fused inference path gives results that differ
from its ordinary path by up to 2e-6 and that no tap can see into. It is switched off, for the
whole process, as soon as a tower is described, so that plain, hooked, tapped and
differentiated passes agree to the last bit. They agree with open_clip's own output when its
parameters are frozen too: torch multiplies by another route where weights require gradients
(1e-6).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitmodels import open_clip_backend as backend
from vitmodels import open_clip_names as naming
from vitmodels.attention import PARTS, PARTS_MHA, attention_taps
from vitmodels.blocks import block_taps
from vitmodels.family import Anatomy, Family, Request
from vitmodels.spec import TokenGrid
from vitmodels.taps import InputTap, OutputTap, PositionTap, Tap


def first(output: Any) -> Tensor:
    """Return the pooled embedding of a tower that may return its tokens beside it."""
    pooled: Tensor = output[0] if isinstance(output, tuple) else output
    return pooled


def call_visual(module: Any, x: Any) -> Tensor:
    """Run an image tower, or that of a whole CLIP: ``[B, 3, H, W] -> [B, E]``, not normalised."""
    return first(getattr(module, "visual", module)(x))


def resblock_taps(name: str, block: Any) -> dict[str, Tap]:
    """Return the taps of one residual block of open_clip's ``Transformer``.

    Raises
    ------
    ValueError
        Scaled cosine attention, which open_clip itself cannot run on batches.
    """
    mha = isinstance(block.attn, nn.MultiheadAttention)
    if not mha and block.attn.logit_scale is not None:
        raise ValueError(f"{name}: scaled cosine attention has no taps")
    taps = block_taps(
        name,
        block=block,
        attn=block.attn,
        proj=None if mha else block.attn.out_proj,
        attn_added=block.ls_1,
        heads=block.attn.num_heads,
        norm2=block.ln_2,
        mlp=block.mlp,
        mlp_first=block.mlp.c_fc,
        mlp_last=block.mlp.c_proj,
        mlp_added=block.ls_2,
        parts=(),
    )
    # The normalised stream is given three times, as query, key and value: one edit of the
    # norm's output reaches all of them.
    pre, _, *rest = taps.items()
    parts = attention_taps(block.attn, PARTS_MHA if mha else PARTS)
    inside = {f"{name}.{part}": tap for part, tap in parts.items()}
    return dict([pre, (f"{name}.attn_in", OutputTap(module=block.ln_1)), *inside.items(), *rest])


def _read_patches(output: Tensor) -> Tensor:
    """``[B, D, H, W] -> [B, N, D]``."""
    return output.flatten(2).transpose(1, 2)


def _write_patches(output: Tensor, value: Tensor) -> Tensor:
    return value.transpose(1, 2).reshape(output.shape)


def _read_cls(output: Tensor) -> Tensor:
    return output[:, 0]


def _write_cls(output: Tensor, value: Tensor) -> Tensor:
    return torch.cat([value[:, None], output[:, 1:]], dim=1)


def _read_mean(output: Tensor) -> Tensor:
    return output[:, 1:].mean(dim=1)


def _write_mean(output: Tensor, value: Tensor) -> Tensor:
    """Shift every patch alike, so that their mean becomes `value`."""
    shift = value - _read_mean(output)
    return torch.cat([output[:, :1], output[:, 1:] + shift[:, None]], dim=1)


_POOL = {"tok": (_read_cls, _write_cls), "avg": (_read_mean, _write_mean)}


def pool_taps(visual: Any) -> dict[str, Tap]:
    """Return what follows the blocks: ``final`` or ``pool_tokens``, ``pooled``, ``projection``."""
    norm, taps = visual.ln_post, dict[str, Tap]()
    pool = _POOL.get(visual.pool_type)
    if visual.attn_pool is not None:
        if visual.attn_pool_contrastive is not None or pool is None:
            raise ValueError(
                "open_clip's two attentional poolers (attentional_pool='parallel' or 'cascade') "
                "have no taps; attentional_pool=True, as in the published CoCa towers, has"
            )
        queries = int(visual.attn_pool.query.shape[0])
        # The first query is what the projection reads; nothing reads the others here.
        grid = TokenGrid(cls=1, register=queries - 1, patch=(0, 0))
        taps["pool_tokens"] = OutputTap(module=norm, grid=grid)
        taps["pooled"] = OutputTap(module=norm, read=pool[0], write=pool[1])
    elif visual.final_ln_after_pool:
        taps["pooled"] = OutputTap(module=norm)
    else:
        taps["final"] = OutputTap(module=norm)
        if pool is not None:
            taps["pooled"] = OutputTap(module=norm, read=pool[0], write=pool[1])
    if pool is not None:
        taps["projection"] = OutputTap(module=visual)
    return taps


class OpenClipViT(Family):
    """``open_clip.transformer.VisionTransformer``, alone or inside of a CLIP."""

    name = "open_clip_vit"
    prefix = "open_clip"
    backend = "open_clip_torch"

    def _configs(self) -> tuple[str, ...]:
        return tuple(
            config
            for config in naming.config_names()
            if not naming.vision_cfg(config).get("timm_model_name")
            and isinstance(naming.vision_cfg(config).get("layers"), int)
        )

    def names(self) -> Sequence[str]:
        """Return the configurations with a native ViT, and their tags."""
        return naming.names(self._configs())

    def claims(self, name: str) -> bool:
        """Accept a configuration, whatever its tag."""
        return naming.split(name)[0] in self._configs()

    def alias(self, id: str) -> str | None:
        """Accept hub ids of open_clip, bare or behind ``hf-hub:`` or ``open-clip:``."""
        name = naming.from_hub(id)
        return name if name is not None and self.claims(name) else None

    def build(self, request: Request) -> nn.Module:
        """Build the image tower by open_clip's own classes."""
        return backend.build_visual(request)

    def accepts(self, module: nn.Module) -> bool:
        """Accept the tower, or a CLIP that has one."""
        return backend.is_a(getattr(module, "visual", module), "VisionTransformer")

    def anatomy(self, module: Any) -> Anatomy:
        """Describe the tower."""
        torch.backends.mha.set_fastpath_enabled(False)
        visual = getattr(module, "visual", module)
        grid = TokenGrid(cls=1, patch=tuple(int(n) for n in visual.grid_size))
        height, width = visual.image_size
        taps: dict[str, Tap] = {
            "patch_embed": OutputTap(
                module=visual.conv1,
                read=_read_patches,
                write=_write_patches,
                grid=TokenGrid(cls=0, patch=grid.patch),
            ),
            "pos_embed": PositionTap(
                model=visual, attribute="positional_embedding", after=visual.ln_pre, skip=0
            ),
            "embed": InputTap(module=visual.ln_pre),
        }
        for i, block in enumerate(visual.transformer.resblocks):
            taps |= resblock_taps(f"blocks.{i}", block)
        block = visual.transformer.resblocks[0]
        return Anatomy(
            taps=taps | pool_taps(visual),
            grid=grid,
            d_model=int(visual.transformer.width),
            n_layers=len(visual.transformer.resblocks),
            n_heads=int(block.attn.num_heads),
            d_head=int(block.attn.head_dim),
            d_mlp=int(block.mlp.c_fc.out_features),
            input_shape=(3, int(height), int(width)),
            transform=backend.transform(visual, (int(height), int(width))),
            revision=backend.revision(visual),
            call=call_visual,
        )

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return one small tower for each thing that may differ."""

        def small(*, quick: bool = False, **options: Any) -> Callable[[], nn.Module]:
            def make() -> nn.Module:
                import open_clip

                sizes = {"layers": 3, "width": 24, "head_width": 6, "patch_size": 8}
                clip = open_clip.CLIP(
                    embed_dim=20,
                    vision_cfg={"image_size": 32, "mlp_ratio": 2.5, **sizes, **options},
                    text_cfg={"layers": 1, "width": 8, "heads": 1, "vocab_size": 4},
                    quick_gelu=quick,
                )
                tower: nn.Module = clip.visual
                return tower

            return make

        return {
            "gelu": small(),
            "quick_gelu": small(quick=True),
            "layer_scale": small(ls_init_value=0.5),
            "no_ln_pre": small(no_ln_pre=True),
            "clipa": small(
                no_ln_pre=True,
                pool_type="avg",
                final_ln_after_pool=True,
                pos_embed_type="sin_cos_2d",
            ),
            "average": small(pool_type="avg"),
            "coca": small(
                attentional_pool=True,
                attn_pooler_queries=5,
                attn_pooler_heads=4,
                output_tokens=True,
            ),
            "custom": small(qk_norm=True, scale_attn_inner=True, scale_attn=True, scale_fc=True),
            "custom_heads": small(scale_heads=True, ls_init_value=0.5),
            "wide_image": small(image_size=(16, 40)),
        }


FAMILY = OpenClipViT()
