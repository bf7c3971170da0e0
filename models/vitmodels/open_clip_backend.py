"""open_clip: names, construction, weights and preprocessing, shared by its families.

A name is ``<config>@<tag>``: one of open_clip's model configurations and one of its pretrained
tags (``ViT-B-32@laion2b_s34b_b79k``), or a configuration alone. Each tower is built alone, by
open_clip's own classes, inside a CLIP whose other tower is as small as it can be; a checkpoint
gives each tower its part.

A tag that was trained with QuickGELU gets it, whether or not the configuration is spelt
``-quickgelu``: the tag's own entry in open_clip's table says so.
"""

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vitmodels.family import Request
from vitmodels.names import nearest
from vitmodels.transforms import Transform
from vitmodels.weights import first_mismatch, read_weights

_SMALL_VISION = {"layers": 1, "width": 8, "head_width": 8, "patch_size": 8, "image_size": 8}
_SMALL_TEXT = {"context_length": 2, "vocab_size": 2, "width": 8, "heads": 1, "layers": 1}


def _tiny_clip(tower: dict[str, Any], text: dict[str, Any], embed: int) -> dict[str, Any]:
    return {"embed_dim": embed, "vision_cfg": tower, "text_cfg": text}


# TinyCLIP towers are on the hub (timm/<name>) in open_clip's layout with their configuration
# beside the weights, but not in open_clip's own list. Sizes: the model configurations that
# TinyCLIP was trained with (arXiv:2309.12314), image towers as timm's architectures of the same
# names; GELU, no QuickGELU.
_TEXT = {"context_length": 77, "vocab_size": 49408}
_EXTRA_CONFIGS: dict[str, dict[str, Any]] = {
    "TinyCLIP-ViT-8M-16": _tiny_clip(
        {"image_size": 224, "layers": 10, "width": 256, "patch_size": 16},
        {**_TEXT, "width": 256, "heads": 4, "layers": 3},
        512,
    ),
    "TinyCLIP-ViT-39M-16": _tiny_clip(
        {"image_size": 224, "layers": 12, "width": 512, "patch_size": 16},
        {**_TEXT, "width": 512, "heads": 8, "layers": 6},
        512,
    ),
    "TinyCLIP-ViT-40M-32": _tiny_clip(
        {"image_size": 224, "layers": 12, "width": 512, "patch_size": 32},
        {**_TEXT, "width": 512, "heads": 8, "layers": 6},
        512,
    ),
    "TinyCLIP-ViT-61M-32": _tiny_clip(
        {"image_size": 224, "layers": 12, "width": 640, "patch_size": 32},
        {**_TEXT, "width": 512, "heads": 8, "layers": 9},
        512,
    ),
}
_EXTRA_TAGS: dict[str, dict[str, str]] = {
    "TinyCLIP-ViT-8M-16": {"yfcc15m": "timm/vit_xsmall_patch16_clip_224.tinyclip_yfcc15m/"},
    "TinyCLIP-ViT-39M-16": {"yfcc15m": "timm/vit_medium_patch16_clip_224.tinyclip_yfcc15m/"},
    "TinyCLIP-ViT-40M-32": {"laion400m": "timm/vit_medium_patch32_clip_224.tinyclip_laion400m/"},
    "TinyCLIP-ViT-61M-32": {"laion400m": "timm/vit_betwixt_patch32_clip_224.tinyclip_laion400m/"},
}
# open_clip 3.3 points this tag to the repository of laion400m_e31.
_HUB = {
    ("ViT-B-16-plus-240", "laion400m_e32"): "timm/vit_base_patch16_plus_clip_240.laion400m_e32/",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a name stands for."""

    config: str
    """Configuration, ``ViT-B-32-quickgelu``."""
    tag: str
    """Pretrained tag, empty for the bare configuration."""
    model_cfg: Mapping[str, Any]
    """open_clip's configuration, ``quick_gelu`` as the weights want it."""
    pretrained_cfg: Mapping[str, Any]
    """open_clip's entry of the tag: hub repository, mean, std, interpolation, resize mode."""


@cache
def config_names() -> tuple[str, ...]:
    """Return every configuration; none where open_clip is not installed."""
    try:
        import open_clip
    except ImportError:
        return ()
    return (*open_clip.list_models(), *_EXTRA_CONFIGS)


def vision_cfg(config: str) -> Mapping[str, Any]:
    """Return the image tower's part of a configuration."""
    found: Mapping[str, Any] = _model_cfg(config)["vision_cfg"]
    return found


def text_cfg(config: str) -> Mapping[str, Any]:
    """Return the text tower's part of a configuration."""
    found: Mapping[str, Any] = _model_cfg(config)["text_cfg"]
    return found


def tags(config: str) -> tuple[str, ...]:
    """Return the pretrained tags of a configuration."""
    import open_clip

    return (*open_clip.list_pretrained_tags_by_model(config), *_EXTRA_TAGS.get(config, {}))


@cache
def names(configs: tuple[str, ...]) -> tuple[str, ...]:
    """Return configurations, and each with its tags."""
    return tuple(
        name
        for config in configs
        for name in (config, *(f"{config}@{tag}" for tag in tags(config)))
    )


@cache
def _by_hub() -> Mapping[str, str]:
    """Return hub repository -> name; of two spellings, the one with ``-quickgelu``."""
    found: dict[str, str] = {}
    for config in config_names():
        for tag in tags(config):
            name = f"{config}@{tag}"
            hub = str(checkpoint(name).pretrained_cfg.get("hf_hub", "")).rstrip("/")
            if hub and (hub not in found or config.endswith("-quickgelu")):
                found[hub] = name
    return found


def from_hub(id: str) -> str | None:
    """Return the name of a hub repository of open_clip, None if it has none.

    ``laion/CLIP-ViT-B-32-laion2B-s34B-b79K``, also behind ``hf-hub:`` (open_clip's spelling)
    or ``open-clip:`` (Prisma's).
    """
    prefix, _, repository = id.rpartition(":")
    if prefix not in ("", "hf-hub", "open-clip") or "/" not in repository:
        return None
    return _by_hub().get(repository.rstrip("/"))


def split(name: str) -> tuple[str, str]:
    """Return (configuration, tag); open_clip's ``ViT-B-32:tag`` is understood too."""
    config, _, tag = name.replace(":", "@", 1).partition("@")
    return config, tag.lower().replace("-", "_")


def checkpoint(name: str) -> Checkpoint:
    """Return what a name stands for.

    Raises
    ------
    ValueError
        Unknown configuration or tag; the message holds the nearest.
    """
    import open_clip

    config, tag = split(name)
    if config not in config_names():
        near = nearest(config, config_names())
        raise ValueError(
            f"open_clip has no configuration {config!r}; nearest: {', '.join(near) or 'none'}. "
            "List them with vitmodels.list_models('open_clip/*')"
        )
    model_cfg = {**_model_cfg(config)}
    if not tag:
        return Checkpoint(config=config, tag="", model_cfg=model_cfg, pretrained_cfg={})
    if tag not in tags(config):
        near = nearest(tag, tags(config)) or list(tags(config)[:5])
        raise ValueError(
            f"open_clip has no checkpoint {tag!r} of {config}; tags: {', '.join(near) or 'none'}"
        )
    told = dict(open_clip.get_pretrained_cfg(config, tag))
    if not told:
        told = {"hf_hub": _EXTRA_TAGS[config][tag]}
    if (config, tag) in _HUB:
        told = {**told, "hf_hub": _HUB[config, tag], "url": ""}
    # The tag knows; a configuration knows only of itself. worldwide-378 and the like say
    # neither, and take the configuration's.
    model_cfg["quick_gelu"] = bool(told.get("quick_gelu", model_cfg.get("quick_gelu", False)))
    return Checkpoint(config=config, tag=tag, model_cfg=model_cfg, pretrained_cfg=told)


def _model_cfg(config: str) -> Mapping[str, Any]:
    import open_clip

    if config in _EXTRA_CONFIGS:
        return _EXTRA_CONFIGS[config]
    found: Mapping[str, Any] = open_clip.get_model_config(config)
    return found


def refusal(name: str, why: Mapping[str, str]) -> str | None:
    """Say why a name cannot be served.

    Parameters
    ----------
    name
        ``<config>@<tag>``.
    why
        Configuration -> reason, of those that have no taps.
    """
    if not config_names():
        return "open_clip is not installed; run: pip install 'actstore[openclip]'"
    config, _ = split(name)
    if config in why:
        return why[config]
    near = nearest(config, config_names())
    hint = f"; nearest: {', '.join(near)}" if near else ""
    return f"open_clip {_version()} has no configuration {config!r}{hint}"


def _version() -> str:
    from importlib.metadata import version

    return version("open_clip_torch")


def build_visual(request: Request) -> nn.Module:
    """Build the image tower of a name, with its part of the checkpoint.

    Raises
    ------
    ValueError
        Weights that do not fit (with the first key), unknown name.
    FileNotFoundError
        The published weights cannot be fetched.
    """
    import open_clip
    from open_clip.model import resize_pos_embed

    known = checkpoint(request.name)
    told = {**known.model_cfg["vision_cfg"], "timm_model_pretrained": False}
    if request.img_size is not None:
        told["image_size"] = request.img_size
    clip = open_clip.CustomTextCLIP(
        embed_dim=known.model_cfg["embed_dim"],
        vision_cfg=told,
        text_cfg=_SMALL_TEXT,
        quick_gelu=known.model_cfg.get("quick_gelu", False),
    )
    visual: Any = clip.visual
    if request.img_size is not None and hasattr(visual, "trunk"):
        visual.set_input_size(request.img_size)
    path = _weights_path(request, known)
    if path is not None:
        state = _own_part(_read(path, clip), "visual.")
        old = {f"visual.{key}": value for key, value in state.items()}
        resize_pos_embed(old, clip)
        _fit(
            {key.removeprefix("visual."): value for key, value in old.items()}, visual, path, known
        )
    _remember(visual, known)
    tower: nn.Module = visual
    return tower


def build_text(request: Request) -> nn.Module:
    """Build a CLIP with the text tower of a name, and an image tower that nobody uses.

    Raises
    ------
    ValueError
        Weights that do not fit (with the first key), unknown name, or a text tower that is a
        model of transformers.
    FileNotFoundError
        The published weights cannot be fetched.
    """
    import open_clip
    from open_clip.model import convert_to_custom_text_state_dict

    known = checkpoint(request.name)
    config = dict(known.model_cfg)
    told = {**config.pop("text_cfg"), "output_tokens": False}
    if told.get("hf_model_name"):
        raise ValueError(
            f"the text tower of {request.name} is {told['hf_model_name']} of transformers; only "
            "open_clip's own text towers have sites here"
        )
    for key in ("custom_text", "multimodal_cfg", "vision_cfg"):
        config.pop(key, None)
    # CustomTextCLIP keeps the tower as one module; CLIP holds the same parts by themselves.
    clip: Any = open_clip.CustomTextCLIP(**config, vision_cfg=_SMALL_VISION, text_cfg=told)
    path = _weights_path(request, known)
    if path is not None:
        state = convert_to_custom_text_state_dict(_read(path, clip))
        own = _own_part(state, "text.")
        for key in ("logit_scale", "logit_bias"):
            if key in state and getattr(clip, key) is not None:
                getattr(clip, key).data.copy_(state[key].reshape(getattr(clip, key).shape))
        _fit(own, clip.text, path, known)
    _remember(clip.text, known)
    whole: nn.Module = clip
    return whole


def _weights_path(request: Request, known: Checkpoint) -> Path | None:
    """Return the file to load, fetching the published one if asked to."""
    import open_clip

    if request.weights is not None:
        return request.weights
    if not request.pretrained:
        return None
    if not known.tag:
        raise ValueError(
            f"open_clip/{known.config} names no checkpoint; tags: "
            f"{', '.join(tags(known.config)) or 'none'}. Say open_clip/{known.config}@<tag>, "
            "weights= a local file, or pretrained=False for random weights"
        )
    try:
        return Path(open_clip.download_pretrained(dict(known.pretrained_cfg)))
    except Exception as error:
        where = known.pretrained_cfg.get("hf_hub") or known.pretrained_cfg.get("url")
        cause = (str(error).splitlines() or [""])[0]
        raise FileNotFoundError(
            f"the weights of open_clip/{known.config}@{known.tag} could not be fetched from "
            f"{where} ({type(error).__name__}: {cause}). Give weights= a local file, "
            "pretrained=False for random ones, or set HF_HUB_CACHE to a folder that holds them"
        ) from error


def _read(path: Path, clip: Any) -> dict[str, Tensor]:
    """Read a checkpoint of open_clip, or of those whose layout it converts."""
    from open_clip.convert import convert_state_dict

    state: dict[str, Tensor] = convert_state_dict(clip, read_weights(path))
    return state


def _own_part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return a tower's part of a checkpoint, or all of a file that holds the tower alone."""
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return own or dict(state)


def _fit(state: dict[str, Tensor], tower: nn.Module, path: Path, known: Checkpoint) -> None:
    if mismatch := first_mismatch(state, tower):
        name = f"{known.config}@{known.tag}" if known.tag else known.config
        raise ValueError(f"{path} does not fit open_clip/{name}: {mismatch}")
    tower.load_state_dict(state)


def _remember(tower: Any, known: Checkpoint) -> None:
    """Leave name and preprocessing on the tower, as open_clip's own factory does."""
    import open_clip
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    told = merge_preprocess_dict(PreprocessCfg(), dict(known.pretrained_cfg))
    if hasattr(tower, "image_size"):
        told["size"] = tower.image_size
    open_clip.set_model_preprocess_cfg(tower, told)
    tower.open_clip_name = known.config
    tower.open_clip_revision = (
        f"{known.pretrained_cfg.get('hf_hub', '').rstrip('/')}:{known.tag}" if known.tag else ""
    )


def transform(tower: Any, size: tuple[int, int]) -> Transform:
    """Return open_clip's evaluation preprocessing of a tower, at a size (height, width)."""
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    told = open_clip.get_model_preprocess_cfg(tower) if hasattr(tower, "preprocess_cfg") else {}
    config = PreprocessCfg(**{**merge_preprocess_dict(PreprocessCfg(), told), "size": size})
    description = {"kind": "open_clip", **dataclasses.asdict(config)}
    description["size"] = list(size)
    return Transform(image_transform_v2(config, is_train=False), description)


def revision(tower: Any) -> str:
    """Return ``<hub repository>:<tag>`` of a tower built here."""
    return str(getattr(tower, "open_clip_revision", ""))
