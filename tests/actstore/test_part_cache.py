"""Shards of a remote store in a local folder: exact, bounded, shared, safe from what is wrong."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import actstore
from actstore.part_cache import PartCache, Wanted, cached
from actstore.reader import batches
from actstore.storage import LocalStorage
from actstore.store import Store, read_manifest

SITE = "a.b"
PARTS, ITEMS = 6, 8


class Far:
    """A storage that is no folder, counts what is read in bulk, and may be slow."""

    def __init__(self, root, delay=0.0):
        self._near = LocalStorage(root)
        self.url = f"far://{root}"
        self.ranges = 0
        self.delay = delay

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._near, name)

    def read_range(self, path, offset, length):
        self.ranges += 1
        time.sleep(self.delay)
        return self._near.read_range(path, offset, length)


def mount(root, folder=None, limit=None, delay=0.0):
    far = Far(root, delay)
    return cached(Store(far, read_manifest(far)), folder, limit), far


def epoch(store, seed=0):
    found = list(batches(store, SITE, 16, tokens="patch", seed=seed))
    return [np.concatenate([getattr(b, f) for b in found]) for f in ("acts", "item", "token")]


def same(a, b):
    return all((x == y).all() for x, y in zip(a, b, strict=True))


def shards(folder):
    return [p for p in folder.rglob(f"{SITE}.*")]


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "nothing more was cached"
        time.sleep(0.005)


@pytest.fixture
def root(tmp_path):
    return make(tmp_path / "store", 0)


def make(path, seed):
    values = np.random.default_rng(seed).normal(size=(PARTS * ITEMS, 4, 32)).astype(np.float16)
    actstore.write_arrays(path, {SITE: {"patch": values}}, items_per_part=ITEMS)
    return path


@pytest.fixture
def shard_bytes(root):
    return (
        Store(LocalStorage(root), read_manifest(LocalStorage(root)))
        .commit(0)
        .objects[f"acts/{SITE}/patch/c.0.0.0"]["bytes"]
    )


def test_later_epochs_are_local_and_the_same(root, tmp_path):
    folder = tmp_path / "cache"
    plain, _ = mount(root)
    expected = [epoch(plain, seed) for seed in (0, 1)]
    store, _ = mount(root, folder)
    assert same(epoch(store, 0), expected[0])
    wait_for(lambda: len(shards(folder)) == PARTS)
    assert list((folder / "partial").iterdir()) == []
    again, far = mount(root, folder)
    assert same(epoch(again, 1), expected[1])
    assert far.ranges == 0
    assert same([again.items([3, 40], SITE, "patch")], [plain.items([3, 40], SITE, "patch")])
    assert far.ranges == 0


def test_the_bound_holds_and_what_is_cached_of_a_store_stays(root, tmp_path, shard_bytes):
    folder = tmp_path / "cache"
    limit = 3 * shard_bytes + 10
    expected = epoch(mount(root)[0])
    for _ in range(3):
        store, _ = mount(root, folder, limit)
        assert same(epoch(store), expected)
        wait_for(lambda: len(shards(folder)) == 3)
        kept = sorted(shards(folder))
    store, far = mount(root, folder, limit)
    assert same(epoch(store), expected)
    assert sorted(shards(folder)) == kept
    assert far.ranges > 0, "the other parts come from afar"
    assert sum(p.stat().st_size for p in shards(folder)) <= limit


def test_another_store_displaces_the_least_recently_used(root, tmp_path, shard_bytes):
    folder = tmp_path / "cache"
    cache = PartCache(folder, 4 * shard_bytes)
    store, far = mount(root)

    def wanted(part):
        path = f"acts/{SITE}/patch/c.{part}.0.0"
        entry = store.commit(part).objects[path]
        return Wanted(path=path, size=entry["bytes"], crc=entry["crc32c"])

    for part in range(4):
        os.utime(cache.fetch("one", wanted(part), far), (part + 1, part + 1))
    assert cache.fetch("one", wanted(4), far) is None, "a store does not displace itself"
    assert cache.find("one", wanted(0)) is not None, "and use is noted"
    cache.fetch("two", wanted(4), far)
    assert [cache.find("one", wanted(part)) is not None for part in range(4)] == [1, 0, 1, 1]


def test_wrong_content_is_found_and_fetched_again(root, tmp_path, caplog):
    folder = tmp_path / "cache"
    expected = epoch(mount(root)[0])
    epoch(mount(root, folder)[0])
    wait_for(lambda: len(shards(folder)) == PARTS)
    flipped, short, *_ = sorted(shards(folder))
    data = bytearray(flipped.read_bytes())
    data[5] ^= 1
    flipped.write_bytes(data)
    short.write_bytes(short.read_bytes()[:-1])
    store, far = mount(root, folder)
    assert same(epoch(store), expected)
    assert far.ranges > 0
    assert f"{flipped.name} is not what its name says and is fetched again" in caplog.text
    wait_for(lambda: len(shards(folder)) == PARTS)
    again, far = mount(root, folder)
    assert same(epoch(again), expected)
    assert far.ranges == 0


def test_a_damaged_object_is_not_cached(root, tmp_path, caplog):
    path = root / f"acts/{SITE}/patch/c.2.0.0"
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    folder = tmp_path / "cache"
    epoch(mount(root, folder)[0])
    wait_for(lambda: len(shards(folder)) == PARTS - 1 and "is not cached" in caplog.text)
    assert "its checksum is not that of the commit record" in caplog.text
    assert list((folder / "partial").iterdir()) == []


def test_a_shard_that_another_process_drops_is_read_from_afar(root, tmp_path):
    folder = tmp_path / "cache"
    expected = epoch(mount(root)[0])
    epoch(mount(root, folder)[0])
    wait_for(lambda: len(shards(folder)) == PARTS)
    store, far = mount(root, folder)
    for part in range(PARTS):
        assert store.storage.local(f"acts/{SITE}/patch/c.{part}.0.0", part, fetch=True)
    for path in shards(folder):
        path.unlink()
    assert same(epoch(store), expected)
    assert far.ranges > 0


PROCESS = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_part_cache import epoch, mount, shards, wait_for
folder = Path(sys.argv[3])
store, far = mount(sys.argv[2], folder, int(sys.argv[4]), float(sys.argv[5]))
found = epoch(store)
wait_for(lambda: len(shards(folder)) == int(sys.argv[6]))
print(float(found[0].astype("f8").sum()))
"""


def start(root, folder, limit, delay, count):
    here = os.path.dirname(__file__)
    words = [here, root, folder, limit, delay, count]
    command = [sys.executable, "-c", PROCESS, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_share_a_bound_and_one_killed_leaves_nothing(root, tmp_path, shard_bytes):
    folder = tmp_path / "cache"
    total = float(epoch(mount(root)[0])[0].astype("f8").sum())
    killed = start(root, folder, 10**9, 0.5, 99)
    wait_for(lambda: (folder / "partial").is_dir() and list((folder / "partial").iterdir()))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    assert len(list((folder / "partial").iterdir())) > 0, "it was killed in the middle"
    limit = 4 * shard_bytes + 10
    both = [start(root, folder, limit, 0.0, 4) for _ in range(2)]
    assert [float(p.communicate()[0]) for p in both] == pytest.approx([total, total])
    assert list((folder / "partial").iterdir()) == []
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
    assert sum(sizes) <= limit
    assert len(shards(folder)) == 4


def test_messages(root, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cache_dir .*file cannot be used: .*local disk"):
        mount(root, tmp_path / "file")
    with pytest.raises(ValueError, match=r"cache_bytes must be positive, not 0"):
        mount(root, tmp_path / "cache", 0)
    with pytest.raises(ValueError, match=r"cache_dir does not say where"):
        mount(root, None, 10)
    local = actstore.open(root, cache_dir=tmp_path / "unused")
    assert isinstance(local.storage, LocalStorage)
    assert not (tmp_path / "unused").exists()
