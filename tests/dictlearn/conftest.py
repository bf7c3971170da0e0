"""A small store of planted activations."""

from pathlib import Path

import numpy as np
import pytest

import actstore
from actstore.store import Store

SITES = ("blocks.0.resid_post", "blocks.1.resid_post")


def planted(items: int = 60, tokens: int = 9, width: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    atoms = rng.normal(size=(32, width))
    codes = (rng.random((items, tokens, 32)) < 0.1) * rng.random((items, tokens, 32))
    return (codes @ atoms + 0.5 * rng.normal(size=width)).astype(np.float32)


def write_store(folder: Path, seed: int = 0, dtype: str | None = None) -> Store:
    arrays = {}
    for i, site in enumerate(SITES):
        values = planted(seed=seed + i, width=16 + 8 * i) * (1 + 4 * i)
        arrays[site] = {"cls": values[:, :1], "patch": values[:, 1:]}
    return actstore.write_arrays(
        folder / "acts.zarr",
        arrays,
        dtype=dtype,
        items_per_part=10,
        table={"label": np.arange(60) % 3},
    )


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("store"))
