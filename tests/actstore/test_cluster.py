"""Real worker processes of a dask.distributed cluster, one killed while it works."""

import asyncio
import http.server
import io
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from fake_model import objects
from PIL import Image

import actstore
from actstore.cli import main
from actstore.cluster import harvest_on
from actstore.scheduler import connect
from actstore.verify import verify

distributed = pytest.importorskip("distributed")
dask = pytest.importorskip("dask")

WHAT = {
    "model": "toy/digits-2l",
    "data": "digits",
    "sites": "blocks.*.resid_post",
    "limit": 1600,
    "batch_size": 16,
}


@pytest.fixture(scope="module")
def cluster():
    with dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        made = distributed.LocalCluster(
            n_workers=3,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",  # any free port: tests run side by side
            memory_limit="4GiB",
        )
        with made, distributed.Client(made, set_as_default=False) as client:
            yield client


def test_a_worker_killed_in_the_middle_changes_no_byte(cluster, tmp_path):
    actstore.harvest(out=tmp_path / "one", device="cpu", **WHAT)
    processes = cluster.run(os.getpid)
    assert len(set(processes.values())) == 3
    killed, events = [], []

    def watch(event):
        events.append(event)
        if event.kind == "part" and not killed:
            busy = {worker: keys for worker, keys in cluster.processing().items() if keys}
            victim = next((worker for worker in processes if worker in busy), None)
            if victim is not None:  # on a slow machine none may be busy at this instant
                os.kill(processes[victim], signal.SIGKILL)
                killed.append(victim)

    store = harvest_on(cluster, out=tmp_path / "many", device="cpu", on_event=watch, **WHAT)
    assert len(killed) == 1
    assert store.is_complete
    assert verify(store) == []
    assert events[0].kind == "plan"
    assert events[-1].kind == "finished"
    assert sum(e.items for e in events if e.kind == "items") == 1600
    parts = [e.part for e in events if e.kind == "part"]
    assert sorted(parts) == list(range(store.manifest.n_parts))
    for folder in ("acts", "parts", "stats"):
        assert objects(tmp_path / "many", folder) == objects(tmp_path / "one", folder)
    assert actstore.open(tmp_path / "many").table() == actstore.open(tmp_path / "one").table()


def test_the_command_goes_on_with_what_is_missing(cluster, tmp_path, capsys):
    out = str(tmp_path / "a")
    words = ["harvest", "--model", "toy/digits-2l", "--data", "digits", "--limit", "64"]
    words += ["--sites", "blocks.0.resid_post", "--device", "cpu", "--out", out]
    words += ["--scheduler", cluster.scheduler.address]
    assert main(words) == 0
    before = objects(out)
    assert "64 items, complete, 0 skipped" in capsys.readouterr().out
    store = actstore.open(out)
    for part in (1, 4):
        os.unlink(store.storage.uri(f"parts/{part:05d}.json"))
        os.unlink(store.shard("blocks.0.resid_post", "cls", part).uri)
    assert main(words) == 0
    assert f"resuming: {store.manifest.n_parts - 2} of" in capsys.readouterr().out
    assert objects(out) == before


def test_scales_are_decided_once_by_the_client(cluster, tmp_path):
    options = {**WHAT, "limit": 300, "dtype": "int8", "tokens_per_item": 5, "device": "cpu"}
    one = actstore.harvest(out=tmp_path / "one", **options)
    store = harvest_on(cluster, out=tmp_path / "many", **options)
    assert store.manifest.scales
    assert store.fingerprint == one.fingerprint
    for folder in ("acts", "position", "parts", "stats"):
        assert objects(store.url, folder) == objects(one.url, folder)


def test_skipped_items_are_reported(cluster, tmp_path):
    from PIL import Image

    (tmp_path / "in").mkdir()
    for i in range(20):
        Image.new("L", (20, 20), i).save(tmp_path / f"in/{i:02d}.png")
    (tmp_path / "in/07.png").write_bytes(b"no image")
    skipped = []
    options = {**WHAT, "data": str(tmp_path / "in"), "limit": None, "device": "cpu"}

    def watch(event):
        if event.kind == "skipped":
            skipped.append((event.key, event.message[:17]))

    store = harvest_on(cluster, out=tmp_path / "a", on_event=watch, **options)
    assert skipped == [("07.png", "cannot be decoded")]
    assert store.is_complete
    assert store.n_items == 19
    with pytest.raises(ValueError, match=r"part \d+: item 7 \(07.png\) cannot be decoded"):
        harvest_on(cluster, out=tmp_path / "b", strict=True, **options)


class Elsewhere:
    """A data set that a worker finds changed."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        from PIL import Image

        return Image.new("L", (20, 20), i), i % 10

    def __getstate__(self):
        return {"length": self.length + 1}


def test_a_worker_that_sees_something_else_refuses(cluster, tmp_path):
    options = {**WHAT, "data": Elsewhere(20), "limit": None, "device": "cpu"}
    with pytest.raises(ValueError, match=r"data set changed since the harvest: items was 20, is 2"):
        harvest_on(cluster, out=tmp_path / "a", **options)
    with pytest.raises(ValueError, match=r"must be a name that workers can load, not Elsewhere"):
        harvest_on(cluster, out=tmp_path / "a", **{**WHAT, "model": Elsewhere(1)})


def test_no_scheduler(cluster):
    from actstore import cluster as module

    with pytest.raises(ValueError, match=r"no dask scheduler answers at 'tcp://127.0.0.1:9'"):
        module.connect("tcp://127.0.0.1:9", wait=1)
    with pytest.raises(ValueError, match=r"no dask scheduler answers at 'nonsense"):
        module.connect("nonsense://x", wait=1)
    with pytest.raises(ValueError, match=r"'nowhere' is no address; it looks like tcp://host"):
        module.connect("nowhere")
    worker = next(iter(cluster.scheduler_info(n_workers=-1)["workers"]))
    with pytest.raises(ValueError, match=r"is a dask worker and no scheduler: `dask scheduler`"):
        module.connect(worker, wait=10)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(ValueError, match=rf"no dask scheduler answers at '{address}' within"):
            module.connect(address, wait=1)


def test_a_scheduler_is_reached_from_within_an_event_loop(cluster):
    async def notebook():
        client = connect(cluster.scheduler.address)
        await asyncio.to_thread(client.close)

    asyncio.run(notebook())


@pytest.mark.parametrize("command", ["harvest", "stats"])
def test_a_scheduler_that_does_not_answer_is_one_line(command, tmp_path):
    """In a process of its own: what a client leaves behind is printed when Python ends."""
    code = (
        "import sys\nfrom actstore import cluster\ncluster.connect.__kwdefaults__['wait'] = 1\n"
        "from actstore.cli import main\nsys.exit(main())"
    )
    out = str(tmp_path / "a")
    harvest = ["harvest", "--model", "toy/digits-1l", "--data", "digits", "--limit", "8"]
    harvest += ["--sites", "logits", "--device", "cpu", "--out", out]
    if command == "stats":
        assert main(harvest) == 0
    words = harvest if command == "harvest" else ["stats", out]
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"tcp://127.0.0.1:{closed.getsockname()[1]}"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--scheduler", address],
        capture_output=True, text=True, check=False, timeout=50,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"error: no dask scheduler answers at '{address}' within 1 s: start one with "
        "`dask scheduler`, workers with `dask worker ADDRESS --nthreads 2`\n"
    )


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one image under any name; `broken` ones give an error of the server."""

    image = b""

    def do_GET(self):
        broken = "broken" in self.path
        self.send_response(500 if broken else 200)
        body = b"" if broken else self.image
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *words):
        pass


def test_what_cannot_be_reached_stops_a_cluster_or_is_skipped_on_request(cluster, tmp_path, capsys):
    pytest.importorskip("aiohttp")
    sink = io.BytesIO()
    Image.new("L", (20, 20), 7).save(sink, "PNG")
    Server.image = sink.getvalue()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            names = ["broken.png" if i == 7 else f"{i}.png" for i in range(20)]
            rows = [f"http://127.0.0.1:{server.server_port}/{name}" for name in names]
            (tmp_path / "list.csv").write_text("\n".join(["url", *rows]))
            words = ["harvest", "--model", "toy/digits-2l", "--data", str(tmp_path / "list.csv")]
            words += ["--sites", "blocks.0.resid_post", "--device", "cpu", "--batch-size", "4"]
            words += ["--out", str(tmp_path / "a"), "--scheduler", cluster.scheduler.address]
            assert main(words) == 1
            err = capsys.readouterr().err
            assert "the storage of the data failed at item 7" in err
            assert "broken.png cannot be fetched: 500" in err
            assert "or with --skip-unreachable, which leaves such items out" in err
            assert main([*words, "--skip-unreachable"]) == 0
            text = capsys.readouterr().out
        finally:
            server.shutdown()
            thread.join()
    assert f"skipped {rows[7]}: broken.png cannot be fetched: 500" in text
    assert "19 items, complete, 1 skipped in this run" in text
    store = actstore.open(tmp_path / "a")
    assert store.is_complete
    statuses = {row["key"]: row["status"] for row in store.index().to_pylist()}
    assert [key for key, status in statuses.items() if status != "ok"] == [rows[7]]
