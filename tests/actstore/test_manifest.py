import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actstore.manifest import ArraySpec, FormatError, Manifest, validate_name


def manifest(**changes) -> Manifest:
    arrays = (
        ArraySpec(site="blocks.0.resid_post", kind="cls", tokens=1, channels=8),
        ArraySpec(site="blocks.0.resid_post", kind="patch", tokens=4, channels=8, first=1),
    )
    return Manifest(**{"items": 10, "items_per_part": 4, "arrays": arrays, **changes})


def test_json_round_trip_keeps_the_fingerprint():
    one = manifest(data={"kind": "digits", "items": 10}, model={"id": "m"}, compute={"b": 2})
    two = Manifest.from_json(json.loads(json.dumps(one.to_json())))
    assert two == one
    assert two.fingerprint == one.fingerprint
    assert two.n_parts == 3
    assert [two.planned(p) for p in range(3)] == [4, 4, 2]


def test_fingerprint_is_that_of_the_format_description():
    """A golden value: a change of the manifest's JSON is a change of the format."""
    assert manifest().fingerprint == (
        "1a4f28935511363f91a0acd83b3f084da817e42d2a297b25ec4dd20e5edf3447"
    )


def test_diff_names_the_fields_that_differ():
    one = manifest(data={"kind": "folder", "url": "a"}, model={"id": "m", "d_model": 8})
    arrays = (dataclasses.replace(one.arrays[0], channels=16), one.arrays[1])
    two = dataclasses.replace(
        one, dtype="float32", data={"kind": "folder", "url": "b"}, arrays=arrays
    )
    assert one.diff(one) == []
    assert one.diff(two) == [
        "arrays.blocks.0.resid_post/cls.channels: 8 -> 16",
        'data.url: "a" -> "b"',
        'dtype: "float16" -> "float32"',
    ]


def test_a_newer_format_is_refused_with_the_remedy():
    value = {**manifest().to_json(), "format": 2}
    with pytest.raises(FormatError, match=r"format 2, this actstore reads format 1: update"):
        Manifest.from_json(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float8"}, "dtype 'float8' is none of float16"),
        ({"codec": "gzip"}, "codec 'gzip' is none of raw"),
        ({"items": -1}, "items must be an integer >= 0"),
        ({"items_per_part": 0}, "items_per_part must be an integer >= 1"),
        ({"items": True}, "items must be an integer"),
        ({"arrays": []}, "at least one array"),
        ({"arrays": [{"site": "x"}]}, "describes an array wrongly"),
        ({"arrays": "x"}, "arrays must be a list"),
        ({"data": []}, "data must be a JSON object"),
        ({"surprise": 1}, r"unknown fields \['surprise'\]"),
    ],
)
def test_bad_fields_are_named(change, message):
    with pytest.raises(FormatError, match=message):
        Manifest.from_json({**manifest().to_json(), **change})


def test_missing_fields_are_named():
    value = manifest().to_json()
    del value["items"]
    with pytest.raises(FormatError, match=r"lacks the fields"):
        Manifest.from_json(value)
    with pytest.raises(FormatError, match=r"must be a JSON object"):
        Manifest.from_json([1])


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "../x", "a..b", "/abs", "a\\b", "a\0b", ".hidden", "a\n", "x" * 201],
)
def test_names_that_could_leave_the_folder_are_refused(name):
    with pytest.raises(FormatError, match=r"cannot be a folder of a store"):
        ArraySpec(site=name, kind="cls", tokens=1, channels=1)
    with pytest.raises(FormatError, match=r"cannot be a folder of a store"):
        ArraySpec(site="a", kind=name, tokens=1, channels=1)


def test_zarr_json_is_no_name():
    with pytest.raises(FormatError):
        validate_name("zarr.json", "site")


@given(st.text(max_size=12))
def test_an_accepted_name_is_one_safe_component(name):
    try:
        validate_name(name, "site")
    except FormatError:
        return
    assert name.isascii()
    assert "/" not in name
    assert "\\" not in name
    assert ".." not in name
    assert not name.startswith(".")


def test_names_that_differ_in_case_only_are_refused():
    arrays = tuple(ArraySpec(site=s, kind="cls", tokens=1, channels=1) for s in ("a", "A"))
    with pytest.raises(FormatError, match=r"differ in more than case"):
        manifest(arrays=arrays)


def test_stripe_must_divide_the_tokens():
    with pytest.raises(FormatError, match=r"stripe_tokens 3 does not divide 4"):
        ArraySpec(site="a", kind="patch", tokens=4, channels=1, stripe_tokens=3)
