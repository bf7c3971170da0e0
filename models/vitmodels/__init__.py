"""Named, readable and editable sites over unmodified vision transformers.

``import vitmodels`` loads neither torch nor a backend: the names below are imported when
they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vitmodels.model import VisionModel
    from vitmodels.registry import list_models, load, wrap
    from vitmodels.spec import ModelSpec, SiteInfo, TokenGrid, expand_sites

__all__ = [
    "ModelSpec",
    "SiteInfo",
    "TokenGrid",
    "VisionModel",
    "expand_sites",
    "list_models",
    "load",
    "wrap",
]

_HOME = {
    "ModelSpec": "spec",
    "SiteInfo": "spec",
    "TokenGrid": "spec",
    "VisionModel": "model",
    "expand_sites": "spec",
    "list_models": "registry",
    "load": "registry",
    "wrap": "registry",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'vitmodels' has no attribute {name!r}")
    value = getattr(import_module(f"vitmodels.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
