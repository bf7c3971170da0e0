import math

import pytest
from fake_model import GRID, FakeModel
from hypothesis import given
from hypothesis import strategies as st

from actstore.manifest import ITEM_SIZE, ArraySpec, Manifest
from actstore.plan import LOCAL_STRIPE, Plan, choose_arrays, choose_layout, disk_bytes, size


def plan(**changes) -> Plan:
    array = ArraySpec(site="a", kind="cls", tokens=1, channels=8)
    manifest = Manifest(items=10, items_per_part=5, arrays=(array,), compute={"batch_size": 16})
    fields = {"manifest": manifest, "resumed": False, "disk": 1000, "memory": 5000, "buffers": 2}
    return Plan(**{**fields, "forward_memory": 0, **changes})


def test_a_plan_that_does_not_fit_the_disk_is_refused():
    with pytest.raises(ValueError, match=r"needs 1.0 kB on disk, 999 B are free: fewer --sites"):
        plan().check(free_disk=999, free_memory=10**6)
    plan().check(free_disk=1000, free_memory=10**6)
    plan().check(free_disk=400, free_memory=10**6, done=600)
    plan().check(free_disk=None, free_memory=10**6)


def test_a_plan_that_does_not_fit_the_memory_is_refused():
    message = r"up to 5.0 kB of memory, 4.0 kB are available: a smaller --batch-size \(now 16\)"
    with pytest.raises(ValueError, match=message):
        plan().check(free_disk=None, free_memory=4000)


def test_arrays_of_sites():
    sites = FakeModel().sites()
    chosen = {name: sites[name] for name in ("blocks.1.resid_post", "blocks.1.pattern", "logits")}
    arrays = choose_arrays(chosen, ["cls", "patch"])
    found = [(a.site, a.kind, a.tokens, a.channels, a.first) for a in arrays]
    n = GRID.n_tokens
    assert found == [
        ("blocks.1.resid_post", "cls", 1, 12, 0),
        ("blocks.1.resid_post", "patch", 25, 12, 3),
        ("blocks.1.pattern", "cls", 1, 2 * n, 0),
        ("blocks.1.pattern", "patch", 25, 2 * n, 3),
        ("logits", "item", 1, 10, 0),
    ]


def test_token_kinds_that_are_not_there():
    sites = {"blocks.1.resid_post": FakeModel().sites()["blocks.1.resid_post"]}
    with pytest.raises(ValueError, match=r"unknown token kind 'patches'; these sites have"):
        choose_arrays(sites, ["patches"])
    with pytest.raises(
        ValueError, match=r"tokens of kind cls, register, patch, none of --tokens item"
    ):
        choose_arrays(sites, ["item"])


def test_the_default_layout_of_a_large_store():
    array = ArraySpec(site="a", kind="patch", tokens=196, channels=768)
    per_part, (laid,) = choose_layout([array], items=8192, dtype="float16", budget=8 << 30)
    stripe = per_part * 768 * 2
    assert laid.stripe_tokens == 1
    assert 0.9 * LOCAL_STRIPE < stripe <= 1.05 * LOCAL_STRIPE


def test_small_sets_have_sixteen_parts():
    array = ArraySpec(site="a", kind="patch", tokens=25, channels=64)
    assert choose_layout([array], items=5000, dtype="float16", budget=1 << 30)[0] == 313
    assert choose_layout([array], items=10, dtype="float16", budget=1 << 30)[0] == 1


def test_stripes_on_an_object_store_are_large():
    array = ArraySpec(site="a", kind="patch", tokens=196, channels=768)
    per_part, (laid,) = choose_layout(
        [array], items=100_000, dtype="float16", budget=8 << 30, remote=True
    )
    assert per_part * laid.stripe_tokens * 768 * 2 >= 1_500_000
    assert laid.stripe_tokens < 8


@given(
    items=st.one_of(st.integers(1, 300), st.integers(1, 10**9)),
    tokens=st.integers(1, 600),
    channels=st.integers(1, 4096),
    sites=st.integers(1, 12),
    dtype=st.sampled_from(["float16", "float32"]),
    budget=st.integers(10**6, 10**10),
    remote=st.booleans(),
)
def test_layouts_keep_the_budget(items, tokens, channels, sites, dtype, budget, remote):
    arrays = [
        ArraySpec(site=f"s{i}", kind="patch", tokens=tokens, channels=channels)
        for i in range(sites)
    ]
    per_part, laid = choose_layout(arrays, items=items, dtype=dtype, budget=budget, remote=remote)
    one = sites * tokens * channels * ITEM_SIZE[dtype]
    assert per_part == 1 or 2 * per_part * one <= budget
    parts = math.ceil(items / per_part)
    assert parts >= min(16, items)
    assert parts * per_part - items < parts
    assert all(a.tokens % a.stripe_tokens == 0 for a in laid)


def test_disk_bytes_are_those_of_the_shards(tmp_path):
    import numpy as np

    import actstore

    values = {"a": {"cls": np.ones((23, 1, 8), np.float32), "patch": np.ones((23, 6, 8), "f4")}}
    store = actstore.write_arrays(tmp_path / "s", values, items_per_part=5)
    files = [p for p in (tmp_path / "s" / "acts").rglob("c.*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) == disk_bytes(store.manifest)


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (3e9, "3.0 GB"), (5e15, "5000.0 TB")],
)
def test_size(n, text):
    assert size(int(n)) == text
