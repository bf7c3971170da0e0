"""saev: one file, a line of JSON and then a state dict.

``W_enc [d, m] b_enc W_dec [m, d] b_dec``, BatchTopK also ``activation.threshold``. Headers: the
bare configuration (0.1.0), or ``{"schema": n, "cfg": {...}}``, n = 1 to 5. b_dec is subtracted
before encoding in 0.1.0 and schema 1 and no longer from schema 2 on (the library's present loader
forgets that for 0.1.0 files; this one does not). TopK has no ReLU, so negative values survive.
The threshold of BatchTopK is used only if above 0, else the rule is ReLU; files from before it had
one (schema 1 and 2) are top-k of each row.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actstore.manifest import FormatError
from dictlearn.config import BatchTopK, Input, ReLU, Sparsify, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.formats.fold import fold_center, fold_scale, require, tensors_of, thresholds
from dictlearn.formats.peer import Checkpoint, Peer, checkpoint, parse_json, take, whole_number
from dictlearn.formats.restricted import load_pt

NAME = "saev"
WEIGHTS = "sae.pt"
SCHEMA = 5
"""Newest header known, and the one written."""
_MAX_HEADER = 1 << 20
_NAMES = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


def _file(path: Path) -> Path:
    return path / WEIGHTS if path.is_dir() else path


def recognise(path: Path) -> bool:
    """Whether the file starts with a JSON header."""
    file = _file(path)
    if file.suffix != ".pt" or not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(1) == b"{"


def read(path: Path) -> Checkpoint:
    """Read a file, or ``sae.pt`` in a folder."""
    file = _file(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    with file.open("rb") as stream:
        line = stream.readline(_MAX_HEADER)
        if not line.endswith(b"\n"):
            raise FormatError(f"{file} has no header line of JSON")
        header = parse_json(line, file)
        state = load_pt(io.BytesIO(stream.read()), file)
    schema = whole_number(header, "schema", file) if "schema" in header else 0
    if schema > SCHEMA:
        raise FormatError(f"{file} has schema {schema}; this release reads up to {SCHEMA}")
    config = header["cfg"] if schema else header
    if not isinstance(state, dict) or not isinstance(config, dict):
        raise FormatError(f"{file} holds no state dict and configuration")
    tensors = take(state, _NAMES, file)
    sparsify = _rule(header, config, state, tensors, file)
    return checkpoint(
        tensors,
        sparsify=sparsify,
        input=Input(center="b_dec" if schema < 2 else "none"),
        read=None,
        about={"format": NAME, "model": None, "hook": None, "config": header},
    )


def _rule(
    header: dict[str, Any],
    config: dict[str, Any],
    state: dict[str, Any],
    out: dict[str, Tensor],
    file: Path,
) -> Sparsify:
    activation = config.get("activation") or {"cls": header.get("cls", "Relu"), "params": config}
    name, params = activation.get("cls"), activation.get("params") or {}
    if name == "Relu":
        return ReLU()
    if name == "TopK":
        return TopK(whole_number(params, "top_k", file), relu=False)
    if name == "BatchTopK" and "activation.threshold" not in state:  # it was top-k of each row
        return TopK(min(whole_number(params, "top_k", file), out["W_enc"].shape[1]), relu=False)
    if name == "BatchTopK":
        threshold = take(state, {"t": "activation.threshold"}, file)["t"]
        out["sparsify.threshold"] = torch.where(threshold > 0, threshold, -1.0).reshape(())
        return BatchTopK(whole_number(params, "top_k", file))
    raise FormatError(
        f"{file}: activation {name!r} is not supported; allowed: Relu, TopK, BatchTopK"
    )


def write(dictionary: Dictionary, folder: Path, about: Mapping[str, Any]) -> Path:
    """Write ``sae.pt`` with a header of schema 5 into `folder`.

    Raises
    ------
    ValueError
        Several sites, a skip path, normalisation, or a rule that the library lacks.
    """
    config = dictionary.config
    rule = config.sparsify
    require(config.reads == config.writes and len(config.reads) == 1, NAME, "more than one site")
    require(not config.skip, NAME, "a skip path")
    require(config.input.norm == "none", NAME, f"input norm {config.input.norm!r}")
    require(not config.latent_norm, NAME, "a LayerNorm over the latents")
    tensors = fold_center(fold_scale(tensors_of(dictionary)), config)
    state = {k: tensors[k].contiguous() for k in _NAMES}
    params: dict[str, Any]
    match rule:
        case ReLU(function="relu"):
            name, params = "Relu", {"key": "relu"}
        case TopK(relu=False, group_max=False):
            name, params = "TopK", {"key": "top-k", "top_k": rule.k}
        case BatchTopK():
            name, params = "BatchTopK", {"key": "batch-top-k", "top_k": rule.k}
            state["activation.threshold"] = thresholds(tensors, config, strict=True)[0].clone()
        case _:
            raise ValueError(
                f"the format {NAME!r} cannot hold {rule}; it holds ReLU, BatchTopK and TopK "
                "(relu=False: it lets negative values among the k largest through)"
            )
    params |= {
        "sparsity": {"cls": "NoSparsity", "params": {"key": "no-sparsity"}},
        "aux": {"cls": "NoAux", "params": {"key": "no-aux"}},
    }
    activation = {"cls": name, "params": params}
    header = {
        "schema": SCHEMA,
        "cfg": {"d_model": config.d_read, "d_sae": config.latents, "activation": activation},
        "commit": "unknown",
        "lib": "0.1.0",
    }
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save(state, file)
    return folder


PEER = Peer(
    name=NAME,
    files=f"a file {WEIGHTS} whose first line is JSON",
    recognise=recognise,
    read=read,
    write=write,
)
