"""Speed of patching: a grid in one call, against one forward pass a patch, and against a gradient.

    python -m benchmarks.patching --model timm/vit_small_patch16_224 --positions 16

The peer is the loop that TransformerLens documents (``for layer: for position: run_with_hooks``)
with this library's own hooks, so that only the batching differs. Both run on some positions of
every layer, in turns; CPU seconds of the process, so that other load counts little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch
from torch import Tensor

import vitmodels
from dictlearn.circuits import activation_patching, attribution_patching
from dictlearn.circuits.metrics import logit_difference


def one_by_one(
    model: vitmodels.VisionModel,
    clean: Tensor,
    corrupted: Tensor,
    sites: list[str],
    positions: list[int],
) -> Tensor:
    """Return the metric after each patch [site, position], one forward pass each."""
    metric = logit_difference(0, 1)
    values = []
    with torch.no_grad():
        source = model.run(clean, sites)
        for site in sites:
            for position in positions:

                def edit(value: Tensor, site: str = site, position: int = position) -> Tensor:
                    value[:, position] = source[site][:, position]
                    return value

                with model.editing({site: edit}):
                    values.append(metric(model(corrupted)).mean())
    return torch.stack(values).view(len(sites), len(positions))


def main() -> None:
    """Measure in turns, print and write the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="timm/vit_small_patch16_224")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--positions", type=int, default=16, help="positions a layer")
    parser.add_argument("--turn", type=int, default=16, help="positions a turn")
    parser.add_argument("--items", type=int, default=1, help="pairs")
    parser.add_argument("--rows", type=int, default=64, help="rows of one forward pass")
    parser.add_argument("--full", action="store_true", help="also time the whole grid in one call")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()

    model = vitmodels.load(args.model, pretrained=args.pretrained, seed=0)
    generator = torch.Generator().manual_seed(0)
    clean, corrupted = (
        torch.randn(args.items, *model.spec.input_shape, generator=generator) for _ in range(2)
    )
    sites = [name for name in model.anatomy.taps if name.endswith(".resid_post")]
    tokens = model.spec.grid.n_tokens
    step = max(1, tokens // args.positions)
    positions = list(range(0, tokens, step))[: args.positions]
    metric = logit_difference(0, 1)
    cpu = {"one call": 0.0, "one by one": 0.0, "attribution": 0.0}
    wall = dict(cpu)
    largest = 0.0

    def timed(name: str, run: object) -> object:
        start, at = time.process_time(), time.perf_counter()
        result = run()  # type: ignore[operator]
        cpu[name] += time.process_time() - start
        wall[name] += time.perf_counter() - at
        return result

    # What happens once a model (shapes of sites, where its batch may grow) is not timed.
    activation_patching(model, clean, corrupted, sites, metric, positions=[0])
    # In turns, a few positions of all layers at a time; a call of the whole grid has them all.
    for start in range(0, len(positions), args.turn):
        some = positions[start : start + args.turn]
        together = timed(
            "one call",
            lambda some=some: activation_patching(
                model, clean, corrupted, sites, metric, positions=some, rows=args.rows
            ),
        )
        alone = timed(
            "one by one",
            lambda some=some: one_by_one(model, clean, corrupted, sites, some),
        )
        values = torch.from_numpy(together["resid_post"].values)  # type: ignore[index]
        largest = max(largest, float((values - alone).abs().max()))  # type: ignore[operator]
    repeats = 3
    for _ in range(repeats):
        timed(
            "attribution",
            lambda: attribution_patching(model, clean, corrupted, sites, metric),
        )
    patches, grid = len(sites) * len(positions), len(sites) * tokens
    each = {name: cpu[name] / patches for name in ("one call", "one by one")}
    whole = cpu["attribution"] / repeats
    found = {
        "model": args.model,
        "layers": len(sites),
        "tokens": tokens,
        "patches timed": patches,
        "pairs": args.items,
        "rows": args.rows,
        "cpu ms a patch": {name: 1e3 * value for name, value in each.items()},
        "wall ms a patch": {name: 1e3 * wall[name] / patches for name in each},
        "one by one / one call": each["one by one"] / each["one call"],
        "attribution, whole grid, cpu s": whole,
        "exact, whole grid at that rate, cpu s": each["one call"] * grid,
        "exact in one call / attribution": each["one call"] * grid / whole,
        "one by one / attribution": each["one by one"] * grid / whole,
        "largest difference of values": largest,
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }
    if args.full:
        start, at = time.process_time(), time.perf_counter()
        activation_patching(model, clean, corrupted, sites, metric, rows=args.rows)
        found["whole grid in one call, cpu s"] = time.process_time() - start
        found["whole grid in one call, wall s"] = time.perf_counter() - at
    print(json.dumps(found, indent=1))
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
