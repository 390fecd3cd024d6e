"""`lisa-kernels finetune` end to end: what it writes, what it resumes, what it refuses."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import arguments, summary, write_text

from lisa_kernels.cli import main
from lisa_kernels.methods import METHODS

pytestmark = pytest.mark.usefixtures("plans_once")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A finished OwLore run with every kind of output."""
    output = tmp_path_factory.mktemp("runs") / "owlore"
    more = ["--save-every", "2", "--eval-every", "3", "--report-to", "tensorboard", "--accumulate", "2"]
    assert main(arguments(text, output, *more, method="owlore")) == 0
    return output


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_the_summary_holds_what_is_promised(finished: Path) -> None:
    values = summary(finished)
    promised = ["method", "steps", "train_loss_first", "train_loss_last", "eval_loss_before", "eval_loss_after",
                "tokens_per_second", "peak_bytes_measured", "peak_bytes_planned", "layer_visits"]  # fmt: skip
    assert set(promised) <= set(values)
    assert values["method"] == "owlore"
    assert values["steps"] == 6
    assert values["eval_loss_after"] < values["eval_loss_before"]
    assert values["train_loss_last"] < values["train_loss_first"]
    assert values["peak_bytes_planned"] > 5e6
    # A process that has held more before may grow by nothing; tests/train/test_memory.py measures one that does.
    assert isinstance(values["peak_bytes_measured"], int)
    assert values["peak_bytes_measured"] >= 0
    assert values["tokens_per_second"] > 0
    assert sum(values["layer_visits"].values()) == 6 * values["settings"]["active_layers"]


def test_the_folder_holds_model_picture_log_and_checkpoints(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "summary.json", "run.json", "layers.png"} <= names
    assert {"checkpoint-4", "checkpoint-6", "tensorboard"} <= names
    assert "checkpoint-2" not in names, "only the last two checkpoints are kept"
    assert not [name for name in names if name.endswith((".partial", ".old")) or name == "final"]
    assert not list(finished.rglob("*.bin")) + list(finished.rglob("*.pt")) + list(finished.rglob("*.pth"))
    assert list((finished / "tensorboard").glob("events.*"))


def test_the_trainer_state_tells_sampler_and_schedule(finished: Path) -> None:
    state = json.loads((finished / "checkpoint-4" / "trainer_state.json").read_text())
    attachment = state["stateful_callbacks"]["SamplingState"]["attributes"]["attachment"]
    assert attachment["sampler"]["class"] == "WeightedSampler"
    assert len(attachment["history"]) == 3
    assert any("active_layers" in entry for entry in state["log_history"])
    assert all(entry["grad_norm"] > 0 for entry in state["log_history"] if "active_layers" in entry)


RELOAD = """
import sys
sys.modules["lisa_kernels"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert len(AutoTokenizer.from_pretrained(sys.argv[1])("the state of a layer").input_ids) > 0
torch.save(model(input_ids=torch.arange(64).view(2, 32)).logits.detach(), sys.argv[2])
"""


def test_plain_transformers_reloads_the_model_without_this_package(finished: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    subprocess.run([sys.executable, "-c", RELOAD, str(finished), str(tmp_path / "logits")], check=True, cwd=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(finished)
    here = model(input_ids=torch.arange(64).view(2, 32)).logits
    assert torch.equal(torch.load(tmp_path / "logits", weights_only=True), here)


# Their forms are those of the others: full rank as LISA, drawn as OwLore.
SLOW_METHODS = {"badam", "full", "ows"}


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.slow] if m in SLOW_METHODS else []) for m in sorted(METHODS)]
)
def test_every_method_lowers_the_held_out_loss(method: str, text: Path, tmp_path: Path) -> None:
    assert main(arguments(text, tmp_path / "run", "--calibration-rows", "4", method=method)) == 0
    values = summary(tmp_path / "run")
    assert values["method"] == method
    assert values["eval_loss_after"] < values["eval_loss_before"]
    assert values["skipped_steps"] == 0


def test_what_is_written_is_the_model_that_was_measured(text: Path, tmp_path: Path) -> None:
    """The held-out loss of the saved model, measured afresh, is the summary's."""
    assert main(arguments(text, tmp_path / "run", method="lora-fa")) == 0
    first = summary(tmp_path / "run")
    more = ["--model", str(tmp_path / "run"), "--lr", "1e-30", "--steps", "1"]
    assert main(arguments(text, tmp_path / "again", *more, method="full")) == 0
    assert math.isclose(summary(tmp_path / "again")["eval_loss_before"], first["eval_loss_after"], rel_tol=1e-5)


@pytest.mark.parametrize("how", [["lora-fa"], ["lora", "--resting", "nf4"]], ids=" ".join)
def test_a_run_of_adapters_leaves_them_beside_the_model(how: list[str], text: Path, tmp_path: Path) -> None:
    """On the base that the run began with, peft computes what the saved model computes: neither holds codes."""
    import peft
    import transformers

    from lisa_kernels.train.models import load_model

    run = tmp_path / "run"
    method, *more = how
    assert main(arguments(text, run, "--targets", "q_proj,v_proj", *more, method=method)) == 0
    values = summary(run)
    assert values["eval_loss_after"] < values["eval_loss_before"]
    ids = torch.arange(3, 60)[None]
    base = load_model("preset:tiny", torch.float32, 0).eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(run)
    with torch.no_grad():
        plain = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, run / "adapter")(ids).logits
        wanted = merged(ids).logits
    torch.testing.assert_close(adapted, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, wanted, rtol=1e-4, atol=1e-3)
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "v_proj"]


def _stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send the process a ctrl-C in the middle of that step."""
    from lisa_kernels.methods import SampledAdamW

    real, count = SampledAdamW.step, [0]

    def step(self: SampledAdamW, *args: Any, **kwargs: Any) -> Any:
        # The steps of the plan are no steps of the run.
        count[0] += not next(self.model.parameters()).is_meta
        if count[0] == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(SampledAdamW, "step", step)


@pytest.mark.parametrize(
    "how",
    ["owlore", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lisa", "lora-fa", "lora --resting 3MB"))],
)
def test_ctrl_c_leaves_a_checkpoint_from_which_the_run_ends_bit_equal(
    how: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, *more = how.split()
    assert main(arguments(text, tmp_path / "whole", *more, method=method)) == 0
    with monkeypatch.context() as patch:
        _stop_after(3, patch)
        assert main(arguments(text, tmp_path / "cut", *more, method=method)) == 130
    assert not (tmp_path / "cut" / "summary.json").exists()
    assert (tmp_path / "cut" / "checkpoint-3").is_dir()
    assert main(arguments(text, tmp_path / "cut", *more, "--resume", method=method)) == 0
    whole, resumed = _weights(tmp_path / "whole"), _weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for name in ("layer_visits", "layer_history", "eval_loss_before", "eval_loss_after", "steps"):
        assert summary(tmp_path / "whole")[name] == summary(tmp_path / "cut")[name]


@pytest.mark.parametrize("method", [pytest.param("owlore", marks=pytest.mark.slow), "lora-fa"])
def test_a_run_killed_after_its_last_checkpoint_takes_no_further_step(method: str, text: Path, tmp_path: Path) -> None:
    """The rate is constant: one step too many would move the weights."""
    argv = arguments(text, tmp_path / "run", "--save-every", "2", "--lr-schedule", "constant", method=method)
    assert main(argv) == 0
    weights, before = _weights(tmp_path / "run"), summary(tmp_path / "run")
    for name in ("model.safetensors", "summary.json"):
        (tmp_path / "run" / name).unlink()
    assert main([*argv, "--resume"]) == 0
    assert all(torch.equal(weights[name], tensor) for name, tensor in _weights(tmp_path / "run").items())
    for name in ("steps", "layer_visits", "layer_history", "train_loss_last", "eval_loss_before", "eval_loss_after"):
        assert summary(tmp_path / "run")[name] == before[name]


def test_a_run_killed_before_its_first_checkpoint_begins_again(text: Path, tmp_path: Path) -> None:
    """The loss before training is known then and not computed again: it has no say in what is trained."""
    argv = arguments(text, tmp_path / "run", method="owlore")
    assert main(argv) == 0
    weights = _weights(tmp_path / "run")
    for name in ("model.safetensors", "summary.json"):
        (tmp_path / "run" / name).unlink()
    assert main([*argv, "--resume"]) == 0
    assert all(torch.equal(weights[name], tensor) for name, tensor in _weights(tmp_path / "run").items())


def test_a_second_ctrl_c_stops_at_once(text: Path, tmp_path: Path) -> None:
    from lisa_kernels.train.trainer import StopOnInterrupt

    before = signal.getsignal(signal.SIGINT)
    with StopOnInterrupt() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.interrupted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def _refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err.strip().splitlines()[-1]


def test_another_run_in_the_folder_is_refused(finished: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in finished.iterdir())
    message = _refusal(arguments(text, finished), capsys)
    assert "--resume" in message
    assert "--overwrite" in message
    assert sorted(path.name for path in finished.iterdir()) == before


def test_resuming_with_other_options_names_the_first_that_differs(
    finished: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--save-every", "2", "--eval-every", "3", "--accumulate", "2", "--resume", "--lr", "1e-2"]
    assert "--lr" in _refusal(arguments(text, finished, *more, method="owlore"), capsys)


def test_foreign_files_are_never_overwritten(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "not a run" in _refusal(arguments(text, tmp_path, "--overwrite"), capsys)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_damaged_checkpoint_is_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    assert main(arguments(text, output, "--save-every", "4")) == 0
    path = output / "checkpoint-4" / "training_state.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    for old in output.glob("checkpoint-6"):
        old.rename(tmp_path / "aside")
    assert "not a whole checkpoint" in _refusal(arguments(text, output, "--resume"), capsys)


BAD = {
    "method": (["--method", "owlor"], "owlore"),
    "preset": (["--model", "preset:tinny"], "tiny"),
    "missing data": (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    "rank": (["--method", "owlore", "--rank", "1000"], "rank"),
    "active layers": (["--active-layers", "9"], "8"),
    "embeddings": (["--embeddings", "alway"], "always"),
    "scores": (["--method", "owlore", "--scores", "outliers"], "outlier"),
    "both lengths": (["--epochs", "1"], "--epochs"),
    "eval fraction": (["--eval-fraction", "0.9"], "--eval-fraction"),
    "dtype": (["--dtype", "fp8"], "fp8"),
    "setting of another method": (["--method", "full", "--rank", "4"], "rank"),
    "resume of nothing": (["--resume"], "--resume"),
    "reporter": (["--report-to", "wandb"], "wandb"),
    "schedule": (["--lr-schedule", "linar"], "linear"),
    "nothing to offload": (["--offload-activations", "--no-gradient-checkpointing"], "--offload-activations"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input_is_one_sentence_and_exit_code_2(
    case: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, named = BAD[case]
    base = arguments(text, tmp_path / "run")
    if "--method" in flags:
        base = [flag for index, flag in enumerate(base) if flag != "--period" and base[index - 1] != "--period"]
    assert named in _refusal([*base, *flags], capsys)
    assert not (tmp_path / "run").exists(), "nothing is left behind"


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("broken.jsonl", '{"text": "fine"}\n{"text": \n', "2"),
        ("field.jsonl", '{"prompt": "only"}\n', "completion"),
        ("empty.txt", "", "empty"),
        ("long.jsonl", json.dumps({"prompt": "word " * 500, "completion": "x"}) + "\n", "supervised"),
    ],
    ids=["malformed line", "missing field", "empty file", "no supervised token"],
)
def test_bad_data_is_one_sentence_and_exit_code_2(
    name: str, content: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_text(content)
    assert named in _refusal(arguments(path, tmp_path / "run", "--eval-fraction", "0"), capsys)


def test_debug_shows_the_traceback(text: Path, tmp_path: Path) -> None:
    from lisa_kernels import InputError

    with pytest.raises(InputError):
        main(arguments(text, tmp_path / "run", "--model", "preset:tinny", "--debug"))


def test_json_goes_to_standard_output_alone(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(text, tmp_path / "run", "--json", "--steps", "2")) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 2


@pytest.mark.parametrize("kind", ["prompt", "messages"])
def test_supervised_data_shows_its_mask_and_trains(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    pairs = [(f"what is {a} plus {b}?", f" it is {a + b}.") for a in range(12) for b in range(12)]
    if kind == "prompt":
        rows = [{"prompt": question, "completion": answer} for question, answer in pairs]
    else:
        rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert main(arguments(path, tmp_path / "run", "--seq-len", "64")) == 0
    shown = capsys.readouterr().err
    assert "⟦" in shown
    assert "it is" in shown.split("⟦", 2)[-1]
    assert (kind == "messages") == (tmp_path / "run" / "chat_template.jinja").exists()
    assert summary(tmp_path / "run")["eval_loss_after"] < summary(tmp_path / "run")["eval_loss_before"]


@pytest.mark.slow
@pytest.mark.parametrize("embeddings", ["low-rank", "frozen", "always"])
def test_gradient_checkpointing_changes_memory_and_not_results(embeddings: str, text: Path, tmp_path: Path) -> None:
    flags = ("--gradient-checkpointing", "--no-gradient-checkpointing", "--offload-activations")
    for flag in flags:
        assert main(arguments(text, tmp_path / flag, flag, "--embeddings", embeddings, method="owlore")) == 0
    weights = [_weights(tmp_path / flag) for flag in flags]
    assert all(torch.equal(each[name], value) for each in weights for name, value in weights[0].items())


def test_bf16_weights_stay_bf16(text: Path, tmp_path: Path) -> None:
    assert main(arguments(text, tmp_path / "run", "--dtype", "bf16", "--steps", "3", method="owlore")) == 0
    assert {tensor.dtype for tensor in _weights(tmp_path / "run").values()} == {torch.bfloat16}
