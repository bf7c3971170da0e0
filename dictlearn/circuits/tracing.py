"""Attribution graphs: every direct effect between the nodes of a replacement model.

The replacement model is affine between its nodes, so the effect of a source s on a target t is the
source's vector times the gradient of the target, with every other MLP output held fixed::

    weights[t, s] = v_s . J^T w_t         v: a_f d_f of a latent, error_l[t'] of an error, the
                                          embedded patch or position of an input
                                          w: encoder row of a latent, direction of a readout

One backward pass gives a row for each copy of the input in the batch (Ameisen et al. 2025,
"Circuit Tracing", section "Building an attribution graph").

Shapes: B targets of one backward pass, T tokens, D channels, N nodes, R rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dictlearn.circuits.graph import Graph, Node
from dictlearn.circuits.pruning import influence, path_sums, scores
from dictlearn.circuits.replacement import Replacement
from dictlearn.circuits.tracing_readout import Readout, check_readouts, class_readouts
from dictlearn.circuits.tracing_rows import Rows
from dictlearn.runfile import digest

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Readout", "class_readouts", "trace"]

Progress = Callable[[int, int], None]


def trace(
    replacement: Replacement,
    readouts: Sequence[Readout] | None = None,
    *,
    max_latents: int = 4096,
    batch_size: int = 32,
    item: Mapping[str, Any] | None = None,
    names: Callable[[int, int], str] | None = None,
    on_row: Progress | None = None,
) -> Graph:
    """Compute the attribution graph of one input.

    Parameters
    ----------
    replacement
        See `dictlearn.circuits.replacement.replacement`.
    readouts
        What is explained; by default the likeliest classes, see `class_readouts`.
    max_latents
        Latents that become nodes. Where more are active, those of the largest influence are
        taken, a batch at a time by what is known so far, and the others count as error of their
        layers and tokens, so that sums stay exact.
    batch_size
        Rows of one backward pass.
    item
        Describes the input, for the file.
    names
        (layer, latent) -> name of a latent, for people.
    on_row
        Called with (rows done, rows in all).

    Returns
    -------
    Graph
        Whole, with influence and scores; `dictlearn.circuits.pruning.prune` makes it small.

    Raises
    ------
    ValueError
        A readout at a site that is not affine in the stream, or of another shape.
    """
    if max_latents < 1 or batch_size < 1:
        raise ValueError(f"max_latents and batch_size must be >= 1: {max_latents}, {batch_size}")
    readouts = class_readouts(replacement) if readouts is None else list(readouts)
    check_readouts(replacement, readouts)
    rows = Rows(replacement, batch_size)
    found = _compute(rows, readouts, min(max_latents, rows.n_latents), on_row)
    return _graph(rows, readouts, *found, item=dict(item or {}), names=names)


def _compute(
    rows: Rows, readouts: Sequence[Readout], wanted: int, on_row: Progress | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows [R, sources], their biases, and the latents (source numbers) they belong to.

    The first rows are those of the readouts.
    """
    total = len(readouts) + wanted
    weights = np.zeros((total, rows.n_sources), dtype=np.float32)
    bias = np.zeros(total, dtype=np.float64)
    done = 0

    def keep(row: Tensor, offset: Tensor) -> None:
        nonlocal done
        weights[done : done + len(row)] = row.numpy(force=True)
        bias[done : done + len(row)] = offset.numpy(force=True)
        done += len(row)
        if on_row is not None:
            on_row(done, total)

    for start in range(0, len(readouts), rows.batch):
        keep(*rows.of_readouts(readouts[start : start + rows.batch]))
    latents = np.empty(0, dtype=np.int64)
    first = rows.first_latent
    if wanted == rows.n_latents:
        latents = np.arange(first, first + wanted)
        for number in rows.batches(latents):
            keep(*rows.of_latents(number))
        return weights, bias, latents
    # Rows of the readouts and of the latents taken tell what the others contribute so far.
    p = np.array([r.probability for r in readouts])
    while len(latents) < wanted:
        start_S = (p / p.sum() / np.abs(weights[: len(p)]).sum(1).clip(1e-30)) @ np.abs(
            weights[: len(p)]
        )
        reach = start_S + path_sums(weights[len(p) : done], latents, start_S)
        reach[latents] = -1
        reach = reach[first : first + rows.n_latents]
        step = min(wanted - len(latents), max(4 * rows.batch, wanted // 8))
        best = np.sort(first + np.argsort(-reach, kind="stable")[:step])
        for number in rows.batches(best):
            keep(*rows.of_latents(number))
            latents = np.append(latents, number)
    return weights, bias, latents


def _graph(
    rows: Rows,
    readouts: Sequence[Readout],
    weights: np.ndarray,
    bias: np.ndarray,
    latents: np.ndarray,
    *,
    item: dict[str, Any],
    names: Callable[[int, int], str] | None,
) -> Graph:
    """Put rows and sources into the order of the forward pass."""
    sources = rows.sources()
    chosen = np.zeros(rows.n_sources, dtype=bool)
    chosen[latents] = True
    first, last = rows.first_latent, rows.first_latent + rows.n_latents
    rest = np.flatnonzero(~chosen[first:last]) + first
    if rest.size:  # latents that are no nodes count as error of the layers they write
        weights = rows.fold(weights, rest)
    kept = np.concatenate([np.arange(first), np.sort(latents), np.arange(last, rows.n_sources)])
    order = sorted(kept.tolist(), key=lambda s: (sources[s].layer, sources[s].kind != "latent", s))
    place = {source: i for i, source in enumerate(order)}
    n_nodes = len(order) + len(readouts)
    matrix = np.zeros((n_nodes, n_nodes), dtype=np.float32)
    nodes = [sources[s] for s in order]
    for row, source in enumerate(latents.tolist(), start=len(readouts)):
        at = place[source]
        matrix[at, : len(order)] = weights[row, order]
        name = "" if names is None else names(nodes[at].layer, nodes[at].latent)
        nodes[at] = dataclasses.replace(nodes[at], bias=float(bias[row]), name=name)
    for row, readout in enumerate(readouts):
        matrix[len(order) + row, : len(order)] = weights[row, order]
        nodes.append(
            Node(
                id=f"logit/{readout.index if readout.index >= 0 else row}",
                kind="logit",
                layer=rows.replacement.n_layers,
                latent=readout.index,
                name=readout.name,
                value=readout.value(rows.replacement),
                bias=float(bias[row]),
                probability=readout.probability,
            )
        )
    graph = Graph(
        nodes=tuple(nodes),
        weights=matrix,
        model=rows.replacement.model.spec.to_json(),
        dictionaries=describe(rows.replacement),
        item=item,
    )
    found = influence(graph)
    nodes = [dataclasses.replace(n, influence=float(v)) for n, v in zip(nodes, found, strict=True)]
    graph = dataclasses.replace(graph, nodes=tuple(nodes))
    return dataclasses.replace(graph, scores={**scores(graph), **explained(graph)})


def explained(graph: Graph) -> dict[str, float]:
    """Say how well the edges of a whole graph add up to the values of its nodes.

    Returns
    -------
    dict
        ``residual``: largest ``|value - sum of edges - bias|`` of a latent or logit.
        ``logits_without_errors``: ``1 - |sum of edges from errors| / (|sum of edges from errors| +
        |sum of the other edges|)``, averaged over logits by probability: 1 where errors add up to
        nothing, and 1 by definition with errors counted as explained.
    """
    into = [i for i, n in enumerate(graph.nodes) if n.kind in ("latent", "logit")]
    value = np.array([graph.nodes[i].value for i in into])
    bias = np.array([graph.nodes[i].bias for i in into])
    total = graph.weights[into].sum(1, dtype=np.float64)
    residual = np.abs(value - total - bias).max(initial=0.0)
    errors = graph.of_kind("error")
    logits = graph.of_kind("logit")
    wrong = np.abs(graph.weights[np.ix_(logits, errors)].sum(1, dtype=np.float64))
    right = np.abs(graph.weights[logits].sum(1, dtype=np.float64)
                   - graph.weights[np.ix_(logits, errors)].sum(1, dtype=np.float64))  # fmt: skip
    p = np.array([graph.nodes[i].probability for i in logits])
    share = 1 - wrong / np.maximum(wrong + right, 1e-30)
    return {
        "residual": float(residual),
        "logits_without_errors": float((p * share).sum() / max(p.sum(), 1e-30)),
    }


def describe(replacement: Replacement) -> tuple[dict[str, Any], ...]:
    """Return what the file says of each transcoder."""
    parts = replacement.parts
    paths = parts.paths or ("",) * len(parts.names)
    return tuple(
        {
            "name": name,
            "path": path,
            "reads": list(d.config.reads),
            "writes": list(d.config.writes),
            "latents": d.latents,
            "digest": digest(d),
        }
        for name, path, d in zip(parts.names, paths, parts.dictionaries, strict=True)
    )
