r"""Compare the disk and the memory that a harvest takes with its plan.

    python benchmarks/plan.py --data digits --model toy/digits-4l
    python benchmarks/plan.py --data cifar10/train.parquet --limit 5000 \
        --model timm/vit_small_patch14_dinov2 --weights weights.safetensors --img-size 98

Prints JSON: planned and found bytes of every object under ``acts/``, projected and measured peak
resident memory, and seconds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


def child(args: argparse.Namespace, out: str) -> dict[str, object]:
    """Harvest in this process and compare with the plan."""
    import resource
    import time

    import actstore
    import vitmodels
    from actstore.layout import shard_bytes, shard_path

    model = vitmodels.load(args.model, weights=args.weights, img_size=args.img_size)
    plans = []
    start = time.perf_counter()
    store = actstore.harvest(
        model=model,
        data=args.data,
        sites=args.sites,
        tokens=args.tokens,
        limit=args.limit,
        out=out,
        on_event=lambda event: plans.append(event.plan) if event.kind == "plan" else None,
    )
    seconds = time.perf_counter() - start
    manifest, root = store.manifest, Path(out)
    planned = {
        shard_path(array, part): shard_bytes(manifest, array)
        for array in manifest.arrays
        for part in range(manifest.n_parts)
    }
    shards = (p for p in (root / "acts").rglob("*") if p.is_file() and p.name != "zarr.json")
    found = {str(p.relative_to(root)): p.stat().st_size for p in shards}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "items": store.n_items,
        "objects": len(found),
        "bytes_planned": plans[0].disk,
        "bytes_found": sum(found.values()),
        "every_object_as_planned": planned == found,
        "memory_projected": plans[0].memory,
        "memory_peak": peak,
        "peak_over_projected": round(peak / plans[0].memory, 3),
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Parse, run the child with an output folder of its own, print its JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="toy/digits-4l")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--sites", default="blocks.*.resid_post")
    parser.add_argument("--tokens", default="cls,patch")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--weights")
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args, args.child), indent=2))
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--child", f"{folder}/acts.zarr"]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
