"""Segments open a store of many parts; the records of the parts stay the truth."""

import json
import logging

import numpy as np
import pytest
from fake_model import FakeModel, harvest_digits, objects
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import actstore
from actstore import segments
from actstore.commit import record_path
from actstore.convert import convert
from actstore.manifest import FormatError
from actstore.repair import collect, garbage, repair
from actstore.sources import open_source
from actstore.storage import LocalStorage
from actstore.store import Store
from actstore.verify import verify

SITE = "blocks.1.resid_post"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Segments of four parts: a store of 16 parts has four."""
    monkeypatch.setattr(segments, "SPAN", 4)


@pytest.fixture
def store(tmp_path):
    harvest_digits(str(tmp_path / "a"), limit=160)
    return actstore.open(tmp_path / "a")


def names(store):
    return sorted(store.storage.list("segments"))


class Counting(LocalStorage):
    """Counts what is read and listed."""

    def __init__(self, root):
        super().__init__(root)
        self.reads, self.lists = [], []

    def read(self, path, *, limit=None):
        self.reads.append(path)
        return super().read(path, limit=limit)

    def list(self, folder):
        self.lists.append(folder)
        return super().list(folder)


def test_a_complete_store_opens_without_its_records(store):
    assert store.manifest.n_parts == 16
    assert names(store) == [f"{i:05d}.json" for i in range(4)]
    storage = Counting(store.url)
    again = Store(storage, store.manifest)
    assert storage.reads == [segments.segment_path(i) for i in range(4)]
    assert storage.lists == ["segments"]
    assert again.is_complete
    for part in range(16):
        assert (
            again.part_items[part]
            == json.loads((again.storage._path(record_path(part))).read_text())["items"]
        )
        assert again.commit(part).part == part
    assert (
        again.items([0, 7, 150], SITE, "patch") == store.items([0, 7, 150], SITE, "patch")
    ).all()
    assert sum(len(b) for b in again.batches(SITE, 64)) == 160 * 26
    assert verify(again) == []
    assert again.index().equals(store.index())


def test_small_stores_have_none(tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "SPAN", 16)
    harvest_digits(str(tmp_path / "a"), limit=160)
    assert not (tmp_path / "a/segments").exists()


def test_a_harvest_seals_what_it_completes(tmp_path, monkeypatch):
    """Segments appear while the harvest runs; with ranks, by whoever comes last."""
    harvest_digits(str(tmp_path / "whole"), limit=160)
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        harvest_digits(str(tmp_path / "a"), limit=160)
        found = names(actstore.open(tmp_path / "a"))
        assert len(found) == (4 if rank == 2 else 0)
    assert objects(tmp_path / "a", ".") == objects(tmp_path / "whole", ".")


def test_ranges_are_sealed_before_the_end(tmp_path):
    class Stop(Exception):
        pass

    def stop(event):
        if event.kind == "part" and event.part == 9:
            raise Stop

    with pytest.raises(Stop):
        harvest_digits(str(tmp_path / "a"), limit=160, on_event=stop)
    store = actstore.open(tmp_path / "a")
    assert names(store) == ["00000.json", "00001.json"]
    (tmp_path / "a/segments/00001.json").unlink()

    def stop_at_once(event):
        if event.kind == "items":
            raise Stop

    with pytest.raises(Stop):
        harvest_digits(str(tmp_path / "a"), limit=160, on_event=stop_at_once)
    assert names(store) == ["00000.json", "00001.json"], "a resumed harvest seals first"


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A store of sixteen parts of one item."""
    values = {SITE: {"cls": np.arange(64, dtype=np.float32).reshape(16, 1, 4)}}
    folder = tmp_path_factory.mktemp("many") / "a"
    return actstore.write_arrays(folder, values, items_per_part=1)


@given(known=st.sets(st.integers(0, 15)), committed=st.sets(st.integers(0, 15)))
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_mixture_opens_to_the_same(many, known, committed):
    """Whatever parts are there and whichever ranges are sealed, opening says the same."""
    store, folder = many, many.url
    for name in list(names(store)):
        store.storage.delete(f"segments/{name}")
    records = {part: store.storage._path(record_path(part)) for part in range(16)}
    for part, path in records.items():
        if path.exists():
            path.rename(path.with_suffix(".kept"))
        if part in committed:
            path.with_suffix(".kept").rename(path)
    for number in {part // 4 for part in known}:
        whole = set(range(4 * number, 4 * number + 4)) <= committed
        assert segments.seal(store.storage, store.manifest, number) == whole
    opened = actstore.open(folder)
    assert opened.part_items.tolist() == [1 if p in committed else -1 for p in range(16)]
    made = segments.seal_all(opened)
    assert made + len({p // 4 for p in known} & sealed(committed)) == len(sealed(committed))
    again = actstore.open(folder)
    assert (again.part_items == opened.part_items).all()
    assert not [p for p in again.parts.commits if p // 4 in sealed(committed)]


def sealed(committed):
    return {n for n in range(4) if set(range(4 * n, 4 * n + 4)) <= committed}


@pytest.mark.parametrize(
    "change",
    [
        b"",
        b"{",
        b"[]",
        b'{"segment": 1}',
        {"fingerprint": "0" * 64},
        {"segment": 2},
        {"items": [1, 2]},
        {"items": [10, 10, 10, 11]},
        {"items": [10, 10, 10, -1]},
        {"items": [10, 10, 10, 1e30]},
        {"records": "abc"},
    ],
)
def test_a_damaged_segment_is_passed_over_and_made_again(store, change, caplog):
    path = store.storage._path("segments/00001.json")
    sound = path.read_bytes()
    damaged = change
    if isinstance(change, dict):
        damaged = json.dumps({**json.loads(sound), **change}).encode()
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        opened = actstore.open(store.url)
    assert "segments/00001.json is passed over" in caplog.text
    assert opened.is_complete
    assert sorted(opened.parts.commits) == [4, 5, 6, 7]
    assert collect(opened) == ["segments/00001.json"]
    assert path.read_bytes() == sound
    assert garbage(opened.storage, opened.manifest) == []


def test_records_are_believed_before_segments(store):
    """A record that was removed or changed behind a segment is seen where it is used."""
    record = store.storage._path(record_path(6))
    text = record.read_text()
    record.write_text(text.replace('"items": 10', '"items": 9'))
    opened = actstore.open(store.url)
    with pytest.raises(FormatError, match=r"00006.json is not the record its segment names"):
        opened.commit(6)
    assert [(p.part, p.path) for p in verify(opened)] == [(6, "parts/00006.json")]
    record.unlink()
    opened = actstore.open(store.url)
    assert opened.is_complete
    with pytest.raises(FormatError, match=r"00006.json is missing although a segment names it"):
        opened.commit(6)
    assert [p.part for p in verify(opened)] == [6]
    assert "segments/00001.json" in collect(opened)
    assert actstore.open(store.url).missing_parts == (6,)
    harvest_digits(store.url, limit=160)
    assert record.read_text() == text
    assert len(names(store)) == 4


def test_repair_keeps_the_bytes_and_the_segments(store, monkeypatch):
    before = objects(store.url, ".")
    with open(store.shard(SITE, "patch", 5).uri, "r+b") as file:
        file.write(b"damage")
    repaired = repair(store, FakeModel(), open_source("digits"), [5])
    assert repaired.is_complete
    assert objects(store.url, ".") == before
    calls = []
    monkeypatch.setattr(
        "actstore.execute.run_parts", lambda *a, **k: calls.append(actstore.open(store.url))
    )
    repair(store, FakeModel(), open_source("digits"), [5])
    assert calls[0].missing_parts == (5,), "while it is repaired the part does not exist"


def test_opening_without_a_part_leaves_it_out(store):
    assert actstore.open(store.url, without=[3, 99]).missing_parts == (3,)


def test_copies_are_sealed(store, tmp_path):
    assert objects(convert(store, tmp_path / "b").url, ".") == objects(store.url, ".")
    assert len(names(convert(store, tmp_path / "c", items_per_part=20))) == 2


def test_of_remote_stores_records_are_read_side_by_side(store, monkeypatch):
    monkeypatch.setattr(segments, "LocalStorage", type("Nothing", (), {}))
    for name in names(store):
        store.storage.delete(f"segments/{name}")
    opened = actstore.open(store.url)
    assert opened.is_complete
    assert sorted(opened.parts.commits) == list(range(16))
    assert segments.seal(opened.storage, opened.manifest, 2)


def test_statistics_and_index_of_large_stores_are_read_at_once(store, tmp_path):
    parts = {kind: store.merged_stats(store.spec(SITE, kind)) for kind in ("cls", "patch")}
    rows = store.merged_index()
    storage = Counting(store.url)
    again = Store(storage, store.manifest)
    storage.reads.clear()
    for kind, truth in parts.items():
        found = again.stats(SITE, kind)
        assert found.count == truth.count
        for name in ("mean", "m2", "absmax"):
            assert (getattr(found, name) == getattr(truth, name)).all()
        assert (found.error, found.saturated) == (None, None)
    assert again.index().equals(rows)
    assert len(storage.reads) == 9, "four objects an array, and the index"
    harvest_digits(str(tmp_path / "q"), limit=160, dtype="int8")
    packed = actstore.open(tmp_path / "q")
    array = packed.spec(SITE, "patch")
    assert (packed.stats(SITE, "patch").error == packed.merged_stats(array).error).all()
    assert packed.stats(SITE, "patch").fvu == packed.merged_stats(array).fvu


@pytest.mark.parametrize("path", ["count/c", "mean/c.0", "absmax/c.0"])
def test_statistics_that_do_not_fit_the_store_are_passed_over(store, path):
    truth = store.merged_stats(store.spec(SITE, "patch"))
    file = store.storage._path(f"stats/{SITE}/patch/{path}")
    for damage in (b"\1" * 7, b"\1" * 8, None):
        file.unlink() if damage is None else file.write_bytes(damage)
        found = store.stats(SITE, "patch")
        assert found.count == truth.count
        assert (found.mean == truth.mean).all()
    index = store.storage._path("index.parquet")
    rows = store.merged_index()
    first = store.storage._path("index/part-00000.parquet").read_bytes()
    for damage in (b"junk", first, None):
        index.unlink() if damage is None else index.write_bytes(damage)
        assert store.index().equals(rows)


@pytest.mark.xdist_group("s3")
def test_on_s3(tmp_path, s3):
    url, what = f"s3://bucket/{tmp_path.name}", {"limit": 48, "dtype": "int8", "tokens_per_item": 4}
    harvest_digits(url, storage_options=s3, **what)
    harvest_digits(str(tmp_path / "a"), **what)
    there, here = actstore.open(url, s3), actstore.open(tmp_path / "a")
    assert names(there) == [f"{n:05d}.json" for n in range(4)]
    assert not there.parts.commits
    assert verify(there) == []
    some = range(48)
    assert (there.tokens(some, SITE, "patch") == here.tokens(some, SITE, "patch")).all()
    assert (there.items(some, SITE, "patch") == here.items(some, SITE, "patch")).all()
    there.storage.delete(record_path(5))
    assert "segments/00001.json" in collect(actstore.open(url, s3))
    assert actstore.open(url, s3).missing_parts == (5,)
    assert not segments.seal(there.storage, there.manifest, 1)
    harvest_digits(url, storage_options=s3, **what)
    assert len(names(there)) == 4
