"""Log-probabilities against those of whole logits, one row at a time."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import build, common, llama

from lisa_kernels.evaluate.likelihood import Scored, log_likelihoods


def capped() -> Any:
    return build("Gemma2ForCausalLM", "Gemma2Config", **common(head_dim=8, final_logit_softcapping=2.0))


def past_its_head() -> Any:
    """Return a model that multiplies by its output layer's weight and never calls it."""
    model = llama()
    inner = model.forward

    def forward(**inputs: Any) -> Any:
        output = inner(**inputs)
        hidden = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        output.logits = hidden @ model.lm_head.weight.t()
        return output

    model.forward = forward
    return model


def alone(model: Any, row: Scored) -> float:
    """Return what the definition says of one row."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids]), attention_mask=torch.ones(1, len(row.ids))).logits[0].double()
    logs = logits.log_softmax(-1)
    return sum(float(logs[place - 1, row.ids[place]]) for place in row.places)


@pytest.mark.parametrize("make", [llama, capped, past_its_head])
@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_sums_are_those_of_each_row_alone(make: Callable[[], Any], batch_tokens: int) -> None:
    """Of rows of any length, in any batch, with rows that begin another or equal it among them."""
    model, draw = make().eval(), random.Random(0)
    rows = [tuple(draw.randrange(1, 60) for _ in range(length)) for length in (5, 12, 2, 9, 9, 30)]
    scored = [Scored(ids, tuple(sorted(draw.sample(range(1, len(ids)), (len(ids)) // 2)))) for ids in rows]
    scored += [Scored((*rows[1][:7], last), (6, 7)) for last in (3, 4, 5)] + [scored[0]]
    done: list[int] = []
    found = log_likelihoods(model, scored, 0, batch_tokens, done.append)
    assert found == pytest.approx([alone(model, row) for row in scored], rel=1e-4)
    assert sum(done) == len(scored)


def test_what_rows_begin_with_alike_is_read_once() -> None:
    """Choices that differ in their last token cost what one of them does, and an answer that goes on reads for them."""
    model, seen = llama(), []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    question = (1, 2, 3, 4)
    log_likelihoods(model, [Scored((*question, last), (4,)) for last in (5, 6, 7)], 0, 100)
    log_likelihoods(model, [Scored((*question, 5, 9), (4, 5)), Scored((*question, 6), (4,))], 0, 100)
    assert seen == [(1, 4), (1, 5)]


def test_the_model_is_left_as_it_was() -> None:
    model = llama().train()
    log_likelihoods(model, [Scored((1, 2, 3), (1, 2))], 0, 100)
    assert model.training
    assert not model.lm_head._forward_pre_hooks
