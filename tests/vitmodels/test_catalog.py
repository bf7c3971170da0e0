"""The list of verified names: complete, equal to what is built now, and the page made from it."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import vitmodels
from vitmodels.catalog import Row, catalog, rows, to_markdown, to_tsv, verify
from vitmodels.registry import families

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


SAMPLE = [
    row
    for row in catalog()[::80]
    if _installed({f.name: f.backend for f in families()}.get(row.family, "none"))
]


def test_reading_it_loads_no_backend() -> None:
    code = (
        "import sys; from vitmodels.catalog import catalog; assert len(catalog()) >= 500;"
        "assert not {'torch', 'timm', 'transformers', 'open_clip'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_family_name_is_in_it() -> None:
    listed = {row.id for row in catalog()}
    for family in families():
        if _installed(family.backend):
            missing = {f"{family.prefix}/{name}" for name in family.names()} - listed
            assert not missing, f"{family.name}: run python -m vitmodels.catalog docs/models.md"


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in SAMPLE])
def test_a_sample_is_as_listed(row: Row) -> None:
    assert verify(row.id) == row


def test_the_page_is_made_from_it() -> None:
    assert PAGE.read_text(encoding="utf-8") == to_markdown(catalog())


def test_text_form_and_search() -> None:
    _, *lines = to_tsv(catalog()).splitlines()
    assert [Row.from_strings(line.split("\t")) for line in lines] == list(catalog())
    found = rows("vit_small_patch14_dinov2")
    assert "timm/vit_small_patch14_dinov2" in {row.id for row in found}
    assert all("vit_small_patch14_dinov2" in row.id for row in found)
    assert [row.id for row in rows("toy/digits-?l")] == [f"toy/digits-{n}l" for n in (1, 2, 3, 4)]
    assert set(vitmodels.list_models("toy/*")) == {row.id for row in rows("toy/*")}
    small = next(row for row in found if row.id == "timm/vit_small_patch14_dinov2")
    assert (small.d_model, small.n_layers, small.cls, small.patch) == (384, 12, 1, (37, 37))
