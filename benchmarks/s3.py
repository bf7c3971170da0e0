"""What the benchmarks of S3 share: a server, obstore without the store, seconds of CPU.

On a shared machine time by the clock says little. Client and server both run here, so their CPU
seconds together are what a transfer costs, whoever else is busy: ratios of those stand beside
the ratios by the clock.
"""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import obstore
from obstore.store import S3Store

from actstore.remote import obstore_config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "actstore"))


@contextlib.contextmanager
def server(endpoint_url: str | None, folder: str | None) -> Iterator[dict[str, str]]:
    """Give the storage options of a server, started on loopback when none is named."""
    if endpoint_url:
        yield {"endpoint_url": endpoint_url}
        return
    from s3_server import s3_server

    with (
        tempfile.TemporaryDirectory(dir=folder) as place,
        s3_server(Path(place)) as options,
    ):
        yield options


def plain_store(bucket: str, prefix: str, options: dict[str, str]) -> S3Store:
    """Return obstore's own store with its defaults."""
    config: Any = obstore_config(options)
    client: Any = {"allow_http": True, "timeout": "120s"}
    return S3Store(bucket, prefix=prefix, config=config, client_options=client)


def remove(store: S3Store) -> None:
    """Delete every object of a store."""
    for found in obstore.list(store):
        obstore.delete(store, [entry["path"] for entry in found])


class Cost(NamedTuple):
    """What a run took."""

    seconds: float
    """By the clock."""
    client: float
    """CPU seconds of this process."""
    server: float
    """CPU seconds of the server, 0 where it runs elsewhere."""

    @property
    def cpu(self) -> float:
        """CPU seconds of both."""
        return self.client + self.server


def timed(run: Callable[[], Any]) -> Cost:
    """Run and return what it took."""
    server, client, start = _children_cpu(), time.process_time(), time.perf_counter()
    run()
    seconds, used = time.perf_counter() - start, time.process_time() - client
    return Cost(seconds, used, _children_cpu() - server)


def _children_cpu() -> float:
    """Return the CPU seconds of the processes this one started and that still run."""
    total = 0
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):  # a thread that ended meanwhile
            for child in file.read_text().split():
                fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
                total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")
