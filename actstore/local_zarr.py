"""A local store as zarr-python reads it: through `actstore.links`, as everything else does."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zarr.storage import LocalStore

from actstore.links import Links


class GuardedStore(LocalStore):
    """A read-only `zarr.storage.LocalStore` that follows no link out of its root.

    Raises
    ------
    FormatError
        On reading a key that leads elsewhere.
    """

    def __init__(self, root: Path | str, *, read_only: bool = True) -> None:
        super().__init__(root, read_only=read_only)
        self._links = Links(str(root))

    def get_sync(self, key: str, **options: Any) -> Any:
        """See `LocalStore.get_sync`."""
        self._links.resolve(key)
        return super().get_sync(key, **options)

    async def get(self, key: str, *words: Any, **options: Any) -> Any:
        """See `LocalStore.get`."""
        self._links.resolve(key)
        return await super().get(key, *words, **options)

    async def get_partial_values(
        self, prototype: Any, key_ranges: Iterable[tuple[str, Any]]
    ) -> list[Any]:
        """See `LocalStore.get_partial_values`."""
        ranges = list(key_ranges)
        for key, _ in ranges:
            self._links.resolve(key)
        return await super().get_partial_values(prototype, ranges)
