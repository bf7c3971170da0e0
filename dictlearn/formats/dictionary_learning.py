"""dictionary_learning: a folder with ``ae.pt`` (a state dict) and ``config.json``.

AutoEncoder: ``encoder.weight [m, d]``, ``encoder.bias``, ``decoder.weight [d, m]``, ``bias``; TopK
and BatchTopK: ``b_dec`` for ``bias``, buffers ``k`` and ``threshold`` (-1: unset); JumpReLU and
Matryoshka: ``W_enc [d, m] b_enc W_dec [m, d] b_dec threshold``; Gated: ``decoder_bias r_mag
gate_bias mag_bias``; AutoEncoderNew: ``decoder.bias``, written as class AutoEncoder, so the keys
are trusted and not the name. JumpReLU and AutoEncoderNew subtract nothing from the input. TopK does
not use its stored threshold. The library's own AutoEncoder loader scales decoder rows to norm 1 by
default, which changes its activations but not its output; here they stay as saved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actstore.manifest import FormatError
from dictlearn.config import BatchTopK, Center, Gated, Input, JumpReLU, Matryoshka, ReLU, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.formats.fold import (
    center_on_b_dec,
    fold_center,
    fold_scale,
    gate_biases,
    require,
    tensors_of,
    thresholds,
)
from dictlearn.formats.peer import Checkpoint, Peer, checkpoint, read_json, take
from dictlearn.formats.restricted import load_pt
from dictlearn.formats.sites import from_module, to_hook

NAME = "dictionary_learning"
WEIGHTS = "ae.pt"
CONFIG = "config.json"

_LINEAR = {"W_enc": "encoder.weight.T", "W_dec": "decoder.weight.T"}
_BIASED = {**_LINEAR, "b_enc": "encoder.bias"}
_PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


def _folder(path: Path) -> Path:
    return path.parent if path.name == WEIGHTS else path


def recognise(path: Path) -> bool:
    """Whether ``ae.pt`` lies there."""
    return (_folder(path) / WEIGHTS).is_file()


def read(path: Path) -> Checkpoint:
    """Read a folder; ``config.json`` may be missing."""
    folder = _folder(path)
    file = folder / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    state = load_pt(file)
    if not isinstance(state, dict):
        raise FormatError(f"{file} holds {type(state).__name__}, expected a state dict")
    if isinstance(state.get("ae"), dict):
        raise FormatError(
            f"{file} is a backup from the middle of a run, whose biases are not scaled back; load "
            "the ae.pt that the finished run wrote"
        )
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    trainer = config.get("trainer") or {}
    names, center, rule = _kind(state, file)
    tensors = take(state, names, file)
    k = int(state["k"]) if isinstance(state.get("k"), Tensor) else int(trainer.get("k") or 0)
    if rule in (TopK, BatchTopK) and k < 1:
        raise FormatError(f"{file} has no k, and neither has {CONFIG}")
    if rule is BatchTopK:
        tensors |= take(state, {"sparsify.threshold": "threshold"}, file)
    site = from_module(trainer.get("submodule_name"))
    matryoshka = None
    if isinstance(state.get("group_sizes"), Tensor):
        prefixes = tuple(state["group_sizes"].cumsum(0).tolist()[:-1])
        matryoshka = Matryoshka(prefixes=prefixes) if prefixes else None
    return checkpoint(
        tensors,
        sparsify=rule(k) if rule in (TopK, BatchTopK) else rule(),
        input=Input(center=center),
        read=site or trainer.get("submodule_name"),
        matryoshka=matryoshka,
        about={
            "format": NAME,
            "model": trainer.get("lm_name"),
            "hook": trainer.get("submodule_name"),
            "config": config,
        },
    )


def _kind(state: dict[str, Any], file: Path) -> tuple[dict[str, str], Center, Any]:
    """Tell the class by its keys: names of its tensors, what it subtracts, its rule."""
    if "gate_bias" in state:
        gates = {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
        names = {f"sparsify.{ours}": theirs for ours, theirs in gates.items()}
        return {**_LINEAR, "b_dec": "decoder_bias", **names}, "b_dec", Gated
    if "W_enc" in state and "k" in state:
        return _PLAIN, "b_dec", BatchTopK
    if "W_enc" in state:
        return {**_PLAIN, "sparsify.threshold": "threshold"}, "none", JumpReLU
    if "decoder.bias" in state:
        return {**_BIASED, "b_dec": "decoder.bias"}, "none", ReLU
    if "bias" in state:
        return {**_BIASED, "b_dec": "bias"}, "b_dec", ReLU
    if "b_dec" in state:
        return {**_BIASED, "b_dec": "b_dec"}, "b_dec", _topk_or_batch(file)
    raise FormatError(f"{file} is no dictionary of {NAME}: its keys are {sorted(map(str, state))}")


def _topk_or_batch(file: Path) -> Any:
    """TopK and BatchTopK have the same keys; only ``config.json`` tells them apart."""
    config = file.parent / CONFIG
    named = (read_json(config).get("trainer") or {}).get("dict_class") if config.is_file() else None
    if named not in ("AutoEncoderTopK", "BatchTopKSAE"):
        raise FormatError(
            f"{file} may be AutoEncoderTopK or BatchTopKSAE, which have the same tensors; "
            f"{CONFIG} must say so in trainer.dict_class, found {named!r}"
        )
    return TopK if named == "AutoEncoderTopK" else BatchTopK


def write(dictionary: Dictionary, folder: Path, about: Mapping[str, Any]) -> Path:
    """Write ``ae.pt`` and ``config.json`` as `utils.load_dictionary` of the library reads them.

    Raises
    ------
    ValueError
        Several sites, a skip path, input normalisation, or a rule that the library lacks.
    """
    config = dictionary.config
    require(config.reads == config.writes and len(config.reads) == 1, NAME, "more than one site")
    require(not config.skip, NAME, "a skip path")
    require(config.input.norm == "none", NAME, f"input norm {config.input.norm!r}")
    require(not config.latent_norm, NAME, "a LayerNorm over the latents")
    tensors = fold_scale(tensors_of(dictionary))
    rule = config.sparsify
    linear = {
        "encoder.weight": tensors["W_enc"].T.contiguous(),
        "decoder.weight": tensors["W_dec"].T.contiguous(),
    }
    settings: dict[str, Any] = {}
    state: dict[str, Tensor]
    match rule:
        case ReLU(function="relu") if config.input.center == "b_dec":
            name, state = "AutoEncoder", {"bias": tensors["b_dec"], **linear}
            state["encoder.bias"] = tensors["b_enc"]
        case ReLU(function="relu"):
            tensors = fold_center(tensors, config)
            name, state = "AutoEncoderNew", {"decoder.bias": tensors["b_dec"], **linear}
            state["encoder.bias"] = tensors["b_enc"]
        case JumpReLU():
            tensors = fold_center(tensors, config)
            name, state = "JumpReluAutoEncoder", {k: tensors[k] for k in _PLAIN}
            state["threshold"] = thresholds(tensors, config, strict=True)
        case TopK(relu=True, group_max=False) | BatchTopK():
            tensors = center_on_b_dec(tensors, config)
            settings["k"] = rule.k
            buffers = {"k": torch.tensor(rule.k), "threshold": torch.tensor(-1.0)}
            if isinstance(rule, BatchTopK):
                buffers["threshold"] = thresholds(tensors, config, strict=True)[0].clone()
            widths = config.matryoshka.prefixes if config.matryoshka else ()
            if isinstance(rule, BatchTopK) and widths:
                sizes = torch.tensor([0, *widths, config.latents]).diff()
                settings["group_sizes"] = sizes.tolist()
                name = "MatryoshkaBatchTopKSAE"
                state = {**{k: tensors[k] for k in _PLAIN}, **buffers, "group_sizes": sizes}
            else:
                name = "BatchTopKSAE" if isinstance(rule, BatchTopK) else "AutoEncoderTopK"
                state = {"b_dec": tensors["b_dec"], **buffers, **linear}
                state["encoder.bias"] = tensors["b_enc"]
        case Gated(k=None):
            tensors = gate_biases(center_on_b_dec(tensors, config))
            name, state = "GatedAutoEncoder", {"decoder_bias": tensors["b_dec"], **linear}
            for theirs, ours in (
                ("r_mag", "r_mag"),
                ("gate_bias", "b_gate"),
                ("mag_bias", "b_mag"),
            ):
                state[theirs] = tensors[f"sparsify.{ours}"]
        case _:
            raise ValueError(
                f"the format {NAME!r} cannot hold {rule}; it holds ReLU, TopK, BatchTopK, "
                "JumpReLU and Gated (k=None)"
            )
    site = next(iter(config.reads))
    trainer = {
        "dict_class": name,
        "activation_dim": config.d_read,
        "dict_size": config.latents,
        "lm_name": about.get("model"),
        "submodule_name": to_hook(site, "tl"),
        **settings,
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"trainer": trainer, "buffer": {}}, indent=1) + "\n")
    return folder


PEER = Peer(
    name=NAME,
    files=f"a folder with {WEIGHTS} and {CONFIG}",
    recognise=recognise,
    read=read,
    write=write,
)
