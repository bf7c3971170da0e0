"""Time of a harvest over the time of the bare forward loop on the same batches.

    python benchmarks/harvest.py --weights vit_small_patch14_dinov2.safetensors --data photos/

The bare loop runs the model up to the last site that is stored, on inputs that are decoded
already, and keeps nothing. A harvest decodes, computes, stores and commits. Both run in turns;
ratios are of one turn. A harvest over the time that it spends in forward passes itself (on a CPU)
is free of the noise between turns, and of what decoding beside it costs the model. Then the
stop-early ratio: storing block 3 of 12 over a full forward.
"""

import dataclasses
import json
import shutil
import sys
import tempfile
import time
from statistics import median
from typing import Any

import torch
import tyro

import actstore
import vitmodels
from actstore.execute import source_positions
from actstore.sources import open_source


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    data: str
    """Folder of images, or any data set."""
    weights: str | None = None
    """Local weights; random ones without."""
    model: str = "timm/vit_small_patch14_dinov2"
    """Model."""
    img_size: int = 224
    """Side of the input in pixels."""
    sites: str = "blocks.{5,7,9}.resid_post"
    """Sites that are stored."""
    limit: int = 160
    """Images."""
    batch_size: int = 16
    """Images of a batch."""
    rounds: int = 3
    """Turns."""
    device: str = "cpu"
    """Device."""


def bare(model: Any, batches: list[torch.Tensor], sites: list[str] | None) -> float:
    """Return the seconds of the forward passes alone; None runs the whole model."""
    start = time.perf_counter()
    with torch.inference_mode():
        for x in batches:
            if sites is None:
                model.module(x.to(model.device))
            else:
                model.run(x.to(model.device), sites=sites, stop_early=True)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - start


class InModel:
    """Adds up the seconds that a harvest spends in forward passes."""

    def __init__(self, model: Any) -> None:
        self._run, self.seconds = model.run, 0.0

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Run the model."""
        start = time.perf_counter()
        try:
            return self._run(*args, **options)
        finally:
            self.seconds += time.perf_counter() - start


def main(config: Config) -> int:
    """Run the benchmark and print JSON and a table."""
    random = config.weights is None
    model = vitmodels.load(
        config.model,
        weights=config.weights,
        pretrained=not random,
        img_size=config.img_size,
        device=config.device,
    )
    source = open_source(config.data)
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        options = {"model": model, "data": config.data, "limit": config.limit}
        options |= {"batch_size": config.batch_size, "sites": config.sites}
        store = actstore.harvest(out=f"{folder}/warm", **options)
        batches = []
        for part in range(store.manifest.n_parts):
            positions = source_positions(store.manifest, part).tolist()
            for first in range(0, len(positions), config.batch_size):
                some = positions[first : first + config.batch_size]
                batches.append(torch.stack([model.transform(source.image(i)) for i in some]))
        sites = list(store.sites)
        early = ["blocks.2.resid_post"]
        for _ in range(config.rounds):
            used = time.process_time()
            row = {"bare": bare(model, batches, sites)}
            row["bare_cpu"] = time.process_time() - used
            start, used = time.perf_counter(), time.process_time()
            model.run = inside = InModel(model)
            actstore.harvest(out=f"{folder}/out", **options)
            row["harvest"] = time.perf_counter() - start
            row["harvest_cpu"] = time.process_time() - used
            row["in_model"] = inside.seconds
            del model.run
            row["bare_again"] = bare(model, batches, sites)
            row["full"] = bare(model, batches, None)
            row["early"] = bare(model, batches, early)
            shutil.rmtree(f"{folder}/out")
            rows.append(row)
            print({name: round(seconds, 2) for name, seconds in row.items()})
        result = {
            "images": config.limit,
            "batches": len(batches),
            "harvest_over_bare": median(
                2 * r["harvest"] / (r["bare"] + r["bare_again"]) for r in rows
            ),
            "harvest_over_its_own_forward": median(r["harvest"] / r["in_model"] for r in rows),
            # On a shared machine the processor time says more than the clock.
            "harvest_over_bare_cpu": median(r["harvest_cpu"] / r["bare_cpu"] for r in rows),
            "block_3_over_full": median(r["early"] / r["full"] for r in rows),
            "bare_images_per_second": config.limit / median(r["bare"] for r in rows),
        }
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
