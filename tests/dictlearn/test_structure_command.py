"""The commands that look at latents among themselves."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import actstore
from actstore.store import Store
from dictlearn.cli import main
from dictlearn.config import TopK
from dictlearn.dictionary import Dictionary
from dictlearn.formats import save

A = "blocks.0.resid_post"


def words(text: str) -> str:
    return " ".join(text.split())


def test_structure_of_two_permuted_dictionaries(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    d = Dictionary({A: 16}, latents=30, sparsify=TopK(3))
    other = Dictionary({A: 16}, latents=30, sparsify=TopK(3), seed=1)
    order = np.random.default_rng(0).permutation(30)
    with torch.no_grad():
        d.W_dec[4] = d.W_dec[5]
        other.W_dec.copy_(d.W_dec[order])
        other.W_enc.copy_(d.W_enc[:, order])
    folders = [str(save(v, tmp_path / n)) for v, n in ((d, "a"), (other, "b"))]
    out = tmp_path / "out"
    assert main(["structure", *folders, "--store", store.url, "--out", str(out)]) == 0
    text = words(capsys.readouterr().out)
    assert "1.000" in text
    assert "100.0%" in text
    assert {p.name for p in out.iterdir()} == {
        "cosines-a.parquet",
        "cosines-b.parquet",
        "matching-b.parquet",
    }
    cosine = pq.read_table(out / "cosines-a.parquet")["cosine"].to_numpy()
    assert cosine[4] == pytest.approx(1, abs=1e-6)


def test_coactivation_and_absorption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    label = np.arange(120) % 2
    x = (rng.normal(size=(120, 1, 16)) + 2 * label[:, None, None]).astype(np.float32)
    store = actstore.write_arrays(
        tmp_path / "s.zarr", {A: {"cls": x}}, items_per_part=40, table={"label": label}
    )
    folder = str(save(Dictionary({A: 16}, latents=30, sparsify=TopK(3)), tmp_path / "a"))
    pairs = tmp_path / "pairs.parquet"
    assert main(["coactivation", folder, "--store", store.url, "--out", str(pairs)]) == 0
    assert "pairs on 120 tokens" in words(capsys.readouterr().out)
    assert set(pq.read_table(pairs).column_names) >= {"together", "jaccard", "phi"}
    table = tmp_path / "absorption.parquet"
    assert main(["absorption", folder, "--store", store.url, "--out", str(table)]) == 0
    assert "absorbed" in words(capsys.readouterr().out)
    assert pq.read_table(table).num_rows == 2
    assert (
        main(["coactivation", folder, "--store", store.url, "--out", "x", "--latents", "99"]) == 1
    )
    assert "0 to 29" in capsys.readouterr().err
