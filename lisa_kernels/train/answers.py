"""What a model says to held-out prompts: a few short greedy answers, the same prompts before and after a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lisa_kernels.train.chat import IGNORED
from lisa_kernels.train.tokenize import TokenizedData, pad_token_id

DEFAULT_SAMPLES = 3
ANSWER_TOKENS = 48
# Of a text that is supervised from its start, this many tokens are the prompt.
TEXT_PROMPT_TOKENS = 32
# Of a longer prompt or answer a terminal shows this many characters, of a prompt the last.
SHOWN_CHARACTERS = 240
# On a CPU a larger model takes longer to answer than a page is worth.
MOST_CPU_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class Question:
    """Token ids that a model is to continue, and those that the data continues with."""

    prompt: Tensor
    wanted: Tensor


def samples_for(model: Any, asked: int | None) -> int:
    """Return how many prompts are answered: as many as asked for, else three, none by a large model on a CPU."""
    if asked is not None:
        return asked
    large: bool = sum(param.numel() for param in model.parameters()) > MOST_CPU_PARAMETERS
    return 0 if large and next(model.parameters()).device.type == "cpu" else DEFAULT_SAMPLES


def held_out_questions(data: TokenizedData, count: int) -> list[Question]:
    """Return the first `count` different prompts of held-out rows, with the answers that the rows hold.

    A prompt is what stands before the first supervised token; of plain text it is the beginning.
    """
    found: dict[tuple[int, ...], Question] = {}
    for index in range(len(data)):
        if len(found) >= count:
            break
        question = _question(data[index])
        if question is not None:
            found.setdefault(tuple(question.prompt.tolist()), question)
    return list(found.values())[:count]


def _question(row: dict[str, Tensor]) -> Question | None:
    ids, labels = row["input_ids"], row["labels"]
    if "position_ids" in row:
        starts = (row["position_ids"][1:] == 0).nonzero().flatten()
        length = int(starts[0]) + 1 if len(starts) else len(ids)
        ids, labels = ids[:length], labels[:length]
    supervised = (labels != IGNORED).nonzero().flatten()
    if not len(supervised):
        return None
    start = int(supervised[0])
    if start <= 1:
        start = min(TEXT_PROMPT_TOKENS, len(ids) // 2)
    wanted = ids[start:][(labels[start:] != IGNORED).long().cumprod(0).bool()]
    return Question(ids[:start], wanted[:ANSWER_TOKENS]) if start else None


@torch.no_grad()
def answers(model: Any, tokenizer: Any, questions: list[Question]) -> list[dict[str, str]]:
    """Return prompt, wanted answer and the model's own greedy answer as texts; the model is left as it was found."""
    from transformers import GenerationConfig

    if not questions:
        return []
    pad = pad_token_id(tokenizer)
    longest = max(len(question.prompt) for question in questions)
    ids = torch.full((len(questions), longest), pad)
    mask = torch.zeros_like(ids)
    for row, question in enumerate(questions):
        ids[row, longest - len(question.prompt) :] = question.prompt
        mask[row, longest - len(question.prompt) :] = 1
    device = next(model.parameters()).device
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=ANSWER_TOKENS, use_cache=True, pad_token_id=pad,
        eos_token_id=_ends(model, tokenizer),
    )  # fmt: skip
    training = model.training
    model.eval()
    try:
        produced = model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=settings)
    finally:
        model.train(training)
    return [
        {
            "prompt": _text(tokenizer, question.prompt),
            "wanted": _text(tokenizer, question.wanted),
            "answer": _text(tokenizer, made[longest:].cpu()),
        }
        for question, made in zip(questions, produced)
    ]  # fmt: skip


def _ends(model: Any, tokenizer: Any) -> list[int] | None:
    """Return the tokens that end an answer: the model's own and the tokenizer's."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return list(dict.fromkeys(end for end in ends if end is not None)) or None


def _text(tokenizer: Any, ids: Tensor) -> str:
    text: str = tokenizer.decode(ids.tolist(), skip_special_tokens=True)
    return text


def print_answers(found: Sequence[Mapping[str, str | None]], console: Console) -> None:
    """Print prompts with the answers before and after side by side; found: prompt, before and after of each."""
    if not found:
        return
    table = Table(title="the same held-out prompts, before and after", show_lines=True, expand=True)
    for name in ("prompt", "before", "after"):
        table.add_column(name, ratio=1, overflow="fold")
    for answer in found:
        prompt, before, after = (" ".join((answer[name] or "").split()) for name in ("prompt", "before", "after"))
        cut = prompt if len(prompt) <= SHOWN_CHARACTERS else f"… {prompt[-SHOWN_CHARACTERS:]}"
        table.add_row(Text(cut, style="dim"), Text(_beginning(before)), Text(_beginning(after), style="bold"))
    console.print(table)


def _beginning(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …"
