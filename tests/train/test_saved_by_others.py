"""What Trainer and accelerate save of an attached model is what was trained, and goes on bit-equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import llama, logits, snapshot, tokens
from torch import Tensor

from lisa_kernels import LISA, GaLore, LoRAFA, OwLore, attach
from lisa_kernels.methods import Method

METHODS: dict[str, Method] = {
    "lisa": LISA(active_layers=1, period=2),
    "owlore": OwLore(active_layers=1, period=2, rank=4, gap=2, scores="uniform", master="remainder"),
    "galore": GaLore(rank=4, gap=2),
    "lora-fa": LoRAFA(rank=4),
}
ROWS = [{name: value[0] for name, value in tokens(1, seed=seed).items()} for seed in range(12)]


def _trainer(method: Method, folder: Path, *, halved: bool = False, **more: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    model = llama()
    if halved:
        for param in model.parameters():
            param.data.mul_(0.5)
    settings = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4, "seed": 1,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **{**settings, **more})
    optimizer = attach(model, method, lr=3e-2)
    return Trainer(model=model, args=arguments, train_dataset=ROWS, eval_dataset=ROWS[:4], optimizers=(optimizer, None))


def _loaded(folder: Path | str) -> Tensor:
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "owlore")) for name in METHODS]
)
def test_a_trainers_checkpoints_are_what_was_trained_and_go_on_bit_equal(name: str, tmp_path: Path) -> None:
    """Resumed into a model that began elsewhere: all there is of it comes from the checkpoint."""
    whole = _trainer(METHODS[name], tmp_path)
    whole.train()
    whole.save_model(str(tmp_path / "final"))
    for folder in ("final", "checkpoint-6"):
        torch.testing.assert_close(_loaded(tmp_path / folder), logits(whole.model), rtol=1e-5, atol=1e-5)
    resumed = _trainer(METHODS[name], tmp_path / "resumed", halved=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    left, right = snapshot(whole.model), snapshot(resumed.model)
    assert [key for key in left if not torch.equal(left[key], right[key])] == []


@pytest.mark.parametrize("name", METHODS)
def test_the_best_model_at_the_end_is_the_best_checkpoints(name: str, tmp_path: Path) -> None:
    """A metric that falls makes an early checkpoint the best."""
    trainer = _trainer(
        METHODS[name], tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    trainer.save_model(str(tmp_path / "final"))
    torch.testing.assert_close(logits(trainer.model), _loaded(best), rtol=1e-5, atol=1e-5)
    assert torch.equal(_loaded(tmp_path / "final"), _loaded(best))


@pytest.mark.parametrize("name", METHODS)
def test_accelerates_state_goes_on_bit_equal_in_another_model(name: str, tmp_path: Path) -> None:
    from accelerate import Accelerator

    def begin(halved: bool) -> list[Any]:
        model = llama()
        if halved:
            for param in model.parameters():
                param.data.mul_(0.5)
        optimizer = attach(model, METHODS[name], lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        accelerator = Accelerator(cpu=True)
        return [accelerator, *accelerator.prepare(model, optimizer, schedule)]

    def run(run: list[Any], first: int, last: int) -> None:
        accelerator, model, optimizer, schedule = run
        for step in range(first, last):
            accelerator.backward(model(**tokens(seed=step)).loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    whole = begin(halved=False)
    run(whole, 0, 3)
    whole[0].save_state(str(tmp_path / "state"))
    plain = whole[0].unwrap_model(whole[1])
    plain.save_pretrained(tmp_path / "model", state_dict=whole[0].get_state_dict(whole[1]))
    torch.testing.assert_close(_loaded(tmp_path / "model"), logits(plain), rtol=1e-5, atol=1e-5)
    resumed = begin(halved=True)
    resumed[0].load_state(str(tmp_path / "state"))
    for each in (whole, resumed):
        run(each, 3, 7)
    left, right = snapshot(whole[1]), snapshot(resumed[1])
    assert [key for key in left if not torch.equal(left[key], right[key])] == []
