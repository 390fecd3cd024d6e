"""`lisa-kernels evaluate` end to end: figures that lm-evaluation-harness gives too, and one sentence for bad input."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from slow_products import HalfProducts, have_no_matrix_units

from lisa_kernels.cli import main
from lisa_kernels.errors import InputError
from lisa_kernels.evaluate.choices import find_choices
from lisa_kernels.evaluate.command import EvaluateOptions, evaluate
from lisa_kernels.evaluate.encoding import scored_choices
from lisa_kernels.evaluate.likelihood import log_likelihoods
from lisa_kernels.train.models import load_model, load_tokenizer, train_tokenizer
from lisa_kernels.train.records import load_records
from lisa_kernels.train.tokenize import IGNORED, tokenize_records

ANIMALS = ("a heron", "an otter", "the old badger", "a hare")
ROWS = [
    {"prompt": f"Question {n}: who eats {what}? Answer:", "choices": list(ANIMALS), "completion": f" {ANIMALS[n % 3]}"}
    for n, what in enumerate(("fish", "frogs", "grass", "worms", "reeds", "eggs", "bark"))
]
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small model and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    load_model("preset:tiny", torch.float32, seed=1).save_pretrained(folder)
    texts = [row["prompt"] + row["completion"] for row in ROWS for _ in range(9)]
    train_tokenizer(texts, 400).save_pretrained(folder)
    return folder


def written(folder: Path, rows: list[Any], name: str = "rows.json") -> str:
    path = folder / name
    path.write_text(json.dumps(rows))
    return str(path)


def measured(saved: Path | str, data: str, **options: Any) -> dict[str, Any]:
    found = evaluate(EvaluateOptions([str(saved)], [data], **options), Console(file=io.StringIO()))
    figures: dict[str, Any] = found["models"][0]
    return figures


def harness_values(saved: Path) -> list[list[float]]:
    """Return the log-likelihood of each row's choices by lm-evaluation-harness's own model class."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    peer = HFLM(
        pretrained=load_model(str(saved), torch.float32, 0), tokenizer=load_tokenizer(str(saved), [], 4096),
        batch_size=3, device="cpu",
    )  # fmt: skip
    asked = [(row["prompt"], f" {choice}") for row in ROWS for choice in ANIMALS]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(asked)]
    found = [value for value, _ in peer.loglikelihood(requests, disable_tqdm=True)]
    return [found[at : at + len(ANIMALS)] for at in range(0, len(found), len(ANIMALS))]


def test_figures_are_those_of_lm_evaluation_harness(saved: Path, tmp_path: Path) -> None:
    """Each choice's log-likelihood, and the shares of right ones, plain and for each character."""
    data = written(tmp_path, ROWS)
    theirs = harness_values(saved)
    records = load_records(data, keep_rows=True)
    choices = find_choices(records)
    assert choices is not None
    scored = scored_choices(records, choices, load_tokenizer(str(saved), [], 4096), 2048)
    ours = log_likelihoods(load_model(str(saved), torch.float32, 0), [one for row in scored for one in row], 0, 200)
    assert ours == pytest.approx([value for row in theirs for value in row], rel=1e-4)
    gold = [row["choices"].index(row["completion"].strip()) for row in ROWS]
    plain, normalised = torch.tensor(theirs), torch.tensor(theirs) / torch.tensor([len(text) for text in ANIMALS])
    figures = measured(saved, data)
    for name, values in (("accuracy", plain), ("accuracy_normalised", normalised)):
        assert figures[name] == pytest.approx(float((values.argmax(1) == torch.tensor(gold)).double().mean()))
        assert figures[f"{name}_interval"][0] <= figures[name] <= figures[f"{name}_interval"][1]
    assert figures["rows"] == len(ROWS)


def test_the_loss_is_what_training_holds_out(saved: Path, tmp_path: Path) -> None:
    """Of conversations too: the mean over supervised tokens of the model's own loss, row by row."""
    model = load_model(str(saved), torch.float32, 0).eval()
    tokenizer = load_tokenizer(str(saved), [], 4096)
    data = written(tmp_path, [{"question": row["prompt"], "answer": row["completion"].strip()} for row in ROWS])
    rows = tokenize_records(load_records(data), tokenizer, 256, packing=False)
    total, tokens = 0.0, 0
    for row in rows.rows:
        count = int((row["labels"][1:] != IGNORED).sum())
        with torch.no_grad():
            loss = model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss
        total, tokens = total + float(loss) * count, tokens + count
    figures = measured(saved, data, batch_tokens=90)
    assert figures["answer_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert (figures["tokens"], figures["accuracy"]) == (tokens, None)


def test_16_bits_take_none_of_torchs_slow_products(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_no_matrix_units(monkeypatch)
    with HalfProducts() as slow:
        found = measured(saved, written(tmp_path, ROWS), dtype="bf16", batch_tokens=256)
    assert slow.count == 0
    whole = measured(saved, written(tmp_path, ROWS), dtype="fp32")
    assert found["answer_loss"] == pytest.approx(whole["answer_loss"], rel=0.01)


def test_models_are_compared_in_pairs(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal models differ by exactly nothing; JSON holds what the table shows."""
    data = written(tmp_path, ROWS)
    assert main(["evaluate", "--model", str(saved), "--model", str(saved), "--data", data, "--json"]) == 0
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert result["models"][0] == result["models"][1]
    assert (result["differences"][0]["answer_loss"], result["differences"][0]["answer_loss_interval"]) == (0.0, [0, 0])
    assert f"{result['models'][0]['answer_loss']:.4f}" in said.err


def test_choices_stand_where_answers_do_in_a_chat_template(saved: Path, tmp_path: Path) -> None:
    """The likeliest choice of a conversation is the one whose own tokens, and not the end marker, are likeliest."""
    tokenizer = load_tokenizer(str(saved), [], 4096)
    tokenizer.chat_template = CHAT
    folder = tmp_path / "chat"
    load_model(str(saved), torch.float32, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"question": row["prompt"], "choices": row["choices"], "answer": n % 4} for n, row in enumerate(ROWS)]
    figures = measured(folder, written(tmp_path, rows))
    asked = [{**row, "prompt": f"<|user|>{row['prompt']}<|end|><|assistant|>"} for row in ROWS]
    model = load_model(str(folder), torch.float32, 0).eval()
    right = 0
    for row, n in zip(asked, range(len(rows))):
        before = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        sums = []
        for choice in ANIMALS:
            ids = tokenizer(row["prompt"] + choice, add_special_tokens=False)["input_ids"]
            assert ids[: len(before)] == before
            with torch.no_grad():
                logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logs[at - 1, ids[at]]) for at in range(len(before), len(ids))))
        right += sums.index(max(sums)) == n % 4
    assert figures["accuracy"] == pytest.approx(right / len(rows))


def other_vocabulary(saved: Path, folder: Path) -> dict[str, Any]:
    load_model(str(saved), torch.float32, 0).save_pretrained(folder / "other")
    train_tokenizer(["quite other words"] * 9, 300).save_pretrained(folder / "other")
    return {"model": [str(saved), str(folder / "other")]}


BAD: dict[str, tuple[Callable[[Path, Path], dict[str, Any]], str]] = {
    "vocabularies": (other_vocabulary, "different vocabularies"),
    "answer": (lambda saved, folder: {"data": [written(folder, [{**ROWS[0], "answer": "a crow"}])]}, "not among"),
    "long choice": (
        lambda saved, folder: {"data": [written(folder, [{**ROWS[0], "choices": ["a heron", "word " * 5000]}])]},
        "row 1 has .* tokens with its longest choice; the model reads",
    ),
    "too long": (lambda saved, folder: {"seq_len": 1 << 20}, "--seq-len is 1048576, and .* reads"),
    "no rows": (lambda saved, folder: {"max_rows": 0}, "--max-rows is 0"),
    "no data": (lambda saved, folder: {"data": ["nowhere.json"]}, "nowhere.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_before_a_model_is_loaded(
    case: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, said = BAD[case]
    given = {"model": [str(saved)], "data": [written(tmp_path, ROWS)], **change(saved, tmp_path)}
    monkeypatch.setattr("lisa_kernels.evaluate.command.load_with_adapter", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(InputError, match=said):
        evaluate(EvaluateOptions(**given), Console(file=io.StringIO()))


def test_fewer_rows_are_spread_over_all(saved: Path, tmp_path: Path) -> None:
    figures = measured(saved, written(tmp_path, ROWS), max_rows=3)
    spread = measured(saved, written(tmp_path, [ROWS[0], ROWS[2], ROWS[4]], "some.json"))
    assert {**figures, "model": ""} == {**spread, "model": ""}
