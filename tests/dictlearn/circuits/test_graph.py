"""Graphs on disk, influence against the matrix inverse, pruning, the plot. No model needed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.manifest import FormatError
from dictlearn.circuits import graph as graphs
from dictlearn.circuits.graph import Graph, Node
from dictlearn.circuits.pruning import influence, latent_influence, logit_weights, prune, scores

MODEL = {
    "id": "toy/digits-2l",
    "n_layers": 2,
    "grid": {"cls": 1, "register": 0, "patch": [2, 2], "order": ["cls", "register", "patch"]},
}


def nodes(per_layer: int = 4) -> tuple[Node, ...]:
    """Inputs, then latents and errors of two layers, then two logits."""
    made = [Node(id=f"embed/{t}", kind="embed", layer=-1, token=t) for t in range(1, 5)]
    made.append(Node(id="position/0", kind="position", layer=-1, token=0, token_kind="cls"))
    for layer in range(2):
        made += [
            Node(id=f"latent/{layer}/{i % 5}/{i}", kind="latent", layer=layer, token=i % 5,
                 latent=i, value=1.0 + i)
            for i in range(per_layer)
        ]  # fmt: skip
        made += [Node(id=f"error/{layer}/{t}", kind="error", layer=layer, token=t) for t in (0, 1)]
    made += [
        Node(
            id=f"logit/{c}", kind="logit", layer=2, latent=c, name=str(c), probability=p, value=2.0
        )
        for c, p in ((3, 0.75), (7, 0.15))
    ]
    return tuple(made)


def a_graph(seed: int = 0, per_layer: int = 4, density: float = 0.7) -> Graph:
    rng = np.random.default_rng(seed)
    some = nodes(per_layer)
    layer = np.array([n.layer for n in some])
    target = np.array([n.kind in ("latent", "logit") for n in some])
    allowed = target[:, None] & (layer[:, None] > layer[None, :])
    weights = rng.normal(size=allowed.shape) * allowed * (rng.random(allowed.shape) < density)
    return Graph(
        nodes=some,
        weights=weights.astype(np.float32),
        model=MODEL,
        dictionaries=({"name": "a"}, {"name": "b"}),
        item={"position": 3, "label": 3},
        scores={"replacement": 0.5},
    )


@given(seed=st.integers(0, 10_000), density=st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_influence_is_the_matrix_inverse_of_the_paper(seed: int, density: float) -> None:
    """``p ((I - A)^-1 - I)``."""
    graph = a_graph(seed, density=density)
    absolute = np.abs(graph.weights).astype(np.float64)
    total = absolute.sum(1, keepdims=True)
    a = np.divide(absolute, total, out=np.zeros_like(absolute), where=total > 0)
    inverse = np.linalg.inv(np.eye(len(a)) - a) - np.eye(len(a))
    np.testing.assert_allclose(influence(graph), logit_weights(graph) @ inverse, atol=1e-12)


def test_scores_by_hand() -> None:
    """Logit <- latent (3) and error (1); latent <- patch (1) and error of layer 0 (1)."""
    some = (
        Node(id="embed/1", kind="embed", layer=-1, token=1),
        Node(id="error/0/1", kind="error", layer=0, token=1),
        Node(id="latent/1/1/5", kind="latent", layer=1, token=1, latent=5, value=1),
        Node(id="error/1/1", kind="error", layer=1, token=1),
        Node(id="logit/3", kind="logit", layer=2, latent=3, probability=0.4),
    )
    weights = np.zeros((5, 5), dtype=np.float32)
    weights[4, 2], weights[4, 3], weights[2, 0], weights[2, 1] = 3, -1, 1, 1
    graph = Graph(nodes=some, weights=weights, model=MODEL, dictionaries=())
    np.testing.assert_allclose(influence(graph), [0.375, 0.375, 0.75, 0.25, 0])
    found = scores(graph)
    assert found["replacement"] == pytest.approx(0.375 / (0.375 + 0.375 + 0.25))
    assert found["completeness"] == pytest.approx((1 * 0.75 + 0.75 * 0.5) / 1.75)
    assert latent_influence(graph) == {(1, 5): 0.75}


@given(
    seed=st.integers(0, 10_000),
    node_threshold=st.floats(0.05, 1.0),
    edge_threshold=st.floats(0.05, 1.0),
)
@settings(max_examples=40, deadline=None)
def test_pruning_keeps_a_connected_part(
    seed: int, node_threshold: float, edge_threshold: float
) -> None:
    """Fewer nodes and edges, weights unchanged, every node on a way from the inputs to a logit."""
    graph = a_graph(seed)
    small = prune(graph, node_threshold=node_threshold, edge_threshold=edge_threshold)
    place = [graph.number(node.id) for node in small.nodes]
    assert place == sorted(place)
    old = graph.weights[np.ix_(place, place)]
    kept = small.weights != 0
    assert (small.weights[kept] == old[kept]).all()
    for i, node in enumerate(small.nodes):
        if node.kind != "logit":
            assert kept[:, i].any(), node
        if node.kind == "latent":
            assert kept[i].any(), node
    assert small.of_kind("logit") == [len(small.nodes) - 2, len(small.nodes) - 1]
    assert small.pruning["nodes_before"] == len(graph.nodes)
    graphs.validate(small.to_json())


def test_pruning_keeps_the_most_influential_first() -> None:
    graph = a_graph(1)
    found = influence(graph)
    small = prune(graph, node_threshold=0.5, edge_threshold=1.0)
    kept = {node.id for node in small.nodes if node.kind != "logit"}
    held = sum(v for v, n in zip(found, graph.nodes, strict=True) if n.id in kept)
    assert held <= found.sum()
    lost = [v for v, n in zip(found, graph.nodes, strict=True) if n.id not in kept]
    best = max(zip(found, graph.nodes, strict=True), key=lambda pair: pair[0])
    assert best[1].id in kept
    assert max(lost) < best[0]
    whole = prune(graph, node_threshold=1.0, edge_threshold=1.0, keep_inputs=True)
    assert len(whole.of_kind("embed", "position")) == 5
    for wrong in (0.0, 1.1):
        with pytest.raises(ValueError, match=r"node_threshold is a share in \(0, 1\]"):
            prune(graph, node_threshold=wrong)


def test_file_round_trip(tmp_path: Path) -> None:
    graph = prune(a_graph(), node_threshold=0.9)
    path = graph.save(tmp_path / "deep" / "graph.json")
    again = graphs.load(path)
    assert [n.id for n in again.nodes] == [n.id for n in graph.nodes]
    np.testing.assert_allclose(again.weights, graph.weights, rtol=1e-5)
    assert again.pruning == graph.pruning
    assert again.item == graph.item
    assert again.dictionaries == graph.dictionaries
    assert again.grid.patch == (2, 2)
    assert again.save(tmp_path / "b.json").read_text() == path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["graph.json"]


def _set(data: dict[str, Any], path: str, value: Any) -> None:
    *front, last = (int(p) if p.isdigit() else p for p in path.split("."))
    at: Any = data
    for key in front:
        at = at[key]
    at[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "other", r"is no graph: its 'format' is 'other', expected 'dictlearn.graph'"),
        ("version", 9, r"has version 9; this release reads up to 1\. Upgrade"),
        ("nodes", {}, r"'nodes' must be a list"),
        ("nodes.0.kind", "neuron", r"nodes\[0\]\.kind = 'neuron' is not one of"),
        ("nodes.1.id", "embed/1", r"nodes\[1\]: the id 'embed/1' occurs twice"),
        ("nodes.0.layer", "x", r"nodes\[0\]\.layer = 'x' is of the wrong type"),
        ("nodes.2", {"id": "a"}, r"nodes\[2\]: missing fields \['bias'"),
        ("nodes.0.value", float("inf"), r"nodes\[0\]\.value is inf"),
        ("edges.0", [0, 999, 1.0], r"edges\[0\]: no node number 999"),
        ("edges.0", [0, 1], r"edges\[0\] must be \[source, target, weight\]"),
        ("edges.0", [16, 5, 1.0], r"edges\[0\]: goes from layer 2 \(logit/3\) to layer 0"),
        ("edges.0", [0, 1, 1.0], r"edges\[0\]: goes to embed/2, which has no inputs"),
        ("edges.0", [0, 5, float("nan")], r"weight nan is not a finite number"),
        ("model", {}, r"'model' needs 'grid'"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, path: str, value: Any, message: str) -> None:
    data = json.loads(json.dumps(a_graph().to_json()))
    number = next(i for i, node in enumerate(data["nodes"]) if node["kind"] == "logit")
    if path == "edges.0" and value[0] == 16:
        value = [number, 5, 1.0]
    _set(data, path, value)
    file = tmp_path / "g.json"
    file.write_text(json.dumps(data))
    with pytest.raises(FormatError, match=message):
        graphs.load(file)


def test_no_file_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no graph at .*dictlearn trace"):
        graphs.load(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(FormatError, match="is not JSON"):
        graphs.load(tmp_path / "a.json")


def test_files_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_EDGES", 10)
    with pytest.raises(ValueError, match=r"holds up to 20,000 and 10\. Prune it first"):
        a_graph().to_json()


def test_shapes_and_ids() -> None:
    with pytest.raises(ValueError, match=r"need weights \[\d+, \d+\], got \[2, 2\]"):
        Graph(nodes=nodes(), weights=np.zeros((2, 2)), model=MODEL, dictionaries=())
    with pytest.raises(KeyError, match=r"nearest: .*'logit/3'"):
        a_graph().number("logit/33")


def test_a_cycle_is_refused() -> None:
    graph = a_graph()
    weights = graph.weights.copy()
    a, b = graph.of_kind("latent")[:2]
    logit = graph.of_kind("logit")[0]
    weights[a, b] = weights[b, a] = weights[logit, a] = 1
    looped = Graph(nodes=graph.nodes, weights=weights, model=MODEL, dictionaries=())
    with pytest.raises(ValueError, match="has a cycle"):
        influence(looped)


def test_no_torch_to_read_a_graph() -> None:
    import subprocess
    import sys

    code = (
        "import sys, dictlearn.circuits.graph, dictlearn.circuits.pruning, dictlearn.viz.graph; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_layered_plot() -> None:
    """Layers stand above each other, tokens from left to right, edges by sign and weight."""
    from matplotlib.figure import Figure

    from dictlearn.viz.graph import layered

    graph = prune(a_graph(), node_threshold=0.95)
    axes = Figure().subplots()
    place = layered(axes, graph, most_labels=4)
    assert set(place) == {node.id for node in graph.nodes}
    for node in graph.nodes:
        assert place[node.id][1] == pytest.approx(node.layer, abs=0.5)
    by_token = sorted((n.token, place[n.id][0]) for n in graph.nodes if n.layer == -1)
    assert [x for _, x in by_token] == sorted(x for _, x in by_token)
    [lines] = [c for c in axes.collections if type(c).__name__ == "LineCollection"]
    assert len(lines.get_segments()) == graph.n_edges
    assert len(axes.texts) <= 4 + len(graph.of_kind("logit"))
    assert next(t.get_text() for t in axes.get_yticklabels()) == "input"
