"""What the model said before and after, beside what the data says."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lisa_kernels.report.record import Run

# Of a longer prompt the end is shown, the beginning folded away.
MOST_PROMPT = 400


def section(runs: Sequence[Run]) -> str:
    """Return a card for each prompt; prompts that several runs share are shown once, with each run's answer."""
    prompts = dict.fromkeys(str(answer["prompt"]) for run in runs for answer in run.answers)
    return "".join(_card(prompt, runs, number) for number, prompt in enumerate(prompts, 1))


def _card(prompt: str, runs: Sequence[Run], number: int) -> str:
    found = [
        (run, index, answer) for index, run in enumerate(runs) for answer in run.answers if answer["prompt"] == prompt
    ]
    before = {answer["before"] for _, _, answer in found}
    boxes = []
    if len(before) == 1:
        boxes.append(_box("before", next(iter(before)), "before"))
    for run, index, answer in found:
        name = f" · {run.name}" if len(runs) > 1 else ""
        key = f'<i class="swatch c{index % 8}"></i>' if len(runs) > 1 else ""
        if len(before) > 1:
            boxes.append(_box(f"before{name}", answer["before"], "before", key))
        boxes.append(_box(f"after{name}", answer["after"], "after", key))
    boxes.append(_box("what the data says", found[0][2]["wanted"], "wanted"))
    body = f'{_prompt(prompt)}<div class="boxes">{"".join(boxes)}</div>'
    return f'<article class="card"><h3>Prompt {number}</h3>{body}</article>'


def _prompt(prompt: str) -> str:
    prompt = prompt.strip()
    if len(prompt) <= MOST_PROMPT:
        return f'<blockquote class="prompt">{escape(prompt)}</blockquote>'
    return (
        f'<blockquote class="prompt">… {escape(prompt[-MOST_PROMPT:])}</blockquote><details class="values"><summary>'
        f'the whole prompt</summary><blockquote class="prompt">{escape(prompt)}</blockquote></details>'
    )


def _box(title: str, text: str | None, kind: str, key: str = "") -> str:
    said = (text or "").strip()
    empty = "" if said else " none"
    if not said:
        said = "not asked" if text is None else "(only blanks)" if text else "(nothing)"
    words = f'<p class="said{empty}">{escape(said)}</p>'
    return f'<div class="box {kind}"><h4>{key}{escape(title)}</h4>{words}</div>'
