"""Files meant to run code, fill the memory or lie about their size are refused, not run."""

import gzip
import io
import os
import pickle
import random
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actstore.manifest import FormatError
from dictlearn.formats import load, restricted
from dictlearn.formats.restricted import Inert, fields_of, load_pickle, load_pt

DATA = Path(__file__).parent / "data"


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.target),)


class Call:
    """Unpickling it calls a function with arguments."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.parts = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.parts


def checkpoint(payload: object) -> dict[str, Any]:
    """A layout of Prisma with a payload where the configuration belongs."""
    weights = {"W_enc": torch.zeros(2, 4), "W_dec": torch.zeros(4, 2)}
    weights |= {"b_enc": torch.zeros(4), "b_dec": torch.zeros(2)}
    return {"cfg": payload, "state_dict": weights}


def pickled(protocol: int) -> Callable[[Path, object], None]:
    def write(path: Path, content: object) -> None:
        data = pickle.dumps(content, protocol=protocol)
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)

    return write


def saved(*, zipped: bool) -> Callable[[Path, object], None]:
    def write(path: Path, content: object) -> None:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)

    return write


WRITERS = [
    ("sae.pkl", pickled(0)),
    ("sae.pkl", pickled(2)),
    ("sae.pkl", pickled(5)),
    ("sae.pkl.gz", pickled(4)),
    ("weights.pt", saved(zipped=True)),
    ("weights.pt", saved(zipped=False)),
    ("n_images_100.pt", saved(zipped=True)),
    ("ae.pt", saved(zipped=True)),
]


@pytest.mark.parametrize(("name", "write"), WRITERS)
def test_a_payload_is_refused_and_does_not_run(
    tmp_path: Path, name: str, write: Callable[[Path, object], None]
) -> None:
    target, file = tmp_path / "ran", tmp_path / "checkpoint" / name
    file.parent.mkdir()
    write(file, checkpoint(Payload(target)))
    (file.parent / "config.json").write_text("{}")
    with pytest.raises(FormatError, match=r"is refused: it wants to call posix.mkdir"):
        load(file.parent)
    assert not target.exists()
    # the payload is live: reading the file the usual way runs it
    if file.suffix == ".pt":
        torch.load(file, weights_only=False)
    else:
        opener = gzip.open if file.suffix == ".gz" else open
        with opener(file, "rb") as stream:
            pickle.load(stream)
    assert target.exists()


def test_a_refusal_names_what_was_asked_for_and_the_way_out(tmp_path: Path) -> None:
    for name, write in (("a.pkl", pickled(2)), ("b.pt", saved(zipped=True))):
        write(tmp_path / name, checkpoint(Payload(tmp_path / "ran")))
        read = load_pickle if name.endswith("pkl") else load_pt
        with pytest.raises(FormatError, match=r"posix.mkdir.*Nothing was run.*safetensors"):
            read(tmp_path / name)


def test_a_payload_nested_in_the_bytes_of_a_tensor_does_not_run(tmp_path: Path) -> None:
    inner = io.BytesIO()
    torch.save(Payload(tmp_path / "ran"), inner, _use_new_zipfile_serialization=False)
    nested = Call(torch.storage._load_from_bytes, inner.getvalue())
    for protocol in (2, 4):
        pickled(protocol)(tmp_path / "sae.pkl", checkpoint(nested))
        with pytest.raises(
            FormatError, match=r"a tensor inside the pickle is refused.*posix.mkdir"
        ):
            load(tmp_path)
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_payload_behind_the_header_of_saev_does_not_run(tmp_path: Path, zipped: bool) -> None:
    body = io.BytesIO()
    torch.save(Payload(tmp_path / "ran"), body, _use_new_zipfile_serialization=zipped)
    (tmp_path / "sae.pt").write_bytes(b'{"d_vit": 12, "exp_factor": 3}\n' + body.getvalue())
    with pytest.raises(FormatError, match=r"is refused: it wants to call posix.mkdir"):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_classes_of_other_libraries_are_inert(tmp_path: Path) -> None:
    config = load_pt(DATA / "vit_prisma" / "A_relu_layer_norm" / "n_images_2600058.pt")["cfg"]
    assert type(config) is Inert
    assert fields_of(config)["d_in"] == 12
    assert "vit_prisma" not in sys.modules
    pickled(2)(tmp_path / "own.pkl", Inert())
    with pytest.raises(FormatError, match=r"dictlearn.formats.restricted.Inert"):
        load_pickle(tmp_path / "own.pkl")


def test_allowed_functions_cannot_be_altered(tmp_path: Path) -> None:
    rebuild = torch._utils._rebuild_tensor_v2
    before = rebuild.__defaults__
    # a pickle whose BUILD aims at the function itself
    body = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\x00\x00\x00__defaults__)sb."
    (tmp_path / "a.pkl").write_bytes(body)
    with pytest.raises(FormatError, match=r"sets the state of a function"):
        load_pickle(tmp_path / "a.pkl")
    slots = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x09\x00\x00\x00_functionNs\x86b."
    (tmp_path / "b.pkl").write_bytes(slots)
    with pytest.raises(FormatError, match=r"cannot be read safely"):
        load_pickle(tmp_path / "b.pkl")
    assert rebuild.__defaults__ == before


def test_slots_and_opcodes_no_checkpoint_uses_are_refused(tmp_path: Path) -> None:
    huge = b"\x80\x02" + b"}" + b"r" + struct.pack("<I", 2**31) + b"."
    (tmp_path / "a.pkl").write_bytes(huge)
    with pytest.raises(FormatError, match=r"stores at slot 2147483648 after \d steps"):
        load_pickle(tmp_path / "a.pkl")
    (tmp_path / "b.pkl").write_bytes(b"(S'/tmp'\nios\nmkdir\n.")
    with pytest.raises(FormatError, match=r"pickle opcode INST"):
        load_pickle(tmp_path / "b.pkl")


def test_a_gzip_bomb_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restricted, "FREE_BYTES", 1 << 20)
    with gzip.open(tmp_path / "sae.pkl.gz", "wb", compresslevel=1) as file:
        for _ in range(40):
            file.write(bytes(1 << 20))
    with pytest.raises(FormatError, match=r"grows beyond \d+ bytes when decompressed"):
        load(tmp_path)
    (tmp_path / "sae.pkl.gz").write_bytes(gzip.compress(b"x" * 1000)[:-12])
    with pytest.raises(FormatError, match=r"not a whole gzip file"):
        load(tmp_path)


def test_a_compressed_pt_is_refused(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.pt", tmp_path / "packed.pt"
    torch.save({"W_enc": torch.zeros(64, 64)}, plain)
    with (
        zipfile.ZipFile(plain) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for entry in source.infolist():
            out.writestr(entry.filename, source.read(entry))
    assert load_pt(plain)["W_enc"].shape == (64, 64)
    with pytest.raises(FormatError, match=r"compressed or overlapping records"):
        load_pt(packed)


def test_a_tensor_larger_than_its_bytes_is_refused(tmp_path: Path) -> None:
    content = checkpoint(None)
    content["state_dict"]["W_enc"] = torch.zeros(1, 1).expand(1 << 20, 1 << 20)
    torch.save(content, tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text('{"d_in": 2}')
    with pytest.raises(FormatError, match=r"W_enc claims \[1048576, 1048576\] but holds only 4"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W_enc": torch.zeros(2, 5)}, r"the encoder has 5 latents and the decoder 4"),
        ({"W_enc": torch.zeros(4)}, r"W_enc must be a matrix, found \[4\]"),
        ({"b_enc": torch.zeros(3)}, r"b_enc is \[3\], expected \[4\]"),
        ({"b_enc": torch.zeros(4, dtype=torch.int64)}, r"b_enc must be a tensor of floats"),
        ({"b_dec": torch.tensor([0.0, float("nan")])}, r"b_dec holds NaN"),
        ({"b_dec": "zero"}, r"b_dec must be a tensor of floats, found str"),
    ],
)
def test_weights_that_do_not_fit_together_are_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    content = checkpoint(None)
    content["state_dict"] |= change
    torch.save(content, tmp_path / "weights.pt")
    (tmp_path / "config.json").write_text('{"d_in": 2, "normalize_activations": "none"}')
    with pytest.raises(FormatError, match=message):
        load(tmp_path)


def test_every_truncation_of_a_checkpoint_is_a_format_error(tmp_path: Path) -> None:
    cases = {
        "sae_lens/topk_rescale": "sae_weights.safetensors",
        "vit_prisma/B_topk_layer_norm": "weights.pt",
        "vit_prisma/E_relu_pkl_gz": "sae.pkl.gz",
        "saev/v010_relu": "sae.pt",
        "overcomplete/ra_topk": "sae.pt",
    }
    for number, (case, name) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        shutil.copytree(DATA / case, folder)
        content = (folder / name).read_bytes()
        format = case.partition("/")[0].removeprefix("vit_")
        for cut in (0, 1, 10, len(content) // 3, len(content) - 30):
            (folder / name).write_bytes(content[:cut])
            with pytest.raises(FormatError):
                load(folder, format)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_changed_bytes_are_a_format_error_or_another_dictionary(tmp_path: Path) -> None:
    rng = random.Random(5)
    cases = sorted(path.parent for path in DATA.glob("*/*/case.json"))
    refused, untold = 0, []
    for number in range(300):
        case = cases[number % len(cases)]
        folder = tmp_path / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(case, folder, ignore=shutil.ignore_patterns("case.json", "io.npz"))
        file = rng.choice(sorted(folder.iterdir()))
        content = bytearray(file.read_bytes())
        for _ in range(rng.choice((1, 1, 4))):
            content[rng.randrange(min(len(content), 2000))] = rng.randrange(256)
        file.write_bytes(content)
        try:
            load(folder)
        except FormatError:
            refused += 1
        except ValueError as error:
            untold.append(str(error))
    assert 100 < refused < 300
    assert [text for text in untold if "tell " not in text] == []
