"""Time and memory of plan, open, first batch and resume, up to a thousand million items.

    python -m benchmarks.scaling [--items 100000 10000000 1000000000] [--json result.json]

The stores hold no data: records are made up when they are asked for, and every shard is one
sparse file of the right size. Each size runs in a process of its own, whose peak memory is
taken. "open" reads the segment records, one for 1,024 parts; "records" is what opening takes
without them, from the record of every part, up to `RECORDS` parts. Segments are real files, so
that "open" holds the medium; the records of parts are made up and hold no time of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from actstore import layout, segments
from actstore.commit import Commit, record_path
from actstore.manifest import ArraySpec, Manifest
from actstore.plan import choose_layout, disk_bytes
from actstore.reader import batches
from actstore.storage import LocalStorage
from actstore.store import Store
from benchmarks import measure

SITE = "blocks.7.resid_post"

RECORDS = 100_000
"""Parts up to which opening from single records is measured."""


class Phantom(LocalStorage):
    """A complete store whose records are made up and whose shards are sparse files."""

    def __init__(self, root: Path, manifest: Manifest, *, sealed: bool) -> None:
        super().__init__(root)
        self._manifest = manifest
        self._sealed = sealed
        self._fingerprint = manifest.fingerprint
        self._shards: dict[str, str] = {}
        for array in manifest.arrays:
            path = root / f"{array.kind}.bin"
            with open(path, "wb") as file:
                file.truncate(layout.shard_bytes(manifest, array))
            self._shards[array.kind] = str(path)

    def list(self, folder: str) -> Iterator[str]:
        """Yield the names of all commit records, or of the segments."""
        if folder == "segments":
            yield from super().list(folder) if self._sealed else ()
            return
        for part in range(self._manifest.n_parts):
            yield record_path(part).split("/")[1]

    def read(self, path: str, *, limit: int | None = None) -> bytes:
        """Return a commit record, or a segment."""
        if path.startswith("segments/"):
            return super().read(path, limit=limit)
        part = int(path.split("/")[1].split(".")[0])
        objects = {
            layout.shard_path(a, part): {"bytes": 1 << 20, "crc32c": 1}
            for a in self._manifest.arrays
        }
        items = self._manifest.planned(part)
        record = Commit(part=part, items=items, fingerprint=self._fingerprint, objects=objects)
        return record.encode()

    def uri(self, path: str) -> str:
        """Return the sparse file of a shard's kind."""
        return self._shards[path.split("/")[2]]


def write_segments(root: Path, manifest: Manifest) -> None:
    """Write the segments of a complete store, with made-up sums of the records."""
    (root / "segments").mkdir()
    for number in range(-(-manifest.n_parts // segments.SPAN)):
        span = segments.span_of(manifest, number)
        value = {
            "segment": number,
            "fingerprint": manifest.fingerprint,
            "items": [manifest.planned(part) for part in span],
            "records": [4_000_000_000 - part for part in span],
        }
        (root / segments.segment_path(number)).write_text(json.dumps(value))


def one(items: int, remote: bool) -> dict[str, object]:
    """Measure one size in this process."""
    rng = np.random.default_rng(0)
    begin = time.perf_counter()
    arrays = [
        ArraySpec(site=SITE, kind="cls", tokens=1, channels=768),
        ArraySpec(site=SITE, kind="patch", tokens=196, channels=768, first=1),
    ]
    size, arrays = choose_layout(
        arrays, items=items, dtype="float16", budget=1 << 30, remote=remote
    )
    manifest = Manifest(items=items, items_per_part=size, arrays=tuple(arrays))
    disk = disk_bytes(manifest)
    planned = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        write_segments(Path(folder), manifest)
        sealed = Phantom(Path(folder), manifest, sealed=True)
        filled = measure.peak_rss()
        begin = time.perf_counter()
        store = Store(sealed, manifest)
        opened = time.perf_counter() - begin
        opened_rss = measure.peak_rss()
        begin = time.perf_counter()
        iterator = batches(store, SITE, 4096, tokens="patch")
        next(iterator)
        first = time.perf_counter() - begin
        iterator.close()  # type: ignore[attr-defined]
        total = items * 196 // 4096
        begin = time.perf_counter()
        iterator = batches(store, SITE, 4096, tokens="patch", start=int(rng.integers(total)))
        next(iterator)
        resumed = time.perf_counter() - begin
        iterator.close()  # type: ignore[attr-defined]
        read_rss = measure.peak_rss()
        singly: float | str = ""
        if manifest.n_parts <= RECORDS:
            begin = time.perf_counter()
            Store(Phantom(Path(folder), manifest, sealed=False), manifest)
            singly = time.perf_counter() - begin
    return {
        "items": f"{items:.0e}",
        "parts": manifest.n_parts,
        "bytes": f"{disk:.2e}",
        "plan ms": planned * 1e3,
        "open s": opened,
        "open MB": (opened_rss - filled) / 1e6,
        "records s": singly,
        "first batch s": first,
        "resume s": resumed,
        "reading MB": (read_rss - opened_rss) / 1e6,
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--items", type=int, nargs="+", default=[10**5, 10**7, 10**9])
    parser.add_argument("--remote", action="store_true", help="stripes as for an object store")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.remote)))
        return
    rows = []
    for items in options.items:
        command = [sys.executable, "-m", "benchmarks.scaling", "--one", str(items)]
        command += ["--remote"] * options.remote
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout))
    measure.report({"rows": rows, "machine": measure.machine()}, options.json)


if __name__ == "__main__":
    main()
