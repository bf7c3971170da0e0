"""Evaluation against plain formulas over the whole store in memory."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import actstore
import vitmodels
from actstore.selection import Split
from actstore.store import Store
from dictlearn.analysis import Sparsity, sparsity
from dictlearn.config import ReLU, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.evaluation import evaluate
from dictlearn.report import Report, markdown

A, B = "blocks.0.resid_post", "blocks.1.resid_post"


def everything(store: Store, site: str) -> torch.Tensor:
    """Whole site [item, token, channel], CLS first."""
    parts = [store.dask(site, k).compute() for k in ("cls", "patch")]
    return torch.from_numpy(np.concatenate(parts, axis=1))


@pytest.fixture
def sae() -> Dictionary:
    d = Dictionary({A: 16}, latents=48, sparsify=TopK(4), seed=2)
    with torch.no_grad():
        d.b_enc[:5] = -100.0
    return d


def test_report_equals_plain_formulas(store: Store, sae: Dictionary) -> None:
    x = everything(store, A)
    with torch.no_grad():
        acts = sae.encode(x.flatten(0, 1)).reshape(60, 9, 48)
        y = sae(x.flatten(0, 1)).reshape(x.shape)
    report = evaluate(sae, store, batch_size=100)
    active = (acts != 0).double()
    assert report.tokens == 540
    assert report.l0 == pytest.approx(float(active.sum(2).mean()))
    assert report.l0_by_kind["cls"] == pytest.approx(float(active[:, :1].sum(2).mean()))
    assert report.l0_by_kind["patch"] == pytest.approx(float(active[:, 1:].sum(2).mean()))
    wanted = active.sum(2).mean(0)
    assert list(report.l0_by_position) == list(range(9))
    assert report.l0_by_position == pytest.approx({t: float(v) for t, v in enumerate(wanted)})

    def fvu(a: torch.Tensor, b: torch.Tensor) -> float:
        a, b = a.flatten(0, 1).double(), b.flatten(0, 1).double()
        return float((a - b).square().sum() / (b - b.mean(0)).square().sum())

    assert report.fvu == pytest.approx(fvu(y, x), rel=1e-5)
    assert report.fvu_by_kind["cls"] == pytest.approx(fvu(y[:, :1], x[:, :1]), rel=1e-5)
    assert report.fvu_by_kind["patch"] == pytest.approx(fvu(y[:, 1:], x[:, 1:]), rel=1e-5)
    assert report.explained_variance == pytest.approx(1 - report.fvu)
    assert report.mse == pytest.approx(float((y - x).square().mean()), rel=1e-5)
    cosine = torch.cosine_similarity(y, x, dim=-1).mean()
    assert report.cosine == pytest.approx(float(cosine), rel=1e-5)
    rate = active.flatten(0, 1).mean(0)
    assert report.dead == pytest.approx(float((rate == 0).double().mean()))
    assert report.dead >= 5 / 48
    assert report.dense == pytest.approx(float((rate > 0.1).double().mean()))
    assert sum(report.density) == 48
    assert report.density[0] == int((rate == 0).sum())


def test_crosscoder_report_has_a_row_a_site(store: Store) -> None:
    d = Dictionary({A: 16, B: 24}, latents=48, sparsify=ReLU())
    report = evaluate(d, store, tokens="patch")
    assert report.tokens == 480
    assert list(report.l0_by_position) == list(range(1, 9))
    x = torch.cat([everything(store, s)[:, 1:].flatten(0, 1) for s in (A, B)], 1).double()
    with torch.no_grad():
        error = (d(x.float()).double() - x).square().sum(0)
    spread = (x - x.mean(0)).square().sum(0)
    assert report.fvu == pytest.approx(float(error.sum() / spread.sum()), rel=1e-5)
    for site, cut in ((A, slice(0, 16)), (B, slice(16, 40))):
        found = float(error[cut].sum() / spread[cut].sum())
        assert report.fvu_by_site[site] == pytest.approx(found, rel=1e-5)


def test_held_out_items_and_limit(store: Store, sae: Dictionary) -> None:
    half = Split(half="validation", holdout=0.25)
    report = evaluate(sae, store, items=half)
    assert report.tokens == 15 * 9
    assert "validation" in report.items
    seen: list[tuple[int, int]] = []
    short = evaluate(sae, store, limit=100, batch_size=64, on_event=lambda *a: seen.append(a))
    assert short.tokens == 12 * 9  # whole items
    assert seen == [(64, 108), (108, 108)]
    assert list(short.l0_by_position) == list(range(9))
    few = evaluate(sae, store, items=half, limit=50)
    assert few.tokens == 6 * 9
    assert few.items == report.items


def test_report_round_trip_and_table(store: Store, sae: Dictionary, tmp_path: Path) -> None:
    report = evaluate(sae, store, about={"name": "mine"})
    again = Report.from_json(json.loads(report.save(tmp_path / "r.json").read_text()))
    assert again == report
    assert "mine" in report.table()
    assert markdown([report, again]).count("\n") == 3
    assert f"{report.fvu:.4f}" in report.table()


def test_evaluating_what_the_store_lacks(store: Store) -> None:
    with pytest.raises(KeyError, match=r"no site 'blocks.9.resid_post'"):
        evaluate(Dictionary({"blocks.9.resid_post": 16}, latents=9, sparsify=TopK(2)), store)
    with pytest.raises(ValueError, match=r"has 24 channels .* stores 16"):
        evaluate(Dictionary({A: 24}, latents=9, sparsify=TopK(2)), store)
    with pytest.raises(KeyError, match=r"no tokens of kind 'pach'"):
        evaluate(Dictionary({A: 16}, latents=9, sparsify=TopK(2)), store, tokens="pach")
    with pytest.raises(ValueError, match=r"was not harvested from a model"):
        evaluate(Dictionary({A: 16}, latents=9, sparsify=TopK(2)), store, model=True)


# ---- dask ------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_sparsity_equals_plain_counts(store: Store, sae: Dictionary, scheduler: str) -> None:
    found = sparsity(store, sae, top=3, scheduler=scheduler)
    with torch.no_grad():
        acts = sae.encode(everything(store, A).flatten(0, 1)).reshape(60, 9, 48).numpy()
    active = acts != 0
    assert found.kinds == ("cls", "patch")
    assert found.tokens.tolist() == [60, 480]
    assert np.array_equal(found.fired[0], active[:, 0].sum(0))
    assert np.array_equal(found.fired[1], active[:, 1:].sum((0, 1)))
    assert np.allclose(found.total[1], acts[:, 1:].sum((0, 1)), rtol=1e-5)
    assert np.allclose(found.largest[1], acts[:, 1:].max((0, 1)))
    assert np.allclose(found.position_l0, active.sum(2).mean(0))
    assert found.l0 == pytest.approx(active.sum(2).mean())
    assert found.l0_by_kind["cls"] == pytest.approx(active[:, 0].sum(1).mean())
    assert found.dead == pytest.approx((active.sum((0, 1)) == 0).mean())
    # best items: the largest activation of each item, three a latent, by store position
    stored = store.table()["position"].to_numpy()
    peak = acts.max(1)
    rows = found.top.to_pylist()
    for latent in range(48):
        mine = [r for r in rows if r["latent"] == latent]
        order = np.argsort(-peak[:, latent], kind="stable")[:3]
        order = [i for i in order if peak[i, latent] > 0]
        assert [r["position"] for r in mine] == [int(stored[i]) for i in order]
        assert [r["rank"] for r in mine] == list(range(len(mine)))
        for r, i in zip(mine, order, strict=True):
            assert r["value"] == pytest.approx(peak[i, latent])
            assert r["token"] == int(acts[i, :, latent].argmax())


def test_sparsity_tables_and_agreement_with_evaluate(
    store: Store, sae: Dictionary, tmp_path: Path
) -> None:
    found: Sparsity = sparsity(store, sae, tokens="patch")
    report = evaluate(sae, store, tokens="patch")
    assert found.l0 == pytest.approx(report.l0)
    assert found.dead == pytest.approx(report.dead)
    assert found.latents().num_rows == 48
    assert found.positions()["token"].to_pylist() == list(range(1, 9))
    import pyarrow.parquet as pq

    folder = found.save(tmp_path / "s")
    assert pq.read_table(folder / "latents.parquet").equals(found.latents())
    assert pq.read_table(folder / "top.parquet").num_rows == 0


# ---- with a model ----------------------------------------------------------------------------
class Images(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(i)
        return torch.rand(1, 20, 20, generator=generator), i % 10


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, vitmodels.VisionModel]:
    model = vitmodels.load("toy/digits-2l", pretrained=False, seed=0)
    folder = tmp_path_factory.mktemp("toy") / "acts.zarr"
    site = "blocks.0.resid_post,blocks.1.mlp_out"
    store = actstore.harvest(
        model=model, data=Images(), sites=site, out=folder, device="cpu", batch_size=8, workers=1
    )
    return store, model


class Perfect(Dictionary):
    """Returns what it is given."""

    def decode_entries(self, entries, x_Br=None):  # type: ignore[no-untyped-def]
        return x_Br


def test_substitution_of_a_perfect_dictionary_changes_nothing(
    harvested: tuple[Store, vitmodels.VisionModel],
) -> None:
    store, model = harvested
    d = Perfect({A: 64}, latents=96, sparsify=TopK(4))
    found = evaluate(d, store, model=model, data=Images()).substitution
    assert found is not None
    assert found.images == 40
    assert found.target == "labels"
    assert found.ce["spliced"] == pytest.approx(found.ce["clean"], abs=1e-6)
    assert found.kl["spliced"] == pytest.approx(0, abs=1e-6)
    assert found.recovered == pytest.approx(1, abs=1e-3) or math.isnan(found.recovered)
    assert found.kl["zero"] > 1e-4
    assert found.kl["mean"] > 1e-6


def test_substitution_equals_a_plain_splice(
    harvested: tuple[Store, vitmodels.VisionModel],
) -> None:
    store, model = harvested
    d = Dictionary({A: 64}, latents=96, sparsify=TopK(4))
    found = evaluate(d, store, tokens="patch", model=model, data=Images(), images=16).substitution
    assert found is not None
    assert found.kinds == ("patch",)
    rows = store.table().slice(0, 16).to_pylist()
    x = torch.stack([Images()[r["source"]][0] for r in rows])
    label = torch.tensor([r["label"] for r in rows])

    def splice(value: torch.Tensor) -> torch.Tensor:
        patch = value[:, 1:]
        return torch.cat([value[:, :1], d(patch.flatten(0, 1)).reshape(patch.shape)], 1)

    with torch.no_grad():
        clean = model(x).log_softmax(-1)
        with model.editing({A: splice}):
            spliced = model(x).log_softmax(-1)
    nll = torch.nn.functional.nll_loss
    assert found.ce["clean"] == pytest.approx(float(nll(clean, label)), abs=1e-5)
    assert found.ce["spliced"] == pytest.approx(float(nll(spliced, label)), abs=1e-5)
    top1 = float((spliced.argmax(-1) == label).double().mean())
    assert found.top1["spliced"] == pytest.approx(top1)


def test_substitution_of_a_transcoder_writes_the_other_site(
    harvested: tuple[Store, vitmodels.VisionModel],
) -> None:
    store, model = harvested
    d = Dictionary({A: 64}, {"blocks.1.mlp_out": 64}, latents=96, sparsify=TopK(4))
    found = evaluate(d, store, model=model, data=Images(), images=8).substitution
    assert found is not None
    assert found.ce["spliced"] == pytest.approx(found.ce["zero"], abs=0.1)


def test_substitution_refuses_another_model_or_data_set(
    harvested: tuple[Store, vitmodels.VisionModel],
) -> None:
    store, _ = harvested
    d = Dictionary({A: 64}, latents=96, sparsify=TopK(4))
    other = vitmodels.load("toy/digits-2l", pretrained=False, seed=1)
    with pytest.raises(ValueError, match=r"the model is not the one"):
        evaluate(d, store, model=other, data=Images())
    model = vitmodels.load("toy/digits-2l", pretrained=False, seed=0)
    with pytest.raises(ValueError, match=r"cannot be opened again|pass it as data="):
        evaluate(d, store, model=model)
