"""Reading pickles of other people without running them.

``.pt`` files go through ``torch.load(weights_only=True)``, after a look at which names they refer
to. Plain pickles (``.pkl``, ``.pkl.gz``) are first walked opcode by opcode, then unpickled with a
table of allowed names in which ``torch.storage._load_from_bytes``, which by itself unpickles
freely, is replaced by a weights-only load. Classes of known libraries become `Inert`: an empty
object that only remembers its fields. Sizes are bounded before anything is allocated.
"""

from __future__ import annotations

import gzip
import io
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from actstore.manifest import FormatError

MAX_BYTES = 16 << 30
"""No checkpoint may be larger than this, compressed or not."""
MAX_RATIO = 50
"""A gzip file may grow by this factor at most (weights are noise and hardly shrink) ..."""
FREE_BYTES = 64 << 20
"""... beyond this many bytes, which are always allowed."""
INERT_PACKAGES = ("vit_prisma", "sae_lens", "sae_training")
"""Libraries whose configuration objects are read as `Inert`."""

_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    EOFError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    AssertionError,
    ImportError,
)
"""What a damaged or hostile stream makes the two unpicklers raise."""


class Inert:
    """Stands for an object of another library: keeps its fields, runs none of its code."""

    def __new__(cls, *args: object, **kwargs: object) -> Inert:
        """Ignore whatever the pickle passes."""
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.fields: dict[str, Any] = {}

    def __setstate__(self, state: object) -> None:
        """Remember a plain dict of fields."""
        self.fields = dict(state) if isinstance(state, dict) else {}


def fields_of(value: object) -> dict[str, Any]:
    """Return the fields of an `Inert`, a dict as it is, otherwise nothing."""
    if isinstance(value, Inert):
        return dict(value.__dict__.get("fields", {}))
    return dict(value) if isinstance(value, dict) else {}


@contextmanager
def _damage(where: object) -> Iterator[None]:
    try:
        yield
    except (FormatError, FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except _DAMAGE as error:
        text = str(error)
        asked = re.search(r"GLOBAL (\S+)", text)
        if asked:
            raise FormatError(_refusal(where, [asked[1]])) from error
        # torch's message starts with the advice to load without protection: drop it
        first = (text.rpartition("WeightsUnpickler error:")[2].strip().splitlines() or [""])[0][
            :300
        ]
        raise FormatError(
            f"{where} cannot be read safely: {type(error).__name__}: {first}"
        ) from error


def load_pt(source: Path | BinaryIO, where: Path | None = None) -> Any:
    """Return what ``torch.save`` wrote, on the CPU, tensors and plain containers only.

    Raises
    ------
    FormatError
        The file refers to functions or classes that weights do not need (they are named and not
        called), is compressed, too large, damaged, or no such file.
    """
    where = source if isinstance(source, Path) else where
    with _damage(where):
        if isinstance(source, Path):
            with source.open("rb") as file:
                return load_pt(file, source)
        start = source.tell()
        inert = []
        if zipfile.is_zipfile(source):
            _check_archive(source, where)
            source.seek(start)
            names = torch.serialization.get_unsafe_globals_in_checkpoint(source)
            inert = [n for n in names if n.partition(".")[0] in INERT_PACKAGES]
            refused = sorted(set(names) - set(inert))
            if refused:
                raise FormatError(_refusal(where, refused))
        source.seek(start)
        with torch.serialization.safe_globals([(Inert, name) for name in inert]):
            return torch.load(source, map_location="cpu", weights_only=True)


def peek(file: Path) -> bytes:
    """Return the pickled structure of a ``torch.save`` file (names, no weights); empty if none."""
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith("data.pkl") and entry.file_size <= FREE_BYTES:
                    return archive.read(entry)
    except _DAMAGE:
        pass
    return b""


def _check_archive(file: BinaryIO, where: object) -> None:
    length = file.seek(0, io.SEEK_END)
    if length > MAX_BYTES:
        raise FormatError(f"{where} has {length} bytes; at most {MAX_BYTES} are read")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    packed = [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]
    if packed or sum(e.file_size for e in entries) > length:
        raise FormatError(
            f"{where} holds compressed or overlapping records, which torch.save never writes"
        )


def load_pickle(path: Path) -> Any:
    """Return what a ``.pkl`` or ``.pkl.gz`` file holds: tensors and plain containers only.

    Raises
    ------
    FormatError
        As for `load_pt`; also for a gzip file that grows beyond all measure.
    """
    with _damage(path):
        data = _inflate(path) if path.suffix == ".gz" else path.read_bytes()
        _check_opcodes(data, path)
        return _Restricted(io.BytesIO(data), path).load()


def _inflate(path: Path) -> bytes:
    limit = min(MAX_BYTES, max(FREE_BYTES, MAX_RATIO * path.stat().st_size))
    chunks, total = [], 0
    try:
        with gzip.open(path) as file:
            while chunk := file.read(1 << 20):
                total += len(chunk)
                if total > limit:
                    raise FormatError(
                        f"{path} grows beyond {limit} bytes when decompressed: not a checkpoint"
                    )
                chunks.append(chunk)
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(f"{path} is not a whole gzip file: {error}") from error
    return b"".join(chunks)


_OBJECTS = {"INST", "OBJ", "PERSID", "BINPERSID", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER"}
_SLOTS = {"PUT", "BINPUT", "LONG_BINPUT"}


def _check_opcodes(data: bytes, path: Path) -> None:
    """Refuse opcodes no checkpoint uses, names not allowed, and slots that would fill the memory.

    The names of STACK_GLOBAL are not seen here but by the unpickler's table.
    """
    refused: set[str] = set()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name in _OBJECTS:
            raise FormatError(f"{path} uses the pickle opcode {opcode.name}, refused")
        if opcode.name in _SLOTS and int(argument or 0) > number + 1:
            raise FormatError(f"{path} stores at slot {argument} after {number} steps, refused")
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            if _lookup(module, name) is None:
                refused.add(f"{module}.{name}")
    if refused:
        raise FormatError(_refusal(path, sorted(refused)))


def _storage_from_bytes(data: bytes) -> Any:
    return load_pt(io.BytesIO(data), Path("a tensor inside the pickle"))


def _latin1(text: str, encoding: str) -> bytes:
    """Do what ``_codecs.encode`` does in old pickles: give the bytes of a tensor."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the pickle encodes text as {encoding!r}")
    return text.encode("latin1")


class _Call:
    """A function the pickle may call, but not alter (BUILD could set attributes of a bare one)."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: object) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError("the pickle sets an attribute of a function")

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("the pickle sets the state of a function")


_ALLOWED: dict[tuple[str, str], _Call | torch.dtype] = {
    ("collections", "OrderedDict"): _Call(OrderedDict),
    ("_codecs", "encode"): _Call(_latin1),
    # what tensors pickle to; torch offers no public name for the two rebuilders
    ("torch._utils", "_rebuild_tensor_v2"): _Call(torch._utils._rebuild_tensor_v2),
    ("torch._utils", "_rebuild_parameter"): _Call(torch._utils._rebuild_parameter),
    ("torch.storage", "_load_from_bytes"): _Call(_storage_from_bytes),
    ("torch", "device"): _Call(torch.device),
    ("torch", "Size"): _Call(torch.Size),
    **{("torch", n): v for n, v in vars(torch).items() if isinstance(v, torch.dtype)},
}


def _lookup(module: str, name: str) -> Any:
    if module.partition(".")[0] in INERT_PACKAGES:
        return Inert
    return _ALLOWED.get((module, name))


class _Restricted(pickle.Unpickler):
    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        found = _lookup(module, name)
        if found is None:
            raise FormatError(_refusal(self.path, [f"{module}.{name}"]))
        return found


def _refusal(where: object, names: list[str]) -> str:
    return (
        f"{where} is refused: it wants to call {', '.join(names)}, which weights do not need and "
        "which could run any code. Nothing was run. If you trust its author, load it with the "
        "library that wrote it and save plain tensors (a state dict, or safetensors)"
    )
