"""Data sets on a real S3 server, by the commands: what is missing or denied is said."""

import uuid
from pathlib import Path

import pytest
from fake_model import objects
from test_sources import picture

import actstore
from actstore.cli import main
from actstore.sources import open_source
from actstore.storage import open_storage

s3fs = pytest.importorskip("s3fs")
pytestmark = pytest.mark.xdist_group("s3")
MODEL = ["--random-weights", "--device", "cpu"]
HARVEST = ["harvest", "--model", "toy/digits-1l", *MODEL, "--sites", "blocks.0.resid_post"]


@pytest.fixture
def server(s3, monkeypatch):
    """Put the credentials where the command line looks for them; return how to name the server."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3["secret"])
    s3fs.S3FileSystem.clear_instance_cache()
    yield ["--endpoint-url", s3["endpoint_url"]]
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def photos(s3):
    url = f"s3://bucket/{uuid.uuid4().hex}"
    storage = open_storage(url, s3)
    for i in range(12):
        storage.replace(f"{i:02d}.png", [picture(i, side=20)])
    return url


@pytest.fixture
def store(server, photos, tmp_path, capsys):
    """Return a local store of photos on S3, with a damaged shard; and that shard as it was."""
    out = str(tmp_path / "a")
    assert main([*HARVEST, "--data", photos, "--out", out, *server]) == 0
    shard = Path(actstore.open(out).shard("blocks.0.resid_post", "patch", 2).uri)
    before = objects(out, ".")
    shard.write_bytes(shard.read_bytes()[:-1])
    capsys.readouterr()
    return out, before


@pytest.mark.parametrize(
    "data", ["photos", "", "a.tar", "a-{0..3}.tar", "a.parquet", "*.parquet", "a.csv"]
)
def test_the_bucket_of_the_data_is_missing(server, data, tmp_path, capsys, s3):
    out = tmp_path / "a"
    assert main([*HARVEST, "--data", f"s3://no-such/{data}", "--out", str(out), *server]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: s3://no-such/")
    assert "bucket" in captured.err
    assert "check its spelling, and the storage option endpoint_url" in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not out.exists()


def test_a_bucket_without_the_data_is_not_said_to_be_missing(s3, photos):
    for name, kind in (("a.tar", "tar"), ("a.parquet", "parquet"), ("a.csv", "csv or tsv or")):
        with pytest.raises(FileNotFoundError, match=rf"{name}: no {kind}") as caught:
            open_source(f"{photos}/{name}", s3)
        assert "bucket 'bucket'" not in str(caught.value)


def test_verify_and_repair_read_the_data_on_s3_again(store, server, capsys):
    out, before = store
    assert main(["verify", out, "--against-model", "12", *MODEL, *server]) == 1
    assert f"repair: actstore repair {out} --parts 2" in capsys.readouterr().out
    assert main(["repair", out, *MODEL, *server]) == 0
    assert objects(out, ".") == before
    assert main(["verify", out, "--against-model", "12", *MODEL, *server]) == 0
    text = capsys.readouterr().out
    assert "every checksum fits" in text
    assert "│ 12 " in text


@pytest.mark.parametrize("command", [["verify", "--against-model", "4"], ["repair"]], ids=str)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("secret", "its storage denied access; check the credentials (storage options key and"),
        ("endpoint", "its storage cannot be reached (EndpointConnectionError); check the storage"),
        ("bucket", "s3://no-such/photos does not exist (The specified bucket does not exist)"),
        ("items", "the data set changed since the harvest: items was 12, is 11"),
    ],
)
def test_what_is_wrong_with_the_data_of_a_store(
    store, server, photos, s3, command, change, message, monkeypatch, capsys
):
    out, _ = store
    damaged = objects(out, ".")
    words = [command[0], out, *command[1:], *MODEL, *server]
    if change == "secret":
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-wrong-one")
    elif change == "endpoint":
        words[-1] = "http://127.0.0.1:9"
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    elif change == "bucket":
        words += ["--data", "s3://no-such/photos"]
    else:
        open_storage(photos, s3).delete("03.png")
    assert main(words) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert s3["secret"] not in err
    assert "the-wrong-one" not in err
    assert objects(out, ".") == damaged
