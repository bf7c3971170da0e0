"""The rules of docs/architecture.md that a machine can check."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "actstore": ROOT / "actstore",
    "dictlearn": ROOT / "dictlearn",
    "vitmodels": ROOT / "models" / "vitmodels",
}
MODULES = sorted(path for folder in PACKAGES.values() for path in folder.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_modules_are_found() -> None:
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_file_holds_one_idea(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= 400, f"{name_of(path)} has {lines} lines: split it by idea"
    assert path.name not in {"utils.py", "helpers.py", "misc.py", "common.py"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{name_of(path)} has no docstring"


@pytest.mark.parametrize("package", PACKAGES)
def test_folders_are_at_most_two_deep(package: str) -> None:
    folder = PACKAGES[package]
    depth = max(len(p.relative_to(folder).parts) - 1 for p in folder.rglob("*.py"))
    assert depth <= 2


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_exports_at_most_eight_names_from_init(package: str) -> None:
    module = __import__(package)
    assert 1 <= len(module.__all__) <= 8
    for name in module.__all__:
        assert getattr(module, name).__doc__, f"{package}.{name} has no docstring"


@pytest.mark.parametrize(
    "module", ["actstore", "vitmodels", "vitmodels.spec", "dictlearn", "dictlearn.config"]
)
def test_import_leaves_torch_out(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_opening_a_store_leaves_torch_out() -> None:
    """A dask worker mounts and reads a store without torch."""
    code = """
import sys, tempfile, numpy as np, actstore
values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
with tempfile.TemporaryDirectory() as folder:
    store = actstore.write_arrays(folder + "/a.zarr", {"embed": {"patch": values}})
    mounted = actstore.open(folder + "/a.zarr").dask("embed", "patch").compute()
sys.exit("torch" in sys.modules or sorted(mounted.ravel()) != sorted(values.ravel()))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".ipynb", ".tsv", ""}


def test_no_machine_path_and_no_registry_host_in_the_repository() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False, text=True
    )
    if listing.returncode:  # an unpacked source distribution has no git
        pytest.skip("not a git checkout")
    banned = re.compile("/" + "work/|/root/|" + "file:///opt")
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in TEXT and path.is_file() and path != Path(__file__):
            found = banned.search(path.read_text(errors="ignore"))
            assert not found, f"{name} names a path of one machine: {found}"
