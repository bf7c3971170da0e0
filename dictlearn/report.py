"""What an evaluation found, as data. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DENSITY_EDGES = (-6.0, -5.0, -4.5, -4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0)
"""Edges of the density histogram: log10 of the firing rate; below the first: rarer or never."""


@dataclass(frozen=True, kw_only=True)
class Substitution:
    """What the model does when a site is replaced; natural logarithms, means over images."""

    images: int
    """Images run."""
    target: str
    """``labels``, or ``clean prediction`` where the data set has none that fit the head."""
    kinds: tuple[str, ...]
    """Token kinds replaced; the others keep their values."""
    ce: Mapping[str, float]
    """Cross-entropy: clean, spliced (the dictionary's output), error (that plus its error, which
    must equal clean), zero, mean (of the store)."""
    top1: Mapping[str, float]
    """Share of images whose largest logit is the target, under each."""
    kl: Mapping[str, float]
    """KL divergence from the clean prediction, under each."""
    head: str = "model"
    """What gives the logits: the model's own head, a zero-shot classifier and its scale, or a
    probe."""

    @property
    def recovered(self) -> float:
        """``(CE_zero - CE_spliced) / (CE_zero - CE_clean)``; nan when zeroing costs nothing."""
        cost = self.ce["zero"] - self.ce["clean"]
        return (self.ce["zero"] - self.ce["spliced"]) / cost if cost > 1e-9 else math.nan


@dataclass(frozen=True, kw_only=True)
class Report:
    """How good and how sparse a dictionary is, on one store."""

    store: str
    """Fingerprint of the store."""
    reads: tuple[str, ...]
    """Sites read."""
    writes: tuple[str, ...]
    """Sites written."""
    latents: int
    """F."""
    tokens: int
    """Tokens evaluated."""
    items: str
    """Which items: ``all``, or the held-out share."""
    l0: float
    """Mean number of active latents of a token."""
    l0_by_kind: Mapping[str, float]
    """The same by token kind."""
    l0_by_position: Mapping[int, float]
    """The same by token number in the site's full token order."""
    fvu: float
    """``sum |y - t|^2 / sum |t - mean t|^2`` over the tokens evaluated."""
    fvu_by_kind: Mapping[str, float]
    """The same within each token kind, about the kind's own mean; nan for one token."""
    fvu_by_site: Mapping[str, float]
    """The same for each site written."""
    cosine: float
    """Mean over tokens of the cosine of output and target."""
    mse: float
    """Mean squared error a channel, in stored units."""
    dead: float
    """Share of latents that never fired."""
    dense: float
    """Share of latents that fired on more than a tenth of the tokens."""
    density: tuple[int, ...]
    """Latents by log10 of the firing rate between `DENSITY_EDGES`; rarer or never comes first."""
    fvu_by_position: Mapping[int, float] = field(default_factory=dict)
    """FVU by token number, each about the mean at that position; nan where nothing varies."""
    cosine_by_kind: Mapping[str, float] = field(default_factory=dict)
    """Cosine by token kind."""
    cosine_by_position: Mapping[int, float] = field(default_factory=dict)
    """Cosine by token number."""
    cosine_by_site: Mapping[str, float] = field(default_factory=dict)
    """Cosine of the part of each site written."""
    substitution: Substitution | None = None
    """Effect on the model, when it was evaluated, by the first head."""
    other_heads: tuple[Substitution, ...] = ()
    """The same by further heads."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Free: the dictionary's name and path."""

    @property
    def explained_variance(self) -> float:
        """``1 - fvu``."""
        return 1.0 - self.fvu

    def to_json(self) -> dict[str, Any]:
        """JSON-able form; numbers that are not finite become None."""
        return _finite(dataclasses.asdict(self))  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """Inverse of `to_json`."""
        fields = dict(data)
        for name in ("reads", "writes", "density"):
            fields[name] = tuple(fields[name])
        for name in ("l0_by_position", "fvu_by_position", "cosine_by_position"):
            fields[name] = {int(k): _nan(v) for k, v in fields.get(name, {}).items()}
        for name in ("fvu_by_kind", "fvu_by_site", "cosine_by_kind", "cosine_by_site"):
            fields[name] = {k: _nan(v) for k, v in fields.get(name, {}).items()}
        fields["fvu"] = _nan(fields["fvu"])
        if fields.get("substitution"):
            fields["substitution"] = _substitution(fields["substitution"])
        others = fields.get("other_heads", ())
        fields["other_heads"] = tuple(_substitution(inner) for inner in others)
        return cls(**fields)

    def save(self, path: str | Path) -> Path:
        """Write the JSON form to a file."""
        file = Path(path)
        file.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        return file

    def row(self) -> dict[str, str]:
        """One row of a table: column -> text."""
        out = {"L0": f"{self.l0:.1f}"}
        out |= {f"L0 {kind}": f"{value:.1f}" for kind, value in self.l0_by_kind.items()}
        out |= {"FVU": f"{self.fvu:.4f}", "cosine": f"{self.cosine:.4f}"}
        out |= {"dead": f"{self.dead:.1%}", "dense": f"{self.dense:.1%}"}
        if self.substitution is not None:
            out |= _columns(self.substitution, "")
        for s in self.other_heads:
            out |= _columns(s, f"{s.head}: ")
        return out

    def table(self) -> str:
        """Return the row as a Markdown table."""
        return markdown([self])


def _substitution(data: Mapping[str, Any]) -> Substitution:
    return Substitution(**{**data, "kinds": tuple(data["kinds"])})


def _columns(s: Substitution, prefix: str) -> dict[str, str]:
    """Columns of one head; ``error`` is left out, it equals ``clean`` or the wiring is wrong."""
    out = {f"CE {k}": f"{v:.4f}" for k, v in s.ce.items() if k != "error"}
    out |= {f"top-1 {k}": f"{s.top1[k]:.1%}" for k in ("clean", "spliced")}
    out["recovered"] = f"{s.recovered:.1%}"
    return {prefix + k: v for k, v in out.items()}


def markdown(reports: list[Report]) -> str:
    """Markdown table of reports, a row each, named by ``about["name"]`` or the sites."""
    rows = [r.row() for r in reports]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    names = [str(r.about.get("name", "+".join(r.reads))) for r in reports]
    lines = ["| " + " | ".join(["dictionary", *columns]) + " |", "|" + "---|" * (len(columns) + 1)]
    for name, row in zip(names, rows, strict=True):
        lines.append("| " + " | ".join([name, *(row.get(c, "") for c in columns)]) + " |")
    return "\n".join(lines)


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
