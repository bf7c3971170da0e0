"""Building: what belongs together, what is away, and what is refused."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actstore
import dictlearn
from actstore.manifest import FormatError
from dictlearn.cli import main
from dictlearn.dictionary import Dictionary
from dictlearn.formats import save
from dictlearn.viz.site.build import SiteOptions, build
from dictlearn.viz.site.inside import Inside
from dictlearn.viz.site.origin import check_dictionary
from dictlearn.viz.site.serve import server

pytestmark = pytest.mark.xdist_group("viewer")


def view(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str]:
    code = main(["view", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_the_command(toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "site"
    code, text = view(capsys, toy.store.url, toy.path.parent, "--out", out, "--items", "1")
    assert code == 0, text
    assert "index.html" in text
    names = {p.name for p in out.iterdir()}
    assert names == {"index.html", "assets", "data", "thumbs", "pictures"}
    assert list(tmp_path.iterdir()) == [out]
    html = (out / "index.html").read_text()
    for name in re.findall(r'(?:src|href)="(assets/[^"]+)"', html):
        assert (out / name).is_file(), name
    assert not re.search(r"https?://(?!www\.w3\.org)", html)
    for asset in (out / "assets").iterdir():
        assert asset.read_text().count("\n") <= 400
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", asset.read_text()
        ), asset.name


def test_another_model_is_refused(toy: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    model = {**dict(toy.store.manifest.model), "id": "toy/digits-4l", "weights": "sha256:0"}
    save(toy.dictionary, other, about={"model": model, "store": toy.store.fingerprint})
    with pytest.raises(ValueError, match=r"another model.*\n.*id: toy/digits-4l -> toy/digits-2l"):
        check_dictionary(toy.dictionary, other, toy.store)


def test_another_store_is_refused_unless_meant(
    toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    save(toy.dictionary, other, about={"store": "f" * 64})
    code, text = view(capsys, toy.store.url, other, "--out", tmp_path / "site")
    assert code == 1
    assert "another store" in text
    assert "fingerprint ffffffffffff -> " + toy.store.fingerprint[:12] in text
    assert "--other-store" in text
    assert not (tmp_path / "site").exists()
    check_dictionary(toy.dictionary, other, toy.store, other_store=True)


def test_absent_site_and_absent_dictionary(
    toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    d = Dictionary({"blocks.1.mlp_out": 64}, latents=8, sparsify=dictlearn.TopK(2))
    save(d, tmp_path / "mlp")
    code, text = view(capsys, toy.store.url, tmp_path / "mlp", "--out", tmp_path / "site")
    assert code == 1
    assert "has no site 'blocks.1.mlp_out'; nearest: " in text
    code, text = view(capsys, toy.store.url, tmp_path / "mpl", "--out", tmp_path / "site")
    assert code == 1
    assert "nearest" in text
    assert "mlp" in text
    code, text = view(capsys, tmp_path / "none.zarr", tmp_path / "mlp")
    assert code == 1
    assert "no store at" in text


def test_a_folder_of_something_else_is_kept(
    toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    code, text = view(capsys, toy.store.url, toy.path, "--out", tmp_path)
    assert code == 1
    assert "is no site" in text
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def test_a_build_that_dies_leaves_the_old_site(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "site"
    named = {"d": (toy.dictionary, toy.path)}
    options = SiteOptions(items=0, thumbs=0)
    build(toy.store, named, out, options)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dictlearn.viz.site.passes.Pass.write", die)
    with pytest.raises(KeyboardInterrupt):
        build(toy.store, named, out, options)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert list(tmp_path.iterdir()) == [out]


def moved_store(folder: Path) -> tuple[Any, Path]:
    """Return a store of a folder of six pictures that moved after the harvest, and where to."""
    from PIL import Image

    rng = np.random.default_rng(0)
    here = folder / "pictures"
    for i in range(6):
        (here / f"kind{i % 2}").mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (24, 24), dtype=np.uint8)
        Image.fromarray(pixels).save(here / f"kind{i % 2}" / f"{i}.png")
    store = actstore.harvest(
        model="toy/digits-2l",
        data=str(here),
        sites="blocks.0.resid_post",
        out=folder / "acts.zarr",
        device="cpu",
    )
    there = folder / "moved"
    shutil.move(here, there)
    return store, there


def test_data_that_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, there = moved_store(tmp_path)
    d = Dictionary({"blocks.0.resid_post": 64}, latents=16, sparsify=dictlearn.TopK(3))
    save(d, tmp_path / "d")
    out = tmp_path / "site"
    arguments = [store.url, tmp_path / "d", "--out", out, "--items", "2"]
    code, text = view(capsys, *arguments)
    assert code == 0, text
    assert "no pictures: data " in text
    assert "does not exist" in text
    assert not (out / "thumbs").exists()
    site = (out / "data" / "site.js").read_text()
    assert "the data set is away, so the model has no input" in site

    code, text = view(capsys, *arguments, "--data", there)
    assert code == 0, text
    assert len(list((out / "thumbs").rglob("*.webp"))) == 6
    assert len(list((out / "data" / "attention").iterdir())) == 2 * 2

    (there / "kind0" / "0.png").unlink()
    code, text = view(capsys, *arguments, "--data", there)
    assert code == 1
    assert "the data set changed since the harvest: items was 6, is 5" in text
    assert "where it lies now" in text
    code, text = view(capsys, *arguments, "--data", tmp_path / "nowhere")
    assert code == 1
    assert "does not exist" in text


def test_graph_files(toy: Any, tmp_path: Path) -> None:
    named = {"d": (toy.dictionary, toy.path)}
    with pytest.raises(FileNotFoundError, match="no graph at"):
        build(toy.store, named, tmp_path / "s", graphs=[tmp_path / "none.json"])
    content = json.loads(toy.graph.read_text())
    content["version"] = 99
    (tmp_path / "new.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match="version 99"):
        build(toy.store, named, tmp_path / "s", graphs=[tmp_path / "new.json"])
    assert not (tmp_path / "s").exists()


def test_what_is_inside_equals_the_model(toy: Any) -> None:
    """Lens, splice and effects against direct passes."""
    import vitmodels
    from actstore.sources import open_source

    model = vitmodels.load("toy/digits-2l")
    inside = Inside(model, {"d0": (toy.dictionary, ("cls", "patch"))})
    x = model.transform(open_source("digits").image(1234))
    page, attention = inside.item(x)
    with torch.no_grad():
        logits = model(x[None])[0]
        assert page["clean"]["classes"][0][0] == int(logits.argmax())
        assert page["lens"][-1]["classes"] == page["clean"]["classes"]
        stream = model.run(x[None], sites=["blocks.*.resid_post", "blocks.0.pattern"])
        module: Any = model.module
        early = module.forward_head(module.norm(stream["blocks.0.resid_post"]))[0]
        found = {c: v for c, _, v in page["lens"][0]["classes"]}
        for c, value in found.items():
            assert value == pytest.approx(float(early[c]), rel=1e-3, abs=1e-3)
        tokens = stream["blocks.1.resid_post"][0]
        spliced = module.forward_head(module.norm(toy.dictionary(tokens)[None]))[0]
        for c, _, value in page["effect"]["d0"]["classes"]:
            assert value == pytest.approx(float(spliced[c]), rel=1e-3, abs=1e-3)
    assert set(attention) == {0, 1}
    assert attention[0]["shape"] == list(stream["blocks.0.pattern"].shape[1:])

    effects, why = inside.logit_effects(toy.dictionary, [x])
    assert why == ""
    assert effects is not None
    step = 1e-3 * toy.dictionary.W_dec[9].detach()
    with torch.no_grad(), model.editing({"blocks.1.resid_post": lambda a: a + step}):
        moved = (model(x[None])[0] - logits) / 1e-3
    assert np.allclose(effects[9], (moved - moved.mean()).numpy(), atol=2e-2)
    assert effects.sum(1) == pytest.approx(0, abs=1e-3)


def test_serving_needs_a_site(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no site at"):
        server(tmp_path)


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="top at least 1"):
        SiteOptions(top=0)
