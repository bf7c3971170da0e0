"""timm: names, construction and preprocessing, shared by the timm families."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import nn

from vitmodels.family import Request
from vitmodels.names import nearest
from vitmodels.transforms import Transform, grey_transform, timm_transform
from vitmodels.weights import first_mismatch, read_weights


@cache
def architectures(module: str) -> frozenset[str]:
    """Return the architectures that a module of timm registers (``vision_transformer``)."""
    import timm

    return frozenset(timm.list_models(module=module))


@cache
def names(modules: Sequence[str]) -> tuple[str, ...]:
    """Return architectures and pretrained tags of some modules of timm."""
    import timm

    found: set[str] = set()
    for module in modules:
        found.update(architectures(module))
        found.update(timm.list_models(module=module, pretrained=True))
    return tuple(sorted(found))


def claims(name: str, modules: Sequence[str]) -> bool:
    """Whether the architecture of a name (with or without a tag) is in some modules of timm."""
    arch = name.partition(".")[0]
    return any(arch in architectures(module) for module in modules)


def build(request: Request, **options: Any) -> nn.Module:
    """Build a model by timm's own loader.

    Local weights go through it too, so that old key names, fused projections and other sizes
    of the position embedding are handled as for published ones.
    """
    import timm

    arch, _, tag = request.name.partition(".")
    if tag and request.name not in timm.list_models(f"{arch}.*", pretrained=True):
        tags = [n.partition(".")[2] for n in timm.list_models(f"{arch}.*", pretrained=True)]
        near = nearest(tag, tags) or tags[:5]
        raise ValueError(
            f"timm has no checkpoint {tag!r} of {arch}; tags: {', '.join(near) or 'none'}"
        )
    if request.img_size is not None:
        options["img_size"] = request.img_size
    if request.weights is not None:
        state = read_weights(request.weights)
        try:
            module: nn.Module = timm.create_model(
                request.name,
                pretrained=True,
                pretrained_cfg_overlay={"state_dict": state},
                **options,
            )
        except (RuntimeError, KeyError) as error:
            bare = timm.create_model(request.name, **options)
            reason = first_mismatch(state, bare) or str(error)
            raise ValueError(
                f"{request.weights} does not fit timm/{request.name}: {reason}"
            ) from error
        module.pretrained_cfg.pop("state_dict", None)  # type: ignore[union-attr, operator]
        return module
    try:
        module = timm.create_model(request.name, pretrained=request.pretrained, **options)
    except Exception as error:
        if not request.pretrained:
            raise
        raise FileNotFoundError(
            f"the weights of timm/{request.name} could not be fetched "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Give weights= a local file, "
            "pretrained=False for random ones, or set HF_HUB_CACHE to a folder that holds them"
        ) from error
    return module


def input_shape(module: Any) -> tuple[int, int, int]:
    """Return (channels, height, width) of a timm model with a patch embedding."""
    height, width = module.patch_embed.img_size
    return int(module.in_chans), int(height), int(width)


def transform(module: Any, shape: tuple[int, int, int]) -> Transform:
    """Return the preprocessing of the model's own configuration, at its input size."""
    import timm.data

    if shape[0] == 1:
        return grey_transform(shape[1:], mean=0.5, std=0.5)
    config = timm.data.resolve_data_config(
        args={"input_size": shape},
        pretrained_cfg=getattr(module, "pretrained_cfg", None) or {},
        model=module,
    )
    return timm_transform({**config, "input_size": shape})


def revision(module: Any) -> str:
    """Return the tag of the checkpoint and its place on the hub, as timm knows them."""
    config = getattr(module, "pretrained_cfg", None) or {}
    return ":".join(str(config[key]) for key in ("hf_hub_id", "tag") if config.get(key))
