"""The optimizer works where torch optimizers do: Trainer, schedulers, GradScaler, Accelerate, clipping."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import changed, llama, snapshot, tokens, train
from torch import Tensor

from lisa_kernels import LISA, OWS, BAdam, OwLore, attach
from lisa_kernels.methods import Method

METHODS: dict[str, Method] = {
    "owlore": OwLore(active_layers=1, period=2, rank=4, gap=2, scores="uniform"),
    "lisa": LISA(active_layers=1, period=2),
    "ows": OWS(active_layers=1, period=2, scores="gradient-norm"),
}


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Twelve rows of random tokens."""

    def __init__(self) -> None:
        self.rows = tokens(rows=12, columns=8)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self.rows.items()}


def trainer(folder: Path, method: Method, keep_logits: bool = False, **settings: Any) -> tuple[Any, Any]:
    """Return a plain Trainer with the optimizer handed in, and the optimizer."""
    from transformers import Trainer, TrainingArguments

    model = llama(layers=4)
    optimizer = attach(model, method, lr=5e-3, keep_logits=keep_logits)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=2, save_steps=3, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=1, lr_scheduler_type="linear", **settings,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=Rows(), optimizers=(optimizer, None)), optimizer


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_trainer_trains_saves_and_resumes(method: str, tmp_path: Path) -> None:
    """Six steps at once and three, a new process's worth of objects, then three more: equal weights and schedule."""
    whole, reference = trainer(tmp_path / "run", METHODS[method])
    before = snapshot(whole.model)
    whole.train()
    assert changed(whole.model, before)
    assert reference.calls == 6
    resumed, optimizer = trainer(tmp_path / "run", METHODS[method])
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert optimizer.history == reference.history
    assert optimizer.calls == 6
    assert not changed(resumed.model, snapshot(whole.model))
    assert resumed.state.log_history[-2]["learning_rate"] == whole.state.log_history[-2]["learning_rate"]


def test_a_trainer_that_enables_checkpointing_and_accumulates(tmp_path: Path) -> None:
    """With its gradient checkpointing and accumulation on, frozen embeddings stay out of the graph."""
    run, optimizer = trainer(
        tmp_path, BAdam(period=1), gradient_checkpointing=True, gradient_accumulation_steps=2,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    seen: list[bool] = []
    run.model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    before = snapshot(run.model)
    run.train()
    assert not any(seen)
    assert optimizer.calls == 6
    assert all(name.startswith("model.layers.") for name in changed(run.model, before))


@pytest.mark.parametrize("embeddings", ["always", "low-rank"])
def test_a_trainer_gets_the_models_own_loss_without_logits(embeddings: str, tmp_path: Path) -> None:
    """With accumulation, where it hands over how many labels a step has: the logged losses and norms are the same."""
    logs = []
    for keep_logits in (False, True):
        method = OwLore(active_layers=1, period=2, rank=4, gap=2, scores="uniform", embeddings=embeddings)
        settings = {"gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2}
        run, optimizer = trainer(tmp_path / str(keep_logits), method, keep_logits, **settings)
        assert optimizer.forms_logits is keep_logits
        run.train()
        logs.append([(row["loss"], row["grad_norm"]) for row in run.state.log_history if "loss" in row])
        assert run.evaluate(Rows())["eval_loss"] > 0
    assert len(logs[0]) == 6
    for one, other in zip(*logs):
        assert one == pytest.approx(other, rel=1e-3)


def test_schedulers_drive_every_group() -> None:
    """A schedule set at the start reaches layers that become active later, slots with their own rate included."""
    model = llama()
    method = OwLore(active_layers=1, period=1, rank=4, scores="uniform", scale=0.5)
    optimizer = attach(model, method, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / 4)
    for step in range(4):
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates == pytest.approx({name: 1e-2 * (0.5 if name == "slots" else 1) * (1 - step / 4) for name in rates})
        train(model, optimizer, tokens())
        scheduler.step()
    before = snapshot(model)
    train(model, optimizer, tokens())
    assert not changed(model, before)


@pytest.mark.parametrize("unscale", [False, True], ids=["in the step", "unscaled before"])
def test_grad_scaler_gives_the_same_steps(unscale: bool) -> None:
    """A scaled loss moves the weights as the plain loss does; an overflow is skipped and halves the scale."""
    model, twin = llama(), llama()
    optimizer, reference = (attach(each, METHODS["owlore"], lr=1e-2) for each in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    for seed in range(4):
        train(twin, reference, tokens(seed=seed))
        scaler.scale(model(**tokens(seed=seed)).loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert optimizer.active_layers == reference.active_layers
    for (name, left), right in zip(snapshot(model).items(), snapshot(twin).values()):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6, msg=name)
    before = snapshot(model)
    scaler.scale(model(**tokens()).loss * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert not changed(model, before)


def test_accelerate_prepares_the_optimizer() -> None:
    """Through Accelerate's wrapper training, clipping, saving and the schedule of layers are the plain ones."""
    from accelerate import Accelerator

    model, twin = llama(), llama()
    reference = attach(twin, METHODS["owlore"], lr=1e-2)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    inner = attach(model, METHODS["owlore"], lr=1e-2)
    wrapped, optimizer = accelerator.prepare(model, inner)
    assert optimizer.optimizer is inner
    for seed in range(8):
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**tokens(seed=seed)).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        (twin(**tokens(seed=seed)).loss / 2).backward()
        if seed % 2:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
            reference.step()
            reference.zero_grad()
    assert inner.calls == reference.calls == 4
    assert inner.history == reference.history
    assert not changed(model, snapshot(twin))
    optimizer.load_state_dict(optimizer.state_dict())


def test_autocast_trains() -> None:
    """Under bfloat16 autocast float32 weights train, slots in float32."""
    model = llama()
    optimizer = attach(model, METHODS["owlore"], lr=1e-2)
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**tokens()).loss
        loss.backward()
        assert all(param.grad.dtype == param.dtype for param in model.parameters() if param.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_weights_train(method: str) -> None:
    """A bfloat16 model keeps its dtype, its slots are float32, and its loss falls."""
    model = llama().to(torch.bfloat16)
    optimizer = attach(model, METHODS[method], lr=1e-2)
    losses = [train(model, optimizer, tokens()) for _ in range(6)]
    assert losses[-1] < losses[0]
    slots = {param.dtype for name, param in model.named_parameters() if name.endswith(".slot")}
    assert slots <= {torch.float32}
    optimizer.detach()
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}


def test_a_copied_model_is_a_model() -> None:
    """Deep copies, as made for averaging weights, compute the same and have the same parts frozen, without a word."""
    model = llama()
    optimizer = attach(model, METHODS["owlore"])
    train(model, optimizer, tokens())
    twin = copy.deepcopy(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(twin(**tokens()).logits, model(**tokens()).logits)
    flags = {name: param.requires_grad for name, param in model.named_parameters()}
    assert {name: param.requires_grad for name, param in twin.named_parameters()} == flags
