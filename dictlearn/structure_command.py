"""The commands ``structure``, ``coactivation`` and ``absorption``, as plain functions for tyro."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from dictlearn.dictionary import Dictionary

Kind = Literal["cls", "register", "patch"]


def structure(
    dictionaries: tyro.conf.Positional[tuple[Path, ...]],
    *,
    near: float = 0.9,
    store: str | None = None,
    tokens: str | None = None,
    out: Path | None = None,
) -> int:
    """Near duplicates within dictionaries, and how far several of them agree (seeds of one run).

    Parameters
    ----------
    dictionaries
        Folders; each one is matched with the first, latent by latent.
    near
        Cosine of decoder rows above which two latents count as near duplicates.
    store
        Leave latents out of the matching that never fire on it.
    tokens
        Token kinds of it; every kind stored by default.
    out
        Folder for the tables as parquet: cosines-NAME, matching-NAME.
    """
    import pyarrow.parquet as pq

    from dictlearn.formats import load
    from dictlearn.geometry import COSINE_EDGES, decoder_cosines, match

    if not dictionaries:
        raise ValueError(
            "give the folder of a dictionary, or several: dictlearn structure RUN/NAME"
        )
    loaded = [load(path) for path in dictionaries]
    alive = [_alive(d, store, tokens) for d in loaded] if store else [None] * len(loaded)
    names = _names(dictionaries)
    table = Table("dictionary", "latents", "duplicates", "largest cosine", "stability", "shared")
    for i, (name, d) in enumerate(zip(names, loaded, strict=True)):
        cosines = decoder_cosines(d, threshold=near)
        agree = ["", ""]
        if i:
            found = match(loaded[0], d, alive_F=alive[0], alive_G=alive[i])
            agree = [f"{found.stability:.3f}", f"{found.shared:.1%}"]
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                pq.write_table(found.table(), out / f"matching-{name}.parquet")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            pq.write_table(cosines.table(), out / f"cosines-{name}.parquet")
        edges = zip(COSINE_EDGES, COSINE_EDGES[1:], cosines.histogram, strict=False)
        spread = " ".join(f"{low:g}..{high:g}: {n}" for low, high, n in edges if n)
        table.add_row(name, f"{d.latents:,}", str(len(cosines.duplicates)), spread, *agree)
    _print(table)
    return 0


def coactivation(
    dictionary: tyro.conf.Positional[Path],
    *,
    store: str,
    out: Path,
    latents: tuple[int, ...] = (),
    tokens: str | None = None,
) -> int:
    """Pairs of latents that are active on the same tokens: counts, Jaccard index and phi.

    Parameters
    ----------
    dictionary
        Its folder.
    store
        The store.
    out
        Parquet file of the pairs.
    latents
        Only these; all by default.
    tokens
        Token kinds; every kind stored by default.
    """
    import actstore
    from dictlearn.coactivation import coactivation as compute
    from dictlearn.formats import load

    chosen = latents or None
    found = compute(actstore.open(store), load(dictionary), chosen, tokens=tokens)
    file = found.save(out)
    table = Table("first", "second", "together", "jaccard", "phi")
    best = found.pairs.sort_by([("phi", "descending")]).slice(0, 10)
    for row in best.to_pylist():
        numbers = [f"{row['together']:,}", f"{row['jaccard']:.3f}", f"{row['phi']:.3f}"]
        table.add_row(str(row["first"]), str(row["second"]), *numbers)
    _print(table, f"{found.pairs.num_rows:,} pairs on {found.tokens:,} tokens in {file}")
    return 0


def absorption(
    dictionary: tyro.conf.Positional[Path],
    *,
    store: str,
    out: Path | None = None,
    kind: Kind | None = None,
    limit: int = 50_000,
) -> int:
    """Feature absorption of the classes of a store's labels (Chanin et al. 2024).

    Parameters
    ----------
    dictionary
        Folder of an SAE of one site.
    store
        Has labels.
    out
        Parquet file of the table.
    kind
        Token kind; CLS where there is one.
    limit
        Tokens examined, and as many to find probe and main latents.
    """
    import actstore
    from dictlearn.absorption import absorption as compute
    from dictlearn.formats import load

    found = compute(actstore.open(store), load(dictionary), kind=kind, limit=limit)
    if out is not None:
        found.save(out)
    table = Table("class", "main latents", "F1", "probe right", "missed", "absorbed", "absorber")
    for row in found.classes.to_pylist():
        cells = [row["name"] or row["label"], " ".join(map(str, row["main"])), f"{row['f1']:.2f}"]
        cells += [row["positives"], row["missed"], row["absorbed"]]
        cells += ["" if row["absorber"] is None else row["absorber"]]
        table.add_row(*map(str, cells))
    _print(table, f"missed {found.missed:.1%}, absorbed {found.rate:.1%} of what the probe finds")
    return 0


def _alive(dictionary: Dictionary, store: str, tokens: str | None) -> Any:
    import actstore
    from dictlearn.analysis import sparsity

    return sparsity(actstore.open(store), dictionary, tokens=tokens).fired.sum(0) > 0


def _names(paths: tuple[Path, ...]) -> list[str]:
    """Last part of each path, with the one before where two are the same."""
    last = [p.name for p in paths]
    return [p.name if last.count(p.name) == 1 else f"{p.parent.name}-{p.name}" for p in paths]


def _print(table: Table, text: str = "") -> None:
    console = Console()
    console.print(table)
    if text:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
