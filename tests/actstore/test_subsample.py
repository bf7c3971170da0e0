"""Token subsampling: random subsets that stay balanced, and are found again by every reader."""

import dataclasses

import numpy as np
import pytest
import torch
import zarr
from fake_model import GRID, FakeModel, harvest_digits, objects
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore
from actstore.cli import main
from actstore.convert import convert
from actstore.loader import TokenLoader
from actstore.manifest import FormatError, Manifest
from actstore.reader import batches, sequential
from actstore.repair import garbage, repair
from actstore.selection import Split
from actstore.sources import open_source
from actstore.subsample import chunk_path, deal, read_positions
from actstore.summary import summarise
from actstore.verify import verify, verify_against_model

SITE = "blocks.1.resid_post"
BOTH = f"{SITE},blocks.3.resid_post"
KEPT, PATCHES = 7, 25


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same harvest with all patches and with 7 of 25."""
    folder = tmp_path_factory.mktemp("sub")
    harvest_digits(str(folder / "all"))
    harvest_digits(str(folder / "some"), tokens_per_item=KEPT)
    return actstore.open(folder / "all"), actstore.open(folder / "some")


@given(
    seed=st.integers(0, 2**40),
    part=st.integers(0, 2**20),
    rows=st.integers(1, 120),
    tokens=st.integers(1, 30),
    more=st.integers(0, 40),
)
@settings(max_examples=80, deadline=None)
def test_every_row_is_a_subset_and_positions_are_balanced(seed, part, rows, tokens, more):
    of = tokens + more
    found = deal(seed, part, rows, tokens, of)
    assert found.shape == (rows, tokens)
    assert (np.diff(found, axis=1) > 0).all(), "distinct and ascending"
    assert found.min() >= 0
    assert found.max() < of
    assert (found == deal(seed, part, rows + 9, tokens, of)[:rows]).all(), "rows do not depend on S"
    period = of // np.gcd(tokens, of)
    for start in range(0, rows - period + 1, period):
        counts = np.bincount(found[start : start + period].ravel(), minlength=of)
        assert len(set(counts.tolist())) == 1


def test_the_deal_is_pinned():
    """Stores hold what was dealt: a change here breaks readers of old ones."""
    assert deal(0, 0, 3, 4, 9).tolist() == [[1, 4, 7, 8], [0, 2, 3, 6], [1, 5, 7, 8]]
    assert (deal(0, 0, 50, 4, 9) != deal(1, 0, 50, 4, 9)).any()
    assert (deal(0, 0, 50, 4, 9) != deal(0, 1, 50, 4, 9)).any()


def test_subsets_are_uniform():
    pairs = np.zeros((12, 12))
    for part in range(600):
        for row in deal(0, part, 4, 3, 12):
            pairs[np.ix_(row, row)] += 1
    single = np.diag(pairs)
    joint = pairs[~np.eye(12, dtype=bool)]
    assert np.allclose(single, 600)
    assert joint.std() / joint.mean() < 0.12, "independent subsets would give about 0.095"


def truth_of(pair):
    """Return the kept patches cut from the store of all of them [item, slot, channel]."""
    whole, some = pair
    token = some.tokens(range(200), SITE, "patch")
    assert token.shape == (200, KEPT)
    first = some.spec(SITE, "patch").first
    assert first == whole.spec(SITE, "patch").first == 3
    values = whole.items(range(200), SITE, "patch")
    return token, np.take_along_axis(values, (token - first)[:, :, None].astype(np.int64), axis=1)


def test_the_kept_values_are_those_of_their_positions(pair):
    whole, some = pair
    token, truth = truth_of(pair)
    assert (some.items(range(200), SITE, "patch") == truth).all()
    assert (some.items(range(200), SITE, "cls") == whole.items(range(200), SITE, "cls")).all()
    assert (some.dask(SITE, "patch").compute() == truth).all()
    stored = zarr.open_array(some.storage.zarr(), path="position/patch", mode="r")
    assert stored.metadata.dimension_names == ("item", "patch_token")
    assert (np.asarray(stored[:]) + 3 == token).all()
    assert (whole.tokens([5, 0], SITE, "patch") == np.arange(3, 28)).all()
    spec = some.spec(SITE, "patch")
    assert (spec.tokens, spec.of, spec.span) == (KEPT, PATCHES, PATCHES)
    assert some.grid(SITE) == GRID


@pytest.mark.parametrize("order", [batches, sequential])
@pytest.mark.parametrize("tokens", ["patch", "cls,patch"])
def test_batches_know_the_token_of_every_row(pair, order, tokens):
    _, some = pair
    token, truth = truth_of(pair)
    cls = some.items(range(200), SITE, "cls")
    seen = set()
    for batch in order(some, BOTH, 97, tokens=tokens):
        for value, item, number in zip(batch.site(SITE), batch.item, batch.token, strict=True):
            seen.add((int(item), int(number)))
            if number == 0:
                assert (value == cls[item, 0]).all()
            else:
                slot = np.flatnonzero(token[item] == number)
                assert len(slot) == 1
                assert (value == truth[item, slot[0]]).all()
    due = {(i, int(t)) for i in range(200) for t in token[i]}
    assert seen == due | ({(i, 0) for i in range(200)} if "cls" in tokens else set())


def test_windows_stay_balanced_over_positions(tmp_path):
    """The variance of a batch's position counts is not above that of independent draws."""
    values = np.zeros((1, 20, 20), np.float32)

    class Many:
        def __len__(self):
            return 1200

        def __getitem__(self, i):
            return torch.from_numpy(values)

    actstore.harvest(
        model=FakeModel(), data=Many(), sites=SITE, out=tmp_path / "a", tokens="patch",
        tokens_per_item=KEPT, batch_size=64, workers=1,
    )  # fmt: skip
    store = actstore.open(tmp_path / "a")
    means = [b.token.mean() for b in batches(store, SITE, 140) if len(b) == 140]
    assert len(means) == 60
    independent = np.var(np.arange(3, 28)) / 140
    assert np.var(means) / independent < 1.2


def test_loader_filters_and_int8(tmp_path, pair):
    token, truth = truth_of(pair)
    harvest_digits(str(tmp_path / "q"), tokens_per_item=KEPT, dtype="int8")
    store = actstore.open(tmp_path / "q")
    step = store.manifest.scale(store.spec(SITE, "patch"))
    seen = set()
    for half in ("train", "validation"):
        split = Split(half=half, holdout=0.3)
        for batch in TokenLoader(store, SITE, 64, tokens="patch", items=split, epochs=1):
            item, number = batch.item.numpy(), batch.token.numpy()
            slot = (token[item] == number[:, None]).argmax(axis=1)
            assert (np.abs(batch.acts.numpy() - truth[item, slot]) < 0.51 * step + 0.02).all()
            seen.update(zip(item.tolist(), number.tolist(), strict=True))
    assert len(seen) == 200 * KEPT


def test_resume_repair_ranks_and_garbage(tmp_path, pair, monkeypatch):
    _, whole = pair
    options = {"tokens_per_item": KEPT}
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        harvest_digits(str(tmp_path / "a"), **options)
    monkeypatch.undo()
    store = actstore.open(tmp_path / "a")
    assert objects(store.url, ".") == objects(whole.url, ".")
    path = tmp_path / "a" / chunk_path("patch", 4)
    path.write_bytes(b"\0" * path.stat().st_size)
    problems = verify(store)
    assert [(p.part, p.path) for p in problems] == [(4, "position/patch/c.4.0")]
    with pytest.raises(FormatError, match=r"position/patch/c.4.0 is damaged.*repair .* --parts 4"):
        read_positions(store, "patch", 4)
    repair(store, FakeModel(), open_source("digits"), [4])
    assert objects(store.url, ".") == objects(whole.url, ".")
    store.storage.delete("parts/00006.json")
    assert "position/patch/c.6.0" in garbage(store.storage, store.manifest)
    harvest_digits(store.url, **options)
    assert objects(store.url, ".") == objects(whole.url, ".")
    with pytest.raises(ValueError, match=r"(?s)holds another store.*patch.of: 25 -> absent"):
        harvest_digits(store.url)


def test_skipped_items_shift_nobody(tmp_path):
    class Gaps:
        def __len__(self):
            return 60

        def __getitem__(self, i):
            if i % 7 == 3:
                raise OSError("unreadable")
            return torch.rand((1, 20, 20), generator=torch.Generator().manual_seed(i))

    options = {"model": FakeModel(), "data": Gaps(), "sites": SITE, "batch_size": 8}
    some = actstore.harvest(out=tmp_path / "some", tokens_per_item=KEPT, **options)
    whole = actstore.harvest(out=tmp_path / "all", **options)
    where = some.table()["position"].to_numpy()
    token = some.tokens(where, SITE, "patch")
    truth = whole.items(where, SITE, "patch")
    truth = np.take_along_axis(truth, (token - 3)[:, :, None].astype(np.int64), axis=1)
    assert (some.items(where, SITE, "patch") == truth).all()
    copy = convert(some, tmp_path / "copy", items_per_part=9)
    assert verify(copy) == []
    assert copy.manifest.order["kind"] == "converted"
    assert (copy.tokens(range(len(where)), SITE, "patch") == token).all()
    assert (copy.items(range(len(where)), SITE, "patch") == truth).all()
    for batch in batches(copy, SITE, 50, tokens="patch"):
        slot = (token[batch.item] == batch.token[:, None]).argmax(axis=1)
        assert (batch.acts == truth[batch.item, slot]).all()
    again = convert(copy, tmp_path / "again", tokens="patch")
    assert (again.tokens(range(len(where)), SITE, "patch") == token).all()
    assert convert(some, tmp_path / "cls", tokens="cls").kinds(SITE) == ("cls",)


def test_values_agree_with_the_model(pair):
    _, some = pair
    found = verify_against_model(some, FakeModel(), open_source("digits"), items=20)
    assert [f.differing for f in found] == [0] * 4


def test_what_is_refused(tmp_path, pair):
    _, some = pair
    with pytest.raises(ValueError, match=r"keeps 7 of 25 patch tokens .* positions= cannot choose"):
        next(batches(some, SITE, 8, positions=[4, 5]))
    for kept, sites in ((26, SITE), (0, SITE)):
        with pytest.raises(ValueError, match=r"tokens_per_item \d+: these sites have 25 patch"):
            harvest_digits(str(tmp_path / "a"), tokens_per_item=kept, sites=sites)
    with pytest.raises(ValueError, match=r"these sites have no patch tokens"):
        harvest_digits(str(tmp_path / "a"), tokens_per_item=3, sites="logits")
    assert not (tmp_path / "a").exists()
    value = some.manifest.to_json()
    value["arrays"][1]["of"] = 3
    with pytest.raises(FormatError, match=r"7 tokens cannot be of 3"):
        Manifest.from_json(value)
    value["arrays"][1]["of"] = 26
    with pytest.raises(FormatError, match=r"arrays of a kind must have the same tokens chosen"):
        Manifest.from_json(value)


def test_all_of_them_is_no_choice(tmp_path, pair):
    whole, _ = pair
    harvest_digits(str(tmp_path / "a"), tokens_per_item=PATCHES)
    assert actstore.open(tmp_path / "a").fingerprint == whole.fingerprint
    assert dataclasses.replace(whole.spec(SITE, "patch"), of=0) == whole.spec(SITE, "patch")


def test_command(tmp_path, capsys):
    words = ["--model", "toy/digits-1l", "--random-weights", "--data", "digits", "--device", "cpu"]
    words += ["--sites", "blocks.0.resid_post", "--limit", "20", "--out", str(tmp_path / "a")]
    assert main(["harvest", *words, "--tokens-per-item", "5"]) == 0
    assert "5 of" in capsys.readouterr().out
    store = actstore.open(tmp_path / "a")
    assert store.spec("blocks.0.resid_post", "patch").tokens == 5
    assert main(["verify", store.url, "--random-weights", "--against-model", "4"]) == 0


def test_the_summary_is_by_true_position(pair):
    whole, some = pair
    token, truth = truth_of(pair)
    found = {s.kind: s for s in summarise(some, [SITE], scheduler="sync")}["patch"]
    norm = np.linalg.norm(truth.astype(np.float64), axis=2)
    for position in range(PATCHES):
        mine = norm[token == position + 3]
        np.testing.assert_allclose(found.position_norm[position], np.sqrt((mine**2).mean()), 1e-3)
    assert found.tokens == 200 * KEPT
    row = np.unravel_index(norm.argmax(), norm.shape)
    assert (found.top[0]["item"], found.top[0]["token"]) == (row[0], token[row] - 3)
    assert summarise(whole, [SITE], scheduler="sync")[1].position_norm.shape == (PATCHES,)
