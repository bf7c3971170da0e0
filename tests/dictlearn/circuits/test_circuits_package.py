"""The package: few names, each there, and no torch until one is used."""

import subprocess
import sys

import pytest

from dictlearn import circuits


def test_names_are_there_and_documented() -> None:
    assert 1 <= len(circuits.__all__) <= 8
    assert set(circuits.__all__) <= set(dir(circuits))
    for name in dir(circuits):
        assert getattr(circuits, name).__doc__, name
    with pytest.raises(
        AttributeError, match=r"no attribute 'patch'; it has \['TunedLens', 'ablate'"
    ):
        circuits.patch  # noqa: B018


def test_import_leaves_torch_out() -> None:
    code = "import sys, dictlearn.circuits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
