"""WebDataset tars: an own header scan against tarfile, items, columns, damage, hostile files."""

import contextlib
import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_sources import picture

from actstore.index import rows_table
from actstore.sources import Undecodable, Unreachable, base, open_source, reopen_source, webdataset
from actstore.sources.tar import members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def write_tar(path, files, kind=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(i, label=None):
    about = {"author": f"p{i}", "score": i if i % 2 else i + 0.5, "key": f"k{i}", "deep": [1]}
    return [
        (f"d/{i:04d}.png", picture(i)),
        (f"d/{i:04d}.cls", str(i % 3).encode()),
        (f"d/{i:04d}.json", json.dumps(about).encode()),
        (f"d/{i:04d}.txt", f"a photo of {i}\n".encode()),
    ]


@pytest.fixture
def tars(tmp_path):
    for shard in range(3):
        files = [entry for i in range(shard * 4, shard * 4 + 4) for entry in sample(i)]
        write_tar(tmp_path / f"train-{shard:03d}.tar", files)
    return tmp_path


@pytest.mark.parametrize("kind", FORMATS)
@given(
    files=st.lists(
        st.tuples(st.text("aé/.0", min_size=1, max_size=140), st.binary(max_size=1500)), max_size=6
    )
)
@settings(max_examples=25, deadline=None)
def test_members_are_those_of_tarfile(kind, files):
    sink = io.BytesIO()
    files = [(name.strip("/") or "x", data) for name, data in files]
    try:
        write_tar_to(sink, files, FORMATS[kind])
    except ValueError:  # ustar cannot hold the name
        return
    data = sink.getvalue()
    found = [(m.name, data[m.offset : m.offset + m.size]) for m in members(sink, "a.tar")]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        truth = [(m.name, tar.extractfile(m).read()) for m in tar if m.isreg()]
    assert [(n.rstrip("/"), d) for n, d in found] == truth


def write_tar_to(sink, files, kind):
    with tarfile.open(fileobj=sink, mode="w", format=kind) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_folders_links_and_large_sizes_are_understood():
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("d")
            info.type, info.linkname = kind, "elsewhere"
            tar.addfile(info)
        info = tarfile.TarInfo("big.png")
        info.size = 1 << 40
        sink.write(info.tobuf(tarfile.GNU_FORMAT))
    found = list(members(sink, "a.tar"))
    assert [(m.name, m.size) for m in found] == [("big.png", 1 << 40)]


@pytest.mark.parametrize("how", ["{000..002}.tar", "{000,001,002}.tar", "*.tar", "folder", "url"])
def test_items_labels_and_columns(tars, how):
    where = {"folder": f"{tars}", "url": f"file://{tars}/train-*.tar"}.get(how)
    source = open_source(where or f"{tars}/train-{how}")
    assert len(source) == 12
    for i in (11, 0, 6, 5):
        assert source.row(i) == {
            "key": f"d/{i:04d}",
            "label": i % 3,
            "label_name": None,
            "shard": f"train-{i // 4:03d}.tar",
            "author": f"p{i}",
            "score": float(i if i % 2 else i + 0.5),
            "json_key": f"k{i}",
            "txt": f"a photo of {i}",
        }
        truth = Image.open(io.BytesIO(picture(i)))
        assert (np.asarray(source.image(i)) == np.asarray(truth)).all()
    described = json.loads(json.dumps(source.describe()))
    assert described["files"] == 3
    assert reopen_source(described).describe() == described


def test_an_item_is_one_request(tars, monkeypatch):
    source = open_source(f"{tars}/train-000.tar")
    calls = []
    cat = type(source._fs).cat_file

    def counted(self, path, start=None, end=None, **options):
        calls.append((start, end))
        return cat(self, path, start=start, end=end, **options)

    monkeypatch.setattr(type(source._fs), "cat_file", counted)
    for i in (2, 0):
        source.row(i)
        source.image(i)
    assert len(calls) == 2


def test_members_far_apart_are_fetched_alone(tmp_path):
    files = [("1.png", picture(0)), ("1.bin", bytes(1 << 20)), ("1.cls", b"7")]
    write_tar(tmp_path / "a.tar", files)
    source = open_source(tmp_path / "a.tar")
    assert source.row(0)["label"] == 7
    assert source.image(0).size == (8, 8)


def test_labels_from_json_and_values_of_other_types(tmp_path):
    odd = [
        {"label": 3, "label_name": "cat", "n": 1, "status": "success", "ok": True},
        {"label": 4, "label_name": "\ud800dog", "n": "many", "status": "failed"},
        {"label": 2**70, "n": 2**63},
        ["no object"],
    ]
    files = []
    for i, value in enumerate(odd):
        files += [(f"{i}.jpg", picture(i)), (f"{i}.json", json.dumps(value).encode())]
    files += [("4.jpg", picture(4)), ("4.json", b"{broken")]
    write_tar(tmp_path / "a.tar", files)
    source = open_source(tmp_path / "a.tar")
    rows = [source.row(i) for i in range(5)]
    assert [r["label"] for r in rows] == [3, 4, None, None, None]
    assert [r["label_name"] for r in rows] == ["cat", "?dog", None, None, None]
    assert [r["n"] for r in rows] == [None, "many", None, None, None]
    assert [r["json_status"] for r in rows] == ["success", "failed", None, None, None]
    full = [{"source": i, "status": "ok", "position": i, **row} for i, row in enumerate(rows)]
    table = rows_table(full)
    assert table["status"].to_pylist() == ["ok"] * 5


def test_a_label_that_is_a_word(tmp_path):
    write_tar(tmp_path / "a.tar", [("1.png", picture(0)), ("1.cls", b"cat\n")])
    row = open_source(tmp_path / "a.tar").row(0)
    assert (row["label"], row["label_name"]) == (None, "cat")


def test_items_without_image_and_broken_ones_are_undecodable(tmp_path, monkeypatch):
    files = [("1.cls", b"0"), ("2.png", b"no image"), ("3.png", picture(3)), ("4.png", picture(4))]
    write_tar(tmp_path / "a.tar", files)
    path = tmp_path / "a.tar"
    whole = path.read_bytes()
    last = [m for m in members(io.BytesIO(whole), "a")][-1]
    path.write_bytes(whole[: last.offset + 20])
    source = open_source(path)
    with pytest.raises(Undecodable, match=r"holds no image"):
        source.image(0)
    with pytest.raises(Undecodable, match=r"cannot be decoded"):
        source.image(1)
    assert source.image(2).size == (8, 8)
    with pytest.raises(Undecodable, match=r"the tar ends inside of the image"):
        source.image(3)
    assert source.row(3)["key"] == "4"
    monkeypatch.setattr(base, "MAX_PIXELS", 50)
    with pytest.raises(Undecodable, match=r"at most 50 are decoded"):
        source.image(2)
    monkeypatch.setattr(webdataset, "MAX_IMAGE", 10)
    with pytest.raises(Undecodable, match=r"at most 10 are read"):
        source.image(2)
    path.unlink()
    again = pickle.loads(pickle.dumps(source))
    assert again.describe() == source.describe()
    monkeypatch.undo()
    with pytest.raises(Unreachable, match=r"a.tar is missing"):
        again.image(2)


def test_names_never_become_paths(tmp_path):
    (tmp_path / "in").mkdir()
    names = ["/etc/x.png", "../../up.png", "d/../y.png"]
    write_tar(tmp_path / "in/a.tar", [(name, picture(i)) for i, name in enumerate(names)])
    source = open_source(tmp_path / "in/a.tar")
    assert [source.row(i)["key"] for i in range(3)] == ["/etc/x", "../../up", "d/../y"]
    assert all(source.image(i).size == (8, 8) for i in range(3))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar", "in"]


@pytest.mark.parametrize("position", [100, 150, 300])
def test_a_damaged_header_is_an_error(tars, position):
    path = tars / "train-000.tar"
    data = bytearray(path.read_bytes())
    second = list(members(io.BytesIO(data), "a"))[1].offset - 512
    data[second + position] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"train-000.tar: a damaged header \(at byte {second}\)"):
        open_source(path)


def test_hostile_headers_are_bounded():
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 33
    hostile = info.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(ValueError, match=r"extended header of 8589934592 bytes"):
        list(members(io.BytesIO(hostile), "a"))
    for body in (b"999999 path=x\n", b"0 path=x\n", b"x", b"12 size=-12\n"):
        info.size = len(body)
        data = info.tobuf() + body.ljust(512, b"\0") + tarfile.TarInfo("y").tobuf()
        with pytest.raises(ValueError, match=r"damaged"):
            list(members(io.BytesIO(data), "a"))


@given(data=st.binary(max_size=2000), at=st.integers(0, 1999))
@settings(max_examples=100, deadline=None)
def test_any_bytes_end_in_members_or_one_error(data, at):
    sink = io.BytesIO()
    write_tar_to(sink, [("é" * 80 + ".png", b"x" * 600)], tarfile.PAX_FORMAT)
    whole = bytearray(sink.getvalue())
    whole[at : at + len(data)] = data
    found = []
    with contextlib.suppress(ValueError):
        found += members(io.BytesIO(bytes(whole)), "a")
    assert all(member.size >= 0 for member in found)
    assert len(found) <= len(whole) // 512


def test_what_cannot_be_opened_says_why(tmp_path):
    with pytest.raises(ValueError, match=r"is compressed, which allows no random access"):
        open_source(tmp_path / "a.tar.gz")
    (tmp_path / "a.tar").write_bytes(b"x" * 600)
    with pytest.raises(ValueError, match=r"a.tar: not an uncompressed tar file"):
        open_source(tmp_path / "a.tar")
    with pytest.raises(FileNotFoundError, match=r"b.tar: no tar file"):
        open_source(tmp_path / "b.tar")
    with pytest.raises(FileNotFoundError, match=r"c-1.tar: no tar file"):
        open_source(tmp_path / "c-{1..3}.tar")
    with pytest.raises(ValueError, match=r"runs backwards"):
        open_source(tmp_path / "c-{3..1}.tar")
    with pytest.raises(ValueError, match=r"more than 1,000,000 files"):
        open_source(tmp_path / "c-{0..999999}-{0..9}.tar")
    with pytest.raises(ValueError, match=r"unbalanced"):
        open_source(tmp_path / "c-{0..3.tar")
    write_tar(tmp_path / "e.tar", [("1.txt", b"x")])
    with pytest.raises(ValueError, match=r"holds no images.*in 1 tars with 1 items"):
        open_source(tmp_path / "e.tar")
    with pytest.raises(ValueError, match=r"s3://bucket/a.tar holds credentials") as caught:
        open_source("s3://me:hidden@bucket/a.tar")
    assert "hidden" not in str(caught.value)
