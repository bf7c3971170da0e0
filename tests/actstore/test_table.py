"""Tables of paths and URLs: rows, labels, columns, relative and foreign places, skipped rows."""

import functools
import http.server
import json
import pickle
import threading

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_model import FakeModel
from PIL import Image
from test_sources import picture

import actstore
from actstore.sources import Undecodable, Unreachable, fetch, open_source, reopen_source, table
from actstore.verify import skipped


@pytest.fixture
def images(tmp_path):
    for i in range(4):
        (tmp_path / "img").mkdir(exist_ok=True)
        (tmp_path / f"img/{i}.png").write_bytes(picture(i))
    return tmp_path


CSV = """path,label,author,score,status
img/0.png,dog,"Ann, the
first",0.5,new
img/1.png,cat,Bob,1,old
img/gone.png,dog,Cid,,new
,cat,Dan,2,new
"""


def test_csv(images):
    (images / "list.csv").write_text(CSV)
    source = open_source(images / "list.csv")
    assert len(source) == 4
    assert source.row(0) == {
        "key": "img/0.png",
        "label": 1,
        "label_name": "dog",
        "author": "Ann, the\nfirst",
        "score": 0.5,
        "column_status": "new",
    }
    assert [source.row(i)["label"] for i in range(4)] == [1, 0, 1, 0]
    assert source.row(3)["key"] == "row-3"
    truth = Image.open(images / "img/1.png")
    assert (np.asarray(source.image(1)) == np.asarray(truth)).all()
    with pytest.raises(Undecodable, match=r"file is missing"):
        source.image(2)
    with pytest.raises(Undecodable, match=r"names no image"):
        source.image(3)
    described = json.loads(json.dumps(source.describe()))
    assert reopen_source(described).describe() == described
    assert pickle.loads(pickle.dumps(source)).row(1) == source.row(1)


def test_a_changed_table_is_noticed(images):
    (images / "list.csv").write_text(CSV)
    before = open_source(images / "list.csv").describe()
    (images / "list.csv").write_text(CSV.replace("img/1", "img/2"))
    with pytest.raises(ValueError, match=r"data set changed since the harvest: fingerprint"):
        reopen_source(before)


def test_parquet_with_numbers_and_names(images):
    columns = {
        "url": [f"file://{images}/img/{i}.png" for i in range(3)],
        "key": [7, 8, 9],
        "label": pa.array([2, None, 0], pa.int32()),
        "label_name": ["two", None, "zero"],
        "when": pa.array([0, 1, 2], pa.timestamp("ms")),
        "box": [[0, 1], [2, 3], None],
    }
    pq.write_table(pa.table(columns), images / "list.parquet")
    source = open_source(f"file://{images}/list.parquet")
    assert source.describe()["kind"] == "table"
    row = {"key": "7", "label": 2, "label_name": "two", "when": "1970-01-01 00:00:00.000"}
    assert source.row(0) == row
    assert source.row(1)["label"] is None
    assert source.image(2).size == (8, 8)


def test_several_tables_and_tsv(images):
    (images / "a-0.tsv").write_text("file_name\tlabel\nimg/0.png\t5\n")
    (images / "a-1.tsv").write_text("file_name\tlabel\nimg/3.png\t6\n")
    source = open_source(images / "a-{0..1}.tsv")
    assert [source.row(i)["label"] for i in range(2)] == [5, 6]
    assert source.image(1).size == (8, 8)


def test_what_is_no_table_lists_its_columns(images):
    (images / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(ValueError, match=r"path, url, file_name must.*its columns are x: int64"):
        open_source(images / "a.csv")
    pq.write_table(pa.table({"path": [1, 2]}), images / "a.parquet")
    with pytest.raises(ValueError, match=r"none of strings called path.*columns are path: int64"):
        open_source(images / "a.parquet")
    (images / "b.csv").write_text("path,x\na,b,c\n")
    with pytest.raises(ValueError, match=r"b.csv cannot be read as a table"):
        open_source(images / "b.csv")
    with pytest.raises(FileNotFoundError, match=r"c.csv: no csv or tsv or parquet file"):
        open_source(images / "c.csv")


def test_a_table_from_elsewhere_names_no_local_file(images):
    memory = fsspec.filesystem("memory")
    rows = ["path", "img/0.png", "../up.png", f"{images}/img/0.png", f"file://{images}/img/0.png"]
    rows += ["memory://lists/img/0.png", "ssh://host/x.png", "simplecache::memory://x.png"]
    memory.pipe("/lists/a.csv", "\n".join(rows).encode())
    memory.pipe("/lists/img/0.png", picture(0))
    memory.pipe("/up.png", picture(1))
    source = open_source("memory://lists/a.csv")
    assert source.image(0).size == (8, 8)
    assert source.image(4).size == (8, 8)
    reasons = {1: "leaves the folder", 2: "may not name files", 3: "may not name files"}
    for index, reason in {**reasons, 5: "ssh:// is none of", 6: "is none of"}.items():
        with pytest.raises(Undecodable, match=reason):
            source.image(index)


class Handler(http.server.SimpleHTTPRequestHandler):
    failures = 0

    def do_GET(self):
        if "flaky" in self.path and type(self).failures < 2:
            type(self).failures += 1
            self.send_error(503)
        elif "gone" in self.path:
            self.send_error(410)
        elif "denied" in self.path:
            self.send_error(403)
        elif "broken" in self.path:
            self.send_error(500)
        else:
            super().do_GET()

    def log_message(self, *words):
        pass


def test_urls_are_fetched_again_before_the_server_is_given_up(images, monkeypatch):
    pytest.importorskip("aiohttp")
    (images / "img/flaky.png").write_bytes(picture(9))
    handler = functools.partial(Handler, directory=str(images))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            base = f"http://127.0.0.1:{server.server_port}/img"
            names = ["1.png", "flaky.png", "broken.png?token=hidden", "none.png", "gone.png"]
            lines = ["url", *(f"{base}/{name}" for name in names)]
            (images / "list.csv").write_text("\n".join(lines))
            source = open_source(images / "list.csv")
            assert source.image(0).size == (8, 8)
            assert source.image(1).size == (8, 8)
            assert Handler.failures == 2
            with pytest.raises(Unreachable, match=r"broken.png cannot be fetched: 500") as caught:
                source.image(2)
            assert "hidden" not in str(caught.value)
            assert source.row(2)["key"] == f"{base}/broken.png"
            with pytest.raises(Undecodable, match=r"file is missing"):
                source.image(3)
            with pytest.raises(Undecodable, match=r"not to be had: the server says 410"):
                source.image(4)
        finally:
            server.shutdown()
            thread.join()


def test_large_files_and_tables_are_refused(images, monkeypatch):
    (images / "list.csv").write_text(CSV)
    source = open_source(images / "list.csv")
    monkeypatch.setattr(table, "MAX_IMAGE", 20)
    with pytest.raises(Undecodable, match=r"more than 20 bytes"):
        source.image(0)
    monkeypatch.setattr(table, "MAX_TABLE", 20)
    with pytest.raises(ValueError, match=r"tables have at most 20"):
        open_source(images / "list.csv")


@pytest.fixture
def server(images, monkeypatch):
    """Address of a server of the images; whatever is called denied it denies."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(fetch, "PAUSE", 0.0)
    handler = functools.partial(Handler, directory=str(images))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()
        thread.join()


def listed(images, rows):
    (images / "list.csv").write_text("\n".join(["url", *rows]))
    return open_source(images / "list.csv")


@pytest.mark.parametrize("place", [0, 2, 4], ids=["first", "middle", "last"])
def test_one_item_that_is_denied_is_skipped(images, server, place, tmp_path):
    rows = [f"{server}/img/{i}.png" for i in (0, 1, 2, 0)]
    rows.insert(place, f"{server}/img/denied.png?token=hidden")
    source = listed(images, rows)
    message = r"denied.png cannot be fetched: 403 Forbidden, and the server gives others"
    with pytest.raises(Undecodable, match=message) as caught:
        source.image(place)
    assert "hidden" not in str(caught.value)
    store = actstore.harvest(
        model=FakeModel(), data=source, sites="logits", out=tmp_path / "a", batch_size=2
    )
    assert store.n_items == 4
    assert [reason.partition(":")[0] for reason in skipped(store)] == [
        "denied.png cannot be fetched"
    ]


def test_a_server_that_denies_everything_stops_a_harvest(images, server, tmp_path, monkeypatch):
    rows = [f"{server}/denied/{i}.png" for i in range(20)]
    other = server.replace("127.0.0.1", "localhost")
    source = listed(images, [*rows, f"{other}/img/0.png", f"{other}/img/none.png"])
    assert source.image(20).size == (8, 8), "another server does give"
    with pytest.raises(Unreachable, match=r"item \d+ .*403 Forbidden; what was committed stays"):
        actstore.harvest(model=FakeModel(), data=source, sites="logits", out=tmp_path / "a")
    asked: list[str] = []
    monkeypatch.setattr(source, "_fetch", lambda fs, path: _denied(asked, path))
    for row in (3, 4):
        with pytest.raises(Unreachable):
            source.image(row)
    assert len(asked) == 2, "a server that gives nothing is not asked for others again"


def _denied(asked, path):
    asked.append(path)
    raise fetch.Denied(path)
