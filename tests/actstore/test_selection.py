"""Which items and tokens are read: splits, positions, masks, labels, columns."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from readings import build, check_batch

import actstore
from actstore.manifest import ArraySpec
from actstore.reader import batches, sequential
from actstore.selection import Selection, Split


def test_splits_share_no_item_and_leave_none_out(tmp_path: Path) -> None:
    store = build(tmp_path / "a", [20, 20, 20, 7], size=20, widths=(4, 2))
    sets = {}
    for half in ("train", "validation"):
        split = Split(half=half, holdout=0.25, seed=3)
        got = list(batches(store, "s0,s1", 9, items=split))
        pairs = [check_batch(store, b, (4, 2)) for b in got]
        sets[half] = {i for p in pairs for i, _ in p}
        assert sum(map(len, pairs)) == 4 * len(sets[half])
        other = {i for b in sequential(store, "s0", 9, items=split) for i in b.item.tolist()}
        assert other == sets[half]
    assert not sets["train"] & sets["validation"]
    assert sorted(sets["train"] | sets["validation"]) == list(range(67))
    assert len(sets["validation"]) == 16
    again = {
        i
        for b in batches(store, "s1", 9, seed=8, items=Split(half="train", holdout=0.25, seed=4))
        for i in b.item.tolist()
    }
    assert again != sets["train"]


def test_items_by_position_and_mask(tmp_path: Path) -> None:
    store = build(tmp_path / "a", [5, 4, 5], size=5)
    chosen = np.array([13, 0, 6, 7, 1, 0])
    for items in (chosen, np.isin(np.arange(15), chosen), chosen.tolist()):
        got = [check_batch(store, b) for b in batches(store, "s0", 3, items=items, check=True)]
        assert set().union(*got) == set(itertools.product({0, 1, 6, 7, 13}, range(4)))
        assert sum(map(len, got)) == 20
    for items, match in [
        ([9], "position 9 is the first"),
        ([15], "0..14"),
        (np.ones(3, bool), r"\[15\]"),
        (np.array([0.5]), "integer store positions"),
        (np.zeros(15, bool), "nothing to read"),
    ]:
        with pytest.raises(ValueError, match=match):
            batches(store, "s0", 3, items=items)


def test_only_items_of_some_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 5, 60)
    values = np.broadcast_to(label[:, None, None], (60, 3, 2)).astype(np.float32)
    store = actstore.write_arrays(
        tmp_path / "a", {"s": {"patch": values}}, items_per_part=8, table={"label": label}
    )
    table = store.table()
    wanted = np.isin(table["label"].to_numpy(), [1, 4])
    items = table["position"].to_numpy()[wanted]
    got = np.concatenate([b.acts for b in batches(store, "s", 16, items=items)])
    assert len(got) == 3 * np.isin(label, [1, 4]).sum()
    assert set(got.ravel()) == {1, 4}


def test_a_split_is_made_before_reading_and_stays_when_parts_are_added(tmp_path: Path) -> None:
    """No item changes sides: what was held out of a part stays held out of a larger store."""
    split = Split(half="validation", holdout=0.3, seed=5)
    few = build(tmp_path / "few", [20] * 5, size=20, commit={0, 3})
    all_ = build(tmp_path / "all", [20] * 5, size=20)
    one, other = Selection(few, "s0", items=split), Selection(all_, "s0", items=split)
    assert one.parts.tolist() == [0, 3]
    for part in (0, 3):
        rows = one.rows(part)
        assert rows is not None
        assert np.array_equal(rows, other.rows(part))
    sites = build(tmp_path / "b", [20] * 5, size=20, widths=(4, 2))
    held = [
        {i for b in batches(sites, site, 16, tokens=kind, items=split) for i in b.item.tolist()}
        for site, kind in (("s0", "cls"), ("s1", "patch"))
    ]
    assert held[0] == held[1]  # of any site and kind: the split is one of items


def test_columns_follow_the_widest_stripe(tmp_path: Path) -> None:
    store = build(tmp_path / "a", [2], size=2, tokens=12, widths=(2, 2), stripe_tokens=(2, 3))
    selection = Selection(store, "s0,s1", tokens="patch", positions=[2, 3, 9])
    assert [c.token.tolist() for c in selection.columns] == [[2, 3], [9]]
    stripes = [(s.site, s.index, s.tokens, s.slots) for s in selection.columns[0].stripes]
    assert stripes == [(0, 0, (1,), (0,)), (0, 1, (0,), (1,)), (1, 0, (1, 2), (0, 1))]
    assert isinstance(selection.columns[0].stripes[0].array, ArraySpec)
