"""Conversations as tokens: rendered by the chat template, supervised where the assistant speaks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lisa_kernels.errors import InputError
from lisa_kernels.train.records import Records

IGNORED = -100  # the label that torch's cross-entropy leaves out
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
DEFAULT_CHAT_TEMPLATE = (
    "{% set end = eos_token or '<|im_end|>' %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + end }}{% endgeneration %}"
    "{% else %}{{ message['content'] + end }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Example:
    """Token ids and labels of one supervised example before packing, both as long as the example."""

    input_ids: list[int]
    labels: list[int]


def encode_conversations(records: Records, tokenizer: Any, notes: list[str]) -> Iterator[Example]:
    """Yield each conversation in the tokenizer's chat template, with what the assistant says supervised.

    Raises InputError for a slow tokenizer and for a template under which the assistant's text cannot be found.
    """
    from jinja2 import TemplateError

    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer {type(tokenizer).__name__} is a slow one, which cannot say where the assistant's tokens lie"
            " in a conversation: use its fast version, or data with prompt and completion."
        )
    template = tokenizer.get_chat_template() if tokenizer.chat_template else DEFAULT_CHAT_TEMPLATE
    if not tokenizer.chat_template:
        notes.append("the tokenizer has no chat template: conversations are written in a simple ChatML-like one")
    encode = _encode_tagged if GENERATION_TAG.search(template) else _encode_by_prefix
    for number, messages in enumerate(records.items, start=1):
        try:
            ids, supervised = encode(messages, tokenizer, template)
        except TemplateError as error:
            raise InputError(f"the chat template refuses conversation {number}: {error}; change the data.") from error
        except _PrefixError as error:
            raise InputError(
                f"the chat template cannot mark the assistant's text of conversation {number}: {error};"
                " put {% generation %} tags round the assistant's text in the template, or give prompt and completion."
            ) from error
        yield Example(ids, [token if on else IGNORED for token, on in zip(ids, supervised)])


class _PrefixError(Exception):
    """A conversation's beginning, rendered alone, is not the beginning of the whole conversation."""


def _encode_tagged(messages: list[dict[str, Any]], tokenizer: Any, template: str) -> tuple[list[int], list[bool]]:
    encoded = tokenizer.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(encoded["input_ids"]), [bool(on) for on in encoded["assistant_masks"]]


def _encode_by_prefix(messages: list[dict[str, Any]], tokenizer: Any, template: str) -> tuple[list[int], list[bool]]:
    def render(part: list[dict[str, Any]], prompted: bool = False) -> str:
        if not part:
            raise _PrefixError("it begins with the assistant")
        return str(
            tokenizer.apply_chat_template(part, chat_template=template, tokenize=False, add_generation_prompt=prompted)
        )

    whole = render(messages)
    spans = _assistant_spans(messages, whole, render)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # a token that only begins or ends inside the answer belongs to it; some tokenizers give blanks an empty span
    supervised = [
        any(first < end and (last > start or first == last >= start) for start, end in spans)
        for first, last in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), supervised


def _assistant_spans(messages: list[dict[str, Any]], whole: str, render: Callable[..., str]) -> list[tuple[int, int]]:
    """Return where in the rendered conversation each answer stands, from its first character through its end marker."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opening, closing = render(messages[:index], True), render(messages[: index + 1])
        content = message["content"].strip()
        if not whole.startswith(opening) or not closing.startswith(opening):
            raise _PrefixError(f"what it writes before message {index + 1} depends on what follows")
        answer = closing[len(opening) :]
        if not whole.startswith(closing):
            # Templates that show only the last answer's reasoning write an earlier answer shorter than it was alone.
            answer = content + answer.rpartition(content)[2]
            if not content or not whole.startswith(answer, len(opening)):
                raise _PrefixError(f"what it writes for message {index + 1} depends on what follows")
        # blanks after the end marker are never generated; where blanks are the marker they stay
        marked = answer.rstrip()
        spans.append((len(opening), len(opening) + len(answer if marked.endswith(content) else marked)))
    return spans
