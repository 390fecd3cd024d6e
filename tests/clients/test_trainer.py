"""transformers' Trainer and accelerate with attached models: the weights are those of a plain loop, bit for bit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from families import changed, llama, snapshot, tokens
from tolerances import ANOTHER_ORDER_OF_SUMS

from clients.runs import LR, Recorder, assert_moved_alike, assert_same_weights, mean_over_tokens, plain_loop
from lisa_kernels import LISA, AdamW8bit, GaLore, LoRAFA, OwLore, attach
from lisa_kernels.methods import Method

METHODS: dict[str, Method] = {
    "lisa": LISA(active_layers=1, period=2),
    "owlore": OwLore(active_layers=1, period=2, rank=4, gap=2, scores="uniform"),
    "galore": GaLore(rank=4, gap=2),
    "lora-fa": LoRAFA(rank=4),
}
# Some of them with weights at rest, their bits in memory or in files.
RESTING: dict[str, tuple[str, str, bool]] = {
    "owlore, nf4": ("owlore", "nf4", False),
    "owlore, nf4 in files": ("owlore", "nf4", True),
    "lora-fa, int8 in files": ("lora-fa", "int8", True),
}
STEPS = 4


def attached(model: Any, name: str, folder: Path, lr: float = LR) -> Any:
    """Return the optimizer of a model that is attached by a name of these; folder: for files, where it has some."""
    method, resting, in_files = RESTING.get(name, (name, None, False))
    where = {key: tempfile.mkdtemp(dir=folder) for key in ("masters", "resting_where") if in_files}
    return attach(model, METHODS[method], lr=lr, resting=resting, **where)


def rows(count: int = 12) -> list[dict[str, Any]]:
    batch = tokens(rows=count, columns=8)
    return [{name: value[row] for name, value in batch.items()} for row in range(count)]


def trainer(model: Any, folder: Path, given: dict[str, Any], **changes: Any) -> tuple[Any, Recorder]:
    """Return a Trainer and what records its batches."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(**{
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 1, "seed": 1,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", **changes,
    })  # fmt: skip
    callbacks = given.pop("callbacks", None)
    made = Trainer(
        model=model, args=arguments, train_dataset=rows(), eval_dataset=rows(4), callbacks=callbacks, **given
    )
    made.data_collator = Recorder(made.data_collator)
    return made, made.data_collator


@pytest.mark.parametrize("accumulate", [1, 2], ids=["", "accumulated"])
@pytest.mark.parametrize("method", [*METHODS, *RESTING])
def test_a_trainer_is_the_plain_loop(method: str, accumulate: int, tmp_path: Path) -> None:
    model, twin = llama(), llama()
    optimizer, reference = (attached(each, method, tmp_path) for each in (model, twin))
    made, recorder = trainer(
        model, tmp_path, {"optimizers": (optimizer, None)}, gradient_accumulation_steps=accumulate
    )  # fmt: skip
    made.train()
    losses = plain_loop(twin, reference, recorder.batches, STEPS, mean_over_tokens, accumulate)
    logged = [row for row in made.state.log_history if "loss" in row]
    assert [row["loss"] for row in logged] == pytest.approx(losses, rel=1e-5)
    assert logged[0]["learning_rate"] == pytest.approx(optimizer.param_groups[0]["initial_lr"])
    assert optimizer.history == reference.history
    assert_same_weights(model, twin, 0.0)
    if method in RESTING:
        optimizer.detach()
        reference.detach()
        assert_same_weights(model, twin, 0.0)


def test_an_optimizer_by_class_is_the_plain_loop(tmp_path: Path) -> None:
    """The Trainer makes AdamW8bit itself, in its two groups of parameters."""
    model, twin = llama(), llama()
    made, recorder = trainer(model, tmp_path, {"optimizer_cls_and_kwargs": (AdamW8bit, {"lr": LR})}, weight_decay=0.1)
    made.train()
    decayed = made.get_decay_parameter_names(twin)
    named = dict(twin.named_parameters())
    reference = AdamW8bit(
        [
            {"params": [param for name, param in named.items() if name in decayed], "weight_decay": 0.1},
            {"params": [param for name, param in named.items() if name not in decayed], "weight_decay": 0.0},
        ],
        lr=LR,
    )
    plain_loop(twin, reference, recorder.batches, STEPS, mean_over_tokens)
    assert_same_weights(model, twin, 0.0)


@pytest.mark.parametrize("method", ["owlore", "lora-fa", *RESTING])
def test_the_best_model_comes_back_after_early_stopping(method: str, tmp_path: Path) -> None:
    """With a rate that ruins the model after the first evaluation: what is kept and saved is what was best then.

    At rest that was masters and what their slots had learnt beside codes; what comes back are codes of the sum of both.
    """
    from transformers import AutoModelForCausalLM, EarlyStoppingCallback

    model = llama()
    optimizer = attached(model, method, tmp_path, lr=0.5)
    made, _ = trainer(
        model, tmp_path, {"optimizers": (optimizer, None), "callbacks": [EarlyStoppingCallback(1)]},
        max_steps=12, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    made.train()
    assert made.state.global_step < 12
    assert made.evaluate()["eval_loss"] == pytest.approx(
        made.state.best_metric, rel=2e-2 if method in RESTING else 1e-5
    )
    made.save_model(str(tmp_path / "final"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    assert_same_weights(model, again, 0.0)
    best = AutoModelForCausalLM.from_pretrained(made.state.best_model_checkpoint, dtype=torch.float32)
    assert_same_weights(best, again, 0.0)
    optimizer.detach()
    assert_same_weights(model, again, 0.0)


@pytest.mark.slow
def test_a_compiled_trainer_is_the_plain_loop(tmp_path: Path) -> None:
    model, twin = llama(layers=2), llama(layers=2)
    optimizer, reference = (attach(each, METHODS["owlore"], lr=LR) for each in (model, twin))
    made, recorder = trainer(
        model, tmp_path, {"optimizers": (optimizer, None)}, torch_compile=True, torch_compile_backend="eager"
    )  # fmt: skip
    before = snapshot(twin)
    made.train()
    plain_loop(twin, reference, recorder.batches, STEPS, mean_over_tokens)
    assert_moved_alike(model, twin, before, ANOTHER_ORDER_OF_SUMS)
    assert changed(model, before)


@pytest.mark.parametrize("method", ["owlore", *RESTING])
def test_accelerates_state_continues_the_run(method: str, tmp_path: Path) -> None:
    """Saved after two steps and loaded by other objects: the end is that of the plain loop, bit for bit."""
    from accelerate import Accelerator

    batches = [tokens(seed=seed) for seed in range(4)]
    twin = llama()
    plain_loop_of(twin, attached(twin, method, tmp_path), batches)
    for part, seed in ((batches[:2], 0), (batches[2:], 5)):
        torch.manual_seed(seed)
        inner = llama()
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(inner, attached(inner, method, tmp_path))
        if part[0] is not batches[0]:
            accelerator.load_state(str(tmp_path / "state"))
        plain_loop_of(model, optimizer, part, accelerator)
        accelerator.save_state(str(tmp_path / "state"))
    assert_same_weights(inner, twin, 0.0)


def plain_loop_of(model: Any, optimizer: Any, batches: list[dict[str, Any]], accelerator: Any = None) -> None:
    for batch in batches:
        loss = model(**batch).loss
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
