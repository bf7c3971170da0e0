"""What the families of transformers refuse, and the words they refuse it with."""

import json
import shutil
from pathlib import Path

import pytest
from hf_offline import offline, save  # noqa: F401 - offline is a fixture that applies by itself

import vitmodels
from vitmodels import hf_backend
from vitmodels.hf_backend import small

transformers = pytest.importorskip("transformers")

SMALL = {"image_size": 32, "patch_size": 8, "intermediate_size": 48}


def test_an_unreachable_hub_names_model_cause_and_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    for id in ("facebook/dino-vits16", "MCG-NJU/videomae-base"):
        with pytest.raises(FileNotFoundError) as error:
            vitmodels.load(f"hf/{id}")
        text = str(error.value)
        for part in (f"hf/{id}", "LocalEntryNotFoundError", "weights=", "pretrained=False"):
            assert part in text
        assert str(tmp_path / "cache") in text
    with pytest.raises(FileNotFoundError, match=r"nearest verified ids: facebook/dino-vit"):
        vitmodels.load("hf/facebook/dino-vits14")


def test_unverified_ids_without_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no verified id.*nearest verified ids: .*dino-vits16"):
        vitmodels.load("hf/facebook/dino-vits17", pretrained=False)


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_backend.importlib.metadata, "version", lambda name: "4.57.1")
    with pytest.raises(ValueError, match=r"need transformers 5 or newer, found 4\.57\.1"):
        hf_backend.backend()


def test_a_missing_transformers_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise hf_backend.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(hf_backend.importlib.metadata, "version", version)
    with pytest.raises(ValueError, match=r"pip install 'actstore\[hf\]'"):
        hf_backend.backend()


def test_weights_that_do_not_fit_name_the_first_key(tmp_path: Path) -> None:
    folder = save(small("ViTModel", **SMALL)(), tmp_path / "a")
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"intermediate_size": 96}))
    with pytest.raises(
        ValueError, match=r"does not fit ViTModel: layers.0.mlp.fc1.bias is \(48,\).* \(96,\)"
    ):
        vitmodels.load("hf/mine/vit", weights=folder)
    (folder / "config.json").write_text(json.dumps(told | {"num_hidden_layers": 4}))
    with pytest.raises(
        ValueError, match=r"layers\.3\.attention\.k_proj\.bias is missing \(16 keys"
    ):
        vitmodels.load("hf/mine/vit", weights=folder)


def test_folders_of_another_kind_are_refused(tmp_path: Path) -> None:
    save(small("Dinov2Model", mlp_ratio=2, image_size=32, patch_size=8)(), tmp_path / "dinov2")
    with pytest.raises(ValueError, match=r"kind 'dinov2', which family hf_vit does not describe"):
        vitmodels.load("hf/facebook/dino-vits16", weights=tmp_path / "dinov2")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    save(transformers.ResNetModel(config), tmp_path / "resnet")
    with pytest.raises(ValueError, match=r"of kind 'resnet', which no family describes.*vivit"):
        vitmodels.load("hf/mine/resnet", weights=tmp_path / "resnet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        vitmodels.load("hf/facebook/dino-vits16", weights=tmp_path / "empty")
    shutil.rmtree(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="empty"):
        vitmodels.load("hf/facebook/dino-vits16", weights=tmp_path / "empty")


def test_timesformer_of_space_alone_is_refused() -> None:
    sizes = {**SMALL, "num_frames": 2, "attention_type": "space_only"}
    with pytest.raises(ValueError, match=r"attention_type='space_only' has no taps"):
        vitmodels.wrap(small("TimesformerModel", **sizes)())
