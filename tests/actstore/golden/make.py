"""Make the golden stores of the present format, one zip file each.

    python tests/actstore/golden/make.py tests/actstore/golden/format1

Run it for a new format only: stores of a released format stay as they are, for they prove that
old stores can be read.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

import actstore
from actstore.convert import convert
from actstore.manifest import ArraySpec, Manifest
from actstore.pipeline import PartPipeline
from actstore.storage import open_storage
from actstore.store import Store, create_store
from actstore.subsample import deal_part

SITE = "blocks.1.resid_post"
ITEMS, SIZE, PATCHES, KEPT, CHANNELS = 9, 4, 6, 2, 4


def values() -> dict[str, np.ndarray]:
    """Return the arrays of the stores: 9 items, one CLS and 6 patch tokens, 4 channels.

    Eighths of integers, so small that sums of squares are exact in any order: statistics and
    scales come out the same on every machine. Exact in float16, not in bfloat16.
    """
    number = np.arange(ITEMS * (1 + PATCHES) * CHANNELS).reshape(ITEMS, 1 + PATCHES, CHANNELS)
    value = ((number * 37) % 401 - 200).astype(np.float32) / 8
    value[..., 3] *= 16  # one channel of large values
    return {"cls": value[:, :1], "patch": value[:, 1:]}


def write(folder: Path, dtype: str) -> Store:
    """Write the arrays as a store of three parts."""
    table = {"key": [f"item {i}" for i in range(ITEMS)], "label": [i % 3 for i in range(ITEMS)]}
    given = {SITE: values()}
    return actstore.write_arrays(
        folder, given, dtype=dtype, items_per_part=SIZE, table=table, seed=5
    )


def subsampled(folder: Path) -> Store:
    """Write two of the six patches of each item, items in the order of the source."""
    cls = ArraySpec(site=SITE, kind="cls", tokens=1, channels=CHANNELS)
    patch = ArraySpec(site=SITE, kind="patch", tokens=KEPT, of=PATCHES, channels=CHANNELS, first=1)
    order = {"kind": "keyed", "seed": 5, "source_items": ITEMS}
    manifest = Manifest(items=ITEMS, items_per_part=SIZE, arrays=(cls, patch), order=order)
    storage = open_storage(folder)
    create_store(storage, manifest)
    given = values()
    with PartPipeline(storage, manifest) as pipeline:
        for part in range(manifest.n_parts):
            buffer = pipeline.next_buffer()
            buffer.positions = deal_part(manifest, part)
            item = np.arange(part * SIZE, part * SIZE + manifest.planned(part))
            chosen = buffer.positions["patch"][: len(item)]
            buffer.append({cls: given["cls"][item], patch: given["patch"][item[:, None], chosen]})
            rows = [{"position": int(i), "source": int(i), "status": "ok"} for i in item]
            pipeline.submit(part, buffer, rows)
    return Store(storage, manifest)


def pack(store: Store, out: Path) -> None:
    """Put a store into a zip file, without its unfinished files."""
    store.compact()
    root = Path(store.url)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(p for p in root.rglob("*") if p.is_file() and p.parent.name != "tmp"):
            archive.writestr(zipfile.ZipInfo(str(path.relative_to(root))), path.read_bytes())


def main(out: Path) -> None:
    """Write every golden store."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bfloat16 = write(folder / "bfloat16", "bfloat16")
        stores = {
            "raw": write(folder / "raw", "float16"),
            "int8": write(folder / "int8", "int8"),
            "archive": convert(bfloat16, folder / "archive", codec="archive"),
            "subsampled": subsampled(folder / "subsampled"),
        }
        for kind, store in stores.items():
            pack(store, out / f"{kind}.zip")
            sys.stdout.write(f"{kind} {store.fingerprint}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
