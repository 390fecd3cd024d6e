"""`lisa-kernels plan` end to end, and the memory that a fine-tuning run is told."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import lisa_kernels
from lisa_kernels import LISA
from lisa_kernels.cli import main
from lisa_kernels.plan.cards import CARDS_GB, CONTEXT_BYTES
from lisa_kernels.plan.command import plan_run
from lisa_kernels.plan.gpu_memory import WORKSPACE_BYTES
from lisa_kernels.train.options import FineTuneOptions

from .small_config import write_config

RUN = ["--method", "lisa", "--batch-size", "4", "--seq-len", "32"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_config(tmp_path_factory.mktemp("model")))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def values(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    parsed: dict[str, Any] = json.loads(out)
    return parsed


def test_text_and_picture(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--model", config, *RUN, "--plot", str(tmp_path / "timeline.png"))
    assert code == 0
    assert " at the peak, in step " in out.splitlines()[0]
    assert all(f"{card} GB " in out for card in CARDS_GB)
    assert "timeline.png" in err
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_json_says_everything_and_the_python_call_the_same(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = values(capsys, "--model", config, *RUN)
    assert told["peak_bytes"] == sum(told["split_bytes"].values()) == max(told["phase_peak_bytes"].values())
    assert told["reserved_bytes"] >= told["peak_bytes"] > 3 * 64 * 96 * 2
    assert [card["gb"] for card in told["cards"]] == list(CARDS_GB)
    plan = lisa_kernels.plan(config, LISA(rank=16), batch_size=4, seq_len=32, gradient_checkpointing=False)
    beside = {name: told[name] for name in ("seconds", "steps", "times")}
    assert {**plan.as_dict(), **beside} == told


def test_a_checkpoint_in_four_bits_is_planned_in_16_and_said_to_be(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or somebody would take the plan for one of what is stored; numbers are those of the weights that train."""
    packed = tmp_path / "config.json"
    packed.write_text(
        json.dumps({
            **json.loads(Path(config).read_text()),
            "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
        })
    )  # fmt: skip
    (_, plain, silent), (code, told, note) = (
        run(capsys, "--model", str(at), *RUN, "--json") for at in (config, packed)
    )
    assert code == 0
    assert "stored quantised, in bitsandbytes' codes" in note
    assert "quantised" not in silent
    assert json.loads(told)["peak_bytes"] == json.loads(plain)["peak_bytes"]


def test_the_same_options_give_finetune_its_bytes(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, in blocks; on a CPU tensors alone, and none of what a GPU holds beside them."""
    options = FineTuneOptions(config, "stdlib", Path(), method="lisa", batch_size=4, seq_len=32, dtype="bf16")
    on_cpu = plan_run(options).peak_bytes
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    told = values(capsys, "--model", config, *RUN)
    assert plan_run(options).peak_bytes == told["allocated_bytes"] > told["peak_bytes"]
    assert on_cpu < told["peak_bytes"] - 2 * WORKSPACE_BYTES + 10_000


def test_planning_leaves_the_random_state_of_the_run_alone(config: str) -> None:
    """A run is the same with and without its plan."""
    before = torch.get_rng_state()
    plan_run(FineTuneOptions(config, "stdlib", Path(), batch_size=1, seq_len=16))
    assert torch.equal(torch.get_rng_state(), before)


def test_more_rows_take_more(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Negative control: batch and length reach the rehearsal."""
    peaks = [
        values(capsys, "--model", config, "--method", "lisa", "--batch-size", batch, "--seq-len", length)["peak_bytes"]
        for batch, length in (("1", "32"), ("8", "32"), ("8", "64"))
    ]
    assert peaks[0] < peaks[1] < peaks[2]


def test_fit_finds_settings_and_prints_their_command(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In what 2 rows take, 8 are too many: they are taken in turns, and the command printed says so."""
    rows = ["--model", config, "--method", "lisa", "--seq-len", "128"]
    few = values(capsys, *rows, "--batch-size", "2", "--accumulate", "4")
    size = CONTEXT_BYTES + few["reserved_bytes"]
    assert size < CONTEXT_BYTES + values(capsys, *rows, "--batch-size", "8")["reserved_bytes"]
    found = values(capsys, *rows, "--batch-size", "8", "--fit", str(size))
    assert found["fit"]["margin_bytes"] >= 0
    assert (found["batch_size"], found["accumulate"]) in ((2, 4), (4, 2))
    words = shlex.split(found["fit"]["command"])
    assert words[words.index("--batch-size") + 1] == str(found["batch_size"])
    speeds = [each["tokens_per_second_low"] for each in found["fit"]["proposals"]]
    assert speeds == sorted(speeds, reverse=True)
    assert found["fit"]["proposals"][0]["command"] == found["fit"]["command"]
    assert found["fit"]["proposals"][0]["machine"] == "rtx-3060"


BAD: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "architecture": ({"model_type": "frobnicator"}, [], ["frobnicator"]),
    "no causal model": ({"model_type": "vit", "architectures": ["ViTModel"]}, [], ["causal"]),
    "preset": ({}, ["--model", "preset:llama-2-7"], ["llama-2-7b"]),
    "method": ({}, ["--method", "owlor"], ["did you mean 'owlore'"]),
    "size": ({}, ["--fit", "16 gigs"], ["'16 gigs' is not a size", "16GB"]),
    "too small": ({}, [*RUN, "--fit", "601MB"], ["no setting of lisa fits 601.0 MB", "too much", "embeddings=frozen"]),
    "picture": ({}, ["--plot", "timeline.xyz"], ["timeline.xyz"]),
    "unfit numbers": (
        {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4},
        [*RUN],
        ["cannot be rehearsed"],
    ),
    "batch": ({}, ["--batch-size", "0"], ["--batch-size is 0"]),
    "rank": ({}, ["--method", "galore", "--rank", "0"], ["rank is 0"]),
    "dtype": ({}, ["--dtype", "fp8"], ["fp8", "bf16"]),
    "missing file": ({}, ["--model", "nowhere/config.json"], ["nowhere/config.json"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, flags, named = BAD[case]
    code, out, err = run(capsys, "--model", str(write_config(tmp_path, **changes)), *flags)
    assert (code, out) == (2, "")
    assert all(name in err for name in named), err
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
