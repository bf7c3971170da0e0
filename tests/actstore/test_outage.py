"""Storage of the data that fails stops a harvest; only what is damaged or absent is skipped."""

import io
import pickle

import pytest
from fake_model import FakeModel
from fsspec.implementations.memory import MemoryFileSystem
from test_sources import picture, write_parquet
from test_webdataset import write_tar

import actstore
from actstore.sources import Undecodable, Unreachable, fetch, open_source

ITEMS = 64


class Outage:
    """Makes the memory file system fail from some read on, as often as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 0
        self.error: Exception = ConnectionError("the line is cut")
        cat, read = MemoryFileSystem.cat_file, io.BytesIO.read

        def failing(real):
            def call(*words, **options):
                if self.left:
                    self.left -= 1
                    raise self.error
                return real(*words, **options)

            return call

        monkeypatch.setattr(MemoryFileSystem, "cat_file", failing(cat))
        from fsspec.implementations.memory import MemoryFile

        monkeypatch.setattr(MemoryFile, "read", failing(read), raising=False)
        monkeypatch.setattr(fetch, "PAUSE", 0.0)


@pytest.fixture
def outage(monkeypatch):
    return Outage(monkeypatch)


@pytest.fixture(params=["folder", "table", "tar", "parquet"])
def data(request, tmp_path):
    """URL of `ITEMS` images on storage elsewhere."""
    memory = MemoryFileSystem()
    root = f"/outage-{tmp_path.name}"
    images = {f"{i}.png": picture(i) for i in range(ITEMS)}
    if request.param == "parquet":
        write_parquet(tmp_path / "a.parquet", 0, ITEMS, groups=32)
        memory.pipe(f"{root}/a.parquet", (tmp_path / "a.parquet").read_bytes())
        url = f"memory:/{root}/a.parquet"
    elif request.param == "tar":
        write_tar(tmp_path / "a.tar", list(images.items()))
        memory.pipe(f"{root}/a.tar", (tmp_path / "a.tar").read_bytes())
        url = f"memory:/{root}/a.tar"
    else:
        for name, content in images.items():
            memory.pipe(f"{root}/{name}", content)
        url = f"memory:/{root}"
        if request.param == "table":
            memory.pipe(f"{root}/a.csv", "\n".join(["path", *images]).encode())
            url += "/a.csv"
    yield url
    memory.rm(root, recursive=True)


def test_a_short_failure_is_bridged(data, outage):
    source = open_source(data)
    outage.left = fetch.ATTEMPTS - 1
    assert source.image(3).size == (8, 8)
    assert not outage.left


@pytest.mark.parametrize("error", [ConnectionError("cut"), TimeoutError(), RuntimeError("client")])
def test_an_outage_is_no_missing_item(data, outage, error):
    source = open_source(data)
    outage.left, outage.error = 10**6, error
    with pytest.raises(Unreachable, match=r"cannot be fetched"):
        source.image(3)
    outage.left = 0
    assert source.image(3).size == (8, 8)


def test_denied_is_asked_once(data, outage):
    source = open_source(data)
    outage.left, outage.error = 10**6, PermissionError(13, "denied")
    with pytest.raises(Unreachable, match=r"cannot be fetched: denied"):
        source.image(3)
    assert outage.left == 10**6 - 1


def test_a_harvest_stops_and_goes_on(data, outage, tmp_path):
    def harvest(name, **options):
        return actstore.harvest(
            model=FakeModel(), data=data, sites="blocks.0.resid_post", out=tmp_path / name,
            workers=1, batch_size=1, **options,
        )  # fmt: skip

    whole = harvest("whole")
    committed = []

    def cut(event):
        if event.kind == "part":
            committed.append(event.part)
            outage.left = 10**6

    with pytest.raises(Unreachable, match=r"committed stays: run the same command again"):
        harvest("a", on_event=cut)
    there = actstore.open(tmp_path / "a")
    assert committed
    assert set(there.missing_parts).isdisjoint(committed)
    assert 0 < there.n_items < ITEMS
    outage.left = 0
    again = harvest("a")
    assert again.n_items == ITEMS
    assert again.table().equals(whole.table())


def test_old_lists_may_be_harvested_without_what_cannot_be_reached(tmp_path, outage):
    memory = MemoryFileSystem()
    names = [f"{i}.png" for i in range(ITEMS)]
    memory.pipe("/old/a.csv", "\n".join(["path", *names]).encode())
    for i in range(ITEMS):
        memory.pipe(f"/old/{i}.png", picture(i))

    def cut(event):
        if event.kind == "part" and event.part == 0:
            outage.left = 2 * fetch.ATTEMPTS

    store = actstore.harvest(
        model=FakeModel(), data="memory://old/a.csv", sites="blocks.0.resid_post",
        out=tmp_path / "a", workers=1, batch_size=1, skip_unreachable=True, on_event=cut,
    )  # fmt: skip
    assert store.n_items == ITEMS - 2
    statuses = store.index()["status"].to_pylist()
    assert sum("cannot be fetched: ConnectionError" in status for status in statuses) == 2


class Items:
    """Raises what it is told."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize("error", [ConnectionResetError(), TimeoutError(), OSError(5, "I/O")])
def test_objects_whose_medium_fails(error):
    source = open_source(Items(error))
    for method in (source.image, source.row):
        with pytest.raises(Unreachable, match=r"item 1 cannot be read"):
            method(1)


@pytest.mark.parametrize("error", [OSError("image file is truncated"), FileNotFoundError(2, "no")])
def test_objects_whose_items_are_damaged(error):
    with pytest.raises(Undecodable, match=r"cannot be read"):
        open_source(Items(error)).image(1)


def test_it_travels():
    error = pickle.loads(pickle.dumps(Unreachable("x cannot be fetched")))
    assert str(error) == "x cannot be fetched"
    assert isinstance(error, OSError)
    assert not isinstance(error, FileNotFoundError)


def test_a_local_file_that_is_a_folder_is_skipped_one_that_is_denied_stops(tmp_path, monkeypatch):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    source = open_source(tmp_path)
    (tmp_path / "1.png").unlink()
    (tmp_path / "1.png").mkdir()
    with pytest.raises(Undecodable, match=r"file is missing"):
        source.image(1)
    from fsspec.implementations.local import LocalFileSystem

    def denied(*words, **options):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(LocalFileSystem, "cat_file", denied)
    with pytest.raises(Unreachable, match=r"2.png cannot be fetched: Input/output error"):
        source.image(2)
