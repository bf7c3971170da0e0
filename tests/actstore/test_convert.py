import os

import numpy as np
import pytest
import torch
from fake_model import FakeModel, harvest_digits, objects

import actstore
from actstore.cli import main
from actstore.convert import convert
from actstore.manifest import FormatError
from actstore.repair import repair
from actstore.sources import open_source
from actstore.verify import verify

SITE = "blocks.1.resid_post"
OTHER = "blocks.3.resid_post"


class Gaps:
    """90 inputs of which every ninth cannot be read."""

    def __len__(self):
        return 90

    def __getitem__(self, i):
        if i % 9 == 4:
            raise OSError("unreadable")
        return torch.rand((1, 20, 20), generator=torch.Generator().manual_seed(i)), i % 3


@pytest.fixture(scope="module")
def gaps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gaps") / "a"
    sites = "blocks.{1,3}.resid_post,logits"
    return actstore.harvest(
        model=FakeModel(), data=Gaps(), sites=sites, out=folder, batch_size=8, workers=1
    )


def readable(store, site, kind):
    """Return the valid items as float32, in order."""
    return np.asarray(store.dask(site, kind).compute(), dtype=np.float32)


def test_a_copy_is_the_same_store(tmp_path, gaps):
    copy = convert(gaps, tmp_path / "b")
    assert objects(copy.url, ".") == objects(gaps.url, ".")


def test_a_copy_of_some_sites_is_what_a_harvest_of_them_writes(tmp_path):
    harvest_digits(str(tmp_path / "both"), limit=60)
    harvest_digits(str(tmp_path / "one"), limit=60, sites=SITE, tokens="patch")
    copy = convert(actstore.open(tmp_path / "both"), tmp_path / "copy", sites=SITE, tokens="patch")
    assert objects(copy.url, ".") == objects(tmp_path / "one", ".")
    os.unlink(copy.shard(SITE, "patch", 3).uri)
    repair(copy, FakeModel(), open_source("digits"), [3])
    assert objects(copy.url, ".") == objects(tmp_path / "one", ".")


@pytest.mark.parametrize(
    ("size", "dtype"), [(3, None), (50, None), (7, "bfloat16"), (200, "float32")]
)
def test_packed_anew_the_values_and_the_index_stay(tmp_path, gaps, size, dtype):
    copy = convert(gaps, tmp_path / "b", items_per_part=size, dtype=dtype)
    assert verify(copy) == []
    assert copy.n_items == gaps.n_items == 80
    assert copy.manifest.items == 80
    for array in gaps.manifest.arrays:
        truth = readable(gaps, array.site, array.kind)
        found = readable(copy, array.site, array.kind)
        np.testing.assert_allclose(found, truth, rtol=4e-3 if dtype == "bfloat16" else 0)
    before, after = gaps.table().drop_columns("position"), copy.table().drop_columns("position")
    assert after.equals(before)
    assert copy.table()["position"].to_pylist() == list(range(80))
    skipped = {r["source"]: r["status"] for r in copy.index().to_pylist() if r["status"] != "ok"}
    assert skipped == {i: "cannot be read: unreadable" for i in range(4, 90, 9)}


def test_resharded_stripes_and_tokens(tmp_path, gaps):
    copy = convert(gaps, tmp_path / "b", sites="blocks.*", tokens="cls", reshard=True)
    assert copy.sites == (SITE, OTHER)
    assert copy.kinds(SITE) == ("cls",)
    assert (readable(copy, OTHER, "cls") == readable(gaps, OTHER, "cls")).all()


def test_a_conversion_that_stopped_goes_on(tmp_path, gaps):
    whole = convert(gaps, tmp_path / "whole", items_per_part=9)

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(gaps, tmp_path / "b", items_per_part=9, on_part=stop)
    assert not actstore.open(tmp_path / "b").is_complete
    copy = convert(gaps, tmp_path / "b", items_per_part=9)
    assert objects(copy.url, ".") == objects(whole.url, ".")
    with pytest.raises(ValueError, match=r"(?s)holds another store.*items_per_part: 9 -> 10"):
        convert(gaps, tmp_path / "b", items_per_part=10)


@pytest.mark.parametrize("how", [{}, {"items_per_part": 5}])
def test_a_damaged_source_is_refused(tmp_path, how):
    harvest_digits(str(tmp_path / "a"), limit=60)
    store = actstore.open(tmp_path / "a")
    with open(store.shard(SITE, "patch", 2).uri, "r+b") as file:
        file.write(b"\x7f")
    with pytest.raises(FormatError, match=r"part 2, .* checksum: actstore repair .* --parts 2"):
        convert(store, tmp_path / "b", **how)


def test_what_cannot_be_converted(tmp_path, gaps):
    with pytest.raises(ValueError, match=r"no site matches 'blocks.7.resid_post'"):
        convert(gaps, tmp_path / "b", sites="blocks.7.resid_post")
    with pytest.raises(ValueError, match=r"nothing is left: .* tokens of kind cls, item, patch"):
        convert(gaps, tmp_path / "b", sites=SITE, tokens="register")
    with pytest.raises(ValueError, match=r"lacks 1 of \d+ parts; finish its harvest first"):
        convert(actstore.open(gaps.url, without=[0]), tmp_path / "b")
    copy = convert(gaps, tmp_path / "c", items_per_part=4)
    with pytest.raises(ValueError, match=r"was converted from the store"):
        repair(copy, FakeModel(), open_source(Gaps()), [0])


def test_overflow_on_the_way_to_float16(tmp_path):
    values = np.ones((10, 2, 4), np.float32)
    values[3, 1, 2] = 1e6
    store = actstore.write_arrays(tmp_path / "a", {SITE: {"patch": values}})
    with pytest.raises(ValueError, match=r"channel 2: 1e\+06 does not fit float16"):
        convert(store, tmp_path / "b", dtype="float16")


@pytest.mark.xdist_group("s3")
@pytest.mark.parametrize("reshard", [False, True])
def test_to_s3_and_back(tmp_path, gaps, s3, reshard):
    url = f"s3://bucket/{tmp_path.name}"
    there = convert(gaps, url, storage_options=s3, reshard=reshard)
    assert verify(there) == []
    back = convert(there, tmp_path / "back")
    for array in gaps.manifest.arrays:
        truth = readable(gaps, array.site, array.kind)
        assert (readable(back, array.site, array.kind) == truth).all()
    if not reshard:
        assert objects(back.url, ".") == objects(gaps.url, ".")


def test_command(tmp_path, gaps, capsys):
    words = ["convert", str(gaps.url), "--out", f"{tmp_path}/b", "--dtype", "bfloat16"]
    assert main([*words, "--sites", SITE]) == 0
    assert "80 items, 2 arrays, bfloat16" in capsys.readouterr().out
    assert main(["convert", "nowhere", "--out", f"{tmp_path}/c"]) == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_archive_profile_and_back(tmp_path, gaps, dtype):
    """Compressed stripes are read by every Zarr reader and come back bit for bit."""
    raw = convert(gaps, tmp_path / "raw", dtype=dtype, items_per_part=20)
    kept = convert(raw, tmp_path / "kept", codec="archive")
    assert kept.manifest.codec == "archive"
    assert verify(kept) == []
    back = convert(kept, tmp_path / "back", codec="raw")
    for array in raw.manifest.arrays:
        truth = np.asarray(raw.array(array.site, array.kind)[:])
        assert (np.asarray(kept.array(array.site, array.kind)[:]) == truth).all()
        assert (np.asarray(back.array(array.site, array.kind)[:]) == truth).all()
        np.testing.assert_array_equal(
            kept.stats(array.site, array.kind).mean, raw.stats(array.site, array.kind).mean
        )
    shards = [path for path in objects(raw.url) if "/c." in path]
    assert all(objects(back.url)[path] == objects(raw.url)[path] for path in shards)


def test_archives_of_bfloat16_are_a_quarter_smaller(tmp_path):
    values = np.random.default_rng(0).standard_normal((1600, 2, 96)).astype(np.float32)
    raw = actstore.write_arrays(tmp_path / "raw", {SITE: {"patch": values}}, dtype="bfloat16")
    kept = convert(raw, tmp_path / "kept", codec="archive")
    sizes = [sum(len(v) for k, v in objects(s.url).items() if "/c." in k) for s in (raw, kept)]
    assert sizes[1] < 0.8 * sizes[0]


def test_archives_open_in_tensorstore(tmp_path, gaps):
    tensorstore = pytest.importorskip("tensorstore")
    kept = convert(gaps, tmp_path / "kept", codec="archive", sites=SITE)
    path = kept.storage.uri(kept.spec(SITE, "patch").path)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
    read = tensorstore.open(spec, read=True).result().read().result()
    assert (read == kept.array(SITE, "patch")[:]).all()


def test_archives_are_written_equal_and_damage_is_found(tmp_path, gaps):
    one = convert(gaps, tmp_path / "one", codec="archive")
    two = convert(gaps, tmp_path / "two", codec="archive")
    assert objects(one.url, ".") == objects(two.url, ".")
    shard = one.shard(SITE, "patch", 1)
    with open(shard.uri, "r+b") as file:
        file.seek(int(shard.spans[3, 0]) + 20)
        file.write(b"\x00\x01\x02")
    assert [problem.what[-10:] for problem in verify(one)] == ["(stripe 3)"]
    with pytest.raises(FormatError, match=r"differs from its checksum"):
        convert(one, tmp_path / "back", codec="raw")


def test_a_stripe_that_claims_too_much_is_refused(gaps):
    import dataclasses

    from actstore.codec import decode, encode

    array = gaps.spec(SITE, "patch")
    manifest = dataclasses.replace(gaps.manifest, codec="archive")
    shape = (manifest.items_per_part, 1, array.channels)
    good = bytearray(encode(np.ones(shape, np.float16), "archive"))
    assert (decode(bytes(good), manifest, array, np.dtype("<f2")) == 1).all()
    bomb = bytearray(good)
    bomb[4:8] = (2**31 - 17).to_bytes(4, "little")
    for data in (bytes(bomb), bytes(good[:-1]), b"short"):
        with pytest.raises(FormatError, match=r"a compressed stripe does not hold \d+ bytes"):
            decode(data, manifest, array, np.dtype("<f2"))


def test_unknown_codecs_are_refused(tmp_path, gaps):
    with pytest.raises(FormatError, match=r"codec 'gzip' is none of raw, archive"):
        convert(gaps, tmp_path / "b", codec="gzip")
