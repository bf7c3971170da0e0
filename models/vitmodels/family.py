"""What a model family is: the interface that a file in ``families/`` fills in.

``docs/adding-a-model.md`` walks through it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from vitmodels.spec import TokenGrid
from vitmodels.taps import Tap
from vitmodels.transforms import Transform


def call_module(module: nn.Module, x: Any) -> Tensor:
    """Run a module that takes one tensor and returns one."""
    output: Tensor = module(x)
    return output


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to build."""

    name: str
    """The id without the family's prefix: ``vit_base_patch16_224.augreg_in21k``."""
    weights: Path | None = None
    """Local file (or folder, where the backend saves folders) with the weights."""
    pretrained: bool = True
    """Load the backend's published weights; ignored when `weights` is given."""
    img_size: int | tuple[int, int] | None = None
    """Side in pixels, or (height, width), None for the checkpoint's own."""
    meta: bool = False
    """Build without memory for the weights, on torch's meta device."""


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """Where everything is in one built module, and what its inputs look like."""

    taps: Mapping[str, Tap]
    """Site name -> tap, in the order of the forward pass."""
    grid: TokenGrid
    """Tokens of the residual stream."""
    d_model: int
    """Width of the residual stream."""
    n_layers: int
    """Number of blocks."""
    n_heads: int
    """Heads a block."""
    d_head: int
    """Channels a head."""
    d_mlp: int
    """Hidden width of the MLP, 0 without one."""
    n_classes: int = 0
    """Outputs of the head, 0 without one."""
    input_shape: tuple[int, ...]
    """One input without its batch, as the module takes it."""
    transform: Transform
    """Preprocessing that belongs to the weights."""
    revision: str = ""
    """Revision or tag of the checkpoint."""
    dynamic: bool = False
    """Whether inputs of another size than `input_shape` are accepted."""
    vocabulary: int = 0
    """Inputs are token ids below this (a text tower); 0 for pixels."""
    call: Callable[[nn.Module, Any], Tensor] = call_module
    """(module, x) -> logits, or features where there is no head."""
    without_effect_on_shapes: Sequence[tuple[nn.Module, str]] = ()
    """(module, method) pairs that cost time and decide no shape, such as rotations by position.
    While only shapes are asked for, each returns its first argument."""


class Family(ABC):
    """One kind of architecture of one backend. A file in ``families/`` ends with ``FAMILY = X()``.

    Importing the file must not import an optional backend: import it inside of the methods.
    """

    name: ClassVar[str]
    """Name of the file, ``timm_vit``."""
    prefix: ClassVar[str]
    """First part of the ids it serves: ``timm``, ``hf``, ``open_clip``, ``toy``."""
    backend: ClassVar[str]
    """Distribution that runs the modules, as pip knows it."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Names (without prefix) that this family vouches for: each builds and lists its sites."""

    def claims(self, name: str) -> bool:
        """Whether a name (without prefix) is this family's. May be wider than `names`."""
        return name in self.names()

    def alias(self, id: str) -> str | None:
        """Return the name (without prefix) for an id in another spelling, None if it is not ours.

        For ids that come without our prefix: bare timm names, hub ids, Prisma's spellings.
        """
        del id
        return None

    def refusal(self, name: str) -> str | None:
        """Say why a name (without prefix) that the backend knows cannot be served, if we know."""
        del name
        return None

    @abstractmethod
    def build(self, request: Request) -> nn.Module:
        """Build the backend's own module with its weights; random ones if none are asked for.

        Called inside of a seeded generator, and of ``torch.device("meta")`` where
        ``request.meta``.
        """

    @abstractmethod
    def accepts(self, module: Any) -> bool:
        """Whether :meth:`anatomy` can describe a module that somebody else has built."""

    @abstractmethod
    def anatomy(self, module: Any) -> Anatomy:
        """Describe a module that :meth:`build` made or :meth:`accepts` accepted.

        Raises
        ------
        ValueError
            Blocks of a kind the family cannot tap; the message says which.
        """

    @abstractmethod
    def conformance(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Small variants (a few blocks, narrow, few patches) that the tests run for real."""
