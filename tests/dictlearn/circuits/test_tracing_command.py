"""``dictlearn trace`` from files to a file, and what it says of wrong input."""

import dataclasses
from pathlib import Path

import pytest
import tracing_cases as cases
from PIL import Image

import actstore
import vitmodels
from actstore.sources.digits import Digits
from dictlearn.circuits import graph as graphs
from dictlearn.cli import main
from dictlearn.formats import save


@pytest.fixture(scope="module")
def model() -> vitmodels.VisionModel:
    return cases.toy()


@pytest.fixture(scope="module")
def run(model: vitmodels.VisionModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as training leaves it: a dictionary in each of its folders."""
    folder = tmp_path_factory.mktemp("run")
    for i, dictionary in enumerate(cases.pair()):
        save(dictionary, folder / f"layer-{i}", about={"model": model.spec.to_json()})
    return folder


def test_from_a_data_set(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "g.json", tmp_path / "deep" / "g.png"
    words = ["trace", str(run), "--data", "digits", "--item", "1503", "--classes", "3", "5"]
    assert main([*words, "--out", str(out), "--plot", str(plot)]) == 0
    graph = graphs.load(out)
    assert graph.item == {"position": 1503, "source": 1503, **_told(1503)}
    assert [graph.nodes[i].latent for i in graph.of_kind("logit")] == [3, 5]
    assert [d["name"] for d in graph.dictionaries] == ["layer-0", "layer-1"]
    assert graph.dictionaries[1]["path"] == str(run / "layer-1")
    assert graph.scores["residual"] < 1e-4
    with Image.open(plot) as picture:
        assert picture.width > 500
    told = capsys.readouterr().out
    assert "most influential" in told
    assert "nodes and" in told


def _told(index: int) -> dict[str, object]:
    row = Digits().row(index)
    return {k: row[k] for k in ("key", "label", "label_name") if isinstance(row.get(k), str | int)}


def test_from_a_store_and_from_a_file(
    run: Path, model: vitmodels.VisionModel, tmp_path: Path
) -> None:
    """The same picture gives the same graph, wherever it comes from."""
    store = actstore.harvest(
        model=model,
        data="digits",
        sites="blocks.0.mlp_in",
        tokens="cls",
        limit=20,
        out=tmp_path / "a.zarr",
    )
    origin = dict(
        zip(store.table()["position"].to_pylist(), store.table()["source"].to_pylist(), strict=True)
    )
    Digits().image(origin[7]).save(tmp_path / "seven.png")
    common = [str(run), "--classes", "3", "--node-threshold", "0.5"]
    ways = {
        "store": ["--store", str(tmp_path / "a.zarr"), "--item", "7"],
        "data": ["--data", "digits", "--item", str(origin[7])],
        "image": ["--image", str(tmp_path / "seven.png")],
    }
    found = {}
    for name, words in ways.items():
        assert main(["trace", *common, *words, "--out", str(tmp_path / f"{name}.json")]) == 0
        found[name] = graphs.load(tmp_path / f"{name}.json")
    assert found["store"].item["position"] == 7
    assert found["store"].item["source"] == origin[7]
    assert found["image"].item == {"key": "seven.png"}
    for graph in found.values():
        assert [n.id for n in graph.nodes] == [n.id for n in found["data"].nodes]
        assert (graph.weights == found["data"].weights).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the input by one of --image FILE, --store STORE --item N, --data DATA --item N"),
        (["--data", "digits", "--image", "a.png"], "got --image, --data"),
        (["--data", "digits"], "--data digits needs --item N"),
        (["--data", "digits", "--item", "5000"], "no item 5000: digits has 0 to 4999"),
        (["--image", "nowhere.png"], "no image at nowhere.png"),
        (["--data", "digits", "--item", "1", "--classes", "12"], "class 12 of toy/digits-2l does"),
        (["--data", "digits", "--item", "1", "--model", "toy/digits-3l"], "on another model: wei"),
        (["--data", "digits", "--item", "1", "--node-threshold", "2"], "is a share in (0, 1]"),
    ],
)
def test_messages(
    run: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", str(run), *words, "--out", str(tmp_path / "g.json")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "g.json").exists()


def test_dictionaries_that_do_not_fit(
    run: Path,
    model: vitmodels.VisionModel,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    item = ["--data", "digits", "--item", "1", "--out", str(tmp_path / "g.json")]
    assert main(["trace", str(run / "layer-0"), *item]) == 1
    assert "no transcoder reads layer 1; train the missing ones" in capsys.readouterr().err
    save(cases.layer(0), tmp_path / "anonymous")
    assert main(["trace", str(tmp_path / "anonymous"), *item]) == 1
    assert "do not say which model they were trained on: give --model" in capsys.readouterr().err
    other = dataclasses.replace(model.spec, weights="sha256:other").to_json()
    save(cases.layer(1), tmp_path / "other", about={"model": other})
    assert main(["trace", str(run / "layer-0"), str(tmp_path / "other"), *item]) == 1
    assert "was trained on another model" in capsys.readouterr().err
    assert main(["trace", str(tmp_path / "nothing"), "--model", "toy/digits-2l", *item]) == 1
    assert "no dictionary at" in capsys.readouterr().err
