"""Shuffled batches as tensors, with a state that is one number.

On a CPU rows are converted from the pools into reused memory. On a CUDA device a pool is pinned,
copied as a whole on a stream of its own while the one before is used, and cut there.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int

from actstore.batching import Batch, Recycler, Run
from actstore.normalise import affine
from actstore.pools import Allocate, Buffer, allocate
from actstore.quantise import dequantiser
from actstore.reader import epochs_of
from actstore.sampling import streams_of
from actstore.selection import Selection, Split

if TYPE_CHECKING:
    from actstore.store import Store

__all__ = ["TokenLoader"]

BLOCK = 256
"""Rows normalised at a time: they stay in the second-level cache."""

_DTYPES = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}


class TokenLoader:
    """Iterable over shuffled batches of tensors, for ever or for some epochs.

    Iterating goes on where the last iteration, or `load_state_dict`, left off.

    Parameters
    ----------
    store, sites, batch_size, tokens, positions, items, seed, check
        As in `actstore.reader.batches`.
    epochs
        Epochs to give out; None goes on for ever.
    device
        Where the tensors are.
    dtype
        Of the activations: float32, float16, bfloat16 or float64.
    normalize
        ``"center"``, ``"standard"`` or ``"rms"`` from the store's statistics (see
        `actstore.normalise`), or shift and scale [sum d]; None leaves values as they are.
    streams, rank, world
        Canonical streams (by default the world size) and this process's share of them.
    drop_last
        Leave out the short batch at the end of an epoch.

    Raises
    ------
    KeyError, ValueError
        When what is asked for is not there.
    """

    def __init__(
        self,
        store: "Store",
        sites: str | Sequence[str],
        batch_size: int,
        *,
        tokens: str | Sequence[str] | None = None,
        positions: Sequence[int] | None = None,
        items: Split | Int[np.ndarray, " n"] | None = None,
        seed: int = 0,
        epochs: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        normalize: str | tuple[Any, Any] | None = None,
        streams: int | None = None,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
        check: bool = False,
    ) -> None:
        self.selection = Selection(store, sites, tokens=tokens, positions=positions, items=items)
        self.seed, self.batch_size, self.epochs = seed, batch_size, epochs
        self.device, self.dtype = torch.device(device), dtype
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating point type, not {dtype}")
        streams = world if streams is None else streams
        self._streams = streams
        self._mine = streams_of(rank, world, streams)
        self._order_of = epochs_of(self.selection, batch_size, seed=seed, streams=streams)
        order = self._order_of(0)
        self.rows = order.rows
        """Rows of an epoch, over all ranks."""
        short = order.rows % batch_size != 0
        self._skip_short = drop_last and short and order.batches > 1
        self._in_epoch = order.batches
        self.slices = self.selection.slices
        """Channels of each site."""
        self.width = self.selection.width
        """Channels of all sites together."""
        self._affine = self._normalisation(store, normalize)
        self._check = check
        self._batch = 0

    def _normalisation(
        self, store: "Store", how: str | tuple[Any, Any] | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if how is None:
            return None
        pair = (
            affine(store, self.selection.sites, self.selection.kinds, how)
            if (isinstance(how, str))
            else how
        )
        shift, scale = (
            torch.as_tensor(v, dtype=torch.float32, device=self.device).expand(self.width)
            for v in pair
        )
        return shift, scale

    def __len__(self) -> int:
        """Return the batches of one epoch."""
        return self._in_epoch - self._skip_short

    @property
    def batch(self) -> int:
        """Global number of the next batch, counted over all epochs."""
        return self._batch

    @property
    def epoch(self) -> int:
        """Epoch of the next batch."""
        return self._batch // len(self)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the next batch, and what it counts batches of."""
        return {"batch": self._batch, "order": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at the batch of a state.

        Raises
        ------
        ValueError
            When the state counts batches of another order; the message names what differs.
        """
        mine = self._identity()
        theirs = state["order"]
        if differ := [k for k in mine if mine[k] != theirs.get(k)]:
            detail = "; ".join(f"{k}: {theirs.get(k)} -> {mine[k]}" for k in differ)
            raise ValueError(
                f"the state belongs to another order of batches (state -> loader): {detail}; "
                "build the loader as the one that wrote the state"
            )
        self._batch = int(state["batch"])

    def _identity(self) -> dict[str, Any]:
        """Return all that the order of batches depends on, as JSON types."""
        return {
            "store": self.selection.store.fingerprint,
            "sites": list(self.selection.sites),
            "tokens": list(self.selection.kinds),
            "selected": self.selection.digest,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "streams": self._streams,
            "batches": len(self),
        }

    def _run(self, make: Allocate, after_fill: Any) -> Run:
        last = None if self.epochs is None else self.epochs * len(self)
        return Run(
            self.selection,
            self._order_of,
            streams=self._mine,
            first=self._batch,
            last=last,
            per_epoch=len(self),
            check=self._check,
            make=make,
            after_fill=after_fill,
        )

    @property
    def memory_bytes(self) -> int:
        """Bytes of the pools of this rank, what reading holds besides single batches."""
        return self._run(allocate, None).memory_bytes

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the present one on."""
        if self.device.type == "cuda":
            sink: Any = _DeviceSink(self.selection, self.device, self.dtype, self._affine)
            run = self._run(_pinned, sink.upload)
        else:
            sink = _HostSink(self.selection, self.device, self.dtype, self._affine)
            run = self._run(allocate, None)
        batches = run.batches(sink)
        try:
            for batch in batches:
                self._batch += 1
                yield batch
        finally:
            batches.close()


def _as_stored(values: np.ndarray, dtype: str) -> torch.Tensor:
    """Return pool values as a tensor that shares their memory."""
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


class _HostSink:
    """Converts on the CPU; another device than CUDA gets a copy."""

    def __init__(
        self,
        selection: Selection,
        device: torch.device,
        dtype: torch.dtype,
        pair: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        self._slices, self._stored = selection.slices, selection.store.manifest.dtype
        self._widen = dequantiser(selection)
        self._device, self._dtype = device, dtype
        self._affine = None if pair is None else (pair[0].cpu(), pair[1].cpu())
        bits = np.uint16 if dtype is torch.bfloat16 else _DTYPES[dtype]
        same = str(dtype) == f"torch.{self._stored}"
        self._lends = same and pair is None and device.type == "cpu"
        self._recycler = Recycler(selection.width, bits)

    def begin(self, rows: int) -> None:
        """See `actstore.batching.Sink.begin`."""
        acts = torch.from_numpy(self._recycler.get(rows))
        self._acts = acts.view(torch.bfloat16) if self._dtype is torch.bfloat16 else acts
        self._item = torch.empty(rows, dtype=torch.int64)
        self._token = torch.empty(rows, dtype=torch.int32)

    def take(self, buffer: Buffer, start: int, stop: int, first: int) -> None:
        """See `actstore.batching.Sink.take`."""
        last = first + stop - start
        values = _as_stored(buffer.values[start:stop], self._stored)
        out = self._acts[first:last]
        if self._affine is None and self._widen is None:
            out.copy_(values)
        else:
            for at in range(0, len(out), BLOCK):
                block = values[at : at + BLOCK]
                if self._widen is not None:
                    token = buffer.token[start + at : min(stop, start + at + BLOCK)]
                    block = torch.from_numpy(self._widen(block.numpy(), token))
                if self._affine is not None:
                    shift, scale = self._affine
                    block = torch.sub(block.to(torch.float32), shift).mul_(scale)
                out[at : at + BLOCK].copy_(block)
        self._item[first:last] = torch.from_numpy(buffer.item[start:stop])
        self._token[first:last] = torch.from_numpy(buffer.token[start:stop])

    def finish(self) -> Batch:
        """See `actstore.batching.Sink.finish`."""
        acts, item, token = (
            v if self._device.type == "cpu" else v.to(self._device)
            for v in (self._acts, self._item, self._token)
        )
        del self._acts, self._item, self._token
        return Batch(acts=acts, item=item, token=token, slices=self._slices)

    def lend(self, buffer: Buffer, start: int, stop: int) -> Batch | None:
        """See `actstore.batching.Sink.lend`."""
        if not self._lends or not buffer.lendable:
            return None
        return Batch(
            acts=_as_stored(buffer.values[start:stop], self._stored),
            item=torch.from_numpy(buffer.item[start:stop].copy()),
            token=torch.from_numpy(buffer.token[start:stop].copy()),
            slices=self._slices,
        )


def _pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """Return page-locked memory, which a device copies from without a detour."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    pinned: np.ndarray = raw.view(dtype).reshape(shape)
    return pinned


class _DeviceSink:
    """Cuts on a CUDA device, from copies of whole pools made by the reading thread."""

    def __init__(
        self,
        selection: Selection,
        device: torch.device,
        dtype: torch.dtype,
        pair: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        self._slices, self._stored = selection.slices, selection.store.manifest.dtype
        self._device, self._dtype, self._affine = device, dtype, pair
        widen = dequantiser(selection)
        self._table = None if widen is None else torch.from_numpy(widen.table).to(device)
        self._kind_of = None if widen is None else torch.from_numpy(widen.kind_of).to(device)
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def upload(self, buffer: Buffer) -> None:
        """Copy a filled pool to the device on the prefetch stream."""
        n = buffer.rows
        host = [_as_stored(buffer.values[:n], self._stored)]
        host += [torch.from_numpy(buffer.item[:n]), torch.from_numpy(buffer.token[:n])]
        if self._stream is None:
            buffer.extra = ([v.to(self._device, copy=True) for v in host], None)
            return
        with torch.cuda.stream(self._stream):
            copies = [v.to(self._device, non_blocking=True) for v in host]
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._stream)
        buffer.extra = (copies, done)
        done.synchronize()  # the reading thread may fill this memory again

    def begin(self, rows: int) -> None:
        """See `actstore.batching.Sink.begin`."""
        self._acts: list[torch.Tensor] = []
        self._item: list[torch.Tensor] = []
        self._token: list[torch.Tensor] = []

    def take(self, buffer: Buffer, start: int, stop: int, first: int) -> None:
        """See `actstore.batching.Sink.take`."""
        copies, done = buffer.extra
        if done is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(done)
            for copy in copies:
                copy.record_stream(stream)
        values, item, token = copies
        self._acts.append(values[start:stop])
        self._item.append(item[start:stop])
        self._token.append(token[start:stop])

    def finish(self) -> Batch:
        """See `actstore.batching.Sink.finish`."""
        acts = torch.cat(self._acts)
        if self._table is not None and self._kind_of is not None:
            acts = acts * self._table[self._kind_of[torch.cat(self._token).long()]]
        if self._affine is not None:
            shift, scale = self._affine
            acts = acts.float().sub_(shift).mul_(scale)
        return Batch(
            acts=acts.to(self._dtype),
            item=torch.cat(self._item),
            token=torch.cat(self._token),
            slices=self._slices,
        )

    def lend(self, buffer: Buffer, start: int, stop: int) -> None:
        """Lend nothing: slices of a copy would keep the whole of it on the device."""
