"""Where a command finds a store: options that the commands of both packages share."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a store on S3 lies; credentials come from the environment (AWS_*)."""

    endpoint_url: str | None = None
    """Address of an S3 server that is not Amazon's."""

    @property
    def storage_options(self) -> dict[str, Any] | None:
        """Options for the storage."""
        return {"endpoint_url": self.endpoint_url} if self.endpoint_url else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedPlace(Place):
    """A store that is read more than once."""

    cache_dir: str | None = None
    """Folder on a local disk that keeps the parts of a remote store; none by default."""
    cache_bytes: int | None = None
    """Most bytes of that folder; half of what the disk has free by default."""

    @property
    def opening(self) -> dict[str, Any]:
        """Options of `actstore.open`."""
        return {
            "storage_options": self.storage_options,
            "cache_dir": self.cache_dir,
            "cache_bytes": self.cache_bytes,
        }
