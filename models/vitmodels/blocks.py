"""Taps of the standard pre-norm block, from references to its modules.

::

    x = x + attn_out        attn_out = gain1(proj(z)),  z from attn_in = norm1(x)
    x = x + mlp_out         mlp_out  = gain2(last(mlp_post)),  mlp_in = norm2(x)
"""

from torch import nn

from vitmodels.attention import PARTS, attention_taps
from vitmodels.taps import HeadOutTap, InputTap, MidStreamTap, OutputTap, Tap


def block_taps(
    name: str,
    *,
    block: nn.Module,
    attn: nn.Module,
    proj: nn.Linear | None,
    attn_added: nn.Module,
    heads: int,
    norm2: nn.Module | None = None,
    mlp: nn.Module | None = None,
    mlp_first: nn.Module | None = None,
    mlp_last: nn.Module | None = None,
    mlp_added: nn.Module | None = None,
    scope: nn.Module | None = None,
    parts: tuple[str, ...] = PARTS,
) -> dict[str, Tap]:
    """Return the taps of one block, in the order of its forward pass.

    Parameters
    ----------
    name
        ``blocks.7``.
    block
        Input: the stream before; output (or first entry of it): the stream after.
    attn
        Takes the normalised stream as its first positional argument.
    proj
        The attention's output projection, for ``head_out``; None leaves it out.
    attn_added
        Module whose output is added to the stream: after LayerScale or post-norm.
    heads
        Attention heads.
    norm2
        Module that takes the stream between the branches; without it there is no
        ``resid_mid``.
    mlp, mlp_first, mlp_last, mlp_added
        The MLP; the linear map whose output goes through the activation (None where it is
        gated); the linear map whose input is ``mlp_post``; the module whose output is added.
        Without `mlp` the block has no such sites.
    scope
        Module during which the SDPA call happens, None for `attn`.
    parts
        Which attention sites there are; a subset of ``vitmodels.attention.PARTS``.
    """
    taps: dict[str, Tap] = {
        "resid_pre": InputTap(module=block),
        "attn_in": InputTap(module=attn),
        **attention_taps(scope or attn, parts),
    }
    if proj is not None:
        taps["head_out"] = HeadOutTap(module=proj, heads=heads)
    taps["attn_out"] = OutputTap(module=attn_added)
    if norm2 is not None and mlp_added is not None:
        taps["resid_mid"] = MidStreamTap(branch=norm2, branch_out=mlp_added, block=block)
    if mlp is not None:
        taps["mlp_in"] = InputTap(module=mlp)
    if mlp_first is not None:
        taps["mlp_pre"] = OutputTap(module=mlp_first)
    if mlp_last is not None:
        taps["mlp_post"] = InputTap(module=mlp_last)
    if mlp is not None and mlp_added is not None:
        taps["mlp_out"] = OutputTap(module=mlp_added)
    taps["resid_post"] = OutputTap(module=block)
    return {f"{name}.{part}": tap for part, tap in taps.items()}
