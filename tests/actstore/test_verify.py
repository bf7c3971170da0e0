import errno
import os

import numpy as np
import pytest
from fake_model import FakeModel, harvest_digits

import actstore
from actstore.crc import crc32c, crc32c_of_file
from actstore.manifest import FormatError
from actstore.sources import open_source
from actstore.verify import skipped, verify, verify_against_model

SITE = "blocks.1.resid_post"


@pytest.fixture
def store(tmp_path):
    harvest_digits(str(tmp_path / "a"), limit=100)
    return actstore.open(tmp_path / "a")


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 16]))


def only(store):
    problems = verify(store)
    assert len(problems) == 1
    return problems[0]


def test_a_sound_store_has_no_problem(store):
    seen = []
    assert verify(store, on_part=seen.append) == []
    assert seen == list(range(store.manifest.n_parts))


def test_a_flipped_byte_is_found_with_its_stripe(store):
    shard = store.shard(SITE, "patch", 3)
    flip(shard.uri, int(shard.spans[7, 0]) + 5)
    problem = only(store)
    assert problem.part == 3
    assert str(problem) == (
        f"part 3, acts/{SITE}/patch/c.3.0.0: bytes changed: the checksum differs (stripe 7)"
    )


def test_a_flipped_byte_of_the_index_of_a_shard(store):
    flip(store.shard(SITE, "patch", 0).uri, -6 + os.path.getsize(store.shard(SITE, "patch", 0).uri))
    assert only(store).what.endswith("(in the index of the shard)")


def test_every_byte_counts(store):
    """No byte of a small shard, its side files or its index rows can change unseen."""
    for path in sorted(store.commit(0).objects):
        full = store.storage.uri(path)
        size = os.path.getsize(full)
        for offset in np.linspace(0, size - 1, 12).astype(int).tolist():
            flip(full, offset)
            assert [p.path for p in verify(store)] == [path]
            flip(full, offset)
    assert verify(store) == []


@pytest.mark.parametrize("room", [1, 7, 1000, 5000])
def test_the_sum_of_a_file_does_not_depend_on_the_pieces(tmp_path, room):
    data = np.random.default_rng(room).bytes(3001)
    (tmp_path / "f").write_bytes(data)
    assert crc32c_of_file(str(tmp_path / "f"), bytearray(room)) == crc32c(data)


def test_an_object_that_cannot_be_read_is_named(store, monkeypatch):
    shard = store.shard(SITE, "patch", 3).uri

    def failing(path, memory):
        if path == shard:
            raise OSError(errno.EIO, "Input/output error")
        return crc32c_of_file(path, memory)

    monkeypatch.setattr("actstore.verify.crc32c_of_file", failing)
    problem = only(store)
    assert (problem.part, problem.path) == (3, f"acts/{SITE}/patch/c.3.0.0")
    assert "cannot be read: [Errno 5] Input/output error" in problem.what


def test_a_truncated_object(store):
    path = store.shard(SITE, "cls", 2).uri
    size = os.path.getsize(path)
    os.truncate(path, size - 1)
    assert only(store).what == f"has {size - 1} bytes, {size} were written"


def test_a_missing_object(store):
    os.unlink(store.shard(SITE, "cls", 2).uri)
    assert str(only(store)) == f"part 2, acts/{SITE}/cls/c.2.0.0: missing"


def test_foreign_objects(store):
    folder = os.path.dirname(store.shard(SITE, "cls", 2).uri)
    for name in ("c.999.0.0", "notes.txt"):
        with open(os.path.join(folder, name), "w") as file:
            file.write("x")
    assert [(p.part, p.what) for p in verify(store)] == [
        (-1, "foreign: not written by a harvest")
    ] * 2


def test_a_damaged_sidecar_is_refused_by_stats(store):
    flip(store.storage.uri("parts/00001.safetensors"), 400)
    with pytest.raises(FormatError, match=r"00001.safetensors is damaged"):
        store.stats(SITE, "cls")


def test_a_damaged_index_is_refused_by_the_table(store):
    flip(store.storage.uri("index/part-00001.parquet"), 50)
    os.unlink(store.storage.uri("index.parquet"))
    with pytest.raises(FormatError, match=r"part-00001.parquet is damaged"):
        actstore.open(store.url).table()


@pytest.mark.parametrize("text", ["", "{}", '{"part": 1}', "[]", "nonsense"])
def test_a_damaged_record_is_refused(store, text):
    with open(store.storage.uri("parts/00001.json"), "w") as file:
        file.write(text)
    with pytest.raises(FormatError, match=r"parts/00001.json is not a commit record"):
        actstore.open(store.url)


def test_records_that_do_not_belong_are_refused(store):
    record = store.storage.read("parts/00001.json")
    store.storage.replace("parts/00002.json", [record])
    with pytest.raises(FormatError, match=r"is the record of another part \(1\)"):
        actstore.open(store.url)
    store.storage.delete("parts/00002.json")
    text = record.replace(b'"part": 1', b'"part": 77')
    store.storage.replace("parts/00077.json", [text])
    with pytest.raises(FormatError, match=r"part 77 is not part of this store's plan"):
        actstore.open(store.url)


def test_values_against_the_model(store):
    found = verify_against_model(store, FakeModel(), open_source("digits"), items=20)
    assert {(c.site, c.kind) for c in found} == {(a.site, a.kind) for a in store.manifest.arrays}
    assert all(c.differing == 0 and c.items == 20 and c.largest < 0.01 for c in found)


def test_wrong_values_are_found_against_the_model(store):
    for part in range(store.manifest.n_parts):
        shard = store.shard(SITE, "patch", part)
        with open(shard.uri, "r+b") as file:
            data = np.fromfile(file, "<f2", count=int(shard.spans[0, 1]) // 2)
            file.seek(0)
            file.write((data + 0.5).astype("<f2").tobytes())
    found = verify_against_model(store, FakeModel(), open_source("digits"), items=5)
    bad = [c for c in found if c.differing]
    assert [(c.site, c.kind) for c in bad] == [(SITE, "patch")]
    assert bad[0].differing >= 5 * 12 * 0.9


def test_another_model_or_data_set_is_refused(store):
    with pytest.raises(ValueError, match=r"(?s)is not the one .*weights: 'seed:0' -> 'seed:1'"):
        verify_against_model(store, FakeModel(seed=1), open_source("digits"), items=1)

    class Other:
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return i

    with pytest.raises(ValueError, match=r"kind was 'digits', is 'python'"):
        verify_against_model(store, FakeModel(), open_source(Other()), items=1)


def test_a_store_without_model_cannot_be_run_again(tmp_path):
    store = actstore.write_arrays(tmp_path / "a", {SITE: {"cls": np.ones((3, 1, 4), np.float32)}})
    with pytest.raises(ValueError, match=r"was not made by a model"):
        verify_against_model(store, FakeModel(), open_source("digits"), items=1)
    assert skipped(store) == {}
