"""transformers' Trainer on two ranks trains what the plain loop on two ranks trains; TRL's trainers stay equal."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.ranks import on_ranks
from families import llama, tokens

from clients.runs import LR, Recorder, mean_over_tokens, plain_loop, tokenizer
from lisa_kernels import InputError, OwLore, attach
from lisa_kernels.distributed.digests import digests

pytestmark = pytest.mark.slow

METHOD = OwLore(active_layers=1, period=2, rank=4, gap=2, scores="uniform")
STEPS = 5


def weights(model: Any) -> list[int]:
    return digests(model.parameters()).tolist()


def trainer(model: Any, optimizer: Any, folder: str, accumulate: int, **changes: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    batch = tokens(rows=40, columns=8)
    rows = [{name: value[row] for name, value in batch.items()} for row in range(40)]
    arguments = TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=accumulate, report_to=[],
        use_cpu=True, disable_tqdm=True, seed=1, logging_steps=1, **{"save_strategy": "no", **changes},
    )  # fmt: skip
    made = Trainer(model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None))
    made.data_collator = Recorder(made.data_collator)
    return made


def trained(rank: int, folder: str) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for accumulate in (1, 2):
        model, twin = llama(), llama()
        optimizer, reference = (attach(each, METHOD, lr=LR) for each in (model, twin))
        made = trainer(model, optimizer, folder, accumulate)
        made.train()
        plain_loop(twin, reference, made.data_collator.batches, STEPS, mean_over_tokens, accumulate)
        found[f"trainer {accumulate}"], found[f"loop {accumulate}"] = weights(model), weights(twin)
        found[f"rows {accumulate}"] = [row["input_ids"].tolist() for row in made.data_collator.batches]
    for start in ("new", "resumed"):
        model = llama()
        optimizer = attach(model, METHOD, lr=LR)
        made = trainer(model, optimizer, folder, 1, save_strategy="steps", save_steps=3)
        made.train(resume_from_checkpoint=None if start == "new" else str(Path(folder) / "checkpoint-3"))
        found[start] = weights(model)
    model = llama()
    made = trainer(model, attach(model, METHOD, ranks=None), folder, 1)
    try:
        made.train()
    except InputError as error:
        found["own gradients"] = str(error)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(trained, str(tmp_path_factory.mktemp("run")))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_is_the_plain_loop_on_two_ranks(accumulate: int, found: list[dict[str, Any]]) -> None:
    """Each rank has rows of its own; the weights are the same on both, and the loop's bit for bit."""
    assert found[0][f"rows {accumulate}"] != found[1][f"rows {accumulate}"]
    assert found[0][f"trainer {accumulate}"] == found[1][f"trainer {accumulate}"]
    assert found[0][f"trainer {accumulate}"] == found[0][f"loop {accumulate}"]


def test_a_resumed_run_is_the_whole_one(found: list[dict[str, Any]]) -> None:
    """From the checkpoint that rank 0 wrote, on both ranks."""
    assert found[0]["new"] == found[1]["new"] == found[0]["resumed"] == found[1]["resumed"]


def test_the_trainer_may_not_reduce_in_the_ranks_place(found: list[dict[str, Any]]) -> None:
    """It wraps the model in DDP, which does not follow a switch."""
    for each in found:
        assert "called by DistributedDataParallel, which reduces the gradients that there were" in each["own gradients"]


def tuned(rank: int, folder: str) -> dict[str, Any]:
    """Train by TRL, of which each trainer has a loss of its own."""
    from datasets import Dataset
    from transformers import LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    warnings.simplefilter("ignore")
    words = tokenizer()
    pairs = [{"prompt": "q", "completion": f" answer {n}"} for n in range(24)]
    choices = [{"prompt": "q", "chosen": f" yes {n}", "rejected": " no"} for n in range(24)]
    usual = {
        "output_dir": folder, "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    found = {}
    for made, config, rows in (
        (SFTTrainer, SFTConfig(completion_only_loss=True, **usual), pairs),
        (DPOTrainer, DPOConfig(**usual), choices),
    ):
        model = LlamaForCausalLM.from_pretrained(Path(folder) / "base", dtype=torch.float32)
        before = weights(model)
        optimizer = attach(model, METHOD, lr=LR)
        made(
            model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=words,
            optimizers=(optimizer, None),
        ).train()  # fmt: skip
        found[made.__name__] = weights(model)
        assert found[made.__name__] != before
    return found


def test_trainers_of_trl_keep_ranks_equal(tmp_path: Path) -> None:
    """What SFT and DPO train is the same on both ranks, bit for bit."""
    sizes = {"hidden_size": 64, "num_key_value_heads": 4, "max_position_embeddings": 256}
    llama(vocab_size=len(tokenizer()), **sizes).save_pretrained(tmp_path / "base")
    first, second = on_ranks(tuned, str(tmp_path))
    assert first == second
