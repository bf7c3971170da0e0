"""All of Prisma's names: right architecture, activation, preprocessing and token grid."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch import nn

import vitmodels
from vitmodels.prisma_names import from_prisma, prisma_names
from vitmodels.registry import resolve

NAMES = tuple(prisma_names())

CLIP = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
}
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True, kw_only=True)
class Expected:
    d: int
    layers: int
    heads: int
    patch: int
    size: int = 224
    cls: int = 1
    mlp: int = 0
    projection: int | None = None
    time: int | None = None
    pixels: dict[str, list[float]] = field(default_factory=lambda: CLIP)
    interpolation: str = "bicubic"


BASE = {"d": 768, "layers": 12, "heads": 12, "mlp": 3072}
LARGE = {"d": 1024, "layers": 24, "heads": 16, "mlp": 4096}
HUGE = {"d": 1280, "layers": 32, "heads": 16, "mlp": 5120}
GIANT = {"d": 1408, "layers": 40, "heads": 16, "mlp": 6144}
BIG_G = {"d": 1664, "layers": 48, "heads": 16, "mlp": 8192}
# The first pattern that matches the end of Prisma's name decides. Sizes are those of the papers.
TABLE: tuple[tuple[str, Expected], ...] = (
    (r"^vit_base_patch16_224", Expected(**BASE, patch=16, pixels=HALF)),
    (r"^vit_base_patch32_224", Expected(**BASE, patch=32, pixels=HALF)),
    (r"^vit_large_patch16_224", Expected(**LARGE, patch=16, pixels=HALF)),
    (r"CoCa-ViT-B-32", Expected(**BASE, patch=32, projection=512)),
    (r"CoCa-ViT-L-14", Expected(**LARGE, patch=14, projection=768)),
    (r"openai/clip-vit-base-patch16", Expected(**BASE, patch=16, projection=512)),
    (r"openai/clip-vit-base-patch32", Expected(**BASE, patch=32, projection=512)),
    (r"large-patch14-336", Expected(**LARGE, patch=14, size=336, projection=768)),
    (r"openai/clip-vit-large-patch14", Expected(**LARGE, patch=14, projection=768)),
    (r"kandinsky", Expected(**LARGE, patch=14, projection=768)),
    (
        r"TinyCLIP-ViT-8M-16",
        Expected(d=256, layers=10, heads=4, mlp=1024, patch=16, projection=512),
    ),
    (
        r"facebook/dino-vitb16",
        Expected(**BASE, patch=16, pixels=IMAGENET, interpolation="bilinear"),
    ),
    (r"facebook/dino-vitb8", Expected(**BASE, patch=8, pixels=IMAGENET, interpolation="bilinear")),
    (
        r"facebook/dino-vits16",
        Expected(
            d=384, layers=12, heads=6, mlp=1536, patch=16, pixels=IMAGENET, interpolation="bilinear"
        ),
    ),
    (
        r"facebook/dino-vits8",
        Expected(
            d=384, layers=12, heads=6, mlp=1536, patch=8, pixels=IMAGENET, interpolation="bilinear"
        ),
    ),
    (r"vivit-b", Expected(**BASE, patch=16, time=16, pixels=HALF, interpolation="bilinear")),
    (r"vivit-l", Expected(**LARGE, patch=16, time=16, pixels=HALF, interpolation="bilinear")),
    (
        r"vjepa_v1",
        Expected(**HUGE, patch=16, time=8, cls=0, pixels=IMAGENET, interpolation="bilinear"),
    ),
    (r"B-32-256x256", Expected(**BASE, patch=32, size=256, projection=512)),
    (r"ViT-B-32", Expected(**BASE, patch=32, projection=512)),
    (r"ViT-B-16", Expected(**BASE, patch=16, projection=512)),
    # The one checkpoint of open_clip whose pixels are scaled to -1..1.
    (r"ViT-L-14-laion2B", Expected(**LARGE, patch=14, projection=768, pixels=HALF)),
    (r"ViT-L-14", Expected(**LARGE, patch=14, projection=768)),
    (r"ViT-H-14", Expected(**HUGE, patch=14, projection=1024)),
    (r"ViT-g-14", Expected(**GIANT, patch=14, projection=1024)),
    (r"ViT-bigG-14", Expected(**BIG_G, patch=14, projection=1280)),
    (r"vit_base_patch16_clip_224", Expected(**BASE, patch=16, projection=512)),
    (r"vit_base_patch32_clip_224", Expected(**BASE, patch=32, projection=512)),
    (
        r"vit_base_patch16_plus_clip_240",
        Expected(d=896, layers=12, heads=14, mlp=3584, patch=16, size=240, projection=640),
    ),
    (r"vit_large_patch14_clip_224", Expected(**LARGE, patch=14, projection=768)),
    (r"vit_large_patch14_clip_336", Expected(**LARGE, patch=14, size=336, projection=768)),
    (r"vit_huge_patch14_clip_224", Expected(**HUGE, patch=14, projection=1024)),
    (r"vit_gigantic_patch14_clip_224", Expected(**BIG_G, patch=14, projection=1280)),
    (
        r"vit_xsmall_patch16",
        Expected(d=256, layers=10, heads=4, mlp=1024, patch=16, projection=512),
    ),
    (
        r"vit_medium_patch16",
        Expected(d=512, layers=12, heads=8, mlp=2048, patch=16, projection=512),
    ),
    (
        r"vit_medium_patch32",
        Expected(d=512, layers=12, heads=8, mlp=2048, patch=32, projection=512),
    ),
    (
        r"vit_betwixt_patch32",
        Expected(d=640, layers=12, heads=10, mlp=2560, patch=32, projection=512),
    ),
    (
        r"eva02_enormous",
        Expected(d=1792, layers=64, heads=16, mlp=15360, patch=14, projection=1024),
    ),
    (
        r"eva02_large_patch14_clip_224",
        Expected(d=1024, layers=24, heads=16, mlp=2730, patch=14, projection=768),
    ),
    (
        r"eva02_large_patch14_clip_336",
        Expected(d=1024, layers=24, heads=16, mlp=2730, patch=14, size=336, projection=768),
    ),
    (r"eva02_base", Expected(d=768, layers=12, heads=12, mlp=2048, patch=16, projection=512)),
    (r"eva_giant", Expected(**GIANT, patch=14, projection=1024)),
)
QUICK = re.compile(r"openai|metaclip|patch32_clip_224\.laion400m|kandinsky|roberta-base-laion2B")
"""Trained with QuickGELU: open_clip's table of checkpoints, and OpenAI's own."""


def _expected(name: str) -> Expected:
    return next(expected for pattern, expected in TABLE if re.search(pattern, name))


def _prefix(id: str) -> str:
    return id.partition("/")[0]


def _quick(module: nn.Module) -> bool:
    return any(type(part).__name__.startswith("QuickGELU") for part in module.modules())


def test_every_name_has_an_id_of_its_own() -> None:
    assert len(NAMES) == 87
    assert len(set(prisma_names().values())) == 87


def test_the_names_are_prismas(shared: Path) -> None:
    rows = (shared / "facts" / "prisma_models.tsv").read_text().splitlines()
    column = rows[0].split("\t").index("identifier")
    assert [row.split("\t")[column] for row in rows[1:]] == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_builds_as_what_it_is(name: str) -> None:
    here = from_prisma(name)
    pytest.importorskip(
        {"open_clip": "open_clip", "timm": "timm"}.get(_prefix(here), "transformers")
    )
    expected = _expected(name)
    model = vitmodels.load(name, device="meta")
    spec = model.spec
    assert spec.id == here
    assert (spec.d_model, spec.n_layers, spec.n_heads) == (
        expected.d,
        expected.layers,
        expected.heads,
    )
    assert spec.d_head == expected.d // expected.heads
    assert spec.d_mlp == expected.mlp
    side = expected.size // expected.patch
    grid = (side, side) if expected.time is None else (expected.time, side, side)
    assert spec.grid.patch == grid
    assert (spec.grid.cls, spec.grid.register) == (expected.cls, 0)
    assert spec.input_shape[-3:] == (3, expected.size, expected.size)
    assert len(spec.input_shape) == (3 if expected.time is None else 4)
    assert _quick(model.module) == bool(QUICK.search(name))
    told = spec.transform
    mean, std = told.get("mean", told.get("image_mean")), told.get("std", told.get("image_std"))
    assert mean == pytest.approx(expected.pixels["mean"])
    assert std == pytest.approx(expected.pixels["std"])
    resample = {2: "bilinear", 3: "bicubic"}.get(told.get("resample"))
    assert told.get("interpolation", resample) == expected.interpolation
    sites = model.sites()
    tokens = spec.grid.n_tokens
    for layer in (0, expected.layers - 1):
        for part in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"):
            assert sites[f"blocks.{layer}.{part}"].shape == (tokens, expected.d)
        pattern = sites[f"blocks.{layer}.pattern"]
        assert pattern.shape == (expected.heads, tokens, tokens)
        head = (tokens, expected.heads, expected.d // expected.heads)
        assert all(sites[f"blocks.{layer}.{part}"].shape == head for part in "qkvz")
    if expected.projection:
        assert sites["projection"].shape == (expected.projection,)


def test_open_clip_names_agree_with_open_clips_own_table() -> None:
    pytest.importorskip("open_clip")
    from vitmodels.open_clip_names import from_hub

    for prisma, here in prisma_names().items():
        if not prisma.startswith("open-clip:"):
            continue
        name = from_hub(prisma)
        if name is None:  # one name lacks its last letter
            assert prisma.endswith("laion2b_s9b_b144")
            name = from_hub(f"{prisma}k")
        assert here == f"open_clip/{name}"


def test_other_spellings() -> None:
    pytest.importorskip("open_clip")
    tower = "ViT-B-32@laion2b_s34b_b79k"
    hub = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    for id in (f"open-clip:{hub}", f"hf-hub:{hub}", f"open_clip/{tower}"):
        family, name = resolve(id)
        assert (family.name, name) == ("open_clip_vit", tower)
    assert resolve("vit_base_patch16_224")[0].name == "timm_vit"


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown model"):
        resolve("open-clip:laion/CLIP-ViT-B-33")
