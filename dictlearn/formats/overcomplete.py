"""overcomplete: a plain ``torch.save`` of a state dict; the library has no save function.

``encoder.final_block.0.weight [m, d]`` and ``.bias`` (then ``.1.*``: BatchNorm, folded into the
encoder here, or LayerNorm over the latents), ``dictionary._weights [m, d]``, stored before it is
normalised, and ``dictionary.multiplier``: ``D = normalise(_weights) * exp(multiplier)``. Archetypal
``D = (row_normalise(relu(W)) @ C + shorten(Relax, delta)) * exp(multiplier)`` (Fel et al. 2025,
arXiv:2502.12892). JumpSAE stores the logarithm of its thresholds. Nothing is subtracted from the
input, there is no decoder bias, and cuts are ``>=``.

The class, k, the kind of normalisation, delta and the running threshold are not in the file: they
are told, or lie beside it in ``sae.json`` (a file of this project, which `write` adds).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actstore.manifest import FormatError
from dictlearn.config import BatchTopK, Input, JumpReLU, ReLU, Sparsify, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.formats.fold import fold_center, fold_scale, require, tensors_of, thresholds
from dictlearn.formats.peer import Checkpoint, Peer, checkpoint, choose, read_json, take
from dictlearn.formats.restricted import load_pt, peek

NAME = "overcomplete"
WEIGHTS = "sae.pt"
TOLD = "sae.json"
_NORM_EPS = 1e-5  # of BatchNorm1d and LayerNorm

_NORMALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda w: w / (w.norm(dim=1, keepdim=True) + 1e-8),
    "max_l2": lambda w: w / w.norm(dim=1).max(),
    "l1": lambda w: w / (w.norm(p=1, dim=1, keepdim=True) + 1e-8),
    "max_l1": lambda w: w / w.norm(p=1, dim=1).max(),
    "identity": lambda w: w,
}
_KINDS = {
    "SAE": "relu",
    "TopKSAE": "topk",
    "RATopKSAE": "topk",
    "BatchTopKSAE": "batchtopk",
    "JumpSAE": "jump",
    "RAJumpSAE": "jump",
}


def _file(path: Path) -> Path:
    return path / WEIGHTS if path.is_dir() else path


def recognise(path: Path) -> bool:
    """Whether the file's structure names a dictionary layer of the library."""
    file = _file(path)
    return file.suffix == ".pt" and file.is_file() and b"dictionary.multiplier" in peek(file)


def read(
    path: Path,
    kind: str | None = None,
    top_k: int | None = None,
    normalization: str | None = None,
    delta: float | None = None,
    running_threshold: float | None = None,
) -> Checkpoint:
    """Read a file, or ``sae.pt`` in a folder; what is told wins over ``sae.json``."""
    file = _file(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    state = load_pt(file)
    if not isinstance(state, dict):
        raise FormatError(f"{file} holds {type(state).__name__}, expected a state dict")
    beside = file.with_name(TOLD)
    noted = read_json(beside) if beside.is_file() else {}
    kind = kind or noted.get("class") or ("JumpSAE" if "thresholds" in state else None)
    if kind is None:
        raise ValueError(
            f"{file} does not say which class it is: tell kind= one of {', '.join(_KINDS)}"
        )
    rule = choose("class", kind, _KINDS, file)
    tensors = _encoder(state, file)
    chosen = normalization or (noted.get("dictionary_params") or {}).get("normalization") or "l2"
    delta = noted.get("delta") if delta is None else delta
    tensors["W_dec"] = _decoder(state, file, chosen, delta)
    k = top_k if top_k is not None else noted.get("top_k")
    running = noted.get("running_threshold") if running_threshold is None else running_threshold
    return checkpoint(
        tensors,
        sparsify=_rule(rule, k, running, state, tensors, file),
        input=Input(center="none"),
        read=None,
        about={
            "format": NAME,
            "model": None,
            "hook": None,
            "config": {**noted, "class": kind, "normalization": chosen, "delta": delta},
        },
    )


def _encoder(state: dict[str, Any], file: Path) -> dict[str, Tensor]:
    first, second = "encoder.final_block.0", "encoder.final_block.1"
    extra = [k for k in state if str(k).startswith("encoder.") and "final_block" not in str(k)]
    if extra or f"{first}.weight" not in state:
        raise FormatError(
            f"{file}: only the encoders linear, mlp_ln_1 and mlp_bn_1 are one matrix; this one has "
            f"{sorted(str(k) for k in state if str(k).startswith('encoder.'))}"
        )
    out = take(state, {"W_enc": f"{first}.weight.T", "b_enc": f"{first}.bias"}, file)
    if f"{second}.running_mean" in state:
        keys = ("weight", "bias", "running_mean", "running_var")
        norm = take(state, {k: f"{second}.{k}" for k in keys}, file)
        gain_F = norm["weight"] / (norm["running_var"] + _NORM_EPS).sqrt()
        out["W_enc"] = out["W_enc"] * gain_F
        out["b_enc"] = (out["b_enc"] - norm["running_mean"]) * gain_F + norm["bias"]
    elif f"{second}.weight" in state:
        out |= take(state, {"ln_gain": f"{second}.weight", "ln_bias": f"{second}.bias"}, file)
    return out


def _decoder(state: dict[str, Any], file: Path, normalization: str, delta: float | None) -> Tensor:
    scale = take(state, {"s": "dictionary.multiplier"}, file)["s"].exp()
    if "dictionary.W" not in state:
        weights = take(state, {"w": "dictionary._weights"}, file)["w"]
        normalise = choose("normalization", normalization, _NORMALIZATIONS, file)
        return torch.as_tensor(normalise(weights) * scale)
    if delta is None:
        raise ValueError(f"{file} is archetypal: tell delta= (the length its Relax rows may have)")
    parts = take(state, {n: f"dictionary.{n}" for n in ("W", "C", "Relax")}, file)
    mix_FP = parts["W"].relu()
    mix_FP = mix_FP / (mix_FP.sum(dim=1, keepdim=True) + 1e-8)
    length_F1 = parts["Relax"].norm(dim=1, keepdim=True)
    relax_Fd = parts["Relax"] * (delta / length_F1).clamp(max=1.0)
    dictionary_Fd: Tensor = (mix_FP @ parts["C"] + relax_Fd) * scale
    return dictionary_Fd


def _rule(
    rule: str,
    k: int | None,
    running: float | None,
    state: dict[str, Any],
    out: dict[str, Tensor],
    file: Path,
) -> Sparsify:
    if rule == "relu":
        return ReLU()
    if rule == "jump":
        log_F = take(state, {"t": "thresholds"}, file)["t"]
        out["sparsify.threshold"] = log_F.exp()
        return JumpReLU(strict=False)
    if k is None:
        raise ValueError(f"{file} does not hold k: tell top_k=")
    if rule == "topk":
        return TopK(int(k))
    if running is None:
        raise ValueError(f"{file} does not hold its running threshold: tell running_threshold=")
    out["sparsify.threshold"] = torch.tensor(float(running))
    # the library counts k over a whole batch, so it may exceed the latents; inference ignores it
    return BatchTopK(min(int(k), out["W_enc"].shape[1]), strict=False)


def write(dictionary: Dictionary, folder: Path, about: Mapping[str, Any]) -> Path:
    """Write ``sae.pt``, for ``load_state_dict`` of the class that ``sae.json`` names.

    The decoder is written for ``normalization="identity"`` unless its rows have norm 1.

    Raises
    ------
    ValueError
        A decoder bias that is not 0 (the library has none), several sites, a skip path,
        normalisation, or a rule that the library lacks.
    """
    config = dictionary.config
    rule = config.sparsify
    require(config.reads == config.writes and len(config.reads) == 1, NAME, "more than one site")
    require(not config.skip, NAME, "a skip path")
    require(config.input.norm == "none", NAME, f"input norm {config.input.norm!r}")
    require(
        not config.latent_norm or config.input.center == "none",
        NAME,
        "a LayerNorm over the latents of a centred input",
    )
    tensors = fold_center(fold_scale(tensors_of(dictionary)), config)
    require(
        not bool(tensors["b_dec"].any()),
        NAME,
        "a decoder bias",
        "Write the format 'sae_lens' instead.",
    )
    state = {
        "encoder.final_block.0.weight": tensors["W_enc"].T.contiguous(),
        "encoder.final_block.0.bias": tensors["b_enc"],
        "dictionary._weights": tensors["W_dec"].contiguous(),
        "dictionary.multiplier": torch.tensor(0.0),
    }
    noted: dict[str, Any] = {"input_shape": config.d_read, "nb_concepts": config.latents}
    if config.latent_norm:
        state["encoder.final_block.1.weight"] = tensors["ln_gain"]
        state["encoder.final_block.1.bias"] = tensors["ln_bias"]
        noted["encoder_module"] = "mlp_ln_1"
    match rule:
        case ReLU(function="relu"):
            noted["class"] = "SAE"
        case TopK(relu=True, group_max=False):
            noted |= {"class": "TopKSAE", "top_k": rule.k}
        case BatchTopK():
            cut = float(thresholds(tensors, config, strict=False)[0])
            noted |= {"class": "BatchTopKSAE", "top_k": rule.k, "running_threshold": cut}
        case JumpReLU():
            cut_F = thresholds(tensors, config, strict=False)
            state["thresholds"] = cut_F.clamp(min=torch.finfo(torch.float32).tiny).log()
            noted["class"] = "JumpSAE"
        case _:
            raise ValueError(
                f"the format {NAME!r} cannot hold {rule}; it holds ReLU, TopK, BatchTopK, JumpReLU"
            )
    norm_F = tensors["W_dec"].norm(dim=1)
    unit = torch.allclose(norm_F, torch.ones_like(norm_F), rtol=0, atol=1e-6)
    noted["dictionary_params"] = {"normalization": "l2" if unit else "identity"}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / WEIGHTS)
    (folder / TOLD).write_text(json.dumps(noted, indent=1) + "\n")
    return folder


PEER = Peer(
    name=NAME,
    files=f"a torch.save of a state dict with dictionary.* tensors; {TOLD} may lie beside it",
    recognise=recognise,
    read=read,
    told={
        "kind": f"class of the library: {', '.join(_KINDS)}",
        "top_k": "k of TopKSAE and BatchTopKSAE",
        "normalization": f"of the dictionary layer, default l2: {', '.join(_NORMALIZATIONS)}",
        "delta": "length that rows of Relax may have (RA classes)",
        "running_threshold": "of BatchTopKSAE, an attribute that no state dict holds",
    },
    write=write,
)
