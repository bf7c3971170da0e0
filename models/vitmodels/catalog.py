"""The verified names: each was built on the meta device and its sites were listed.

The list is shipped as ``catalog.tsv`` beside this file, so that it is read without any backend.
``python -m vitmodels.catalog docs/models.md`` builds the names that are not in it yet, drops those
that no family has any more, and writes the list and the page; with ``--all`` it builds every name
again. The tests compare a sample.
"""

import csv
import fnmatch
import functools
import io
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Self

_LOG = logging.getLogger(__name__)
_FILE = "catalog.tsv"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One name, and what it is."""

    id: str
    """What ``vitmodels.load`` takes."""
    family: str
    """File in ``families/``."""
    parameters: int
    """Number of parameters."""
    d_model: int
    """Width of the residual stream, of the first stage."""
    n_layers: int
    """Blocks."""
    n_heads: int
    """Heads a block, of the first stage."""
    cls: int
    """Class tokens."""
    register: int
    """Register tokens."""
    patch: tuple[int, ...]
    """Patches, (height, width) or (time, height, width)."""
    input_shape: tuple[int, ...]
    """One input without its batch."""

    @property
    def video(self) -> bool:
        """Whether it takes clips."""
        return len(self.input_shape) == 4

    def summary(self) -> str:
        """Return one line: size, geometry, tokens by kind, input."""
        tokens = [f"{self.cls} cls"] * bool(self.cls) + [f"{self.register} reg"] * bool(
            self.register
        )
        tokens.append(f"{'x'.join(map(str, self.patch))} patch")
        return (
            f"{self.family}  {self.parameters / 1e6:.1f} M  d {self.d_model}  "
            f"{self.n_layers} layers  {self.n_heads} heads  {' + '.join(tokens)}  "
            f"{'clip' if self.video else 'image'} {'x'.join(map(str, self.input_shape))}"
        )

    def to_strings(self) -> list[str]:
        """Return one string a field; sizes as 14x14."""
        values = (getattr(self, field.name) for field in fields(self))
        return ["x".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in values]

    @classmethod
    def from_strings(cls, values: Sequence[str]) -> Self:
        """Invert :meth:`to_strings`."""
        row = dict(zip((field.name for field in fields(cls)), values, strict=True))
        sizes = {k: tuple(map(int, row.pop(k).split("x"))) for k in ("patch", "input_shape")}
        texts = {key: row.pop(key) for key in ("id", "family")}
        return cls(**texts, **{k: int(v) for k, v in row.items()}, **sizes)  # type: ignore[arg-type]


@functools.cache
def catalog() -> tuple[Row, ...]:
    """Return every verified name, sorted by id. Loads no backend."""
    text = (files("vitmodels") / _FILE).read_text(encoding="utf-8")
    _, *rows = csv.reader(io.StringIO(text), delimiter="\t")
    return tuple(Row.from_strings(row) for row in rows)


def rows(pattern: str = "*") -> list[Row]:
    """Return the verified names that match a glob (without glob characters: that hold it)."""
    if not any(c in pattern for c in "*?["):
        pattern = f"*{pattern}*"
    return [row for row in catalog() if fnmatch.fnmatchcase(row.id, pattern)]


def verify(id: str, *, sites: bool = True) -> Row:
    """Build a name on the meta device, list its sites, and return its row.

    Raises
    ------
    ValueError
        It does not build, or a site is not reached.
    """
    from vitmodels.registry import load

    model = load(id, device="meta")
    if sites and not model.sites():
        raise ValueError(f"{id} has no sites")
    spec = model.spec
    return Row(
        id=spec.id,
        family=spec.family,
        parameters=sum(p.numel() for p in model.module.parameters()),
        d_model=spec.d_model,
        n_layers=spec.n_layers,
        n_heads=spec.n_heads,
        cls=spec.grid.cls,
        register=spec.grid.register,
        patch=spec.grid.patch,
        input_shape=spec.input_shape,
    )


def verify_all(known: Mapping[str, Row]) -> list[Row]:
    """Verify every name of every family but the known ones; what fails is logged and left out."""
    from vitmodels.registry import families

    found: list[Row] = []
    for family in families():
        listed: set[str] = set()
        for name in family.names():
            if row := known.get(f"{family.prefix}/{name}"):
                found.append(row)
                continue
            architecture = name.partition("." if family.prefix == "timm" else "@")[0]
            try:
                row = verify(f"{family.prefix}/{name}", sites=architecture not in listed)
            except Exception:
                _LOG.exception("%s/%s is left out", family.prefix, name)
                continue
            listed.add(architecture)
            found.append(row)
        _LOG.info("%s: %d names", family.name, len(family.names()))
    return sorted(found, key=lambda row: row.id)


def to_tsv(found: Iterable[Row]) -> str:
    """Return the content of ``catalog.tsv``."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    writer.writerows(row.to_strings() for row in found)
    return text.getvalue()


def to_markdown(found: Sequence[Row]) -> str:
    """Return ``docs/models.md``: names by family, checkpoints of an architecture in one line."""
    counts = Counter(row.family for row in found)
    lines = [
        "# Models",
        "",
        f"{len(found)} names, each built on the meta device and its sites listed. Written by",
        "`python -m vitmodels.catalog docs/models.md`; do not edit. Other checkpoints of the same",
        "architectures load as well. Names with tags behind them load with any of the tags, as",
        "`timm/<name>.<tag>` or `open_clip/<name>@<tag>`.",
        "",
        "| family | names | clips |",
        "|---|---|---|",
    ]
    for family, count in sorted(counts.items()):
        clips = sum(row.video for row in found if row.family == family)
        lines.append(f"| [{family}](#{family}) | {count} | {clips or ''} |")
    by_family: dict[str, dict[tuple[str, ...], list[str]]] = defaultdict(dict)
    for row in found:
        separator = "." if row.id.startswith("timm/") else "@"
        name, _, tag = row.id.partition(separator)
        shape = "x".join(map(str, row.input_shape))
        patch = "x".join(map(str, row.patch))
        tokens = f"{row.cls} + {row.register} + {patch}"
        sizes = (row.d_model, row.n_layers, row.n_heads)
        key = (name, f"{row.parameters / 1e6:.1f}", *map(str, sizes), tokens, shape)
        by_family[row.family].setdefault(key, []).append(tag)
    for family, entries in sorted(by_family.items()):
        lines += [
            "",
            f"## {family}",
            "",
            "| name | M parameters | d_model | layers | heads "
            "| cls + register + patch | input | tags |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for key, tags in sorted(entries.items()):
            lines.append(f"| {' | '.join(key)} | {', '.join(filter(None, tags))} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Verify everything and write the list and, where a path is given, the page."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    known = {} if "--all" in arguments else {row.id: row for row in catalog()}
    found = verify_all(known)
    Path(str(files("vitmodels") / _FILE)).write_text(to_tsv(found), encoding="utf-8")
    for path in (argument for argument in arguments if argument != "--all"):
        Path(path).write_text(to_markdown(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
