"""A folder of videos; an item is a clip, and the names of the subfolders are the labels."""

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Self
from urllib.parse import parse_qsl

import fsspec

from actstore.credentials import public
from actstore.sources.base import Undecodable, digest
from actstore.sources.fetch import Watched
from actstore.sources.places import absolute, file_sizes, reached
from vitmodels.clips import EXTENSIONS, Clip, ClipSampling, read_clip

PREFIX = "video:"


class VideoFolder:
    """All videos below a local folder or an fsspec URL, sorted by path; or one file.

    A file has ``sampling.clips`` items. Labels are those of a folder of images: the first
    subfolder. Keys are the relative path, with ``#0``, ``#1``, ... where a file has several
    clips.

    Parameters
    ----------
    url
        Folder, file or URL; as text of `open_source` also
        ``"video:folder?stride=4&clips=3&strategy=random"``.
    sampling
        Which frames; without it one clip a file, spread over all of it, with as many frames as
        the model takes.
    storage_options
        Options of fsspec for URLs.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        sampling: ClipSampling | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        url = os.fspath(url)
        self.sampling = sampling or ClipSampling(frames=1)
        self._frames_known = sampling is not None
        self._url = absolute(url)
        with reached(self._url):
            self._fs, root = fsspec.core.url_to_fs(self._url, **dict(storage_options or {}))
            root = root.rstrip("/")
            found = file_sizes(self._fs, root)
        if set(found) == {root}:
            root = root.rpartition("/")[0]
        sizes = {
            path[len(root) + 1 :]: size
            for path, size in found.items()
            if os.path.splitext(path)[1].lower() in EXTENSIONS
        }
        if not found:
            raise FileNotFoundError(f"data {url!r} does not exist")
        if not sizes:
            others = sorted({os.path.splitext(path)[1] or path for path in found})[:5]
            raise ValueError(
                f"{url} holds no videos: looked for {', '.join(sorted(EXTENSIONS))} in it and its "
                f"subfolders, found {', '.join(others)}"
            )
        self._root = root
        self._names = sorted(sizes)
        self._sizes = [sizes[name] for name in self._names]
        self._labels = sorted({n.split("/")[0] for n in self._names if "/" in n})
        self._number = {name: i for i, name in enumerate(self._labels)}

    @classmethod
    def parse(cls, text: str, storage_options: Mapping[str, Any] | None = None) -> Self:
        """Return the source of ``video:folder?frames=16&stride=4&clips=3``.

        Raises
        ------
        ValueError
            A field that `ClipSampling` does not have, or a value it refuses.
        """
        url, _, query = text.removeprefix(PREFIX).partition("?")
        fields = ClipSampling.__dataclass_fields__
        options: dict[str, Any] = {}
        for name, value in parse_qsl(query, keep_blank_values=True):
            if name not in fields:
                raise ValueError(
                    f"{PREFIX}{public(url)}: no option {name!r}; options of clips are "
                    f"{', '.join(fields)}"
                )
            if name != "strategy" and not value.isdecimal():
                raise ValueError(f"{PREFIX}{public(url)}: {name} must be a number, not {value!r}")
            options[name] = value if name == "strategy" else int(value)
        source = cls(url, ClipSampling(**{"frames": 1, **options}), storage_options)
        source._frames_known = "frames" in options
        return source

    def for_model(self, spec: Any) -> Self:
        """Take as many frames as a model wants, if nothing else was asked for.

        Raises
        ------
        ValueError
            The model takes images, or clips of another number of frames than was asked for.
        """
        shape = tuple(spec.input_shape)
        if len(shape) != 4:
            raise ValueError(
                f"{spec.id} takes images {list(shape)}, and {self._url} holds videos: harvest them "
                "with a video model (hf/google/vivit-b-16x2-kinetics400, hf/facebook/vjepa2-...)"
            )
        if not self._frames_known:
            self.sampling, self._frames_known = replace(self.sampling, frames=shape[0]), True
        if self.sampling.frames != shape[0]:
            raise ValueError(
                f"{spec.id} takes clips of {shape[0]} frames, the data has {self.sampling.frames}: "
                f"leave frames out, or say frames={shape[0]}"
            )
        return self

    def __len__(self) -> int:
        return len(self._names) * self.sampling.clips

    def row(self, index: int) -> dict[str, Any]:
        """Return the path, the first subfolder, and which clip of the file it is."""
        file, clip = divmod(index, self.sampling.clips)
        name = self._names[file]
        folder = name.split("/")[0] if "/" in name else None
        return {
            "key": name if self.sampling.clips == 1 else f"{name}#{clip}",
            "label": self._number.get(folder or ""),
            "label_name": folder,
            "clip": clip,
        }

    def image(self, index: int) -> Clip:
        """Return the decoded frames of a clip, for the transform of a video model."""
        file, clip = divmod(index, self.sampling.clips)
        name = self._names[file]
        with Watched(self._fs, f"{self._root}/{name}") as opened:
            stream: Any = opened
            try:
                return read_clip(stream, self.sampling, clip, key=name)
            except (OSError, ValueError) as error:
                opened.check()
                raise Undecodable(str(error)) from error

    def describe(self) -> dict[str, Any]:
        """Return the words for the manifest; the fingerprint covers names, sizes and sampling."""
        sampling = asdict(self.sampling)
        return {
            "kind": "video",
            "url": self._url,
            "items": len(self),
            "sampling": sampling,
            "fingerprint": digest([sampling, *zip(self._names, self._sizes, strict=True)]),
        }

    @classmethod
    def reopen(
        cls, description: Mapping[str, Any], storage_options: Mapping[str, Any] | None = None
    ) -> Self:
        """Return the source a manifest describes."""
        sampling = ClipSampling(**description["sampling"])
        return cls(str(description["url"]), sampling, storage_options)


def holds_videos(path: str) -> bool:
    """Whether a local path is a video, or a folder whose first known file is one."""
    if not os.path.isdir(path):
        return os.path.splitext(path)[1].lower() in EXTENSIONS and os.path.isfile(path)
    from actstore.sources.folder import EXTENSIONS as IMAGES

    for _, folders, files in os.walk(path):
        folders.sort()
        for name in sorted(files):
            kind = os.path.splitext(name)[1].lower()
            if kind in IMAGES or kind in EXTENSIONS:
                return kind in EXTENSIONS
    return False
