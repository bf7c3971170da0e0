"""timm's ``VisionTransformer`` with parallel branches: 18x2 ViTs and ViT-22B style blocks."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vitmodels.attention import attention_taps
from vitmodels.blocks import block_taps
from vitmodels.taps import HeadOutTap, InputTap, OutputTap, Tap
from vitmodels.timm_columnar import Columnar, mlp_modules

_ONE_PROJECTION = "attention and MLP take it by one projection; edit resid_pre, q, k, v or mlp_pre"
_SEVERAL = "several branches take it; edit resid_pre or the attn_out and mlp_out of the branches"


def is_parallel(name: str) -> bool:
    """Whether a name of timm's vision_transformer module has parallel blocks."""
    words = set(name.partition(".")[0].split("_"))
    return bool({"xp", "18x2", "pwee", "dpwee"} & words)


def scaling_block(name: str, block: Any) -> dict[str, Tap]:
    """Return the taps of ``x = x + attn(norm(x)) + mlp(norm(x))`` with one input projection.

    With a fused output projection the two branches cannot be told apart behind it.
    """
    plain = type(block).__name__ == "ParallelScalingBlock"
    apart = plain and block.attn_out_proj is not None and isinstance(block.ls, nn.Identity)
    taps: dict[str, Tap] = {
        "resid_pre": InputTap(module=block),
        "attn_in": InputTap(module=block.in_proj, reason=_ONE_PROJECTION),
    }
    if plain:
        taps |= attention_taps(block)
    if apart:
        taps["head_out"] = HeadOutTap(module=block.attn_out_proj, heads=block.num_heads)
        taps["attn_out"] = OutputTap(module=block.attn_out_proj)
    taps["mlp_in"] = InputTap(module=block.in_proj, reason=_ONE_PROJECTION)
    taps["mlp_pre"] = InputTap(module=block.mlp_act)
    if apart:
        taps["mlp_post"] = InputTap(module=block.mlp_out_proj)
        taps["mlp_out"] = OutputTap(module=block.mlp_out_proj)
    else:
        taps["mlp_post"] = OutputTap(module=block.mlp_drop)
    taps["resid_post"] = OutputTap(module=block)
    return {f"{name}.{part}": tap for part, tap in taps.items()}


def things_block(name: str, block: Any) -> dict[str, Tap]:
    """Return the taps of n attentions side by side, then n MLPs: ``blocks.L.branch0.z``."""
    taps: dict[str, Tap] = {f"{name}.resid_pre": InputTap(module=block)}
    parts = ("resid_pre", "resid_post")
    for j, branch in enumerate(block.attns):
        attention = block_taps(
            f"{name}.branch{j}",
            block=block,
            attn=branch.attn,
            proj=branch.attn.proj,
            attn_added=branch,
            heads=branch.attn.num_heads,
        )
        taps |= {key: tap for key, tap in attention.items() if key.rpartition(".")[2] not in parts}
    taps[f"{name}.resid_mid"] = InputTap(module=block.ffns[0], reason=_SEVERAL)
    for j, branch in enumerate(block.ffns):
        modules = mlp_modules(branch.mlp)
        own = f"{name}.branch{j}"
        taps[f"{own}.mlp_in"] = InputTap(module=branch.mlp)
        taps[f"{own}.mlp_pre"] = OutputTap(module=modules["mlp_first"])
        taps[f"{own}.mlp_post"] = InputTap(module=modules["mlp_last"])
        taps[f"{own}.mlp_out"] = OutputTap(module=branch)
    taps[f"{name}.resid_post"] = OutputTap(module=block)
    return taps


class TimmParallel(Columnar):
    """Blocks whose branches are computed side by side."""

    name = "timm_parallel"
    modules = ("vision_transformer",)
    classes = ("VisionTransformer",)

    def serves(self, name: str) -> bool:
        """Take the parallel architectures only."""
        return is_parallel(name)

    def accepts(self, module: Any) -> bool:
        """Accept a ``VisionTransformer`` whose blocks have no ``attn``."""
        return super().accepts(module) and not hasattr(module.blocks[0], "attn")

    def block(self, name: str, block: Any) -> dict[str, Tap]:
        """Choose by the kind of block."""
        return things_block(name, block) if hasattr(block, "attns") else scaling_block(name, block)

    def sizes(self, block: Any) -> dict[str, Any]:
        """Return n_heads, d_head and d_mlp of a block."""
        if hasattr(block, "attns"):
            attn, mlp = block.attns[0].attn, block.ffns[0].mlp
            heads = int(attn.num_heads)
            return {"n_heads": heads, "d_head": attn.head_dim, "d_mlp": mlp.fc2.in_features}
        heads = int(block.num_heads)
        width = int(block.in_split[-1])
        return {"n_heads": heads, "d_head": width // heads, "d_mlp": int(block.in_split[0])}

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return one small model for each kind of block."""

        def small(block: str, **options: Any) -> Callable[[], nn.Module]:
            def make() -> nn.Module:
                from timm.models import vision_transformer as timm_vit

                sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2}
                module: nn.Module = timm_vit.VisionTransformer(
                    **sizes,
                    num_heads=4,
                    num_classes=7,
                    block_fn=getattr(timm_vit, block),
                    **options,
                )
                return module

            return make

        return {
            "scaling": small("ParallelScalingBlock"),
            "scaling_no_bias": small("ParallelScalingBlock", qkv_bias=False, qk_norm=True),
            "things": small("ParallelThingsBlock", init_values=0.5),
            "differential": small("DiffParallelScalingBlock"),
        }


FAMILY = TimmParallel()
