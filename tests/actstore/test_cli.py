import importlib.metadata
import subprocess
import sys

import pytest
from fake_model import objects

import actstore
import vitmodels
from actstore.cli import commands, main
from actstore.sources import open_source
from actstore.verify import verify_against_model

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
        ([*HARVEST, "--out", "x", "--limit", "0"], "error: limit must be at least 1, not 0"),
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["verify", "--workers", "0"], "error: workers must be at least 1, not 0"),
        (["verify", "--workers", "-2"], "error: workers must be at least 1, not -2"),
        (
            ["convert", "--out", "copy", "--items-per-part", "0"],
            "error: items_per_part must be at least 1, not 0",
        ),
        (
            ["convert", "--out", "copy", "--items-per-part", "-4"],
            "error: items_per_part must be at least 1, not -4",
        ),
        (["repair", "--parts", "99"], "has parts 0 to 19, not 99"),
        (["repair", "--parts", "1", "--workers", "0"], "error: workers must be at least 1, not 0"),
    ],
)
def test_numbers_that_a_store_cannot_do(out, words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = objects(out, ".")
    again = ["--random-weights"] if words[0] == "repair" else []
    assert main([words[0], out, *words[1:], *again]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.out == "", "no bar before the work begins"
    assert objects(out, ".") == before
    assert not list(tmp_path.iterdir())


def run(*words):
    """Run the command as a user does; return exit code, stdout and stderr."""
    code = "import sys; from actstore.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


def test_an_error_before_the_work_is_all_there_is_to_read(tmp_path):
    code, out, err = run(*HARVEST, "--out", f"{tmp_path}/a", "--data", f"{tmp_path}/nowhere")
    assert code == 1
    assert out == ""
    assert err.startswith("error: data '")
    assert err.count("\n") == 1


def test_an_error_of_the_plan_follows_the_plan_and_no_bars(tmp_path, capsys, monkeypatch):
    from actstore import harvester

    monkeypatch.setattr(harvester, "free_disk", lambda storage: 10)
    assert main([*HARVEST, "--out", f"{tmp_path}/a"]) == 1
    captured = capsys.readouterr()
    assert "peak memory" in captured.out
    assert captured.out.rstrip().endswith("┘")
    assert captured.err.startswith("error: ")
    assert not (tmp_path / "a").exists()


def test_bars_are_there_once_work_begins(out, tmp_path, capsys):
    assert main([*HARVEST, "--out", f"{tmp_path}/a"]) == 0
    text = capsys.readouterr().out
    assert "items" in text
    assert "40/40" in text
    assert main(["verify", out]) == 0
    assert "20/20" in capsys.readouterr().out
    assert main(["convert", out, "--out", f"{tmp_path}/b"]) == 0
    assert "20/20" in capsys.readouterr().out


def test_what_is_damaged_is_left_out_of_the_comparison_with_the_model(tmp_path, capsys):
    out = f"{tmp_path}/a"
    assert main([*HARVEST, "--out", out]) == 0
    path = tmp_path / "a/acts/blocks.0.resid_post/patch/c.3.0.0"
    path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    assert main(["verify", out, "--against-model", "40", "--random-weights"]) == 1
    captured = capsys.readouterr()
    assert f"repair: actstore repair {out} --parts 3" in captured.out
    assert "│ 38 " in captured.out
    assert captured.err == ""
    store = actstore.open(out)
    model = vitmodels.load("toy/digits-1l", device="cpu", pretrained=False)
    message = r"patch of .*/a is damaged \(.*\): `actstore verify .*/a` names the parts"
    with pytest.raises(actstore.FormatError, match=message):
        verify_against_model(store, model, open_source("digits"), items=40)


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
