"""What a run leaves of itself as it goes: one line of JSON for each thing that happened, in history.jsonl.

Lines have `kind` and `step`, the number of steps taken before: "begin" (what the run is), "draw" (the layers of a
period), "log" (loss, rate, gradient norm, speed, memory), "evaluation" (held-out loss), "answers" (what it says).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from lisa_kernels.errors import InputError
from lisa_kernels.report import HISTORY_FILE, read_lines


class HistoryFile:
    """Writes the history of a run beside its summary; a line is whole or, where a kill cut it, the last and left out.

    A file that cannot be written is told of once and costs the run nothing but its curves.
    """

    def __init__(self, folder: Path, console: Console) -> None:
        self.path, self.console = folder / HISTORY_FILE, console
        self.lines: list[dict[str, Any]] = []
        self._writes = True

    def begin(self, facts: dict[str, Any], steps: int) -> None:
        """Open the history of a run that has taken `steps`: lines past them go, those of an earlier start stay."""
        lines = self._earlier() if steps else []
        # What the model says at the end is asked again at the end.
        self.lines = [
            line for line in lines if line["step"] <= steps and (line["kind"], line["step"]) != ("answers", steps)
        ]
        if not self.has("begin"):
            self.lines.insert(0, {"kind": "begin", "step": 0, **_plain(facts)})
        self._write("w", self.lines)

    def _earlier(self) -> list[dict[str, Any]]:
        try:
            return read_lines(self.path) if self.path.exists() else []
        except (InputError, OSError) as error:
            self.console.print(f"note: the history of this run begins anew ({error})", highlight=False, markup=False)
            return []

    def has(self, kind: str) -> bool:
        """Tell whether there is a line of that kind."""
        return any(line["kind"] == kind for line in self.lines)

    def add(self, kind: str, step: int, **values: Any) -> None:
        """Write one line."""
        line = {"kind": kind, "step": step, **_plain(values)}
        self.lines.append(line)
        self._write("a", [line])

    def _write(self, mode: str, lines: Iterable[dict[str, Any]]) -> None:
        if not self._writes:
            return
        try:
            self._write_lines(mode, lines)
        except OSError as error:
            self._writes = False
            self.console.print(f"note: the history of this run is not written on ({error})", highlight=False)

    def _write_lines(self, mode: str, lines: Iterable[dict[str, Any]]) -> None:
        path = self.path.with_name(f".{self.path.name}.partial") if mode == "w" else self.path
        with path.open(mode, encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        if mode == "w":
            os.replace(path, self.path)


def _plain(value: Any) -> Any:
    """Return the value as JSON can hold it: numbers that are none become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
