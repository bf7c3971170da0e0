"""What a format of another library is, and the checkpoint that reading one gives.

A module of this package that holds a ``PEER`` is a format; `dictlearn.formats.registry` finds it
by scanning. Reading never yields the other library's classes: a reader maps tensors and settings
onto those of `dictlearn.dictionary.Dictionary`, whose docstring is the equation.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from actstore.manifest import MAX_JSON_BYTES, FormatError
from dictlearn.config import DictionaryConfig, Input, Matryoshka, Sparsify

if TYPE_CHECKING:
    from dictlearn.dictionary import Dictionary

UNNAMED = "unnamed"
"""Site of a checkpoint that records none, until `reads` / `writes` tell it."""
UNNAMED_OUT = "unnamed_out"
"""The same for what a transcoder writes."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One format of another library."""

    name: str
    """What ``format=`` says."""
    files: str
    """Which files make one up, for people."""
    recognise: Callable[[Path], bool]
    """Whether a path (folder or file) is of this format; reads as little as possible."""
    read: Callable[..., Checkpoint]
    """``read(path, **told)``."""
    told: Mapping[str, str] = field(default_factory=dict)
    """Options of `read`: name -> what it says that the file does not."""
    write: Callable[[Dictionary, Path, Mapping[str, Any]], Path] | None = None
    """``write(dictionary, folder, about)``; raises ValueError where the format cannot hold it."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in the words of this project."""

    config: DictionaryConfig
    """Description of the dictionary."""
    tensors: Mapping[str, Tensor]
    """Under the names of `Dictionary`'s state dict, any float dtype."""
    about: dict[str, Any]
    """JSON-able provenance: format, model, hooks, the other library's own configuration."""

    def at(self, reads: str | None = None, writes: str | None = None) -> Checkpoint:
        """Return the same with other site names; `writes` of an SAE follows `reads`."""
        config = self.config
        if reads is None and writes is None:
            return self
        old_read, old_write = next(iter(config.reads)), next(iter(config.writes))
        new_read = reads or old_read
        if writes is None:
            writes = new_read if old_write == old_read else old_write
        elif old_read == old_write and writes != new_read:
            raise ValueError(
                f"this is an autoencoder of one site: it cannot read {new_read!r} and write "
                f"{writes!r}. Tell reads only"
            )
        return dataclasses.replace(
            self,
            config=dataclasses.replace(
                config,
                reads={new_read: config.reads[old_read]},
                writes={writes: config.writes[old_write]},
            ),
        )

    def build(self, device: str | torch.device = "cpu") -> Dictionary:
        """Return the dictionary, float32.

        Raises
        ------
        FormatError
            A tensor is missing, extra, misshapen, not of a floating dtype, or holds NaN.
        """
        from dictlearn.dictionary import Dictionary

        check_tensors(self.tensors)
        dictionary = Dictionary.from_config(self.config)
        state = dictionary.state_dict()
        problems = [f"{name} is missing" for name in state if name not in self.tensors]
        problems += [f"{name} has no place" for name in self.tensors if name not in state]
        problems += [
            f"{name} is {list(self.tensors[name].shape)}, expected {list(value.shape)}"
            for name, value in state.items()
            if name in self.tensors and self.tensors[name].shape != value.shape
        ]
        if problems:
            raise FormatError(f"the checkpoint does not fit together: {'; '.join(problems)}")
        with torch.no_grad():
            for name, value in state.items():
                value.copy_(self.tensors[name])
        return dictionary.to(device)


def checkpoint(
    tensors: Mapping[str, Tensor],
    *,
    sparsify: Sparsify,
    input: Input,
    read: str | None,
    write: str | None = None,
    transcoder: bool = False,
    matryoshka: Matryoshka | None = None,
    about: dict[str, Any],
) -> Checkpoint:
    """Describe a single-site checkpoint by its tensors; widths come from W_enc and W_dec.

    ``skip``, ``latent_norm`` and ``decode_scale`` are on where their tensors are. Vectors that a
    format leaves out (b_enc, b_dec) become zeros.

    Raises
    ------
    FormatError
        W_enc or W_dec is missing, no matrix, or their numbers of latents differ.
    """
    check_tensors(tensors)
    for name in ("W_enc", "W_dec"):
        if name not in tensors or tensors[name].ndim != 2:
            found = list(tensors[name].shape) if name in tensors else "nothing"
            raise FormatError(f"{name} must be a matrix, found {found}")
    W_enc, W_dec = tensors["W_enc"], tensors["W_dec"]
    if W_enc.shape[1] != W_dec.shape[0]:
        raise FormatError(
            f"the encoder has {W_enc.shape[1]} latents and the decoder {W_dec.shape[0]}"
        )
    reads = {read or UNNAMED: W_enc.shape[0]}
    writes = {write or UNNAMED_OUT: W_dec.shape[1]} if transcoder else reads
    try:
        config = DictionaryConfig(
            reads=reads,
            writes=writes,
            latents=W_enc.shape[1],
            sparsify=sparsify,
            skip="W_skip" in tensors,
            input=input,
            matryoshka=matryoshka,
            latent_norm="ln_gain" in tensors,
            decode_scale="scale" in tensors,
        )
    except ValueError as error:
        raise FormatError(f"the checkpoint does not fit together: {error}") from error
    filled = {
        "b_enc": torch.zeros(W_enc.shape[1]),
        "b_dec": torch.zeros(W_dec.shape[1]),
        **tensors,
    }
    return Checkpoint(config=config, tensors=filled, about=about)


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuse what no training run writes: integers, NaN, shapes larger than their storage.

    Raises
    ------
    FormatError
        Names the tensor and what is wrong with it.
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            found = getattr(value, "dtype", type(value).__name__)
            raise FormatError(f"{name} must be a tensor of floats, found {found}")
        if value.layout != torch.strided or value.device.type != "cpu":
            raise FormatError(f"{name} must be a dense tensor on the CPU, found {value.layout}")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise FormatError(
                f"{name} claims {list(value.shape)} but holds only "
                f"{value.untyped_storage().nbytes()} bytes"
            )
        if bool(value.isnan().any()):
            raise FormatError(f"{name} holds NaN")


def take(state: Mapping[str, Any], names: Mapping[str, str], where: Path) -> dict[str, Tensor]:
    """Pick tensors out of a state dict: ``names`` maps our name to theirs; ``.T`` transposes.

    Raises
    ------
    FormatError
        One is missing; the message lists what is there.
    """
    out = {}
    for ours, theirs in names.items():
        key = theirs.removesuffix(".T")
        if key not in state:
            raise FormatError(f"{where} has no tensor {key!r}; it has {sorted(map(str, state))}")
        value = state[key]
        out[ours] = value.T if theirs.endswith(".T") else value
    return out


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object of bounded size.

    Raises
    ------
    FileNotFoundError
        The file is not there.
    FormatError
        It is larger than 64 MiB, not JSON, or no object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    if file.stat().st_size > MAX_JSON_BYTES:
        raise FormatError(f"{file} is larger than {MAX_JSON_BYTES} bytes: not a configuration")
    return parse_json(file.read_bytes(), file)


def parse_json(text: bytes, where: Path) -> dict[str, Any]:
    """Parse a JSON object; FormatError where it is none."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise FormatError(f"{where} holds {type(data).__name__}, expected an object")
    return data


def whole_number(config: Mapping[str, Any], key: str, where: Path) -> int:
    """Return ``config[key]`` as an int; FormatError where it is missing or no whole number."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise FormatError(f"{where}: {key} must be a whole number, found {value!r}")
    return int(value)


def choose(kind: str, value: Any, allowed: Mapping[str, Any], where: Path) -> Any:
    """Return ``allowed[value]``; FormatError that lists the allowed values otherwise."""
    if value not in allowed:
        raise FormatError(
            f"{where}: {kind} {value!r} is not supported; allowed: {', '.join(allowed)}"
        )
    return allowed[value]
