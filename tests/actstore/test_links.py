"""Links in a local store are followed only as long as they do not leave its folder."""

import os
import shutil
from pathlib import Path

import pytest
from fake_model import FakeModel, harvest_digits, objects

import actstore
from actstore import layout
from actstore.cli import main
from actstore.commit import record_path
from actstore.convert import convert
from actstore.manifest import FormatError
from actstore.repair import repair
from actstore.segments import segment_path
from actstore.sources import open_source
from actstore.storage import LocalStorage
from actstore.verify import verify

SITE = "blocks.1.resid_post"
REFUSED = r"link that leaves the store, to .*cp -rL .*actstore repair .* harvests"


@pytest.fixture
def store(tmp_path):
    harvest_digits(str(tmp_path / "a"), limit=100)
    return actstore.open(tmp_path / "a")


@pytest.fixture
def outside(tmp_path):
    """Return a file that no command may touch."""
    (tmp_path / "outside").mkdir()
    path = tmp_path / "outside/secret"
    path.write_bytes(b"nobody reads this")
    return path


def lead_out(store, path, outside):
    """Move an object out of the store and leave a link to it, so that its bytes are right."""
    full = Path(store.url, path)
    there = outside.parent / "moved"
    shutil.move(full, there)
    full.symlink_to(there)
    return there


@pytest.mark.parametrize(
    "read",
    [
        lambda store: store.items([13], SITE, "patch"),
        lambda store: next(store.batches(SITE, 900)),
        lambda store: store.dask(SITE, "patch").compute(),
        lambda store: store.array(SITE, "patch")[:],
        lambda store: convert(store, f"{store.url}-copy"),
        lambda store: convert(store, f"{store.url}-copy", dtype="float32"),
    ],
    ids=["items", "batches", "dask", "zarr", "copy", "pack"],
)
def test_a_shard_outside_is_not_read(store, outside, read):
    path = layout.shard_path(store.spec(SITE, "patch"), 2)
    lead_out(store, path, outside)
    with pytest.raises(FormatError, match=rf"patch/c\.2\.0\.0 is or lies behind a {REFUSED}"):
        read(actstore.open(store.url))


def test_verify_names_a_shard_outside_and_repair_puts_it_back(store, outside):
    before = objects(store.url, ".")
    path = layout.shard_path(store.spec(SITE, "patch"), 2)
    there = lead_out(store, path, outside)
    content = there.read_bytes()
    problems = verify(actstore.open(store.url))
    assert [(p.part, p.path) for p in problems] == [(2, path)]
    assert "link that leaves the store" in problems[0].what
    there.write_bytes(b"kept")
    again = repair(actstore.open(store.url), FakeModel(), open_source("digits"), [2])
    assert verify(again) == []
    assert there.read_bytes() == b"kept"
    assert objects(store.url, ".") == before
    assert before[path] == content
    assert not Path(store.url, path).is_symlink()


@pytest.mark.parametrize("path", ["zarr.json", record_path(3)])
def test_a_record_outside_is_not_read(store, outside, path, capsys):
    lead_out(store, path, outside)
    with pytest.raises(FormatError, match=rf"{path} is or lies behind a {REFUSED}"):
        actstore.open(store.url)
    for command in ("info", "verify", "gc"):
        assert main([command, store.url]) == 1
        assert capsys.readouterr().err.startswith(f"error: {store.url}/{path} is or lies behind a")


@pytest.mark.parametrize("name", ["parts", "index", f"acts/{SITE}/patch", "tmp"])
def test_a_folder_outside_is_neither_read_nor_written(store, outside, name):
    folder, there = Path(store.url, name), outside.parent / "folder"
    shutil.move(folder, there)
    folder.symlink_to(there)
    before = objects(there, ".")
    storage = LocalStorage(store.url)
    for attempt in (
        lambda: storage.replace(f"{name}/new", [b"x"]),
        lambda: storage.create(f"{name}/new", b"x"),
        lambda: storage.delete(f"{name}/zarr.json"),
        lambda: storage.size(f"{name}/zarr.json"),
        lambda: list(storage.list(name)),
    ):
        with pytest.raises(FormatError, match=REFUSED):
            attempt()
    if name == "tmp":  # where every write begins
        with pytest.raises(FormatError, match=REFUSED):
            storage.replace("new", [b"x"])
    else:
        with pytest.raises(FormatError, match=REFUSED):
            repair(actstore.open(store.url), FakeModel(), open_source("digits"), [2])
    if name != "index":
        assert main(["gc", store.url]) == 1
    assert objects(there, ".") == before


def test_a_folder_that_is_not_there_yet_is_not_made_outside(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/acts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=REFUSED):
        LocalStorage(tmp_path / "a").replace("acts/x", [b"1"])
    assert not (tmp_path / "elsewhere").exists()


def test_gc_and_writing_replace_a_link_and_leave_what_it_leads_to(store, outside):
    storage = store.storage
    Path(store.url, "leads-out").symlink_to(outside)
    storage.replace("leads-out", [b"mine"])
    assert storage.read("leads-out") == b"mine"
    Path(store.url, "again").symlink_to(outside)
    assert not storage.create("again", b"mine")
    storage.delete("again")
    assert not os.path.lexists(f"{store.url}/again")
    assert outside.read_bytes() == b"nobody reads this"


def test_a_segment_outside_is_not_read(store, outside, monkeypatch):
    from actstore import segments

    monkeypatch.setattr(segments, "SPAN", 4)
    segments.seal_all(actstore.open(store.url))
    lead_out(store, segment_path(0), outside)
    with pytest.raises(FormatError, match=rf"{segment_path(0)} is or lies behind a {REFUSED}"):
        actstore.open(store.url)


def test_links_that_stay_in_the_store_and_a_store_that_is_a_link_serve(store, tmp_path):
    path = Path(store.url, layout.shard_path(store.spec(SITE, "patch"), 2))
    expected = store.items([13], SITE, "patch")
    path.rename(path.with_name("kept"))
    path.symlink_to("kept")
    (tmp_path / "link").symlink_to(store.url)
    (tmp_path / "deep").symlink_to(tmp_path)
    for url in (store.url, tmp_path / "link", tmp_path / "deep" / "link"):
        there = actstore.open(url)
        assert (there.items([13], SITE, "patch") == expected).all()
        assert there.array(SITE, "patch")[:].shape[0] == 100
        assert there.storage.size(str(path.relative_to(store.url))) == path.stat().st_size
    path.unlink()
    path.with_name("kept").rename(path)
    harvest_digits(str(tmp_path / "link"), limit=100)
    Path(store.url, record_path(4)).unlink()
    harvest_digits(str(tmp_path / "link"), limit=100)
    assert verify(actstore.open(tmp_path / "link")) == []
    assert (tmp_path / "link").is_symlink()


def test_a_link_to_itself_is_told(store):
    path = Path(store.url, record_path(3))
    path.unlink()
    path.symlink_to(path.name)
    with pytest.raises((FormatError, OSError), match=path.name):
        actstore.open(store.url)
