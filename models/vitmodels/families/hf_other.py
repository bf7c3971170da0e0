"""Any other id of the hub, and any folder, whose configuration is of a kind we describe.

``hf/somebody/finetuned-vit`` is no verified id: its configuration, fetched from the hub or read
from the folder in ``weights=``, tells which of the families takes it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from vitmodels.family import Anatomy, Family, Request
from vitmodels.hf_backend import (
    HFFamily,
    backend,
    model_types,
    quiet,
    unreachable,
    unverified,
)


def _families() -> tuple[HFFamily, ...]:
    """Return the families of transformers."""
    from vitmodels.registry import families

    return tuple(family for family in families() if isinstance(family, HFFamily))


class HFOther(Family):
    """Asks the configuration which family an id belongs to."""

    name = "hf_other"
    prefix = "hf"
    backend = "transformers"

    def names(self) -> Sequence[str]:
        """Return no names: nothing is verified."""
        return ()

    def claims(self, name: str) -> bool:
        """Accept what may be an id of the hub, ``org/name[:subfolder]``, and is no verified one."""
        shaped = name.count("/") == 1 and all(name.split("/"))
        return shaped and not any(name in family.checkpoints for family in _families())

    def build(self, request: Request) -> nn.Module:
        """Build by the family of the configuration's kind.

        Raises
        ------
        ValueError
            The kind of the configuration is none that we describe, or there is none to ask.
        FileNotFoundError
            The configuration cannot be fetched.
        """
        transformers = backend()
        rows = {name for family in _families() for name in family.checkpoints}
        from_hub = request.weights is None
        if (from_hub and not request.pretrained) or not (from_hub or _is_folder(request.weights)):
            raise ValueError(unverified(request.name, rows))
        repo, _, subfolder = request.name.partition(":")
        where = {"subfolder": subfolder} if from_hub and subfolder else {}
        try:
            with quiet(transformers):
                config = transformers.AutoConfig.from_pretrained(request.weights or repo, **where)
        except OSError as error:
            text = unreachable(request.name, error)
            raise FileNotFoundError(f"{text}. {unverified(request.name, rows)}") from error
        except ValueError as error:  # a kind that transformers itself does not know
            raise ValueError(f"hf/{request.name}: {_first_line(error)}") from error
        kinds = {
            kind: family
            for family in _families()
            for cls in family.classes
            for kind in model_types(transformers, cls)
        }
        found = kinds.get(config.model_type)
        if found is None:
            raise ValueError(
                f"hf/{request.name} is of kind {config.model_type!r}, which no family describes; "
                f"described are {', '.join(sorted(kinds))}. docs/adding-a-model.md says how to add "
                "one"
            )
        return found.build(request)

    def accepts(self, module: Any) -> bool:
        """Accept nothing: each family describes its own."""
        del module
        return False

    def anatomy(self, module: Any) -> Anatomy:
        """Describe by the family whose module it is."""
        family = next(family for family in _families() if family.accepts(module))
        anatomy: Anatomy = family.anatomy(module)
        return anatomy

    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Return nothing: the families have their own."""
        return {}


def _is_folder(path: Path | None) -> bool:
    return path is not None and path.is_dir()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


FAMILY = HFOther()
