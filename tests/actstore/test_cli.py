import importlib.metadata
import subprocess
import sys

import pytest

import actstore
from actstore.cli import commands, main

HARVEST = [
    "harvest",
    "--model",
    "toy/digits-1l",
    "--random-weights",
    "--data",
    "digits",
    "--sites",
    "blocks.0.resid_post",
    "--limit",
    "40",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("cli") / "a")
    assert main([*HARVEST, "--out", folder]) == 0
    return folder


def test_harvest_prints_the_plan_and_the_end(tmp_path, capsys):
    assert main([*HARVEST, "--out", f"{tmp_path}/a"]) == 0
    text = capsys.readouterr().out
    assert text.index("peak memory") < text.index("complete")
    assert "toy/digits-1l" in text
    assert "40 items, complete, 0 skipped" in text
    store = actstore.open(tmp_path / "a")
    assert store.manifest.model["id"] == "toy/digits-1l"
    assert main([*HARVEST, "--out", f"{tmp_path}/a"]) == 0
    assert "resuming: 20 of 20 parts are committed" in capsys.readouterr().out


def test_dry_run_writes_nothing(tmp_path, capsys):
    assert main([*HARVEST, "--out", f"{tmp_path}/a", "--dry-run"]) == 0
    assert "parts" in capsys.readouterr().out
    assert not (tmp_path / "a").exists()


def test_info(out, capsys):
    assert main(["info", out]) == 0
    text = capsys.readouterr().out
    assert "40 items readable of 40 planned" in text
    assert "complete: every part is committed" in text
    assert actstore.open(out).fingerprint in text


def test_verify_and_against_model(out, capsys):
    assert main(["verify", out, "--against-model", "5", "--random-weights"]) == 0
    text = capsys.readouterr().out
    assert "20 parts read, every checksum fits" in text
    assert "patch" in text


def test_verify_names_damage_and_the_repair(tmp_path, capsys):
    assert main([*HARVEST, "--out", f"{tmp_path}/a"]) == 0
    path = tmp_path / "a/acts/blocks.0.resid_post/patch/c.3.0.0"
    path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    assert main(["verify", f"{tmp_path}/a"]) == 1
    text = capsys.readouterr().out
    assert "part 3" in text
    assert f"repair: actstore repair {tmp_path}/a --parts 3" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "nowhere"], "error: no store at nowhere"),
        (["models", "no-such-model-anywhere"], "error: no model matches"),
        (
            [*HARVEST, "--out", "x", "--model", "toy/digits-9l"],
            "error: unknown model 'toy/digits-9l'",
        ),
        ([*HARVEST, "--out", "x", "--data", "nowhere"], "error: data 'nowhere' does not exist"),
        ([*HARVEST, "--out", "x", "--sites", "blocks.7.resid_post"], "error: no site matches"),
        (
            [*HARVEST, "--out", "x", "--data", "foo://x"],
            "error: foo://x: no storage is called 'foo'",
        ),
        ([*HARVEST, "--out", "x", "--workers", "-1"], "error: workers must be at least 1, not -1"),
        ([*HARVEST, "--out", "x", "--codec", "zip"], "error: codec 'zip' is none of raw, archive"),
        ([*HARVEST, "--out", "x", "--scheduler", "y"], "error: scheduler 'y' is no address"),
        (
            ["info", "s3://bucket/x", "--endpoint-url", "nonsense"],
            "error: endpoint_url 'nonsense' is no address of a server: it looks like http://",
        ),
    ],
)
def test_errors_are_one_message_and_exit_code_one(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert "Traceback" not in captured.err


def test_models(capsys):
    assert main(["models", "toy/digits-2l"]) == 0
    assert "toy/digits-2l" in capsys.readouterr().out.split()
    assert main(["models", "toy/digits-1l", "--sites"]) == 0
    assert "blocks.0.resid_post" in capsys.readouterr().out


class Point:
    """An entry point of another package."""

    name = "extra"

    def load(self):
        def extra(word: str = "none") -> int:
            """Do something extra."""
            return 7 if word == "some" else 3

        return extra


class Broken(Point):
    name = "broken"

    def load(self):
        raise ImportError("no module named nothing")


def test_commands_of_other_packages(monkeypatch, capsys):
    points = {"actstore.commands": [Point(), Broken()]}
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points[group])
    assert main(["extra", "--word", "some"]) == 7
    assert main(["extra"]) == 3
    assert set(commands([])) >= {"harvest", "info", "verify", "models", "extra"}
    assert "broken" not in commands([])
    assert main(["broken"]) == 1
    assert "command broken cannot be loaded" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom actstore.cli import main\n"
        "try:\n    main(['harvest', '--help'])\nexcept SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--tokens" in done.stdout
