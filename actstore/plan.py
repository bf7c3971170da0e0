"""Plan a harvest as pure data: parts, bytes on disk, memory, before anything is computed."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from actstore import layout
from actstore.manifest import ITEM_SIZE, ArraySpec, Manifest
from vitmodels.spec import SiteInfo

LOCAL_STRIPE = 400_000
"""Bytes of a stripe aimed at on a local disk."""

REMOTE_STRIPE = 1_500_000
"""Least bytes of a stripe on an object store."""

REMOTE_AIM = 6_000_000
"""Bytes of a stripe aimed at on an object store: a request costs it as much as some megabytes."""

REMOTE_TOKENS = 8
"""Tokens of a stripe beyond which only `REMOTE_STRIPE` is aimed at: pools grow with them."""

MIN_PARTS = 16
"""Parts a store has at least, if it has as many items: mixing needs several."""

SLACK = 160 << 20
"""Bytes allowed for allocators, threads and libraries beside what is counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a harvest is about to do."""

    manifest: Manifest
    """Description of the store."""
    resumed: bool
    """Whether the layout was taken from a store that is already there."""
    disk: int
    """Bytes the finished store takes, without its small files."""
    memory: int
    """Projected peak of the memory of this process, in bytes."""
    buffers: int
    """Part buffers held at a time."""
    forward_memory: int
    """Part of `memory` that the forward pass takes on the CPU, in bytes."""

    def check(self, *, free_disk: int | None, free_memory: int, done: int = 0) -> None:
        """Refuse a plan that does not fit.

        Parameters
        ----------
        free_disk
            Free bytes where the store goes; None when it is not known.
        free_memory
            Bytes this process may grow to, its present size included.
        done
            Bytes of the store that are already written.

        Raises
        ------
        ValueError
            Saying what is needed, what there is, and which option helps.
        """
        m = self.manifest
        needed = max(0, self.disk - done)
        if free_disk is not None and needed > free_disk:
            raise ValueError(
                f"the store needs {size(needed)} on disk, {size(free_disk)} are free: fewer "
                "--sites, --tokens cls, a smaller --limit, or another --out"
            )
        if self.memory > free_memory:
            raise ValueError(
                f"the harvest needs up to {size(self.memory)} of memory, {size(free_memory)} are "
                f"available: a smaller --batch-size (now {m.compute.get('batch_size')}), fewer "
                "--sites, or a smaller --memory for the parts"
            )


def keep_some(arrays: Sequence[ArraySpec], tokens_per_item: int) -> list[ArraySpec]:
    """Return the arrays with `tokens_per_item` of the patches of each item.

    Raises
    ------
    ValueError
        When sites have no patches, fewer, or not equally many.
    """
    counts = {a.tokens for a in arrays if a.kind == "patch"}
    if len(counts) != 1 or not 1 <= tokens_per_item <= max(counts):
        found = " or ".join(map(str, sorted(counts))) or "no"
        raise ValueError(
            f"tokens_per_item {tokens_per_item}: these sites have {found} patch tokens an item; "
            "it chooses among the patches, whose number must be that of every site"
        )
    return [
        dataclasses.replace(a, tokens=tokens_per_item, of=a.tokens)
        if a.kind == "patch" and a.tokens > tokens_per_item
        else a
        for a in arrays
    ]


def site_arrays(
    name: str, info: SiteInfo, tokens: Sequence[str], stripe_tokens: int = 1
) -> list[ArraySpec]:
    """Return the arrays of one site: a kind each, or one of kind ``item`` without token axis."""
    if info.token_axis is None or info.grid is None:
        return [ArraySpec(site=name, kind="item", tokens=1, channels=info.width)]
    arrays = []
    for kind in info.grid.kinds:
        if kind in tokens:
            where = info.grid.slice(kind)
            arrays.append(
                ArraySpec(
                    site=name,
                    kind=kind,
                    tokens=where.stop - where.start,
                    channels=info.width,
                    first=where.start,
                )
            )
    return arrays


def choose_arrays(sites: Mapping[str, SiteInfo], tokens: Sequence[str]) -> list[ArraySpec]:
    """Return the arrays of all sites.

    Raises
    ------
    ValueError
        When a kind is unknown, or a site has none of the kinds asked for.
    """
    present = {kind for info in sites.values() for kind in info.kinds}
    for kind in tokens:
        if kind not in present and kind not in ("cls", "register", "patch", "item"):
            raise ValueError(f"unknown token kind {kind!r}; these sites have {sorted(present)}")
    arrays = []
    for name, info in sites.items():
        found = site_arrays(name, info, tokens)
        if not found:
            raise ValueError(
                f"site {name} has tokens of kind {', '.join(info.kinds)}, none of "
                f"--tokens {','.join(tokens)}"
            )
        arrays += found
    return arrays


def choose_layout(
    arrays: Sequence[ArraySpec],
    *,
    items: int,
    dtype: str,
    budget: int,
    remote: bool = False,
    buffers: int = 2,
) -> tuple[int, list[ArraySpec]]:
    """Return S and the arrays with their stripes.

    S gives the largest array stripes of about the aim with t = 1, leaves at least `MIN_PARTS`
    parts, and keeps `buffers` parts within `budget` bytes. Where the budget or the medium asks
    for it, stripes take t > 1 tokens. Parts are made equally long, give or take one item.
    """
    width = ITEM_SIZE[dtype]
    widest = max(arrays, key=lambda a: a.tokens * a.channels)
    item_bytes = sum(a.tokens * a.channels for a in arrays) * width
    aim = REMOTE_AIM / _some_tokens(widest) if remote else LOCAL_STRIPE
    wanted = max(1, round(aim / (widest.channels * width)))
    fitting = max(1, budget // (buffers * item_bytes))
    size_ = part_items(items, min(wanted, fitting))
    if not remote and fitting >= wanted:
        return size_, list(arrays)
    out = []
    for array in arrays:
        one = size_ * array.channels * width
        least = LOCAL_STRIPE // 2
        if remote:
            least = min(REMOTE_AIM, max(REMOTE_STRIPE, _some_tokens(array) * one))
        t = next((t for t in _divisors(array.tokens) if t * one >= least), array.tokens)
        out.append(dataclasses.replace(array, stripe_tokens=t))
    return size_, out


def part_items(items: int, wanted: int) -> int:
    """Return S at most `wanted`, with at least `MIN_PARTS` parts, all about equally long."""
    least = min(MIN_PARTS, items)
    found = -(-items // max(least, -(-items // wanted)))
    return found if -(-items // found) >= least else found - 1


def _some_tokens(array: ArraySpec) -> int:
    """Return how many tokens a stripe on an object store may take without a larger pool."""
    return max(t for t in _divisors(array.tokens) if t <= REMOTE_TOKENS)


def _divisors(n: int) -> list[int]:
    return [t for t in range(1, n + 1) if n % t == 0]


def disk_bytes(manifest: Manifest) -> int:
    """Return the bytes of all shards of the raw profile, to the byte."""
    return manifest.n_parts * sum(layout.shard_bytes(manifest, a) for a in manifest.arrays)


def part_bytes(manifest: Manifest) -> int:
    """Return the bytes of a part in memory."""
    return sum(a.n_stripes * layout.stripe_bytes(manifest, a) for a in manifest.arrays)


def forward_bytes(
    spec: Any, sites: Mapping[str, SiteInfo], batch_size: int, input_items: int
) -> int:
    """Return a bound of the memory of one forward pass and of the inputs read ahead.

    Counted in float32: the input batches, a block's intermediate values (8 d_model and 3 d_mlp a
    token, two attention matrices a head where a site asks for them), and every site's value
    twice (as the model gives it and as it is stored).
    """
    tokens = spec.grid.n_tokens
    pixels = 1
    for n in spec.input_shape:
        pixels *= n
    explicit = any({"query", "key"} & set(info.axes) for info in sites.values())
    attention = 2 * spec.n_heads * tokens**2 if explicit else 0
    block = tokens * (8 * spec.d_model + 3 * spec.d_mlp) + attention
    values = 0
    for info in sites.values():
        count = 1
        for n in info.shape:
            count *= n
        values += count
    total: int = 4 * (batch_size * (block + 2 * values + 3 * pixels) + input_items * 4 * pixels)
    return total


def size(n: int) -> str:
    """Return bytes as people read them: ``3.2 GB``."""
    value = float(n)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")
