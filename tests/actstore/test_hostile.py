"""Stores of strangers: what they claim is checked before memory is taken or a path is made."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from fake_model import FakeModel
from harvests import run

import actstore
from actstore import index as index_module
from actstore import layout
from actstore.cli import main
from actstore.commit import index_path, record_path
from actstore.crc import crc32c
from actstore.manifest import FormatError, Manifest
from actstore.verify import verify


@pytest.fixture
def store(tmp_path):
    return run(tmp_path / "a", model=FakeModel())[0]


def claim(store, change):
    """Write a manifest with a fingerprint that fits, whatever it claims."""
    path = Path(store.url, "zarr.json")
    value = json.loads(path.read_text())
    change(value["attributes"]["actstore"])
    manifest = value["attributes"]["actstore"]
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    value["attributes"]["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("items", (1 << 48) - 1, r"parts, at most 33554432 are read"),
        ("items", -1, r"items must be an integer >= 0"),
        ("items", 1e300, r"items must be an integer"),
        ("items_per_part", 0, r"items_per_part must be an integer >= 1"),
        ("items_per_part", 1 << 60, r"items_per_part must be an integer"),
    ],
)
def test_sizes_of_a_store(store, field, value, message, capsys):
    claim(store, lambda manifest: manifest.update({field: value}))
    with pytest.raises(FormatError, match=message):
        actstore.open(store.url)
    assert main(["info", store.url]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("site", "../../etc", r"site '../../etc' cannot be a folder"),
        ("site", "/etc/cron.d", r"cannot be a folder"),
        ("site", "a\0b", r"cannot be a folder"),
        ("kind", "..", r"token kind '..' cannot be a folder"),
        ("kind", "zarr.json", r"cannot be a folder"),
        ("tokens", 1 << 39, r"tokens of \d+ channels; at most"),
        ("channels", 1 << 39, r"tokens of \d+ channels; at most"),
        ("tokens", True, r"tokens must be a positive integer"),
        ("stripe_tokens", 7, r"does not divide"),
    ],
)
def test_arrays_of_a_store(store, field, value, message):
    claim(store, lambda manifest: manifest["arrays"][0].update({field: value}))
    with pytest.raises(FormatError, match=message):
        actstore.open(store.url)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"attributes": ' * 100_000, "\xff", "1e999"])
def test_json_of_any_kind(store, text):
    for path in ("zarr.json", record_path(3)):
        whole = Path(store.url, path)
        before = whole.read_bytes()
        whole.write_text(text)
        with pytest.raises(FormatError):
            actstore.open(store.url)
        whole.write_bytes(before)


@pytest.mark.parametrize("value", [1e999, -1, 10**30, "x", None, []])
def test_numbers_of_a_record(store, value):
    path = Path(store.url, record_path(3))
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "items": value}))
    with pytest.raises(FormatError):
        actstore.open(store.url)


def test_what_a_record_names_is_never_opened(store, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"nobody reads this")
    path = Path(store.url, record_path(3))
    record = json.loads(path.read_text())
    for name in ("../secret", str(secret)):
        record["objects"][name] = {"bytes": 17, "crc32c": crc32c(secret.read_bytes())}
    path.write_text(json.dumps(record))
    again = actstore.open(store.url)
    assert again.index().num_rows == 100
    told = [problem for problem in verify(again) if problem.part == 3]
    assert all("secret" not in problem.what for problem in told)
    assert main(["gc", store.url]) == 0
    assert secret.exists()


def forge(store, part, data):
    """Replace the index of a part, with a record that fits it."""
    Path(store.url, index_path(part)).write_bytes(data)
    path = Path(store.url, record_path(part))
    record = json.loads(path.read_text())
    record["objects"][index_path(part)] = {"bytes": len(data), "crc32c": crc32c(data)}
    path.write_text(json.dumps(record))


def test_an_index_of_too_many_rows_is_not_unpacked(store, monkeypatch):
    monkeypatch.setattr(index_module, "MORE_ROWS", 100)
    row = {"source": 0, "key": "x" * 1000, "status": "ok", "position": 0}
    forge(store, 3, index_module.encode_index_rows([row] * 50_000))
    with pytest.raises(FormatError, match=r"claims 50000 rows, .* at most \d+ rows"):
        actstore.open(store.url).index()
    forge(store, 3, index_module.encode_index_rows([row]))
    monkeypatch.setattr(index_module, "MAX_OBJECT_BYTES", 100)
    with pytest.raises(FormatError, match=r"bytes unpacked; at most"):
        actstore.open(store.url).index()


def test_pickles_in_the_place_of_arrays_are_not_run(store, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "run",))

    data = pickle.dumps(Bomb())
    shard = store.manifest.arrays[0]
    for path in (index_path(3), layout.shard_path(shard, 3), "parts/00003.safetensors"):
        whole = Path(store.url, path)
        if whole.exists():
            whole.write_bytes(data)
    again = actstore.open(store.url)
    assert {problem.part for problem in verify(again)} == {3}
    with pytest.raises(FormatError):
        again.index()
    assert not (tmp_path / "run").exists()


def test_no_module_of_the_store_can_run_a_pickle():
    package = Path(actstore.__file__).parent
    words = ("import pickle", "allow_pickle=True", "torch.load(", "joblib", "marshal", "eval(")
    for path in package.rglob("*.py"):
        text = path.read_text()
        assert not [word for word in words if word in text], path


def test_plausible_large_stores_are_not_refused():
    array = {"site": "a", "kind": "patch", "tokens": 196, "channels": 768}
    value = {"items": 5 * 10**9, "items_per_part": 260, "arrays": [array], "format": 1}
    assert Manifest.from_json(value).n_parts == 19_230_770
    assert np.dtype("int64").itemsize * 19_230_770 < 1 << 28
