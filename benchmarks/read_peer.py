"""One loader of ``read_peers.py``: runs under its own interpreter, one line in, one line out.

``read_peer.py NAME FOLDER ITEMS PATCHES CHANNELS BATCH``. FOLDER holds ``values.f16``, float16
[item, patch, channel] in the order of the data set, and the product's store ``acts.zarr`` of the
same values. A line is the number of an epoch; the answer is JSON: seconds (wall and CPU), rows,
for every whole batch the mean image, the mean position and the number of distinct images, and
the largest resident memory that is no file, of this process and its workers, above that before.
Loaders with worker processes are slow: they read `MOST` batches of an epoch, and their clock
starts at the first one, so that starting the workers does not count.

Every loader is used as its own documentation does for training: shuffled, batches of tensors or
arrays, the image and position of each row beside its values.
"""

import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MOST = 8
"""Batches of an epoch that a loader with worker processes reads."""

WORKERS = ("saev", "litdata")
"""Loaders with worker processes."""


class Setting(NamedTuple):
    """What there is to read."""

    folder: Path
    items: int
    patches: int
    channels: int
    batch: int

    def values(self) -> np.ndarray:
        """Return all values, mapped."""
        shape = (self.items, self.patches, self.channels)
        return np.memmap(self.folder / "values.f16", mode="r", dtype=np.float16, shape=shape)


Rows = Iterator[tuple[Any, Any, Any]]
"""Values [B, channel], image [B] and position [B] of batch after batch."""

Epoch = Callable[[int], Rows]


def ours(setting: Setting, dtype: str | None = None) -> Epoch:
    """Read with the product: arrays in the stored dtype, or tensors of another."""
    import actstore

    store = actstore.open(setting.folder / "acts.zarr")
    site = store.sites[0]
    table = store.table()
    source = np.zeros(store.manifest.items, dtype=np.int64)
    source[table["position"].to_numpy()] = table["source"].to_numpy()

    def arrays(epoch: int) -> Rows:
        from actstore.reader import batches

        for b in batches(store, site, setting.batch, tokens="patch", seed=1, epoch=epoch):
            yield b.acts, source[b.item], b.token

    def tensors(epoch: int) -> Rows:
        import torch

        from actstore.loader import TokenLoader

        kind = getattr(torch, str(dtype))
        loader = TokenLoader(
            store, site, setting.batch, tokens="patch", seed=epoch, epochs=1, dtype=kind
        )
        for b in loader:
            yield b.acts, source[b.item.numpy()], b.token.numpy()

    return tensors if dtype else arrays


def saev(setting: Setting) -> Epoch:
    """Read with saev 0.1.0: a memory map of float32, tokens in uniformly random order."""
    import torch
    from saev import activations, config

    root = setting.folder / "saev"
    if not root.exists():
        root.mkdir()
        shape = (setting.items, 1, setting.patches + 1, setting.channels)
        out = np.memmap(root / "acts000000.bin", mode="w+", dtype=np.float32, shape=shape)
        out[:, 0, 1:] = setting.values()
        out.flush()
        activations.Metadata(
            vit_family="clip",
            vit_ckpt="none",
            layers=(0,),
            n_patches_per_img=setting.patches,
            cls_token=True,
            d_vit=setting.channels,
            seed=0,
            n_imgs=setting.items,
            n_patches_per_shard=setting.items * (setting.patches + 1),
            data="synthetic",
        ).dump(str(root / "metadata.json"))
    told = config.DataLoad(
        shard_root=str(root), patches="patches", layer=0, scale_mean=False, scale_norm=False
    )
    data = activations.Dataset(told)

    def epoch(number: int) -> Rows:
        generator = torch.Generator().manual_seed(number)
        for b in torch.utils.data.DataLoader(
            data, batch_size=setting.batch, shuffle=True, generator=generator, num_workers=2
        ):
            yield b["act"], b["image_i"].numpy(), b["patch_i"].numpy()

    return epoch


class _Samples:
    """Makes the samples of an item, in litdata's writer processes."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def __call__(self, item: int) -> Iterator[dict[str, Any]]:
        import torch

        for position, value in enumerate(torch.from_numpy(self._setting.values()[item].copy())):
            yield {"act": value.clone(), "image": item, "position": position}


def litdata(setting: Setting) -> Epoch:
    """Read with Lightning's litdata: a sample is a token, chunks of 64 MB, its loader."""
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    root = setting.folder / "litdata"
    if not (root / "index.json").exists():
        optimize(
            fn=_Samples(setting),
            inputs=list(range(setting.items)),
            output_dir=str(root),
            chunk_bytes="64MB",
            num_workers=2,
        )

    def epoch(number: int) -> Rows:
        data = StreamingDataset(str(root), shuffle=True, seed=number)
        for b in StreamingDataLoader(data, batch_size=setting.batch, num_workers=2):
            yield b["act"], b["image"].numpy(), b["position"].numpy()

    return epoch


def zarr(setting: Setting) -> Epoch:
    """Read pools of 64 chunks of 8 images in random order by zarr-python, and permute them."""
    import zarr as library

    root = setting.folder / "chunks.zarr"
    if not root.exists():
        shape = (setting.items, setting.patches, setting.channels)
        library.create_array(
            root, shape=shape, chunks=(8, *shape[1:]), dtype="float16", compressors=None
        )[:] = setting.values()
    array = library.open_array(root, mode="r")
    chunks = -(-setting.items // 8)

    def epoch(number: int) -> Rows:
        rng = np.random.default_rng(number)
        order = rng.permutation(chunks)
        rest: list[np.ndarray] = []
        ids: list[np.ndarray] = []
        for start in range(0, chunks, 64):
            for chunk in order[start : start + 64].tolist():
                block = np.asarray(array[8 * chunk : 8 * chunk + 8])
                rest.append(block.reshape(-1, setting.channels))
                first = 8 * chunk * setting.patches
                ids.append(np.arange(first, first + len(rest[-1])))
            values, row = np.concatenate(rest), np.concatenate(ids)
            mixed = rng.permutation(len(row))
            whole = len(row) if start + 64 >= chunks else len(row) // setting.batch * setting.batch
            for at in range(0, whole, setting.batch):
                some = mixed[at : min(at + setting.batch, whole)]
                yield values[some], row[some] // setting.patches, row[some] % setting.patches
            rest, ids = [values[mixed[whole:]]], [row[mixed[whole:]]]

    return epoch


def annbatch(setting: Setting) -> Epoch:
    """Read with annbatch: rows shuffled once on disk, then pools of 512 runs of 32 rows.

    That is what its documentation advises for dense values: preshuffled, chunks as long as the
    runs, uncompressed shards, read by zarrs.
    """
    import zarr as library
    from annbatch import Loader

    library.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    root = setting.folder / "annbatch.zarr"
    rows = setting.items * setting.patches
    row = np.random.default_rng(0).permutation(rows)
    if not root.exists():
        shard = min(1 << 15, -(-rows // 32) * 32)
        values = setting.values().reshape(rows, setting.channels)
        array = library.create_array(
            root,
            shape=values.shape,
            chunks=(32, setting.channels),
            shards=(shard, setting.channels),
            dtype="float16",
            compressors=None,
        )
        for start in range(0, rows, shard):
            array[start : start + shard] = values[row[start : start + shard]]
    data = library.open_array(root, mode="r")

    def epoch(number: int) -> Rows:
        loader = Loader(
            batch_size=setting.batch,
            chunk_size=32,
            preload_nchunks=512,
            shuffle=True,
            return_index=True,
            rng=np.random.default_rng(number),
        )
        for b in loader.add_dataset(data):
            found = row[np.asarray(b["index"])]
            yield b["X"], found // setting.patches, found % setting.patches

    return epoch


LOADERS: dict[str, Callable[[Setting], Epoch]] = {
    "actstore": ours,
    "actstore-float32": lambda setting: ours(setting, "float32"),
    "saev": saev,
    "litdata": litdata,
    "zarr": zarr,
    "annbatch": annbatch,
}


def family(file: str) -> Iterator[str]:
    """Yield a file of /proc of this process and its children."""
    todo = [os.getpid()]
    while todo:
        pid = todo.pop()
        try:
            text = Path(f"/proc/{pid}/{file}").read_text()
            todo += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        except OSError:  # a worker that has just ended
            continue
        yield text


def resident() -> int:
    """Return resident bytes that are no file."""
    lines = (line for text in family("status") for line in text.splitlines())
    rss = (line for line in lines if line.startswith(("RssAnon", "RssShmem")))
    return sum(int(line.split()[1]) * 1024 for line in rss)


def spent() -> float:
    """Return CPU seconds, those of children that have ended included."""
    fields = (text.rpartition(")")[2].split() for text in family("stat"))
    return sum(sum(map(int, f[11:15])) for f in fields) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Answer until the input ends."""
    name, folder, *numbers = sys.argv[1:]
    setting = Setting(Path(folder), *map(int, numbers))
    epoch = LOADERS[name](setting)
    print("ready", flush=True)
    for line in sys.stdin:
        gc.collect()
        before = resident()
        peak, stop = [before], threading.Event()

        def watch(peak: list[int] = peak, stop: threading.Event = stop) -> None:
            while not stop.wait(0.02):
                peak[0] = max(peak[0], resident())

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        begin, cpu = time.perf_counter(), spent()
        rows, marks = 0, []
        slow = name in WORKERS
        batches = epoch(int(line))
        for i, (values, image, position) in enumerate(batches):
            if slow and i == 0:
                begin, cpu = time.perf_counter(), spent()
                continue
            rows += len(values)
            if len(values) == setting.batch:
                mark = (float(image.mean()), float(position.mean()), len(np.unique(image)))
                marks.append(mark)
            if slow and i == MOST:
                break
        wall, cpu = time.perf_counter() - begin, spent() - cpu
        del batches  # ends the workers
        stop.set()
        watcher.join()
        told = {"seconds": wall, "cpu": cpu, "rows": rows, "marks": marks}
        print("result " + json.dumps({**told, "memory": peak[0] - before}), flush=True)


if __name__ == "__main__":
    main()
