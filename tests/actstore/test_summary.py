"""Summaries against numpy, planted outliers found, and what the command writes."""

import json

import numpy as np
import pytest

import actstore
from actstore.cli import main
from actstore.summary import summarise


@pytest.fixture
def planted(tmp_path):
    values = np.random.default_rng(0).normal(size=(50, 6, 32)).astype(np.float32)
    values[:, :, 5] *= 20
    values[37, 2, 9] = 4000
    cls = np.ones((50, 1, 8), np.float32)
    arrays = {"blocks.0.resid_post": {"cls": cls, "patch": values}}
    store = actstore.write_arrays(tmp_path / "a", arrays, items_per_part=7)
    return store, values


def test_figures_are_those_of_numpy_and_plants_are_found(planted):
    store, _ = planted
    values = store.dask("blocks.0.resid_post", "patch").compute(scheduler="sync").astype(float)
    cls, patch = summarise(store, scheduler="sync")
    norms = np.sqrt((values**2).sum(2))
    assert (patch.site, patch.kind, patch.tokens) == ("blocks.0.resid_post", "patch", 300)
    assert np.allclose(patch.rms, np.sqrt((values**2).mean((0, 1))), rtol=1e-5)
    assert np.allclose(patch.position_norm, np.sqrt((norms**2).mean(0)), rtol=1e-5)
    assert np.allclose(patch.position_absmax, np.abs(values).max((0, 2)))
    assert patch.norm == pytest.approx(np.sqrt((norms**2).mean()), rel=1e-5)
    assert patch.median_norm == pytest.approx(np.median(norms), rel=0.03)
    assert patch.outlier_channels.tolist() == [9, 5]
    top = patch.top[0]
    item, token = divmod(int(norms.argmax()), 6)
    assert (top["item"], top["token"], top["channel"], top["value"]) == (item, token, 9, 4000)
    assert top["massive"]
    listed = [t["norm"] for t in patch.top]
    assert np.allclose(listed, np.sort(norms.ravel())[::-1][: len(listed)], rtol=1e-5)
    assert abs(patch.outlier_tokens - (norms > 3 * np.median(norms)).sum()) <= 3
    assert (cls.tokens, cls.outlier_tokens, len(cls.outlier_channels)) == (50, 0, 0)
    assert cls.median_norm == pytest.approx(8**0.5, rel=0.03)


def test_zeros_and_one_item(tmp_path):
    arrays = {"s": {"item": np.zeros((1, 1, 4), np.float16)}}
    (found,) = summarise(actstore.write_arrays(tmp_path / "a", arrays), scheduler="sync")
    assert (found.norm, found.median_norm, found.outlier_tokens) == (0, 0, 0)
    json.dumps(found.to_json(), allow_nan=False)


def test_command(planted, tmp_path, capsys):
    store, _ = planted
    words = ["stats", str(store.url), "--png", f"{tmp_path}/a.png", "--json", f"{tmp_path}/a.json"]
    assert main(words) == 0
    assert "50 items of 50" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    value = json.loads((tmp_path / "a.json").read_text())
    assert value["fingerprint"] == store.fingerprint
    assert value["arrays"][1]["outlier_channels"] == [9, 5]
    assert len(value["arrays"][1]["position_norm"]) == 6
    assert main(["stats", str(store.url), "--sites", "blocks.9.z"]) == 1
    assert "no site matches" in capsys.readouterr().err
