"""The example of docs/adding-a-model.md: one file in the scanned folder, nothing else."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import vitmodels
import vitmodels.families
from vitmodels.registry import families

EXAMPLE = Path(__file__).with_name("example_family.py")


@pytest.fixture
def dropped_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    shutil.copy(EXAMPLE, tmp_path)
    monkeypatch.setattr(
        vitmodels.families, "__path__", [*vitmodels.families.__path__, str(tmp_path)]
    )
    families.cache_clear()
    yield
    families.cache_clear()
    sys.modules.pop("vitmodels.families.example_family", None)


def test_one_file_is_enough(dropped_in: None) -> None:
    assert "example/post_norm" in vitmodels.list_models()
    model = vitmodels.load("example/post_norm", pretrained=False)
    x = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bare = model.module(x)
        got = model.run(x, "*", stop_early=False)
        assert torch.equal(got["logits"], bare)
        assert torch.equal(got["blocks.0.scores"].softmax(-1), got["blocks.0.pattern"])
        with model.editing({"blocks.0.pattern": torch.zeros_like}):
            assert not model.run(x, "blocks.0.z")["blocks.0.z"].any()
    assert "example/post_norm" not in EXAMPLE.with_name("test_conformance.py").read_text()


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 120


def test_a_broken_file_is_named(dropped_in: None, tmp_path: Path) -> None:
    (tmp_path / "broken_family.py").write_text("FAMILY = 3\n")
    with pytest.raises(ValueError, match=r"families\.broken_family must end with FAMILY"):
        families()
