"""Shuffled batches of aligned stores as tensors: one loader a store, one order for all."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from actstore.aligned import Aligned, join
from actstore.batching import Batch
from actstore.loader import TokenLoader

if TYPE_CHECKING:
    from actstore.store import Store


class AlignedLoader:
    """What `TokenLoader` is to a store; the same options, except that `normalize` is a pair.

    Raises
    ------
    KeyError, ValueError
        When what is asked for is not there, or tokens do not correspond.
    """

    def __init__(self, store: Aligned, sites: list[str], batch_size: int, **options: Any) -> None:
        parts = store.split(sites, options.get("tokens"))
        pair = options.pop("normalize", None)
        self.names, self.loaders = list(parts), []
        self.slices: dict[str, slice] = {}
        self.batch_size = batch_size
        start = 0
        for name, inner in parts.items():
            one = store.stores[name]
            width = sum(one.spec(s, one.kinds(s)[0]).channels for s in inner)
            mine = None if pair is None else tuple(v[start : start + width] for v in pair)
            loader = TokenLoader(one, inner, batch_size, normalize=mine, **options)
            self.slices |= {
                f"{name}.{site}": slice(start + s.start, start + s.stop)
                for site, s in loader.slices.items()
            }
            start += width
            self.loaders.append(loader)
        self.width = start

    @property
    def rows(self) -> int:
        """Rows of an epoch, over all ranks."""
        return self.loaders[0].rows

    @property
    def selection(self) -> Any:
        """What is read of the first store; the tokens and items are those of all."""
        return self.loaders[0].selection

    def __len__(self) -> int:
        """Return the batches of one epoch."""
        return len(self.loaders[0])

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the next batch, and what each store's loader counts."""
        return {n: v.state_dict() for n, v in zip(self.names, self.loaders, strict=True)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at the batch of a state; ValueError where it belongs to another order."""
        if set(state) != set(self.names):
            raise ValueError(f"the state is of stores {sorted(state)}, not {sorted(self.names)}")
        for name, loader in zip(self.names, self.loaders, strict=True):
            loader.load_state_dict(state[name])

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the present one on."""
        readers = [iter(loader) for loader in self.loaders]
        try:
            for batches in zip(*readers, strict=True):
                yield join(batches, self.names, lambda acts: torch.cat(acts, dim=1))
        finally:
            for one in readers:
                one.close()  # type: ignore[attr-defined]


def loader_of(
    store: "Store | Aligned", sites: list[str], batch_size: int, **options: Any
) -> TokenLoader | AlignedLoader:
    """Return the loader of one store or of aligned ones."""
    if isinstance(store, Aligned):
        return AlignedLoader(store, sites, batch_size, **options)
    return TokenLoader(store, sites, batch_size, **options)
