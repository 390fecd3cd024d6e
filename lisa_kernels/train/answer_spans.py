"""Where the assistant's answers stand in a rendered conversation, found by rendering it with other words instead.

A template may write a turn differently for what follows it (reasoning that only the last turn shows, an end marker of
its own for the last turn), so nothing is read off a conversation's beginning alone. For each answer

* the conversation is rendered with a sentinel in place of the answer's text: what stands before and after the sentinel
  is what the template writes round it, and must be what stands round the answer in the whole text;
* the same is done with the turn before, and once more with nothing after it but the template's request for an answer:
  as far as that request and the whole text agree, the template speaks; from there on the model does;
* the end marker is what the template writes after the answer whether or not another turn follows, or else the first
  special token after it.

Whatever does not fit raises SpanError: a wrong mask would teach the model to speak for its user.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

SENTINEL = "\ue0f1{}\ue0f2"  # private characters, which no template and no data writes
TAG = re.compile(r"</?[^<>\s]{1,40}>|\[/?[A-Z_]{1,40}\]")
REASONING_START, REASONING_END = "<think>", "</think>"
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
# A user's turn, in both forms in which templates take content.
ASKED = {"role": "user", "content": "a"}
ASKED_IN_PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}]}
Message = dict[str, Any]
Render = Callable[..., str]


class SpanError(Exception):
    """An answer cannot be told from what the template writes."""


@dataclass(frozen=True)
class AnswerFinder:
    """Finds answers in what `render(messages, add_generation_prompt=...)` writes.

    tags: what may not be cut in two, by `tags_of`. asked: a user's turn in the form in which messages are given.
    """

    render: Render
    tags: re.Pattern[str]
    asked: Message = field(default_factory=lambda: dict(ASKED))
    # What the template writes after a user's turn to ask for an answer, once it is known.
    headers: dict[str, str] = field(default_factory=dict)

    def spans(self, messages: Sequence[Message], whole: str) -> dict[int, tuple[int, int]]:
        """Return for each assistant's message that says something where it stands in `whole`, end marker included."""
        found = dict[int, tuple[int, int]]()
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and says_something(message):
                try:
                    start, written = self._begin(messages, index, whole, found)
                    found[index] = start, self._end(messages, index, whole, written)
                except SpanError as error:
                    raise SpanError(f"{error} (message {index + 1})") from error
        return found

    def words(self, messages: Sequence[Message], index: int, whole: str) -> tuple[int, int]:
        """Return where the last words of an answer stand in `whole`."""
        return self._locate(messages, index, whole)[:2]

    def is_unmarked(self, messages: Sequence[Message], whole: str, span: tuple[int, int]) -> bool:
        """Tell whether nothing but blanks stands in `whole` after the last message's words."""
        if messages[-1].get("tool_calls"):
            return False
        return not whole[self._locate(messages, len(messages) - 1, whole)[1] : span[1]].strip()

    def _begin(
        self, messages: Sequence[Message], index: int, whole: str, found: dict[int, tuple[int, int]]
    ) -> tuple[int, tuple[int, str]]:
        """Return where the model begins to speak, and (where its last words end, what a rendering alone adds)."""
        first, last, tail = self._locate(messages, index, whole)
        try:
            if index == 0:
                opening = self._header.partition(REASONING_START)[0]
                at, request = whole.rfind(opening, 0, first) if opening else -1, self._header
            elif index - 1 in found:
                at, request = found[index - 1][1], self._header
                at += len(whole[at:first]) - len(whole[at:first].lstrip())
            else:
                at, request = self._after_turn(messages, index, whole)
            if at < 0:
                raise SpanError("the template writes no header before it")
            return at + self._agreement(request, whole[at:first]), (last, tail)
        except SpanError:
            message = messages[index]
            if message.get("tool_calls") or any(message.get(name) for name in REASONING_FIELDS):
                raise
            # Without more than its words to the answer, the words are where it begins.
            return first, (last, tail)

    def _locate(self, messages: Sequence[Message], index: int, whole: str) -> tuple[int, int, str]:
        """Return (begin, end) of the last words of an answer in `whole`, and what follows them when nothing else does.

        The last words are the text after any reasoning or, where tools are called, the last call's name.
        """
        message = messages[index]
        marked, words = with_sentinel(message, index)
        sentinel = SENTINEL.format(index)
        before, found, after = self.render([*messages[:index], marked, *messages[index + 1 :]]).partition(sentinel)
        alone = self.render([*(messages[:index] or [self.asked]), marked])
        if not found or sentinel not in alone:
            raise SpanError("the template leaves its text out")
        if not whole.startswith(before):
            raise SpanError("what the template writes before it depends on its text")
        first = len(before)
        if message.get("tool_calls"):
            if not whole.startswith(words, first):
                raise SpanError("the template writes a called tool's name in another form")
            return first, first + len(words), alone.rpartition(sentinel)[2]
        last = len(whole) - len(after)
        if sentinel in after or last < first or not whole.endswith(after):
            raise SpanError("what the template writes after it depends on its text")
        return first, last, alone.partition(sentinel)[2]

    def _after_turn(self, messages: Sequence[Message], index: int, whole: str) -> tuple[int, str]:
        """Return where the turn before an answer ends in `whole`, and what the template writes there to ask for one."""
        marked, _ = with_sentinel(messages[index - 1], index - 1)
        sentinel = SENTINEL.format(index - 1)
        _, found, after = self.render([*messages[: index - 1], marked, *messages[index:]]).rpartition(sentinel)
        asked = self.render([*messages[: index - 1], marked], add_generation_prompt=True)
        if not found or sentinel not in asked or not whole.endswith(after):
            raise SpanError("what the template writes for the turn before it depends on that turn's text")
        return len(whole) - len(after), asked.rpartition(sentinel)[2]

    @property
    def _header(self) -> str:
        key = repr(self.asked)
        if key not in self.headers:
            plain, asked = self.render([self.asked]), self.render([self.asked], add_generation_prompt=True)
            self.headers[key] = asked[self._whole_tags(asked, agreement(plain, asked)) :]
        return self.headers[key]

    def _agreement(self, request: str, written: str) -> int:
        """Return how many characters of `written` are the template's request for an answer.

        A request may go on with what an answer in the data has not (an opened reasoning block).
        """
        shared = agreement(request, written)
        if shared < len(request):
            shared = min(self._whole_tags(request, shared), self._whole_tags(written, shared))
            header = self._header.partition(REASONING_START)[0]
            if not header or header.strip() not in request[:shared]:
                raise SpanError("the template asks for an answer in other words than it writes one")
        opening = self._header.partition("\n")[0]
        rest = written[shared:]
        if opening and rest.lstrip().startswith(opening):
            # A request that leaves the header out, as after a tool's answer, where the whole text has it.
            skipped = len(rest) - len(rest.lstrip())
            shared += skipped + agreement(self._header, rest[skipped:])
        return shared

    def _end(self, messages: Sequence[Message], index: int, whole: str, written: tuple[int, str]) -> int:
        """Return where an answer's end marker ends; written: where its words end, what follows them at an end."""
        at, alone = written
        after = whole[at:]
        shared = agreement(alone, after)
        if shared < len(alone):
            shared = min(self._whole_tags(alone, shared), self._whole_tags(after, shared))
        marker = after[:shared]
        if marker.strip():
            return at + len(marker.rstrip())
        token = self.tags.match(after.lstrip())
        if self.tags.match(alone.lstrip()) and token:
            return at + len(after) - len(after.lstrip()) + token.end()
        if alone.strip():
            raise SpanError("what the template writes to end it depends on what follows")
        # where blanks are the marker they stay
        return at + len(marker)

    def _whole_tags(self, text: str, length: int) -> int:
        """Return `length`, or less so that it does not cut a special token of `text` in two."""
        return next((m.start() for m in self.tags.finditer(text) if m.start() < length < m.end()), length)


def agreement(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many first elements of two sequences are the same."""
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def tags_of(specials: Iterable[str]) -> re.Pattern[str]:
    """Return what finds a tokenizer's special tokens, given as text, and whatever else looks like a tag."""
    known = [re.escape(special) for special in sorted(specials, key=len, reverse=True) if special.strip()]
    return re.compile("|".join([*known, TAG.pattern]))


def text_of(message: Message) -> str:
    """Return a message's content, which may be null or one part in a list, as text."""
    content = message.get("content") or ""
    return str(content[0]["text"] if isinstance(content, list) else content)


def says_something(message: Message) -> bool:
    """Tell whether a message has text or calls tools."""
    return bool(message.get("tool_calls") or text_of(message).strip())


def with_sentinel(message: Message, index: int) -> tuple[Message, str]:
    """Return the message with a sentinel in place of its last words, and these words."""
    sentinel = SENTINEL.format(index)
    if calls := message.get("tool_calls"):
        call = calls[-1]
        renamed = {**call, "function": {**call["function"], "name": sentinel}}
        return {**message, "tool_calls": [*calls[:-1], renamed]}, call["function"]["name"]
    reasoning, end, words = text_of(message).rpartition(REASONING_END)
    marked = reasoning + end + sentinel
    in_parts = isinstance(message.get("content"), list)
    return {**message, "content": [{"type": "text", "text": marked}] if in_parts else marked}, words
