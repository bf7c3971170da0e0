"""Spellings of sites: the canonical one, and those of TransformerLens and Prisma.

A canonical name is ``[prefix.]blocks.L.part`` or a single word (``embed``, ``final``,
``pooled``, ``logits``). Layers may be counted from the end (``blocks.-1.resid_post``), and
``output`` is what the model returns: ``projection``, ``logits`` or ``pooled``.

Hook names of the two libraries are translated where they mean the same tensor in both; where
they differ the dialect must be said (``tl:`` or ``prisma:``), and a name without a site here is
refused with the reason.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Site:
    """A parsed canonical name: ``Site.parse("blocks.7.resid_post")``."""

    part: str
    """What it is, ``resid_post``."""
    layer: int | None = None
    """Which block, None outside of the blocks."""
    prefix: str = ""
    """Tower or stack before ``blocks``, ``text``; usually empty."""

    @classmethod
    def parse(cls, name: str) -> "Site":
        """Parse any accepted spelling; ValueError where it is none."""
        canonical = translate(name)
        match = re.fullmatch(
            r"(?:(?P<prefix>.+)\.)?blocks\.(?P<layer>\d+)\.(?P<part>.+)", canonical
        )
        if match:
            return cls(part=match["part"], layer=int(match["layer"]), prefix=match["prefix"] or "")
        if not re.fullmatch(r"[a-z][a-z0-9_.]*", canonical):
            raise ValueError(
                f"{name!r} is not a site; sites look like 'blocks.7.resid_post', 'embed', 'logits'"
            )
        prefix, _, part = canonical.rpartition(".")
        return cls(part=part, prefix=prefix)

    def __str__(self) -> str:
        prefix = f"{self.prefix}." if self.prefix else ""
        return (
            f"{prefix}{self.part}"
            if self.layer is None
            else (f"{prefix}blocks.{self.layer}.{self.part}")
        )


_BLOCK = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_q": "q",
    "attn.hook_k": "k",
    "attn.hook_v": "v",
    "attn.hook_z": "z",
    "attn.hook_pattern": "pattern",
    "mlp.hook_pre": "mlp_pre",
    "mlp.hook_post": "mlp_post",
}
_BLOCK_PRISMA = {
    "hook_resid_mid": "resid_mid",
    "attn.hook_attn_scores": "scores",
    "attn.hook_result": "head_out",
    "ln1.hook_normalized": "attn_in",
    "ln2.hook_normalized": "mlp_in",
}
_BLOCK_TL = {
    "hook_attn_in": "attn_in",
    "hook_mlp_in": "mlp_in",
    "ln1.hook_out": "attn_in",
    "ln2.hook_out": "mlp_in",
    "attn.hook_attn_scores": "pattern",
    "attn.hook_in": "attn_in",
    "attn.q.hook_out": "q",
    "attn.k.hook_out": "k",
    "attn.v.hook_out": "v",
    "attn.o.hook_in": "z",
    "attn.o.hook_out": "attn_out",
    "attn.hook_out": "attn_out",
    "mlp.hook_in": "mlp_in",
    "mlp.in.hook_in": "mlp_in",
    "mlp.in.hook_out": "mlp_pre",
    "mlp.out.hook_in": "mlp_post",
    "mlp.out.hook_out": "mlp_out",
    "mlp.hook_out": "mlp_out",
    "hook_in": "resid_pre",
    "hook_out": "resid_post",
}
_TOP_PRISMA = {
    "hook_embed": "patch_embed",
    "hook_pos_embed": "pos_embed",
    "hook_full_embed": "embed",
    "hook_ln_pre": "blocks.0.resid_pre",
    "ln_pre.hook_normalized": "blocks.0.resid_pre",
    "hook_ln_final": "final",
    "ln_final.hook_normalized": "final",
    "hook_post_head_pre_normalize": "output",
}
_TOP_TL = {
    "hook_embed": "embed",
    "embed.hook_out": "embed",
    "ln_final.hook_in": "blocks.-1.resid_post",
    "ln_final.hook_out": "final",
    "unembed.hook_in": "pooled",
    "unembed.hook_out": "logits",
    "hook_unembed": "logits",
    "vision_encoder.hook_vision_embed": "embed",
    "vision_encoder.embeddings.hook_out": "embed",
    "vision_encoder.pre_layernorm.hook_in": "embed",
    "vision_encoder.pre_layernorm.hook_out": "blocks.0.resid_pre",
    "vision_encoder.hook_vision_out": "blocks.-1.resid_post",
    "vision_encoder.hook_out": "blocks.-1.resid_post",
    "vision_encoder.post_layernorm.hook_out": "pooled",
}
_OUTPUTS = ("projection", "logits", "pooled")
"""What a model returns: the first of these that it has."""

_ONE_BRANCH = "an edit there reaches one branch only, and no site stands for that branch's copy"
_NO_SITE = {
    "hook_normalized": "before weight and bias a LayerNorm's value is inside the fused kernel",
    "ln1.hook_in": f"its tensor is that of resid_pre, but {_ONE_BRANCH}",
    "ln2.hook_in": f"its tensor is that of resid_mid, but {_ONE_BRANCH}",
    "attn.q.hook_in": f"its tensor is that of attn_in, but {_ONE_BRANCH}",
    "attn.k.hook_in": f"its tensor is that of attn_in, but {_ONE_BRANCH}",
    "attn.v.hook_in": f"its tensor is that of attn_in, but {_ONE_BRANCH}",
    "vision_encoder.post_layernorm.hook_in": "it is blocks.-1.resid_post at CLS alone",
    "hook_scale": "the denominator of a LayerNorm is inside the library's fused kernel",
    "hook_q_input": "it repeats resid_pre for each head; the library's module has one input",
    "hook_k_input": "it repeats resid_pre for each head; the library's module has one input",
    "hook_v_input": "it repeats resid_pre for each head; the library's module has one input",
}
_AMBIGUOUS = {
    "hook_resid_mid": (
        "in Prisma an edit reaches the MLP and the residual path (our resid_mid); in "
        "TransformerLens's bridge an edit reaches the MLP branch only"
    ),
    "attn.hook_attn_scores": (
        "in Prisma the scores before softmax (our scores); in TransformerLens's bridge it holds "
        "the pattern (our pattern)"
    ),
    "ln1.hook_normalized": (
        "in Prisma after weight and bias (our attn_in); in TransformerLens before them"
    ),
    "ln2.hook_normalized": (
        "in Prisma after weight and bias (our mlp_in); in TransformerLens before them"
    ),
    "ln_final.hook_normalized": (
        "in Prisma after weight and bias (our final); in TransformerLens before them"
    ),
    "hook_mlp_in": (
        "in Prisma before ln2 (the tensor of our resid_mid, its edit reaching the MLP branch "
        "only); in TransformerLens after ln2 (our mlp_in)"
    ),
    "hook_attn_in": (
        "in Prisma resid_pre before ln1, repeated for each head; in TransformerLens after ln1 "
        "(our attn_in)"
    ),
    "hook_embed": (
        "in Prisma the patch embedding without CLS and position (our patch_embed); in "
        "TransformerLens with both (our embed)"
    ),
}


def translate(name: str) -> str:
    """Return the canonical spelling of a site name or glob.

    Raises
    ------
    ValueError
        A hook name that means different tensors in the two libraries and comes without
        ``tl:`` or ``prisma:``, or one that has no site here (the reason is given).
    """
    dialect, _, bare = name.rpartition(":")
    if dialect not in ("", "tl", "prisma"):
        raise ValueError(
            f"unknown dialect {dialect!r} in site {name!r}; say 'tl:' (TransformerLens) or "
            "'prisma:', or nothing for the names of this library"
        )
    if "hook_" not in bare:
        if dialect:
            raise ValueError(f"{name!r}: a name of dialect {dialect!r} holds 'hook_'")
        return bare
    match = re.fullmatch(
        r"(?:vision_encoder\.encoder_layers|blocks)\.(?P<layer>[^.]+)\.(?P<hook>.+)", bare
    )
    hook = match["hook"] if match else bare
    prisma = (_BLOCK | _BLOCK_PRISMA) if match else _TOP_PRISMA
    tl = (_BLOCK | _BLOCK_TL) if match else _TOP_TL
    if hook in _AMBIGUOUS and not dialect:
        raise ValueError(
            f"site {name!r} means two things: {_AMBIGUOUS[hook]}. Say 'prisma:{bare}' or "
            f"'tl:{bare}', or use the name of this library"
        )
    part = (prisma if dialect == "prisma" else tl if dialect == "tl" else prisma | tl).get(hook)
    if part is None:
        raise ValueError(_no_name(name, hook, {**prisma, **tl}))
    return f"blocks.{match['layer']}.{part}" if match else part


def _no_name(name: str, hook: str, known: Iterable[str]) -> str:
    if hook in _AMBIGUOUS:
        return f"{name!r} has no site here: {_AMBIGUOUS[hook]}"
    if reason := _NO_SITE.get(hook) or _NO_SITE.get(hook.rpartition(".")[2]):
        return f"{name!r} has no site here: {reason}"
    near = nearest(hook, known)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return f"{name!r} is not a hook name that has a site here{hint}"


def concrete(name: str, available: Iterable[str]) -> str:
    """Replace what depends on the model: ``output``, and layers counted from the end.

    >>> concrete("blocks.-1.mlp_out", ["blocks.0.mlp_out", "blocks.1.mlp_out"])
    'blocks.1.mlp_out'
    """
    names = list(available)
    if name == "output":
        return next((output for output in _OUTPUTS if output in names), name)
    match = re.fullmatch(r"(?P<stack>(?:.+\.)?blocks)\.-(?P<back>\d+)\.(?P<part>.+)", name)
    if match is None:
        return name
    layers = re.compile(re.escape(match["stack"]) + r"\.(\d+)\.")
    count = 1 + max((int(m[1]) for m in map(layers.match, names) if m), default=-1)
    layer = count - int(match["back"])
    return f"{match['stack']}.{layer}.{match['part']}" if 0 <= layer < count else name


def nearest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Return up to `count` of `names` that look like `name`, best first."""
    pool = list(names)
    near = difflib.get_close_matches(name, pool, n=count, cutoff=0.5)
    if not near:
        word = name.strip("*").lower()
        near = [other for other in pool if word and word in other.lower()][:count]
    return near
