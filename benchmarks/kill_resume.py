"""Kill a harvest with SIGKILL at random instants, resume it each time, compare every byte.

    python benchmarks/kill_resume.py --kills 20

The finished store must be byte-identical, below acts/, parts/, index/ and stats/, to one that
was never interrupted; and whatever was committed at the time of a kill must verify.
"""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro

import actstore
from actstore.verify import verify


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    kills: int = 20
    """Harvests that are killed."""
    limit: int = 2000
    """Digits harvested."""
    model: str = "toy/digits-4l"
    """Model."""
    seed: int = 0
    """Of the instants."""


def command(config: Config, out: str) -> list[str]:
    """Return the command of the harvest."""
    options = {
        "--model": config.model,
        "--data": "digits",
        "--sites": "blocks.*.resid_post",
        "--limit": str(config.limit),
        "--device": "cpu",
        "--out": out,
    }
    words = [word for pair in options.items() for word in pair]
    return [sys.executable, "-m", "actstore.cli", "harvest", *words]


def digests(root: str) -> dict[str, str]:
    """Return the sha256 of every object of a store."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("acts", "parts", "index", "stats")
        for path in sorted((Path(root) / folder).rglob("*"))
        if path.is_file()
    }


def main(config: Config) -> int:
    """Run the benchmark; 0 when every byte is the same."""
    generator = np.random.default_rng(config.seed)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory() as folder:
        whole, out = f"{folder}/whole", f"{folder}/killed"
        start = time.perf_counter()
        process = subprocess.Popen(command(config, whole), **quiet)
        while process.poll() is None and not os.path.exists(f"{whole}/zarr.json"):
            time.sleep(0.01)
        loading = time.perf_counter() - start
        if process.wait():
            raise RuntimeError("the uninterrupted harvest failed")
        working = time.perf_counter() - start - loading
        parts = actstore.open(whole).manifest.n_parts
        kills, records = 0, []
        while kills < config.kills:
            process = subprocess.Popen(command(config, out), **quiet)
            # Up to a third of the work is done in a run: instants before, in and between parts.
            time.sleep(generator.uniform(0.95 * loading, loading + working / 3))
            if process.poll() is not None:
                for path in Path(out, "parts").glob("*.json"):
                    path.unlink()  # all was done before the last kill: commit the parts again
                continue
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            if not os.path.exists(f"{out}/zarr.json"):
                continue
            store = actstore.open(out)
            problems = verify(store)
            records.append({"missing": len(store.missing_parts), "problems": len(problems)})
            print(f"kill {kills}: {parts - len(store.missing_parts)}/{parts} parts, {problems}")
        subprocess.run(command(config, out), check=True, **quiet)
        same = digests(out) == digests(whole)
        sound = not any(record["problems"] for record in records)
        result = {"kills": kills, "parts": parts, "objects": len(digests(whole)), "identical": same}
        print(json.dumps({**result, "sound_after_every_kill": sound}))
    return 0 if same and sound else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
