"""The model card of a dictionary: what it is, what it was trained on, what its report says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dictlearn.config import DictionaryConfig

if TYPE_CHECKING:
    from dictlearn.report import Report

_NO_REPORT = (
    "None was given when this was uploaded. Evaluate it on a store of the same model: "
    "`dictlearn eval FOLDER --store STORE`."
)


def kind(config: DictionaryConfig) -> str:
    """Return what a dictionary is called: sparse autoencoder, transcoder, crosscoder."""
    if len(config.reads) > 1 or len(config.writes) > 1:
        return "cross-layer transcoder" if len(config.reads) == 1 else "crosscoder"
    if config.reads == config.writes:
        return "sparse autoencoder"
    return "skip transcoder" if config.skip else "transcoder"


def model_card(
    config: DictionaryConfig,
    repo: str,
    *,
    report: Report | None,
    about: Mapping[str, Any],
    format: str = "native",
) -> str:
    """Return the README of a repository: YAML header, facts, how to load it, its report.

    Parameters
    ----------
    config, repo
        The dictionary's description and ``owner/repository``.
    report
        Evaluation; the card says so if there is none.
    about
        ``model``, ``tokens`` and ``store`` are stated where they are.
    format
        Format of the files.
    """
    what = kind(config)
    tags = ["sparse-autoencoder", "interpretability", "vision", what.replace(" ", "-")]
    facts = {
        "kind": what,
        "model": about.get("model"),
        "reads": ", ".join(f"`{s}` ({w})" for s, w in config.reads.items()),
        "writes": ", ".join(f"`{s}` ({w})" for s, w in config.writes.items()),
        "tokens": about.get("tokens"),
        "latents": config.latents,
        "sparsity": _sparsity(config),
        "input": _fields(config.input),
        "store": about.get("store"),
        "format": format,
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value is not None)
    header = "\n".join(f"- {tag}" for tag in dict.fromkeys(tags))
    return f"""---
library_name: actstore
tags:
{header}
---

# {repo.rpartition("/")[2]}

A {what} over activations of {about.get("model") or "a vision model"}.

| | |
|---|---|
{rows}

## Use

```python
from dictlearn.formats import load_pretrained

dictionary = load_pretrained("{repo}")
acts = dictionary.encode(x)  # x: activations of the sites read, [batch, {config.d_read}]
```

## Report

{_report(report)}
"""


def _sparsity(config: DictionaryConfig) -> str:
    text = f"{type(config.sparsify).__name__}({_fields(config.sparsify)})"
    if config.matryoshka is not None:
        text += f", Matryoshka({_fields(config.matryoshka)})"
    return text


def _fields(value: Any) -> str:
    return ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(value).items())


def _report(report: Report | None) -> str:
    if report is None:
        return _NO_REPORT
    lines = [
        report.table(),
        "",
        f"On {report.tokens} tokens ({report.items}) of the store `{report.store}`.",
    ]
    if report.substitution is not None:
        s = report.substitution
        lines.append(
            f"Substitution: {s.images} images, head {s.head}, target {s.target}, kinds replaced: "
            f"{', '.join(s.kinds)}."
        )
    return "\n".join(lines)
