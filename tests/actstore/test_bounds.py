"""Small files that unpack to a lot are refused before the memory is taken."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_model import FakeModel
from PIL import Image
from test_sources import picture, write_parquet
from test_webdataset import write_tar

import actstore
from actstore.sources import Undecodable, bounded, open_source, table
from actstore.verify import skipped

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def bomb() -> bytes:
    """Return 10 kB that are an image of 81 million pixels."""
    sink = io.BytesIO()
    Image.new("1", (9000, 9000)).save(sink, "PNG")
    return sink.getvalue()


def sources(tmp_path, content):
    """Make a data set of every kind that holds an image beside a harmless one."""
    (tmp_path / "folder").mkdir()
    files = {"0.png": content, "1.png": picture(1)}
    for name, data in files.items():
        (tmp_path / "folder" / name).write_bytes(data)
    (tmp_path / "folder/list.csv").write_text("path\n0.png\n1.png\n")
    write_tar(tmp_path / "a.tar", list(files.items()))
    cells = [{"bytes": data, "path": name} for name, data in files.items()]
    pq.write_table(pa.table({"image": pa.array(cells, IMAGE)}), tmp_path / "a.parquet")
    plain = pa.table({"img": pa.array(list(files.values()), pa.large_binary())})
    pq.write_table(plain, tmp_path / "b.parquet")
    return [tmp_path / n for n in ("folder", "folder/list.csv", "a.tar", "a.parquet", "b.parquet")]


def test_every_source_refuses_an_image_of_too_many_pixels(tmp_path):
    content = bomb()
    assert len(content) < 20_000
    for url in sources(tmp_path, content):
        source = open_source(url)
        with pytest.raises(Undecodable, match=r"9000 x 9000 pixels, at most 67108864|limit"):
            source.image(0)
        assert source.image(1).size == (8, 8)


def test_a_harvest_skips_a_bomb_in_parquet_and_says_so(tmp_path):
    cells = [{"bytes": bomb() if i == 3 else picture(i), "path": f"{i}.png"} for i in range(8)]
    pq.write_table(pa.table({"image": pa.array(cells, IMAGE)}), tmp_path / "a.parquet")
    store = actstore.harvest(
        model=FakeModel(), data=tmp_path / "a.parquet", sites="blocks.1.resid_post",
        out=tmp_path / "a", batch_size=4,
    )  # fmt: skip
    assert store.n_items == 7
    assert [reason[:19] for reason in skipped(store)] == ["9000 x 9000 pixels,"]


def test_a_row_group_that_says_it_is_too_large_is_refused_when_the_file_is_opened(
    tmp_path, monkeypatch
):
    write_parquet(tmp_path / "a.parquet", 0, 8, groups=2)
    monkeypatch.setattr(bounded, "MAX_GROUP", 800)
    message = (
        r"a.parquet: row group 0 of 2 unpacks to [\d,]+ bytes, [\d,]+ of them in column "
        r"'image.bytes'; at most 800 a row group are read: write the file anew with smaller"
    )
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "a.parquet")


def test_columns_that_are_not_read_do_not_count(tmp_path, monkeypatch):
    cells = pa.array([{"bytes": picture(i), "path": f"{i}.png"} for i in range(4)], IMAGE)
    large = pa.array([[0.5 * j for j in range(1000 * i, 1000 * i + 1000)] for i in range(4)])
    pq.write_table(pa.table({"image": cells, "embedding": large}), tmp_path / "a.parquet")
    monkeypatch.setattr(bounded, "MAX_GROUP", 5000)
    assert open_source(tmp_path / "a.parquet").image(2).size == (8, 8)


@pytest.mark.parametrize("kind", [IMAGE, pa.binary()], ids=str)
def test_a_value_that_is_named_many_times_is_not_unpacked_as_often(tmp_path, monkeypatch, kind):
    """A dictionary holds the value once; the sizes of the file know nothing of the rest."""
    monkeypatch.setattr(bounded, "MAX_GROUP", 8 << 20)
    value = picture(0) + bytes(500_000)
    cells = [{"bytes": value, "path": "x"} if kind == IMAGE else value] * 2000
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    usual = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(pool)
    try:
        source = open_source(tmp_path / "a.parquet")
        message = r"row group 0 of a.parquet unpacks to more than the 8,388,608 bytes"
        with pytest.raises(Undecodable, match=message):
            source.image(0)
    finally:
        pa.set_memory_pool(usual)
    assert source.row(0)["key"] == "row-0"
    assert 1 << 20 < pool.max_memory() < 64 << 20, "all would be a gigabyte"


def test_steps_give_the_rows_of_the_whole_group(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", 0, 40, groups=2, bad=(3, 21))
    file = pq.ParquetFile(tmp_path / "a.parquet")
    monkeypatch.setattr(bounded, "MAX_ROWS", 7)
    columns = ["image.bytes", "image.path", "label", "author"]
    for group in range(2):
        whole = file.read_row_group(group, ["image", "label", "author"])
        assert bounded.read_group(file, "a", group, columns).equals(whole)
    source = open_source(tmp_path / "a.parquet")
    for i in (0, 19, 20, 39):
        assert source.row(i)["author"] == f"p{i}"
        assert np.asarray(source.image(i)).shape == (8, 8, 3)


def test_a_table_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(picture(0))
    rows = pa.table({"path": ["x.png"] * 50_000, "note": ["a long remark " * 100] * 50_000})
    pq.write_table(rows, tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    assert len(open_source(tmp_path / "a.parquet")) == 50_000
    monkeypatch.setattr(table, "MAX_TABLE", 4 << 20)
    with pytest.raises(ValueError, match=r"a.parquet unpacks to more than 4,194,304 bytes, the mo"):
        open_source(tmp_path / "a.parquet")
    monkeypatch.setattr(bounded, "MAX_GROUP", 100)
    with pytest.raises(ValueError, match=r"a.parquet: row group 0 of 1 unpacks to .*'note'|'path'"):
        open_source(tmp_path / "a.parquet")
