"""Hook names of Prisma and TransformerLens give the tensors that those libraries hold."""

import json
import re
from pathlib import Path

import pytest
import torch
from hook_cases import DATA, Case, edit, hook_names, load_case

from vitmodels.names import translate

CASES = (
    "timm_vit",
    "open_clip_gelu",
    "open_clip_quickgelu",
    "hf_vit_classifier",
    "hf_vit_dino",
    "hf_clip_vision",
    "hf_vivit",
    "tl_hf_vit_classifier",
    "tl_hf_vit_dino",
    "tl_hf_clip_vision",
)
SHIPPED = sorted(path.parent.name for path in DATA.glob("*/case.json"))
CLOSE = {"rtol": 0.0, "atol": 1e-5}


@pytest.fixture(params=[*(f"shipped-{name}" for name in SHIPPED), *CASES])
def case(request: pytest.FixtureRequest) -> Case:
    kind, _, name = request.param.rpartition("-")
    if kind:
        folder = DATA / name
    else:
        folder = request.getfixturevalue("shared") / "fixtures" / "hooks" / name
    for library in ("transformers", "open_clip"):
        if library in json.loads((folder / "case.json").read_text())["reference"]["class"]:
            pytest.importorskip(library)
    return load_case(folder)


def test_output_is_that_of_the_reference(case: Case) -> None:
    output = case.arrays("output")["output"]
    with torch.no_grad():
        found = case.output()
    torch.testing.assert_close(found, output[:, 0] if output.dim() == 3 else output, **CLOSE)


def test_every_name_with_a_site_holds_the_same_tensor(case: Case) -> None:
    values = case.cache()
    sites = {hook: site for hook in values if (site := case.site(hook)[0])}
    with torch.no_grad():
        acts = case.model.run(case.x, sorted(set(sites.values())), stop_early=False)
    for hook, site in sites.items():
        torch.testing.assert_close(
            acts[site], values[hook], **CLOSE, msg=lambda text, hook=hook: f"{hook}: {text}"
        )
    block = [hook for hook in sites if ".1." in hook]
    assert len(block) >= 13, f"only {block} have sites"


def test_names_of_modules_hold_the_tensor_of_their_hook(case: Case) -> None:
    same = case.told.get("names_that_hold_the_same_tensor", {})
    values = case.cache()
    sites = {hook: site for hook in same if (site := case.site(hook)[0])}
    if not sites:
        pytest.skip("no names of modules in this dialect")
    with torch.no_grad():
        acts = case.model.run(case.x, sorted(set(sites.values())), stop_early=False)
    for hook, site in sites.items():
        if same[hook] in values:
            torch.testing.assert_close(
                acts[site], values[same[hook]], **CLOSE, msg=lambda text, h=hook: f"{h}: {text}"
            )


def test_every_edit_has_the_same_effect(case: Case) -> None:
    ignored, compared = set(case.told["edits_ignored_at"]), 0
    for hook, expected in case.arrays("edits").items():
        site, _ = case.site(hook)
        if site is None or hook in ignored:
            continue
        with torch.no_grad(), case.model.editing({site: edit}):
            found = case.output()
        torch.testing.assert_close(
            found, expected, **CLOSE, msg=lambda text, hook=hook: f"{hook}: {text}"
        )
        compared += 1
    assert compared >= 12


def test_edits_that_the_other_library_ignores_work_here(case: Case) -> None:
    with torch.no_grad():
        plain = case.output()
        for hook in case.told["edits_ignored_at"]:
            site, _ = case.site(hook)
            if site is None or case.is_after_output(site):
                continue
            with case.model.editing({site: edit}):
                assert not torch.allclose(case.output(), plain), hook


def test_every_name_without_a_site_has_a_reason(case: Case) -> None:
    for hook in case.cache():
        site, reason = case.site(hook)
        assert site or len(reason) > 20, hook


def _shipped(dialect: str) -> set[str]:
    names: set[str] = set()
    for name in SHIPPED:
        told = json.loads((DATA / name / "case.json").read_text())
        library = told["hooks_from"]["library"]
        if (library == "vit-prisma") == (dialect == "prisma"):
            names |= set(hook_names(DATA / name))
            names |= set(told.get("names_that_hold_the_same_tensor", ()))
    return names


def _meaning(name: str) -> str | None:
    try:
        return translate(name)
    except ValueError:
        return None


def test_undecorated_names_are_refused_where_the_dialects_differ() -> None:
    common = _shipped("prisma") & _shipped("tl")
    assert len(common) >= 13
    differ = 0
    for hook in sorted(common):
        prisma, tl = _meaning(f"prisma:{hook}"), _meaning(f"tl:{hook}")
        if prisma == tl:
            assert _meaning(hook) == prisma, hook
            continue
        differ += 1
        with pytest.raises(ValueError, match="means two things") as error:
            translate(hook)
        assert "Prisma" in str(error.value)
        assert "TransformerLens" in str(error.value)
        assert f"prisma:{hook}" in str(error.value)
        assert f"tl:{hook}" in str(error.value)
    assert differ >= 4


def test_docs_list_every_name() -> None:
    text = (Path(__file__).parents[2] / "docs" / "hook-names.md").read_text()
    for dialect in ("prisma", "tl"):
        section = text.partition(f"(`{dialect}:`)")[2].partition("\n## ")[0]
        for hook in _shipped(dialect):
            shown = re.sub(r"(layers|blocks)\.\d+\.", r"\1.L.", hook)
            row = re.search(rf"^\| `{re.escape(shown)}` \| (.+) \|$", section, re.M)
            assert row, f"docs/hook-names.md has no row for {dialect}:{shown}"
            site = _meaning(f"{dialect}:{hook}")
            if site is not None:
                site = re.sub(r"blocks\.\d+\.", "blocks.L.", site) if shown != hook else site
                assert f"`{site}`" in row[1]
