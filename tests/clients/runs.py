"""What tests of other people's trainers share: a tokenizer, rows, and the same run in a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LR = 1e-2
CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def tokenizer() -> Any:
    """Return a tokenizer of bytes; token 0 ends and pads, and the chat template marks what an assistant says."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = Tokenizer(models.BPE({sign: number for number, sign in enumerate(signs)}, []))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="</s>", pad_token="</s>")
    made.chat_template = CHAT
    return made


class Recorder:
    """A collator that keeps the batches it makes, in the order in which a trainer takes them."""

    def __init__(self, collator: Callable[[Any], dict[str, Any]]) -> None:
        self.collator = collator
        self.batches: list[dict[str, Any]] = []

    def __call__(self, rows: Any) -> dict[str, Any]:
        batch = self.collator(rows)
        self.batches.append(
            {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()}
        )
        return batch


Loss = Callable[[nn.Module, dict[str, Any], int], Tensor]


def mean_over_tokens(model: nn.Module, batch: dict[str, Any], tokens: int) -> Tensor:
    """Return a batch's share of the loss of its step: the model's own, over all supervised tokens of the step."""
    loss: Tensor = model(**batch, use_cache=False, num_items_in_batch=tokens).loss
    return loss


def plain_loop(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[dict[str, Any]], steps: int, loss: Loss,
    accumulate: int = 1, max_grad_norm: float = 1.0,
) -> list[float]:  # fmt: skip
    """Train as a Trainer does by default, clipped and with a rate that falls to zero; returns the losses."""
    rates = [group["lr"] for group in optimizer.param_groups]
    losses: list[float] = []
    model.train()
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * (steps - step) / steps
        of_step = batches[step * accumulate : (step + 1) * accumulate]
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in of_step if "labels" in batch)
        losses.append(0.0)
        for batch in of_step:
            share = loss(model, batch, tokens)
            share.backward()
            losses[-1] += float(share.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def assert_same_weights(model: nn.Module, other: nn.Module, tolerance: float) -> None:
    """Compare what both models would save, to an absolute tolerance."""
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        torch.testing.assert_close(
            weight, theirs[name], rtol=0.0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def assert_moved_alike(model: nn.Module, other: nn.Module, before: dict[str, Tensor], share: float) -> None:
    """Compare what both models would save: no tensor is further from the other's than `share` of its way so far."""
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        way = float((theirs[name] - before[name]).norm()) if name in before else 0.0
        assert float((weight - theirs[name]).norm()) <= share * way, name
