"""Steps on a CUDA device that does nothing, on torch's CPU build: no mixed devices, no more waits than recorded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from idle_device import load
from idle_device.record import differences, read_record

PROGRAM = Path(__file__).with_name("steps.py")


@pytest.fixture(scope="module")
def outcome() -> dict[str, Any]:
    """What the program found out, in a process of its own: the device must be there before torch is imported."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the idle device is built for Linux only")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this torch is built for GPUs and has a CUDA of its own; the idle one is for its CPU build")
    if load.compiler() is None:
        pytest.skip("no C++ compiler (g++ or clang++) to build the idle device with")
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_methods_run_on_a_device_that_is_not_the_current_one(outcome: dict[str, Any]) -> None:
    """Attach, forward, backward, switch, step and detach mix no devices, and need no value that cannot be waited for.

    Nine methods, a Llama, a GPT-2, experts, tied weights, and models of two devices.
    """
    assert {name: case["raised"] for name, case in outcome["cases"].items() if "raised" in case} == {}


def test_steps_wait_for_the_device_as_often_as_recorded(outcome: dict[str, Any]) -> None:
    """A wait more in some kind of step is named with its place; a wait less wants to be recorded."""
    assert differences(outcome["cases"], read_record()) == []


def test_the_record_is_of_the_program_s_cases(outcome: dict[str, Any]) -> None:
    """Every case and every kind of step in it has a recorded number, and no other has."""
    found = {name: set(case["waits"]) for name, case in outcome["cases"].items()}
    assert found == {name: set(kinds) for name, kinds in read_record().items()}


@pytest.mark.parametrize(
    ("control", "place"),
    [("a hidden float()", "optim/adamw.py"), ("memory that is not locked", "basis/")],
    ids=["value", "memory"],
)
def test_a_hidden_wait_is_seen(outcome: dict[str, Any], control: str, place: str) -> None:
    """A value that a step asks for, and copies from memory that is not locked, are waits above the record."""
    waits = outcome["controls"][control]["waits"]
    complaints = differences({"owlore": {"waits": waits}}, {"owlore": read_record()["owlore"]})
    assert any("above its" in complaint and place in complaint for complaint in complaints)


def test_a_forgotten_device_is_seen(outcome: dict[str, Any]) -> None:
    """A tensor made without its device cannot be combined with those that have one."""
    assert "cuda:1 and cpu" in outcome["controls"]["a forgotten device"]["raised"]


def test_differences_are_told_both_ways() -> None:
    """Equal numbers say nothing; one more, one less, a case that is new and one that is gone say one sentence each."""
    waits = {"first": {}, "steady": {"optim/adamw.py: step": 1}}
    cases = {"lisa": {"waits": waits}}
    assert differences(cases, {"lisa": {"first": 0, "steady": 1}}) == []
    (more,) = differences(cases, {"lisa": {"first": 0, "steady": 0}})
    assert more == "lisa: a steady step has 1 waits, above its 0: {'optim/adamw.py: step': 1}"
    (less,) = differences(cases, {"lisa": {"first": 2, "steady": 1}})
    assert less.startswith("lisa: a first step has 0 waits, recorded are 2; record it: python tests/idle_device")
    (new,) = differences(cases, {"lisa": {"steady": 1}})
    assert new.startswith("lisa: a first step has 0 waits, recorded are None; record it")
    (gone,) = differences({}, {"lisa": {"steady": 1}})
    assert gone.startswith("lisa: is recorded and no case any more")
