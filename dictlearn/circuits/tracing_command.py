"""``dictlearn trace``: the attribution graph of one picture, as a file, a table and a picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from dictlearn.circuits.graph import Graph

_SHOWN = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """Trace which latents, and which patches, turn one input into its class."""

    dictionaries: tyro.conf.Positional[tuple[Path, ...]]
    """Folder of a run, or folders of transcoders: one for each layer of the model."""
    out: Path
    """Where the graph goes, as JSON."""
    item: int | None = None
    """Number of the item in --data, or position in --store."""
    image: Path | None = None
    """An image file instead."""
    store: str | None = None
    """Take the item, its data set and the model from a store."""
    data: str | None = None
    """Data set of the item: digits, a folder, parquet file, tar, table or URL."""
    model: str | None = None
    """Model id; the one the dictionaries were trained on by default."""
    weights: str | None = None
    """Local weights of the model."""
    img_size: int | None = None
    """Side of the input in pixels, where it is not the model's own."""
    classes: tuple[int, ...] = ()
    """Classes to explain; the likeliest that hold 95 % of the probability by default."""
    max_latents: int = 4096
    """Latents that become nodes; the others count as error."""
    batch_size: int = 32
    """Rows of a backward pass."""
    node_threshold: float = 0.8
    """Share of the influence that the nodes kept hold; 1 keeps all."""
    edge_threshold: float = 0.98
    """Share of the edges' influence kept; 1 keeps all."""
    plot: Path | None = None
    """Also draw the graph into this file."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


def trace_with_progress(config: Trace) -> int:
    """Run ``dictlearn trace``."""
    import vitmodels
    from actstore.harvester import choose_device
    from dictlearn.circuits.pruning import prune
    from dictlearn.circuits.replacement import replacement
    from dictlearn.circuits.replacement_parts import transcoders
    from dictlearn.circuits.tracing import class_readouts, trace

    console = Console()
    described, source, index, item = _what(config)
    name = config.model or described or _trained_on(config.dictionaries)
    model = vitmodels.load(name, weights=config.weights, img_size=config.img_size)
    model.module.to(choose_device(config.device))
    x = _input(config, model, source, index)
    made = replacement(model, transcoders(model, config.dictionaries), x)
    readouts = class_readouts(made, list(config.classes) or None)
    if item.get("label_name"):
        readouts = [
            dataclasses.replace(r, name=str(item["label_name"])) if r.index == item["label"] else r
            for r in readouts
        ]
    with _progress(console) as progress:
        bar = progress.add_task("rows", total=None)

        def show(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        whole = trace(
            made,
            readouts,
            max_latents=config.max_latents,
            batch_size=config.batch_size,
            item=item,
            on_row=show,
        )
    graph = prune(whole, node_threshold=config.node_threshold, edge_threshold=config.edge_threshold)
    graph.save(config.out)
    _show(console, whole, graph)
    if config.plot is not None:
        _draw(graph, config.plot)
    console.print(f"graph: {config.out}", highlight=False, soft_wrap=True)
    return 0


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True)


def _what(config: Trace) -> tuple[str | None, Any, int, dict[str, Any]]:
    """Return model id, source, number in it and the description of the input."""
    given = [name for name in ("image", "store", "data") if getattr(config, name) is not None]
    if len(given) != 1:
        raise ValueError(
            f"give the input by one of --image FILE, --store STORE --item N, --data DATA --item N; "
            f"got {', '.join('--' + name for name in given) or 'none of them'}"
        )
    if config.image is not None:
        if not config.image.is_file():
            raise FileNotFoundError(f"no image at {config.image}")
        return None, None, -1, {"key": config.image.name}
    if config.item is None:
        raise ValueError(f"--{given[0]} {getattr(config, given[0])} needs --item N")
    import actstore
    from actstore.sources import open_source, reopen_source

    described, index = None, config.item
    if config.store is not None:
        store = actstore.open(config.store)
        source = reopen_source(store.manifest.data)
        rows = store.table().select(["position", "source"]).to_pydict()
        by_position = dict(zip(rows["position"], rows["source"], strict=True))
        if config.item not in by_position:
            raise ValueError(
                f"{config.store} has no item at position {config.item}: positions go from "
                f"{min(by_position)} to {max(by_position)}"
            )
        index = by_position[config.item]
        described = None if store.manifest.model is None else str(store.manifest.model["id"])
    else:
        source = open_source(config.data)
    if not 0 <= index < len(source):
        raise ValueError(f"no item {index}: {config.data} has 0 to {len(source) - 1}")
    item = {"position": config.item, "source": index}
    told = source.row(index)
    for name in ("key", "label", "label_name"):
        if isinstance(told.get(name), str | int):
            item[name] = told[name]
    return described, source, index, item


def _trained_on(folders: tuple[Path, ...]) -> str:
    """Return the id of the model that the first dictionary names."""
    for folder in folders:
        for file in [folder / "config.json", *sorted(folder.glob("*/config.json"))]:
            if file.is_file():
                about = json.loads(file.read_text()).get("about") or {}
                origin = about.get("model")
                if isinstance(origin, dict) and origin.get("id"):
                    return str(origin["id"])
    raise ValueError(
        f"{', '.join(map(str, folders))} do not say which model they were trained on: give --model"
    )


def _input(config: Trace, model: Any, source: Any, index: int) -> Any:
    import numpy as np
    import torch

    from actstore.sources.base import ForModel, decode_image

    if config.image is not None:
        return model.transform(decode_image(config.image.read_bytes()))
    if isinstance(source, ForModel):
        source = source.for_model(model.spec)
    image = source.image(index)
    if isinstance(image, torch.Tensor | np.ndarray):
        return torch.as_tensor(image)
    return model.transform(image)


def _show(console: Console, whole: Graph, graph: Graph) -> None:
    for node in graph.nodes:
        if node.kind == "logit":
            console.print(
                f"class {node.name}: {node.value:.3f} above the mean logit, "
                f"probability {node.probability:.1%}",
                highlight=False,
            )
    table = Table("latent", "layer", "token", "activation", "influence", title="most influential")
    latents = sorted((n for n in graph.nodes if n.kind == "latent"), key=lambda n: -n.influence)
    for node in latents[:_SHOWN]:
        where = ", ".join(map(str, node.place)) or node.token_kind
        cells = (str(node.latent), str(node.layer), where)
        table.add_row(*cells, f"{node.value:.3f}", f"{node.influence:.4f}")
    console.print(table)
    told = ", ".join(f"{name} {value:.3g}" for name, value in whole.scores.items())
    console.print(
        f"{len(whole.nodes):,} nodes and {whole.n_edges:,} edges, pruned to {len(graph.nodes):,} "
        f"and {graph.n_edges:,}; {told}",
        highlight=False,
        soft_wrap=True,
    )


def _draw(graph: Graph, path: Path) -> None:
    from matplotlib.figure import Figure

    from dictlearn.viz.graph import layered

    figure = Figure(figsize=(12, 1.5 + 1.5 * (graph.model["n_layers"] + 2)), layout="constrained")
    layered(figure.subplots(), graph)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
