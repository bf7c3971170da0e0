import google_crc32c
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore import layout
from actstore.crc import combine, crc32c
from actstore.manifest import ArraySpec, FormatError, Manifest
from actstore.order import keyed_permutation

SITE = "blocks.1.resid_post"


def values(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@given(pieces=st.lists(st.binary(max_size=300), max_size=6))
def test_combined_checksum_is_that_of_the_concatenation(pieces):
    total = combine([(crc32c(piece), len(piece)) for piece in pieces])
    assert total == google_crc32c.value(b"".join(pieces))


@given(size=st.integers(1, 3000), seed=st.integers(-(2**70), 2**70))
def test_keyed_permutation_is_one(size, seed):
    image = keyed_permutation(np.arange(size), size, seed)
    assert (np.sort(image) == np.arange(size)).all()
    some = np.arange(0, size, 7)
    assert (keyed_permutation(some, size, seed) == image[some]).all()


def test_keyed_permutation_is_pinned_and_mixes():
    """Bytes of stores depend on it: these values are part of the format."""
    assert keyed_permutation(np.arange(5), 5000, 0).tolist() == [172, 605, 4429, 2666, 4475]
    image = keyed_permutation(np.arange(20_000), 20_000, 3)
    assert abs(np.corrcoef(image, np.arange(20_000))[0, 1]) < 0.03
    assert abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 0.03
    halves = image.reshape(20, 1000) < 10_000
    assert halves.mean(axis=1).std() < 0.03


def test_keyed_permutation_refuses_positions_outside():
    with pytest.raises(ValueError, match=r"positions must lie in \[0, 5\)"):
        keyed_permutation(np.array([5]), 5, 0)


@settings(deadline=None, max_examples=40)
@given(
    items=st.integers(1, 20),
    tokens=st.integers(1, 6),
    channels=st.integers(1, 9),
    per_part=st.integers(1, 25),
    dtype=st.sampled_from(["float16", "float32", "bfloat16", "int8"]),
    seed=st.sampled_from([None, 0, 5]),
)
def test_any_store_reads_back_through_zarr(
    tmp_path_factory, items, tokens, channels, per_part, dtype, seed
):
    folder = tmp_path_factory.mktemp("store")
    given_values = {"cls": values((items, 1, channels)), "patch": values((items, tokens, channels))}
    if dtype == "int8":
        given_values = {
            k: (v * 20).clip(-127, 127).astype(np.int8) for k, v in given_values.items()
        }
    store = actstore.write_arrays(
        folder / "a.zarr", {SITE: given_values}, dtype=dtype, items_per_part=per_part, seed=seed
    )
    order = store.table()["source"].to_numpy()
    assert sorted(order) == list(range(items))
    if seed is None:
        assert (order == np.arange(items)).all()
    for kind, expected in given_values.items():
        read = np.asarray(store.array(SITE, kind)[:])
        if dtype == "bfloat16":
            truth = torch.from_numpy(expected).to(torch.bfloat16).view(torch.uint16).numpy()
        else:
            truth = expected.astype(dtype)
        assert read.dtype == truth.dtype
        assert (read == truth[order]).all()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A store whose arrays have different stripes, dtype float16, last part short."""
    folder = tmp_path_factory.mktemp("small") / "a.zarr"
    given_values = {SITE: {"cls": values((22, 1, 8)), "patch": values((22, 6, 8), seed=1)}}
    return actstore.write_arrays(folder, given_values, dtype="float16", items_per_part=5)


@pytest.mark.parametrize("kind", ["cls", "patch"])
def test_tensorstore_reads_equal_values(small, kind):
    tensorstore = pytest.importorskip("tensorstore")
    path = small.storage.uri(small.spec(SITE, kind).path)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
    read = tensorstore.open(spec, read=True).result()
    assert read.domain.labels == ("item", f"{kind}_token", "channel")
    assert (read.read().result() == small.array(SITE, kind)[:]).all()


@pytest.mark.parametrize("kind", ["cls", "patch"])
def test_zarrs_reads_equal_values(small, kind):
    pytest.importorskip("zarrs")
    expected = small.array(SITE, kind)[:]
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        array = zarr.open_array(small.storage.uri(small.spec(SITE, kind).path), mode="r")
        assert "Zarrs" in type(array.async_array.codec_pipeline).__name__
        assert (array[:] == expected).all()


def test_xarray_opens_a_site_as_one_dataset(small):
    xarray = pytest.importorskip("xarray")
    data = xarray.open_zarr(small.url, group=f"acts/{SITE}", consolidated=False)
    assert dict(data.sizes) == {"item": 22, "cls_token": 1, "patch_token": 6, "channel": 8}
    assert set(data.data_vars) == {"cls", "patch"}
    assert (data["patch"].values == small.array(SITE, "patch")[:]).all()


def test_stats_are_zarr_arrays_too(tmp_path):
    store = actstore.write_arrays(tmp_path / "a.zarr", {SITE: {"cls": values((9, 1, 4))}})
    store.compact()
    group = zarr.open_group(store.url, mode="r")[f"stats/{SITE}/cls"]
    assert group["count"][()] == 9
    np.testing.assert_array_equal(group["mean"][:], store.stats(SITE, "cls").mean)
    np.testing.assert_array_equal(group["m2"][:], store.stats(SITE, "cls").m2)
    np.testing.assert_array_equal(group["absmax"][:], store.stats(SITE, "cls").absmax)


def test_stripes_lie_where_the_shard_says(small):
    for part in range(small.manifest.n_parts):
        shard = small.shard(SITE, "patch", part)
        with open(shard.uri, "rb") as file:
            data = file.read()
        array = small.spec(SITE, "patch")
        assert len(data) == layout.shard_bytes(small.manifest, array)
        index = data[-layout.index_bytes(array) :]
        assert (layout.decode_index(index, array, len(data)) == shard.spans).all()
        for token, (offset, length) in enumerate(shard.spans.tolist()):
            stripe = np.frombuffer(data[offset : offset + length], "<f2").reshape(5, 1, 8)
            rows = small.array(SITE, "patch")[part * 5 : part * 5 + shard.items, token]
            assert (stripe[: shard.items, 0] == rows).all()
            assert not stripe[shard.items :].any()


@pytest.mark.parametrize("where", [0, 8, -1])
def test_a_damaged_index_is_refused(small, where):
    array = small.spec(SITE, "patch")
    index = bytearray(layout.encode_index(layout.raw_spans(small.manifest, array)))
    index[where] ^= 1
    with pytest.raises(FormatError, match=r"checksum of a shard's index is wrong"):
        layout.decode_index(bytes(index), array, 10**6)


def test_an_index_that_points_outside_is_refused(small):
    array = small.spec(SITE, "patch")
    spans = layout.raw_spans(small.manifest, array)
    spans[2] = [-8, 80]  # wraps round to a huge unsigned offset
    with pytest.raises(FormatError, match=r"points outside of the shard"):
        layout.decode_index(layout.encode_index(spans), array, 10**6)
    with pytest.raises(FormatError, match=r"has 3 bytes, 100 due"):
        layout.decode_index(b"abc", array, 10**6)


@pytest.mark.parametrize(
    "special", [0.0, -0.0, 1e-40, 65504.0, 3.3895314e38, float("inf"), -float("inf")]
)
def test_bfloat16_rounds_as_torch_does(special):
    many = np.concatenate([values(1000) * 10.0**e for e in range(-30, 30, 7)]).astype(np.float32)
    many = np.append(many, np.float32(special))
    truth = torch.from_numpy(many).to(torch.bfloat16)
    assert (layout.to_bfloat16(many) == truth.view(torch.uint16).numpy()).all()
    wide = layout.from_stored(layout.to_bfloat16(many), "bfloat16")
    np.testing.assert_array_equal(wide, truth.float().numpy())


def test_bfloat16_keeps_nan():
    odd = np.array([np.nan, 1.0], np.float32)
    odd[:1] = np.array([0x7FFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(layout.from_stored(layout.to_bfloat16(odd), "bfloat16")).tolist() == [
        True,
        False,
    ]


def test_plan_to_the_byte():
    array = ArraySpec(site="a", kind="patch", tokens=6, channels=8, stripe_tokens=2)
    manifest = Manifest(items=22, items_per_part=5, arrays=(array,), dtype="float32")
    assert layout.stripe_bytes(manifest, array) == 5 * 2 * 8 * 4
    assert layout.shard_bytes(manifest, array) == 3 * 320 + 3 * 16 + 4


def test_float16_is_widened_exactly():
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)].reshape(-1, 8)
    wide = layout.widen(every, "float16", np.empty(every.shape, np.int32))
    assert (wide.view(np.uint32) == every.astype(np.float32).view(np.uint32)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_other_dtypes_are_widened_exactly(dtype):
    stored = (values((40, 8)) * 30).astype("int8" if dtype == "int8" else "float32")
    stored = layout.to_bfloat16(stored) if dtype == "bfloat16" else stored
    wide = layout.widen(stored, dtype, np.empty(stored.shape, np.int32))
    assert (wide == layout.from_stored(stored, dtype)).all()
