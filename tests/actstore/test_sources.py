import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from actstore.sources import Undecodable, base, check_source, open_source, reopen_source
from actstore.sources.parquet import Parquet
from actstore.sources.places import file_sizes


def picture(number: int, side: int = 8, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for number, name in enumerate(["b/2.png", "a/1.JPG", "a/deep/3.png", "top.png", "c/notes.txt"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(picture(number))
    return root


def test_digits():
    source = open_source("digits")
    assert len(source) == 5000
    assert source.row(4999) == {"key": "digit-4999", "label": 9, "label_name": "9"}
    assert source.image(0).size == (20, 20)
    sheet = np.asarray(source.image(1234))
    assert sheet.dtype == np.uint8
    assert sheet.max() > 200
    assert sheet.min() == 0
    assert reopen_source(json.loads(json.dumps(source.describe()))).describe() == source.describe()


def test_folder_is_sorted_and_labelled_by_first_subfolder(folder):
    source = open_source(str(folder))
    rows = [source.row(i) for i in range(len(source))]
    assert [row["key"] for row in rows] == ["a/1.JPG", "a/deep/3.png", "b/2.png", "top.png"]
    assert [row["label"] for row in rows] == [0, 0, 1, None]
    assert [row["label_name"] for row in rows] == ["a", "a", "b", None]
    truth = Image.open(folder / "b/2.png")
    assert (np.asarray(source.image(2)) == np.asarray(truth)).all()


def test_folder_by_url(folder):
    here, there = open_source(str(folder)), open_source(f"file://{folder}")
    assert there.describe()["fingerprint"] == here.describe()["fingerprint"]
    assert (np.asarray(there.image(0)) == np.asarray(here.image(0))).all()


def test_folder_fingerprint_follows_names_and_sizes(folder):
    before = open_source(folder).describe()
    (folder / "b/2.png").write_bytes(picture(7, side=9))
    changed = open_source(folder)
    assert changed.describe()["fingerprint"] != before["fingerprint"]
    with pytest.raises(ValueError, match=r"data set changed since the harvest: fingerprint was"):
        check_source(changed, before)
    with pytest.raises(ValueError, match=r"data set changed"):
        reopen_source(before)


def test_a_local_folder_is_listed_as_fsspec_lists_it(folder):
    files = LocalFileSystem()
    expected = {p: i["size"] for p, i in files.find(str(folder), detail=True).items()}
    assert file_sizes(files, str(folder)) == expected
    assert len(expected) > 3


def test_links_in_a_folder_of_images_are_followed(folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "all").symlink_to(folder / "b")
    (linked / "one.png").symlink_to(folder / "b/2.png")
    (linked / "broken.png").symlink_to(folder / "none.png")
    (linked / "itself.png").symlink_to(linked / "itself.png")
    source = open_source(linked)
    keys = [source.row(i)["key"] for i in range(len(source))]
    assert keys == ["all/2.png", "broken.png", "itself.png", "one.png"]
    assert source.image(0).tobytes() == source.image(3).tobytes()
    with pytest.raises(Undecodable):
        source.image(keys.index("broken.png"))


def test_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds no images: looked for .*\.jpg.*found \.txt"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["nowhere/at/all", "digit"])
def test_nothing_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"does not exist.*allowed: digits, a folder"):
        open_source(name)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"is a file of a kind no source reads"):
        open_source(tmp_path / "a.doc")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no bytes"),
        (b"not an image", "cannot be decoded: cannot identify image file"),
        (picture(0)[:60], "cannot be decoded"),
        (picture(0, 64, "JPEG")[:-700], "cannot be decoded: image file is truncated"),
        (picture(0)[:30] + b"\xff" * 12 + picture(0)[42:], "cannot be decoded"),
    ],
)
def test_undecodable_bytes_say_why(data, message):
    with pytest.raises(Undecodable, match=message):
        base.decode_image(data)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    sink = io.BytesIO()
    Image.new("1", (9000, 9000)).save(sink, "PNG")
    with pytest.raises(Undecodable, match=r"9000 x 9000 pixels, at most 67108864|limit"):
        base.decode_image(sink.getvalue())
    monkeypatch.setattr(base, "MAX_PIXELS", 50)
    with pytest.raises(Undecodable, match=r"8 x 8 pixels, at most 50 are decoded"):
        base.decode_image(picture(0))


def test_a_file_that_vanished_is_undecodable(folder):
    source = open_source(folder)
    (folder / "b/2.png").unlink()
    with pytest.raises(Undecodable, match=r"file is missing"):
        source.image(2)
    assert source.row(2)["key"] == "b/2.png"


def write_parquet(path, start, count, *, groups=2, names=("cat", "dog"), bad=()):
    images = [
        None if i in bad else {"bytes": picture(i), "path": f"{i}.png"}
        for i in range(start, start + count)
    ]
    table = pa.table(
        {
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": [i % 2 for i in range(start, start + count)],
            "author": [f"p{i}" for i in range(start, start + count)],
        }
    )
    if names:
        label = {"names": list(names), "_type": "ClassLabel"}
        features = {"image": {"_type": "Image"}, "label": label}
        text = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": text})
    pq.write_table(table, path, row_group_size=-(-count // groups))


def test_parquet_rows_images_labels_and_extra_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 7, groups=3)
    source = open_source(tmp_path / "a.parquet")
    assert len(source) == 7
    for i in (6, 0, 3, 2):
        name = ("cat", "dog")[i % 2]
        assert source.row(i) == {
            "key": f"{i}.png",
            "label": i % 2,
            "label_name": name,
            "author": f"p{i}",
        }
        truth = Image.open(io.BytesIO(picture(i)))
        assert (np.asarray(source.image(i)) == np.asarray(truth)).all()


@pytest.mark.parametrize("how", ["folder", "glob", "url"])
def test_parquet_of_many_files(tmp_path, how):
    write_parquet(tmp_path / "train-00000.parquet", 0, 5)
    write_parquet(tmp_path / "train-00001.parquet", 5, 4)
    where = {
        "folder": f"{tmp_path}",
        "glob": f"{tmp_path}/*.parquet",
        "url": f"file://{tmp_path}/*.parquet",
    }
    source = open_source(where[how])
    assert [source.row(i)["key"] for i in range(9)] == [f"{i}.png" for i in range(9)]
    assert source.describe()["files"] == 2
    assert reopen_source(source.describe()).describe() == source.describe()


def test_parquet_without_class_names(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 3, names=())
    assert open_source(tmp_path / "a.parquet").row(1)["label"] == 1
    assert open_source(tmp_path / "a.parquet").row(1)["label_name"] is None


def test_parquet_null_image_is_undecodable(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 4, bad=(2,))
    source = open_source(tmp_path / "a.parquet")
    with pytest.raises(Undecodable, match=r"holds no image bytes"):
        source.image(2)
    assert source.row(2)["key"] == "row-2"


def test_a_damaged_row_group_is_undecodable_and_the_rest_reads(tmp_path):
    write_parquet(tmp_path / "a.parquet", 0, 6, groups=2)
    path = tmp_path / "a.parquet"
    start = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    source = open_source(path)
    with pytest.raises(Undecodable, match=r"row group 0 cannot be read"):
        source.image(0)
    assert source.row(0)["key"] == "row-0"
    assert source.row(5)["key"] == "5.png"


def test_parquet_reads_a_row_group_once_for_many_threads(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    write_parquet(tmp_path / "a.parquet", 0, 40, groups=4)
    source = Parquet(str(tmp_path / "a.parquet"))
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda i: source.row(i)["key"], range(40)))
    assert keys == [f"{i}.png" for i in range(40)]
    small = Parquet(str(tmp_path / "a.parquet"), cache_bytes=1)
    assert 1 < small.memory < source.memory
    assert [small.row(i)["key"] for i in (0, 39, 1, 38)] == ["0.png", "39.png", "1.png", "38.png"]


def test_parquet_without_images_lists_its_columns(tmp_path):
    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"has no image column.*its columns are x: int64"):
        open_source(tmp_path / "a.parquet")


def test_not_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"is not a parquet file"):
        open_source(tmp_path / "a.parquet")
    with pytest.raises(FileNotFoundError, match=r"no parquet file there"):
        open_source(tmp_path / "none-*.parquet")


class Pairs:
    classes = ("even", "odd")

    def __len__(self):
        return 6

    def __getitem__(self, i):
        if i == 4:
            raise OSError("disk on fire")
        return Image.open(io.BytesIO(picture(i))), i % 2


class Dicts(Pairs):
    def __getitem__(self, i):
        return {"image": np.zeros((1, 20, 20)), "key": f"k{i}", "score": 0.5 * i, "blob": [1]}


def test_map_style_pairs():
    source = open_source(Pairs())
    assert source.row(3) == {"key": "3", "label": 1, "label_name": "odd"}
    assert source.image(3).size == (8, 8)
    with pytest.raises(Undecodable, match=r"disk on fire"):
        source.image(4)
    assert source.row(4) == {"key": "4", "label": None, "label_name": None}
    assert source.describe()["name"].endswith("Pairs")
    with pytest.raises(ValueError, match=r"cannot be opened again.*pass it as data="):
        reopen_source(source.describe())


def test_map_style_dicts():
    source = open_source(Dicts())
    assert source.row(2) == {"key": "k2", "score": 1.0, "label": None, "label_name": None}
    assert source.image(2).shape == (1, 20, 20)


def test_other_objects_are_refused():
    with pytest.raises(ValueError, match=r"map-style data set with __len__.*got int"):
        open_source(3)
