"""Log-probabilities of tokens under a model, many rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lisa_kernels.layers import output_layer


@dataclass(frozen=True)
class Scored:
    """Token ids, and the places, ascending and from 1 on, of those whose probability is asked for."""

    ids: tuple[int, ...]
    places: tuple[int, ...]

    @property
    def read(self) -> tuple[int, ...]:
        """What a model must read to predict them all: it never reads the last."""
        return self.ids[: self.places[-1]]


def log_likelihoods(
    model: Any, rows: Sequence[Scored], pad: int, batch_tokens: int, advance: Callable[[int], None] = lambda rows: None
) -> list[float]:
    """Return for each row the sum of the log-probabilities, in nats, of the tokens at its places given all before.

    batch_tokens: positions of a forward, padding included; a longer row goes alone. What several rows begin with alike
    is read once where one of them ends there, such as choices that differ in their last token. advance: told of the
    rows that are done.
    """
    sums = [0.0] * len(rows)
    readers = _readers(rows)
    training = model.training
    model.eval()
    try:
        for batch in _batches(sorted(readers, key=len, reverse=True), batch_tokens):
            members = [[(number, rows[number]) for number in readers[read]] for read in batch]
            for number, total in _batch(model, batch, members, pad):
                sums[number] = total
            advance(sum(map(len, members)))
    finally:
        model.train(training)
    return sums


def _readers(rows: Sequence[Scored]) -> dict[tuple[int, ...], list[int]]:
    """Return what is to be read, and the numbers of the rows that each serves: those that read it or its beginning."""
    readers: dict[tuple[int, ...], list[int]] = {}
    longer: tuple[int, ...] = ()
    # In this order a beginning stands before all that goes on from it.
    for number in sorted(range(len(rows)), key=lambda number: rows[number].read, reverse=True):
        read = rows[number].read
        if longer[: len(read)] != read:
            longer = read
        readers.setdefault(longer, []).append(number)
    return readers


def _batches(reads: Sequence[tuple[int, ...]], batch_tokens: int) -> Iterator[Sequence[tuple[int, ...]]]:
    """Yield neighbours, of which the first is the longest."""
    start = 0
    while start < len(reads):
        count = max(1, batch_tokens // len(reads[start]))
        yield reads[start : start + count]
        start += count


@torch.no_grad()
def _batch(
    model: Any, reads: Sequence[tuple[int, ...]], members: Sequence[Sequence[tuple[int, Scored]]], pad: int
) -> Iterator[tuple[int, float]]:
    """Yield (number, sum) of the rows that read each of `reads`."""
    device, longest = next(model.parameters()).device, len(reads[0])
    ids = torch.tensor([[*read, *[pad] * (longest - len(read))] for read in reads])
    mask = torch.tensor([[1] * len(read) + [0] * (longest - len(read)) for read in reads])
    asked = torch.zeros_like(mask, dtype=torch.bool)
    for at, group in enumerate(members):
        for _, row in group:
            asked[at, [place - 1 for place in row.places]] = True
    logits = _logits_at(model, ids.to(device), mask.to(device), asked.to(device))
    normalisers = logits.logsumexp(-1)
    # The place among the asked ones of each position.
    order = (asked.flatten().cumsum(0) - 1).view_as(asked)
    wanted, numbers, targets = list[int](), list[int](), list[int]()
    for at, group in enumerate(members):
        for slot, row in group:
            wanted += [int(order[at, place - 1]) for place in row.places]
            targets += [row.ids[place] for place in row.places]
            numbers += [slot] * len(row.places)
    where = torch.tensor(wanted, device=device)
    found = (logits[where, torch.tensor(targets, device=device)] - normalisers[where]).double().cpu()
    sums: dict[int, float] = {}
    for number, value in zip(numbers, found.tolist()):
        sums[number] = sums.get(number, 0.0) + value
    yield from sums.items()


def _logits_at(model: Any, ids: Tensor, mask: Tensor, asked: Tensor) -> Tensor:
    """Return the logits, float32 [positions, vocabulary], of the positions that are asked for, row by row."""
    with _only(model, asked):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    # A model that does not go through its output layer has made the logits of all positions.
    whole = logits.shape[:2] == asked.shape and int(asked.sum()) != asked.numel()
    picked: Tensor = logits[asked] if whole else logits.flatten(0, -2)
    return picked.float()


@contextmanager
def _only(model: Any, asked: Tensor) -> Iterator[None]:
    """Have the model's output layer see the positions that are asked for and no others."""
    layer = output_layer(model)
    if layer is None:
        yield
        return
    handle = layer.register_forward_pre_hook(lambda _, inputs: (inputs[0][asked].unsqueeze(0), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()
