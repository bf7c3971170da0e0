"""Reports side by side, and `dictlearn eval` beyond one table."""

import json
from pathlib import Path

import numpy as np
import pytest

import actstore
import vitmodels
from actstore.selection import Split
from actstore.store import Store
from dictlearn.cli import main
from dictlearn.compare import figures, names, read_reports, side_by_side
from dictlearn.config import TopK
from dictlearn.dictionary import Dictionary
from dictlearn.evaluation import evaluate
from dictlearn.formats import save

A, B = "blocks.0.resid_post", "blocks.1.resid_post"


def test_a_column_for_each_report_and_a_row_for_each_figure(store: Store, tmp_path: Path) -> None:
    both = Dictionary({A: 16, B: 24}, latents=48, sparsify=TopK(4))
    one = Dictionary({A: 16}, latents=40, sparsify=TopK(3))
    reports = [
        evaluate(both, store, about={"name": "x"}),
        evaluate(one, store, about={"name": "x"}),
        evaluate(one, store, tokens="patch", items=Split(half="validation", holdout=0.2)),
    ]
    assert names(reports) == ["x", "x (2)", A]
    text = side_by_side(reports)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert rows["L0"].split("|")[2:5] == [" 4.00 ", " 3.00 ", " 3.00 "]
    assert rows["L0 cls"].split("|")[4].strip() == ""
    assert rows[f"FVU {B}"].split("|")[2].strip() == f"{reports[0].fvu_by_site[B]:.4f}"
    assert rows[f"cosine {B}"].split("|")[2].strip() == f"{reports[0].cosine_by_site[B]:.4f}"
    assert rows["cosine patch"].split("|")[4].strip() == f"{reports[2].cosine_by_kind['patch']:.4f}"
    counts = [int(v.replace(",", "")) for k, v in figures(reports[1]).items() if "firing" in k]
    assert sum(counts) == 40
    assert text.endswith("columns differ in items, token kinds, sites written.")
    assert "Not like with like" not in side_by_side(reports[1:2])
    with pytest.raises(ValueError, match="nothing to compare"):
        side_by_side([])


def test_breakdowns_are_plain_sums(store: Store) -> None:
    import torch

    d = Dictionary({A: 16, B: 24}, latents=48, sparsify=TopK(4))
    report = evaluate(d, store, batch_size=77)
    x = torch.cat(
        [
            torch.from_numpy(
                np.concatenate([store.dask(s, k).compute() for k in ("cls", "patch")], axis=1)
            )
            for s in (A, B)
        ],
        dim=2,
    )
    with torch.no_grad():
        y = d(x.flatten(0, 1)).view_as(x)
    cosine = torch.cosine_similarity(y, x, dim=2)
    assert report.cosine_by_position == pytest.approx(
        {t: float(v) for t, v in enumerate(cosine.mean(0))}, rel=1e-5
    )
    assert report.cosine_by_kind["patch"] == pytest.approx(float(cosine[:, 1:].mean()), rel=1e-5)
    at_b = torch.cosine_similarity(y[..., 16:], x[..., 16:], dim=2).mean()
    assert report.cosine_by_site[B] == pytest.approx(float(at_b), rel=1e-5)
    xd, yd = x.double(), y.double()
    for t in (0, 5):
        error = (yd[:, t] - xd[:, t]).square().sum()
        spread = (xd[:, t] - xd[:, t].mean(0)).square().sum()
        assert report.fvu_by_position[t] == pytest.approx(float(error / spread), rel=1e-5)


@pytest.fixture
def folders(store: Store, tmp_path: Path) -> list[str]:
    out = []
    for seed in (0, 1):
        d = Dictionary({A: 16}, latents=40, sparsify=TopK(3), seed=seed)
        out.append(str(save(d, tmp_path / f"seed{seed}", about={"store": store.fingerprint})))
    return out


def test_compare_evaluates_folders_and_reads_files(
    store: Store, folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "reports.json"
    options = ["--compare", "--device", "cpu"]
    assert main(["eval", *folders, "--store", store.url, "--out", str(file), *options]) == 0
    text = capsys.readouterr().out
    assert "| | seed0 | seed1 |" in text
    assert "note:" not in text
    assert file.with_suffix(".md").read_text().startswith("| | seed0 | seed1 |")
    found = read_reports(file)
    assert [r.about["name"] for r in found] == ["seed0", "seed1"]
    assert main(["eval", str(file), *options]) == 0
    assert side_by_side(found) in capsys.readouterr().out


def test_a_store_that_changed_since_is_named(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    d = Dictionary({A: 16}, latents=40, sparsify=TopK(3))
    train = {"holdout": 0.2, "split_seed": 0}
    folder = save(d, tmp_path / "old", about={"store": "f" * 64, "train": train})
    assert main(["eval", str(folder), "--store", store.url, "--device", "cpu"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "old was trained on the store with fingerprint ffffffffffffffff" in text
    assert f"has {store.fingerprint[:16]}" in text
    assert "every item counts" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{out}/seed0"], "--store is needed to evaluate"),
        (["{out}/bad.json", "--compare"], "bad.json is not a file of reports"),
        (["{out}/wrong", "--store", "{store}"], "no site 'blocks.7.resid_post'"),
        (["{out}/wide", "--store", "{store}"], "32 channels at 'blocks.0.resid_post'"),
        (["{out}/seed0", "--store", "{store}", "--model"], "was not harvested from a model"),
        (["{out}/seed9", "--store", "{store}"], "nearest in"),
    ],
)
def test_eval_errors(
    store: Store,
    folders: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    (tmp_path / "bad.json").write_text(json.dumps([{"l0": 3}]))
    save(Dictionary({"blocks.7.resid_post": 16}, latents=9, sparsify=TopK(3)), tmp_path / "wrong")
    save(Dictionary({A: 32}, latents=9, sparsify=TopK(3)), tmp_path / "wide")
    given = [w.format(out=tmp_path, store=store.url) for w in words]
    assert main(["eval", *given, "--device", "cpu"]) == 1
    assert message in capsys.readouterr().err


def test_training_on_a_store_that_changed_refuses(store: Store, tmp_path: Path) -> None:
    from dictlearn.schedule import TrainConfig
    from dictlearn.trainer import train

    config = TrainConfig(steps=4, batch_size=32, checkpoint_every=2)
    d = Dictionary({A: 16}, latents=20, sparsify=TopK(2))
    train(store, d, config, out=tmp_path / "run")
    values = np.random.default_rng(5).normal(size=(60, 9, 16)).astype(np.float32)
    changed = actstore.write_arrays(
        tmp_path / "changed.zarr",
        {A: {"cls": values[:, :1], "patch": values[:, 1:]}},
        items_per_part=10,
    )
    again = Dictionary({A: 16}, latents=20, sparsify=TopK(2))
    with pytest.raises(ValueError, match=r"(?s)store: .* -> .*The activations changed since"):
        train(changed, again, config, out=tmp_path / "run")


def test_eval_with_probe_and_model_heads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = vitmodels.load("toy/digits-1l")
    store = actstore.harvest(
        model=model, data="digits", sites=A, out=tmp_path / "s.zarr", device="cpu", limit=160
    )
    d = Dictionary({A: 64}, latents=96, sparsify=TopK(8))
    folder = save(d, tmp_path / "d", about={"store": store.fingerprint})
    file = tmp_path / "r.json"
    words = ["eval", str(folder), "--store", store.url, "--head", "model", "probe"]
    words += ["--images", "20", "--out", str(file), "--device", "cpu"]
    assert main(words) == 0
    (report,) = read_reports(file)
    assert report.substitution is not None
    assert report.substitution.head == "model"
    assert [s.head for s in report.other_heads] == [f"probe {A} cls"]
    assert report.items == str(Split(half="validation", holdout=0.2))
    assert report.other_heads[0].images == 20
    assert report.other_heads[0].ce["error"] == pytest.approx(
        report.other_heads[0].ce["clean"], abs=1e-4
    )
    assert f"probe {A} cls: CE spliced" in capsys.readouterr().out
