"""The log of a run: one JSON row a line, the same for TensorBoard, and for trackers asked for."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol


class Writer(Protocol):
    """What of TensorBoard's writer is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Add one number."""

    def close(self) -> None:
        """Flush and close."""


TRACKERS = ("wandb", "trackio")
"""Libraries that rows can be sent to besides; each is imported only when asked for."""


class RunLog:
    """Rows ``{"step", "name", metrics...}`` appended to ``log.jsonl`` and to ``tensorboard/``.

    A row with an empty name is of the whole run: `tokens_per_second`, and `data_wait`, the share of
    the time spent waiting for the store.

    When a run resumes at step s, rows of later steps, which are going to be written again, are cut
    off, as is a torn last line.

    Parameters
    ----------
    folder
        Of the run.
    step
        Steps taken so far.
    trackers
        Of `TRACKERS`: one run each, named by the folder, gone on with after a resume.
    config
        Shown by the trackers.
    """

    def __init__(
        self,
        folder: Path,
        step: int = 0,
        trackers: Sequence[str] = (),
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_log(self.path) if row["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(self.path)
        self._file: IO[str] = self.path.open("a")
        self._writers = [_tensorboard(folder / "tensorboard", step)]
        self._writers += [_Tracker(name, folder, config or {}) for name in trackers]

    def row(self, step: int, name: str, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a dictionary (or of the run, ``name=""``) after a step."""
        self._file.write(json.dumps({"step": step, "name": name, **metrics}) + "\n")
        self._file.flush()
        for writer in self._writers:
            for key, value in metrics.items():
                writer.add_scalar(f"{key}/{name}" if name else key, value, step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        for writer in self._writers:
            writer.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``log.jsonl``; a torn last line is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _tensorboard(folder: Path, step: int) -> Writer:
    from torch.utils.tensorboard import SummaryWriter

    writer: Writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
    return writer


class _Tracker:
    """Weights & Biases, or trackio, which has the same three functions.

    A row holds everything of one step, so it is sent when the next step begins.
    """

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any]) -> None:
        module = _module(name)
        where = {}
        if name == "wandb":  # trackio goes on with a run of the same name, wandb of the same id
            key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
            where = {"dir": str(folder), "id": key}
        self._run = module.init(
            project="dictlearn", name=folder.name, config=dict(config), resume="allow", **where
        )
        self._row: dict[str, float] = {}
        self._step = 0

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Add one number."""
        if global_step != self._step:
            self._send()
            self._step = global_step
        self._row[tag] = scalar_value

    def close(self) -> None:
        """Send what is left and end the run."""
        self._send()
        self._run.finish()

    def _send(self) -> None:
        if self._row:
            self._run.log(self._row, step=self._step)
            self._row = {}


def check_trackers(names: Sequence[str], out: str | Path | None) -> None:
    """Refuse trackers that are unknown or not installed, before anything is trained."""
    if names and out is None:
        raise ValueError(f"log_to={list(names)} needs out, the folder that names the run")
    for name in names:
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, n=1, cutoff=0.0)
            raise ValueError(
                f"log_to {name!r} is not one of {', '.join(TRACKERS)}; nearest: {near[0]} "
                "(log.jsonl and tensorboard/ are always written)"
            )
        _module(name)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"log_to {name!r} needs {name}, which is not installed: "
            f"`pip install 'actstore[{name}]'`"
        ) from error
