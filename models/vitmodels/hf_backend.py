"""transformers: versions, loading from the hub or a folder, shared by the ``hf_*`` families.

A checkpoint is a row: the class, what its configuration overrides, and its preprocessor. The
row lets an id build without a hub (random weights, or the meta device). Weights come with
their own configuration, which then decides.
"""

import importlib
import importlib.metadata
import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vitmodels.family import Family, Request
from vitmodels.hf_preprocess import Processor, output_size, sized
from vitmodels.names import nearest

log = logging.getLogger(__name__)

Size = tuple[int, int]

TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
BASE: dict[str, int] = {}
"""Configurations of transformers default to ViT-B."""
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
HUGE = LARGE | {"hidden_size": 1280, "num_hidden_layers": 32, "intermediate_size": 5120}

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified id of the hub."""

    cls: str
    """Class of transformers, ``ViTForImageClassification``."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the defaults of the class's configuration."""
    processor: Mapping[str, Any] = field(default_factory=dict)
    """What differs from the defaults of the family's preprocessor."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the class: ``add_pooling_layer``."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a built module does not know about itself."""

    processor: Processor
    """Preprocessing that came with it."""
    size: Size
    """(height, width) of its inputs."""


_ORIGINS: WeakKeyDictionary[nn.Module, Origin] = WeakKeyDictionary()


def backend() -> Any:
    """Return transformers 5.

    Raises
    ------
    ValueError
        It is not installed, or older: 4 has other modules under other names.
    """
    try:
        version = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            "models of 'hf/...' need transformers, which is not installed: "
            "pip install 'actstore[hf]'"
        ) from error
    if int(version.partition(".")[0]) < 5:
        raise ValueError(
            f"models of 'hf/...' need transformers 5 or newer, found {version}: the modules have "
            "other names before. pip install 'transformers>=5'"
        )
    return importlib.import_module("transformers")


class HFFamily(Family):
    """Base of the families of transformers: everything but the anatomy."""

    prefix = "hf"
    backend = "transformers"
    checkpoints: ClassVar[Mapping[str, Checkpoint]]
    """Verified ids of the hub; ``org/name``, or ``org/name:subfolder``."""
    classes: ClassVar[tuple[str, ...]]
    """Classes that the family describes; the first serves checkpoints that name none of them."""
    wholes: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Kind -> (class, attribute): checkpoints that only load as a whole that holds the tower."""
    processor: ClassVar[str]
    """Class of the preprocessor of checkpoints that come without one."""
    size_field: ClassVar[str] = "image_size"
    """Field of the configuration that holds the size of an input."""
    resizes: ClassVar[bool] = True
    """Whether the module itself resamples its positions for inputs of another size."""

    def names(self) -> Sequence[str]:
        """Return the verified ids."""
        return sorted(self.checkpoints)

    def alias(self, id: str) -> str | None:
        """Accept an id of the hub as it is."""
        return id if id in self.checkpoints else None

    def accepts(self, module: Any) -> bool:
        """Accept the classes of the family as transformers defines them."""
        kind = type(module)
        return kind.__name__ in self.classes and kind.__module__.startswith("transformers.")

    def build(self, request: Request) -> nn.Module:
        """Build by transformers: from the hub, from a folder or file, or at random."""
        transformers = backend()
        row = self.checkpoints.get(request.name)
        if request.weights is None and not request.pretrained:
            if row is None:
                raise ValueError(unverified(request.name, self.checkpoints))
            config = self._config(transformers, row)
            module, saved = getattr(transformers, row.cls)(config, **row.options), None
        else:
            with quiet(transformers):
                module, saved = self._load(transformers, request, row)
        processor = saved or Processor.from_defaults(
            self.processor, {} if row is None else row.processor
        )
        size = self._size(request, module, self._given(transformers, module, row, saved))
        _ORIGINS[module] = Origin(processor=sized(processor, size), size=size)
        built: nn.Module = module
        return built

    def _given(
        self, transformers: Any, module: Any, row: Checkpoint | None, saved: Processor | None
    ) -> Size | None:
        """Return the size that the preprocessing published with these weights gives."""
        if saved is not None:
            return output_size(saved.config)
        if row is None or (
            self.native_size(self._config(transformers, row)) != self.native_size(module.config)
        ):
            return None
        return output_size(Processor.from_defaults(self.processor, row.processor).config)

    def _size(self, request: Request, module: Any, given: Size | None) -> Size:
        """Return the size of inputs: asked for, else that of the preprocessing, else native."""
        native = self.native_size(module.config)
        if request.img_size is None:
            return (given or native) if self.resizes else native
        size = _pair(request.img_size)
        if not self.resizes and size != native:
            raise ValueError(
                f"hf/{request.name} takes inputs of {native[0]} x {native[1]} only: "
                f"{type(module).__name__} cannot resample its positions to "
                f"img_size={request.img_size}"
            )
        return size

    def native_size(self, config: Any) -> Size:
        """Return (height, width) that the configuration names."""
        return _pair(getattr(config, self.size_field))

    def origin(self, module: Any) -> Origin:
        """Return what came with a module; defaults of the family if somebody else built it."""
        found = _ORIGINS.get(module)
        if found is None:
            size = self.native_size(module.config)
            default = Processor.from_defaults(self.processor, {})
            found = _ORIGINS[module] = Origin(processor=sized(default, size), size=size)
        return found

    def _config(self, transformers: Any, row: Checkpoint) -> Any:
        return getattr(transformers, row.cls).config_class(**row.config)

    def _load(
        self, transformers: Any, request: Request, row: Checkpoint | None
    ) -> tuple[Any, Processor | None]:
        """Load weights with their own configuration and, if there is one, preprocessing."""
        repo, _, subfolder = request.name.partition(":")
        where = {"subfolder": subfolder} if subfolder and request.weights is None else {}
        place: str | Path = repo if request.weights is None else request.weights
        if request.weights is not None and not request.weights.is_dir():
            return self._load_file(transformers, request, row), None
        if request.weights is not None and not (request.weights / "config.json").is_file():
            raise FileNotFoundError(
                f"{request.weights} holds no config.json: weights= wants a folder as "
                "save_pretrained writes it, or one safetensors file"
            )
        try:
            config = transformers.AutoConfig.from_pretrained(place, **where)
        except OSError as error:
            raise FileNotFoundError(unreachable(request.name, error)) from error
        name = self._class_of(transformers, config, row, request)
        name, part = self.wholes.get(config.model_type, (name, ""))
        cls = getattr(transformers, name)
        try:
            module, report = _from_pretrained(cls, place, **where)
        except OSError as error:
            raise FileNotFoundError(unreachable(request.name, error)) from error
        _check(report, place, name)
        module = getattr(module, part) if part else module
        return module, Processor.from_place(place, where, self.processor)

    def _load_file(self, transformers: Any, request: Request, row: Checkpoint | None) -> Any:
        """Load one file of weights into the configuration of a row."""
        from vitmodels.weights import read_weights

        if row is None:
            raise ValueError(
                f"{request.weights} is a file, and hf/{request.name} is no verified id whose "
                "configuration is known: give weights= a folder with config.json"
            )
        state = read_weights(request.weights)  # type: ignore[arg-type]
        cls = getattr(transformers, row.cls)
        config = self._config(transformers, row)
        module, report = _from_pretrained(cls, None, config=config, state_dict=state)
        _check(report, request.weights, row.cls)
        return module

    def _class_of(
        self, transformers: Any, config: Any, row: Checkpoint | None, request: Request
    ) -> str:
        """Return the class for a configuration: the one it was saved from if we know it."""
        fitting = [c for c in self.classes if config.model_type in model_types(transformers, c)]
        if not fitting:
            raise ValueError(
                f"{request.weights or request.name} holds a model of kind {config.model_type!r}, "
                f"which family {self.name} does not describe: it has {', '.join(self.classes)}"
            )
        for name in getattr(config, "architectures", None) or ():
            if name in fitting:
                return str(name)
        return row.cls if row is not None and row.cls in fitting else fitting[0]

    @abstractmethod
    def anatomy(self, module: Any) -> Any:
        """Describe a module of one of the classes."""


def _from_pretrained(cls: Any, place: Any, **options: Any) -> tuple[Any, Mapping[str, Any]]:
    """Load weights in float32, with a report of what does not fit instead of a guess."""
    options |= {"dtype": "float32", "ignore_mismatched_sizes": True, "output_loading_info": True}
    module, report = cls.from_pretrained(place, **options)
    missing = report["missing_keys"]
    if missing and all(key.startswith("pooler.") for key in missing):  # saved without a pooler
        module, report = cls.from_pretrained(place, add_pooling_layer=False, **options)
    return module, report


def model_types(transformers: Any, cls: str) -> set[str]:
    """Return the kinds of configurations that a class loads: its own, and of a whole model."""
    own = getattr(transformers, cls).config_class
    whole = getattr(transformers, own.__name__.replace("VisionConfig", "Config"))
    return {own.model_type, whole.model_type}


def unreachable(name: str, error: Exception) -> str:
    """Say that published weights could not be fetched, why, and what else there is."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = str(cause).strip().splitlines()[0]
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return (
        f"cannot fetch the published weights of hf/{name} ({type(cause).__name__}: {reason}). "
        "Give weights= a folder as save_pretrained writes it, pretrained=False for random ones, "
        f"or set HF_HOME to a cache that holds them (looked in {cache})"
    )


def unverified(name: str, rows: Iterable[str]) -> str:
    """Say that the configuration of an id is not known here, and what else there is."""
    near = nearest(name, rows)
    hint = f"; nearest verified ids: {', '.join(near)}" if near else ""
    return (
        f"hf/{name} is no verified id, so its configuration is known to the hub only{hint}. Give "
        "weights= a folder as save_pretrained writes it, or pretrained=True"
    )


def _check(report: Mapping[str, Any], place: Any, cls: str) -> None:
    """Refuse weights that do not fit; name the first key."""
    for key, found, wanted in sorted(report["mismatched_keys"], key=str):
        raise ValueError(
            f"{place} does not fit {cls}: {key} is {tuple(found)}, the model has {tuple(wanted)}"
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{place} does not fit {cls}: {missing[0]} is missing ({len(missing)} keys in all)"
        )
    unexpected = report["unexpected_keys"]
    if unexpected:
        log.info("%s: %d tensors have no place in %s", place, len(unexpected), cls)


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Keep transformers from drawing progress bars and tables: a library does not."""
    control = transformers.utils.logging
    level, bars = control.get_verbosity(), control.is_progress_bar_enabled()
    control.set_verbosity_error()
    control.disable_progress_bar()
    try:
        yield
    finally:
        control.set_verbosity(level)
        if bars:
            control.enable_progress_bar()


def _pair(size: Any) -> Size:
    """``224`` or ``[224, 224]`` -> ``(224, 224)``."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


Make = Callable[[], nn.Module]


def small(
    cls: str,
    *,
    options: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    **config: Any,
) -> Make:
    """Return a maker of a small random module of a class, for the conformance test.

    Parameters
    ----------
    cls
        Class of transformers.
    options
        Further arguments of the class.
    vision
        Fields of the vision configuration inside the configuration of a whole model.
    config
        Fields of the configuration.
    """

    def make() -> nn.Module:
        kind = getattr(backend(), cls)
        sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
        own = {**sizes, **config} if vision is None else config
        nested = {} if vision is None else {"vision_config": {**sizes, **vision}}
        module: nn.Module = kind(kind.config_class(**own, **nested), **(options or {}))
        return randomised(module)

    return make


def randomised(module: nn.Module) -> nn.Module:
    """Draw every parameter anew: initialisers leave zeros, at which nothing can be seen."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            one = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(one + 0.2 * noise)
    return module
