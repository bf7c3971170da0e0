"""Cost of reading sites over the bare forward pass, ViT-S/14 at 224 pixels.

    python benchmarks/taps.py --peer other-venv/bin/python

CPU seconds of one round are compared with each other: the bare module first, then the same batch
with one residual site at the last block, all residual sites, all patterns, all z, and stopping
after block 3. With `peer`, an interpreter that has ViT-Prisma, its model of equal shape runs in
the same rounds; its ratios are to its own forward pass, and to ours.
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
PEER = {
    "Prisma: one residual site": "one",
    "Prisma: all residual sites": "residual",
    "Prisma: all patterns": "pattern",
    "Prisma: everything": "all",
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
    """Python interpreter that has ViT-Prisma, None for none."""
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
    peer = None
    if config.peer is not None:
        command = [str(config.peer), str(Path(__file__).with_name("taps_peer.py"))]
        peer = subprocess.Popen(
            [*command, str(config.batch), str(config.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        talk = Talk(peer)
        runs["Prisma: bare"] = lambda: talk("bare")
        runs |= {name: (lambda k=kind: talk(k)) for name, kind in PEER.items()}
    interleaved(runs, 1)
    results = interleaved(runs, config.rounds)
    if peer is not None:
        peer.terminate()
        peer.wait()
    rows = []
    for name, times in results.items():
        own = "Prisma: bare" if name.startswith("Prisma") else "bare"
        row = {
            "run": name,
            "seconds": min(times),
            "over its own forward": ratio(results, name, own),
            "over the bare timm module": ratio(results, name, "bare"),
        }
        rows.append(row)
    report({"rows": rows, "config": str(config), **machine()}, config.out)


class Talk:
    """Asks the peer for one run and reads the seconds."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self._until("ready")

    def __call__(self, kind: str) -> float:
        """Run once."""
        if self.process.stdin is None:
            raise ValueError("the peer has no standard input")
        self.process.stdin.write(kind + "\n")
        self.process.stdin.flush()
        return float(self._until("seconds").split()[1])

    def _until(self, word: str) -> str:
        for line in self.process.stdout or ():
            if line.startswith(word):
                return line
        raise ValueError("the peer ended: does its environment have vit_prisma?")


if __name__ == "__main__":
    main(tyro.cli(Config, args=sys.argv[1:]))
