"""Packed columns come back as they went in, to the step."""

import zlib
from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dictlearn.viz.site.shards import Shelf, column, numbers, pack

VALUES = st.lists(st.floats(1e-6, 1e6) | st.just(float("nan")), min_size=1, max_size=40)


def codes(data: str, size: int) -> np.ndarray:
    raw = np.frombuffer(zlib.decompress(b64decode(data), -15), np.uint8)
    if size == 1:
        return raw.astype(np.int64)
    low, high = raw.reshape(2, -1).astype(np.int64)
    out: np.ndarray = low + 256 * high
    return out


def unpacked(packed: dict[str, Any]) -> np.ndarray:
    code = codes(packed["data"], packed["bytes"])
    x = packed["low"] + packed["step"] * code
    x[code == 256 ** packed["bytes"] - 1] = np.nan
    out: np.ndarray = np.exp(x) if packed["as"] == "log" else x
    return out


@given(VALUES, st.booleans(), st.sampled_from([2, 255, 256, 4096, 65535]))
def test_columns_to_the_step(values: list[float], log: bool, steps: int) -> None:
    x = np.array(values)
    packed = column(x, log=log, steps=steps)
    found = unpacked(packed)
    assert (np.isnan(found) == np.isnan(x)).all()
    known = ~np.isnan(x)
    gap = np.abs(np.log(found / x)) if log else np.abs(found - x)
    assert (gap[known] <= 0.51 * packed["step"] + 1e-9 * np.abs(x[known])).all()


@given(st.lists(st.integers(-1, 2**31), min_size=1, max_size=40))
def test_numbers_are_exact(values: list[int]) -> None:
    packed = numbers(np.array(values))
    low = codes(packed["data"], 2)
    found = low + 65536 * codes(packed["high"], 2) if packed["as"] == "wide" else low
    missing = 2**32 - 1 if packed["as"] == "wide" else 65535
    assert [-1 if v == missing else v for v in found.tolist()] == values


def test_sixteenths_are_exact_in_a_given_span() -> None:
    x = np.arange(2, 17) / 16
    assert np.allclose(unpacked(column(x, steps=241, span=(0.0, 1.0))), x, atol=1e-12)


def test_a_log_column_has_no_place_for_zero() -> None:
    assert np.isnan(unpacked(column(np.array([0.0, 0.5, 1.0]), log=True))).tolist() == [
        True,
        False,
        False,
    ]


def test_data_files_are_scripts_without_markup(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.put("a/b", ["</script><!--", "\u2028", "é"])
    text = (tmp_path / "data" / "a" / "b.js").read_bytes()
    assert text.isascii()
    assert b"<" not in text
    assert text.startswith(b'View.put("a/b",[')
    assert shelf.bytes == len(text)
    with pytest.raises(ValueError, match="not JSON compliant"):
        shelf.put("c", float("nan"))
    with pytest.raises(ValueError, match="uint8 or uint16"):
        pack(np.zeros(3))
