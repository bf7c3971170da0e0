"""A folder of images; the names of its subfolders are the labels."""

import os
from typing import Any

import fsspec
from PIL import Image

from actstore.sources.base import decode_image, digest
from actstore.sources.fetch import fetch
from actstore.sources.places import absolute, file_sizes, reached

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"}
)
"""File names taken for images, in lower case."""


class Folder:
    """All images below a local folder or an fsspec URL, sorted by path.

    An image directly in the folder has no label; one in a subfolder has the number of its
    first folder among all first folders, sorted.
    """

    def __init__(self, url: str, storage_options: dict[str, Any] | None = None) -> None:
        self._url = absolute(url)
        with reached(self._url):
            self._fs, root = fsspec.core.url_to_fs(self._url, **(storage_options or {}))
            root = root.rstrip("/")
            found = file_sizes(self._fs, root)
        sizes = {
            path[len(root) + 1 :]: size
            for path, size in found.items()
            if os.path.splitext(path)[1].lower() in EXTENSIONS
        }
        if not sizes:
            others = sorted({os.path.splitext(path)[1] or path for path in found})[:5]
            raise ValueError(
                f"{url} holds no images: looked for {', '.join(sorted(EXTENSIONS))} in it and its "
                f"subfolders, found {', '.join(others) or 'nothing'}"
            )
        self._root = root
        self._names = sorted(sizes)
        self._sizes = [sizes[name] for name in self._names]
        self._labels = sorted({n.split("/")[0] for n in self._names if "/" in n})
        self._number = {name: i for i, name in enumerate(self._labels)}

    def __len__(self) -> int:
        return len(self._names)

    def row(self, index: int) -> dict[str, Any]:
        """Return the relative path and the first subfolder."""
        name = self._names[index]
        folder = name.split("/")[0] if "/" in name else None
        return {"key": name, "label": self._number.get(folder or ""), "label_name": folder}

    def image(self, index: int) -> Image.Image:
        """Return the decoded image of a file."""
        return decode_image(fetch(self._fs, f"{self._root}/{self._names[index]}"))

    def describe(self) -> dict[str, Any]:
        """Return the words for the manifest; the fingerprint covers names and sizes."""
        return {
            "kind": "folder",
            "url": self._url,
            "items": len(self),
            "fingerprint": digest(zip(self._names, self._sizes, strict=True)),
        }
