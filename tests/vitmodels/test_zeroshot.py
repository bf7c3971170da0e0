"""Zero-shot heads: class names through a text tower of open_clip."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import vitmodels
from vitmodels import zeroshot
from vitmodels.zeroshot import class_vectors, load_zero_shot, zero_shot

open_clip = pytest.importorskip("open_clip")

CLASSES = ("cat", "dog", "goldfish")
TEMPLATES = ("a photo of a {}.", "a drawing of the {}.")
SMALL = {"layers": 2, "width": 24, "head_width": 6, "patch_size": 8, "image_size": 32}


@pytest.fixture(scope="module")
def clip() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = open_clip.CustomTextCLIP(
            embed_dim=20,
            vision_cfg=SMALL,
            text_cfg={"context_length": 16, "width": 16, "heads": 2, "layers": 2},
            init_logit_bias=-10,
        )
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def towers(clip: nn.Module) -> tuple[vitmodels.VisionModel, vitmodels.VisionModel]:
    text = open_clip.CustomTextCLIP(
        embed_dim=20,
        vision_cfg=SMALL,
        text_cfg={"context_length": 16, "width": 16, "heads": 2, "layers": 2},
        init_logit_bias=-10,
    )
    text.load_state_dict(clip.state_dict())
    text.visual = nn.Identity()
    return vitmodels.wrap(clip.visual, id="a"), vitmodels.wrap(text, family="open_clip_text")


def reference(clip: nn.Module, x: Tensor) -> Tensor:
    """Return cosines by open_clip alone."""
    weights = open_clip.build_zero_shot_classifier(
        clip, lambda t: open_clip.tokenize(t, context_length=16), CLASSES, TEMPLATES
    )
    with torch.no_grad():
        return clip.encode_image(x, normalize=True) @ weights


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_logits_are_open_clips_at_both_temperatures(clip: nn.Module, towers) -> None:
    cosines = reference(clip, images())
    with torch.no_grad():
        one = zero_shot(*towers, CLASSES, templates=TEMPLATES, scale=1.0)
        torch.testing.assert_close(one(images()), cosines)
        trained = zero_shot(*towers, CLASSES, templates=TEMPLATES)
        scale = math.exp(float(clip.logit_scale))
        torch.testing.assert_close(trained(images()), scale * cosines - 10)
        assert torch.equal(trained(images()).argmax(-1), one(images()).argmax(-1))


def test_the_head_is_a_site_behind_the_tower(towers) -> None:
    model = zero_shot(*towers, CLASSES)
    sites = model.sites()
    assert sites["logits"].shape == (3,)
    assert list(sites)[:-1] == list(towers[0].sites())
    assert model.spec == towers[0].spec
    with torch.no_grad():
        plain = model(images())
        assert torch.equal(model.run(images(), "logits")["logits"], plain)
        with model.editing({"blocks.0.resid_post": torch.zeros_like}):
            assert not torch.allclose(model(images()), plain)
        assert torch.equal(model(images()), plain)
    grads = model.run(images(), "blocks.1.z", grad_of=lambda logits: logits[:, 0].sum())
    assert grads["blocks.1.z.grad"].abs().sum() > 0


def test_vectors_are_normalised_and_templates_are_averaged(towers) -> None:
    text = towers[1]
    both = class_vectors(text, CLASSES, TEMPLATES)
    torch.testing.assert_close(both.norm(dim=-1), torch.ones(3))
    single = [class_vectors(text, CLASSES, (template,)) for template in TEMPLATES]
    mean = nn.functional.normalize(single[0] + single[1], dim=-1)
    torch.testing.assert_close(both, mean)


def test_the_tokenizer_is_open_clips(towers) -> None:
    ids = towers[1].transform("a photo of a cat.")
    assert torch.equal(ids, open_clip.tokenize(["a photo of a cat."], context_length=16)[0])
    assert towers[1].transform.describe()["tokenizer"] == "clip_bpe"


def test_text_sites_hold_the_text(clip: nn.Module, towers) -> None:
    text = towers[1]
    ids = open_clip.tokenize(["a cat", "a large dog on a hill"], context_length=16)
    with torch.no_grad():
        acts = text.run(ids, "text.*", stop_early=False)
        expected = clip.encode_text(ids)
    assert torch.equal(acts["text.projection"], expected)
    end = ids.argmax(-1)
    rows = torch.arange(2)
    assert torch.equal(acts["text.pooled"], acts["text.final"][rows, end])
    pattern = acts["text.blocks.1.pattern"]
    assert pattern.shape == (2, 2, 16, 16)
    assert not pattern.triu(1).any()  # causal: no later token is seen
    with torch.no_grad(), text.editing({"text.blocks.0.resid_post": torch.zeros_like}):
        assert not torch.allclose(text(ids), expected)


def test_both_towers_load_by_one_name(clip: nn.Module, tmp_path: Path, monkeypatch) -> None:
    config = {
        "embed_dim": 20,
        "vision_cfg": SMALL,
        "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 2},
        "init_logit_bias": -10,
    }
    monkeypatch.setitem(zeroshot_names(), "tiny-both", config)
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    model = load_zero_shot(
        "open_clip/tiny-both",
        CLASSES,
        templates=TEMPLATES,
        scale=1.0,
        weights=tmp_path / "clip.safetensors",
    )
    with torch.no_grad():
        torch.testing.assert_close(model(images()), reference(clip, images()))


def zeroshot_names() -> dict[str, object]:
    from vitmodels import open_clip_names

    return open_clip_names._EXTRA_CONFIGS


def test_bad_input(towers) -> None:
    image, text = towers
    with pytest.raises(ValueError, match="no text tower; load one"):
        zero_shot(image, image, CLASSES)
    with pytest.raises(ValueError, match="sequence of names"):
        zero_shot(image, text, "cat")
    with pytest.raises(ValueError, match="sentences with"):
        zero_shot(image, text, CLASSES, templates=("a photo",))
    toy = vitmodels.load("toy/digits-1l", pretrained=False)
    with pytest.raises(ValueError, match=r"no projection.*one checkpoint"):
        zero_shot(toy, text, CLASSES)
    with pytest.raises(ValueError, match="take a checkpoint of open_clip"):
        zeroshot.load_zero_shot("toy/digits-1l", CLASSES)


def test_a_store_of_the_tower_takes_the_head_for_its_loss(towers, tmp_path: Path) -> None:
    import actstore
    from dictlearn import Dictionary, TopK, evaluate

    image, text = towers
    for name, colour in (("cat", "red"), ("dog", "blue"), ("goldfish", "gold")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(2):
            picture = Image.new("RGB", (40, 40), colour)
            picture.paste("white", (0, 0, 10 + i, 10))
            picture.save(tmp_path / "images" / name / f"{i}.png")
    site = "blocks.1.resid_post"
    store = actstore.harvest(
        model=image, data=tmp_path / "images", sites=site, out=tmp_path / "store.zarr"
    )
    dictionary = Dictionary(reads={site: 24}, writes={site: 24}, latents=48, sparsify=TopK(4))
    model = zero_shot(image, text, CLASSES, scale=1.0)
    loss = evaluate(dictionary, store, model=model, data=tmp_path / "images").substitution
    assert loss is not None
    assert loss.target == "labels"
    assert set(loss.ce) == {"clean", "spliced", "error", "zero", "mean"}
    assert 0 < loss.kl["zero"] < 2
    with pytest.raises(ValueError, match="no classification head"):
        evaluate(dictionary, store, model=image, data=tmp_path / "images")
