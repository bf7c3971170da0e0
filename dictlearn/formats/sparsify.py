"""sparsify (eai-sparsify): ``<hookpoint>/sae.safetensors`` and ``cfg.json``.

``encoder.weight [m, d]``, ``encoder.bias``, ``W_dec [m, d]``, ``b_dec [d]``, optional ``W_skip
[d, d]`` on the raw input. ReLU comes before the selection: the k largest, or the largest of each of
k contiguous groups (``activation: groupmax``). b_dec is subtracted from the input unless
``transcode``. ``multi_topk`` changes the training loss only. The site is the folder's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from dictlearn.config import Input, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.formats.fold import fold_center, fold_scale, require, tensors_of
from dictlearn.formats.peer import (
    Checkpoint,
    Peer,
    checkpoint,
    choose,
    read_json,
    take,
    whole_number,
)
from dictlearn.formats.sae_lens import load_tensors
from dictlearn.formats.sites import from_module

NAME = "sparsify"
WEIGHTS = "sae.safetensors"
CONFIG = "cfg.json"
_GROUP_MAX = {"topk": False, "groupmax": True}


def _folder(path: Path) -> Path:
    return path.parent if path.name in (WEIGHTS, CONFIG) else path


def recognise(path: Path) -> bool:
    """Whether ``sae.safetensors`` lies there."""
    return (_folder(path) / WEIGHTS).is_file()


def read(path: Path) -> Checkpoint:
    """Read one hookpoint's folder."""
    folder = _folder(path)
    state = load_tensors(folder / WEIGHTS)
    where = folder / CONFIG
    config = read_json(where)
    names = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "W_dec"}
    names["b_dec"] = "b_dec"
    if "W_skip" in state:
        names["W_skip"] = "W_skip"
    group_max = choose("activation", config.get("activation", "topk"), _GROUP_MAX, where)
    transcode = bool(config.get("transcode", False))
    hookpoint = folder.resolve().name
    return checkpoint(
        take(state, names, folder / WEIGHTS),
        sparsify=TopK(whole_number(config, "k", where), group_max=group_max),
        input=Input(center="none" if transcode else "b_dec"),
        read=from_module(hookpoint, reads=transcode),
        write=from_module(hookpoint),
        transcoder=transcode,
        about={"format": NAME, "model": None, "hook": hookpoint, "config": config},
    )


def write(dictionary: Dictionary, folder: Path, about: Mapping[str, Any]) -> Path:
    """Write a folder as `SparseCoder.load_from_disk` reads it.

    Raises
    ------
    ValueError
        Several sites, input and output of different widths, normalisation, or not TopK.
    """
    config = dictionary.config
    rule = config.sparsify
    require(len(config.reads) == 1 == len(config.writes), NAME, "several sites")
    require(config.d_read == config.d_write, NAME, f"widths {config.d_read} and {config.d_write}")
    require(config.input.norm == "none", NAME, f"input norm {config.input.norm!r}")
    require(not config.latent_norm, NAME, "a LayerNorm over the latents")
    require(isinstance(rule, TopK) and rule.relu, NAME, f"{rule}", "It holds TopK (relu=True).")
    transcode = config.input.center != "b_dec"
    tensors = fold_scale(tensors_of(dictionary))
    if transcode:
        tensors = fold_center(tensors, config)
    state = {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "encoder.bias": tensors["b_enc"],
        "W_dec": tensors["W_dec"].contiguous(),
        "b_dec": tensors["b_dec"],
    }
    if config.skip:
        state["W_skip"] = tensors["W_skip"]
    cfg = {
        "activation": "groupmax" if getattr(rule, "group_max", False) else "topk",
        "expansion_factor": max(1, config.latents // config.d_read),
        "normalize_decoder": True,
        "num_latents": config.latents,
        "k": getattr(rule, "k", 0),
        "multi_topk": False,
        "skip_connection": config.skip,
        "transcode": transcode,
        "d_in": config.d_read,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(cfg, indent=1) + "\n")
    return folder


PEER = Peer(
    name=NAME,
    files=f"a folder with {WEIGHTS} and {CONFIG}",
    recognise=recognise,
    read=read,
    write=write,
)
