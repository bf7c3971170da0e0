"""Site names in the spellings of other libraries, to and from this project's.

`vitmodels.names` knows what a hook name means in TransformerLens and in Prisma; this file adds
module paths as nnsight and transformers users write them, and the way back.
"""

from __future__ import annotations

import logging
import re
from typing import Literal

from vitmodels.names import translate

logger = logging.getLogger(__name__)

Dialect = Literal["tl", "prisma"]

_HOOKS = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "ln1.hook_normalized",
    "ln2.hook_normalized",
    "hook_mlp_in",
    "ln1.hook_out",
    "ln2.hook_out",
    "mlp.hook_pre",
    "mlp.hook_post",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_z",
    "attn.hook_pattern",
    "attn.hook_attn_scores",
    "attn.hook_result",
)
"""Hooks of a block that may be the way back of a site."""

_MODULE = re.compile(
    r"(?:.*\.)?(?:layers|layer|h|blocks|resblocks)\.(?P<layer>\d+)(?:\.(?P<part>\w+))?\Z"
)
_PARTS = {
    "": "resid_post",
    "mlp": "mlp_out",
    "attn": "attn_out",
    "self_attn": "attn_out",
    "attention": "attn_out",
}
_NAMED = re.compile(r"(?P<part>resid_pre|resid_post|mlp_out|attn_out)(?:_layer)?_(?P<layer>\d+)\Z")


def from_hook(name: str | None, dialect: Dialect) -> str | None:
    """Return the site that a hook name means; the name itself, with a warning, if it has none."""
    if not name:
        return None
    for spelled in (f"{dialect}:{name}", name):
        try:
            return translate(spelled)
        except ValueError as error:
            reason = error
    logger.warning("hook %r kept as the site's name: %s", name, reason)
    return name


def from_module(name: str | None, *, reads: bool = False) -> str | None:
    """Return the site at a module's output (or its input, for a transcoder's `reads`).

    ``layers.7`` -> ``blocks.7.resid_post``, ``layers.7.mlp`` -> ``blocks.7.mlp_out`` (reads:
    ``mlp_in``), ``resid_post_layer_7`` -> ``blocks.7.resid_post``. None if the name is neither.
    """
    if not name:
        return None
    if "hook_" in name:
        return from_hook(name, "tl")
    named = _NAMED.fullmatch(name)
    if named:
        return f"blocks.{named['layer']}.{named['part']}"
    module = _MODULE.fullmatch(name)
    if not module or (module["part"] or "") not in _PARTS:
        return None
    part = _PARTS[module["part"] or ""]
    if reads:
        part = {"resid_post": "resid_pre", "mlp_out": "mlp_in", "attn_out": "attn_in"}[part]
    return f"blocks.{module['layer']}.{part}"


def to_hook(site: str, dialect: Dialect) -> str:
    """Return the hook name of a site, or the site's own name where the dialect has none."""
    match = re.fullmatch(r"blocks\.(\d+)\.(\w+)", site)
    if not match:
        return site
    for hook in _HOOKS:
        name = f"blocks.{match[1]}.{hook}"
        try:
            if translate(f"{dialect}:{name}") == site:
                return name
        except ValueError:
            continue
    return site
