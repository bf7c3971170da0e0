"""Moments of channels: whoever sums gives the same bits, and these are the moments."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.compile import compile_loop
from actstore.layout import from_stored, to_bfloat16
from actstore.moments import channel_moments, sum_rows


def _stored(dtype, shape, seed, mean=3.0):
    """Return values whose channels differ in scale and offset, as a store holds them."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.uniform(-3, 3, shape[-1]))
    values = ((rng.standard_normal(shape) + mean) * scale).astype(np.float32)
    return to_bfloat16(values) if dtype == "bfloat16" else values.astype(dtype)


def _same(one, other):
    assert one.count == other.count
    for name in ("mean", "m2", "absmax"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@settings(deadline=None)  # the first case compiles
@given(
    stripes=st.integers(1, 5), planned=st.integers(1, 300), short=st.floats(0, 1),
    channels=st.integers(1, 40), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_loop_and_numpy_give_the_same_bits(dtype, stripes, planned, short, channels, seed):
    values = _stored(dtype, (stripes, planned, channels), seed)
    rows = round(short * planned)
    one = channel_moments(values, dtype, rows, None)
    assert one.count == stripes * rows
    _same(one, channel_moments(values, dtype, rows))
    _same(one, channel_moments(np.ascontiguousarray(values[:, :rows]), dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_loop_is_the_same_compiled_and_as_python(dtype):
    assert compile_loop(sum_rows) is not None, "the tests need the extra fast"
    values = _stored(dtype, (2, 7, 5), 0)
    _same(channel_moments(values, dtype, 6, sum_rows), channel_moments(values, dtype, 6))


@pytest.mark.parametrize("loop", [None, "compiled"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_moments_are_those_of_float64(loop, dtype, mean):
    """Means of 300 standard deviations, as massive channels have, lose no variance."""
    values = _stored(dtype, (9, 128, 24), 1, mean)
    wide = from_stored(values[:, :100], dtype).astype(np.float64).reshape(900, 24)
    total = channel_moments(values, dtype, 100, loop)
    np.testing.assert_allclose(total.mean, wide.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(total.var, wide.var(0), rtol=1e-5)
    np.testing.assert_array_equal(total.absmax, np.abs(wide).max(0))


@pytest.mark.parametrize("loop", [None, "compiled"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("row", [0, 5])
def test_a_value_that_is_not_finite_is_seen(loop, bad, row):
    values = _stored("float16", (2, 9, 4), 2)
    values[1, row, 2] = bad
    total = channel_moments(values, "float16", loop=loop)
    assert np.isfinite(total.absmax).tolist() == [True, True, False, True]


def test_without_numba_numpy_sums(monkeypatch):
    """A missing extra costs time, not the store."""
    compile_loop.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)
    try:
        assert compile_loop(sum_rows) is None
        values = _stored("float16", (2, 40, 6), 3)
        total = channel_moments(values, "float16")
    finally:
        compile_loop.cache_clear()
    np.testing.assert_allclose(total.mean, values.astype("f8").mean((0, 1)), rtol=1e-5)


def test_where_no_cache_can_be_written_loops_are_compiled_all_the_same(tmp_path):
    """As in a container whose site-packages and home are read-only."""
    code = """
import numba
from numba.core import caching
for locator in caching.CacheImpl._locator_classes:
    locator.from_function = classmethod(lambda *args: None)
from actstore.compile import compile_loop
from actstore.moments import sum_rows
try:
    numba.njit(cache=True)(sum_rows)
except RuntimeError:
    print("no cache,", compile_loop(sum_rows).targetoptions["nogil"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "no cache, True", done.stderr
