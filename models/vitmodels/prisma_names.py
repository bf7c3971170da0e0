"""ViT-Prisma's model names, and the ids they are here.

Prisma spells a model of open_clip ``open-clip:<hub repository>``, one of timm by its bare
architecture, one of transformers by its hub id. The table has all of its names; two of its
spellings are not those of the hub, and are understood as they are.
"""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files


@cache
def prisma_names() -> Mapping[str, str]:
    """Return Prisma's name -> id here, of all of Prisma's models."""
    text = (files("vitmodels") / "prisma_names.tsv").read_text(encoding="utf-8")
    rows = (line.split("\t") for line in text.splitlines()[1:])
    return {prisma: here for prisma, here in rows}


def from_prisma(id: str) -> str:
    """Return the id of one of Prisma's names, and any other text as it is.

    >>> from_prisma("open-clip:laion/CLIP-ViT-B-32-laion2B-s34B-b79K")
    'open_clip/ViT-B-32@laion2b_s34b_b79k'
    """
    return prisma_names().get(id, id)
