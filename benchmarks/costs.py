"""What data sets cost as stores: bytes, objects, requests under each profile, by the plan itself.

    python -m benchmarks.costs            prints the tables of docs/scaling.md
    python -m benchmarks.costs --write    writes them into it

Nothing is measured here but the share that the archive profile keeps; the rest is what
`choose_layout` plans and the writer does. A test compares the document with this output.
"""

import argparse
import dataclasses
from pathlib import Path

from actstore import layout
from actstore.manifest import ArraySpec, Manifest
from actstore.plan import choose_layout, size
from actstore.remote import PUT_CHUNK
from benchmarks.measure import table

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"

BEGIN, END = "<!-- costs: python -m benchmarks.costs --write -->", "<!-- end of costs -->"

SETS = {"ImageNet-1k train": 1_281_167, "LAION-400M": 407_000_000}
"""Data set -> items."""

ARCHIVE = 0.755
"""Share of their bytes that bfloat16 stripes keep under zstd (measured: 0.74 to 0.77)."""

BUDGET = 8 << 30
"""Bytes for the two part buffers of a harvest."""

SMALL = 3
"""Objects of a part beside its shards: statistics and checksums, index rows, commit record."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """A way to store one site of a ViT-B/16: 196 patches and CLS of 768 channels."""

    name: str
    """What the table calls it."""
    dtype: str = "float16"
    """Activation dtype."""
    codec: str = "raw"
    """Codec profile."""
    remote: bool = True
    """Whether it lies on an object store."""
    patches: int = 196
    """Patch tokens kept of an item; 0 for CLS alone."""


PROFILES = (
    Profile(name="raw, local", remote=False),
    Profile(name="raw, S3"),
    Profile(name="archive, S3", dtype="bfloat16", codec="archive"),
    Profile(name="int8, S3", dtype="int8"),
    Profile(name="raw, S3, 32 patches of 196", patches=32),
    Profile(name="raw, S3, CLS alone", patches=0),
)


def plan(profile: Profile, items: int) -> Manifest:
    """Return the store that a harvest would plan."""
    arrays = [ArraySpec(site="blocks.6.resid_post", kind="cls", tokens=1, channels=768)]
    if profile.patches:
        arrays.append(
            ArraySpec(
                site="blocks.6.resid_post",
                kind="patch",
                tokens=profile.patches,
                channels=768,
                first=1,
            )
        )
    per_part, laid = choose_layout(
        arrays, items=items, dtype=profile.dtype, budget=BUDGET, remote=profile.remote
    )
    return Manifest(items=items, items_per_part=per_part, arrays=tuple(laid))


def costs(profile: Profile, items: int) -> dict[str, object]:
    """Return one row: what a store takes and what writing and reading it once ask for."""
    manifest = dataclasses.replace(plan(profile, items), dtype=profile.dtype)
    share = ARCHIVE if profile.codec == "archive" else 1.0
    shards = [round(share * layout.shard_bytes(manifest, a)) for a in manifest.arrays]
    if 0 < profile.patches < 196:  # which tokens of an item these are, as int32
        shards.append(4 * profile.patches * manifest.items_per_part)
    largest = max(manifest.arrays, key=lambda a: a.n_stripes * a.stripe_tokens)
    stripe = share * layout.stripe_bytes(manifest, largest)
    tokens = largest.stripe_tokens
    row: dict[str, object] = {
        "profile": profile.name,
        "bytes": size(manifest.n_parts * sum(shards)),
        "items of a part": f"{manifest.items_per_part:,}",
        "parts": f"{manifest.n_parts:,}",
        "objects": f"{manifest.n_parts * (len(shards) + SMALL):,}",
        "stripe": f"{size(round(stripe))}, {tokens} token{'s' * (tokens > 1)}",
    }
    puts = sum(1 if n <= PUT_CHUNK else -(-n // PUT_CHUNK) + 2 for n in shards) + SMALL
    reads = sum(a.n_stripes for a in manifest.arrays)
    return {
        **row,
        "PUTs": f"{manifest.n_parts * puts:,}" if profile.remote else "-",
        "reads an epoch": f"{manifest.n_parts * reads:,}",
    }


def text() -> str:
    """Return the tables of the document."""
    parts = []
    for name, items in SETS.items():
        rows = [costs(profile, items) for profile in PROFILES]
        parts.append(f"**{name}**, {items:,} items\n\n{table(rows)}\n")
    return "\n".join(parts)


def replaced(document: str) -> str:
    """Return the document with the tables as they are now."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{DOCUMENT} lacks the lines {BEGIN!r} and {END!r}")
    return f"{before}{begin}\n{text()}{end}{after}"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the tables into the document")
    if parser.parse_args().write:
        DOCUMENT.write_text(replaced(DOCUMENT.read_text()))
    else:
        print(text())


if __name__ == "__main__":
    main()
