"""What a sweep trains, as tables: every list is a choice, every combination a dictionary.

A grid file (TOML or JSON) holds tables ``dictionary`` and, where wanted, one ``train``::

    [[dictionary]]
    sites = "blocks.*.resid_post"      # an SAE for each; together = true makes one crosscoder
    kind = ["TopK", "BatchTopK"]
    k = [16, 32, 64]                   # any field of the strategies in dictlearn.config
    expansion = [4, 8]                 # or latents = [...]
    seed = [0, 1]

    [[dictionary]]
    reads = "blocks.7.mlp_in"          # with writes: a transcoder from all of the one to the other
    writes = "blocks.7.mlp_out"
    prefixes = [[512, 2048]]           # Matryoshka: a list of lists is a choice of them
    lr = [1e-3, 2e-3]

    [train]                            # any field of TrainConfig
    steps = 4000
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dictlearn.config import STRATEGIES, Matryoshka, Sparsify, sparsify_from_json
from dictlearn.sweep import Candidate
from vitmodels.spec import expand_sites

if TYPE_CHECKING:
    from actstore.aligned import Aligned
    from actstore.store import Store

Table = Mapping[str, Any]

_FIELDS = {name: {f.name for f in dataclasses.fields(c)} for name, c in STRATEGIES.items()}
_OF_STRATEGIES = sorted(set().union(*_FIELDS.values()))
_WIRING = ("sites", "reads", "writes", "together")
_OTHERS = ("kind", "expansion", "latents", "seed", "lr", "skip", "prefixes")
_WHOLE = ("k", "expansion", "latents", "seed")
_NUMBERS = ("lr", "l0", "l1")


def read_grid(path: str | Path) -> tuple[list[Table], dict[str, Any]]:
    """Return the tables ``dictionary`` and the table ``train`` of a grid file.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It is neither TOML nor JSON, or holds something else.
    """
    file = Path(path)
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*")])
        hint = f"; nearest in {file.parent}: {', '.join(near)}" if near else ""
        raise FileNotFoundError(
            f"no grid file {file}{hint}. `dictlearn sweep --help` says what can be given without "
            "one, `dictlearn.gridfile` what is in one"
        )
    try:
        text = file.read_text()
        data = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except (ValueError, UnicodeDecodeError) as error:
        kind = "JSON" if file.suffix == ".json" else "TOML"
        raise ValueError(f"{file} is not {kind}: {error}") from error
    known = ("dictionary", "train")
    if not isinstance(data, dict) or not data.get("dictionary"):
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{file} needs a list of tables [[dictionary]]; it has {found}")
    if unknown := [key for key in data if key not in known]:
        raise ValueError(f"{file} holds {unknown[0]!r}; known are {' and '.join(known)}")
    tables, training = data["dictionary"], data.get("train", {})
    tables = [tables] if isinstance(tables, dict) else tables
    if not isinstance(training, dict) or not all(isinstance(t, dict) for t in tables):
        raise ValueError(f"{file}: every dictionary, and train, must be a table of options")
    return tables, training


def candidates(tables: Sequence[Table], store: Store | Aligned) -> list[Candidate]:
    """Return every combination of every table.

    Raises
    ------
    ValueError
        An option is unknown, of a wrong type or does not fit; the message names table and option.
    """
    out: list[Candidate] = []
    for number, table in enumerate(tables, 1):
        try:
            out += _expand(table, store)
        except (ValueError, TypeError) as error:
            place = f"dictionary table {number}: " if len(tables) > 1 else ""
            raise ValueError(f"{place}{error}") from error
    return out


def _expand(table: Table, store: Store | Aligned) -> Iterator[Candidate]:
    _check_keys(table)
    wirings = _wirings(table, store)
    if "expansion" in table and "latents" in table:
        raise ValueError("give either expansion or latents, not both")
    sized = "latents" if "latents" in table else "expansion"
    sizes = _choices(table, sized, 8)
    rest = [_choices(table, *pair) for pair in (("seed", 0), ("lr", None), ("skip", False))]
    prefixes = table.get("prefixes", [])
    nested = any(isinstance(p, list | tuple) for p in prefixes)
    for (reads, writes), sparsify, prefix, size, seed, lr, skip in itertools.product(
        wirings, _strategies(table), prefixes if nested else [prefixes], sizes, *rest
    ):
        candidate = Candidate(
            reads=reads,
            writes=writes,
            latents=size if sized == "latents" else size * sum(reads.values()),
            sparsify=sparsify,
            skip=skip,
            matryoshka=Matryoshka(prefixes=tuple(prefix)) if prefix else None,
            seed=seed,
            lr=lr,
        )
        candidate.config()
        yield candidate


def _check_keys(table: Table) -> None:
    known = [*_WIRING, *_OTHERS, *_OF_STRATEGIES]
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ValueError(f"unknown option {key!r}; nearest: {near[0]}")
        for one in value if isinstance(value, list | tuple) else [value]:
            whole = key in _WHOLE and (not isinstance(one, int) or isinstance(one, bool))
            number = key in _NUMBERS and (not isinstance(one, int | float) or isinstance(one, bool))
            if whole or number:
                what = "whole numbers" if whole else "numbers"
                raise ValueError(f"{key} takes {what}, got {one!r}")
            if key == "lr" and one <= 0:
                raise ValueError(f"lr must be > 0, got {one}")


def _choices(table: Table, key: str, default: Any) -> list[Any]:
    value = table.get(key, default)
    if not isinstance(value, list | tuple):
        return [value]
    if not value:
        raise ValueError(f"{key} is an empty list")
    return list(value)


def _wirings(
    table: Table, store: Store | Aligned
) -> list[tuple[dict[str, int], dict[str, int] | None]]:
    def found(key: str) -> dict[str, int]:
        names = expand_sites(table[key], store.sites)
        return {s: store.spec(s, store.kinds(s)[0]).channels for s in names}

    if "writes" in table and "reads" not in table:
        raise ValueError("writes needs reads: the sites a transcoder reads")
    if "reads" in table:
        if "sites" in table:
            raise ValueError("give either sites (one SAE each) or reads (one dictionary), not both")
        return [(found("reads"), found("writes") if "writes" in table else None)]
    if "sites" not in table:
        raise ValueError('give sites (one SAE each; sites = "*" is all) or reads (one dictionary)')
    each = found("sites")
    if table.get("together"):
        return [(each, None)]
    return [({site: width}, None) for site, width in each.items()]


def _strategies(table: Table) -> list[Sparsify]:
    kinds = _choices(table, "kind", "TopK")
    for kind in kinds:
        if kind not in STRATEGIES:
            near = difflib.get_close_matches(str(kind), STRATEGIES, n=1, cutoff=0.0)
            raise ValueError(
                f"unknown kind {kind!r}; known: {', '.join(STRATEGIES)}; nearest: {near[0]}"
            )
    for key in table:
        if key in _OF_STRATEGIES and not any(key in _FIELDS[kind] for kind in kinds):
            takers = [name for name, fields in _FIELDS.items() if key in fields]
            raise ValueError(
                f"{key} is an option of {', '.join(takers)}, not of {', '.join(kinds)}"
            )
    out = []
    for kind in kinds:
        keys = [key for key in table if key in _FIELDS[kind]]
        needs_k = kind in ("TopK", "BatchTopK") and "k" not in keys
        for values in itertools.product(*(_choices(table, key, None) for key in keys)):
            given = {"k": 32} if needs_k else {}
            out.append(
                sparsify_from_json({"kind": kind, **given, **dict(zip(keys, values, strict=True))})
            )
    return out
