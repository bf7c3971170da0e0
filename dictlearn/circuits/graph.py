"""An attribution graph: nodes, edges, and its JSON. Loads no torch.

A node is a patch of the input, a position (the learned position of a patch, the class token), a
latent at a token, the error of a layer at a token, or a logit. ``weights[t, s]`` is the direct
effect of node s on node t in units of t's value::

    value_t = sum_s weights[t, s] + bias_t          for every latent and logit t

Nodes stand in the order of the forward pass, so edges go from a lower number to a higher one. The
JSON is described in docs/circuit-tracing.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from vitmodels.spec import TokenGrid

Kind = Literal["embed", "position", "latent", "error", "logit"]
FORMAT = "dictlearn.graph"
VERSION = 1
MAX_NODES = 20_000
"""Nodes that a file may have."""
MAX_EDGES = 500_000
"""Edges that a file may have."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node of a graph."""

    id: str
    """Unique in its graph: ``embed/7``, ``position/0``, ``latent/2/7/513``, ``error/2/7``,
    ``logit/3``; numbers are layer, token, latent (or class)."""
    kind: Kind
    """What it is."""
    layer: int
    """Layer of a latent or error; -1 for embed and position, the number of layers for logits."""
    token: int = -1
    """Token number; -1 for logits."""
    token_kind: str = ""
    """cls, register or patch; empty for logits."""
    place: tuple[int, ...] = ()
    """Patches: (row, column), or (time, row, column)."""
    latent: int = -1
    """Number in the dictionary of its layer; -1 for other kinds."""
    name: str = ""
    """For people: the class of a logit, the label of a latent."""
    value: float = 0.0
    """Activation of a latent, value of a logit; 1 for embed, position and error."""
    bias: float = 0.0
    """Part of the value of a latent or logit that no edge brings."""
    influence: float = 0.0
    """Share of the logits that goes through it, see `dictlearn.circuits.pruning`."""
    probability: float = 0.0
    """Logits: weight in the influence."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Graph:
    """Nodes and edges of the replacement model on one input."""

    nodes: tuple[Node, ...]
    """In the order of the forward pass."""
    weights: Float[np.ndarray, "target source"]
    """Direct effects; 0 where there is no edge."""
    model: dict[str, Any]
    """``ModelSpec`` of the model as JSON."""
    dictionaries: tuple[dict[str, Any], ...]
    """By layer: name, path, reads, writes, latents, digest of the weights."""
    item: dict[str, Any] = field(default_factory=dict)
    """Which input: position, key, label of a store's item, or a path."""
    scores: dict[str, float] = field(default_factory=dict)
    """Replacement and completeness score, and what was measured on the whole graph."""
    pruning: dict[str, Any] = field(default_factory=dict)
    """Thresholds, and nodes and edges before; empty for a whole graph."""

    def __post_init__(self) -> None:
        if self.weights.shape != (len(self.nodes),) * 2:
            raise ValueError(
                f"{len(self.nodes)} nodes need weights [{len(self.nodes)}, {len(self.nodes)}], "
                f"got {list(self.weights.shape)}"
            )

    @property
    def grid(self) -> TokenGrid:
        """Tokens of the model."""
        return TokenGrid.from_json(self.model["grid"])

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return int(np.count_nonzero(self.weights))

    def of_kind(self, *kinds: Kind) -> list[int]:
        """Return the numbers of the nodes of some kinds."""
        return [i for i, node in enumerate(self.nodes) if node.kind in kinds]

    def number(self, id: str) -> int:
        """Return the number of a node; KeyError names the nearest id."""
        import difflib

        for i, node in enumerate(self.nodes):
            if node.id == id:
                return i
        near = difflib.get_close_matches(id, [n.id for n in self.nodes], n=3, cutoff=0.0)
        raise KeyError(f"no node {id!r} in this graph of {len(self.nodes)}; nearest: {near}")

    def edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return sources, targets and weights of the edges."""
        target, source = np.nonzero(self.weights)
        return source, target, self.weights[target, source]

    def subset(self, keep: np.ndarray, **changes: Any) -> Graph:
        """Return the graph of some nodes, by number or mask."""
        index = np.flatnonzero(keep) if keep.dtype == bool else keep
        nodes = tuple(self.nodes[i] for i in index.tolist())
        weights = self.weights[np.ix_(index, index)]
        return dataclasses.replace(self, nodes=nodes, weights=weights, **changes)

    def to_json(self) -> dict[str, Any]:
        """Return the content of the file; ValueError where it would be too large."""
        if len(self.nodes) > MAX_NODES or self.n_edges > MAX_EDGES:
            raise ValueError(
                f"this graph has {len(self.nodes):,} nodes and {self.n_edges:,} edges; a file "
                f"holds up to {MAX_NODES:,} and {MAX_EDGES:,}. Prune it first: "
                "dictlearn.circuits.pruning.prune(graph)"
            )
        source, target, weight = self.edges()
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "dictionaries": list(self.dictionaries),
            "item": self.item,
            "scores": {k: float(v) for k, v in self.scores.items()},
            "pruning": self.pruning,
            "nodes": [_node_json(node) for node in self.nodes],
            "edges": [
                [s, t, float(f"{w:.6g}")]
                for s, t, w in zip(source.tolist(), target.tolist(), weight.tolist(), strict=True)
            ],
        }

    def save(self, path: str | Path) -> Path:
        """Write the JSON, all at once; see docs/circuit-tracing.md."""
        final = Path(path)
        text = json.dumps(self.to_json(), allow_nan=False, separators=(",", ":"))
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f".{final.name}.tmp")
        temporary.write_text(text + "\n")
        temporary.replace(final)
        return final


def _node_json(node: Node) -> dict[str, Any]:
    data = dataclasses.asdict(node)
    data["place"] = list(node.place)
    for name in ("value", "bias", "influence", "probability"):
        data[name] = float(f"{data[name]:.6g}")
    return data


def load(path: str | Path) -> Graph:
    """Read a graph.

    Raises
    ------
    FileNotFoundError
        No such file.
    FormatError
        It is no graph, of a newer version, or something in it is wrong; the message says what.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no graph at {file}; make one: dictlearn trace --help")
    try:
        data = json.loads(file.read_text())
    except ValueError as error:
        raise _error(f"{file} is not JSON: {error}") from error
    validate(data, str(file))
    nodes = tuple(Node(**{**node, "place": tuple(node["place"])}) for node in data["nodes"])
    weights = np.zeros((len(nodes), len(nodes)), dtype=np.float32)
    for source, target, weight in data["edges"]:
        weights[target, source] = weight
    return Graph(
        nodes=nodes,
        weights=weights,
        model=data["model"],
        dictionaries=tuple(data["dictionaries"]),
        item=data["item"],
        scores=data["scores"],
        pruning=data["pruning"],
    )


_KEYS: Mapping[str, type] = {
    "model": dict,
    "dictionaries": list,
    "item": dict,
    "scores": dict,
    "pruning": dict,
    "nodes": list,
    "edges": list,
}
_TYPES: Mapping[str, type | tuple[type, ...]] = {
    **{"id": str, "kind": str, "layer": int, "token": int, "token_kind": str, "place": list},
    **{"latent": int, "name": str},
    **dict.fromkeys(("value", "bias", "influence", "probability"), (int, float)),
}


def validate(data: Any, where: str = "graph") -> None:
    """Check the content of a file.

    Raises
    ------
    FormatError
        Naming the first thing that is wrong.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise _error(f"{where} is no graph: its 'format' is {found!r}, expected {FORMAT!r}")
    if not isinstance(data.get("version"), int) or not 1 <= data["version"] <= VERSION:
        raise _error(
            f"{where} has version {data.get('version')!r}; this release reads up to {VERSION}. "
            "Upgrade: pip install -U actstore"
        )
    for key, kind in _KEYS.items():
        if not isinstance(data.get(key), kind):
            raise _error(f"{where}: {key!r} must be a {kind.__name__}, found {data.get(key)!r:.60}")
    if "grid" not in data["model"] or "n_layers" not in data["model"]:
        raise _error(f"{where}: 'model' needs 'grid' and 'n_layers'")
    if len(data["nodes"]) > MAX_NODES or len(data["edges"]) > MAX_EDGES:
        raise _error(f"{where} has more than {MAX_NODES:,} nodes or {MAX_EDGES:,} edges")
    _validate_nodes(data["nodes"], where)
    _validate_edges(data["edges"], data["nodes"], where)


def _validate_nodes(nodes: list[Any], where: str) -> None:
    seen: set[str] = set()
    for i, node in enumerate(nodes):
        at = f"{where}: nodes[{i}]"
        if not isinstance(node, dict):
            raise _error(f"{at} must be an object")
        if set(node) != set(_TYPES):
            missing, extra = sorted(set(_TYPES) - set(node)), sorted(set(node) - set(_TYPES))
            raise _error(f"{at}: missing fields {missing}, unknown fields {extra}")
        for name, kind in _TYPES.items():
            value = node[name]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise _error(f"{at}.{name} = {value!r:.60} is of the wrong type")
            if isinstance(value, float) and not math.isfinite(value):
                raise _error(f"{at}.{name} is {value}")
        if node["kind"] not in get_args(Kind):
            raise _error(f"{at}.kind = {node['kind']!r} is not one of {get_args(Kind)}")
        if node["id"] in seen:
            raise _error(f"{at}: the id {node['id']!r} occurs twice")
        seen.add(node["id"])


def _validate_edges(edges: list[Any], nodes: list[Any], where: str) -> None:
    seen: set[tuple[int, int]] = set()
    for i, edge in enumerate(edges):
        at = f"{where}: edges[{i}]"
        if not isinstance(edge, list) or len(edge) != 3:
            raise _error(f"{at} must be [source, target, weight], found {edge!r:.60}")
        source, target, weight = edge
        for end in (source, target):
            if not isinstance(end, int) or not 0 <= end < len(nodes):
                raise _error(f"{at}: no node number {end!r}; there are {len(nodes)}")
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise _error(f"{at}: weight {weight!r} is not a finite number")
        if nodes[target]["kind"] not in ("latent", "logit"):
            raise _error(f"{at}: goes to {nodes[target]['id']}, which has no inputs")
        if nodes[source]["layer"] >= nodes[target]["layer"]:
            raise _error(
                f"{at}: goes from layer {nodes[source]['layer']} ({nodes[source]['id']}) to layer "
                f"{nodes[target]['layer']} ({nodes[target]['id']}); edges go to later layers"
            )
        if (source, target) in seen:
            raise _error(f"{at}: occurs twice")
        seen.add((source, target))


def _error(message: str) -> ValueError:
    from actstore.manifest import FormatError

    return FormatError(message)
