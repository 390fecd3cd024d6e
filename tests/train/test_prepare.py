"""The rows of a run, ready before anything slow, and the model that they are for."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from families import llama
from rich.console import Console

from lisa_kernels.errors import InputError
from lisa_kernels.layers import attends_by_segments
from lisa_kernels.train.finetune import finetune
from lisa_kernels.train.models import train_tokenizer
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.prepare import load_model_for, read_data

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a tokenizer of as many tokens as its embedding has rows."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(["a question and its answer"], 280)
    llama(layers=2, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def written(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PAIRS = [{"prompt": f"q{n} ", "completion": "a" * (n + 1)} for n in range(8)]


def options(base: Path, folder: Path, **more: Any) -> FineTuneOptions:
    given = {"data": written(folder / "rows.jsonl", PAIRS), "seq_len": 32, "batch_size": 2, "dtype": "fp32", **more}
    return FineTuneOptions(str(base), output=folder / "run", **given)


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_rows_share_rows_once_the_model_is_known(base: Path, tmp_path: Path) -> None:
    """Packing needs a model that keeps examples apart; it changes where they lie and not what they are."""
    given = options(base, tmp_path)
    data = read_data(given, console())
    assert all("position_ids" not in row for row in data.train.rows)
    _, train, _ = load_model_for(given, data, CPU, console())
    assert len(train) < len(data.train)
    assert (train.examples, train.tokens) == (data.train.examples, data.train.tokens)
    tokens = [sorted(torch.cat([row["input_ids"] for row in part.rows]).tolist()) for part in (train, data.train)]
    assert tokens[0] == tokens[1]
    _, alone, _ = load_model_for(options(base, tmp_path, packing=False), data_of(base, tmp_path), CPU, console())
    assert [len(row["input_ids"]) for row in alone.rows] == [len(row["input_ids"]) for row in data.train.rows]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_is_empty_of_rows_is_told(dropout: float, base: Path, tmp_path: Path) -> None:
    """With how many tokens no batch computes, where attention takes the borders of examples."""
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    # Which borders do not tell.
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": dropout}))
    given, out = options(folder, tmp_path), io.StringIO()
    model, train, _ = load_model_for(given, read_data(given, console()), CPU, Console(file=out, width=200))
    empty = 1 - train.tokens / (32 * len(train))
    assert 0 < empty < 1
    told = f"{len(train)} rows of up to 32 tokens, {empty:.1%} of their tokens empty"
    assert told + (";" if dropout else " and left out;") in out.getvalue()
    assert attends_by_segments(model) == (dropout == 0)


def data_of(base: Path, folder: Path) -> Any:
    return read_data(options(base, folder, packing=False), console())


def test_a_pad_token_without_a_row_is_replaced_and_told_of(base: Path, tmp_path: Path) -> None:
    """A token that was added without resizing the embedding would be an index out of range in the first short row."""
    given = options(base, tmp_path)
    data = read_data(given, console())
    data.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    said = Console(file=io.StringIO(), width=200)
    load_model_for(given, data, CPU, said)
    assert data.tokenizer.pad_token == data.tokenizer.eos_token
    assert "[PAD]" in said.file.getvalue()  # type: ignore[attr-defined]


def test_held_out_data_of_its_own_is_named_where_it_is_wrong(base: Path, tmp_path: Path) -> None:
    """--eval-data takes the place of the share, and what is wrong with it is not said of --data."""
    short = written(tmp_path / "held.jsonl", PAIRS[:3])
    data = read_data(options(base, tmp_path, eval_data=short), console())
    assert (data.train.examples, data.held_out.examples) == (8, 3)
    said = Console(file=io.StringIO(), width=200)
    read_data(options(base, tmp_path, eval_data=short, eval_fraction=0.3), said)
    assert "--eval-fraction 0.3 holds nothing back" in said.file.getvalue()  # type: ignore[attr-defined]
    long = written(tmp_path / "long.jsonl", [{"prompt": "q" * 100, "completion": "a"}])
    with pytest.raises(InputError, match=r"--eval-data .*no supervised token"):
        read_data(options(base, tmp_path, eval_data=long), console())


BAD = {
    "no such file": ({"data": "nowhere.jsonl"}, "nowhere"),
    "no such column": ({"columns": "prompt=asked,completion=said"}, "asked"),
    "held-out file": ({"eval_data": "nowhere.jsonl"}, "nowhere"),
    "rank": ({"method": "owlore", "rank": 1000}, "rank"),
    "layers": ({"active_layers": 9}, "active_layers"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_found_before_the_model_is_loaded(
    case: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of many gigabytes takes minutes; what its plan cannot refuse is refused before the plan."""
    from lisa_kernels.plan.command import plan_run
    from lisa_kernels.train import prepare

    def load(*args: Any) -> NoReturn:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(prepare, "load_model", load)
    more, named = BAD[case]
    with pytest.raises(InputError, match=named):
        finetune(options(base, tmp_path, **{"method": "lisa", **more}), console(), plan_run)
    assert not (tmp_path / "run").exists()
