"""Where answers stand in what published templates write, against the same templates with marks of their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lisa_kernels.train.answer_spans import AnswerFinder, SpanError, tags_of
from lisa_kernels.train.models import train_tokenizer

TURNS = [
    {"role": "user", "content": "Hi there?"},
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Second."},
]
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"at": "Oslo"}}}
TOOL_TURNS = [
    {"role": "user", "content": "Rain?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "look_up", "content": "no"},
    {"role": "assistant", "content": "Dry."},
]
SPECIAL = re.compile(r"<[｜|][^<>'\" ]{1,40}[｜|]>|<(?:start|end)_of_turn>")


def answers(name: str, messages: list[dict[str, Any]]) -> list[str]:
    """Return what is found in the conversation as the template that TRL ships under this name writes it."""
    trl = pytest.importorskip("trl", reason="the templates are those of the package trl")
    text = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    tokenizer = train_tokenizer(["a"], 257)
    tokenizer.add_special_tokens({"bos_token": "<B>"})
    tokenizer.chat_template = text

    def render(part: Any, add_generation_prompt: bool = False) -> str:
        return str(tokenizer.apply_chat_template(
            list(part), tokenize=False, add_generation_prompt=add_generation_prompt
        ))  # fmt: skip

    whole = render(messages)
    spans = AnswerFinder(render, tags_of(SPECIAL.findall(text))).spans(messages, whole)
    return [whole[start:end] for start, end in spans.values()]


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("llama3", "First.<|eot_id|>", "Second.<|eot_id|>"),
        ("qwen2_5", "First.<|im_end|>", "Second.<|im_end|>"),
        ("qwen3", "First.<|im_end|>", "<think>\n\n</think>\n\nSecond.<|im_end|>"),
        ("qwen3_5_think", "First.<|im_end|>", "\n</think>\n\nSecond.<|im_end|>"),
        ("qwen3_5_nothink", "First.<|im_end|>", "Second.<|im_end|>"),
        ("gemma3", "First.<end_of_turn>", "Second.<end_of_turn>"),
        ("deepseekv3", "First.<｜end▁of▁sentence｜>", "Second.<｜end▁of▁sentence｜>"),
        ("gptoss", "<|channel|>final<|message|>First.<|end|>", "<|channel|>final<|message|>Second.<|return|>"),
        ("cohere2", "First.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "Second.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    ],
)
def test_two_answers_with_their_end_markers_and_nothing_else(name: str, first: str, second: str) -> None:
    """Reasoning that the request for an answer opens is the template's, what it writes beyond that is the answer's."""
    found = answers(name, TURNS)
    assert [answer.replace("<|START_RESPONSE|>", "") for answer in found] == [first, second]
    assert len(answers(name, TURNS[:3])) == 1


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "glm4moe"])
def test_a_call_of_a_tool_is_learnt_whole_and_its_answer_is_not(name: str) -> None:
    called, said = answers(name, TOOL_TURNS)
    assert [word in called for word in ("look_up", "Oslo", "Rain")] == [True, True, False]
    assert "Dry." in said
    assert "no" not in said


def test_equal_words_of_user_and_assistant_are_told_apart() -> None:
    turns = [{**turn, "content": "a"} for turn in TURNS]
    assert answers("qwen2_5", turns) == ["a<|im_end|>"] * 2


def test_a_template_that_leaves_an_answer_or_a_call_out_is_refused() -> None:
    with pytest.raises(SpanError, match="leaves its text out"):
        answers("llama3", TOOL_TURNS)
