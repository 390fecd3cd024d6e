"""The model, the tokenizer and the rows of a run, from its options."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

from lisa_kernels.distributed import at_rest, share_out
from lisa_kernels.errors import InputError
from lisa_kernels.layers import attend_by_segments, find_blocks
from lisa_kernels.train.chat import default_chat_template
from lisa_kernels.train.configs import check_sequence_length, load_config
from lisa_kernels.train.models import (
    check_token_ids,
    load_model,
    load_tokenizer,
    packed_note,
    parse_dtype,
    settle_pad_token,
)
from lisa_kernels.train.options import FineTuneOptions
from lisa_kernels.train.records import Records, load_records
from lisa_kernels.train.sources.kinds import parse_columns
from lisa_kernels.train.tokenize import (
    TokenizedData,
    accepts_position_ids,
    isolates_packed_examples,
    longest_example,
    packed,
    preview,
    tokenize_records,
    tokenize_split,
)


def read_records(options: FineTuneOptions) -> tuple[Records, Records | None]:
    """Return the records of (--data, --eval-data); without the latter None."""
    columns = None if options.columns is None else parse_columns(options.columns)
    records = load_records(options.data, max_bytes=options.max_data_bytes, columns=columns)
    return records, None if options.eval_data is None else load_records(options.eval_data, columns=columns)


@dataclass
class RunData:
    """The rows of a run and the tokenizer that made them: all of a run that needs no model.

    may_pack: whether each row is one example, and several may share a row of `seq_len` tokens under a model that keeps
    them apart. is_text: whether rows are cut from one long text.
    """

    train: TokenizedData
    held_out: TokenizedData
    tokenizer: Any
    may_pack: bool
    is_chat: bool
    is_text: bool
    seq_len: int

    @functools.cached_property
    def shared(self) -> tuple[TokenizedData, TokenizedData]:
        """Training and held-out rows that hold as many whole examples as have room."""
        return packed(self.train, self.seq_len), packed(self.held_out, self.seq_len)

    def expected_to_share(self, model: Any) -> bool:
        """Return whether examples will share rows, as far as can be told of a model without weights."""
        return self.may_pack and accepts_position_ids(model)

    @property
    def longest(self) -> int:
        """The tokens of the longest example."""
        return longest_example([*self.train.rows, *self.held_out.rows])


def read_data(options: FineTuneOptions, console: Console) -> RunData:
    """Return the rows that `options` name; tells of them and shows the first one with its mask."""
    records, held_back = read_records(options)
    config = load_config(options.model)
    long_rows = check_sequence_length(config, options.seq_len)
    tokenizer = load_tokenizer(options.model, records.texts(), config.get_text_config().vocab_size)
    kinds = {records.kind} | ({held_back.kind} if held_back is not None else set())
    if held_back is None:
        train, held_out = tokenize_split(
            records, tokenizer, options.seq_len, False, options.eval_fraction, options.seed
        )
    else:
        train = tokenize_records(records, tokenizer, options.seq_len, packing=False)
        held_out = _held_out(held_back, tokenizer, options.seq_len)
    stored = packed_note(options.model, options.dtype)
    notes = [*(note for note in (stored, long_rows) if note), *train.notes, *held_out.notes]
    if held_back is not None and options.eval_fraction not in (0, FineTuneOptions.eval_fraction):
        notes.append(f"--eval-fraction {options.eval_fraction:g} holds nothing back beside --eval-data")
    for note in dict.fromkeys(notes):
        console.print(f"note: {note}", highlight=False, markup=False)
    console.print(
        f"{records.source}: {train.examples} examples, {train.supervised_tokens:,} supervised tokens; "
        f"{held_out.examples} examples held out",
        highlight=False, markup=False,
    )  # fmt: skip
    console.print("first example, supervised text in ⟦ ⟧:", style="bold")
    console.print(preview(train[0], tokenizer, max_tokens=80))
    is_text = kinds == {"text"}
    may_pack = options.packing and not is_text
    return RunData(train, held_out, tokenizer, may_pack, "messages" in kinds, is_text, options.seq_len)


def load_model_for(
    options: FineTuneOptions, data: RunData, device: torch.device, console: Console
) -> tuple[Any, TokenizedData, TokenizedData]:  # fmt: skip
    """Return (model, on `device`; training rows, held-out rows); rows share examples where it keeps them apart.

    Where it can, its attention takes the borders of examples, and batches have no padding: see `collate_flat`. With
    --shard all ranks call it, and each keeps its rows of the weights.
    """
    model = load_model(options.model, parse_dtype(options.dtype, device), options.seed)
    if options.shard:
        share_out(model, find_blocks(model)[1], device)
    elif options.resting in (None, "16-bit"):
        model.to(device)
    # One whose matrices will rest comes when they do: in 16 bits it may not fit.
    pad_note = settle_pad_token(data.tokenizer, model)
    if pad_note is not None:
        console.print(f"note: {pad_note}", highlight=False, markup=False)
    if data.is_chat and not data.tokenizer.chat_template:
        # What the model learned to speak goes into its folder with it.
        data.tokenizer.chat_template = default_chat_template(data.tokenizer)
    check_token_ids(model, max(data.train.max_token_id, data.held_out.max_token_id))
    train, held_out = data.train, data.held_out
    by_segments = not data.is_text and attend_by_segments(model, data.longest, device=device)
    # Where forwards of a few tokens have found that out.
    at_rest(model)
    if data.may_pack and (by_segments or isolates_packed_examples(model)):
        train, held_out = data.shared
    console.print(describe_rows(train, held_out, options.seq_len, by_segments), highlight=False)
    return model, train, held_out


def describe_rows(train: TokenizedData, held_out: TokenizedData, seq_len: int, by_segments: bool) -> str:
    """Return what to say of a run's rows, and of the tokens that they have no use for."""
    empty = train.empty_share(seq_len)
    room = f", {empty:.1%} of their tokens empty" + (" and left out" if by_segments else "") if empty else ""
    return f"{len(train)} rows of up to {seq_len} tokens{room}; {len(held_out)} rows held out"


def _held_out(records: Records, tokenizer: Any, seq_len: int) -> TokenizedData:
    try:
        data = tokenize_records(records, tokenizer, seq_len, packing=False)
    except InputError as error:
        raise InputError(f"--eval-data {records.source}: {error}") from error
    data.notes = [f"--eval-data: {note}" for note in data.notes]
    return data
