"""How often the host may wait for a device, by case and kind of step: a recorded number each in `waits.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("waits.json")
AGAIN = "python tests/idle_device/steps.py --record"


def read_record() -> dict[str, dict[str, int]]:
    """Return the recorded waits: case, kind of step, number."""
    record: dict[str, dict[str, int]] = json.loads(RECORD.read_text())
    return record


def write_record(cases: dict[str, Any]) -> None:
    """Record the waits of these outcomes in the place of all that were."""
    found = {name: totals(case["waits"]) for name, case in cases.items()}
    lines = (f"  {json.dumps(name)}: {json.dumps(found[name])}" for name in found)
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def totals(waits: dict[str, dict[str, int]]) -> dict[str, int]:
    """Return how many waits each kind of step has, wherever they are."""
    return {kind: sum(places.values()) for kind, places in waits.items()}


def differences(cases: dict[str, Any], record: dict[str, dict[str, int]]) -> list[str]:
    """Return one sentence for each kind of step that waits more often, or less, than recorded."""
    found = []
    for name, case in cases.items():
        for kind, places in case["waits"].items():
            now, before = sum(places.values()), record.get(name, {}).get(kind)
            if before is None or now < before:
                found.append(f"{name}: a {kind} step has {now} waits, recorded are {before}; record it: {AGAIN}")
            elif now > before:
                found.append(f"{name}: a {kind} step has {now} waits, above its {before}: {dict(places)}")
    gone = record.keys() - cases.keys()
    return found + [f"{name}: is recorded and no case any more; record anew: {AGAIN}" for name in sorted(gone)]
