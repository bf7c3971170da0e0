import errno
import json
import logging

import numpy as np
import pytest
import torch
from fake_model import FakeModel, harvest_digits, objects
from PIL import Image

import actstore
from actstore import harvester
from actstore.execute import rank_and_world
from actstore.sources import open_source
from actstore.storage import LocalStorage

SITES = "blocks.{1,3}.resid_post,blocks.2.pattern,logits"


def run(out, **options):
    events = []
    options = {"data": "digits", "sites": SITES, "limit": 100, "batch_size": 8, **options}
    model = options.pop("model", None) or FakeModel()
    store = actstore.harvest(model=model, out=out, on_event=events.append, **options)
    return store, events


def direct(model, source, positions, sites):
    """Return the values of items by a plain forward pass."""
    x = torch.stack([model.transform(source.image(i)) for i in positions])
    return model.run(x, sites=sites)


def test_every_value_equals_the_direct_forward_pass(tmp_path):
    model = FakeModel()
    store, _ = run(tmp_path / "a", model=model, tokens="cls,register,patch")
    assert store.is_complete
    assert store.n_items == 100
    assert store.sites == (
        "blocks.1.resid_post",
        "blocks.2.pattern",
        "blocks.3.resid_post",
        "logits",
    )
    source = open_source("digits")
    rows = store.table()["source"].to_pylist()
    size = store.manifest.items_per_part
    for part in range(store.manifest.n_parts):
        for start in range(part * size, min((part + 1) * size, 100), 8):
            stop = min(start + 8, (part + 1) * size, 100)
            values = direct(model, source, rows[start:stop], SITES)
            for kind, tokens in (
                ("cls", slice(0, 1)),
                ("register", slice(1, 3)),
                ("patch", slice(3, 28)),
            ):
                for site in ("blocks.1.resid_post", "blocks.3.resid_post"):
                    truth = values[site][:, tokens].half().numpy()
                    assert (store.array(site, kind)[start:stop] == truth).all()
                pattern = values["blocks.2.pattern"].movedim(2, 1).flatten(2)[:, tokens]
                assert (
                    store.array("blocks.2.pattern", kind)[start:stop] == pattern.half().numpy()
                ).all()
            truth = values["logits"].half().numpy()
            assert (store.array("logits", "item")[start:stop, 0] == truth).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_dtypes(tmp_path, dtype):
    model = FakeModel()
    store, _ = run(
        tmp_path / "a", model=model, dtype=dtype, limit=8, sites="blocks.0.resid_post", memory=1
    )
    assert store.manifest.items_per_part == 1
    rows = store.table()["source"].to_pylist()
    for i, row in enumerate(rows):
        value = direct(model, open_source("digits"), [row], "blocks.0.resid_post")
        truth = value["blocks.0.resid_post"][0, 3:].to(getattr(torch, dtype))
        truth = truth.view(torch.uint16) if dtype == "bfloat16" else truth
        assert (store.array("blocks.0.resid_post", "patch")[i] == truth.numpy()).all()


def test_the_index_names_every_item(tmp_path):
    store, _ = run(tmp_path / "a")
    table = store.table()
    assert table["position"].to_pylist() == list(range(100))
    for row in table.to_pylist():
        assert row["key"] == f"digit-{row['source']:04d}"
        assert row["label"] == row["source"] // 500
        assert row["status"] == "ok"
    labels = np.bincount(table["label"].to_numpy(), minlength=10)
    assert (labels > 0).sum() >= 9, "items are permuted before the limit is applied"


def test_events_tell_the_plan_progress_and_end(tmp_path):
    store, events = run(tmp_path / "a")
    assert events[0].kind == "plan"
    assert events[0].plan.manifest == store.manifest
    assert sum(e.items for e in events if e.kind == "items") == 100
    assert sorted(e.part for e in events if e.kind == "part") == list(range(store.manifest.n_parts))
    assert events[-1].kind == "finished"
    assert events[-1].items == 100


def test_planned_bytes_are_those_on_disk(tmp_path):
    store, events = run(tmp_path / "a")
    shards = {k: v for k, v in objects(store.url).items() if not k.endswith("zarr.json")}
    assert sum(map(len, shards.values())) == events[0].plan.disk


def test_two_runs_give_the_same_bytes(tmp_path):
    one, _ = run(tmp_path / "one")
    two, _ = run(tmp_path / "two", workers=1)
    for folder in ("acts", "parts", "index", "stats"):
        assert objects(one.url, folder) == objects(two.url, folder)
    assert (tmp_path / "one/zarr.json").read_bytes() == (tmp_path / "two/zarr.json").read_bytes()
    assert (tmp_path / "one/index.parquet").read_bytes() == (
        tmp_path / "two/index.parquet"
    ).read_bytes()


def test_a_finished_store_is_left_alone(tmp_path):
    model = FakeModel()
    run(tmp_path / "a", model=model)
    model.batches.clear()
    store, events = run(tmp_path / "a", model=model)
    assert model.batches == []
    assert events[0].parts_done == store.manifest.n_parts


class StopsAt:
    """A source that breaks down at some item, as a lost file system does."""

    def __init__(self, source, calls):
        self.source, self.calls = source, calls

    def __len__(self):
        return len(self.source)

    def row(self, index):
        return self.source.row(index)

    def describe(self):
        return self.source.describe()

    def image(self, index):
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("the machine is on fire")
        return self.source.image(index)


@pytest.mark.parametrize("calls", [0, 1, 30, 55, 99])
def test_an_interrupted_harvest_goes_on(tmp_path, calls):
    whole, _ = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match=r"on fire"):
        run(tmp_path / "a", data=StopsAt(open_source("digits"), calls), workers=1)
    before = actstore.open(tmp_path / "a")
    assert not before.is_complete
    model = FakeModel()
    store, events = run(tmp_path / "a", model=model)
    assert events[0].plan.resumed
    assert events[0].parts_done == (before.part_items >= 0).sum()
    assert sum(model.batches) == 100 - before.n_items
    assert objects(store.url) == objects(whole.url)
    assert objects(store.url, "parts") == objects(whole.url, "parts")


def test_resume_takes_layout_and_batch_size_from_the_store(tmp_path, monkeypatch):
    store, _ = run(tmp_path / "a", batch_size=5, memory=40_000)
    part = store.manifest.n_parts - 1
    (tmp_path / "a" / f"parts/{part:05d}.json").unlink()
    again, _ = run(tmp_path / "a", batch_size=None, memory=None)
    assert again.manifest == store.manifest
    assert again.is_complete


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"dtype": "float32"}, 'dtype: "float16" -> "float32"'),
        ({"seed": 1}, "order.seed: 0 -> 1"),
        ({"limit": 50}, "items: 100 -> 50"),
        ({"batch_size": 4}, "compute.batch_size: 8 -> 4"),
        ({"model": FakeModel(seed=2)}, 'model.weights: "seed:0" -> "seed:2"'),
        ({"sites": "logits"}, "arrays.blocks.1.resid_post/cls.channels: 12 -> absent"),
        ({"tokens": "cls"}, "arrays.blocks.1.resid_post/patch.kind: "),
    ],
)
def test_another_configuration_is_refused_naming_what_differs(tmp_path, change, field):
    run(tmp_path / "a")
    before = objects(tmp_path / "a", ".")
    with pytest.raises(ValueError, match=r"(?s)holds another store") as caught:
        run(tmp_path / "a", **change)
    assert field in str(caught.value)
    assert objects(tmp_path / "a", ".") == before


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


def test_ranks_share_the_parts(tmp_path, monkeypatch):
    whole, _ = run(tmp_path / "whole")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        store, _ = run(tmp_path / "a")
        done = (actstore.open(tmp_path / "a").part_items >= 0).nonzero()[0]
        assert sorted(done) == [p for p in range(whole.manifest.n_parts) if p % 3 <= rank]
    assert store.is_complete
    assert objects(store.url, ".") == objects(whole.url, ".")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (1, 2)),
        ({"RANK": "0", "WORLD_SIZE": "1", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (0, 1)),
    ],
)
def test_rank_and_world(environment, expected):
    assert rank_and_world(environment) == expected


def test_rank_must_fit_the_world():
    with pytest.raises(ValueError, match=r"RANK=4 does not fit WORLD_SIZE=4"):
        rank_and_world({"RANK": "4", "WORLD_SIZE": "4"})


def test_a_record_of_another_run_is_never_overwritten(tmp_path):
    run(tmp_path / "a")
    path = tmp_path / "a/parts/00002.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "fingerprint": "0" * 64}))
    with pytest.raises(actstore.FormatError, match=r"part 2 was committed under another manifest"):
        run(tmp_path / "a")


def test_map_style_data_of_tensors(tmp_path):
    class Noise(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            return torch.full((1, 20, 20), i / 12), i % 2

    model = FakeModel()
    store, _ = run(
        tmp_path / "a", data=Noise(), limit=None, model=model, sites="logits", tokens="cls"
    )
    rows = store.table()
    assert rows["label"].to_pylist() == [i % 2 for i in rows["source"].to_pylist()]


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


def test_helper_harvests(tmp_path):
    harvest_digits(str(tmp_path / "a"), limit=20)
    assert actstore.open(tmp_path / "a").n_items == 20
