"""What one pass gathers equals what dense codes say; and the numbers of the table."""

import itertools

import numpy as np
import pytest
import torch

import actstore
from actstore.store import Store
from dictlearn.analysis import sparsity
from dictlearn.config import ReLU, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.viz.site.facts import facts, label_names, neighbours
from dictlearn.viz.site.gather import BINS, Gather, lots
from dictlearn.viz.site.passes import look

ITEMS, PATCHES, WIDTH, LATENTS = 30, 6, 8, 20


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Store:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(ITEMS, 1 + PATCHES, WIDTH)).astype(np.float32)
    return actstore.write_arrays(
        tmp_path_factory.mktemp("small") / "acts.zarr",
        {"embed": {"cls": x[:, :1], "patch": x[:, 1:]}},
        dtype="float32",
        items_per_part=7,
        table={"label_name": [f"label {i % 3}" for i in range(ITEMS)]},
    )


def dense(store: Store, d: Dictionary) -> np.ndarray:
    """Activations [item, token, latent]."""
    x = np.concatenate([store.dask("embed", k).compute() for k in ("cls", "patch")], axis=1)
    with torch.no_grad():
        codes = d.encode(torch.from_numpy(x).flatten(0, 1))
    out: np.ndarray = codes.view(ITEMS, 1 + PATCHES, LATENTS).numpy()
    return out


def gathering(**changes: object) -> Gather:
    options = {"latents": LATENTS, "first": (0, 1), "width": 1 + PATCHES, "ceiling": 8.0}
    return Gather(**{**options, "tokens": ITEMS * (1 + PATCHES), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("sparsify", [TopK(4), ReLU(l1=0.0)], ids=str)
@pytest.mark.parametrize("scheduler", ["threads", "synchronous"])
def test_gathered_equals_dense(small: Store, sparsify: TopK | ReLU, scheduler: str) -> None:
    d = Dictionary({"embed": WIDTH}, latents=LATENTS, sparsify=sparsify)
    gather = gathering(top=5, drawn=9)
    found = sparsity(small, d, also=(gather,), scheduler=scheduler)
    got = found.also[0]
    a = dense(small, d)

    place = np.zeros((LATENTS, 1 + PATCHES), np.int64)
    place.ravel()[got.place.key] = got.place.count
    assert (place == (a != 0).sum(0).T).all()
    bins = np.zeros((LATENTS, BINS), np.int64)
    bins.ravel()[got.histogram.key] = got.histogram.count
    assert (bins.sum(1) == (a != 0).sum((0, 1))).all()
    edges = gather.edges()
    for latent, b in zip(*np.nonzero(bins[:, 1:]), strict=True):
        inside = (a[..., latent] >= edges[b + 1]) & (a[..., latent] < edges[b + 2])
        assert bins[latent, b + 1] == inside.sum()

    best_item = a.max(1)  # [item, latent]
    for latent in range(LATENTS):
        active = np.flatnonzero(best_item[:, latent] > 0)
        order = active[np.argsort(-best_item[active, latent], kind="stable")][:5]
        mine = got.best[got.best["latent"] == latent]
        assert mine["row"].tolist() == order.tolist()
        assert np.allclose(mine["value"], best_item[order, latent])
        assert (mine["token"] == a[order, :, latent].argmax(1)).all()
        drawn = got.sample[got.sample["latent"] == latent]
        lot = lots(np.full(len(active), latent), active, 0)
        assert set(drawn["row"]) == set(active[np.argsort(lot)][:9])
        assert np.allclose(drawn["value"], best_item[drawn["row"], latent])
        for row in {*mine["row"], *drawn["row"]}:
            cells = got.cells[(got.cells["latent"] == latent) & (got.cells["row"] == row)]
            patches = cells[cells["token"] > 0]
            assert set(patches["token"]) == set(np.flatnonzero(a[row, 1:, latent]) + 1)
            assert np.allclose(patches["value"], a[row, patches["token"], latent])

    on = a.reshape(-1, LATENTS) != 0
    assert got.sampled == len(on)
    alone = np.zeros(LATENTS, np.int64)
    alone[got.alone.key] = got.alone.count
    assert (alone == on.sum(0)).all()
    together = np.zeros((LATENTS, LATENTS), np.int64)
    together.ravel()[got.together.key] = got.together.count
    for x, y in itertools.combinations(range(LATENTS), 2):
        assert together[x, y] == (on[:, x] & on[:, y]).sum()


def test_cofiring_is_bounded_by_its_budget(small: Store) -> None:
    d = Dictionary({"embed": WIDTH}, latents=LATENTS, sparsify=TopK(4))
    got = sparsity(small, d, also=(gathering(pairs=16 * 50),)).also[0]
    assert 20 < got.sampled <= 50
    assert got.alone.count.sum() == 4 * got.sampled


def test_two_collectors_share_a_pass(small: Store) -> None:
    d = Dictionary({"embed": WIDTH}, latents=LATENTS, sparsify=TopK(4))
    found = sparsity(small, d, top=2, also=(gathering(top=2), gathering(top=4)))
    few, more = found.also
    assert len(few.best) < len(more.best)
    assert len(few.best) == found.top.num_rows


def test_facts(small: Store) -> None:
    d = Dictionary({"embed": WIDTH}, latents=LATENTS, sparsify=TopK(4))
    with torch.no_grad():
        d.b_enc[3] = -1e3  # never active
        d.W_dec[5] = 2 * d.W_dec[6]
    gather = gathering(top=6)
    found = sparsity(small, d, also=(gather,))
    names, label_R = label_names(small.table().to_pylist())
    known = facts(found, found.also[0], d, patches=(1, 7), width=7, labels=label_R)
    a = dense(small, d)
    assert known.kinds == ("cls", "patch", "mixed", "dead")
    assert known.kind[3] == 3
    assert np.isnan([known.mean[3], known.largest[3], known.purity[3], known.entropy[3]]).all()
    assert known.near[5, 0] == 6
    assert known.cosine[5, 0] == pytest.approx(1)
    for latent in (f for f in range(LATENTS) if f != 3):
        active = a[..., latent] > 0
        assert known.density[latent] == pytest.approx(active.mean())
        assert known.mean[latent] == pytest.approx(a[..., latent][active].mean(), rel=1e-5)
        count = active[:, 1:].sum(0)
        share = count[count > 0] / count.sum()
        most = np.log(min(PATCHES, count.sum()))
        assert known.entropy[latent] == pytest.approx(-(share * np.log(share)).sum() / most)
        best = np.argsort(-a[..., latent].max(1), kind="stable")[:6]
        labels = [names[label_R[row]] for row in best if a[row, :, latent].max() > 0]
        counts = {name: labels.count(name) for name in labels}
        assert known.purity[latent] == pytest.approx(max(counts.values()) / len(labels))
        assert counts[names[known.label[latent]]] == max(counts.values())
        cls, patch = active[:, 0].mean(), active[:, 1:].mean()
        kind = "mixed" if min(cls, patch) >= max(cls, patch) / 2 else None
        kind = kind or ("cls" if cls > patch else "patch")
        assert known.kinds[known.kind[latent]] == kind


def test_nearest_of_blocks_is_that_of_the_whole() -> None:
    d = Dictionary({"embed": 16}, latents=1500, sparsify=TopK(4), seed=3)
    near, cosine = neighbours(d, 3)
    rows = torch.nn.functional.normalize(d.W_dec.detach(), dim=1)
    whole = rows @ rows.T
    whole.fill_diagonal_(-2)
    assert np.allclose(cosine, whole.topk(3, dim=1).values.numpy(), atol=1e-5)
    assert (near != np.arange(1500)[:, None]).all()


def test_records_hold_groups_of_falling_activation(small: Store) -> None:
    d = Dictionary({"embed": WIDTH}, latents=LATENTS, sparsify=TopK(4))
    _, labels = label_names(small.table().to_pylist())
    one = look(small, d, name="d", folder="d0", labels=labels, tokens="patch", top=3, seed=1)
    record = one.pages.record(1)
    assert [len(g) for g in record["random"]] != []
    values = [entry[2] for group in record["random"] for entry in group]
    assert values == sorted(values, reverse=True)
    assert record["fired"] == [int((dense(small, d)[:, 1:, 1] > 0).sum())]
    assert sum(record["histogram"][1]) == sum(record["place"][1]) == record["fired"][0]
    assert min(record["place"][0]) >= 1
