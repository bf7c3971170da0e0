"""Columnar vision transformers of timm: what their families share.

One width and one set of tokens from the embedding to the head, blocks in ``model.blocks``.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from vitmodels import timm_backend
from vitmodels.attention import PARTS, attention_taps
from vitmodels.blocks import block_taps
from vitmodels.family import Anatomy, Family, Request
from vitmodels.spec import TokenGrid
from vitmodels.taps import InputTap, OutputTap, PositionTap, Tap


def flatten_patches(output: Tensor) -> Tensor:
    """``[B, H, W, D]`` (or already ``[B, N, D]``) -> ``[B, N, D]``."""
    return output.flatten(1, 2) if output.dim() == 4 else output


def unflatten_patches(output: Tensor, value: Tensor) -> Tensor:
    """Bring a value back to the shape of the output it was read from."""
    return value.reshape(output.shape)


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


def embed_taps(model: Any, grid: TokenGrid, after: nn.Module | None = None) -> dict[str, Tap]:
    """Return ``patch_embed``, ``pos_embed`` (where learned) and ``embed``.

    `after` is the module that takes the embedded tokens, None for ``model.norm_pre``.
    """
    after = model.norm_pre if after is None else after
    patches = TokenGrid(cls=0, register=0, patch=grid.patch)
    taps: dict[str, Tap] = {
        "patch_embed": OutputTap(
            module=model.patch_embed, read=flatten_patches, write=unflatten_patches, grid=patches
        )
    }
    if model.pos_embed is not None and not getattr(model, "dynamic_img_size", False):
        without = bool(getattr(model, "no_embed_class", False))
        taps["pos_embed"] = PositionTap(
            model=model,
            after=after,
            skip=grid.cls + grid.register if without else 0,
            grid=patches if without else None,
        )
    return {**taps, "embed": InputTap(module=after)}


def columnar_block(name: str, block: Any) -> dict[str, Tap]:
    """Return the taps of a block with ``attn``, ``mlp``, ``norm1/2`` and ``drop_path1/2``.

    The norm before the MLP tells a pre-norm from a post-norm block: with norms behind the
    branches the MLP takes the stream itself.
    """
    kind = type(block).__name__
    if kind not in _BLOCKS:
        raise ValueError(
            f"blocks of timm's class {kind} cannot be tapped; those that can are "
            f"{', '.join(sorted(_BLOCKS))}. docs/adding-a-model.md says how to add a family"
        )
    attn, has_mlp = block.attn, hasattr(block.mlp, "fc2")
    fused = type(attn).__name__ in _FUSED and attn.fused_attn
    taps = block_taps(
        name,
        block=block,
        attn=attn,
        proj=attn.proj,
        attn_added=block.drop_path1,
        heads=attn.num_heads,
        norm2=None if not has_mlp else block.norm2 if _BLOCKS[kind] == "pre" else block.mlp,
        mlp_added=block.drop_path2,
        parts=PARTS if fused else (),
        **(mlp_modules(block.mlp) if has_mlp else {}),
    )
    if type(attn).__name__ in _FUSED and not fused:  # timm was told not to fuse
        inside = attention_taps(attn, ("scores", "pattern"), softmax=True)
        taps = _behind(taps, f"{name}.attn_in", {f"{name}.{p}": t for p, t in inside.items()})
    return taps


def _behind(taps: dict[str, Tap], key: str, more: Mapping[str, Tap]) -> dict[str, Tap]:
    """Insert taps behind a key."""
    result: dict[str, Tap] = {}
    for name, tap in taps.items():
        result[name] = tap
        if name == key:
            result.update(more)
    return result


_BLOCKS = {
    "Block": "pre",
    "EvaBlock": "pre",
    "RelPosBlock": "pre",
    "ResPostBlock": "post",
    "ResPostRelPosBlock": "post",
    "EvaBlockPostNorm": "post",
}
_FUSED = {"Attention", "AttentionRope", "EvaAttention", "RelPosAttention"}


class Columnar(Family):
    """A family of columnar timm models; a subclass names its modules and classes."""

    prefix = "timm"
    backend = "timm"
    modules: ClassVar[tuple[str, ...]]
    """Modules of timm that register the architectures."""
    classes: ClassVar[tuple[str, ...]]
    """Names of the model classes."""

    def serves(self, name: str) -> bool:
        """Whether an architecture of the modules is this family's."""
        del name
        return True

    def names(self) -> tuple[str, ...]:
        """Return architectures and tags of the modules."""
        return tuple(name for name in timm_backend.names(self.modules) if self.serves(name))

    def claims(self, name: str) -> bool:
        """Accept an architecture of the modules, whatever its tag."""
        return timm_backend.claims(name, self.modules) and self.serves(name)

    def alias(self, id: str) -> str | None:
        """Accept a bare timm name."""
        return id if "/" not in id and ":" not in id and self.claims(id) else None

    def build(self, request: Request) -> nn.Module:
        """Build by timm's factory."""
        return timm_backend.build(request)

    def accepts(self, module: Any) -> bool:
        """Accept the classes themselves, and no subclass that may change the forward."""
        kind = type(module)
        return kind.__module__.startswith("timm.models.") and kind.__name__ in self.classes

    def grid(self, module: Any) -> TokenGrid:
        """Return the tokens of the residual stream."""
        cls = int(module.cls_token is not None)
        return TokenGrid(
            cls=cls,
            register=int(module.num_prefix_tokens) - cls,
            patch=tuple(int(n) for n in module.patch_embed.grid_size),
        )

    def shape(self, module: Any) -> tuple[int, int, int]:
        """Return (channels, height, width) of an input."""
        return timm_backend.input_shape(module)

    def embed(self, module: Any, grid: TokenGrid) -> dict[str, Tap]:
        """Return the taps before the blocks."""
        return embed_taps(module, grid)

    def block(self, name: str, block: Any) -> dict[str, Tap]:
        """Return the taps of one block."""
        return columnar_block(name, block)

    def heads(self, module: Any) -> dict[str, Tap]:
        """Return the taps behind the blocks."""
        return head_taps(module)

    def anatomy(self, module: Any) -> Anatomy:
        """Describe the module."""
        grid = self.grid(module)
        taps = self.embed(module, grid)
        for i, block in enumerate(module.blocks):
            taps |= self.block(f"blocks.{i}", block)
        shape = self.shape(module)
        return Anatomy(
            taps=taps | self.heads(module),
            grid=grid,
            d_model=int(module.embed_dim),
            n_layers=len(module.blocks),
            **self.sizes(module.blocks[0]),
            n_classes=int(module.num_classes),
            input_shape=shape,
            transform=timm_backend.transform(module, shape),
            revision=timm_backend.revision(module),
        )

    def sizes(self, block: Any) -> dict[str, Any]:
        """Return n_heads, d_head and d_mlp of a block."""
        heads = int(block.attn.num_heads)
        return {
            "n_heads": heads,
            "d_head": int(block.attn.proj.in_features) // heads,
            "d_mlp": int(block.mlp.fc2.in_features) if hasattr(block.mlp, "fc2") else 0,
        }
