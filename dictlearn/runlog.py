"""The log of a run: one JSON row a line, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol


class Writer(Protocol):
    """What of TensorBoard's writer is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Add one number."""

    def close(self) -> None:
        """Flush and close."""


class RunLog:
    """Rows ``{"step", "name", metrics...}`` appended to ``log.jsonl`` and to ``tensorboard/``.

    When a run resumes at step s, rows of later steps, which are going to be written again, are cut
    off, as is a torn last line.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self.path = folder / "log.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_log(self.path) if row["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        temporary.replace(self.path)
        self._file: IO[str] = self.path.open("a")
        self._writer = _tensorboard(folder / "tensorboard", step)

    def row(self, step: int, name: str, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a dictionary (or of the run, ``name=""``) after a step."""
        self._file.write(json.dumps({"step": step, "name": name, **metrics}) + "\n")
        self._file.flush()
        for key, value in metrics.items():
            self._writer.add_scalar(f"{key}/{name}" if name else key, value, step)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._writer.close()


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
