"""What the README says works as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs_and_prints_what_it_says(tmp_path: Path) -> None:
    found = re.search(r"<!-- ci:example -->\n```python\n(.*?)```", README, re.DOTALL)
    assert found
    run = subprocess.run(
        [sys.executable, "-c", found.group(1)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    first, *_, means = run.stdout.splitlines()
    assert first.startswith("(4096, 64)")
    assert "| dictionary | L0 |" in run.stdout
    assert means.startswith("[")
    assert (tmp_path / "acts.zarr" / "zarr.json").is_file()


def test_links_to_files_of_the_repository_resolve() -> None:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    assert len(documents) > 3
    for document in documents:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
