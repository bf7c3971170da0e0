"""Does a graph say what happens? Latents changed one at a time, predicted against real effects.

The paper calls it mechanistic faithfulness and measures it by perturbing features of the underlying
model (Ameisen et al. 2025, "Circuit Tracing", section "Evaluating mechanistic faithfulness").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from dictlearn.circuits.graph import Graph
from dictlearn.circuits.replacement import Replacement
from dictlearn.circuits.tracing_effects import Way, measure, predict
from dictlearn.circuits.tracing_readout import Readout


def compare_effects(
    replacement: Replacement,
    graph: Graph,
    readouts: Sequence[Readout],
    *,
    nodes: Sequence[str] | int = 20,
    factor: float = 0.0,
    ways: Sequence[Way] = ("fixed", "frozen", "replaced", "model"),
) -> xr.Dataset:
    """Set latents, one at a time, to a multiple of their activation.

    Parameters
    ----------
    replacement
        The model on the input of the graph.
    graph
        Whole or pruned.
    readouts
        Those the graph was traced for, in their order.
    nodes
        Ids of latents, or how many of the most influential.
    factor
        0 ablates, 1 changes nothing, 2 doubles; near 1 for a small change.
    ways
        See `dictlearn.circuits.tracing_effects`.

    Returns
    -------
    xarray.Dataset
        ``predicted`` (node, logit) by the sum over all paths; ``real`` (way, node, logit);
        ``correlation`` (way) of the two, and ``error`` (way): the largest difference over the
        largest effect. NaN where effects do not vary.

    Raises
    ------
    ValueError
        Readouts that are not the graph's, or a factor of 1.
    KeyError
        No such node.
    """
    logits = graph.of_kind("logit")
    if [graph.nodes[i].name for i in logits] != [readout.name for readout in readouts]:
        raise ValueError(
            f"the graph explains {[graph.nodes[i].name for i in logits]}, the readouts are "
            f"{[readout.name for readout in readouts]}: give those it was traced for"
        )
    if factor == 1.0:
        raise ValueError("a factor of 1 changes nothing: 0 ablates, 0.99 changes a little")
    if isinstance(nodes, int):
        latents = sorted(graph.of_kind("latent"), key=lambda i: -graph.nodes[i].influence)
        nodes = [graph.nodes[i].id for i in latents[:nodes]]
    sites = sorted({readout.site for readout in readouts})
    predicted = np.zeros((len(nodes), len(readouts)))
    real = np.zeros((len(ways), len(nodes), len(readouts)))
    for n, id in enumerate(nodes):
        node = graph.nodes[graph.number(id)]
        change = (factor - 1.0) * node.value
        predicted[n] = predict(graph, {id: change})[logits]
        for w, way in enumerate(ways):
            at = (node.layer, node.token, node.latent)
            found = measure(replacement, {at: change}, way=way, sites=sites)
            for r, readout in enumerate(readouts):
                moved = found[readout.site]
                real[w, n, r] = float((moved * readout.direction.to(moved)).sum())
    off = np.abs(real - predicted).max((1, 2), initial=0.0)
    largest = np.abs(real).max((1, 2), initial=0.0)
    return xr.Dataset(
        {
            "predicted": (("node", "logit"), predicted),
            "real": (("way", "node", "logit"), real),
            "correlation": (("way",), [_correlation(predicted, one) for one in real]),
            "error": (("way",), np.where(largest > 0, off / np.maximum(largest, 1e-300), np.nan)),
        },
        coords={
            "node": list(nodes),
            "logit": [readout.name for readout in readouts],
            "way": list(ways),
        },
        attrs={"factor": factor},
    )


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.ravel() - a.mean(), b.ravel() - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale > 0 else float("nan")
