r"""After how many trainings harvesting once beats recomputing activations on the fly.

    python -m benchmarks.break_even --data photos/ --weights vit_small_patch14_dinov2.safetensors

Seconds for each token of the site, measured in turns in one process:

    d  decoding an image and preparing it          f  forward pass, stopped after the site
    h  harvest: decode, forward, write, commit      r  shuffled read from the store, float32
    t  one training step of a TopK dictionary

A *pass* shows every token to one dictionary once: E epochs of K dictionaries, trained one after
the other, are n = K E passes. Over N tokens::

    on the fly   N n (d + f + t)
    cached       N (h + n (r + t))
    even at      n* = h / (d + f - r)        caching wins from the next whole pass on

t cancels in n* and decides how much is won: the table has (on the fly) / (cached) for some n. The
second line of n* leaves out d on both sides: images decoded once and kept in memory, so that
h becomes h - d. On a GPU f falls and d and r stay, which moves n* towards the first line.
Dictionaries trained side by side from one pass share it, cached or not: K then counts as one.
On the fly has costs that are not counted: tokens of an image are neighbours unless a buffer of
many images shuffles them, and nothing is left to evaluate on.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import actstore
import vitmodels
from actstore.loader import TokenLoader
from actstore.sources import open_source
from benchmarks import measure
from benchmarks.train_step import ours
from dictlearn import TopK

BATCH = 4096
"""Tokens of a training batch."""

PASSES = (1, 2, 3, 5, 10, 30)
"""Numbers of passes in the table."""

COSTS = ("decode", "forward", "harvest", "read", "step")


def timed(tokens: int, work: Callable[[], object]) -> tuple[float, float]:
    """Return seconds by the clock and of the processors, for a token."""
    begin, used = time.perf_counter(), time.process_time()
    work()
    return (time.perf_counter() - begin) / tokens, (time.process_time() - used) / tokens


def even(h: float, c: float, r: float) -> float | None:
    """Return n* for harvest h, recomputing c and reading r; None where caching never wins."""
    return h / (c - r) if c > r else None


def costs(options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the costs of a token in every round, clock and processors; and tokens of a pass."""
    random = options.weights is None
    model = vitmodels.load(
        options.model, weights=options.weights, pretrained=not random, img_size=options.img_size
    )
    source = open_source(options.data)
    count = min(options.limit, len(source))
    told = {"model": model, "data": options.data, "limit": count, "sites": options.site}
    told |= {"tokens": "patch", "batch_size": options.batch_size}
    store = actstore.harvest(out=str(folder / "kept"), **told)
    spec = store.spec(options.site, "patch")
    tokens = store.n_items * spec.tokens
    inputs: list[torch.Tensor] = []

    def decode() -> None:
        inputs.clear()
        for first in range(0, count, options.batch_size):
            some = range(first, min(first + options.batch_size, count))
            inputs.append(torch.stack([model.transform(source.image(i)) for i in some]))

    def forward() -> None:
        with torch.inference_mode():
            for x in inputs:
                model.run(x, sites=[options.site], stop_early=True)

    epochs = -(-options.read_tokens // tokens)

    def read() -> None:
        for _ in TokenLoader(store, options.site, BATCH, tokens="patch", epochs=epochs):
            pass

    step = ours(
        options.expansion * spec.channels, TopK(32), reads={options.site: spec.channels}, lr=1e-4
    )
    loader = iter(TokenLoader(store, options.site, BATCH, tokens="patch", normalize="rms"))

    def train() -> None:
        for _ in range(options.steps):
            batch = next(loader).acts
            step(torch.cat([batch] * -(-BATCH // len(batch)))[:BATCH])

    rounds = []
    decode()
    forward()
    train()
    for number in range(options.rounds):

        def harvest(out: str = str(folder / f"again-{number}")) -> None:
            actstore.harvest(out=out, **told)

        rounds.append(
            {
                "decode": timed(tokens, decode),
                "forward": timed(tokens, forward),
                "harvest": timed(tokens, harvest),
                "read": timed(tokens * epochs, read),
                "step": timed(options.steps * BATCH, train),
            }
        )
    return rounds, tokens


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, and compute where caching begins to win."""
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        rounds, tokens = costs(options, Path(folder))
    columns: dict[str, dict[str, Any]] = {}
    for i, by in enumerate(("clock", "processors")):
        d, f, h, r, t = (statistics.median(turn[name][i] for turn in rounds) for name in COSTS)
        column: dict[str, Any] = {
            f"{name}, us a token": 1e6 * value
            for name, value in zip(COSTS, (d, f, h, r, t), strict=True)
        }
        column["n*"] = even(h, d + f, r)
        column["n*, images decoded before"] = even(h - d, f, r)
        for n in PASSES:
            name = f"on the fly / cached, {n} passes"
            column[name] = n * (d + f + t) / (h + n * (r + t))
        columns[by] = column
    return {
        "rows": [
            {"figure": name, **{by: column[name] for by, column in columns.items()}}
            for name in columns["clock"]
        ],
        "rounds": rounds,
        "tokens of a pass": tokens,
        "options": {k: str(v) for k, v in vars(options).items()},
        "machine": {**measure.machine(), "load": os.getloadavg()},
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="folder of images, or any data set")
    parser.add_argument("--weights", help="local weights; random ones without")
    parser.add_argument("--model", default="timm/vit_small_patch14_dinov2")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--site", default="blocks.7.resid_post")
    parser.add_argument("--limit", type=int, default=96, help="images")
    parser.add_argument("--batch-size", type=int, default=16, help="images of a forward pass")
    parser.add_argument("--expansion", type=int, default=8, help="latents over channels")
    parser.add_argument("--steps", type=int, default=6, help="training steps of a round")
    parser.add_argument("--read-tokens", type=int, default=400_000, help="tokens read in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder for the stores")
    parser.add_argument("--out", type=Path, help="where the figures go as JSON")
    options = parser.parse_args()
    result = run(options)
    result["command"] = " ".join(["python -m benchmarks.break_even", *sys.argv[1:]])
    measure.report(result, options.out)


if __name__ == "__main__":
    main()
