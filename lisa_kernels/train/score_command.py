"""`lisa-kernels scores`: one number per layer, as table, JSON and picture."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console

from lisa_kernels.errors import InputError
from lisa_kernels.methods import layer_scores
from lisa_kernels.scores import CALIBRATED_KINDS
from lisa_kernels.scores.report import bar_chart, plot_scores
from lisa_kernels.train.models import check_token_ids, load_model, load_tokenizer, parse_dtype
from lisa_kernels.train.records import load_records
from lisa_kernels.train.sources.kinds import parse_columns
from lisa_kernels.train.tokenize import collate, pad_token_id, tokenize_records


def score(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Compute, print and plot the scores that the command line asks for; returns them as plain values."""
    batches = records = None
    if arguments.data is not None:
        columns = None if arguments.columns is None else parse_columns(arguments.columns)
        records = load_records(arguments.data, max_bytes=arguments.max_data_bytes, columns=columns)
    elif arguments.kind in CALIBRATED_KINDS:
        raise InputError(f"scores of kind {arguments.kind} are measured on data; give --data.")
    model = load_model(arguments.model, parse_dtype(arguments.dtype, torch.device("cpu")), arguments.seed)
    if records is not None:
        tokenizer = load_tokenizer(arguments.model, records.texts(), model.config.get_text_config().vocab_size)
        data = tokenize_records(records, tokenizer, arguments.seq_len)
        check_token_ids(model, data.max_token_id)
        rows = [data[index] for index in range(min(len(data), arguments.calibration_rows))]
        starts = range(0, len(rows), arguments.batch_size)
        batches = [collate(rows[start : start + arguments.batch_size], pad_token_id(tokenizer)) for start in starts]
    scores = layer_scores(model, arguments.kind, batches, threshold=arguments.threshold)
    title = f"{arguments.kind} scores of {arguments.model}"
    if not arguments.json:
        bar_chart(scores, title, Console())
    if arguments.plot is not None:
        plot_scores(scores, arguments.plot, title)
        console.print(f"picture in {arguments.plot}")
    source = None if arguments.data is None else ", ".join(arguments.data)
    return {"model": arguments.model, "data": source, "kind": arguments.kind, "scores": scores}
