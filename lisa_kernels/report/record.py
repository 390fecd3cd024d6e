"""A run as its folder tells it: run.json, summary.json and the lines of history.jsonl."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lisa_kernels.errors import InputError

NATS = "nats per token"
RUN_FILE, SUMMARY_FILE, HISTORY_FILE, PAGE_FILE = "run.json", "summary.json", "history.jsonl", "report.html"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """What one folder says of its run; `summary` is empty where the run did not finish.

    name: what tells it from other runs on the page. run: run.json. lines: of history.jsonl, in order.
    """

    folder: Path
    name: str
    run: dict[str, Any]
    summary: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.summary)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Return the lines of one kind."""
        return [line for line in self.lines if line["kind"] == kind]

    @cached_property
    def begin(self) -> dict[str, Any]:
        """What was known before the first step; empty of runs that kept no history."""
        return next(iter(self.of_kind("begin")), {})

    @property
    def options(self) -> dict[str, Any]:
        """The options that the run was given."""
        options: dict[str, Any] = self.run.get("options", {})
        return options

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The options, those that followed from model and run as they were taken."""
        resolved = self.summary.get("settings") or self.begin.get("method") or {}
        return {**self.options, **self.run.get("taken", {}), **resolved}

    @cached_property
    def logs(self) -> list[dict[str, Any]]:
        """The lines with losses, in order."""
        return self.of_kind("log")

    @property
    def loss_unit(self) -> str:
        """What its losses are."""
        return str(self.begin.get("loss_unit", NATS))

    @property
    def counted(self) -> str:
        """What its speed counts: tokens or images."""
        return str(self.begin.get("counted", "tokens"))

    @property
    def steps(self) -> int:
        """How many steps were taken, as far as the folder tells."""
        return int(self.summary.get("steps") or max((line["step"] for line in self.lines), default=0))

    @property
    def planned_steps(self) -> int | None:
        """How many steps the run was to take."""
        return self.begin.get("max_steps") or self.options.get("steps") or self.summary.get("steps")

    def curve(self, key: str) -> Points:
        """Return (step, value) of a number that is logged, where it is one."""
        return [(line["step"], line[key]) for line in self.logs if line.get(key) is not None]

    @cached_property
    def held_out(self) -> Points:
        """(step, held-out loss): before, on the way, and after."""
        found = {line["step"]: line["loss"] for line in self.of_kind("evaluation")}
        found[0] = self.run.get("eval_loss_before")
        if self.finished:
            found[self.steps] = self.summary.get("eval_loss_after")
        return sorted((step, loss) for step, loss in found.items() if loss is not None)

    @cached_property
    def draws(self) -> list[tuple[int, int, list[int]]]:
        """(first step, last step, layers) of each period, steps counted from 1; empty where every layer trains."""
        starts = [(line["step"], line["layers"]) for line in self.of_kind("draw")]
        if not starts and (period := self.settings.get("period")):
            history = self.summary.get("layer_history", [])
            starts = [(number * period, layers) for number, layers in enumerate(history)]
        starts = [(step, layers) for step, layers in starts if step < self.steps]
        ends = [*(step for step, _ in starts[1:]), self.steps]
        return [(step + 1, end, layers) for (step, layers), end in zip(starts, ends)]

    @property
    def layers(self) -> list[str]:
        """The paths of the layers that may be drawn."""
        return list(self.begin.get("layers") or self.summary.get("layer_visits", {}))

    @cached_property
    def answers(self) -> list[dict[str, str | None]]:
        """Prompt, wanted answer, and the model's before and after; None where it was not asked."""
        asked = self.of_kind("answers")
        before = {answer["prompt"]: answer for line in asked if line["step"] == 0 for answer in line["answers"]}
        after = {answer["prompt"]: answer for line in asked if line["step"] > 0 for answer in line["answers"]}
        return [
            {
                "prompt": prompt, "wanted": (before.get(prompt) or after[prompt])["wanted"],
                "before": before.get(prompt, {}).get("answer"), "after": after.get(prompt, {}).get("answer"),
            }
            for prompt in dict.fromkeys([*before, *after])
        ]  # fmt: skip


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a history; the last one is left out where a kill cut it.

    Raises InputError for a file whose other lines are none of a history.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1].splitlines()
    lines = []
    for number, line in enumerate(whole, 1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if (
            not isinstance(value, dict)
            or not isinstance(value.get("kind"), str)
            or not isinstance(value.get("step"), int)
        ):
            raise InputError(f"{path}, line {number}, is no line of a run's history; remove the file to do without it.")
        lines.append(value)
    return lines


def read_run(folder: Path, name: str | None = None) -> Run:
    """Return the run in a folder, finished or not. Raises InputError where there is none."""
    if not folder.exists():
        raise InputError(f"there is no folder {folder}; give the --output folder of a finetune run.")
    if _CHECKPOINT.fullmatch(folder.resolve().name) and (folder.parent / RUN_FILE).exists():
        raise InputError(f"{folder} is a checkpoint of a run; give the run's own folder, {folder.resolve().parent}.")
    run_file = folder / RUN_FILE
    if not run_file.is_file():
        raise InputError(f"{folder} holds no run (it has no {RUN_FILE}); give the --output folder of a finetune run.")
    run = _object(run_file)
    if not isinstance(run.get("options"), dict):
        raise InputError(f"{run_file} is no record of a run (it names no options); give the folder of a finetune run.")
    summary = _object(folder / SUMMARY_FILE) if (folder / SUMMARY_FILE).is_file() else {}
    history = folder / HISTORY_FILE
    lines = read_lines(history) if history.is_file() else _lines_of_checkpoint(folder)
    return Run(folder, name or folder.resolve().name, run, summary, lines)


def _object(path: Path) -> dict[str, Any]:
    try:
        # What is no number, as of a run that diverged, is none.
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); it is a run's own file: run finetune again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is no record of a run (it holds no JSON object); give the folder of a finetune run.")
    return value


def _lines_of_checkpoint(folder: Path) -> list[dict[str, Any]]:
    """Return what the last checkpoint's trainer_state.json tells, of a run without a history."""
    states = {int(found[1]): path for path in folder.glob("checkpoint-*/trainer_state.json")
              if (found := _CHECKPOINT.fullmatch(path.parent.name))}  # fmt: skip
    if not states:
        return []
    lines: list[dict[str, Any]] = []
    for entry in _object(states[max(states)]).get("log_history", []):
        if "loss" in entry:
            lines.append({"kind": "log", **entry})
        elif "eval_loss" in entry:
            lines.append({"kind": "evaluation", "step": entry["step"], "loss": entry["eval_loss"]})
    return lines


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs of several folders, each named by as much of its path as tells it from the others.

    Raises InputError for a folder without a run, and for one that is given twice.
    """
    paths = [folder.resolve() for folder in folders]
    twice = next((folder for index, folder in enumerate(folders) if paths[index] in paths[:index]), None)
    if twice is not None:
        raise InputError(f"{twice} is given twice; name each run once.")
    return [read_run(folder, name) for folder, name in zip(folders, _names(paths))]


def _names(paths: Sequence[Path]) -> list[str]:
    longest = max((len(path.parts) for path in paths), default=1)
    for parts in range(1, longest + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names
