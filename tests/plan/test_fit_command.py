"""The command that `plan --fit` prints, run as it is printed: what it holds is what was planned, to the byte."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from train.small_run import write_text

from lisa_kernels.cli import main
from lisa_kernels.methods.precision import is_size
from lisa_kernels.plan.cards import CONTEXT_BYTES
from lisa_kernels.report.record import read_run
from lisa_kernels.train.configs import load_config
from lisa_kernels.train.models import BYTE_VOCABULARY, train_tokenizer

HELD = ("weights", "gradients", "bases", "optimizer state")
# Of Llama-3.1-8B: a sixteenth or an eighth of its width, an eighth of its layers.
SIXTEENTH, EIGHTH = 16, 8
ASKED = ["--method", "owlore", "--rank", "16", "--active-layers", "2", "--scores", "uniform"]
ROWS = ["--batch-size", "1", "--seq-len", "64", "--dtype", "bf16", "--steps", "10"]


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    """A folder with Llama-3.1-8B scaled down, random, its tokens bytes, and a text."""
    return scaled_down(tmp_path, SIXTEENTH)


def scaled_down(folder: Path, part: int) -> Path:
    from transformers import LlamaForCausalLM

    config = load_config("preset:llama-3.1-8b")
    config.hidden_size //= part
    config.intermediate_size //= part
    config.head_dim = config.hidden_size // config.num_attention_heads
    config.num_hidden_layers //= EIGHTH
    config.vocab_size, config.bos_token_id, config.eos_token_id = BYTE_VOCABULARY, None, 0
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    train_tokenizer(["some words"], BYTE_VOCABULARY).save_pretrained(folder / "model")
    write_text(folder).rename(folder / "text.txt")
    return folder


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", *arguments, "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


@pytest.mark.slow
def test_a_run_by_the_command_that_was_printed_holds_what_was_planned(
    twin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two switches are in it; and the plan that the run makes of itself is the one that was printed."""
    model = ["--model", str(twin / "model"), *ASKED, *ROWS, "--gradient-checkpointing"]
    wanted = planned(capsys, *model, "--resting", "nf4", "--resting-where", "host")
    found = planned(capsys, *model, "--fit", str(CONTEXT_BYTES + wanted["reserved_bytes"]))
    assert found["resting_where"] == "host"
    words = shlex.split(found["fit"]["command"])
    command = words[words.index("lisa-kernels") + 1 :]
    given = {"DATA": str(twin / "text.txt"), "OUTPUT": str(tmp_path / "run")}
    assert main([*(given.get(word, word) for word in command), "--device", "cpu", "--samples", "0"]) == 0
    run, summary = read_run(tmp_path / "run"), json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len({tuple(layers) for layers in summary["layer_history"]}) > 1
    # Of a CPU, which is host and device: all codes and masters, beside the two buffers.
    held = {name: max(each["held_bytes"][name] for each in run.logs) for name in HELD}
    assert held == {name: run.begin["plan"]["held_bytes"][name] for name in HELD}


@pytest.mark.slow
def test_a_size_that_was_printed_is_planned_again_to_the_byte_and_run_within_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a run holds differs by the matrices that it finds to lose most: it fills the size, and no more."""
    twin = scaled_down(tmp_path, EIGHTH)
    # Nothing is left to give up.
    asked = [*ASKED[:-4], "--active-layers", "1", "--scores", "uniform", "--embeddings", "frozen"]
    model = ["--model", str(twin / "model"), *asked, *ROWS, "--gradient-checkpointing", "--offload-activations"]
    four, eight = (planned(capsys, *model, "--resting", way) for way in ("nf4", "int8"))
    # With segments that grow, nf4 leaves a few MB here, which all in 8 bits do not fit.
    assert four["reserved_bytes_expandable"] < four["reserved_bytes"] < eight["reserved_bytes_expandable"]
    found = planned(capsys, *model, "--fit", str(CONTEXT_BYTES + four["reserved_bytes"]))
    assert is_size(found["resting"])
    assert found["fit"]["margin_bytes"] >= 0
    assert four["peak_bytes"] < found["peak_bytes"] < eight["peak_bytes"]
    words = shlex.split(found["fit"]["command"])
    given = {"DATA": str(twin / "text.txt"), "OUTPUT": str(tmp_path / "run")}
    command = [given.get(word, word) for word in words[words.index("lisa-kernels") + 2 :]]
    assert [command[2], command[4]] == ["--data", "--output"]
    again = planned(capsys, *command[:2], *command[6:])
    for name in ("peak_bytes", "allocated_bytes", "reserved_bytes", "reserved_bytes_expandable", "split_bytes"):
        assert again[name] == found[name]
    assert main(["finetune", *command, "--device", "cpu", "--samples", "0"]) == 0
    run = read_run(tmp_path / "run")
    held = {name: max(each["held_bytes"][name] for each in run.logs) for name in HELD}
    expected = run.begin["plan"]["held_bytes"]
    # The digits of a size in MB; and what a matrix takes more in 8 bits.
    assert -512 * 1792 // 2 < held.pop("weights") - expected["weights"] <= 10**4
    assert held == {name: expected[name] for name in HELD if name != "weights"}
