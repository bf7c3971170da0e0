"""A harvest holds what the model gives, names every item, and writes the planned bytes."""

import numpy as np
import pytest
import torch
from fake_model import FakeModel, harvest_digits, objects
from harvests import SITES, direct, run

import actstore
from actstore.sources import open_source


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


def test_helper_harvests(tmp_path):
    harvest_digits(str(tmp_path / "a"), limit=20)
    assert actstore.open(tmp_path / "a").n_items == 20
