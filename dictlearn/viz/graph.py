"""A pruned attribution graph as a still picture: layers upwards, tokens from left to right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dictlearn.circuits.graph import Graph, Node

_STYLE = {
    "embed": ("s", "tab:green"),
    "position": ("D", "tab:olive"),
    "latent": ("o", "tab:blue"),
    "error": ("X", "tab:gray"),
    "logit": ("^", "tab:red"),
}


def layered(
    axes: Axes, graph: Graph, *, most_edges: int = 400, most_labels: int = 30
) -> dict[str, tuple[float, float]]:
    """Draw a graph.

    Nodes of one layer stand in one row, in the order of their tokens; their area grows with their
    influence. Edges are red where they raise their target and blue where they lower it, darker
    and wider the nearer they come to the strongest of their target.

    Parameters
    ----------
    axes
        Where to draw.
    graph
        Pruned: hundreds of nodes at most can be seen.
    most_edges, most_labels
        Only so many edges, by influence, and labels of latents and patches, by influence.

    Returns
    -------
    dict[str, tuple[float, float]]
        Node id -> (x, y), for drawing more on top.
    """
    from matplotlib.collections import LineCollection

    place = _places(graph)
    source, target, weight = graph.edges()
    absolute = np.abs(graph.weights)
    strength = np.abs(weight) / absolute.max(1, initial=1e-30)[target]
    reach = np.array([n.probability if n.kind == "logit" else n.influence for n in graph.nodes])
    share = np.abs(weight) / absolute.sum(1)[target] * reach[target]
    order = np.argsort(share, kind="stable")[-most_edges:]
    ids = [node.id for node in graph.nodes]
    segments = [(place[ids[source[i]]], place[ids[target[i]]]) for i in order]
    rgb = {True: (0.75, 0.1, 0.1), False: (0.1, 0.2, 0.75)}
    colours = [(*rgb[bool(weight[i] > 0)], 0.1 + 0.8 * float(strength[i])) for i in order]
    widths = [0.4 + 2.2 * float(strength[i]) for i in order]
    axes.add_collection(LineCollection(segments, colors=colours, linewidths=widths, zorder=1))
    for kind, (marker, colour) in _STYLE.items():
        mine = [graph.nodes[i] for i in graph.of_kind(kind)]  # type: ignore[arg-type]
        if mine:
            xy = np.array([place[node.id] for node in mine])
            top = max(1e-12, max(node.influence for node in graph.nodes))
            size = [70 if kind == "logit" else 12 + 130 * n.influence / top for n in mine]
            axes.scatter(
                xy[:, 0], xy[:, 1], s=size, marker=marker, color=colour, label=kind, zorder=2,
                linewidths=0,
            )  # fmt: skip
    named = sorted((n for n in graph.nodes if n.kind != "logit"), key=lambda n: -n.influence)
    for node in [*named[:most_labels], *(n for n in graph.nodes if n.kind == "logit")]:
        x, y = place[node.id]
        axes.annotate(
            _label(node), (x, y), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=6
        )
    layers = sorted({node.layer for node in graph.nodes})
    last = max(layers)
    words = {-1: "input", last: "logits"}
    axes.set_yticks(layers, [words.get(layer, f"layer {layer}") for layer in layers])
    axes.set_xticks([])
    axes.margins(0.05, 0.1)
    axes.set_frame_on(False)
    axes.legend(frameon=False, fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return place


def _places(graph: Graph) -> dict[str, tuple[float, float]]:
    """Spread the nodes of each layer over the width; a third of a row is left for zigzag."""
    place = {}
    for layer in {node.layer for node in graph.nodes}:
        row = sorted(
            (n for n in graph.nodes if n.layer == layer), key=lambda n: (n.token, n.kind, n.latent)
        )
        for i, node in enumerate(row):
            lift = 0.0 if len(row) < 12 else 0.16 * (i % 3 - 1)
            place[node.id] = ((i + 0.5) / len(row), layer + lift)
    return place


def _label(node: Node) -> str:
    if node.kind == "logit":
        return node.name or node.id
    where = node.token_kind if node.token_kind != "patch" else ",".join(map(str, node.place))
    if node.kind == "latent":
        return f"{node.name or node.latent}\n{where}"
    return where
