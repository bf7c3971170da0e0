"""Stores on a real S3 server; see `s3_server`."""

import pickle
import time
import uuid

import numpy as np
import pytest
from fake_model import FakeModel
from test_storage import Conformance

import actstore
from actstore.remote import S3Storage, _classified, obstore_config
from actstore.repair import repair
from actstore.sources import open_source
from actstore.storage import open_storage
from actstore.verify import verify

SITE = "blocks.1.resid_post"
pytestmark = pytest.mark.xdist_group("s3")


@pytest.fixture
def place():
    return f"s3://bucket/{uuid.uuid4().hex}"


class TestS3(Conformance):
    @pytest.fixture
    def storage(self, s3, place):
        return open_storage(place, s3)

    def test_pickles(self, storage):
        storage.replace("x", [b"1"])
        assert pickle.loads(pickle.dumps(storage)).read("x") == b"1"


def harvest(out, **options):
    given = {"data": "digits", "sites": SITE, "limit": 60, "batch_size": 8}
    return actstore.harvest(model=FakeModel(), out=out, **{**given, **options})


def test_a_harvest_to_s3_equals_a_local_one(s3, place, tmp_path):
    there = harvest(f"{place}/a", storage_options=s3, memory=10**6)
    here = harvest(tmp_path / "a", memory=10**6)
    for kind in ("cls", "patch"):
        assert (there.array(SITE, kind)[:] == here.array(SITE, kind)[:]).all()
        assert (there.dask(SITE, kind).compute() == here.dask(SITE, kind).compute()).all()
        mean = there.stats(SITE, kind).mean
        np.testing.assert_array_equal(mean, here.stats(SITE, kind).mean)
    assert there.table().equals(here.table())
    assert verify(there) == []
    again = actstore.open(f"{place}/a", s3)
    assert again.is_complete
    batch = next(again.batches(SITE, 64, tokens="patch"))
    assert len(batch.acts) == 64


def test_damage_on_s3_is_found_and_repaired(s3, place):
    store = harvest(f"{place}/a", storage_options=s3)
    shard = store.shard(SITE, "patch", 2)
    before = store.storage.read(shard.path)
    store.storage.replace(shard.path, [before[:-1] + b"x"])
    store.storage.delete(store.shard(SITE, "cls", 4).path)
    assert [problem.part for problem in verify(store)] == [2, 4]
    again = repair(store, FakeModel(), open_source("digits"), [2, 4])
    assert verify(again) == []
    assert store.storage.read(shard.path) == before


def test_resume_on_s3(s3, place):
    store = harvest(f"{place}/a", storage_options=s3)
    for part in (0, 3):
        store.storage.delete(f"parts/{part:05d}.json")
    assert actstore.open(f"{place}/a", s3).missing_parts == (0, 3)
    assert harvest(f"{place}/a", storage_options=s3).is_complete
    with pytest.raises(ValueError, match=r"(?s)holds another store.*dtype"):
        harvest(f"{place}/a", storage_options=s3, dtype="float32")


def test_stripes_on_s3_are_large(s3, place, tmp_path):
    there = harvest(f"{place}/a", storage_options=s3)
    assert there.spec(SITE, "patch").stripe_tokens == 25, "as large as so few items allow"
    assert harvest(tmp_path / "a").spec(SITE, "patch").stripe_tokens == 1


def test_no_credential_reaches_the_store(s3, place):
    store = harvest(f"{place}/a", storage_options=s3)
    for path in ("zarr.json", "parts/00000.json", "index.parquet"):
        data = store.storage.read(path)
        assert s3["secret"].encode() not in data
        assert s3["key"].encode() not in data
    assert s3["secret"] not in repr(store)
    assert s3["secret"] not in repr(store.storage)


@pytest.mark.parametrize(
    ("url", "change", "error", "message"),
    [
        ("s3://no-such-bucket/a", {}, ValueError, r"there is no bucket 'no-such-bucket' at http"),
        ("s3://bucket/a", {"secret": "wrong"}, PermissionError, r"denied access; check the cred"),
        ("s3://bucket/a", {"key": "nobody"}, PermissionError, r"denied access"),
        (
            "s3://bucket/a",
            {"key": "stranger", "secret": "stranger"},
            PermissionError,
            r"denied access",
        ),
        (
            "s3://bucket/a",
            {"endpoint_url": "http://127.0.0.1:9", "retries": 0},
            ConnectionError,
            r"no S3 server answers at http://127.0.0.1:9; check the storage option endpoint_url",
        ),
        ("s3://bucket/a", {}, FileNotFoundError, r"no store at s3://bucket/a"),
        ("s3://", {}, ValueError, r"names no bucket"),
        ("s3://bucket/a", {"colour": "red"}, ValueError, r"\['colour'\] are not known; allowed"),
    ],
)
def test_errors_say_what_is_wrong_and_no_secret(s3, url, change, error, message):
    options = {**s3, **change}
    with pytest.raises(error, match=message) as caught:
        actstore.open(url, options)
    chain = [caught.value, caught.value.__cause__]
    if not caught.value.__suppress_context__:
        chain.append(caught.value.__context__)
    for one in chain:
        assert options["secret"] not in str(one)
        assert options["key"] == "stranger" or options["key"] not in str(one)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("<Code>ExpiredToken</Code>", PermissionError, "credentials have expired"),
        (
            "status code: 503 <Code>SlowDown</Code>",
            OSError,
            "throttles requests and 3 attempts did not help",
        ),
        ("operation timed out", TimeoutError, "did not answer within 60s"),
        ("<Code>InternalError</Code> key=AKIA", OSError, "a request to here failed"),
    ],
)
def test_answers_that_a_healthy_server_does_not_give(text, error, message):
    found = _classified(text, "s3://b/x", "here", 3)
    assert type(found) is error
    assert message in str(found)
    assert "AKIA" not in str(found)


def test_options_of_s3fs_are_understood(monkeypatch):
    monkeypatch.delenv("AWS_REGION", raising=False)
    given = {"key": "k", "secret": "s", "token": "t", "client_kwargs": {"endpoint_url": "http://h"}}
    assert obstore_config(given) == {
        "endpoint": "http://h",
        "access_key_id": "k",
        "secret_access_key": "s",
        "session_token": "t",
        "region": "us-east-1",
    }
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://env")
    assert obstore_config({"anon": True})["skip_signature"] is True
    assert obstore_config({})["endpoint"] == "http://env"


def test_a_failing_upload_commits_nothing_and_resumes(s3, place, monkeypatch, tmp_path):
    real, left = S3Storage.replace, [20]

    def fails(self, path, pieces):
        left[0] -= 1
        if left[0] < 0:
            raise ConnectionError("the network is gone")
        real(self, path, pieces)

    monkeypatch.setattr(S3Storage, "replace", fails)
    with pytest.raises(ConnectionError, match=r"network is gone"):
        harvest(f"{place}/a", storage_options=s3)
    monkeypatch.setattr(S3Storage, "replace", real)
    before = actstore.open(f"{place}/a", s3)
    assert 0 < before.n_items < 60
    assert verify(before) == []
    whole = harvest(tmp_path / "whole")
    store = harvest(f"{place}/a", storage_options=s3)
    for kind in ("cls", "patch"):
        assert (store.array(SITE, kind)[:] == whole.array(SITE, kind)[:]).all()


def test_a_cached_store_outlives_its_shards(s3, place, tmp_path):
    harvest(f"{place}/a", storage_options=s3)
    plain = actstore.open(f"{place}/a", s3)
    expected = [b.acts for b in plain.batches(SITE, 64, tokens="patch")]
    store = actstore.open(f"{place}/a", s3, cache_dir=tmp_path, cache_bytes=10**8)
    for _ in store.batches(SITE, 64, tokens="patch"):
        pass
    deadline = time.monotonic() + 20
    while len(list(tmp_path.rglob(f"{SITE}.*"))) < store.manifest.n_parts:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for part in range(store.manifest.n_parts):
        plain.storage.delete(store.shard(SITE, "patch", part).path)
    again = actstore.open(f"{place}/a", s3, cache_dir=tmp_path, cache_bytes=10**8)
    found = [b.acts for b in again.batches(SITE, 64, tokens="patch")]
    assert all((a == b).all() for a, b in zip(expected, found, strict=True))
    assert s3["secret"] not in repr(again.storage)
    assert pickle.loads(pickle.dumps(again.storage)).size("zarr.json") == store.storage.size(
        "zarr.json"
    )
