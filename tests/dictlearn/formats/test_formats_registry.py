"""Finding a file's format, the options it is told, and the two commands."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from actstore.manifest import FormatError
from dictlearn.cli import main
from dictlearn.config import ReLU, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.formats import convert, detect, formats, load, save
from dictlearn.formats.registry import peers
from dictlearn.formats.sites import from_hook, from_module, to_hook

DATA = Path(__file__).parent / "data"


def test_every_format_is_found_by_scanning() -> None:
    names = ["dictionary_learning", "overcomplete", "prisma", "sae_lens", "saev", "sparsify"]
    assert formats() == ["native", *names]
    assert all(peer.name == name for name, peer in peers().items())
    assert all(peer.write is not None for peer in peers().values())


@pytest.mark.parametrize(
    ("case", "file"),
    [
        ("sae_lens/topk_rescale", "sae_weights.safetensors"),
        ("sae_lens/topk_rescale", "cfg.json"),
        ("sparsify/groupmax_transcode_skip", "sae.safetensors"),
        ("dictionary_learning/gated", "ae.pt"),
        ("vit_prisma/B_topk_layer_norm", "weights.pt"),
        ("vit_prisma/A_relu_layer_norm", "n_images_2600058.pt"),
        ("vit_prisma/E_relu_pkl_gz", "sae.pkl.gz"),
        ("saev/v010_relu", "sae.pt"),
        ("overcomplete/ra_topk", "sae.pt"),
    ],
)
def test_a_file_does_for_its_folder(case: str, file: str) -> None:
    path = DATA / case / file
    if file == "cfg.json":
        assert load(path, "sae_lens").latents == load(path.parent).latents
    else:
        assert detect(path) == detect(path.parent)
        assert torch.equal(load(path).W_dec, load(path.parent).W_dec)


def test_what_is_no_dictionary_is_described(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no dictionary at .*dictlearn pretrained"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no dictionary at"):
        load(tmp_path / "nothing", "prisma")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FormatError, match=r"It holds notes.txt. Formats: dictionary_learning: a"):
        detect(tmp_path)
    for layer in (1, 2):
        shutil.copytree(DATA / "sae_lens" / "topk_rescale", tmp_path / f"layer_{layer}")
    with pytest.raises(FormatError, match=r"dictionaries, load one: layer_1, layer_2"):
        detect(tmp_path)


def test_two_formats_in_one_folder_are_not_guessed(tmp_path: Path) -> None:
    shutil.copytree(DATA / "sae_lens" / "topk_rescale", tmp_path, dirs_exist_ok=True)
    shutil.copy(DATA / "dictionary_learning" / "gated" / "ae.pt", tmp_path)
    with pytest.raises(FormatError, match=r"could be of dictionary_learning or sae_lens: say form"):
        load(tmp_path)
    assert load(tmp_path, "sae_lens").config.sparsify == TopK(4)


def test_unknown_formats_and_options_name_the_nearest(tmp_path: Path) -> None:
    case = DATA / "saev" / "v010_relu"
    with pytest.raises(ValueError, match=r"unknown format 'saelens'; nearest: 'sae_lens'; all: na"):
        load(case, "saelens")
    with pytest.raises(ValueError, match=r"unknown format 'sparsfy'; nearest: 'sparsify'"):
        save(load(case), tmp_path / "x", "sparsfy")
    with pytest.raises(ValueError, match=r"'saev' has no option 'read'; nearest: 'reads'"):
        load(case, read="blocks.1.resid_post")
    with pytest.raises(ValueError, match=r"'overcomplete' has no option 'topk'; nearest: 'top_k'"):
        load(DATA / "overcomplete" / "ra_topk", topk=3)
    native = save(Dictionary({"a": 4}, latents=8, sparsify=ReLU()), tmp_path / "d")
    with pytest.raises(ValueError, match=r"the native format records everything; it takes no"):
        load(native, reads="b")


def test_a_configuration_that_names_something_unknown_is_refused(tmp_path: Path) -> None:
    shutil.copytree(DATA / "sae_lens" / "topk_rescale", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "cfg.json").read_text())
    for field, value, message in (
        (
            "architecture",
            "temporal",
            r"architecture 'temporal' is not supported; allowed: standard",
        ),
        ("normalize_activations", "z_score", r"'z_score' is not supported; allowed: none"),
        ("k", None, r"k must be a whole number, found None"),
    ):
        (tmp_path / "cfg.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(FormatError, match=message):
            load(tmp_path)
    (tmp_path / "cfg.json").write_text("[" * 100_000)
    with pytest.raises(FormatError, match=r"is not JSON"):
        load(tmp_path)
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"cfg.json is missing"):
        load(tmp_path)


def test_an_old_pickle_without_its_normalisation_asks(tmp_path: Path) -> None:
    import gzip
    import pickle

    content = pickle.loads(
        gzip.decompress((DATA / "vit_prisma/E_relu_pkl_gz/sae.pkl.gz").read_bytes())
    )
    del content["config"]["normalize_activations"]
    (tmp_path / "sae.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"tell normalize='none' .* or normalize='layer_norm'"):
        load(tmp_path)
    assert load(tmp_path, normalize="none").config.input.norm == "none"
    assert load(tmp_path, normalize="layer_norm").config.input.norm == "layer_norm"


def test_spellings_of_sites() -> None:
    assert from_hook("blocks.7.hook_resid_post", "tl") == "blocks.7.resid_post"
    assert from_hook("blocks.7.ln2.hook_normalized", "prisma") == "blocks.7.mlp_in"
    assert from_hook("blocks.7.attn.hook_z", "tl") == "blocks.7.z"
    assert from_hook("transformer.h.3.ln_1", "tl") == "transformer.h.3.ln_1"
    assert from_hook(None, "tl") is None
    assert from_module("resid_post_layer_8") == "blocks.8.resid_post"
    assert from_module("vision_model.encoder.layers.4.mlp") == "blocks.4.mlp_out"
    assert from_module("vision_model.encoder.layers.4.mlp", reads=True) == "blocks.4.mlp_in"
    assert from_module("blocks.3.hook_resid_post") == "blocks.3.resid_post"
    assert from_module("embed_tokens") is None
    for part in ("resid_pre", "resid_post", "mlp_out", "attn_out", "q", "z", "mlp_in"):
        site = f"blocks.5.{part}"
        for dialect in ("tl", "prisma"):
            assert from_hook(to_hook(site, dialect), dialect) == site
            assert to_hook(site, dialect) != site
    assert to_hook("pooled", "tl") == "pooled"


def test_the_command_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case, out = DATA / "vit_prisma" / "B_topk_layer_norm", tmp_path / "out"
    assert main(["convert", str(case), str(out)]) == 0
    assert "wrote" in capsys.readouterr().out
    x = torch.ones(1, 12)
    assert torch.equal(load(out)(x), load(case)(x))
    assert main(["convert", str(out), str(tmp_path / "lens"), "--format", "sae_lens"]) == 0
    torch.testing.assert_close(load(tmp_path / "lens")(x), load(case)(x), rtol=0, atol=1e-5)
    capsys.readouterr()
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(DATA / "overcomplete" / "topk_batchnorm" / "sae.pt", bare)
    told = ["--tell", "kind=TopKSAE", "top_k=4", "--reads", "blocks.1.mlp_out"]
    assert main(["convert", str(bare), str(tmp_path / "d"), *told]) == 0
    assert "unnamed" not in capsys.readouterr().out
    assert load(tmp_path / "d").config.reads == {"blocks.1.mlp_out": 12}
    assert main(["convert", str(DATA / "saev" / "v010_relu"), str(tmp_path / "e")]) == 0
    assert "its site is not recorded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["convert", "nowhere", "out"],
            "nothing at nowhere, and no published dictionary is called",
        ),
        (["convert", "CASE", "out", "--format", "prizma"], "nearest: 'prisma'"),
        (["convert", "CASE", "out", "--tell", "top_k"], "write NAME=VALUE"),
        (["convert", "CASE", "out", "--tell", "top_k=3"], "no option 'top_k'"),
        (["pretrained", "zzz"], "no published dictionary matches 'zzz'"),
    ],
)
def test_what_a_command_refuses_is_said(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"CASE": str(DATA / "saev" / "v010_relu"), "out": str(tmp_path / "out")}
    assert main([given.get(word, word) for word in words]) == 1
    assert message in capsys.readouterr().err


def test_the_command_lists_published_dictionaries(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrained", "blocks.11.resid_post"]) == 0
    out = capsys.readouterr().out
    assert "DINO-vanilla-x64-all_patches_11-resid_post-1085-99" in out
    assert "1085" in out
    assert "1.9116" in out
    assert "hf/facebook/dino-vitb16, tokens cls,patch" in out
    assert "5 dictionaries" in out


def test_conversion_to_the_same_folder_replaces_it_whole(tmp_path: Path) -> None:
    first, second = (
        DATA / "vit_prisma" / "B_topk_layer_norm",
        DATA / "dictionary_learning" / "gated",
    )
    convert(first, tmp_path / "d")
    convert(second, tmp_path / "d")
    assert torch.equal(load(tmp_path / "d").W_dec, load(second).W_dec)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]
