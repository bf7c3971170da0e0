"""Any map-style data set object of Python, for instance a torch Dataset."""

import hashlib
import threading
from typing import Any

from PIL import Image, UnidentifiedImageError

from actstore.sources.base import Undecodable, Unreachable


class MapStyle:
    """Wrap an object with ``__len__`` and ``__getitem__``.

    An item is an image, a tuple (image, label, ...) or a dict with ``image`` and perhaps
    ``label``, ``key``, ``label_name``. An image is a PIL image, which goes through the model's
    transform, or a tensor or array [channel, height, width], which goes to the model as it is.
    """

    def __init__(self, data: Any) -> None:
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise ValueError(
                f"data must be 'digits', a path, a URL or a map-style data set with __len__ and "
                f"__getitem__; got {type(data).__name__}"
            )
        self._data = data
        self._classes = getattr(data, "classes", None)
        self._recent = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_recent"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _recent=threading.local())

    def __len__(self) -> int:
        return len(self._data)

    def _item(self, index: int) -> dict[str, Any]:
        value = self._data[index]
        if isinstance(value, dict):
            return dict(value)
        if isinstance(value, tuple | list):
            return {"image": value[0], **({"label": value[1]} if len(value) > 1 else {})}
        return {"image": value}

    def _load(self, index: int) -> tuple[dict[str, Any], Any]:
        """Return row and image of one item; asked twice by a thread, it is read once."""
        if getattr(self._recent, "index", None) == index:
            recent: tuple[dict[str, Any], Any] = self._recent.loaded
            return recent
        try:
            item = self._item(index)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            if _of_medium(error):
                raise Unreachable(f"item {index} cannot be read: {type(error).__name__}") from error
            raise Undecodable(f"cannot be read: {error}") from error
        image = item.pop("image", None)
        if image is None:
            raise Undecodable("the item holds no image")
        loaded = (self._row(index, item), image)
        self._recent.index, self._recent.loaded = index, loaded
        return loaded

    def _row(self, index: int, item: dict[str, Any]) -> dict[str, Any]:
        label = item.pop("label", None)
        label = None if label is None else int(label)
        name = item.pop("label_name", None)
        if name is None and self._classes and label is not None and 0 <= label < len(self._classes):
            name = str(self._classes[label])
        plain = {k: v for k, v in item.items() if isinstance(v, str | int | float | bool)}
        return {**plain, "key": str(plain.get("key", index)), "label": label, "label_name": name}

    def row(self, index: int) -> dict[str, Any]:
        """Return the row of an item; of one that cannot be read, its number only."""
        try:
            return self._load(index)[0]
        except Undecodable:
            return {"key": str(index), "label": None, "label_name": None}

    def image(self, index: int) -> Any:
        """Return the image of an item; see `Source.image`."""
        return self._load(index)[1]

    def describe(self) -> dict[str, Any]:
        """Return the words for the manifest: the class and length, all that can be known."""
        kind = type(self._data)
        name = f"{kind.__module__}.{kind.__qualname__}"
        text = f"{name}:{len(self)}"
        return {
            "kind": "python",
            "name": name,
            "items": len(self),
            "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
        }


def _of_medium(error: Exception) -> bool:
    """Whether storage or network failed, and not an image or one file that is absent.

    PIL says that an image is damaged by a plain OSError without a number.
    """
    if not isinstance(error, OSError) or isinstance(
        error, FileNotFoundError | UnidentifiedImageError
    ):
        return False
    return error.errno is not None or type(error) is not OSError
