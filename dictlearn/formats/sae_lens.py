"""SAELens, 2 to 6: a folder with ``sae_weights.safetensors`` and ``cfg.json``.

``W_enc [d, m]``, ``b_enc [m]``, ``W_dec [m, d_out]``, ``b_dec [d_out]``; Gated has ``b_gate``,
``b_mag``, ``r_mag`` instead of ``b_enc``; JumpReLU ``threshold [m]`` (``log_threshold`` in older
training files), training files of BatchTopK a scalar ``topk_threshold``, transcoders ``W_skip
[d_out, d]`` on the raw input, some files of 5.x ``finetuning_scaling_factor [m]``, which multiplies
the activations in the decoder only.

Read as the library computes at inference: with ``rescale_acts_by_decoder_norm`` the selection sees
``pre * |W_dec row|`` and the decoder divides by it, so the norm is folded into the encoder here
(a no-op for files that have it folded already); ``expected_average_only_in`` scales nothing, its
factor is not in the file; a transcoder's normalisation is not undone at the output.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from actstore.manifest import FormatError
from dictlearn.config import (
    BatchTopK,
    Center,
    Gated,
    Input,
    JumpReLU,
    Matryoshka,
    ReLU,
    Sparsify,
    TopK,
)
from dictlearn.dictionary import Dictionary
from dictlearn.formats.fold import (
    fold_center,
    fold_scale,
    gate_biases,
    require,
    tensors_of,
    thresholds,
)
from dictlearn.formats.peer import (
    Checkpoint,
    Peer,
    checkpoint,
    choose,
    read_json,
    take,
    whole_number,
)
from dictlearn.formats.sites import from_hook, to_hook

NAME = "sae_lens"
WEIGHTS = "sae_weights.safetensors"
CONFIG = "cfg.json"

_NORMS = {
    "none": Input(),
    "expected_average_only_in": Input(),
    "constant_norm_rescale": Input(norm="constant_norm", eps=0.0),
    "layer_norm": Input(norm="layer_norm"),
}
_RULES = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_ACTIVATIONS = {"relu": "relu", "tanh-relu": "tanh-relu", "topk": "topk", "TopK": "topk"}


def _folder(path: Path) -> Path:
    return path.parent if path.name in (WEIGHTS, CONFIG) else path


def recognise(path: Path) -> bool:
    """Whether the weights file lies there."""
    return (_folder(path) / WEIGHTS).is_file()


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file; FormatError where it is damaged."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise FormatError(f"{file} is damaged: {error}") from error


def read(path: Path) -> Checkpoint:
    """Read a folder of SAELens, training or inference form."""
    folder = _folder(path)
    state = load_tensors(folder / WEIGHTS)
    config = read_json(folder / CONFIG)
    where = folder / CONFIG
    metadata = config.get("metadata") or {}
    architecture = config.get("architecture", "standard")
    rule = choose("architecture", architecture, _RULES, where)
    if rule == "relu" and "metadata" not in config:  # before 6.0 the activation said more
        activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
        rule = choose("activation_fn_str", activation, _ACTIVATIONS, where)
    norm = config.get("normalize_activations", "none")
    if isinstance(norm, bool):
        norm = "expected_average_only_in" if norm else "none"
    transcoder = architecture.endswith("transcoder")
    center: Center = (
        "b_dec" if config.get("apply_b_dec_to_input", True) and not transcoder else "none"
    )
    base = choose("normalize_activations", norm, _NORMS, where)
    tensors = take(state, {"W_enc": "W_enc", "W_dec": "W_dec", "b_dec": "b_dec"}, folder / WEIGHTS)
    sparsify = _rule(rule, config, state, tensors, folder)
    for theirs, ours in (("W_skip", "W_skip"), ("finetuning_scaling_factor", "scale")):
        if theirs in state:
            tensors[ours] = state[theirs]
    if config.get("rescale_acts_by_decoder_norm"):
        norm_F = tensors["W_dec"].norm(dim=1)
        tensors["W_enc"] = tensors["W_enc"] * norm_F
        tensors["b_enc"] = tensors["b_enc"] * norm_F
        tensors["W_dec"] = tensors["W_dec"] / norm_F[:, None]
    hook = metadata.get("hook_name") or config.get("hook_name") or config.get("hook_point")
    hook_out = metadata.get("hook_name_out") or config.get("hook_name_out")
    return checkpoint(
        tensors,
        sparsify=sparsify,
        input=Input(center=center, norm=base.norm, denormalize=not transcoder, eps=base.eps),
        read=from_hook(hook, "tl"),
        write=from_hook(hook_out, "tl"),
        transcoder=transcoder,
        matryoshka=_matryoshka(config, metadata),
        about={
            "format": NAME,
            "model": metadata.get("model_name") or config.get("model_name"),
            "hook": hook,
            "config": config,
        },
    )


def _rule(
    rule: str, config: dict[str, Any], state: dict[str, Tensor], out: dict[str, Tensor], where: Path
) -> Sparsify:
    """Return the sparsity rule; puts its tensors and ``b_enc`` into `out`."""
    if rule == "gated":
        names = {f"sparsify.{n}": n for n in ("b_gate", "b_mag", "r_mag")}
        out |= take(state, names, where / WEIGHTS)
        return Gated()
    out |= take(state, {"b_enc": "b_enc"}, where / WEIGHTS)
    if rule == "jumprelu":
        if "threshold" in state:
            out["sparsify.threshold"] = state["threshold"]
        else:
            log = take(state, {"log_threshold": "log_threshold"}, where / WEIGHTS)
            out["sparsify.threshold"] = log["log_threshold"].exp()
        return JumpReLU()
    if rule == "batchtopk":
        out |= take(state, {"sparsify.threshold": "topk_threshold"}, where / WEIGHTS)
        return BatchTopK(max(1, int(config.get("k", 1))))
    if rule == "topk":
        settings = config if "k" in config else config.get("activation_fn_kwargs") or {}
        return TopK(whole_number(settings, "k", where / CONFIG))
    return ReLU(function="tanh_relu" if rule == "tanh-relu" else "relu")


def _matryoshka(config: dict[str, Any], metadata: dict[str, Any]) -> Matryoshka | None:
    details = metadata.get("training_architecture_details") or config
    widths = details.get("matryoshka_widths") or []
    prefixes = tuple(int(w) for w in widths[:-1])  # the last one is the full width
    return Matryoshka(prefixes=prefixes) if prefixes else None


def write(dictionary: Dictionary, folder: Path, about: Mapping[str, Any]) -> Path:
    """Write the inference form of SAELens 6 (`SAE.load_from_disk` reads it).

    BatchTopK becomes JumpReLU, as the library itself exports it. A skip path, different sites or a
    centre of its own make it a transcoder.

    Raises
    ------
    ValueError
        More than one site, group-max, tanh, LayerNorm over latents, or a gated or top-k transcoder.
    """
    config = dictionary.config
    rule = config.sparsify
    require(len(config.reads) == 1 == len(config.writes), NAME, "several sites")
    require(not config.latent_norm, NAME, "a LayerNorm over the latents")
    tensors = fold_scale(tensors_of(dictionary))
    transcoder = config.skip or config.reads != config.writes or config.input.center == "b_in"
    normed = config.input.norm != "none"
    if transcoder:
        require(
            not (normed and config.input.denormalize),
            NAME,
            "a transcoder whose output is denormalised",
        )
        tensors = fold_center(tensors, config)
    else:
        require(not normed or config.input.denormalize, NAME, "an SAE that is not denormalised")
    eps = {"layer_norm": 1e-5, "constant_norm": 0.0}.get(config.input.norm, config.input.eps)
    require(config.input.eps == eps, NAME, f"Input.eps={config.input.eps} (it has {eps})")
    architecture, settings = _architecture(dictionary, tensors, transcoder=transcoder)
    (read,), (write_,) = config.reads, config.writes
    cfg = {
        "architecture": architecture,
        "d_in": config.d_read,
        "d_sae": config.latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not transcoder and config.input.center == "b_dec",
        "normalize_activations": {
            "none": "none",
            "layer_norm": "layer_norm",
            "constant_norm": "constant_norm_rescale",
        }[config.input.norm],
        "reshape_activations": "none",
        "metadata": {
            "model_name": about.get("model"),
            "hook_name": to_hook(read, "tl"),
            **({"hook_name_out": to_hook(write_, "tl")} if transcoder else {}),
            **({"training_architecture": "batchtopk"} if isinstance(rule, BatchTopK) else {}),
        },
        **settings,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(cfg, indent=1) + "\n")
    return folder


def _architecture(
    dictionary: Dictionary, tensors: dict[str, Tensor], *, transcoder: bool
) -> tuple[str, dict[str, Any]]:
    """Rename the tensors in place; return the architecture's name and its settings."""
    config = dictionary.config
    rule = config.sparsify
    settings: dict[str, Any] = {"d_out": config.d_write} if transcoder else {}
    middle = "skip_transcoder" if config.skip else "transcoder"
    match rule:
        case ReLU(function="relu"):
            return (middle if transcoder else "standard"), settings
        case TopK(relu=True, group_max=False) if not transcoder:
            return "topk", {**settings, "k": rule.k, "rescale_acts_by_decoder_norm": False}
        case BatchTopK() | JumpReLU():
            tensors["threshold"] = thresholds(tensors, config, strict=True)
            del tensors["sparsify.threshold"]
            return (f"jumprelu_{middle}" if transcoder else "jumprelu"), settings
        case Gated(k=None) if not transcoder:
            folded = gate_biases(tensors)
            tensors.clear()
            tensors |= {name.removeprefix("sparsify."): value for name, value in folded.items()}
            return "gated", settings
    kind = "a transcoder" if transcoder else "an SAE"
    raise ValueError(
        f"the format {NAME!r} cannot hold {kind} with {rule}; it holds ReLU, JumpReLU and "
        "BatchTopK everywhere, TopK (relu=True) and Gated (k=None) in SAEs"
    )


PEER = Peer(
    name=NAME,
    files=f"a folder with {WEIGHTS} and {CONFIG}",
    recognise=recognise,
    read=read,
    write=write,
)
