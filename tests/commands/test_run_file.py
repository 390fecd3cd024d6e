"""A run as a file: what it may hold, who wins, and how it is written and repeated."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from train.small_run import arguments, summary, write_text

from lisa_kernels.cli import _parser, main
from lisa_kernels.commands.run_file import CommandParser
from lisa_kernels.errors import InputError

pytestmark = pytest.mark.usefixtures("plans_once")

NEEDED = "model: preset:tiny\ndata: stdlib\noutput: out\n"


def parse(*argv: Any, command: str = "finetune") -> argparse.Namespace:
    return _parser().parse_args([command, *map(str, argv)])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def test_options_come_from_the_file_under_both_spellings_of_their_names(file: Path) -> None:
    """Rates with and without a point, switches and their negations, text and paths are read as flags would be."""
    file.write_text(
        NEEDED
        + "seq-len: 64\nbatch_size: 2\nlr: 1e-4\nperiod: auto\nweight_decay: 0\nno-packing: true\nkeep-logits: true\n"
        "gradient-checkpointing: false\nrank: null\ntargets: q_proj\n"
    )
    read = parse(file)
    assert (read.model, read.output, read.seq_len, read.batch_size) == ("preset:tiny", Path("out"), 64, 2)
    assert (read.lr, read.weight_decay, read.rank, read.targets) == (1e-4, 0.0, None, "q_proj")
    assert read.period == "auto"
    assert (read.packing, read.keep_logits, read.gradient_checkpointing) == (False, True, False)
    assert read.accumulate == 1


def test_a_switch_is_read_by_what_it_sets_too(file: Path) -> None:
    """`packing` is what run.json says; `no-gradient-checkpointing` what the command line does."""
    for packing in (True, False):
        file.write_text(NEEDED + f"packing: {str(packing).lower()}\nno-gradient-checkpointing: true\n")
        assert parse(file).packing is packing
        assert parse(file).gradient_checkpointing is False


@pytest.mark.parametrize(
    ("written", "meant"), [("auto", "auto"), ("7", 7), ("24GB", "24GB"), ("true", True), ("false", False)]
)
def test_how_much_is_recomputed_is_read_as_on_the_command_line(file: Path, written: str, meant: Any) -> None:
    file.write_text(NEEDED + f"gradient-checkpointing: {written}\n")
    assert parse(file).gradient_checkpointing == meant
    file.write_text(NEEDED)
    flag = {"true": ["--gradient-checkpointing"], "false": ["--no-gradient-checkpointing"]}
    read = parse(file, *flag.get(written, ["--gradient-checkpointing", written])).gradient_checkpointing
    assert (read, type(read)) == (meant, type(meant))


@pytest.mark.parametrize("flags_first", [False, True])
def test_flags_win(file: Path, flags_first: bool) -> None:
    """Also where a flag says the default, where an option may be repeated, and where it excludes another."""
    file.write_text(NEEDED + "seq-len: 64\npacking: false\nsteps: 9\noverwrite: true\n")
    flags = ["--seq-len", "512", "--data", "stdlib:code", "--epochs", "2", "--resume"]
    read = parse(*([*flags, file] if flags_first else [file, *flags]))
    assert (read.seq_len, read.epochs, read.steps) == (512, 2.0, None)
    assert (read.resume, read.overwrite, read.packing) == (True, False, False)
    assert "stdlib:code" in read.data
    assert "stdlib" not in ([read.data] if isinstance(read.data, str) else read.data)


def test_an_option_that_may_be_repeated_is_a_list(file: Path) -> None:
    """One value or several in the file; flags replace them all."""
    parser = CommandParser()
    parser.add_argument("run_file", nargs="?")
    parser.add_argument("--part", action="append", type=int)
    file.write_text("part: [1, 2]")
    assert parser.parse_args([str(file)]).part == [1, 2]
    assert parser.parse_args([str(file), "--part", "3"]).part == [3]
    file.write_text("part: 4")
    assert parser.parse_args([str(file)]).part == [4]


BAD = {
    "unknown key": (NEEDED + "seq-length: 4", "did you mean 'seq-len'"),
    "a list": ("- model", "holds a list; a mapping"),
    "a text": ("just words", "a mapping of options"),
    "empty": ("", "holds nothing"),
    "no YAML": ("model: [", "is no YAML"),
    "text for a number": (NEEDED + "steps: many", "a whole number is wanted"),
    "text for what may be automatic": (NEEDED + "period: often", "a whole number or auto is wanted"),
    "a fraction for a count": (NEEDED + "steps: 2.5", "a whole number is wanted"),
    "a switch for a number": (NEEDED + "steps: true", "a whole number is wanted"),
    "a number for a switch": (NEEDED + "packing: 1", "true or false is wanted"),
    "a list for one value": (NEEDED + "lr: [1, 2]", "a number or auto is wanted"),
    "a mapping for one value": (NEEDED + "lr: {peak: 2}", "is a mapping"),
    "a bare no for text": (NEEDED + "method: no", "needs quotes"),
    "the same key twice": (NEEDED + "lr: 1\nlr: 2", "twice"),
    "one option twice": (NEEDED + "seq-len: 1\nseq_len: 2", "twice"),
    "an option that is wanted": ("model: preset:tiny\ndata: stdlib", "--output must be given"),
    "not to be nested": (NEEDED + "run-file: other.yaml", "unknown option"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_sentence_and_exit_code_2(case: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, named = BAD[case]
    file.write_text(text)
    assert main(["finetune", str(file)]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_a_file_that_is_not_there_and_what_is_missing_without_one(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", str(file)]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["finetune", "--model", "preset:tiny"]) == 2
    assert "--data, --output must be given" in capsys.readouterr().err


def test_what_is_written_is_read_as_it_was(file: Path) -> None:
    """Every option comes back the same: those given, defaults, small rates, text that YAML would take for more."""
    argv = ["--model", "preset:tiny", "--data", "yes: #1", "--output", "12", "--lr", "1e-05", "--no-packing"]
    argv += ["--gradient-checkpointing", "--epochs", "0.5"]
    assert main(["finetune", "--save-config", str(file), *argv]) == 0
    given, read = vars(parse(*argv)), vars(parse(file))
    for name in ("run", "run_file"):
        given.pop(name), read.pop(name)
    assert read == given
    assert "# tokens per row\nseq-len: 512\n" in file.read_text()
    assert "# lr: " not in file.read_text()


def test_nothing_is_written_over_or_from_options_out_of_range(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["finetune", "--save-config", str(file), "--model", "preset:tiny", "--data", "stdlib", "--output", "out"]
    assert main([*argv, "--seq-len", "0"]) == 2
    assert not file.exists()
    file.write_text("mine: yes\n")
    assert main(argv) == 2
    assert "there already" in capsys.readouterr().err
    assert file.read_text() == "mine: yes\n"


def test_plan_takes_the_same_file(file: Path) -> None:
    """What only a run needs is passed over; an unknown key is not."""
    file.write_text(NEEDED + "seq-len: 64\nlr: 1\n")
    read = parse(file, "--batch-size", "3", command="plan")
    assert (read.model, read.seq_len, read.batch_size, read.dtype) == ("preset:tiny", 64, 3, "bf16")
    file.write_text(NEEDED + "lrr: 1\n")
    with pytest.raises(InputError, match="unknown option"):
        parse(file, command="plan")


def test_a_finished_run_is_repeated_by_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """run.json, or its folder, into another output: the same losses. Into its own: only when told to."""
    text = write_text(tmp_path)
    first, again = tmp_path / "first", tmp_path / "again"
    assert main(arguments(text, first, "--steps", "2", "--lr", "2e-3")) == 0
    assert main(["finetune", str(first / "run.json"), "--output", str(again)]) == 0
    same = ("train_loss_first", "train_loss_last", "eval_loss_after", "layer_history", "lr")
    assert {name: summary(again)[name] for name in same} == {name: summary(first)[name] for name in same}
    saved, repeated = (json.loads((run / "run.json").read_text())["options"] for run in (first, again))
    assert repeated == saved
    capsys.readouterr()
    assert main(["finetune", str(first)]) == 2
    assert "--overwrite" in capsys.readouterr().err
