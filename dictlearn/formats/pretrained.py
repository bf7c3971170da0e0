"""Published dictionaries by name: the 82 of ViT-Prisma's table (arXiv:2504.19475).

``prisma_saes.tsv`` holds the table as published, one row a repository; an empty field was not
published. This file says what the columns do not: the model in this project's spelling, the sites,
the token kinds and the files. Imports no torch and no network.
"""

from __future__ import annotations

import csv
import difflib
import fnmatch
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

_TABLE = "prisma_saes.tsv"

_MODELS = {
    "CLIP-ViT-B-32 DataComp.XL": "open_clip/ViT-B-32@datacomp_xl_s13b_b90k",
    "DINO ViT-B": "hf/facebook/dino-vitb16",
}
"""base_model -> id for `vitmodels.load`."""

_GROUPS: dict[str, tuple[str, str, str]] = {
    "Vanilla SAEs (All Patches)": ("cls,patch", "A", "n_images_2600058.pt"),
    "Vanilla SAEs (CLS only)": ("cls", "C", "weights.pt"),
    "Top K SAEs (CLS only, k = 64)": ("cls", "B", "weights.pt"),
    "Vanilla Spatial Patches": ("patch", "C", "weights.pt"),
    "Top-K transcoder (All Patches)": ("cls,patch", "D", "weights.pt"),
}
"""group -> token kinds, layout (letters of `dictlearn.formats.prisma`), weights file."""

_DINO = ("cls,patch", "B or C", "weights.pt")

_PUBLISHED = {
    "l0": "mean active latents of a token, all kinds",
    "cls_l0": "mean active latents of a CLS token",
    "explained_variance": "per cent",
    "cosine": "of input and reconstruction",
    "recon_cosine": "of the model's outputs, clean and spliced",
    "ce": "cross-entropy of the model, clean",
    "recon_ce": "with the reconstruction spliced in",
    "zero_ce": "with the site zeroed",
    "ce_recovered": "per cent",
    "alive": "per cent of the latents",
}
"""Columns of published figures: what they mean."""


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """One published dictionary and where it belongs."""

    name: str
    """Repository without its owner; unique."""
    repo: str
    """Repository on the Hugging Face hub."""
    group: str
    """Heading of the published table."""
    file: str
    """Weights file in the repository; its configuration, ``config.json``, lies beside it."""
    format: str
    """Format for `dictlearn.formats.load`."""
    layout: str
    """Layout of the file: a letter of `dictlearn.formats.prisma`."""
    model: str
    """Id for `vitmodels.load`."""
    reads: str
    """Site read."""
    writes: str
    """Site written; the same for an SAE."""
    tokens: str
    """Token kinds it was trained on."""
    latents: int
    """F."""
    k: int | None
    """k of top-k; None for ReLU."""
    l1: float | None
    """L1 coefficient, where published."""
    published: Mapping[str, float]
    """Published figures; see `FIGURES` for their meaning. Absent where not published."""


FIGURES: Mapping[str, str] = _PUBLISHED
"""Keys of `Pretrained.published` and what they mean."""


@functools.cache
def _rows() -> tuple[Pretrained, ...]:
    text = resources.files("dictlearn.formats").joinpath(_TABLE).read_text()
    return tuple(_row(row) for row in csv.DictReader(text.splitlines(), delimiter="\t"))


def _row(row: Mapping[str, str]) -> Pretrained:
    group = row["group"]
    is_dino = row["base_model"].startswith("DINO")
    tokens, layout, file = _DINO if is_dino else _GROUPS[group]
    block = f"blocks.{row['layer']}"
    transcoder = "->" in row["sublayer"]
    reads = f"{block}.mlp_in" if transcoder else f"{block}.{row['sublayer']}"
    top_k = row["k"] or ("64" if group.startswith("Top K") else "")
    return Pretrained(
        name=row["repo"].partition("/")[2],
        repo=row["repo"],
        group=f"{row['base_model']}, {group}",
        file=file,
        format="prisma",
        layout=layout,
        model=_MODELS[row["base_model"]],
        reads=reads,
        writes=f"{block}.mlp_out" if transcoder else reads,
        tokens=tokens,
        latents=64 * 768,
        k=int(top_k) if top_k else None,
        l1=float(row["l1"]) if row["l1"] else None,
        published={name: float(row[name]) for name in _PUBLISHED if row[name]},
    )


def list_pretrained(pattern: str = "*") -> list[Pretrained]:
    """Return the published dictionaries whose name, repository, group, model or site match.

    Parameters
    ----------
    pattern
        A glob, or without a glob character a part of any of these; case does not matter.
    """
    glob = pattern.lower() if any(c in pattern for c in "*?[") else f"*{pattern.lower()}*"
    return [
        row
        for row in _rows()
        if any(
            fnmatch.fnmatchcase(text.lower(), glob)
            for text in (row.name, row.repo, row.group, row.model, row.reads, row.writes)
        )
    ]


def find_pretrained(name: str) -> Pretrained:
    """Return the published dictionary of this name (or repository).

    Raises
    ------
    KeyError
        There is none; the message holds the nearest names.
    """
    by_name = {key.lower(): row for row in _rows() for key in (row.name, row.repo)}
    if name.lower() not in by_name:
        near = difflib.get_close_matches(name, [r.name for r in _rows()], n=3, cutoff=0.3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise KeyError(
            f"no published dictionary is called {name!r}{hint}. List them: dictlearn pretrained"
        )
    return by_name[name.lower()]
