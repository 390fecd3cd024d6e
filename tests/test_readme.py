"""What README.md says can be done: its code runs, its commands have the options they show, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from lisa_kernels.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "bench" / "README.md", *sorted((ROOT / "lisa_kernels").rglob("README.md"))]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def test_the_first_page_is_short() -> None:
    assert len(TEXT.splitlines()) <= 200


def test_the_fifteen_lines_train_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, but for the model's name and the number of steps; what they save is another model."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from lisa_kernels.train.models import train_tokenizer

    config = LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=320, num_hidden_layers=6, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "given")
    train_tokenizer(["some text"], 300).save_pretrained(tmp_path / "given")
    (code,) = blocks("python")
    assert len(code.splitlines()) == 15
    assert "range(100)" in code
    monkeypatch.chdir(tmp_path)
    exec(code.replace("path/to/a/model", "given").replace("range(100)", "range(2)"), {})
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned").state_dict()
    moved = [name for name, weight in model.state_dict().items() if not torch.equal(weight, tuned[name])]
    assert moved
    assert tuned.keys() == model.state_dict().keys()


MAKEFILE = (ROOT / "Makefile").read_text().replace("\\\n", " ")
COMMANDS = re.findall(r"^(?:\$ |\t\$\(BIN\)/)?(lisa-kernels [a-z].*)$", f"{TEXT}\n{MAKEFILE}", re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_has_the_options_that_are_shown(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On the first page and in the Makefile."""
    with pytest.raises(SystemExit):
        main([*line.partition("--")[0].split()[1:], "--help"])
    known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
    assert set(re.findall(r"--[a-z][a-z-]*", line)) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_tests_exist(page: Path) -> None:
    text = page.read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    named = re.findall(r"`(tests/[\w/.]+)`", text)
    assert [*missing, *(name for name in named if not (ROOT / name).exists())] == []
