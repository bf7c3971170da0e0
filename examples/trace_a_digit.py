"""Trace the circuit of a digit, and check it by taking it away.

    python examples/trace_a_digit.py --digit 3

Trains a transcoder for each of the four layers of a toy from one store, traces some pictures of the
digit, adds up the influence of every latent, and ablates the most influential ones in the model
itself, on pictures that the model was not trained on and no graph was traced on (the transcoders,
trained without labels on the whole store, know them). Controls ablate as many latents of largest
activation, and as many random ones, of those active on the digit.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import Tensor

import actstore
import dictlearn
import vitmodels
from actstore.selection import Split
from actstore.sources.digits import Digits
from dictlearn.circuits.graph import Graph
from dictlearn.circuits.pruning import latent_influence, prune
from dictlearn.circuits.replacement import replacement
from dictlearn.circuits.replacement_parts import Transcoders, transcoders
from dictlearn.circuits.tracing import class_readouts, trace
from dictlearn.circuits.tracing_check import compare_effects
from dictlearn.circuits.tracing_effects import ablation

Latents = list[tuple[int, int]]


def train(args: argparse.Namespace, model: vitmodels.VisionModel) -> Transcoders:
    """Harvest what the MLPs read and write, and train a transcoder a layer from one read."""
    store = actstore.harvest(
        model=model,
        data="digits",
        sites="blocks.*.mlp_in,blocks.*.mlp_out",
        tokens="cls,patch",
        limit=args.limit,
        out=f"{args.out}/acts.zarr",
    )
    dictionaries = [
        dictlearn.Dictionary(
            {f"blocks.{layer}.mlp_in": model.spec.d_model},
            {f"blocks.{layer}.mlp_out": model.spec.d_model},
            latents=args.expansion * model.spec.d_model,
            sparsify=dictlearn.TopK(args.k),
            seed=layer,
        )
        for layer in range(model.spec.n_layers)
    ]
    config = dictlearn.TrainConfig(
        steps=args.steps, batch_size=2048, tokens="cls,patch", holdout=0.1, lr=2e-3
    )
    dictlearn.train(store, dictionaries, config, out=f"{args.out}/transcoders")
    held_out = Split(half="validation", holdout=config.holdout, seed=config.split_seed)
    for layer, dictionary in enumerate(dictionaries):
        report = dictlearn.evaluate(dictionary, store, tokens="cls,patch", items=held_out)
        print(f"layer {layer}: FVU {report.fvu:.3f}, L0 {report.l0:.1f}, dead {report.dead:.1%}")
    return transcoders(model, f"{args.out}/transcoders")


def accuracy(
    model: vitmodels.VisionModel, x_BCHW: Tensor, label_B: Tensor, parts: Transcoders, gone: Latents
) -> Tensor:
    """Return the share of right answers for each digit, [10], with some latents ablated."""
    by_layer: dict[int, list[int]] = {}
    for layer, latent in gone:
        by_layer.setdefault(layer, []).append(latent)
    with torch.no_grad(), model.editing(ablation(parts, by_layer)):
        right_B = (model(x_BCHW).argmax(1) == label_B).float()
    return torch.stack([right_B[label_B == digit].mean() for digit in range(10)])


def circuit(graphs: Iterable[Graph]) -> dict[tuple[int, int], float]:
    """Return the mean influence of every (layer, latent) over several graphs, largest first."""
    total: dict[tuple[int, int], float] = {}
    for graph in graphs:
        for key, value in latent_influence(graph).items():
            total[key] = total.get(key, 0.0) + value
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def strongest(graphs: Iterable[Graph]) -> Latents:
    """Return (layer, latent) by summed activation, largest first: what needs no graph to find."""
    total: dict[tuple[int, int], float] = {}
    for graph in graphs:
        for node in graph.nodes:
            if node.kind == "latent":
                key = (node.layer, node.latent)
                total[key] = total.get(key, 0.0) + node.value
    return sorted(total, key=lambda key: -total[key])


def agree(found: list[xr.Dataset]) -> str:
    """Say the mean correlation and the largest relative error of each way of intervening."""
    return ", ".join(
        f"{way} r = {np.mean([f['correlation'].sel(way=way) for f in found]):.3f} "
        f"(error {max(float(f['error'].sel(way=way)) for f in found):.1e})"
        for way in found[0]["way"].values.tolist()
    )


def row(name: str, digit: int, acc: Tensor) -> str:
    """Say the accuracy on the digit and on the others."""
    others = [d for d in range(10) if d != digit]
    return f"{name:<42} {acc[digit]:6.1%} on {digit}s, {acc[others].mean():6.1%} on the others"


def main() -> None:
    """Train, trace, ablate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digit", type=int, default=3)
    parser.add_argument("--model", default="toy/digits-4l")
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--limit", type=int, help="items harvested")
    parser.add_argument("--pictures", type=int, default=12, help="pictures of the digit to trace")
    parser.add_argument("--ablate", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--draws", type=int, default=10, help="random controls")
    parser.add_argument("--out", default="trace-a-digit")
    parser.add_argument("--toy", action="store_true", help="half a minute, to see that it runs")
    args = parser.parse_args()
    if args.toy:
        args.limit, args.steps, args.pictures, args.draws, args.ablate = 1000, 60, 2, 3, [16]

    model = vitmodels.load(args.model)
    parts = train(args, model)

    digits = Digits()
    x = torch.stack([model.transform(digits.image(i)) for i in range(len(digits))])
    label = torch.tensor([digits.row(i)["label"] for i in range(len(digits))])
    unseen = torch.from_numpy(np.arange(len(x)) % 5 == 4)  # the toys were not trained on these
    mine = torch.nonzero((label == args.digit) & ~unseen).flatten().tolist()

    graphs = []
    checks: dict[float, list[xr.Dataset]] = {0.99: [], 0.0: []}
    for index in mine[: args.pictures]:
        made = replacement(model, parts, x[index])
        item = {"position": index, "label": args.digit}
        readouts = class_readouts(made, [args.digit])
        graphs.append(trace(made, readouts, item=item))
        for factor, found in checks.items():  # a small change, and ablation
            found.append(compare_effects(made, graphs[-1], readouts, factor=factor))
    keys = ("replacement", "completeness", "residual")
    means = {key: float(np.mean([graph.scores[key] for graph in graphs])) for key in keys}
    print(", ".join(f"{key} {value:.2g}" for key, value in means.items()))
    for factor, found in checks.items():
        print(f"20 latents times {factor}, predicted and real effect on the logit: {agree(found)}")
    small = prune(graphs[0])
    small.save(Path(args.out) / "graph.json")
    print(
        f"{len(graphs[0].nodes)} nodes and {graphs[0].n_edges} edges, pruned to "
        f"{len(small.nodes)} and {small.n_edges}: {args.out}/graph.json"
    )

    ranked = list(circuit(graphs))
    loud = strongest(graphs)
    held = (x[unseen], label[unseen])
    print(f"{len(ranked)} latents are active on the {len(graphs)} pictures of a {args.digit}")
    print(row("nothing ablated", args.digit, accuracy(model, *held, parts, [])))
    rng = np.random.default_rng(0)
    for count in args.ablate:
        print(
            row(
                f"{count} latents of the circuit",
                args.digit,
                accuracy(model, *held, parts, ranked[:count]),
            )
        )
        print(
            row(
                f"{count} latents of largest activation",
                args.digit,
                accuracy(model, *held, parts, loud[:count]),
            )
        )
        draws = [rng.choice(len(ranked), count, replace=False) for _ in range(args.draws)]
        controls = torch.stack(
            [accuracy(model, *held, parts, [ranked[i] for i in draw]) for draw in draws]
        )
        worst = controls[:, args.digit].min()
        name = f"{count} random active latents ({len(draws)} draws)"
        print(row(name, args.digit, controls.mean(0)) + f", worst draw {worst:.1%}")


if __name__ == "__main__":
    main()
