"""Influence of nodes and edges on the logits, scores of a graph, pruning. Loads no torch.

With A the absolute weights, every row divided by its sum (all incoming edges of a node sum to 1),
and p the weights of the logits::

    B         = A + A^2 + A^3 + ... = (I - A)^-1 - I        sum over all paths
    influence = p B                                         of every node on the logits

(Ameisen et al. 2025, appendix "Graph pruning"). The sum ends by itself: the graph has no cycles
and at most as many steps as the model has layers, plus two.

Scores (same paper, "Evaluating graphs")::

    replacement  = I(inputs) / (I(inputs) + I(errors))      I: summed influence
    completeness = sum_t i_t (1 - sum_{s error} A_ts) / sum_t i_t          i_t = influence + p

Replacement asks what share of whole paths from the logits back ends at the input and not at an
error; completeness what share of the single edges, weighed by influence, comes from no error.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from dictlearn.circuits.graph import Graph


def row_sums(weights: Float[np.ndarray, "target source"]) -> Float[np.ndarray, " target"]:
    """Return the sums of the absolute weights into every node, 1 where there are none."""
    total = np.abs(weights).sum(1, dtype=np.float64)
    return np.where(total > 0, total, 1.0)


def path_sums(
    weights: Float[np.ndarray, "row source"],
    rows: np.ndarray,
    start: Float[np.ndarray, " source"],
) -> Float[np.ndarray, " source"]:
    """Return ``start @ (A + A^2 + ...)``.

    Parameters
    ----------
    weights
        Rows of the nodes whose inputs are known; the others count as without inputs.
    rows
        Node number of each row.
    start
        Weight of every node at the beginning.

    Raises
    ------
    ValueError
        The graph has a cycle.
    """
    absolute, inverse = np.abs(weights), 1.0 / row_sums(weights)
    total, now = np.zeros_like(start), start
    for _ in range(len(start) + 1):
        now = (now[rows] * inverse) @ absolute
        if not now.any():
            return total
        total = total + now
    raise ValueError("the graph has a cycle, so paths have no end")


def logit_weights(graph: Graph) -> Float[np.ndarray, " node"]:
    """Return p: the probabilities of the logits, divided by their sum."""
    p = np.array([node.probability if node.kind == "logit" else 0.0 for node in graph.nodes])
    if not p.sum() > 0:
        raise ValueError("the graph has no logit with a probability, so nothing has influence")
    weights: np.ndarray = p / p.sum()
    return weights


def influence(graph: Graph) -> Float[np.ndarray, " node"]:
    """Return the influence of every node on the logits, p B."""
    return path_sums(graph.weights, np.arange(len(graph.nodes)), logit_weights(graph))


def scores(graph: Graph) -> dict[str, float]:
    """Return the replacement and the completeness score, both from 0 to 1."""
    found, p = influence(graph), logit_weights(graph)
    inputs = found[graph.of_kind("embed", "position")].sum()
    errors = graph.of_kind("error")
    both = inputs + found[errors].sum()
    from_error = np.abs(graph.weights[:, errors]).sum(1) / row_sums(graph.weights)
    has_inputs = np.abs(graph.weights).sum(1) > 0
    weight = (found + p) * has_inputs
    return {
        "replacement": float(inputs / both) if both else 1.0,
        "completeness": float((weight * (1 - from_error)).sum() / max(weight.sum(), 1e-12)),
    }


def _enough(values: np.ndarray, share: float) -> np.ndarray:
    """Mask of the fewest values that hold a share of the sum."""
    order = np.argsort(-values, kind="stable")
    held = np.cumsum(values[order])
    if not held.size or held[-1] <= 0:
        return np.zeros(values.shape, dtype=bool)
    count = int(np.searchsorted(held, share * held[-1] * (1 - 1e-12))) + 1
    mask = np.zeros(values.shape, dtype=bool)
    mask[order[:count]] = values[order[:count]] > 0
    return mask


def prune(
    graph: Graph,
    *,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    keep_inputs: bool = False,
) -> Graph:
    """Keep the fewest nodes, then the fewest edges, that hold a share of the influence.

    Nodes are sorted by influence and kept until they hold `node_threshold` of the sum. Edges are
    scored, within the nodes kept, by ``A_ts (influence_t + p_t)`` and kept until they hold
    `edge_threshold` of the sum. Latents that then lead nowhere, or come from nowhere, go too.
    Weights and biases stay what they were: a pruned graph's edges no longer sum to the value.

    Parameters
    ----------
    graph
        A whole graph.
    node_threshold, edge_threshold
        Shares, in (0, 1]; 1 keeps all that has any influence.
    keep_inputs
        Keep every input node, as the paper does with the tokens of a prompt; patches are many,
        so here they are pruned like others by default.

    Raises
    ------
    ValueError
        A threshold outside (0, 1].
    """
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} is a share in (0, 1], got {value}")
    found = influence(graph)
    keep = _enough(found, node_threshold)
    keep[graph.of_kind("logit")] = True
    if keep_inputs:
        keep[graph.of_kind("embed", "position")] = True
    weights = np.where(keep[:, None] & keep[None, :], graph.weights, 0)
    inner = path_sums(weights, np.arange(len(keep)), logit_weights(graph)) + logit_weights(graph)
    edge = np.abs(weights) / row_sums(weights)[:, None] * inner[:, None]
    weights = np.where(_enough(edge.ravel(), edge_threshold).reshape(edge.shape), weights, 0)
    fixed = np.zeros(len(keep), dtype=bool)
    fixed[graph.of_kind("logit", *(("embed", "position") if keep_inputs else ()))] = True
    latent = np.zeros(len(keep), dtype=bool)
    latent[graph.of_kind("latent")] = True
    while True:
        leads, comes = (weights != 0).any(0), (weights != 0).any(1)
        alive = keep & (fixed | (leads & (comes | ~latent)))
        if (alive == keep).all():
            break
        keep = alive
        weights = np.where(keep[:, None] & keep[None, :], weights, 0)
    nodes = tuple(
        dataclasses.replace(n, influence=float(v)) for n, v in zip(graph.nodes, found, strict=True)
    )
    whole = dataclasses.replace(graph, nodes=nodes, weights=weights)
    told = {
        "node_threshold": node_threshold,
        "edge_threshold": edge_threshold,
        "nodes_before": len(graph.nodes),
        "edges_before": graph.n_edges,
    }
    return whole.subset(keep, pruning=told)


def latent_influence(graph: Graph) -> dict[tuple[int, int], float]:
    """Return the influence of every (layer, latent), summed over tokens, largest first."""
    total: dict[tuple[int, int], float] = {}
    for node, value in zip(graph.nodes, influence(graph).tolist(), strict=True):
        if node.kind == "latent":
            key = (node.layer, node.latent)
            total[key] = total.get(key, 0.0) + value
    return dict(sorted(total.items(), key=lambda item: -item[1]))
