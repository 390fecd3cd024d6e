"""A card of capability 7.5, such as a T4, trains in float16 with its loss scaled, and refuses bfloat16."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.order("late")
def test_a_card_without_bfloat16_trains_in_float16() -> None:
    """By the command line's own choice of dtype; a step that changed nothing is told of."""
    environment = {**os.environ, "SIM_CAPABILITY": "75"}
    command = [sys.executable, "-m", "device.on_an_old_card"]
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["capability"] == [7, 5]
    assert told["faults"] == []
    for method in ("owlore", "lisa"):
        run = told[method]
        assert (run["code"], run["dtype"]) == (0, "float16")
        assert run["eval_loss_after"] < run["eval_loss_before"]
        assert bool(run["skipped_steps"]) == ("changed nothing" in run["said"])
    assert told["bf16"]["code"] == 2
    assert "use fp16" in " ".join(told["bf16"]["said"].split())
