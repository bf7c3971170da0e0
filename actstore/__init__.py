"""Activation stores: harvest once, read shuffled shards many times.

``store = actstore.open(url)`` mounts a store; importing this package loads no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actstore.arrays import write_arrays
    from actstore.harvester import harvest
    from actstore.manifest import FormatError, Manifest
    from actstore.store import Store
    from actstore.store import open_store as open

__all__ = ["FormatError", "Manifest", "Store", "harvest", "open", "write_arrays"]

_HOMES = {
    "FormatError": ("actstore.manifest", "FormatError"),
    "Manifest": ("actstore.manifest", "Manifest"),
    "Store": ("actstore.store", "Store"),
    "harvest": ("actstore.harvester", "harvest"),
    "open": ("actstore.store", "open_store"),
    "write_arrays": ("actstore.arrays", "write_arrays"),
}


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first used."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'actstore' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)
