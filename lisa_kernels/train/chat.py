"""Conversations as tokens: rendered by the chat template, supervised where the assistant speaks."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lisa_kernels.errors import InputError
from lisa_kernels.train.answer_spans import (
    ASKED,
    ASKED_IN_PARTS,
    REASONING_END,
    REASONING_FIELDS,
    REASONING_START,
    AnswerFinder,
    SpanError,
    says_something,
    tags_of,
    text_of,
)
from lisa_kernels.train.records import Records, messages_of

IGNORED = -100  # the label that torch's cross-entropy leaves out
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
DEFAULT_CHAT_TEMPLATE = (
    "{% set end = eos_token or '<|im_end|>' %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + end }}{% endgeneration %}"
    "{% else %}{{ message['content'] + end }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
Message = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """Token ids and labels of one supervised example before packing, both as long as the example."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Rendered:
    """One conversation as the template writes it, and where its answers stand; ended: the last one has a marker."""

    text: str
    spans: list[Span]
    ended: bool = True


class _FormError(Exception):
    """A template leaves out or garbles what a conversation holds when it is given in this form."""


def default_chat_template(tokenizer: Any) -> str:
    """Return the template for a tokenizer without one; it begins as the tokenizer begins a text."""
    return ("{{ bos_token }}" if beginning(tokenizer) else "") + DEFAULT_CHAT_TEMPLATE


def beginning(tokenizer: Any) -> list[int]:
    """Return the begin token as a list, empty when the tokenizer does not put one before a text."""
    first = tokenizer("a")["input_ids"][:1]
    return list(first) if tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id] else []


def encode_conversations(records: Records, tokenizer: Any, notes: list[str]) -> Iterator[Example]:
    """Yield each conversation in the tokenizer's chat template, with what the assistant says supervised.

    Supervised is an answer from where the template leaves the word to the model through its end marker: reasoning and
    tool calls that the template writes are part of it, answers of weight 0 are not learnt. What the template leaves
    out of a conversation is counted in `notes`. Raises InputError for a slow tokenizer, for a conversation that the
    template refuses, and for one in which the answers cannot be told from the rest.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer {type(tokenizer).__name__} is a slow one, which cannot say where the assistant's tokens lie"
            " in a conversation: use its fast version, or data with prompt and completion."
        )
    if not tokenizer.chat_template:
        notes.append("the tokenizer has no chat template: conversations are written in a simple ChatML-like one")
    writer = ConversationWriter(tokenizer)
    for number, item in enumerate(records.items, start=1):
        rendered = writer.render(item, number)
        encoded = tokenizer(
            rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )  # fmt: skip
        ids, labels = list(encoded["input_ids"]), labels_in(encoded, rendered.spans)
        if not rendered.ended and tokenizer.eos_token_id is not None and labels:
            ids.append(tokenizer.eos_token_id)
            labels.append(tokenizer.eos_token_id)
        yield Example(ids, labels)
    notes.extend(f"{text.format(count)}" for text, count in writer.counts.items())


def labels_in(encoded: Any, spans: Sequence[Span]) -> list[int]:
    """Return the label of each token: its id where any character of it lies in a span of the text, else IGNORED.

    encoded: input_ids and offset_mapping of one text. Some tokenizers leave blanks out of a token's span, so that a
    token of blanks alone has an empty one, which stands where the blanks end.
    """

    def learnt(first: int, last: int) -> bool:
        return any(start < last <= end if first == last else first < end and last > start for start, end in spans)

    pairs = zip(encoded["input_ids"], encoded["offset_mapping"])
    return [token if learnt(*offsets) else IGNORED for token, offsets in pairs]


@dataclass
class ConversationWriter:
    """Renders conversations in the form that a template reads; counts holds what is to be told, with how often."""

    tokenizer: Any
    counts: Counter[str] = field(default_factory=Counter)
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tags = tags_of(str(token.content) for token in self.tokenizer.added_tokens_decoder.values())

    def render(self, item: Any, number: int) -> Rendered:
        """Return a conversation with its answers' spans, in the first form that the template takes whole."""
        messages = messages_of(item)
        tools = item.get("tools") if isinstance(item, dict) else None
        learnt = [message["role"] == "assistant" and bool(message.get("weight", 1)) for message in messages]
        plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        first: tuple[Exception, str] | None = None
        for form in _forms(plain):
            try:
                return self._render_form(form, tools, learnt)
            except SpanError as error:
                first = first or (error, "cannot mark the assistant's text of")
            except Exception as error:  # a template is a program of its own, which may raise anything
                first = first or (error, "refuses")
        assert first is not None, "a conversation has at least one form"
        reason_for, verb = first
        advice = (
            "put {% generation %} tags round the assistant's text in the template, or give prompt and completion"
            if isinstance(reason_for, SpanError)
            else "change the data or the template"
        )
        reason = str(reason_for).strip().rstrip(".") or type(reason_for).__name__
        raise InputError(f"the chat template {verb} conversation {number}: {reason}; {advice}.") from reason_for

    def _render_form(self, messages: list[Message], tools: Any, learnt: list[bool]) -> Rendered:
        template = self._template(tools)

        def render(part: Sequence[Message], add_generation_prompt: bool = False) -> str:
            return str(
                self.tokenizer.apply_chat_template(
                    list(part), tools=tools, chat_template=template, tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )  # fmt: skip

        whole = render(messages)
        _check_calls(messages, whole)
        in_parts = isinstance(messages[0]["content"], list)
        headers = {} if tools else self.headers
        finder = AnswerFinder(render, self.tags, ASKED_IN_PARTS if in_parts else ASKED, headers)
        if GENERATION_TAG.search(template):
            _check_answers(messages, whole)
            spans, ended = self._tagged_spans(messages, tools, template, finder, whole, learnt), True
        else:
            found = finder.spans(messages, whole)
            spans = [span for index, span in found.items() if learnt[index]]
            last = len(messages) - 1
            ended = not (last in found and learnt[last]) or not finder.is_unmarked(messages, whole, found[last])
        self._count_left_out(messages, tools, learnt, whole, spans, ended)
        return Rendered(whole, spans, ended)

    def _template(self, tools: Any) -> str:
        if not self.tokenizer.chat_template:
            return default_chat_template(self.tokenizer)
        return str(self.tokenizer.get_chat_template(tools=tools or None))

    def _tagged_spans(
        self, messages: list[Message], tools: Any, template: str, finder: AnswerFinder, whole: str, learnt: list[bool]
    ) -> list[Span]:
        """Return the spans between the template's {% generation %} tags, but for those of answers not to be learnt."""
        encoded = self.tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, return_dict=True, return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )  # fmt: skip
        spans, previous = list[Span](), False
        for on, (first, last) in zip(encoded["assistant_masks"], encoded["offset_mapping"]):
            if on:
                spans = [*spans[:-1], (spans[-1][0], last)] if previous else [*spans, (first, last)]
            previous = bool(on)
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not spans and any(says_something(messages[index]) for index in answers):
            raise SpanError("its {% generation %} tags mark nothing")
        if all(learnt[index] for index in answers):
            return spans
        words = {index: finder.words(messages, index, whole) for index in answers if says_something(messages[index])}
        kept = list[Span]()
        for start, end in spans:
            inside = {learnt[index] for index, (first, last) in words.items() if first < end and last > start}
            if len(inside) > 1:
                raise SpanError("its {% generation %} tags join answers that are learnt and others that are not")
            if inside != {False}:
                kept.append((start, end))
        return kept

    def _count_left_out(
        self, messages: list[Message], tools: Any, learnt: list[bool], whole: str, spans: list[Span], ended: bool
    ) -> None:
        if not ended:
            self.counts["the chat template writes no end marker after an answer: {} answers get the end token"] += 1
        if any(tool["function"]["name"] not in whole for tool in tools or ()):
            self.counts["the chat template leaves the tools of {} conversations out"] += 1
        said = "".join(whole[start:end] for start, end in spans)
        hidden = [_reasoning(m) for m, on in zip(messages, learnt) if on]
        if dropped := sum(bool(text) and text not in said for text in hidden):
            self.counts["the chat template leaves the reasoning of {} answers out"] += dropped
        elsewhere = sum(_words(message) not in said for message, on in zip(messages, learnt) if on)
        if elsewhere:
            self.counts["the chat template leaves the text of {} answers out or apart: it is not learnt"] += elsewhere
        unlearnt = sum(
            message["role"] == "assistant" and not on and says_something(message)
            for message, on in zip(messages, learnt)
        )
        if unlearnt:
            self.counts["{} answers are marked as not to be learnt"] += unlearnt


def _reasoning(message: Message) -> str:
    given = next((message[name] for name in REASONING_FIELDS if isinstance(message.get(name), str)), "")
    inside = text_of(message).partition(REASONING_START)[2].rpartition(REASONING_END)[0]
    return str(given or inside).strip()


def _words(message: Message) -> str:
    return text_of(message).rpartition(REASONING_END)[2].strip()


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield a conversation in the forms that templates want: a call's arguments as an object or as text, empty content
    beside calls as text or null, content as text or as a list of parts.
    """
    calling = any(message.get("tool_calls") for message in messages)
    for as_text in (False, True) if calling else (False,):
        for empty in ("", None) if calling else ("",):
            yield [_with_calls(message, as_text, empty) for message in messages]
    yield [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _with_calls(message: Message, as_text: bool, empty: str | None) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _arguments(call, as_text)}}
        for call in message["tool_calls"]
    ]
    return {**message, "content": message["content"] or empty, "tool_calls": calls}


def _arguments(call: Message, as_text: bool) -> Any:
    arguments = call["function"].get("arguments", {})
    return json.dumps(arguments, ensure_ascii=False) if as_text and not isinstance(arguments, str) else arguments


def _check_calls(messages: list[Message], whole: str) -> None:
    """Raise where a call is not in the text, or its arguments are there as Python's or doubly quoted."""
    for number, message in enumerate(messages, start=1):
        for call in message.get("tool_calls") or ():
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            if name not in whole:
                raise _FormError(f"it leaves the call of {name} in message {number} out")
            garbled = json.dumps(arguments) if isinstance(arguments, str) else repr(arguments)
            if len(garbled) > 2 and garbled != json.dumps(arguments, ensure_ascii=False) and garbled in whole:
                raise _FormError(f"it writes the arguments of message {number} as no JSON: {garbled}")
            if isinstance(arguments, str) and json.dumps(arguments, ensure_ascii=False) in whole:
                raise _FormError(f"it writes the arguments of message {number} as quoted text")


def _check_answers(messages: list[Message], whole: str) -> None:
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant" and _words(message) not in whole:
            raise _FormError(f"it leaves the text of message {number} out")
