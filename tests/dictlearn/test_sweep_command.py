"""``dictlearn sweep``: options and grid files, results, failures, and what bad input is told."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from actstore.store import Store
from dictlearn.cli import main
from dictlearn.config import BatchTopK, JumpReLU, TopK
from dictlearn.gridfile import candidates, read_grid

SHORT = ["--steps", "20", "--batch-size", "64", "--device", "cpu", "--holdout", "0.2"]
GRID = """
[[dictionary]]
sites = "blocks.*.resid_post"
kind = ["TopK", "BatchTopK"]
k = [2, 4]
expansion = 2
seed = [0, 1]

[[dictionary]]
reads = "blocks.0.resid_post"
writes = "blocks.1.resid_post"
kind = ["TopK", "JumpReLU"]
k = 3
bandwidth = 0.2
latents = 40
lr = [1e-3, 2e-3]
prefixes = [[4, 8], [16]]
skip = true

[train]
steps = 7
holdout = 0.25
"""


def test_a_grid_file_is_every_combination(store: Store, tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(GRID)
    tables, training = read_grid(tmp_path / "grid.toml")
    assert training == {"steps": 7, "holdout": 0.25}
    found = candidates(tables, store)
    assert len(found) == 2 * 4 * 2 + 2 * 2 * 2
    assert len({c.name for c in found}) == len(found)
    assert {c.sparsify for c in found[:16]} == {TopK(2), TopK(4), BatchTopK(2), BatchTopK(4)}
    assert [c.latents for c in found[:16]] == [32] * 8 + [48] * 8
    assert {c.sparsify for c in found[16:]} == {TopK(3), JumpReLU(bandwidth=0.2)}
    assert {c.lr for c in found[16:]} == {1e-3, 2e-3}
    assert all(c.skip and c.writes == {"blocks.1.resid_post": 24} for c in found[16:])
    (tmp_path / "grid.json").write_text(
        json.dumps({"dictionary": {"sites": "*", "together": True, "k": [2]}})
    )
    (crosscoder,) = candidates(read_grid(tmp_path / "grid.json")[0], store)
    assert list(crosscoder.reads.values()) == [16, 24]
    assert crosscoder.latents == 8 * 40


def test_a_sweep_from_the_shell(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["sweep", store.url, "--out", str(out), "--sites", "blocks.0.*", "--k", "2", "4"]
    command += ["--kind", "TopK", "BatchTopK", "--expansion", "2", "--workers", "2", *SHORT]
    assert main([*command, "--dry-run"]) == 0
    assert "4 dictionaries from one pass of 20 steps" in capsys.readouterr().out
    assert not out.exists()
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "| blocks.0.resid_post-BatchTopK-k4-F32-s0 |" in text
    table = pq.read_table(out / "results.parquet").to_pylist()
    assert len(table) == 4
    assert all(0 < row["fvu"] < 1 for row in table)
    assert (out / "results.md").read_text() in text
    assert (out / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert main(command) == 0
    assert "resumed at step 20" in capsys.readouterr().out


def test_one_failure_is_reported_and_the_others_go_on(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(
        '[[dictionary]]\nsites="blocks.0.*"\nk=2\nexpansion=2\nlr=[5e-3, 1e30]\n'
        "[train]\nsteps=20\nbatch_size=64\nwarmup=0\n"
    )
    command = ["sweep", store.url, "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*command, "--grid", str(grid), "--workers", "1"]) == 1
    text = capsys.readouterr().out
    assert "failed: the loss of 'blocks.0.resid_post-TopK-k2-F32-lr1e+30-s0' is" in text
    good, bad = pq.read_table(tmp_path / "run" / "results.parquet").to_pylist()
    assert good["fvu"] < 1
    assert bad["fvu"] is None
    assert bad["failed"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('sites="blocks.9.resid_post"', "blocks.1.resid_post"),
        ('sites="*"\nexpanson=4', "unknown option 'expanson'; nearest: expansion"),
        ('sites="*"\nkind="TopKK"', "unknown kind 'TopKK'; known: .*nearest: TopK"),
        ('sites="*"\nkind="TopK"\nl1=[1e-3]', "l1 is an option of ReLU, Gated, not of TopK"),
        ('sites="*"\nk=["4"]', "k takes whole numbers, got '4'"),
        ('sites="*"\nk=[]', "k is an empty list"),
        ('sites="*"\nk=4000', "TopK.k = 4000 is more than the 128 latents"),
        ('sites="*"\nlr=-1', "lr must be > 0, got -1"),
        ('sites="*"\nlatents=4\nexpansion=2', "either expansion or latents"),
        ('sites="*"\nreads="*"', "either sites .* or reads"),
        ('writes="*"', "writes needs reads"),
        ("k=4", "give sites"),
        ('sites="*"\nprefixes=[9, 4]', "positive and ascending"),
    ],
)
def test_bad_tables(store: Store, tmp_path: Path, table: str, message: str) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(f'[[dictionary]]\nsites="*"\n[[dictionary]]\n{table}\n')
    with pytest.raises(ValueError, match=f"dictionary table 2: .*{message}"):
        candidates(read_grid(file)[0], store)


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        (None, ["--grid", "{grid}"], "no grid file"),
        ("x = [", ["--grid", "{grid}"], "is not TOML"),
        ("steps = 3", ["--grid", "{grid}"], "needs a list of tables [[dictionary]]"),
        ('[[dictionary]]\nsites="*"\n[trian]', ["--grid", "{grid}"], "holds 'trian'"),
        (
            '[[dictionary]]\nsites="*"\n[train]\nstep=3',
            ["--grid", "{grid}"],
            "has no field 'step'; nearest: steps",
        ),
        (
            '[[dictionary]]\nsites="*"\n[train]\nsteps="3"',
            ["--grid", "{grid}"],
            "table train:",
        ),
        ("", ["--grid", "{grid}", "--k", "3"], "leave out k"),
        ("", ["--kind", "ReLU", "--k", "3"], "k is an option of TopK, BatchTopK, Gated"),
        ("", ["--k", "3", "3"], "these are there twice"),
        ("", ["--workers", "0"], "workers must be >= 1, got 0"),
        ("", ["--log-to", "trackio"], "log_to 'trackio' needs trackio"),
        ("", ["--model"], "was not harvested from a model"),
    ],
)
def test_bad_commands(
    store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str | None,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "trackio", None)
    grid = tmp_path / "grid.toml"
    if content is not None:
        grid.write_text(content)
    command = ["sweep", store.url, "--out", str(tmp_path / "run"), *SHORT]
    assert main([*command, *(w.format(grid=grid) for w in words)]) == 1
    assert message in capsys.readouterr().err
