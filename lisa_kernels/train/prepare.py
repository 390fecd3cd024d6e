"""The model, the tokenizer and the rows of a run, from its options."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from lisa_kernels.errors import InputError
from lisa_kernels.train.chat import default_chat_template
from lisa_kernels.train.models import (
    check_token_ids,
    device,
    load_model,
    load_tokenizer,
    parse_dtype,
    settle_pad_token,
)
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.records import Records, load_records
from lisa_kernels.train.sources.kinds import parse_columns
from lisa_kernels.train.tokenize import (
    TokenizedData,
    isolates_packed_examples,
    preview,
    tokenize_records,
    tokenize_split,
)


def read_records(options: FineTuneOptions) -> tuple[Records, Records | None]:
    """Return the records of (--data, --eval-data); without the latter None."""
    columns = None if options.columns is None else parse_columns(options.columns)
    records = load_records(options.data, max_bytes=options.max_data_bytes, columns=columns)
    return records, None if options.eval_data is None else load_records(options.eval_data, columns=columns)


def prepare_data(options: FineTuneOptions, console: Console) -> tuple[Any, TokenizedData, TokenizedData, Any]:
    """Return (model, training rows, held-out rows, tokenizer); the first example is shown with its mask."""
    records, held_back = read_records(options)
    model = load_model(options.model, parse_dtype(options.dtype), options.seed).to(device())
    tokenizer = load_tokenizer(options.model, records.texts(), model.config.get_text_config().vocab_size)
    pad_note = settle_pad_token(tokenizer, model)
    kinds = {records.kind} | ({held_back.kind} if held_back is not None else set())
    packing = options.packing and (kinds == {"text"} or isolates_packed_examples(model))
    if held_back is None:
        train, held_out = tokenize_split(
            records, tokenizer, options.seq_len, packing, options.eval_fraction, options.seed
        )
    else:
        train = tokenize_records(records, tokenizer, options.seq_len, packing)
        held_out = _held_out(held_back, tokenizer, options.seq_len, packing)
    if "messages" in kinds and not tokenizer.chat_template:
        # What the model learned to speak goes into its folder with it.
        tokenizer.chat_template = default_chat_template(tokenizer)
    check_token_ids(model, max(train.max_token_id, held_out.max_token_id if len(held_out) else 0))
    for note in dict.fromkeys([*([pad_note] if pad_note else []), *train.notes, *held_out.notes]):
        console.print(f"note: {note}", highlight=False, markup=False)
    console.print(
        f"{records.source}: {train.examples} examples, {len(train)} rows of up to {options.seq_len} tokens, "
        f"{train.supervised_tokens:,} supervised; {len(held_out)} rows held out",
        highlight=False, markup=False,
    )  # fmt: skip
    console.print("first row, supervised text in ⟦ ⟧:", style="bold")
    console.print(preview(train[0], tokenizer, max_tokens=80))
    return model, train, held_out, tokenizer


def _held_out(records: Records, tokenizer: Any, seq_len: int, packing: bool) -> TokenizedData:
    try:
        data = tokenize_records(records, tokenizer, seq_len, packing)
    except InputError as error:
        raise InputError(f"--eval-data {records.source}: {error}") from error
    data.notes = [f"--eval-data: {note}" for note in data.notes]
    return data
