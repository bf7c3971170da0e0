import errno
import os
import random
import socket

import pytest
from fake_model import FakeModel, harvest_digits, objects

import actstore
from actstore.cli import main
from actstore.repair import collect, garbage, repair
from actstore.report_upkeep import parse_parts
from actstore.sources import open_source
from actstore.storage import LocalStorage
from actstore.verify import verify

SITE = "blocks.1.resid_post"


@pytest.fixture
def store(tmp_path):
    harvest_digits(str(tmp_path / "a"), limit=100)
    return actstore.open(tmp_path / "a")


def test_repaired_parts_have_their_old_bytes(store):
    before = objects(store.url, ".")
    with open(store.shard(SITE, "patch", 3).uri, "r+b") as file:
        file.write(b"damage")
    os.unlink(store.shard(SITE, "cls", 5).uri)
    os.truncate(store.storage.uri("index/part-00007.parquet"), 10)
    parts = sorted({problem.part for problem in verify(store)})
    assert parts == [3, 5, 7]
    again = repair(store, FakeModel(), open_source("digits"), parts)
    assert again.is_complete
    assert verify(again) == []
    assert objects(store.url, ".") == before


def test_a_damaged_record_is_repaired(store):
    before = objects(store.url, ".")
    with open(store.storage.uri("parts/00004.json"), "w") as file:
        file.write("nonsense")
    with pytest.raises(actstore.FormatError):
        actstore.open(store.url)
    opened = actstore.open(store.url, without=[4])
    assert opened.missing_parts == (4,)
    repair(opened, FakeModel(), open_source("digits"), [4])
    assert objects(store.url, ".") == before


def test_repair_needs_the_same_model_and_parts_of_the_plan(store):
    before = objects(store.url, ".")
    with pytest.raises(ValueError, match=r"(?s)weights: 'seed:0' -> 'seed:4'"):
        repair(store, FakeModel(seed=4), open_source("digits"), [1])
    with pytest.raises(ValueError, match=r"has parts 0 to \d+, not 99"):
        repair(store, FakeModel(), open_source("digits"), [1, 99])
    assert objects(store.url, ".") == before


def test_gc_removes_leftovers_and_only_those(store):
    before = objects(store.url, ".")
    storage = store.storage
    dead = f"tmp/{socket.gethostname()}-{2**22 + 1}-7f00-3"
    live = f"tmp/{socket.gethostname()}-{os.getpid()}-7f00-3"
    elsewhere = "tmp/another-host-12-7f00-3"
    odd = "tmp/notes.txt"
    for path in (dead, live, elsewhere, odd):
        with open(storage.uri(path), "w") as file:
            file.write("half")
    assert garbage(storage, store.manifest) == [dead]
    assert collect(store) == [dead]
    storage.delete("parts/00002.json")
    left = garbage(storage, store.manifest)
    assert f"acts/{SITE}/cls/c.2.0.0" in left
    assert "parts/00002.safetensors" in left
    assert "index/part-00002.parquet" in left
    assert all("2" in path for path in left)
    assert collect(store) == left
    for path in (live, elsewhere, odd):
        storage.delete(path)
    harvest_digits(store.url, limit=100)
    assert objects(store.url, ".") == before


def test_commands(tmp_path, capsys):
    out = str(tmp_path / "a")
    words = ["--model", "toy/digits-1l", "--random-weights", "--data", "digits", "--device", "cpu"]
    assert main(["harvest", *words, "--sites", "logits", "--limit", "20", "--out", out]) == 0
    before = objects(out, "acts")
    path = tmp_path / "a/acts/logits/item/c.3.0.0"
    path.write_bytes(b"x" * len(path.read_bytes()))
    capsys.readouterr()
    assert main(["verify", out]) == 1
    assert f"actstore repair {out} --parts 3" in capsys.readouterr().out
    assert main(["repair", out, "--random-weights"]) == 0
    assert "harvested 1 parts again" in capsys.readouterr().out
    assert objects(out, "acts") == before
    assert main(["repair", out, "--random-weights"]) == 0
    assert "nothing is damaged" in capsys.readouterr().out
    assert main(["gc", out, "--dry-run"]) == 0
    assert "0 leftovers found" in capsys.readouterr().out
    assert main(["repair", out, "--parts", "x"]) == 1
    assert "--parts takes numbers like 3,17" in capsys.readouterr().err


def test_parse_parts():
    assert parse_parts("3, 1,3") == [1, 3]


class PowerLoss(LocalStorage):
    """A disk that loses what was not synced: it forgets all but durable objects.

    Every operation is counted; at `stop` the power goes. Data written and not fsynced, and names
    whose folder was not fsynced, are lost: here, everything of the operation under way.
    """

    def __init__(self, root, stop):
        super().__init__(root)
        self.left = stop

    def _tick(self):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.EIO, "power lost")

    def replace(self, path, pieces):
        self._tick()
        super().replace(path, pieces)

    def create(self, path, data):
        self._tick()
        return super().create(path, data)


def test_power_loss_at_any_operation_keeps_the_order(tmp_path, monkeypatch):
    """A record exists only when all its objects are durable, wherever the power goes."""
    import actstore.harvester as harvester

    harvest_digits(str(tmp_path / "whole"), limit=16)
    whole = objects(tmp_path / "whole", "acts")
    stops = sorted(random.Random(0).sample(range(8, 90), 4))
    for stop in stops:
        out = str(tmp_path / f"a{stop}")
        monkeypatch.setattr(
            harvester, "open_storage", lambda url, options=None, stop=stop: PowerLoss(url, stop)
        )
        with pytest.raises(OSError, match=r"power lost"):
            harvest_digits(out, limit=16)
        monkeypatch.undo()
        if os.path.exists(f"{out}/zarr.json"):
            assert verify(actstore.open(out)) == []
        harvest_digits(out, limit=16)
        assert objects(out, "acts") == whole


def test_every_byte_is_synced_before_its_name_and_the_record_is_last(tmp_path, monkeypatch):
    """The order of system calls: fsync of data, then rename or link, then fsync of the folder."""
    calls = []
    real = {name: getattr(os, name) for name in ("fsync", "rename", "link")}

    def watched(name):
        def call(*args):
            what = args
            if name == "fsync":
                what = (os.readlink(f"/proc/self/fd/{args[0]}"),)
            real[name](*args)
            calls.append((name, *[str(a) for a in what]))

        return call

    storage = LocalStorage(tmp_path / "a")
    storage.replace("x/first", [b"1"])
    for name in real:
        monkeypatch.setattr(os, name, watched(name))
    storage.replace("x/one", [b"1"])
    storage.create("x/two", b"2")
    root = str(tmp_path / "a")
    kinds = [call[0] for call in calls]
    assert kinds == ["fsync", "rename", "fsync", "fsync", "link", "fsync"]
    assert calls[0][1].startswith(f"{root}/tmp/")
    assert calls[0][1] == calls[1][1]
    assert calls[1][2] == f"{root}/x/one"
    assert calls[2][1] == f"{root}/x"
    assert calls[3][1] == calls[4][1]
    assert calls[4][2] == f"{root}/x/two"
    assert calls[5][1] == f"{root}/x"
