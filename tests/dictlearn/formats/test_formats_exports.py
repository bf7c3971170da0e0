"""What is written in another library's format reads back to the same function.

`peer_roundtrip.py` beside this file lets the libraries themselves read it.
"""

import json
from pathlib import Path

import pytest
import torch
from formats_exports import IN, OUT, SITE, dictionary, exports, inputs

from dictlearn.config import BatchTopK, Gated, Input, JumpReLU, ReLU, Sparsify, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.formats import convert, detect, load, save

CASES = list(exports())


@pytest.mark.parametrize(("format", "name", "made"), CASES, ids=[f"{f}-{n}" for f, n, _ in CASES])
def test_an_export_computes_the_same(
    tmp_path: Path, format: str, name: str, made: Dictionary
) -> None:
    folder = save(made, tmp_path / "out", format, {"model": "toy/digits-4l"})
    assert detect(folder) == format
    again, x = load(folder, reads=None), inputs()
    with torch.no_grad():
        assert torch.equal(again.encode(x) != 0, made.encode(x) != 0)
        torch.testing.assert_close(again.encode(x), made.encode(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(again(x), made(x), rtol=0, atol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (plain := tmp_path / "plain").touch()
    assert {p.stat().st_mode for p in folder.iterdir()} == {plain.stat().st_mode}


@pytest.mark.parametrize("format", ["sae_lens", "prisma", "dictionary_learning"])
def test_the_site_survives_in_the_other_spelling(tmp_path: Path, format: str) -> None:
    folder = save(dictionary(ReLU()), tmp_path / "a", format)
    assert "blocks.3.resid_post" not in "".join(p.read_text() for p in folder.glob("*.json"))
    assert list(load(folder).config.reads) == [SITE]


def test_both_sites_of_a_transcoder_survive(tmp_path: Path) -> None:
    made = dictionary(ReLU(), transcoder=True, d_out=10)
    for format in ("prisma", "sae_lens"):
        config = load(save(made, tmp_path / format, format)).config
        assert (list(config.reads), list(config.writes)) == ([IN], [OUT])


def test_a_threshold_cut_by_ge_becomes_one_cut_by_gt(tmp_path: Path) -> None:
    made = dictionary(JumpReLU(strict=False), input=Input(center="none"))
    with torch.no_grad():
        made.W_enc.zero_()
        made.b_enc.copy_(made.sparsify.threshold)  # every pre-activation equals its threshold
    x = torch.ones(1, 12)
    assert (made.encode(x) > 0).all()
    assert (load(save(made, tmp_path / "a", "sae_lens")).encode(x) > 0).all()
    strict = dictionary(BatchTopK(4), input=Input(center="none"), decoder_bias=False)
    with torch.no_grad():
        strict.W_enc.zero_()
        strict.b_enc.fill_(strict.sparsify.threshold)
    assert not (strict.encode(x) > 0).any()
    assert not (load(save(strict, tmp_path / "b", "overcomplete")).encode(x) > 0).any()


def test_an_unset_threshold_is_relu_everywhere(tmp_path: Path) -> None:
    made = dictionary(BatchTopK(4))
    made.sparsify.threshold.fill_(-1.0)
    x = inputs()
    for format in ("sae_lens", "dictionary_learning", "saev"):
        again = load(save(made, tmp_path / format, format))
        torch.testing.assert_close(again.encode(x), made.encode(x), rtol=0, atol=1e-5)


def test_the_header_of_saev_has_the_fields_of_its_own(tmp_path: Path) -> None:
    own = Path(__file__).parent / "data" / "saev" / "osu_topk_negative" / "sae.pt"
    ours = save(dictionary(TopK(6, relu=False)), tmp_path / "a", "saev") / "sae.pt"
    headers = [json.loads(file.read_bytes().partition(b"\n")[0]) for file in (own, ours)]
    assert headers[0].keys() == headers[1].keys()
    first, second = (h["cfg"]["activation"] for h in headers)
    assert first.keys() == second.keys()
    assert first["params"].keys() == second["params"].keys()
    assert first["params"]["key"] == second["params"]["key"]


@pytest.mark.parametrize("transcoder", [False, True])
def test_the_configuration_of_prisma_has_no_field_of_ours(tmp_path: Path, transcoder: bool) -> None:
    case = "D_skip_topk_layer_norm" if transcoder else "B_topk_layer_norm"
    own = Path(__file__).parent / "data" / "vit_prisma" / case / "config.json"
    ours = save(dictionary(TopK(4), transcoder=transcoder), tmp_path / "a", "prisma")
    known = json.loads(own.read_text())
    written = json.loads((ours / "config.json").read_text())
    assert written.keys() <= known.keys()
    for name in ("activation_fn_str", "activation_fn_kwargs", "is_transcoder", "d_in", "_device"):
        assert written[name] == known[name], name
    for name in ("hook_point_layer", "layer_subtype", "expansion_factor", "architecture"):
        assert written[name] == known[name], name


TWO = Dictionary({"a": 6, "b": 6}, latents=24, sparsify=TopK(3))
REFUSED: list[tuple[str, Dictionary, str]] = [
    ("sae_lens", TWO, r"'sae_lens' cannot hold several sites"),
    ("prisma", TWO, r"'prisma' cannot hold several sites"),
    ("dictionary_learning", TWO, r"cannot hold more than one site"),
    ("sparsify", TWO, r"cannot hold several sites"),
    ("saev", TWO, r"cannot hold more than one site"),
    ("overcomplete", TWO, r"cannot hold more than one site"),
    ("sae_lens", dictionary(TopK(4, group_max=True)), r"an SAE with TopK.*it holds ReLU"),
    ("sae_lens", dictionary(ReLU(), latent_norm=True), r"a LayerNorm over the latents"),
    ("sae_lens", dictionary(Gated(), transcoder=True), r"a transcoder with Gated"),
    ("sae_lens", dictionary(ReLU(), input=Input(norm="constant_norm")), r"eps=1e-05 \(it has 0"),
    ("prisma", dictionary(JumpReLU()), r"cannot hold JumpReLU.*it holds ReLU, TopK"),
    ("prisma", Dictionary({SITE: 12}, latents=40, sparsify=ReLU()), r"40 latents over 12"),
    ("prisma", Dictionary({"x": 12}, latents=48, sparsify=ReLU()), r"'blocks.N.part', not 'x'"),
    ("dictionary_learning", dictionary(TopK(4), skip=True), r"a skip path"),
    ("dictionary_learning", dictionary(ReLU(), input=Input(norm="layer_norm")), r"layer_norm"),
    ("sparsify", dictionary(ReLU()), r"It holds TopK"),
    ("sparsify", dictionary(TopK(4), transcoder=True, d_out=10), r"widths 12 and 10"),
    ("saev", dictionary(TopK(4)), r"TopK \(relu=False"),
    ("overcomplete", dictionary(TopK(4)), r"a decoder bias. Write the format 'sae_lens'"),
]


@pytest.mark.parametrize(("format", "made", "message"), REFUSED)
def test_what_a_format_cannot_hold_is_refused(
    tmp_path: Path, format: str, made: Dictionary, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save(made, tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_export_leaves_an_older_one_alone(tmp_path: Path) -> None:
    folder = save(dictionary(ReLU()), tmp_path / "out", "saev")
    before = (folder / "sae.pt").read_bytes()
    with pytest.raises(ValueError, match=r"cannot hold"):
        save(dictionary(TopK(4)), folder, "saev")
    assert (folder / "sae.pt").read_bytes() == before


@pytest.mark.parametrize("sparsify", [ReLU(), TopK(4), BatchTopK(4), JumpReLU(), Gated()], ids=str)
def test_conversion_carries_provenance(tmp_path: Path, sparsify: Sparsify) -> None:
    about = {"model": "toy/digits-4l", "tokens": "patch", "store": "abc"}
    native = save(dictionary(sparsify), tmp_path / "native", about=about)
    assert len({p.stat().st_mode for p in native.iterdir()}) == 1
    other = convert(native, tmp_path / "other", "sae_lens")
    assert json.loads((other / "cfg.json").read_text())["metadata"]["model_name"] == "toy/digits-4l"
    back = convert(other, tmp_path / "back")
    noted = json.loads((back / "config.json").read_text())["about"]
    assert noted["model"] == "toy/digits-4l"
    assert noted["source"]["format"] == "sae_lens"
    x = inputs()
    torch.testing.assert_close(load(back)(x), load(native)(x), rtol=0, atol=1e-5)
