"""Fixtures for every test folder."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of larger test data, beside the repository or at ACTSTORE_SHARED."""
    folder = Path(os.environ.get("ACTSTORE_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no folder of shared test data at {folder}; set ACTSTORE_SHARED")
    return folder
