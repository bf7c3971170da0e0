"""No password and no key of a signed request is written down or repeated, wherever it stands."""

import pytest

import actstore
from actstore.credentials import public
from actstore.sources import open_source

SECRET = "hidden-of-nobody"
QUERIES = [
    f"X-Amz-Credential=me&X-Amz-Signature={SECRET}",
    f"AWSAccessKeyId=me&Signature={SECRET}",
    f"sv=2022&sig={SECRET}",
    f"token={SECRET}",
    f"access_token={SECRET}",
]


@pytest.mark.parametrize(
    "name",
    [
        "{}/photos", "{}/photos/", "{}/train-*.parquet", "{}/a.parquet", "{}/a.tar",
        "{}/train-{{000..003}}.tar", "{}/list.csv", "{}/list.tsv", "video:{}/clips",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "root",
    [
        f"https://me:{SECRET}@host.example", f"s3://me:{SECRET}@bucket",
        f"s3://me:with/{SECRET}@bucket", f"ftp://me:{SECRET}@host.example",
    ],
)  # fmt: skip
def test_a_data_set_with_a_password_in_its_url(name, root):
    with pytest.raises(ValueError, match=r"holds credentials.*as storage options") as caught:
        open_source(name.format(root))
    _says_nothing(caught.value)


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("name", ["photos", "a.parquet", "a.tar", "list.csv"])
def test_a_data_set_with_a_signed_url(name, query):
    for url in (f"https://host.example/{name}?{query}", f"s3://bucket/{name}?{query}"):
        with pytest.raises(ValueError, match=r"holds credentials") as caught:
            open_source(url)
        _says_nothing(caught.value)


@pytest.mark.parametrize("query", QUERIES)
def test_a_video_with_a_signed_url(query):
    with pytest.raises(ValueError, match=r"holds credentials|no option") as caught:
        open_source(f"video:https://host.example/a.mp4?{query}")
    _says_nothing(caught.value)


def test_a_harvest_writes_nothing_down(tmp_path):
    from fake_model import FakeModel

    with pytest.raises(ValueError, match=r"holds credentials") as caught:
        actstore.harvest(
            model=FakeModel(),
            data=f"https://me:{SECRET}@host.example/photos",
            sites="blocks.0.resid_post",
            out=tmp_path / "a",
        )
    _says_nothing(caught.value)
    assert not (tmp_path / "a" / "zarr.json").exists()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("photos/me:you@here", "photos/me:you@here"),
        ("https://host:8080/a?page=2", "https://host:8080/a?page=2"),
        ("hf://datasets/a/b@main/c.parquet", "hf://datasets/a/b@main/c.parquet"),
        ("https://me@host/a", "https://me@host/a"),
        ("https://me:you@host:1/a", "https://host:1/a"),
        ("https://host/a?monkey=1&x-amz-signature=1", "https://host/a"),
        ("s3://me:y/o/u@bucket/a", "s3://bucket/a"),
        ("s3://bucket/a@b:c", "s3://bucket/a@b:c"),
        ("https://[::1/a?sig=1", "[::1/a"),
    ],
)
def test_what_is_public(url, expected):
    assert SECRET not in public(url)
    assert public(url) in (expected, f"https://{expected}")


def _says_nothing(error):
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
