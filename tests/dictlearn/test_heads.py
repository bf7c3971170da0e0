"""Heads on stores whose answer is known, and what they say of a splice."""

from pathlib import Path

import numpy as np
import pytest
import torch

import actstore
import vitmodels
from actstore.selection import Split
from actstore.store import Store
from dictlearn.config import TopK
from dictlearn.dictionary import Dictionary
from dictlearn.evaluation import evaluate
from dictlearn.heads import ModelHead, Probe, default_probe_site, features, fit_probe, model_heads
from dictlearn.report import Report

A, B = "blocks.0.resid_post", "blocks.1.resid_post"


class Squares(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Pictures whose label, of three, is the corner that is bright."""

    def __len__(self) -> int:
        return 90

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        x = 0.1 * torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(i))
        row, column = ((0, 0), (0, 10), (10, 0))[i % 3]
        x[:, row : row + 10, column : column + 10] += 0.8
        return x, i % 3


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, vitmodels.VisionModel]:
    model = vitmodels.load("toy/digits-2l", pretrained=False, seed=0)
    folder = tmp_path_factory.mktemp("squares") / "acts.zarr"
    options = {"out": folder, "device": "cpu", "batch_size": 16, "workers": 1}
    sites = f"{A},{B},blocks.1.mlp_out"
    store = actstore.harvest(model=model, data=Squares(), sites=sites, **options)
    return store, model


@pytest.fixture(scope="module")
def probe(harvested: tuple[Store, vitmodels.VisionModel]) -> Probe:
    return fit_probe(harvested[0], items=Split(half="train", holdout=0.3))


def test_probe_separates_on_items_it_has_not_seen(
    harvested: tuple[Store, vitmodels.VisionModel], probe: Probe
) -> None:
    store, _ = harvested
    assert (probe.site, probe.kind) == (B, "cls")
    assert probe.accuracy == 1
    x_Nd, position = features(store, B, "cls", Split(half="validation", holdout=0.3))
    assert len(position) == 27
    label = np.array(store.table()["label"].to_pylist())[position]
    logits_NC = probe.logits(torch.from_numpy(x_Nd))
    assert logits_NC.shape == (27, 3)
    assert (logits_NC.argmax(1).numpy() == label).mean() > 0.9


def test_features_are_means_over_the_tokens_of_a_kind(
    harvested: tuple[Store, vitmodels.VisionModel],
) -> None:
    store, _ = harvested
    x_Nd, position = features(store, A, "patch")
    whole = store.dask(A, "patch").compute().astype(np.float32).mean(1)
    order = np.argsort(store.table()["position"].to_numpy())
    assert np.array_equal(position, np.arange(90))
    assert np.allclose(x_Nd, whole[order], atol=1e-5)


def test_a_probe_of_two_labels_is_the_logistic_regression_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    label = np.arange(80) % 2
    x = (rng.normal(size=(80, 1, 6)) + label[:, None, None]).astype(np.float32)
    store = actstore.write_arrays(
        tmp_path / "a.zarr", {A: {"cls": x}}, items_per_part=20, table={"label": label}
    )
    p = fit_probe(store, A).logits(torch.from_numpy(x[:, 0])).softmax(1).numpy()
    scaled = (x[:, 0] - x[:, 0].mean(0)) * x[:, 0].var(0).mean() ** -0.5
    plain = LogisticRegression(max_iter=300, tol=1e-6).fit(scaled, label)
    assert np.allclose(p, plain.predict_proba(scaled), atol=0.01)
    assert 0.05 < np.abs(p[:, 0] - 0.5).mean() < 0.45


def test_substitution_by_the_model_and_a_probe_in_one_pass(
    harvested: tuple[Store, vitmodels.VisionModel], probe: Probe
) -> None:
    store, model = harvested
    d = Dictionary({A: 64}, latents=96, sparsify=TopK(4))
    half = Split(half="validation", holdout=0.3)
    options = {"items": half, "model": model, "data": Squares()}
    report = evaluate(d, store, heads=[ModelHead(), probe], **options)
    (by_probe,) = report.other_heads
    alone = evaluate(d, store, **options)
    assert report.substitution == alone.substitution
    assert report.substitution is not None
    assert report.substitution.head == "model"
    assert by_probe.head == f"probe {B} cls"
    assert by_probe.images == 27
    assert by_probe.top1["clean"] > 0.9
    assert by_probe.ce["spliced"] > by_probe.ce["clean"] + 0.1
    for one in (report.substitution, by_probe):
        assert one.ce["error"] == pytest.approx(one.ce["clean"], abs=1e-5)
        assert one.kl["error"] == pytest.approx(0, abs=1e-6)
    assert Report.from_json(report.to_json()) == report
    row = report.row()
    assert row["CE clean"] == f"{report.substitution.ce['clean']:.4f}"
    assert row[f"probe {B} cls: CE clean"] == f"{by_probe.ce['clean']:.4f}"


def test_the_probes_answer_is_that_of_a_plain_splice(
    harvested: tuple[Store, vitmodels.VisionModel], probe: Probe
) -> None:
    store, model = harvested
    d = Dictionary({A: 64}, latents=96, sparsify=TopK(4))
    half = Split(half="validation", holdout=0.3)
    found = evaluate(d, store, items=half, model=model, data=Squares(), heads=[probe]).substitution
    assert found is not None
    _, position = features(store, B, "cls", half)
    rows = {r["position"]: r for r in store.table().to_pylist()}
    x = torch.stack([Squares()[rows[int(p)]["source"]][0] for p in position])
    label = torch.tensor([rows[int(p)]["label"] for p in position])
    with torch.no_grad(), model.editing({A: lambda a: d(a.flatten(0, 1)).view_as(a)}):
        value = model.run(x, sites=[B])[B]
    log_p = probe.logits(value[:, 0]).log_softmax(-1)
    nll = float(torch.nn.functional.nll_loss(log_p, label))
    assert found.ce["spliced"] == pytest.approx(nll, abs=1e-4)


def test_a_probe_sees_a_splice_at_its_own_site(
    harvested: tuple[Store, vitmodels.VisionModel], probe: Probe
) -> None:
    store, model = harvested
    d = Dictionary({B: 64}, latents=96, sparsify=TopK(4))
    found = evaluate(d, store, model=model, data=Squares(), heads=[probe], images=30).substitution
    assert found is not None
    assert found.ce["spliced"] > found.ce["clean"]
    label = store.table()["label"].to_pylist()[:30]
    of_zero = probe.logits(torch.zeros(1, 64)).log_softmax(1)[0]
    plain = -float(np.mean([float(of_zero[i]) for i in label]))
    assert found.ce["zero"] == pytest.approx(plain, abs=1e-4)


def test_the_default_site_is_not_before_the_splice(
    harvested: tuple[Store, vitmodels.VisionModel],
) -> None:
    store, _ = harvested
    assert default_probe_site(store, [A]) == (B, "cls")


def test_zero_shot_models_have_two_temperatures() -> None:
    from vitmodels.zeroshot import ZeroShotHead

    weight_CE = torch.nn.functional.normalize(torch.arange(6.0).view(2, 3), dim=1)

    class Model:
        module = type("M", (), {"head": ZeroShotHead(weight_CE, scale=50.0, bias=-3.0)})()

        def sites(self) -> dict[str, None]:
            return {"logits": None}

    trained, one = model_heads(Model())
    features_BE = torch.tensor([[1.0, 2.0, 0.5]])
    logits_BC = Model.module.head(features_BE)
    assert trained.name == "zero-shot at 50"
    assert torch.equal(trained(logits_BC, None), logits_BC)  # type: ignore[arg-type]
    cosines_BC = torch.nn.functional.normalize(features_BE, dim=1) @ weight_CE.T
    assert one.name == "zero-shot at 1"
    assert torch.allclose(one(logits_BC, None), cosines_BC, atol=1e-6)  # type: ignore[arg-type]


def test_what_has_no_head(store: Store, harvested: tuple[Store, vitmodels.VisionModel]) -> None:
    here, model = harvested
    d = Dictionary({A: 64}, latents=96, sparsify=TopK(4))
    head = ModelHead(site="blocks.7.resid_post")
    with pytest.raises(ValueError, match=r"reads 'blocks.7.resid_post', which toy/digits-2l lacks"):
        evaluate(d, here, model=model, data=Squares(), heads=[head])
    plain = actstore.write_arrays(
        str(here.url) + "-plain", {A: {"cls": np.zeros((8, 1, 4), np.float32)}}, items_per_part=4
    )
    with pytest.raises(ValueError, match=r"8 of 8 items .* have no label"):
        fit_probe(plain, A)
    with pytest.raises(KeyError, match=r"no site 'blocks.3.resid_post'"):
        fit_probe(store, "blocks.3.resid_post")
