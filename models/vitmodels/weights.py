"""Weights: read safely, compared with a module, digested."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "target_encoder")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file, or from a torch file without running code.

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        The file holds no state dict, or holds objects that need code to load.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights file at {path}; give weights= a safetensors or pt file"
        )
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be loaded as tensors only ({type(error).__name__}); re-save its state "
            "dict with safetensors.torch.save_file"
        ) from error
    for key in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{path} holds no state dict; expected a mapping from names to tensors")
    return {name.removeprefix("module."): tensor for name, tensor in found.items()}


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the string metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def first_mismatch(found: Mapping[str, Tensor], module: nn.Module) -> str | None:
    """Describe the first key or shape by which a state dict does not fit, None if it does."""
    wanted = module.state_dict()
    for name, tensor in wanted.items():
        if name not in found:
            return f"{name} {tuple(tensor.shape)} is missing"
        if found[name].shape != tensor.shape:
            return f"{name} is {tuple(found[name].shape)}, the model has {tuple(tensor.shape)}"
    for name, tensor in found.items():
        if name not in wanted:
            return f"{name} {tuple(tensor.shape)} has no place in the model"
    return None


def digest(module: nn.Module) -> str:
    """Return ``sha256:...`` over names, dtypes, shapes and bytes; ``meta`` without values."""
    state = module.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        return "meta"
    total = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1)
        if data.numel():
            total.update(memoryview(data.view(torch.uint8).numpy()))
    return f"sha256:{total.hexdigest()}"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Build modules with random weights that depend on `seed` alone.

    Initialisers of every library draw from torch's global generator: it is seeded inside and
    put back as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        yield
