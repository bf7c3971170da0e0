"""Precision of the forward pass, compilation, and going on when memory runs out."""

import shutil

import numpy as np
import pytest
import torch
from fake_model import FakeModel

import actstore
import vitmodels
from actstore.verify import verify_against_model

SITE = "blocks.1.resid_post"


class SmallDevice(FakeModel):
    """Has memory for `room` items at a time."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def run(self, x, sites, stop_early=True):
        if len(x) > self.room:
            self.batches.append(-len(x))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().run(x, sites, stop_early)


def harvest(out, model, **options):
    options = {"data": "digits", "sites": SITE, "limit": 40, "batch_size": 16, **options}
    return actstore.harvest(model=model, out=out, **options)


def test_a_batch_is_halved_when_memory_runs_out_and_stays_small(tmp_path):
    small = SmallDevice(room=5)
    found = harvest(tmp_path / "small", small, limit=200)
    whole = harvest(tmp_path / "whole", FakeModel(), limit=200)
    assert (found.array(SITE, "patch")[:] == whole.array(SITE, "patch")[:]).all()
    tried = [-n for n in small.batches if n < 0]
    assert len(tried) == 2  # 13 items, then 7; from then on 4 at a time
    assert tried == [found.manifest.items_per_part, (found.manifest.items_per_part + 1) // 2]
    assert max(small.batches) == 4


def test_no_memory_for_one_item_says_what_helps(tmp_path):
    with pytest.raises(ValueError, match=r"no memory for a single item of fake/linear.*--device"):
        harvest(tmp_path / "a", SmallDevice(room=0))


def test_autocast_is_the_forward_pass_under_autocast(tmp_path):
    model = vitmodels.load("toy/digits-2l")
    store = harvest(tmp_path / "a", model, autocast="bfloat16", dtype="bfloat16", batch_size=8)
    assert store.manifest.compute == {"batch_size": 8, "autocast": "bfloat16"}
    plain = harvest(tmp_path / "b", model, dtype="float32", batch_size=8)
    found, exact = store.dask(SITE, "patch").compute(), plain.dask(SITE, "patch").compute()
    error = np.abs(found - exact).max() / exact.std()
    assert 1e-4 < error < 0.2  # another precision, the same pass
    from actstore.sources import open_source

    compared = verify_against_model(store, model, open_source("digits"), items=5)
    assert not any(one.differing for one in compared)


def test_another_precision_does_not_go_on_with_a_store(tmp_path):
    harvest(tmp_path / "a", FakeModel())
    with pytest.raises(ValueError, match="autocast"):
        harvest(tmp_path / "a", FakeModel(), autocast="bfloat16")


def test_unknown_precision(tmp_path):
    with pytest.raises(ValueError, match="autocast 'int4' is none of bfloat16, float16"):
        harvest(tmp_path / "a", FakeModel(), autocast="int4")


def test_compile_is_asked_of_the_model_and_recorded(tmp_path):
    class Compiles(FakeModel):
        compiled = 0

        def compile(self):
            self.compiled += 1

    model = Compiles()
    store = harvest(tmp_path / "a", model, compile=True)
    assert model.compiled == 1
    assert store.manifest.compute["compile"] is True


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_by_the_real_compiler_is_the_same_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    options = {"limit": 16, "batch_size": 8, "dtype": "float32", "sites": "blocks.*.resid_post"}
    plain = harvest(tmp_path / "plain", "toy/digits-1l", **options)
    store = harvest(tmp_path / "compiled", "toy/digits-1l", compile=True, **options)
    assert list((tmp_path / "cache").rglob("*.so")), "no machine code was made"
    found = store.array("blocks.0.resid_post", "patch")[:]
    np.testing.assert_allclose(
        found, plain.array("blocks.0.resid_post", "patch")[:], rtol=1e-4, atol=1e-5
    )
