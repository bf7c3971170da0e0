"""Columnar ViTs of timm: ``VisionTransformer`` with pre-norm blocks.

ViT, DeiT-3, DINO, DINOv2 (with and without registers), CLIP, SigLIP 1 and 2, MAE, I-JEPA,
AIMv2 and others: with or without CLS, registers, LayerScale, gated MLP, q/k norm.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vitmodels import timm_backend
from vitmodels.attention import PARTS
from vitmodels.blocks import block_taps
from vitmodels.family import Anatomy, Family, Request
from vitmodels.spec import TokenGrid
from vitmodels.taps import InputTap, OutputTap, Tap, Wire, Wiring

_MODULES = ("vision_transformer",)


def flatten_patches(output: Tensor) -> Tensor:
    """``[B, H, W, D]`` (or already ``[B, N, D]``) -> ``[B, N, D]``."""
    return output.flatten(1, 2) if output.dim() == 4 else output


def unflatten_patches(output: Tensor, value: Tensor) -> Tensor:
    """Bring a value back to the shape of the output it was read from."""
    return value.reshape(output.shape)


@dataclass(frozen=True, kw_only=True)
class PositionTap(Tap):
    """A learned position embedding, repeated over the batch; its edits shift the embedding."""

    model: Any
    """Has the parameter: ``[1, tokens, D]`` or ``[tokens, D]``."""
    attribute: str = "pos_embed"
    """Its name."""
    after: nn.Module
    """Module that takes the embedded tokens."""
    skip: int
    """Leading tokens of the embedding that have no position."""

    def attach(self, wire: Wire, wiring: Wiring) -> None:
        """Shift the input of the module after the sum."""

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            tokens = args[0]
            value = getattr(self.model, self.attribute).expand(tokens.shape[0], -1, -1)
            new = wire(value)
            if not wire.writes:
                return None
            shift = nn.functional.pad(new - value, (0, 0, self.skip, 0))
            return (tokens + shift, *args[1:]), kwargs

        wiring.before(self.after, hook)


def mlp_modules(mlp: Any) -> dict[str, Any]:
    """Return the modules of an MLP of timm as ``block_taps`` wants them."""
    from timm.layers import Mlp

    return {"mlp": mlp, "mlp_first": mlp.fc1 if type(mlp) is Mlp else None, "mlp_last": mlp.fc2}


def head_taps(model: Any) -> dict[str, Tap]:
    """Return ``final``, ``pooled`` and ``logits`` of a columnar timm model."""
    taps: dict[str, Tap] = {
        "final": OutputTap(module=model.norm),
        "pooled": InputTap(module=model.head),
    }
    if model.num_classes:
        taps["logits"] = OutputTap(module=model)
    return taps


def embed_taps(model: Any, grid: TokenGrid) -> dict[str, Tap]:
    """Return ``patch_embed``, ``pos_embed`` (where learned) and ``embed``."""
    patches = TokenGrid(cls=0, register=0, patch=grid.patch)
    taps: dict[str, Tap] = {
        "patch_embed": OutputTap(
            module=model.patch_embed, read=flatten_patches, write=unflatten_patches, grid=patches
        )
    }
    if model.pos_embed is not None and not getattr(model, "dynamic_img_size", False):
        without = bool(model.no_embed_class)
        taps["pos_embed"] = PositionTap(
            model=model,
            after=model.norm_pre,
            skip=grid.cls + grid.register if without else 0,
            grid=patches if without else None,
        )
    return {**taps, "embed": InputTap(module=model.norm_pre)}


class TimmViT(Family):
    """timm's ``VisionTransformer`` whose blocks are ``Block``."""

    name = "timm_vit"
    prefix = "timm"
    backend = "timm"

    def names(self) -> Sequence[str]:
        """Return all names of timm's vision_transformer module with standard blocks."""
        return [name for name in timm_backend.names(_MODULES) if not _other_blocks(name)]

    def claims(self, name: str) -> bool:
        """Accept an architecture of the module, whatever its tag."""
        return timm_backend.claims(name, _MODULES) and not _other_blocks(name)

    def alias(self, id: str) -> str | None:
        """Accept a bare timm name."""
        return id if "/" not in id and ":" not in id and self.claims(id) else None

    def build(self, request: Request) -> nn.Module:
        """Build by timm's factory."""
        return timm_backend.build(request)

    def accepts(self, module: Any) -> bool:
        """Accept ``VisionTransformer`` itself, and no subclass that changes its forward."""
        from timm.models.vision_transformer import VisionTransformer

        return type(module) is VisionTransformer

    def anatomy(self, module: Any) -> Anatomy:
        """Describe the module."""
        from timm.layers import Attention
        from timm.models.vision_transformer import Block

        grid = TokenGrid(
            cls=int(module.has_class_token),
            register=int(module.num_reg_tokens),
            patch=tuple(int(n) for n in module.patch_embed.grid_size),
        )
        taps = embed_taps(module, grid)
        for i, block in enumerate(module.blocks):
            if type(block) is not Block:
                raise ValueError(
                    f"family timm_vit taps blocks of class Block; block {i} is a "
                    f"{type(block).__name__}. docs/adding-a-model.md says how to add a family"
                )
            plain = type(block.attn) is Attention
            has_mlp = hasattr(block.mlp, "fc2")
            taps |= block_taps(
                f"blocks.{i}",
                block=block,
                attn=block.attn,
                proj=block.attn.proj,
                attn_added=block.drop_path1,
                heads=block.attn.num_heads,
                norm2=block.norm2 if has_mlp else None,
                mlp_added=block.drop_path2,
                parts=PARTS if plain else (),
                **(mlp_modules(block.mlp) if has_mlp else {}),
            )
        first = module.blocks[0]
        shape = timm_backend.input_shape(module)
        return Anatomy(
            taps=taps | head_taps(module),
            grid=grid,
            d_model=int(module.embed_dim),
            n_layers=len(module.blocks),
            n_heads=int(first.attn.num_heads),
            d_head=int(first.attn.head_dim),
            d_mlp=int(first.mlp.fc2.in_features) if hasattr(first.mlp, "fc2") else 0,
            n_classes=int(module.num_classes),
            input_shape=shape,
            transform=timm_backend.transform(module, shape),
            revision=timm_backend.revision(module),
        )

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

        return {
            "plain": small(),
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


def _other_blocks(name: str) -> bool:
    """Whether an architecture of the module has other blocks than ``Block``."""
    words = name.partition(".")[0].split("_")
    return bool({"xp", "dpwee", "dwee", "d2wee"} & set(words)) or "rpn" in words or "18x2" in words


FAMILY = TimmViT()

__all__ = ["FAMILY", "embed_taps", "flatten_patches", "head_taps", "mlp_modules"]
