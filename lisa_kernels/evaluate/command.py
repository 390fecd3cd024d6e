"""`lisa-kernels evaluate`: one or several models on the same rows."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from lisa_kernels.devices import choose_device, survey_machine
from lisa_kernels.errors import InputError
from lisa_kernels.evaluate.adapters import base_of, load_with_adapter, tokenizer_of
from lisa_kernels.evaluate.choices import Choices, find_choices
from lisa_kernels.evaluate.encoding import scored_choices, scored_rows
from lisa_kernels.evaluate.intervals import Ratio, difference_interval, interval
from lisa_kernels.evaluate.likelihood import Scored, log_likelihoods
from lisa_kernels.layers import PlainLinears
from lisa_kernels.ops.capability import check_dtype
from lisa_kernels.progress import progress_bar
from lisa_kernels.train.configs import load_config
from lisa_kernels.train.models import check_token_ids, load_tokenizer, parse_dtype
from lisa_kernels.train.records import Records, load_records
from lisa_kernels.train.sources.kinds import parse_columns
from lisa_kernels.train.tokenize import pad_token_id, tokenize_records

# Of a text, which has no rows of its own, where the model reads more.
TEXT_ROW = 1024
QUANTITIES = {
    "answer_loss": "answer loss, nats a token",
    "accuracy": "accuracy",
    "accuracy_normalised": "accuracy by likelihood a character",
}


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `lisa-kernels evaluate`, one field a flag; see its help for units and defaults."""

    model: list[str]
    data: list[str]
    columns: str | None = None
    choices: str | None = None
    max_data_bytes: int | None = None
    max_rows: int | None = None
    seq_len: int | None = None
    batch_tokens: int = 2048
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in {"max_rows": 1, "seq_len": 2, "batch_tokens": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} is {value}; at least {least} is wanted.")


@dataclass(frozen=True)
class _Rows:
    """What one model is asked: answers, and choices where there are some, as its own tokenizer has them."""

    answers: list[Scored]
    choices: list[Choices] | None
    offered: list[tuple[Scored, ...]]
    tokenizer: Any
    notes: list[str]


@dataclass(frozen=True)
class Questions:
    """The rows that `--data` names, and the choices of each where there are some."""

    records: Records
    choices: list[Choices] | None


def read_questions(options: EvaluateOptions) -> Questions:
    """Return the rows that models are asked. Raises InputError for what cannot be read, or has no such choices."""
    columns = None if options.columns is None else parse_columns(options.columns)
    records = load_records(options.data, max_bytes=options.max_data_bytes, columns=columns, keep_rows=True)
    given = [choice.strip() for choice in options.choices.split(",")] if options.choices else []
    return _sample(Questions(records, find_choices(records, given)), options.max_rows)


def evaluate(options: EvaluateOptions, console: Console, questions: Questions | None = None) -> dict[str, Any]:
    """Score each model on the same rows; returns the figures of each and the differences to the first.

    questions: the rows, where `read_questions` read them before. answer_loss: nats for each supervised token, what ends
    an answer included, as training has it. accuracy: share of rows whose right choice is the likeliest;
    accuracy_normalised: the likeliest for each of its characters. Intervals are of 95 %, by the bootstrap over rows.
    Raises InputError for models of different vocabularies.
    """
    device = choose_device(options.device, survey_machine())
    dtype = parse_dtype(options.dtype, device)
    check_dtype(dtype, device)
    questions = questions or read_questions(options)
    asked = [_ask(spec, questions, options) for spec in options.model]
    _check_alike(options.model, asked, console)
    measured = []
    for spec, rows in zip(options.model, asked):
        model = load_with_adapter(spec, dtype, options.seed).to(device)
        measured.append(_measure(model, spec, rows, options.batch_tokens, console))
        del model
        gc.collect()
    figures = [_figures(*each) for each in zip(options.model, measured, asked)]
    differences = _differences(options.model, measured)
    result: dict[str, Any] = {"data": questions.records.source, "models": figures, "differences": differences}
    console.print(_table(result))
    return result


def _sample(questions: Questions, most: int | None) -> Questions:
    """Return `most` of the rows, spread evenly over all of them."""
    records, choices, count = questions.records, questions.choices, len(questions.records)
    if most is None or most >= count or records.kind == "text":
        return questions
    kept = [at * count // most for at in range(most)]
    items, rows = ([values[at] for at in kept] for values in (records.items, records.rows))
    fewer = Records(records.kind, items, records.source, [*records.notes, f"{most} of {count} rows are used"], rows)
    return Questions(fewer, None if choices is None else [choices[at] for at in kept])


def _ask(spec: str, questions: Questions, options: EvaluateOptions) -> _Rows:
    """Return the rows as the tokens of one model."""
    records, choices = questions.records, questions.choices
    config = load_config(base_of(spec)).get_text_config()
    tokenizer = load_tokenizer(tokenizer_of(spec), records.texts(), config.vocab_size)
    longest = int(getattr(config, "max_position_embeddings", None) or 1 << 30)
    seq_len = options.seq_len or (min(longest, TEXT_ROW) if records.kind == "text" else longest)
    if seq_len > longest:
        raise InputError(f"--seq-len is {seq_len}, and {spec!r} reads {longest} tokens at most.")
    data = tokenize_records(records, tokenizer, seq_len, packing=False)
    offered = []
    if choices is not None:
        spoken = records.for_template(getattr(tokenizer, "chat_template", None))
        offered = scored_choices(spoken, choices, tokenizer, longest)
    return _Rows(scored_rows(data), choices, offered, tokenizer, data.notes)


def _check_alike(specs: Sequence[str], asked: Sequence[_Rows], console: Console) -> None:
    """Refuse models whose figures cannot be compared, and tell of what is to be known of the rows."""
    first = asked[0]
    for spec, rows in zip(specs, asked):
        if rows.tokenizer.get_vocab() != first.tokenizer.get_vocab():
            raise InputError(
                f"{specs[0]!r} and {spec!r} have different vocabularies: a loss for each token of one is not to be "
                "compared with one of the other. Evaluate them apart."
            )
        if len(rows.answers) != len(first.answers):
            raise InputError(
                f"of the same data {len(first.answers)} rows have something left to score for {specs[0]!r} and "
                f"{len(rows.answers)} for {spec!r}; leave the longest rows out."
            )
    notes = list(dict.fromkeys(note for rows in asked for note in rows.notes))
    if len({getattr(rows.tokenizer, "chat_template", None) for rows in asked}) > 1:
        notes.append("the models' chat templates differ: each is asked in its own")
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _measure(model: Any, name: str, rows: _Rows, batch_tokens: int, console: Console) -> dict[str, Ratio]:
    """Return each quantity of one model."""
    pad = pad_token_id(rows.tokenizer)
    scored = [*rows.answers, *(choice for offered in rows.offered for choice in offered)]
    check_token_ids(model, max(max(row.ids) for row in scored))
    # For good: nothing else is done with it.
    PlainLinears(model)
    with progress_bar(name, scored, console) as advance:
        found = log_likelihoods(model, scored, pad, batch_tokens, advance)
    return _ratios(rows, found[: len(rows.answers)], found[len(rows.answers) :])


def _ratios(rows: _Rows, answers: Sequence[float], offered: Sequence[float]) -> dict[str, Ratio]:
    """Return each quantity from the log-likelihoods of the answers and of all rows' choices, one after the other."""
    lengths = [float(len(row.places)) for row in rows.answers]
    ratios = {"answer_loss": Ratio([-value for value in answers], lengths)}
    if rows.choices is None:
        return ratios
    values, plain, normalised = iter(offered), list[float](), list[float]()
    for choices in rows.choices:
        totals = [next(values) for _ in choices.texts]
        plain.append(_is_right(totals, choices))
        normalised.append(_is_right([total / len(text) for total, text in zip(totals, choices.texts)], choices))
    ones = [1.0] * len(plain)
    return {**ratios, "accuracy": Ratio(plain, ones), "accuracy_normalised": Ratio(normalised, ones)}


def _is_right(values: Sequence[float], choices: Choices) -> float:
    """Return 1.0 where the right choice has the largest value; of equal ones the first counts as chosen."""
    return float(values.index(max(values)) == choices.right)


def _figures(spec: str, ratios: dict[str, Ratio], rows: _Rows) -> dict[str, Any]:
    found: dict[str, Any] = {"model": spec, "rows": len(rows.choices or rows.answers)}
    found["tokens"] = int(sum(ratios["answer_loss"].below))
    for name in QUANTITIES:
        ratio = ratios.get(name)
        found[name] = None if ratio is None else ratio.value
        found[f"{name}_interval"] = None if ratio is None else list(interval(ratio))
    return found


def _differences(specs: Sequence[str], measured: Sequence[dict[str, Ratio]]) -> list[dict[str, Any]]:
    """Return for each model but the first what it has more of each quantity, and the interval of that."""
    found = []
    for spec, ratios in list(zip(specs, measured))[1:]:
        more: dict[str, Any] = {"model": spec, "less": specs[0]}
        for name, ratio in ratios.items():
            more[name] = ratio.value - measured[0][name].value
            more[f"{name}_interval"] = list(difference_interval(measured[0][name], ratio))
        found.append(more)
    return found


def _table(result: dict[str, Any]) -> Table:
    table = Table(
        title=f"{result['data']}: {result['models'][0]['rows']} rows, intervals of 95 %", title_justify="left"
    )
    table.add_column("model")
    shown = [name for name in QUANTITIES if result["models"][0][name] is not None]
    for name in shown:
        table.add_column(QUANTITIES[name])
    for figures in result["models"]:
        table.add_row(figures["model"], *[_cell(figures, name, "{:.4f}") for name in shown])
    for more in result["differences"]:
        table.add_row(f"{more['model']} − {more['less']}", *[_cell(more, name, "{:+.4f}") for name in shown])
    return table


def _cell(figures: dict[str, Any], name: str, form: str) -> str:
    low, high = (form.format(end) for end in figures[f"{name}_interval"])
    return f"{form.format(figures[name])} ({low} to {high})"
