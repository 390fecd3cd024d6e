"""Every piece of code on the page of tools runs, on a small model and with few steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, changed, common, llama, snapshot, tokens

import lisa_kernels
from clients.runs import tokenizer

pytestmark = pytest.mark.slow
PAGE = (Path(lisa_kernels.__file__).parent / "README.md").read_text()
SECTIONS = {
    part.splitlines()[0]: re.findall(r"^```python\n(.*?)^```$", part, re.DOTALL | re.MULTILINE)
    for part in re.split(r"^#+ ", PAGE, flags=re.MULTILINE)[1:]
}
(BEGINNING,) = SECTIONS.pop("With the tools that you already use")
SHORTER = {
    "max_steps=100": 'max_steps=1, per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to=[], '
    'disable_tqdm=True, save_strategy="no"',
    "max_completion_length=64": "max_completion_length=4",
    "Accelerator(": "Accelerator(cpu=True, ",
}  # fmt: skip


def given(folder: Path, reward: bool) -> dict[str, Any]:
    """Return what the page takes to be there."""
    from datasets import Dataset

    words = tokenizer()
    sizes = {"vocab_size": len(words), "hidden_size": 64, "num_key_value_heads": 4, "max_position_embeddings": 256}
    model = (
        build("LlamaForSequenceClassification", "LlamaConfig", **common(num_labels=1, **sizes))
        if reward
        else llama(**sizes)
    )
    model.save_pretrained(folder / "base")
    model = type(model).from_pretrained(folder / "base", dtype=torch.float32)
    batch = tokens(rows=4)
    choices = [{"prompt": "q", "chosen": f" yes {n}", "rejected": " no"} for n in range(4)]
    return {
        "model": model, "tokenizer": words, "batch": batch, "loader": [batch, batch],
        "tokens": [{name: value[row] for name, value in batch.items()} for row in range(4)],
        "pairs": Dataset.from_list([{"prompt": "q", "completion": f" answer {n}"} for n in range(4)]),
        "choices": Dataset.from_list(choices), "prompts": Dataset.from_list([{"prompt": "q"}] * 4),
        "reward": lambda completions, **others: [float(len(text) + n) for n, text in enumerate(completions)],
    }  # fmt: skip


@pytest.mark.parametrize("section", [name for name, blocks in SECTIONS.items() if blocks])
def test_the_code_of_a_section_trains(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = given(tmp_path, reward="Reward" in section)
    model = names["model"]
    before = {name: weight.clone() for name, weight in snapshot(model).items()}
    saves_adapter = "LoRA-FA" in section
    if not saves_adapter:
        exec(BEGINNING, names)
    for code in SECTIONS[section]:
        for long, short in SHORTER.items():
            code = code.replace(long, short)
        exec(code, names)
    if saves_adapter:
        assert names["adapted"].peft_config
    else:
        assert changed(model, before)
