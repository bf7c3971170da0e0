"""Zarr metadata of a store below its root, and the small arrays that only repeat the manifest."""

import json
from typing import Any

from actstore import layout
from actstore.manifest import Manifest, scale_path
from actstore.storage import Storage
from actstore.subsample import position_path, sampled


def write_metadata(storage: Storage, manifest: Manifest) -> None:
    """Create `zarr.json` of every group and array; what is there stays."""
    documents: dict[str, dict[str, Any]] = {"acts": layout.group_metadata()}
    for array in manifest.arrays:
        documents[f"acts/{array.site}"] = layout.group_metadata()
        documents[array.path] = layout.array_metadata(manifest, array)
        if manifest.scales:
            documents[scale_path(array)] = layout.plain_metadata(
                [array.channels], "float32", ["channel"]
            )
    for kind, array in sampled(manifest).items():
        documents["position"] = layout.group_metadata()
        documents[position_path(kind)] = layout.plain_metadata(
            [manifest.items, array.tokens],
            "int32",
            ["item", f"{kind}_token"],
            [manifest.items_per_part, array.tokens],
        )
    for path, document in documents.items():
        data = json.dumps(document, indent=1, sort_keys=True).encode()
        storage.create(f"{path}/zarr.json", data)


def write_scales(storage: Storage, manifest: Manifest) -> None:
    """Show the scales of a manifest as arrays.

    Written after the manifest, so that there is one set of scales even where two harvests meet.
    """
    for array in manifest.arrays:
        scale = manifest.scale(array)
        if scale is not None and storage.size(f"{scale_path(array)}/c.0") is None:
            storage.replace(f"{scale_path(array)}/c.0", [scale.tobytes()])
