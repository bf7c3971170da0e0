"""The committed notebooks: they ran, stayed small, and are all in the documentation."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))


def test_there_are_eight_and_the_site_names_each():
    assert len(NOTEBOOKS) == 8
    navigation = (ROOT / "mkdocs.yml").read_text()
    overview = (ROOT / "docs" / "tutorials" / "index.md").read_text()
    for notebook in NOTEBOOKS:
        assert f"tutorials/{notebook.name}" in navigation
        assert f"({notebook.name})" in overview


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_ran_without_error_and_outputs_are_small(notebook):
    text = notebook.read_text()
    assert len(text) < 400_000
    cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in cells] == list(range(1, len(cells) + 1))
    outputs = [o for c in cells for o in c["outputs"]]
    assert outputs
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"]
