"""Every form of installation: commands do what they can, and say which extra they lack before they touch anything."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
from installation import Answer, run_without
from report.run_folders import history, write_run

from lisa_kernels import requirements
from lisa_kernels.errors import InputError
from lisa_kernels.requirements import is_installed, require

INSTALL = "pip install 'lisa_kernels[train]'"
EXTRAS = "transformers tokenizers datasets accelerate peft trl jinja2 yaml matplotlib tensorboard tensorboardX pyarrow "
EXTRAS += "triton gguf bitsandbytes psutil huggingface_hub wandb sentencepiece tiktoken pandas scipy galore_torch"
RUN = ["--model", "preset:tiny", "--seq-len", "32", "--batch-size", "2"]
FINETUNE = ["finetune", *RUN, "--steps", "2", "--method", "lisa", "--samples", "0"]
ATTACHED = """
import torch
from torch import nn
from lisa_kernels import AdamW8bit, OwLore, attach

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x):
        return x + self.linear(x)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.config = type("Config", (), {"num_hidden_layers": 4})()

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()

model = Model()
plain = AdamW8bit(Model().parameters())
optimizer = attach(model, OwLore(active_layers=2, rank=4, scores="uniform", embeddings="frozen"), lr=1e-3)
for _ in range(2):
    model(torch.randn(4, 32)).backward()
    optimizer.step()
    optimizer.zero_grad()
optimizer.detach()
"""


def test_what_is_missing_is_one_sentence_with_the_line_that_installs_it() -> None:
    """All that is missing at once; what is there is not named."""
    require("this test", "json", "torch")
    with pytest.raises(InputError) as told:
        require("finetune", "torch", "no_such_package", "nor_this_one")
    text = str(told.value)
    assert text.startswith("finetune needs no_such_package, which is not installed, nor_this_one, which")
    assert text.endswith(INSTALL)
    assert "torch" not in text
    assert is_installed("torch")
    assert not is_installed("no_such_package")
    assert not is_installed("no_such_package.inner")


def test_what_is_too_old_is_named_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    versions, installed = {"transformers": "4.57.1"}, metadata.version
    monkeypatch.setattr(requirements.metadata, "version", lambda name: versions.get(name) or installed(name))
    with pytest.raises(InputError, match=r"transformers 5 or later, of which 4\.57\.1 is installed"):
        require("finetune", "transformers")
    versions["transformers"] = "5.10.0"
    require("finetune", "transformers")


def lacks(answer: Answer, *packages: str) -> None:
    """Check that a command ended with one sentence that names the packages and what installs them."""
    assert answer.code == 2, answer.err
    assert all(package in answer.err for package in packages), answer.err
    assert "pip install" in answer.err
    assert answer.err.count("\n") == 1
    assert "Traceback" not in answer.err


@pytest.mark.slow
def test_the_core_alone(tmp_path: Path) -> None:
    """Optimizers, attach, info and report work; all else says what it lacks, and makes no folder."""
    (tmp_path / "data.txt").write_text("words " * 500)
    (tmp_path / "run.yaml").write_text("model: preset:tiny\n")
    write_run(tmp_path / "before", history())
    commands = [
        ["info"], ["report", "before"], ["exec", ATTACHED], [*FINETUNE, "--data", "data.txt", "--output", "out"],
        ["plan", *RUN], ["scores", *RUN, "--kind", "weight-norm"], ["finetune", "run.yaml"],
    ]  # fmt: skip
    info, report, attached, finetune, plan, scores, run_file = run_without(EXTRAS.split(), commands, tmp_path)
    assert [answer.code for answer in (info, report, attached)] == [0, 0, 0], (info.err, report.err, attached.err)
    lacks(finetune, "transformers", "tokenizers", "accelerate", INSTALL)
    lacks(plan, "transformers", INSTALL)
    lacks(scores, "transformers", INSTALL)
    lacks(run_file, "pyyaml", INSTALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_transformers_as_a_user_has_them(tmp_path: Path) -> None:
    """Plans and scores need no more; pictures and runs say what they do."""
    (tmp_path / "data.txt").write_text("words " * 500)
    absent = [name for name in EXTRAS.split() if name not in ("transformers", "tokenizers", "huggingface_hub", "yaml")]
    commands = [
        ["plan", *RUN, "--json"], ["plan", *RUN, "--plot", "plan.png"], ["scores", *RUN, "--kind", "weight-norm"],
        ["scores", *RUN, "--data", "data.txt", "--plot", "scores.png"],
        [*FINETUNE, "--data", "data.txt", "--output", "out"],
    ]  # fmt: skip
    plan, plot, scores, scores_plot, finetune = run_without(absent, commands, tmp_path)
    assert plan.code == 0, plan.err
    assert json.loads(plan.out)["peak_bytes"] > 0
    assert scores.code == 0, scores.err
    lacks(plot, "matplotlib", INSTALL)
    lacks(scores_plot, "matplotlib", INSTALL)
    lacks(finetune, "accelerate", "jinja2", INSTALL)
    assert "transformers" not in finetune.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_only_some_data_and_flags_need(tmp_path: Path) -> None:
    """Without pictures and readers a run goes through, with a sentence; what was asked for is not left out silently."""
    (tmp_path / "data.txt").write_text("words " * 500)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    absent = [name for name in EXTRAS.split() if name not in ("transformers", "tokenizers", "huggingface_hub",
                                                             "accelerate", "psutil", "jinja2", "yaml")]  # fmt: skip
    commands = [
        [*FINETUNE, "--data", "data.txt", "--output", "out"],
        [*FINETUNE, "--data", "rows.parquet", "--output", "parquet"],
        [*FINETUNE, "--data", "someone/rows", "--output", "hub"],
        [*FINETUNE, "--data", "data.txt", "--report-to", "tensorboard", "--output", "logged"],
    ]  # fmt: skip
    finished, parquet, hub, logged = run_without(absent, commands, tmp_path)
    assert finished.code == 0, finished.err
    assert "picture of the layers is left out" in finished.err
    assert (tmp_path / "out" / "model.safetensors").is_file()
    for answer, package in ((parquet, "pyarrow"), (hub, "datasets"), (logged, "tensorboard")):
        assert answer.code == 2, answer.err
        assert package in answer.err
        assert "pip install" in answer.err.splitlines()[-1]
        assert "Traceback" not in answer.err
    assert not any((tmp_path / name).exists() for name in ("parquet", "hub", "logged"))
