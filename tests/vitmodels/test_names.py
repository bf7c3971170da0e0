"""Spellings of sites, patterns, and what is said about wrong ones."""

import subprocess
import sys

import pytest

from vitmodels.names import Site, translate
from vitmodels.spec import ModelSpec, SiteInfo, TokenGrid, expand_sites

NAMES = [
    "embed",
    *(f"blocks.{i}.{part}" for i in range(12) for part in ("resid_pre", "z", "resid_post")),
    "logits",
]


def test_import_leaves_torch_out() -> None:
    code = "import vitmodels, vitmodels.spec, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("embed", ["embed"]),
        ("blocks.{5,7}.z", ["blocks.5.z", "blocks.7.z"]),
        ("blocks.{0..2}.z", ["blocks.0.z", "blocks.1.z", "blocks.2.z"]),
        ("logits, embed", ["embed", "logits"]),
        ("blocks.7.hook_resid_post", ["blocks.7.resid_post"]),
        ("blocks.{7,3}.attn.hook_z,embed", ["embed", "blocks.3.z", "blocks.7.z"]),
        ("blocks.1?.resid_pre", ["blocks.10.resid_pre", "blocks.11.resid_pre"]),
        ("prisma:hook_full_embed", ["embed"]),
        (["embed", "embed"], ["embed"]),
    ],
)
def test_expand(pattern: str | list[str], expected: list[str]) -> None:
    assert expand_sites(pattern, NAMES) == expected


def test_globs_keep_model_order() -> None:
    found = expand_sites("blocks.*.hook_resid_post", NAMES)
    assert found == [f"blocks.{i}.resid_post" for i in range(12)]
    assert expand_sites("*", NAMES) == NAMES


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("blocks.7.resid_pots", r"nearest: blocks\.7\.resid_post.*model\.sites\(\)"),
        ("blocks.77.*", r"no site matches 'blocks.77.\*'"),
        ("blocks.{5.z", "unbalanced braces"),
        ("", "empty"),
        ("blocks.0.hook_mlp_in", "Prisma before ln2.*TransformerLens after ln2"),
        ("blocks.0.attn.hook_attn_scores", "prisma:blocks.0.attn.hook_attn_scores"),
        ("hook_embed", "without CLS.*with both"),
        ("blocks.0.ln1.hook_scale", "denominator"),
        ("tl:blocks.0.ln1.hook_normalized", "before"),
        ("prisma:blocks.0.hook_mlp_in", "before ln2"),
        ("blocks.0.hook_resid_prr", "nearest: hook_resid_pre"),
        ("jax:blocks.0.hook_z", "unknown dialect 'jax'"),
        ("tl:blocks.0.z", "holds 'hook_'"),
    ],
)
def test_wrong_patterns(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand_sites(pattern, NAMES)


def test_dialects_differ() -> None:
    assert translate("tl:hook_embed") == "embed"
    assert translate("prisma:hook_embed") == "patch_embed"
    assert translate("tl:blocks.3.attn.hook_attn_scores") == "blocks.3.pattern"
    assert translate("prisma:blocks.3.attn.hook_attn_scores") == "blocks.3.scores"
    assert translate("vision_encoder.encoder_layers.2.attn.hook_q") == "blocks.2.q"


def test_site_parts() -> None:
    site = Site.parse("text.blocks.3.attn_out")
    assert (site.prefix, site.layer, site.part) == ("text", 3, "attn_out")
    assert str(site) == "text.blocks.3.attn_out"
    assert str(Site.parse("blocks.7.attn.hook_pattern")) == "blocks.7.pattern"
    with pytest.raises(ValueError, match="sites look like"):
        Site.parse("Blocks 7")


def test_grid() -> None:
    grid = TokenGrid(cls=1, register=4, patch=(2, 3, 5))
    assert grid.n_tokens == 35
    assert grid.kinds == ("cls", "register", "patch")
    assert grid.slice("register") == slice(1, 5)
    assert TokenGrid.from_json(grid.to_json()) == grid
    last = TokenGrid(cls=1, patch=(2, 2), order=("patch", "cls", "register"))
    assert last.slice("cls") == slice(4, 5)
    with pytest.raises(ValueError, match="unknown token kind"):
        grid.count("text")
    with pytest.raises(ValueError, match="order must name"):
        TokenGrid(order=("cls", "patch"))  # type: ignore[arg-type]


def test_site_info() -> None:
    grid = TokenGrid(patch=(2, 2))
    pattern = SiteInfo(
        name="blocks.0.pattern", axes=("head", "query", "key"), shape=(3, 5, 5), grid=grid
    )
    assert (pattern.kinds, pattern.width, pattern.token_axis) == (("cls", "patch"), 15, 1)
    logits = SiteInfo(name="logits", axes=("class",), shape=(10,))
    assert (logits.kinds, logits.width, logits.token_axis) == (("item",), 10, None)
    assert SiteInfo.from_json(pattern.to_json()) == pattern
    with pytest.raises(ValueError, match="6 tokens"):
        SiteInfo(name="z", axes=("token", "channel"), shape=(6, 2), grid=grid)
    with pytest.raises(ValueError, match="does not say why"):
        SiteInfo(name="z", axes=("class",), shape=(6,), editable=False)


def test_spec_fingerprint_covers_every_field() -> None:
    spec = ModelSpec(
        id="toy/x",
        family="toys",
        backend="timm 1",
        d_model=8,
        n_layers=1,
        n_heads=2,
        d_head=4,
        d_mlp=16,
        grid=TokenGrid(patch=(2, 2)),
        input_shape=(1, 4, 4),
        transform={"mean": [0.5]},
    )
    assert ModelSpec.from_json(spec.to_json()) == spec
    seen = {spec.fingerprint()}
    for field, value in {
        "id": "b",
        "weights": "sha256:0",
        "d_model": 9,
        "grid": {**spec.grid.to_json(), "cls": 0},
        "input_shape": [3, 4, 4],
        "transform": {"mean": [0.4]},
    }.items():
        seen.add(ModelSpec.from_json({**spec.to_json(), field: value}).fingerprint())
    assert len(seen) == 7
