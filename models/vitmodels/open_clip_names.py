"""open_clip: what a name stands for.

A name is ``<config>@<tag>``: one of open_clip's model configurations and one of its pretrained
tags (``ViT-B-32@laion2b_s34b_b79k``), or a configuration alone.

A tag that was trained with QuickGELU gets it, whether or not the configuration is spelt
``-quickgelu``: the tag's own entry in open_clip's table says so.
"""

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

from vitmodels.names import nearest


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


def config_names() -> tuple[str, ...]:
    """Return every configuration, also those added by ``open_clip.add_model_config``.

    None where open_clip is not installed.
    """
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
