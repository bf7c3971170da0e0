"""WebDataset tars on a real S3 server: indexed once, then an item a request."""

import threading
import uuid

import pytest
from fake_model import FakeModel
from test_webdataset import sample, write_tar

import actstore
from actstore.sources import open_source, reopen_source
from actstore.storage import open_storage

pytestmark = pytest.mark.xdist_group("s3")
SITE = "blocks.1.resid_post"
NOWHERE = {
    "endpoint_url": "http://127.0.0.1:9",
    "config_kwargs": {"retries": {"total_max_attempts": 1}},
}


@pytest.fixture(scope="module")
def tars(s3, tmp_path_factory):
    """The same tars in a folder and in a bucket."""
    here = tmp_path_factory.mktemp("tars")
    place = f"s3://bucket/{uuid.uuid4().hex}"
    there = open_storage(place, s3)
    for shard in range(2):
        files = [entry for i in range(shard * 6, shard * 6 + 6) for entry in sample(i)]
        path = here / f"train-{shard:03d}.tar"
        write_tar(path, files)
        there.replace(path.name, [path.read_bytes()])
    return here, place


def test_the_same_items_as_from_a_folder(s3, tars):
    here, place = tars
    near = open_source(here / "train-{000..001}.tar")
    far = open_source(f"{place}/train-{{000..001}}.tar", s3)
    assert len(far) == len(near) == 12
    for i in range(12):
        assert far.row(i) == near.row(i)
        assert far.image(i).tobytes() == near.image(i).tobytes()
    assert far.describe()["fingerprint"] == near.describe()["fingerprint"]
    assert len(open_source(f"{place}/train-*.tar", s3)) == 12
    assert len(open_source(f"{place}/train-001.tar", s3)) == 6
    again = reopen_source(far.describe(), s3)
    assert again.row(11) == near.row(11)
    words = str(far.describe())
    assert s3["secret"] not in words
    assert s3["key"] not in words


def test_an_item_is_one_request_and_threads_may_ask(s3, tars, monkeypatch):
    far = open_source(f"{tars[1]}/train-{{000..001}}.tar", s3)
    asked = []
    real = far._fs.cat_file

    def counted(path, **options):
        asked.append(path)
        return real(path, **options)

    monkeypatch.setattr(far._fs, "cat_file", counted)
    for i in (7, 2, 11):
        far.row(i)
        far.image(i)
    assert len(asked) == 3
    found = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: far.image(i).tobytes()}))
        for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    near = open_source(tars[0] / "train-{000..001}.tar")
    assert found == {i: near.image(i).tobytes() for i in range(12)}


def test_a_harvest_from_tars_on_s3_to_s3(s3, tars, tmp_path):
    here, place = tars
    given = {"model": FakeModel(), "sites": SITE, "batch_size": 4, "memory": 10**6}
    near = actstore.harvest(data=str(here / "train-{000..001}.tar"), out=tmp_path / "a", **given)
    far = actstore.harvest(
        data=f"{place}/train-{{000..001}}.tar", out=f"{place}/a", storage_options=s3, **given
    )
    for kind in ("cls", "patch"):
        assert (far.array(SITE, kind)[:] == near.array(SITE, kind)[:]).all()
    assert far.table().equals(near.table())
    assert s3["secret"].encode() not in far.storage.read("zarr.json")


@pytest.mark.parametrize(
    ("url", "change", "error", "message"),
    [
        ("{}/none.tar", {}, FileNotFoundError, r"none.tar: no tar file there"),
        (
            "s3://no-such-bucket/a.tar",
            {},
            FileNotFoundError,
            r"a.tar: there is no bucket 'no-such-",
        ),
        ("{}/train-000.tar", {"secret": "wrong"}, PermissionError, r"denied access; check the cr"),
        ("{}/train-*.tar", {"secret": "wrong"}, PermissionError, r"denied access; check the cred"),
        (
            "{}/train-000.tar",
            NOWHERE,
            ConnectionError,
            r"cannot be reached \(.*option endpoint_url",
        ),
        ("{}/", {"secret": "wrong"}, PermissionError, r"denied access; check the credentials"),
        ("{}/", NOWHERE, ConnectionError, r"cannot be reached \(.*option endpoint_url"),
        ("{}/a.parquet", {"secret": "wrong"}, PermissionError, r"denied access; check the cred"),
    ],
)
def test_what_is_wrong_is_said(s3, tars, url, change, error, message):
    with pytest.raises(error, match=message) as caught:
        open_source(url.format(tars[1]), {**s3, **change})
    assert s3["secret"] not in str(caught.value)
