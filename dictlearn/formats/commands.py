"""The commands ``dictlearn convert`` and ``dictlearn pretrained``, as plain functions for tyro."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from dictlearn.formats.pretrained import Pretrained


def convert(
    source: tyro.conf.Positional[str],
    out: tyro.conf.Positional[Path],
    *,
    format: str = "native",
    from_format: str | None = None,
    reads: str | None = None,
    writes: str | None = None,
    tell: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = (),
) -> int:
    """Rewrite a dictionary of any format in another one.

    Parameters
    ----------
    source
        Folder or file of a dictionary, or a name that `dictlearn pretrained` lists.
    out
        Folder to write.
    format
        Format to write: native, sae_lens, prisma, dictionary_learning, sparsify, saev or
        overcomplete.
    from_format
        Format of the source; found by looking if not said.
    reads
        Site that it reads, where the files do not record it.
    writes
        Site that a transcoder writes, where the files do not record it.
    tell
        What else the files do not record, for instance kind=TopKSAE top_k=32.
    """
    from dictlearn.formats.hub import load_pretrained
    from dictlearn.formats.pretrained import find_pretrained
    from dictlearn.formats.registry import convert as rewrite
    from dictlearn.formats.registry import is_named, load, save

    told: dict[str, Any] = {"reads": reads, "writes": writes}
    told |= dict(_pair(text) for text in tell)
    told = {name: value for name, value in told.items() if value is not None}
    if Path(source).exists():
        rewrite(source, out, format, from_format, **told)
    else:
        try:
            row = find_pretrained(source)
        except KeyError as error:
            raise FileNotFoundError(f"nothing at {source}, and {error.args[0]}") from error
        about = {"model": row.model, "tokens": row.tokens, "source": {"hub": row.repo}}
        save(load_pretrained(source, **told), out, format, about)
    console = Console()
    console.print(f"wrote {out} ({format})", highlight=False, soft_wrap=True)
    if format == "native" and not is_named(load(out)):
        console.print(
            "its site is not recorded: it is called 'unnamed'. Say --reads blocks.7.resid_post "
            "before using it with a store",
            highlight=False,
            soft_wrap=True,
        )
    return 0


def _pair(text: str) -> tuple[str, str | int | float]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--tell {text!r}: write NAME=VALUE, for instance top_k=32")
    for number in (int, float):
        try:
            return name, number(value)
        except ValueError:
            continue
    return name, value


def pretrained(pattern: tyro.conf.Positional[str] = "*") -> int:
    """List published dictionaries with their published figures.

    Parameters
    ----------
    pattern
        A glob or a part of a name, group, model or site, for instance DINO or blocks.7.
    """
    from dictlearn.formats.pretrained import list_pretrained

    rows = list_pretrained(pattern)
    if not rows:
        raise ValueError(f"no published dictionary matches {pattern!r}; try: dictlearn pretrained")
    console = Console()
    if not console.is_terminal:  # a pipe has no width: cut nothing
        console = Console(width=200)
    for group in dict.fromkeys(row.group for row in rows):
        inside = [row for row in rows if row.group == group]
        console.print(f"{group}: {inside[0].model}, tokens {inside[0].tokens}", style="bold")
        console.print(_table(inside))
    console.print(f"{len(rows)} dictionaries; load one: dictlearn.formats.load_pretrained(NAME)")
    return 0


def _table(rows: list[Pretrained]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("name", overflow="fold")
    for column in ("site", "k", "L0", "EV %", "CE", "CE spliced"):
        table.add_column(column, no_wrap=True, justify="left" if column == "site" else "right")
    for row in rows:
        figures = row.published
        l0 = figures.get("l0", figures.get("cls_l0"))
        table.add_row(
            row.name,
            row.reads if row.writes == row.reads else f"{row.reads} -> {row.writes}",
            "" if row.k is None else str(row.k),
            *("" if v is None else f"{v:g}" for v in (l0, figures.get("explained_variance"))),
            *(
                "" if v is None else f"{v:.4f}"
                for v in (figures.get("ce"), figures.get("recon_ce"))
            ),
        )
    return table
