import numpy as np
import pyarrow as pa
import pytest

import actstore
from actstore.index import SCHEMA
from actstore.manifest import FormatError

SITE = "blocks.0.resid_post"


def values(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_index_follows_the_permutation(tmp_path):
    table = {
        "key": [f"k{i}" for i in range(30)],
        "label": [i % 3 for i in range(30)],
        "extra": [*range(30)],
    }
    given = values((30, 2, 4))
    store = actstore.write_arrays(
        tmp_path / "a", {SITE: {"patch": given}}, table=table, items_per_part=7
    )
    rows = store.table()
    assert rows.column_names == [*SCHEMA.names, "extra"]
    assert rows["position"].to_pylist() == list(range(30))
    source = rows["source"].to_pylist()
    assert source != list(range(30))
    assert rows["key"].to_pylist() == [f"k{i}" for i in source]
    assert rows["label"].to_pylist() == [i % 3 for i in source]
    assert rows["extra"].to_pylist() == source
    assert set(rows["label_name"].to_pylist()) == {None}
    assert (store.array(SITE, "patch")[:] == given[source]).all()


def test_stats_equal_those_of_the_stored_values(tmp_path):
    given = values((50, 3, 5)) * np.array([1e-3, 1, 50, 1, 1], np.float32) + 7
    store = actstore.write_arrays(
        tmp_path / "a", {SITE: {"patch": given}}, dtype="float16", items_per_part=8
    )
    stored = store.array(SITE, "patch")[:].astype(np.float64).reshape(-1, 5)
    stats = store.stats(SITE, "patch")
    assert stats.count == 150
    np.testing.assert_allclose(stats.mean, stored.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.var, stored.var(0), rtol=1e-5)
    np.testing.assert_allclose(stats.std, stored.std(0), rtol=1e-5)
    np.testing.assert_array_equal(stats.absmax, np.abs(stored).max(0))


def test_variance_beside_a_large_mean_is_exact(tmp_path):
    given = values((4096, 1, 2)) * 1e-2 + np.array([1000, -300], np.float32)
    store = actstore.write_arrays(tmp_path / "a", {SITE: {"cls": given}}, items_per_part=100)
    np.testing.assert_allclose(
        store.stats(SITE, "cls").var, given[:, 0].astype("f8").var(0), rtol=1e-4
    )


def test_what_is_there(tmp_path):
    store = actstore.write_arrays(
        tmp_path / "a",
        {
            SITE: {"cls": values((5, 1, 4)), "patch": values((5, 4, 4))},
            "logits": {"item": values((5, 1, 3))},
        },
    )
    assert store.sites == (SITE, "logits")
    assert store.kinds(SITE) == ("cls", "patch")
    assert store.spec(SITE, "patch").first == 1
    assert store.kinds("logits") == ("item",)
    assert store.n_items == 5
    assert store.is_complete
    assert store.missing_parts == ()
    assert store.grid(SITE).patch == (2, 2)
    assert store.grid(SITE).slice("patch") == slice(1, 5)
    with pytest.raises(KeyError, match=r"has no token grid"):
        store.grid("logits")
    again = actstore.open(str(tmp_path / "a"))
    assert again.fingerprint == store.fingerprint
    assert repr(again).endswith(": 5 items, 2 sites, 5/5 parts>")


def test_unknown_names_say_what_there_is(tmp_path):
    store = actstore.write_arrays(tmp_path / "a", {SITE: {"cls": values((5, 1, 4))}})
    with pytest.raises(
        KeyError,
        match=r"no site 'blocks.1.resid_post'; nearest: blocks.0.resid_post.*actstore info",
    ):
        store.array("blocks.1.resid_post", "cls")
    with pytest.raises(KeyError, match=r"no tokens of kind 'patch'; stored are cls"):
        store.array(SITE, "patch")
    with pytest.raises(KeyError, match=r"part 9 of .* is not committed"):
        store.shard(SITE, "cls", 9)


def test_writing_the_same_again_changes_nothing(tmp_path):
    given = {SITE: {"cls": values((20, 1, 4))}}
    actstore.write_arrays(tmp_path / "a", given)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "a").rglob("*.json")}
    actstore.write_arrays(tmp_path / "a", given)
    assert before == {
        p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "a").rglob("*.json")
    }


def test_other_arrays_in_the_same_place_are_refused(tmp_path):
    actstore.write_arrays(tmp_path / "a", {SITE: {"cls": values((20, 1, 4))}}, dtype="float16")
    with pytest.raises(ValueError, match=r'(?s)holds another store.*dtype: "float16" -> "float32"'):
        actstore.write_arrays(tmp_path / "a", {SITE: {"cls": values((20, 1, 4))}}, dtype="float32")
    with pytest.raises(ValueError, match=r"(?s)holds another store.*data.fingerprint"):
        actstore.write_arrays(
            tmp_path / "a", {SITE: {"cls": values((20, 1, 4), 1)}}, dtype="float16"
        )


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({}, {}, "at least one array"),
        ({SITE: {"cls": values((3, 4))}}, {}, r"expected \[item, token, channel\], got \[3, 4\]"),
        ({SITE: {"cls": values((0, 1, 4))}}, {}, r"got \[0, 1, 4\]"),
        (
            {SITE: {"cls": values((3, 1, 4)), "patch": values((4, 1, 4))}},
            {},
            "same number of items",
        ),
        ({SITE: {"cls": np.zeros((3, 1, 4), np.int64)}}, {}, "dtype int64 cannot be stored"),
        ({SITE: {"cls": values((3, 1, 4))}}, {"dtype": "float8"}, "dtype 'float8' is none of"),
        (
            {SITE: {"cls": values((3, 1, 4)), "patch": np.zeros((3, 2, 4), np.int8)}},
            {"dtype": "int8"},
            "floating point arrays or int8 ones, not both",
        ),
        ({"../x": {"cls": values((3, 1, 4))}}, {}, "cannot be a folder"),
        ({SITE: {"cls": values((3, 1, 4))}}, {"table": {"key": ["a"]}}, "1 rows for 3 items"),
        ({SITE: {"cls": values((3, 1, 4))}}, {"items_per_part": 0}, "items_per_part must be"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, arrays, options, message):
    with pytest.raises((ValueError, FormatError), match=message):
        actstore.write_arrays(tmp_path / "a", arrays, **options)


def test_overflow_names_site_channel_value_and_remedy(tmp_path):
    given = values((5, 3, 4))
    given[2, 1, 3] = -70000.0
    with pytest.raises(
        ValueError,
        match=rf"site {SITE} \(patch\), channel 3: -70000 does not fit float16.*--dtype bfloat16",
    ):
        actstore.write_arrays(tmp_path / "a", {SITE: {"patch": given}}, dtype="float16")
    store = actstore.write_arrays(tmp_path / "b", {SITE: {"patch": given}}, dtype="bfloat16")
    assert store.stats(SITE, "patch").absmax[3] == pytest.approx(70000, rel=4e-3)


def test_float16_reaches_its_largest_value(tmp_path):
    given = np.full((2, 1, 2), 65504.0, np.float32)
    store = actstore.write_arrays(tmp_path / "a", {SITE: {"cls": given}}, dtype="float16")
    assert (store.array(SITE, "cls")[:] == 65504).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, bad):
    given = values((5, 3, 4))
    given[4, 0, 1] = bad
    with pytest.raises(ValueError, match=r"channel 1: the model gave .*finite values only"):
        actstore.write_arrays(tmp_path / "a", {SITE: {"patch": given}})


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no store at .*actstore harvest --out"):
        actstore.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"no store at"):
        actstore.open(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "does not describe an actstore store"),
        ('{"attributes": {}}', "does not describe an actstore store"),
        ("[]", "does not describe an actstore store"),
    ],
)
def test_foreign_zarr_json_is_refused(tmp_path, text, message):
    (tmp_path / "zarr.json").write_text(text)
    with pytest.raises(FormatError, match=message):
        actstore.open(tmp_path)
    with pytest.raises(FormatError, match=message):
        actstore.write_arrays(tmp_path, {SITE: {"cls": values((3, 1, 4))}})


def test_a_manifest_changed_by_hand_is_refused(tmp_path):
    actstore.write_arrays(tmp_path / "a", {SITE: {"cls": values((3, 1, 4))}})
    path = tmp_path / "a" / "zarr.json"
    path.write_text(path.read_text().replace('"items": 3', '"items": 2'))
    with pytest.raises(FormatError, match=r"was changed by hand"):
        actstore.open(tmp_path / "a")


def test_a_newer_store_says_how_to_update(tmp_path):
    actstore.write_arrays(tmp_path / "a", {SITE: {"cls": values((3, 1, 4))}})
    path = tmp_path / "a" / "zarr.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 7'))
    with pytest.raises(
        FormatError, match=r"format 7, this actstore reads format 1: update it with `pip install"
    ):
        actstore.open(tmp_path / "a")


def test_table_may_be_arrow(tmp_path):
    table = pa.table({"label": [1, 2, 3], "label_name": ["a", "b", "c"]})
    store = actstore.write_arrays(
        tmp_path / "a", {SITE: {"cls": values((3, 1, 4))}}, table=table, seed=None
    )
    assert store.table()["label_name"].to_pylist() == ["a", "b", "c"]
