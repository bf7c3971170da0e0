"""Documents say what the plan says, and the plan counts what the writer writes."""

import dataclasses

import numpy as np

import actstore
from actstore.storage import LocalStorage
from benchmarks import costs


def test_the_document_has_the_tables_of_today():
    document = costs.DOCUMENT.read_text()
    assert costs.replaced(document) == document, "run `python -m benchmarks.costs --write`"


class Counting(LocalStorage):
    """A storage that counts the objects written."""

    def __init__(self, root):
        super().__init__(root)
        self.paths = []

    def replace(self, path, pieces):
        self.paths.append(path)
        super().replace(path, pieces)

    def create(self, path, data):
        self.paths.append(path)
        return super().create(path, data)


def test_objects_are_counted_as_they_are_written(tmp_path, monkeypatch):
    from actstore import arrays

    values = np.zeros((40, 3, 4), dtype=np.float16)
    made = []

    def opened(url, options=None):
        made.append(Counting(url))
        return made[0]

    monkeypatch.setattr(arrays, "open_storage", opened)
    site = {"blocks.6.resid_post": {"cls": values[:, :1], "patch": values}}
    store = actstore.write_arrays(tmp_path / "a", site, items_per_part=8)
    written = [p for p in made[0].paths if not p.endswith("zarr.json")]
    assert len(written) == store.manifest.n_parts * (2 + costs.SMALL)


def test_a_row_is_arithmetic():
    profile = costs.PROFILES[1]
    row = costs.costs(profile, 1_281_167)
    manifest = costs.plan(profile, 1_281_167)
    per_part = manifest.items_per_part
    assert row["parts"] == f"{-(-1_281_167 // per_part):,}"
    reads = manifest.n_parts * (1 + 196 // 7)
    assert row["reads an epoch"] == f"{reads:,}"
    int8 = costs.costs(dataclasses.replace(profile, dtype="int8"), 1_281_167)
    assert row["bytes"] == "387.7 GB"
    assert int8["bytes"] == "193.8 GB"
