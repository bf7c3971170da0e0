"""Reports side by side: a column for each dictionary, a row for each figure. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from dictlearn.report import DENSITY_EDGES, Report, Substitution


def read_reports(path: str | Path) -> list[Report]:
    """Read a file with one report, or a list of them, as `Report.save` or ``dictlearn eval`` write.

    Raises
    ------
    ValueError
        The file holds something else.
    """
    file = Path(path)
    try:
        data = json.loads(file.read_text())
        return [Report.from_json(one) for one in (data if isinstance(data, list) else [data])]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is not a file of reports ({type(error).__name__}: {error}); make one with "
            "`dictlearn eval DICTIONARY --store STORE --out FILE.json`"
        ) from error


def names(reports: Sequence[Report]) -> list[str]:
    """One different name for each report."""
    out: list[str] = []
    for report in reports:
        base = str(report.about.get("name") or "+".join(report.reads))
        name, number = base, 1
        while name in out:
            number += 1
            name = f"{base} ({number})"
        out.append(name)
    return out


def figures(report: Report) -> dict[str, str]:
    """Every figure of a report as text, by the name of its row."""
    out = {
        "reads": ", ".join(report.reads),
        "writes": ", ".join(report.writes),
        "latents": f"{report.latents:,}",
        "tokens": f"{report.tokens:,}",
        "items": report.items,
        "store": report.store[:16],
        "L0": f"{report.l0:.2f}",
    }
    out |= {f"L0 {kind}": f"{v:.2f}" for kind, v in report.l0_by_kind.items()}
    out |= {"FVU": f"{report.fvu:.4f}", "explained variance": f"{report.explained_variance:.4f}"}
    out |= {f"FVU {kind}": _number(v) for kind, v in report.fvu_by_kind.items()}
    if len(report.fvu_by_site) > 1:
        out |= {f"FVU {site}": _number(v) for site, v in report.fvu_by_site.items()}
    out["cosine"] = f"{report.cosine:.4f}"
    out |= {f"cosine {kind}": _number(v) for kind, v in report.cosine_by_kind.items()}
    if len(report.cosine_by_site) > 1:
        out |= {f"cosine {site}": _number(v) for site, v in report.cosine_by_site.items()}
    out |= {"MSE": f"{report.mse:.4g}", "dead": f"{report.dead:.1%}"}
    out["dense"] = f"{report.dense:.1%}"
    rates = ["none", *(f"10^{edge:g}" for edge in DENSITY_EDGES)]
    for low, high, count in zip(rates, rates[1:], report.density, strict=False):
        out[f"latents firing {low} to {high}"] = f"{count:,}"
    heads = [report.substitution] if report.substitution is not None else []
    for head in [*heads, *report.other_heads]:
        out |= _head(head)
    return out


def _head(s: Substitution) -> dict[str, str]:
    out = {"images": f"{s.images:,}", "target": s.target}
    out |= {f"CE {k}": f"{v:.4f}" for k, v in s.ce.items()}
    out |= {f"top-1 {k}": f"{v:.1%}" for k, v in s.top1.items()}
    out |= {f"KL {k}": f"{v:.4f}" for k, v in s.kl.items() if k != "clean"}
    out["recovered"] = f"{s.recovered:.1%}" if math.isfinite(s.recovered) else ""
    return {f"{s.head}: {k}": v for k, v in out.items()}


def side_by_side(reports: Sequence[Report]) -> str:
    """Markdown table; below it what keeps the columns from being compared like with like.

    Raises
    ------
    ValueError
        There is no report.
    """
    if not reports:
        raise ValueError("nothing to compare: give dictionaries, or files of reports")
    columns = [figures(r) for r in reports]
    rows = list(dict.fromkeys(key for column in columns for key in column))
    lines = ["| | " + " | ".join(names(reports)) + " |", "|" + "---|" * (len(reports) + 1)]
    lines += ["| " + " | ".join([k, *(c.get(k, "") for c in columns)]) + " |" for k in rows]
    differing = [
        what
        for what, values in (
            ("store", {r.store for r in reports}),
            ("items", {r.items for r in reports}),
            ("token kinds", {tuple(r.l0_by_kind) for r in reports}),
            ("sites written", {r.writes for r in reports}),
        )
        if len(values) > 1
    ]
    if differing:
        lines += ["", f"Not like with like: the columns differ in {', '.join(differing)}."]
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else ""
