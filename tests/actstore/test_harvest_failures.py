"""What cannot be read is skipped and counted; what cannot be stored or does not fit is refused."""

import errno
import logging

import numpy as np
import pytest
import torch
from fake_model import FakeModel, objects
from harvests import direct, run
from PIL import Image

import actstore
from actstore import harvester
from actstore.order import keyed_permutation
from actstore.sources import open_source
from actstore.storage import LocalStorage


@pytest.fixture
def broken_folder(tmp_path):
    """30 images of which 4 cannot be read, for four reasons."""
    root = tmp_path / "images"
    (root / "x").mkdir(parents=True)
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 255, (20, 20), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "x" / f"{number:02d}.png")
    (root / "x/03.png").write_bytes(b"")
    (root / "x/11.png").write_bytes(b"no image at all")
    data = (root / "x/17.png").read_bytes()
    (root / "x/17.png").write_bytes(data[: len(data) // 2])
    return root


def test_undecodable_items_are_skipped_and_counted(tmp_path, broken_folder, caplog):
    source = open_source(broken_folder)
    (broken_folder / "x/23.png").unlink()
    with caplog.at_level(logging.WARNING):
        store, events = run(tmp_path / "a", data=source, limit=None, memory=80_000)
    assert store.is_complete
    assert store.n_items == 26
    skipped = {e.key: e.message for e in events if e.kind == "skipped"}
    assert sorted(skipped) == ["x/03.png", "x/11.png", "x/17.png", "x/23.png"]
    assert skipped["x/03.png"] == "no bytes"
    assert skipped["x/11.png"].startswith("cannot be decoded: cannot identify")
    assert skipped["x/23.png"] == "file is missing"
    assert "skipped x/03.png: no bytes" in caplog.text
    index = store.index()
    assert index.num_rows == 30
    assert {r["key"]: r["status"] for r in index.to_pylist() if r["status"] != "ok"} == skipped
    assert all(r["position"] is None for r in index.to_pylist() if r["status"] != "ok")


def test_valid_items_are_packed_at_the_front_of_their_part(tmp_path, broken_folder):
    model = FakeModel()
    store, _ = run(tmp_path / "a", data=broken_folder, limit=None, model=model)
    source = open_source(broken_folder)
    size = store.manifest.items_per_part
    values = store.array("blocks.1.resid_post", "patch")
    rows = store.table().to_pylist()
    assert len(rows) == store.n_items == 27
    seen = dict.fromkeys(range(store.manifest.n_parts), 0)
    for row in rows:
        part, slot = divmod(row["position"], size)
        assert slot == seen[part]
        seen[part] += 1
        truth = direct(model, source, [row["source"]], "blocks.1.resid_post")
        truth = truth["blocks.1.resid_post"][0, 3:].half().numpy()
        np.testing.assert_allclose(values[row["position"]], truth, rtol=2e-3, atol=1e-3)
    for part, count in seen.items():
        assert store.part_items[part] == count
        assert not np.asarray(values[part * size + count : (part + 1) * size]).any()
    assert store.stats("blocks.1.resid_post", "patch").count == 27 * 25


def test_strict_stops_at_the_first(tmp_path, broken_folder):
    with pytest.raises(ValueError, match=r"item \d+ \(x/\d\d.png\) .*without --strict it would be"):
        run(tmp_path / "a", data=broken_folder, limit=None, strict=True)


def test_a_set_of_which_nothing_can_be_read_stops_early(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(20):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"none of the \d+ items of the first part can be read"):
        run(tmp_path / "a", data=tmp_path / "images", limit=None)


def test_a_small_set_whose_first_item_cannot_be_read_is_harvested(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(12):
        Image.new("L", (20, 20), number).save(tmp_path / "images" / f"{number:02d}.png")
    first = int(keyed_permutation(np.arange(1), 12, 0)[0])
    (tmp_path / "images" / f"{first:02d}.png").write_bytes(b"junk")
    store = run(tmp_path / "a", data=tmp_path / "images", limit=None)[0]
    assert store.manifest.items_per_part == 1
    assert store.part_items[0] == 0
    assert store.n_items == 11


def test_a_harvest_goes_on_with_a_part_of_which_nothing_can_be_read(tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(20):
        Image.new("L", (20, 20), number).save(tmp_path / "images" / f"{number:02d}.png")
    (tmp_path / "images/07.png").write_bytes(b"junk")
    store = run(tmp_path / "a", data=tmp_path / "images", limit=None)[0]
    assert store.manifest.items_per_part == 1, "so that a part can have no item"
    empty = int(np.flatnonzero(store.part_items == 0)[0])
    store.storage.delete(f"parts/{empty:05d}.json")
    again = run(tmp_path / "a", data=tmp_path / "images", limit=None)[0]
    assert again.is_complete
    assert again.n_items == 19


def test_overflow_stops_before_the_part_is_committed(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"site blocks.1.resid_post \(patch\), channel \d+: -?\d.* does not fit float16",
    ):
        run(tmp_path / "a", model=FakeModel(scale=1e6))
    assert actstore.open(tmp_path / "a").n_items == 0
    store, _ = run(tmp_path / "b", model=FakeModel(scale=1e6), dtype="bfloat16")
    assert store.stats("blocks.1.resid_post", "patch").absmax.max() > 65504


def test_a_model_that_gives_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the model gave nan; a store holds finite values only"):
        run(tmp_path / "a", model=FakeModel(scale=float("nan")), dtype="float32")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "blocks.9.resid_post"}, r"no site matches 'blocks.9.resid_post'; nearest"),
        ({"dtype": "float64"}, r"dtype 'float64' is none of float16, bfloat16, float32"),
        ({"limit": 0}, r"limit must be at least 1"),
        ({"batch_size": 0}, r"batch_size must be at least 1"),
        ({"tokens": "all"}, r"unknown token kind 'all'"),
    ],
)
def test_bad_requests_say_what_is_allowed(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


def test_a_full_disk_is_seen_in_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(harvester, "free_disk", lambda storage: 1000)
    with pytest.raises(ValueError, match=r"on disk, 1.0 kB are free: fewer --sites"):
        run(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_too_little_memory_is_seen_in_the_plan(tmp_path, monkeypatch):
    monkeypatch.setattr(harvester, "available_memory", lambda: 10_000_000)
    with pytest.raises(ValueError, match=r"of memory, 10.0 MB are available"):
        run(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_disk_that_fills_up_loses_nothing_committed(tmp_path, monkeypatch):
    whole, _ = run(tmp_path / "whole")
    real, left = LocalStorage.replace, [33]

    def full(self, path, pieces):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, path, pieces)

    monkeypatch.setattr(LocalStorage, "replace", full)
    with pytest.raises(
        OSError, match=r"is full while part 3 was written; what was committed stays"
    ):
        run(tmp_path / "a")
    assert actstore.open(tmp_path / "a").missing_parts == tuple(range(3, whole.manifest.n_parts))
    monkeypatch.setattr(LocalStorage, "replace", real)
    store, _ = run(tmp_path / "a")
    assert objects(store.url) == objects(whole.url)


def test_inputs_of_the_wrong_shape_are_skipped_with_a_reason(tmp_path):
    class Mixed:
        def __len__(self):
            return 40

        def __getitem__(self, i):
            return torch.zeros((3 if i == 5 else 1, 20, 20))

    store, _ = run(tmp_path / "a", data=Mixed(), limit=None)
    assert store.n_items == 39
    assert [s for s in store.index()["status"].to_pylist() if s != "ok"] == [
        "gives an input of shape [3, 20, 20], not [1, 20, 20]"
    ]
