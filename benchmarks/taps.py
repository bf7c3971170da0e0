"""Cost of reading sites over the bare forward pass, ViT-S/14 at 224 pixels.

    python benchmarks/taps.py --peer other-venv/bin/python

CPU seconds of one round are compared with each other: the bare module first, then the same batch
with one residual site at the last block, all residual sites, all patterns, all z, and stopping
after block 3. With `peer`, an interpreter that has ViT-Prisma and TransformerLens, their models of
equal shape run in the same rounds; their ratios are to their own forward pass, and to ours.
"""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from measure import interleaved, machine, ratio, report

import vitmodels

READS = {
    "one residual site, last block": ("blocks.11.resid_post", False),
    "all residual sites": ("blocks.*.resid_*", False),
    "all patterns": ("blocks.*.pattern", False),
    "all z": ("blocks.*.z", False),
    "stop after block 3": ("blocks.3.resid_post", True),
}
PEERS = {"prisma": "Prisma", "transformerlens": "TransformerLens"}
PEER_READS = {
    "bare": "bare",
    "one residual site": "one",
    "all residual sites": "residual",
    "all patterns": "pattern",
    "everything": "all",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the benchmark."""

    batch: int = 8
    """Images a pass."""
    rounds: int = 9
    """Rounds; the median of the ratios is reported."""
    threads: int = 1
    """Threads of torch."""
    peer: Path | None = None
    """Python interpreter that has ViT-Prisma and TransformerLens, None for none."""
    out: Path | None = None
    """JSON file."""


def main(config: Config) -> None:
    """Run and report."""
    torch.set_num_threads(config.threads)
    model = vitmodels.load("timm/vit_small_patch14_dinov2", pretrained=False, img_size=224)
    x = torch.randn(config.batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    def timed(call: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            begin = time.process_time()
            with torch.inference_mode():
                call()
            return time.process_time() - begin

        return run

    def read(sites: str, stop: bool) -> Callable[[], object]:
        return lambda: model.run(x, sites, stop_early=stop)

    runs = {"bare": timed(lambda: model.module(x))}
    runs |= {name: timed(read(*told)) for name, told in READS.items()}
    talks: dict[str, Talk] = {}
    for key, label in PEERS.items() if config.peer is not None else ():
        talks[label] = talk = Talk([str(config.peer), key, str(config.batch), str(config.threads)])
        runs |= {f"{label}: {name}": _asks(talk, kind) for name, kind in PEER_READS.items()}
    interleaved(runs, 1)
    results = interleaved(runs, config.rounds)
    for talk in talks.values():
        talk.close()
    rows = []
    for name, times in results.items():
        owner = name.split(":")[0]
        own = f"{owner}: bare" if owner in talks else "bare"
        row = {
            "run": name,
            "seconds": min(times),
            "over its own forward": ratio(results, name, own),
            "over the bare timm module": ratio(results, name, "bare"),
        }
        rows.append(row)
    report({"rows": rows, "config": str(config), **machine()}, config.out)


def _asks(talk: "Talk", kind: str) -> Callable[[], float]:
    return lambda: talk(kind)


class Talk:
    """A peer in its own interpreter: asked for one run, it answers with the seconds."""

    def __init__(self, command: list[str]) -> None:
        python, *arguments = command
        self.process = subprocess.Popen(
            [python, str(Path(__file__).with_name("taps_peer.py")), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._until("ready")

    def __call__(self, kind: str) -> float:
        """Run once."""
        if self.process.stdin is None:
            raise ValueError("the peer has no standard input")
        self.process.stdin.write(kind + "\n")
        self.process.stdin.flush()
        return float(self._until("seconds").split()[1])

    def close(self) -> None:
        """End the peer."""
        self.process.terminate()
        self.process.wait()

    def _until(self, word: str) -> str:
        for line in self.process.stdout or ():
            if line.startswith(word):
                return line
        raise ValueError("the peer ended: does its environment have what it needs?")


if __name__ == "__main__":
    main(tyro.cli(Config, args=sys.argv[1:]))
