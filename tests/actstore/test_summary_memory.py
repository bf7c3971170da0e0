"""The memory that `actstore stats` takes is what the document says."""

import subprocess
import sys

import numpy as np
import pytest

import actstore

pytest.importorskip("dask")
SITE = "a.b"
SHAPE = (64, 196, 768)

MEASURE = """
import sys
import dask
import actstore
from actstore.summary import summarise
from benchmarks.measure import peak_rss
store = actstore.open(sys.argv[1])
with dask.config.set(scheduler="threads", num_workers=2):
    store.dask("a.b", "cls").mean().compute()
    peak_rss(reset=True)
    before = peak_rss()
    summarise(store, ["a.b"])
print(peak_rss() - before)
"""


def test_about_three_chunks_a_thread_at_most(tmp_path):
    parts = 4
    rng = np.random.default_rng(0)
    values = rng.integers(0, 15_000, (parts * SHAPE[0], *SHAPE[1:]), dtype=np.uint16)
    values = values.view(np.float16)
    site = {SITE: {"cls": values[:, :1], "patch": values}}
    actstore.write_arrays(tmp_path / "a", site, items_per_part=SHAPE[0])
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    chunk = 4 * int(np.prod(SHAPE))
    taken = int(done.stdout) / chunk / 2
    assert 1 <= taken <= 3.2, f"{taken:.2f} chunks a thread"
