"""For tests of transformers: no network, and modules saved to folders."""

from pathlib import Path
from typing import Any

import pytest

from vitmodels import hf_backend


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may reach a network, nor a cache that happens to be on the machine."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def save(module: Any, folder: Path, processor: Any = None) -> Path:
    with hf_backend.quiet(hf_backend.backend()):
        module.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder
