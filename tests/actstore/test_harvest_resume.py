"""A harvest that stopped goes on, ranks share one, and another configuration is refused."""

import dataclasses
import json

import pytest
from fake_model import FakeModel, objects
from harvests import run

import actstore
from actstore.execute import rank_and_world
from actstore.sources import open_source
from actstore.writer import commit_part


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


def test_a_lost_race_is_harmless_and_one_with_another_harvest_is_said(tmp_path):
    store, _ = run(tmp_path / "a")
    there = store.commit(2)
    path = tmp_path / "a/parts/00002.json"
    before = path.read_bytes()
    again = commit_part(store.storage, store.manifest, 2, there.items, there.objects)
    assert (again.items, again.objects) == (there.items, there.objects)
    other = dataclasses.replace(store.manifest, data={"kind": "another"})
    with pytest.raises(actstore.FormatError, match=r"part 2 was committed under another manifest"):
        commit_part(store.storage, other, 2, there.items, there.objects)
    assert path.read_bytes() == before
