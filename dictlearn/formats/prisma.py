"""ViT-Prisma: ``weights.pt`` or ``n_images_*.pt`` beside ``config.json``, or one pickle.

Five layouts are published: A, ``n_images_N.pt`` with ``{"cfg", "state_dict"}``; B, ``weights.pt``,
a plain state dict; C and D (transcoders), ``weights.pt`` laid out like A; E, ``.pkl`` or
``.pkl.gz`` of SAELens 2 with ``{"config", "autoencoder": {"state_dict"}}``. The embedded
configuration is an object of the library, read without running its code
(`dictlearn.formats.restricted`).

``W_enc [d, m] b_enc W_dec [m, d_out] b_dec [d]``; a transcoder's ``b_dec`` is subtracted from its
input, ``b_dec_out`` and ``x_raw @ W_skip.T`` are added to its output; gated files add ``b_gate
r_mag b_mag``, and their ``b_enc`` is not used. ``layer_norm`` divides by the unbiased deviation +
1e-5 and is undone at the output without the 1e-5.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actstore.manifest import FormatError
from dictlearn.config import Gated, Input, ReLU, Sparsify, TopK
from dictlearn.dictionary import Dictionary
from dictlearn.formats.fold import (
    center_on_b_dec,
    fold_scale,
    gate_biases,
    require,
    tensors_of,
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
from dictlearn.formats.restricted import fields_of, load_pickle, load_pt, peek
from dictlearn.formats.sites import from_hook, to_hook

logger = logging.getLogger(__name__)

NAME = "prisma"
WEIGHTS = "weights.pt"
CONFIG = "config.json"

_NORMS = {
    "none": Input(),
    "expected_average_only_in": Input(),
    "layer_norm": Input(norm="layer_norm"),
    "constant_norm_rescale": Input(norm="constant_norm", eps=0.0),
}
_ACTIVATIONS = {"relu": "relu", "tanh-relu": "tanh-relu", "topk": "topk"}
_RUN = re.compile(r"n_images_(\d+)\.pt")


def find(path: Path) -> Path | None:
    """Return the weights file at a path: of several ``n_images_*`` the one of most images."""
    if path.is_file():
        return path
    if not path.is_dir():
        return None
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    runs = [(int(m[1]), file) for file in path.iterdir() if (m := _RUN.fullmatch(file.name))]
    if runs:
        return max(runs)[1]
    pickles = sorted(f for f in path.iterdir() if f.name.endswith((".pkl", ".pkl.gz")))
    return pickles[0] if len(pickles) == 1 else None


def recognise(path: Path) -> bool:
    """Whether weights under one of the published names lie there."""
    file = find(path)
    if file is None:
        return False
    if file.name.endswith((".pkl", ".pkl.gz")):
        return True
    if file.suffix != ".pt" or file.name == "ae.pt":
        return False
    with file.open("rb") as stream:
        if stream.read(1) == b"{":  # a header of JSON: saev
            return False
    named = file.name == WEIGHTS or _RUN.fullmatch(file.name) is not None
    return b"W_enc" in peek(file) or (named and file.with_name(CONFIG).is_file())


def read(path: Path, normalize: str | None = None) -> Checkpoint:
    """Read a folder or a file of any of the five layouts."""
    file = find(path)
    if file is None:
        raise FileNotFoundError(f"{path} has no {WEIGHTS}, n_images_*.pt, .pkl or .pkl.gz")
    old = file.name.endswith((".pkl", ".pkl.gz"))
    content = load_pickle(file) if old else load_pt(file)
    state, embedded, legacy = _unwrap(content, file)
    beside = file.with_name(CONFIG)
    config = {**(read_json(beside) if beside.is_file() else {}), **embedded}
    if not config:
        raise FileNotFoundError(f"{file} holds no configuration and {CONFIG} is not beside it")
    where = beside if not embedded else file
    norm = (
        normalize or config.get("normalize_activations", "" if legacy else "layer_norm") or "none"
    )
    if legacy and not normalize and "normalize_activations" not in config:
        raise ValueError(
            f"{file} does not record its normalisation: tell normalize='none' (SAELens 2 had none) "
            "or normalize='layer_norm' (what Prisma's own loader assumes)"
        )
    base = choose("normalize_activations", norm, _NORMS, where)
    transcoder = "b_dec_out" in state
    names = {"W_enc": "W_enc", "W_dec": "W_dec", "b_dec": "b_dec_out" if transcoder else "b_dec"}
    if transcoder:
        names["b_in"] = "b_dec"
    if "W_skip" in state:
        names["W_skip"] = "W_skip"
    sparsify = _rule(config, state, where)
    if isinstance(sparsify, Gated):
        names |= {f"sparsify.{n}": n for n in ("b_gate", "b_mag", "r_mag")}
    else:
        names["b_enc"] = "b_enc"
    hook, hook_out = hooks(config)
    return checkpoint(
        take(state, names, file),
        sparsify=sparsify,
        input=Input(center="b_in" if transcoder else "b_dec", norm=base.norm, eps=base.eps),
        read=from_hook(hook, "prisma"),
        write=from_hook(hook_out, "prisma"),
        transcoder=transcoder,
        about={
            "format": NAME,
            "model": config.get("model_name"),
            "hook": hook,
            "tokens": tokens(config),
            "config": json.loads(json.dumps(config, default=str)),
        },
    )


def _unwrap(content: Any, file: Path) -> tuple[dict[str, Tensor], dict[str, Any], bool]:
    """Return the state dict, the embedded configuration, and whether it is of SAELens 2."""
    if isinstance(content, dict) and "autoencoder" in content:
        inner = fields_of(content["autoencoder"]).get("state_dict")
        state, config, legacy = inner, fields_of(content.get("config")), True
    elif isinstance(content, dict) and "state_dict" in content:
        config = fields_of(content.get("cfg", content.get("config")))
        state, legacy = content["state_dict"], False
    else:
        state, config, legacy = content, {}, False
    if not isinstance(state, dict) or "W_enc" not in state:
        found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise FormatError(f"{file} holds no state dict with W_enc; found {found}")
    return state, config, legacy


def hooks(config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the hook names read and, for a transcoder, written."""
    hook = config.get("hook_point")
    if config.get("layer_subtype") and isinstance(config.get("hook_point_layer"), int):
        hook = f"blocks.{config['hook_point_layer']}.{config['layer_subtype']}"
    if not config.get("is_transcoder"):
        return hook, None
    return hook, f"blocks.{config.get('out_hook_point_layer')}.{config.get('layer_out_subtype')}"


def tokens(config: Mapping[str, Any]) -> str:
    """Return the token kinds it was trained on, as a store's reader names them."""
    if config.get("cls_token_only"):
        return "cls"
    return "patch" if config.get("use_patches_only") else "cls,patch"


def _rule(config: dict[str, Any], state: dict[str, Tensor], where: Path) -> Sparsify:
    name = config.get("activation_fn_str") or "relu"
    activation = choose("activation_fn_str", name, _ACTIVATIONS, where)
    k = None
    if activation == "topk":
        k = whole_number(config.get("activation_fn_kwargs") or {}, "k", where)
    if config.get("architecture") == "gated" or "r_mag" in state:
        if activation == "tanh-relu":
            raise FormatError(f"{where}: a gated dictionary with tanh-relu is not supported")
        return Gated(k=k)
    if k is not None:
        return TopK(k)
    return ReLU(function="tanh_relu" if activation == "tanh-relu" else "relu")


def write(dictionary: Dictionary, folder: Path, about: Mapping[str, Any]) -> Path:
    """Write layout B (a transcoder too): ``weights.pt``, a plain state dict, and ``config.json``.

    Raises
    ------
    ValueError
        Several sites, a number of latents that is no multiple of the width, JumpReLU, BatchTopK,
        group-max, or a normalisation that is not undone.
    """
    config = dictionary.config
    require(len(config.reads) == 1 == len(config.writes), NAME, "several sites")
    require(not config.latent_norm, NAME, "a LayerNorm over the latents")
    require(
        config.latents % config.d_read == 0,
        NAME,
        f"{config.latents} latents over {config.d_read} channels",
        "It wants a multiple.",
    )
    norm = config.input.norm
    require(norm == "none" or config.input.denormalize, NAME, "a norm that is not undone")
    eps = {"layer_norm": 1e-5, "constant_norm": 0.0}.get(norm, config.input.eps)
    require(config.input.eps == eps, NAME, f"Input.eps={config.input.eps} (it has {eps})")
    transcoder = config.skip or config.reads != config.writes
    tensors = fold_scale(tensors_of(dictionary))
    if transcoder:
        tensors["b_dec_out"] = tensors["b_dec"]
        center = {"b_dec": tensors["b_dec"], "b_in": tensors.pop("b_in", None)}
        b_in = center.get(config.input.center)
        tensors["b_dec"] = torch.zeros(config.d_read) if b_in is None else b_in
    else:
        tensors = center_on_b_dec(tensors, config)
    activation, kwargs = _activation(config.sparsify, transcoder=transcoder)
    if isinstance(config.sparsify, Gated):
        tensors = gate_biases(tensors)
        tensors["b_enc"] = torch.zeros(config.latents)
    (read_site,), (write_site,) = config.reads, config.writes
    layer, subtype = _hook_parts(read_site)
    layer_out, subtype_out = _hook_parts(write_site)
    cfg = {
        "model_name": about.get("model"),
        "hook_point_layer": layer,
        "layer_subtype": subtype,
        "hook_point_head_index": None,
        "cls_token_only": about.get("tokens") == "cls",
        "use_patches_only": about.get("tokens") == "patch",
        "architecture": "gated" if isinstance(config.sparsify, Gated) else "standard",
        "d_in": config.d_read,
        "expansion_factor": config.latents // config.d_read,
        "activation_fn_str": activation,
        "activation_fn_kwargs": kwargs,
        "normalize_activations": {"constant_norm": "constant_norm_rescale"}.get(norm, norm),
        "is_transcoder": transcoder,
        "transcoder_with_skip_connection": config.skip,
        "out_hook_point_layer": layer_out,
        "layer_out_subtype": subtype_out,
        "d_out": config.d_write,
        "initialization_method": "independent",
        "b_dec_init_method": "mean",
        "use_ghost_grads": False,  # its default is refused by its own gated class
        "log_to_wandb": False,
        "_device": "cpu",
        "_dtype": "float32",
    }
    folder.mkdir(parents=True, exist_ok=True)
    state = {k.removeprefix("sparsify."): v.contiguous() for k, v in tensors.items()}
    torch.save(state, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(cfg, indent=1) + "\n")
    return folder


def _activation(rule: Sparsify, *, transcoder: bool) -> tuple[str, dict[str, int]]:
    match rule:
        case ReLU(function="relu"):
            return "relu", {}
        case ReLU(function="tanh_relu"):
            return "tanh-relu", {}
        case TopK(relu=True, group_max=False):
            return "topk", {"k": rule.k}
        case Gated() if not transcoder:
            return ("relu", {}) if rule.k is None else ("topk", {"k": rule.k})
    raise ValueError(
        f"the format {NAME!r} cannot hold {rule}; it holds ReLU, TopK and, in SAEs, Gated"
    )


def _hook_parts(site: str) -> tuple[int, str]:
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", to_hook(site, "prisma"))
    if not match:
        raise ValueError(f"the format {NAME!r} names sites 'blocks.N.part', not {site!r}")
    return int(match[1]), match[2]


PEER = Peer(
    name=NAME,
    files=f"a folder with {WEIGHTS} or n_images_*.pt and {CONFIG}, or one .pkl or .pkl.gz",
    recognise=recognise,
    read=read,
    told={"normalize": f"input normalisation where the file records none: {', '.join(_NORMS)}"},
    write=write,
)
