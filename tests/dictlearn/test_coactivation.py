"""Pair counts against dense indicator matrices."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from actstore.store import Store
from dictlearn.coactivation import coactivation
from dictlearn.config import TopK
from dictlearn.dictionary import Dictionary

A = "blocks.0.resid_post"


def indicators(store: Store, d: Dictionary) -> np.ndarray:
    x = np.concatenate(
        [store.dask(A, k).compute().reshape(-1, 16) for k in ("cls", "patch")], axis=0
    )
    with torch.no_grad():
        return (d.encode(torch.from_numpy(x)) != 0).numpy()


@pytest.mark.parametrize("chosen", [None, (40, 3, 7, 3, 21, 22)])
def test_counts_jaccard_and_phi_are_those_of_the_indicators(
    store: Store, tmp_path: Path, chosen: tuple[int, ...] | None
) -> None:
    d = Dictionary({A: 16}, latents=48, sparsify=TopK(6), seed=2)
    on = indicators(store, d)
    found = coactivation(store, d, chosen, scheduler="synchronous")
    assert found.tokens == 540
    latents = sorted(set(chosen or range(48)))
    wanted = {
        (a, b): int((on[:, a] & on[:, b]).sum())
        for i, a in enumerate(latents)
        for b in latents[i + 1 :]
    }
    wanted = {pair: count for pair, count in wanted.items() if count}
    rows = found.pairs.to_pylist()
    assert {(r["first"], r["second"]): r["together"] for r in rows} == wanted
    for r in rows[:30]:
        a, b = on[:, r["first"]], on[:, r["second"]]
        assert r["alone_first"] == int((a & ~b).sum())
        assert r["alone_second"] == int((~a & b).sum())
        assert r["jaccard"] == pytest.approx((a & b).sum() / (a | b).sum())
        assert r["phi"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    file = found.save(tmp_path / "pairs.parquet")
    again = pq.read_table(file)
    assert again.schema.metadata[b"tokens"] == b"540"
    assert again.to_pylist() == rows


def test_what_cannot_be_paired(store: Store) -> None:
    d = Dictionary({A: 16}, latents=48, sparsify=TopK(6))
    with pytest.raises(ValueError, match=r"of 0 to 47; got \[3, 48\]"):
        coactivation(store, d, (3, 48))
    with pytest.raises(ValueError, match="two latents at least"):
        coactivation(store, d, (3,))
