"""What runs have in common and what tells them apart: figures and settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from lisa_kernels.report.memory import peaks
from lisa_kernels.report.record import Run

# Of these the difference says nothing: where a run was written, and how.
_SILENT = ("output", "json", "overwrite", "resume")
# Runs that differ in one of these hold out other rows, or count other tokens.
_ROWS = ("data", "eval_data", "eval_fraction", "seed", "seq_len", "max_data_bytes", "columns", "model", "packing")


def figures(run: Run) -> dict[str, Any]:
    """Return the figures of a run by which it is compared, None where there is none."""
    losses, logged = run.held_out, run.curve("loss")
    before = losses[0] if losses and losses[0][0] == 0 else None
    after = losses[-1] if losses and losses[-1][0] > 0 else None
    plan_peak, peak = peaks(run)
    seconds = [line["seconds"] for line in run.logs if line.get("seconds") is not None]
    return {
        "run": run.name, "folder": str(run.folder), "finished": run.finished, "steps": run.steps,
        "planned_steps": run.planned_steps, "model": run.options.get("model"),
        "method": run.summary.get("method", run.options.get("method")),
        "eval_loss_before": before[1] if before else None, "eval_loss_after": after[1] if after else None,
        "train_loss_first": run.summary.get("train_loss_first", logged[0][1] if logged else None),
        "train_loss_last": run.summary.get("train_loss_last", logged[-1][1] if logged else None),
        "seconds": seconds[-1] if seconds else None,
        "tokens_per_second": run.summary.get("tokens_per_second", _mean_speed(run)),
        "peak_bytes_measured": peak, "peak_bytes_planned": plan_peak,
    }  # fmt: skip


def _mean_speed(run: Run) -> float | None:
    speeds = [value for _, value in run.curve("tokens_per_second")]
    return sum(speeds) / len(speeds) if speeds else None


def same_rows(runs: Sequence[Run]) -> bool:
    """Tell whether held-out losses of the runs are of the same rows."""
    return len({json.dumps([run.options.get(name) for name in _ROWS], sort_keys=True) for run in runs}) <= 1


def best(runs: Sequence[Run]) -> Run | None:
    """Return the run with the lowest held-out loss at its end, of several that came to it and have the same rows."""
    ended = [(figures(run)["eval_loss_after"], run) for run in runs if run.finished]
    known = [(after, run) for after, run in ended if after is not None]
    return min(known, key=lambda item: item[0])[1] if len(known) > 1 and same_rows(runs) else None


def differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the settings that differ, a value for each run.

    Of one run: those that are not as they are by default, [default, value].
    """
    names = dict.fromkeys(name for run in runs for name in run.settings)
    if len(runs) == 1:
        run, defaults = runs[0], runs[0].begin.get("defaults", {})
        return {
            name: [defaults.get(name), run.options[name]]
            for name in run.options
            if name not in _SILENT and name in defaults and run.options[name] != defaults[name]
        }
    found = {name: [run.settings.get(name) for run in runs] for name in names if name not in _SILENT}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def heading(runs: Sequence[Run]) -> str:
    """Return what the settings that are shown are."""
    return "Settings that differ" if len(runs) > 1 else "Settings that differ from the defaults"


def settings_section(runs: Sequence[Run]) -> str:
    """Return the settings that differ, and all of them folded away."""
    found = differing(runs)
    heads = ["default", "this run"] if len(runs) == 1 else [run.name for run in runs]
    if found:
        text = _table(found, heads)
    elif len(runs) > 1:
        text = '<p class="note">The runs have the same settings.</p>'
    else:
        known = bool(runs[0].begin.get("defaults"))
        text = f'<p class="note">{"All settings are defaults." if known else "Defaults are not recorded."}</p>'
    names = dict.fromkeys(name for run in runs for name in run.settings)
    everything = {name: [run.settings.get(name) for run in runs] for name in names}
    table = _table(everything, [run.name for run in runs])
    return f'{text}<details class="values"><summary>All settings</summary>{table}</details>'


def _table(values: dict[str, list[Any]], heads: Sequence[str]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    rows = "".join(
        f'<tr><th scope="row">{escape(name.replace("_", "-"))}</th>'
        f"{''.join(f'<td>{escape(value_text(value))}</td>' for value in row)}</tr>"
        for name, row in values.items()
    )
    return (
        '<div class="scroll" tabindex="0"><table class="settings">'
        f'<thead><tr><th scope="col">setting</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def value_text(value: Any) -> str:
    """Return a setting as it is written on the command line."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
