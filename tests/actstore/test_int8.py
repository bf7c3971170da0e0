"""int8 with a scale per channel: bounds, counts, and the same bytes however a store came about."""

import base64
import dataclasses
import json

import numpy as np
import pytest
import torch
import zarr
from fake_model import FakeModel, harvest_digits, objects
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore import calibrate
from actstore.cli import main
from actstore.convert import convert
from actstore.loader import TokenLoader
from actstore.manifest import FormatError, Manifest, encode_scale
from actstore.moments import channel_moments
from actstore.quantise import LIMIT, calibrated, quantise
from actstore.reader import batches
from actstore.repair import repair
from actstore.sources import open_source
from actstore.staging import _quantise
from actstore.storage import open_storage
from actstore.verify import verify, verify_against_model

SITES = ("blocks.1.resid_post", "blocks.3.resid_post")
SITE = SITES[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same harvest in float32 and in int8."""
    folder = tmp_path_factory.mktemp("int8")
    harvest_digits(str(folder / "f"), dtype="float32")
    harvest_digits(str(folder / "q"), dtype="int8")
    return actstore.open(folder / "f"), actstore.open(folder / "q")


def moments(values):
    return channel_moments(values[None], "float32")


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 700),
    spread=st.floats(-30, 30),
    massive=st.sampled_from([1.0, 50.0, 1e4]),
)
@settings(max_examples=60, deadline=None)
def test_every_channel_is_within_half_a_step_of_its_own(seed, rows, spread, massive):
    """A channel of massive values leaves the steps of the others as they are."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 2.0**spread, (rows, 5)).astype(np.float32)
    values[:, 2] *= np.float32(massive)
    values[rng.integers(rows), 3] *= 30
    values[:, 4] = 0
    scale = calibrated(moments(values))
    q, saturated, error = quantise(values, scale)
    gap = np.abs(values.astype(np.float64) - q * scale.astype(np.float64))
    assert not saturated.any()
    assert (gap <= 0.5 * (1 + 1e-5) * scale).all()
    np.testing.assert_allclose(error, (gap**2).sum(axis=0), rtol=1e-3)
    if rows >= 30:  # few values may all be near zero: the floor is of the median channel
        plain = np.delete(values, 2, axis=1)
        assert np.allclose(np.delete(scale, 2)[:3], calibrated(moments(plain))[:3])


def test_what_lies_outside_of_the_range_is_counted_exactly():
    scale = np.array([0.5, 2.0], np.float32)
    values = np.array([[63.5, -255.0], [63.74, -254.9], [63.76, 1e30], [-64, 300]], np.float32)
    q, saturated, error = quantise(values, scale)
    assert q.tolist() == [[127, -127], [127, -127], [127, 127], [-127, 127]]
    assert saturated.tolist() == [2, 3]
    assert np.isfinite(error).all()
    on_device = _quantise(torch.from_numpy(values[None]), torch.from_numpy(scale))
    assert (on_device[0].numpy()[0] == q).all()
    assert (on_device[1].numpy() == saturated).all()


def test_ties_go_to_the_even_value_in_both_implementations():
    values = np.arange(-6, 7, dtype=np.float32)[:, None] / 2
    one = np.ones(1, np.float32)
    q, _, error = quantise(values, one)
    assert q[:, 0].tolist() == [-3, -2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2, 3]
    again, _, lost = _quantise(torch.from_numpy(values[None]), torch.from_numpy(one))
    assert (again.numpy()[0] == q).all()
    np.testing.assert_allclose(lost.numpy(), error)


def test_a_store_holds_what_it_lost(pair):
    truth, store = pair
    for site in SITES:
        for kind in ("cls", "patch"):
            plain = truth.dask(site, kind).compute().astype(np.float64)
            array = store.spec(site, kind)
            step = store.manifest.scale(array)
            found = store.dask(site, kind).compute()
            assert found.dtype == np.float32
            assert (np.abs(found - plain) <= 0.5001 * step).all()
            stats = store.stats(site, kind)
            assert not stats.saturated.any()
            gap = ((found - plain) ** 2).sum(axis=(0, 1))
            np.testing.assert_allclose(stats.error, gap, rtol=1e-3, atol=1e-9)
            flat = found.reshape(-1, array.channels)
            np.testing.assert_allclose(stats.mean, flat.mean(axis=0), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(stats.absmax, np.abs(flat).max(axis=0), rtol=1e-6)
    assert 0 < store.stats(SITE, "patch").fvu < 2e-4
    assert truth.stats(SITE, "patch").fvu is None


def test_saturation_reaches_the_statistics(tmp_path):
    """Items behind those of the calibration may be larger: they are cut and counted."""
    values = np.random.default_rng(0).normal(size=(300, 2, 3)).astype(np.float32)
    values[256:280, 1, 2] = 1000.0
    store = actstore.write_arrays(
        tmp_path / "a", {SITE: {"patch": values}}, dtype="int8", seed=None
    )
    stats = store.stats(SITE, "patch")
    assert stats.saturated.tolist() == [0, 0, 24]
    scale = store.manifest.scale(store.spec(SITE, "patch"))
    assert stats.absmax[2] == pytest.approx(LIMIT * scale[2])
    store.compact()
    group = zarr.open_group(store.storage.zarr(), path=f"stats/{SITE}/patch", mode="r")
    assert np.asarray(group["saturated"][:]).tolist() == [0, 0, 24]
    np.testing.assert_array_equal(np.asarray(group["error"][:]), stats.error)


def test_every_way_of_reading_gives_the_same_values(pair):
    _, store = pair
    known = {k: store.dask(SITE, k).compute() for k in ("cls", "patch")}
    first = {k: store.spec(SITE, k).first for k in known}

    def check(batch, width):
        acts = np.asarray(batch.acts)[:, :width]
        for value, item, token in zip(acts, np.asarray(batch.item), batch.token, strict=True):
            kind = "cls" if token == 0 else "patch"
            assert (value == known[kind][item, int(token) - first[kind]]).all()

    width = store.spec(SITE, "cls").channels
    for batch in batches(store, ",".join(SITES), 500, tokens="cls,patch"):
        assert batch.acts.dtype == np.float32
        check(batch, width)
    for batch in TokenLoader(store, SITE, 500, epochs=1, seed=3, check=True):
        check(batch, width)
    assert (store.items(range(200), SITE, "patch") == known["patch"]).all()
    stored = np.asarray(store.array(SITE, "patch")[:])
    assert stored.dtype == np.int8
    path = store.array(SITE, "patch").attrs["scale"]
    step = zarr.open_array(store.storage.zarr(), path=path, mode="r")
    assert (stored * np.asarray(step[:]) == known["patch"]).all()


def test_normalised_batches_are_in_the_units_of_the_model(pair):
    truth, store = pair
    options = {"epochs": 1, "normalize": "standard", "tokens": "patch"}
    plain = TokenLoader(truth, SITE, 400, **options)
    for a, b in zip(plain, TokenLoader(store, SITE, 400, **options), strict=True):
        assert torch.allclose(a.acts, b.acts, atol=0.05)


def test_xarray_sees_the_scales_beside_the_values(pair):
    xarray = pytest.importorskip("xarray")
    _, store = pair
    site = xarray.open_zarr(f"{store.url}/acts/{SITE}", consolidated=False)
    values = (site["patch"] * site["patch_scale"]).values
    assert (values == store.dask(SITE, "patch").compute()).all()


def test_resumed_and_repaired_parts_have_the_bytes_of_the_first_run(tmp_path, pair):
    _, whole = pair
    harvest_digits(str(tmp_path / "a"), dtype="int8")
    store = actstore.open(tmp_path / "a")
    assert objects(store.url, ".") == objects(whole.url, ".")
    for part in (0, 5):
        store.storage.delete(f"parts/{part:05d}.json")
    harvest_digits(store.url, codec="int8", workers=1)
    assert objects(store.url, ".") == objects(whole.url, ".")
    with open(store.shard(SITE, "patch", 3).uri, "r+b") as file:
        file.write(b"\x01\x02")
    assert [problem.part for problem in verify(store)] == [3]
    repair(store, FakeModel(), open_source("digits"), [3])
    assert objects(store.url, ".") == objects(whole.url, ".")


def test_ranks_write_one_store(tmp_path, pair, monkeypatch):
    _, whole = pair
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        harvest_digits(str(tmp_path / "a"), dtype="int8")
    assert objects(tmp_path / "a", ".") == objects(whole.url, ".")


def test_scales_that_were_written_first_count(tmp_path, pair):
    """A rank on other hardware finds last bits of its own, and takes those that are there."""
    _, store = pair
    manifest = store.manifest
    storage = open_storage(tmp_path / "a")
    assert calibrate.create_calibrated(storage, manifest) == manifest
    other = {
        a.path: encode_scale(np.nextafter(manifest.scale(a), np.float32(9)))
        for a in manifest.arrays
    }
    mine = dataclasses.replace(manifest, scales=other)
    assert calibrate.create_calibrated(storage, mine) == manifest
    with pytest.raises(ValueError, match=r"(?s)holds another store.*items: 200 -> 7"):
        calibrate.create_calibrated(storage, dataclasses.replace(mine, items=7))


def test_values_agree_with_the_model(pair):
    _, store = pair
    found = verify_against_model(store, FakeModel(), open_source("digits"), items=20)
    assert [f.differing for f in found] == [0] * len(found)
    found = verify_against_model(
        actstore.open(store.url), Shifted(), open_source("digits"), items=20
    )
    assert any(f.differing for f in found)


class Shifted(FakeModel):
    """Another model under the same name."""

    def run(self, x, sites, stop_early=True):
        return {k: v + 0.5 for k, v in super().run(x, sites, stop_early).items()}


def test_conversion_both_ways(tmp_path, pair):
    truth, store = pair
    wide = convert(store, tmp_path / "wide", dtype="float32")
    packed = convert(truth, tmp_path / "packed", codec="int8")
    small = convert(store, tmp_path / "small", codec="archive")
    again = convert(small, tmp_path / "again", codec="raw")
    moved = convert(store, tmp_path / "moved", items_per_part=7)
    for site in SITES:
        for kind in ("cls", "patch"):
            values = store.dask(site, kind).compute()
            assert (wide.dask(site, kind).compute() == values).all()
            for same in (small, again, moved):
                assert (same.dask(site, kind).compute() == values).all()
            stats = packed.stats(site, kind)
            assert not stats.saturated.any()
            array = packed.spec(site, kind)
            gap = np.abs(packed.dask(site, kind).compute() - truth.dask(site, kind).compute())
            assert (gap <= 0.5001 * packed.manifest.scale(array)).all()
            assert again.stats(site, kind).fvu == store.stats(site, kind).fvu
            assert moved.stats(site, kind).fvu is None
    for copy in (wide, packed, small, again, moved):
        assert verify(copy) == []
    some = convert(store, tmp_path / "some", sites=SITE, tokens="patch")
    assert list(some.manifest.scales) == [f"acts/{SITE}/patch"]
    assert (some.dask(SITE, "patch").compute() == store.dask(SITE, "patch").compute()).all()


def test_the_archive_profile_is_bfloat16_and_can_be_harvested(tmp_path):
    harvest_digits(str(tmp_path / "a"), codec="archive", limit=20)
    harvest_digits(str(tmp_path / "b"), dtype="bfloat16", limit=20)
    store, plain = actstore.open(tmp_path / "a"), actstore.open(tmp_path / "b")
    assert (store.manifest.codec, store.manifest.dtype) == ("archive", "bfloat16")
    assert (store.dask(SITE, "patch").compute() == plain.dask(SITE, "patch").compute()).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "int8", "dtype": "float16"}, "codec int8 stores dtype int8, not float16"),
        ({"codec": "zip"}, "codec 'zip' is none of raw, archive, int8"),
        ({"dtype": "int4"}, "dtype 'int4' is none of"),
    ],
)
def test_profiles_that_contradict_each_other(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        harvest_digits(str(tmp_path / "a"), limit=20, **options)


def test_a_model_that_gives_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the model gave nan; a store holds finite values only"):
        actstore.harvest(
            model=FakeModel(scale=float("nan")), data="digits", sites=SITE, out=tmp_path / "a",
            dtype="int8", limit=20,
        )  # fmt: skip
    assert not (tmp_path / "a").exists()


class Broken:
    """A data set of which nothing can be read."""

    def __len__(self):
        return 30

    def __getitem__(self, i):
        raise OSError("unreadable")


def test_nothing_to_calibrate_on(tmp_path):
    with pytest.raises(ValueError, match=r"none of the first 30 items can be read"):
        actstore.harvest(
            model=FakeModel(), data=Broken(), sites=SITE, out=tmp_path / "a", dtype="int8"
        )


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ("AAAA", "3 bytes of scales for 2"),
        ("not base64!", "are not base64"),
        (7, "are not base64"),
        (encode_scale(np.array([1, 0], np.float32)), "finite and positive"),
        (encode_scale(np.array([1, np.nan], np.float32)), "finite and positive"),
    ],
)
def test_scales_of_strangers_are_checked(scale, message):
    value = {
        "format": 1,
        "items": 4,
        "items_per_part": 2,
        "arrays": [{"site": "s", "kind": "patch", "tokens": 1, "channels": 2}],
        "dtype": "int8",
    }
    good = encode_scale(np.array([1, 2], np.float32))
    manifest = Manifest.from_json({**value, "scales": {"acts/s/patch": good}})
    assert base64.b64decode(good) == manifest.scale(manifest.arrays[0]).tobytes()
    assert Manifest.from_json(manifest.to_json()) == manifest
    with pytest.raises(FormatError, match=message):
        Manifest.from_json({**value, "scales": {"acts/s/patch": scale}})
    for scales in ({"acts/s/cls": good}, {"acts/s/patch": good, "x": good}):
        with pytest.raises(FormatError, match=r"scales belong to every array"):
            Manifest.from_json({**value, "scales": scales})
    with pytest.raises(FormatError, match=r"scales belong to every array"):
        Manifest.from_json({**value, "dtype": "float16", "scales": {"acts/s/patch": good}})
    both = [*value["arrays"], {"site": "s", "kind": "patch_scale", "tokens": 1, "channels": 2}]
    with pytest.raises(FormatError, match=r"patch_scale holds scales"):
        Manifest.from_json(
            {**value, "arrays": both, "scales": {"acts/s/patch": good, "acts/s/patch_scale": good}}
        )


def test_integers_may_stand_for_themselves(tmp_path):
    given = np.arange(-120, 120, dtype=np.int8).reshape(20, 3, 4)
    store = actstore.write_arrays(tmp_path / "a", {SITE: {"patch": given}}, seed=None)
    assert "scales" not in store.manifest.to_json()
    assert (store.items(range(20), SITE, "patch") == given).all()
    assert store.stats(SITE, "patch").fvu is None


def test_command(tmp_path, capsys):
    words = ["--model", "toy/digits-1l", "--random-weights", "--data", "digits", "--device", "cpu"]
    out = str(tmp_path / "a")
    words += ["--sites", "logits", "--limit", "20", "--out", out]
    assert main(["harvest", *words, "--codec", "int8"]) == 0
    assert "int8" in capsys.readouterr().out
    assert actstore.open(out).manifest.scales
    assert main(["verify", out, "--random-weights", "--against-model", "5"]) == 0
    assert main(["convert", out, "--out", f"{out}2", "--codec", "nothing"]) == 1
    assert "codec 'nothing' is none of raw, archive, int8" in capsys.readouterr().err


def test_stats_say_what_was_lost(pair, capsys, tmp_path):
    truth, store = pair
    assert main(["stats", str(store.url), "--json", str(tmp_path / "s.json")]) == 0
    shown = capsys.readouterr().out
    assert "FVU" in shown
    found = json.loads((tmp_path / "s.json").read_text())["arrays"]
    assert found[1]["fvu"] == store.stats(SITE, "patch").fvu
    assert [one["saturated"] for one in found] == [0] * 4
    assert found[0]["fvu"] is None, "the CLS of this model never varies"
    assert main(["stats", str(truth.url)]) == 0
    assert "FVU" not in capsys.readouterr().out
