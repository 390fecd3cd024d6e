"""One run of `lisa-kernels flow train`, from options to a saved flow and its summary."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lisa_kernels.distributed import check_one_launched, check_one_process
from lisa_kernels.errors import NotRehearsedError
from lisa_kernels.files import written_whole
from lisa_kernels.flow.autoencoder import Autoencoder, fit_autoencoder
from lisa_kernels.flow.average import AveragedGroups
from lisa_kernels.flow.batches import Batches
from lisa_kernels.flow.begin import begin_from
from lisa_kernels.flow.build import HIDDEN, new_model
from lisa_kernels.flow.data import Images, load_images
from lisa_kernels.flow.evaluation import HeldOutLoss, held_out_loss
from lisa_kernels.flow.experts_adamw import ExpertsAdamW
from lisa_kernels.flow.model_file import Classes, check_checkpoint, save_model
from lisa_kernels.flow.options import FlowOptions
from lisa_kernels.flow.path import flow_loss
from lisa_kernels.flow.pictures import GUIDANCE, write_samples
from lisa_kernels.flow.progress import FlowProgress
from lisa_kernels.flow.transformer import GroupedFlow
from lisa_kernels.methods import attach
from lisa_kernels.report import PAGE_FILE, PICTURE_FILE, read_run, write_page
from lisa_kernels.train.checkpoint import (
    checkpoint_step,
    find_checkpoints,
    load_tree,
    remove_checkpoint,
    remove_leftovers,
    save_tree,
)
from lisa_kernels.train.history_file import HistoryFile
from lisa_kernels.train.identity import check_unchanged, checksum_of_folder
from lisa_kernels.train.interrupt import Interrupt
from lisa_kernels.train.memory import MemoryMeter
from lisa_kernels.train.ornaments import ornament
from lisa_kernels.train.placement import Memory, check_room, out_of_memory, take_device
from lisa_kernels.train.run_folder import SUMMARY_FILE, open_run, start_run, write_json
from lisa_kernels.train.run_lock import RunLock

INTERRUPTED = 130
# Flows of digits with HIDDEN numbers a token learnt faster at 5e-3 than at 2e-3; a little below the first.
LR = 4e-3
TRAINING_STATE = "training_state"

# Of a run on these images and this device.
FlowPlan = Callable[[FlowOptions, Images, torch.device], int]


def train_flow(options: FlowOptions, console: Console, plan: FlowPlan | None = None) -> tuple[int, dict[str, Any]]:
    """Run `options`; returns (exit code, summary): 0 when done, 130 when stopped by ctrl-C with a checkpoint.

    plan: tells the peak of a run's memory in bytes before it starts.
    """
    check_one_process("a run of a flow")
    check_one_launched("this run")
    with RunLock(options.output) as lock:
        device = take_device(options, console)
        try:
            return _train(options, device, console, plan, lock)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(Memory.of(device), device, bool(find_checkpoints(options.output))) from error


def _train(
    options: FlowOptions, device: torch.device, console: Console,
    plan: FlowPlan | None, lock: RunLock,
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    facts, checkpoint = open_run(options)
    images = load_images(options.data, options.image_size)
    for note in images.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    train, held_out = images.split(options.eval_fraction, options.seed)
    began = {"rows": train.digest(), "held_out": held_out.digest()}
    for name in ("backbone", "autoencoder"):
        spec = getattr(options, name)
        if spec is not None and (folder := Path(spec).expanduser()).is_dir():
            began[name] = checksum_of_folder(folder)
    check_unchanged(facts.get("began", {}), began, options.output)
    autoencoder = None
    if options.autoencoder is not None:
        autoencoder, latents = fit_autoencoder(options.autoencoder, images, device)
        train, held_out = latents.split(options.eval_fraction, options.seed)
        sizes = (" × ".join(map(str, shape)) for shape in (latents.shape, images.shape))
        console.print("latents of {} for pictures of {}".format(*sizes), highlight=False)
    planned = None if plan is None else _planned(options, train, device, plan, console)
    if device.type == "cuda" and planned is not None:
        check_room(planned, Memory.of(device), device)
    run = FlowRun(options, train, held_out, device, console, autoencoder, fresh=checkpoint is None)
    if checkpoint is None:
        before = run.held_out_loss(averaged=False)
        facts = {"eval_loss_before": before and before.mean, "began": began, "taken": {}}
        lock.take()
        start_run(options, facts)
        lock.take()
    else:
        run.load(checkpoint)
    run.history.begin(run.begin_facts(), checkpoint_step(checkpoint))
    with Interrupt() as interrupt:
        finished = run.train(lambda: interrupt.interrupted)
    if not finished:
        where = run.save()
        console.print(
            f"stopped at step {run.step}; continue with the same command and --resume ({where})", highlight=False
        )
        ornament("the page of the run", lambda: _write_page(options.output, console), console)
        return INTERRUPTED, {"checkpoint": str(where), "steps": run.step}
    return 0, run.finish(facts["eval_loss_before"], planned)


def _planned(
    options: FlowOptions, images: Images, device: torch.device, plan: FlowPlan, console: Console
) -> int | None:  # fmt: skip
    """Return the planned peak in bytes; None, the reason printed, where the run cannot be rehearsed."""
    try:
        peak = plan(options, images, device)
    except NotRehearsedError as error:
        console.print(f"note: the memory of this run is not planned: {error}", highlight=False, soft_wrap=True)
        return None
    console.print(f"planned peak memory: {peak / 1e6:,.1f} MB", highlight=False)
    return peak


def _write_page(folder: Path, console: Console) -> None:
    write_page([read_run(folder)], folder / PAGE_FILE)
    console.print(f"page of the run in {folder / PAGE_FILE}", highlight=False, soft_wrap=True)


class FlowRun:
    """Model, optimizer and averages of a run, and the number of steps taken."""

    def __init__(
        self, options: FlowOptions, train: Images, held_out: Images, device: torch.device, console: Console,
        autoencoder: Autoencoder | None = None, fresh: bool = True,
    ) -> None:  # fmt: skip
        self.options, self.device, self.console, self.autoencoder = options, device, console, autoencoder
        self.held_out, self.classes = held_out, Classes(train.names, train.kind)
        method, self.meter = options.build_method(), MemoryMeter.start(device)
        model = new_model(options, train, method.intervals())
        if fresh and options.begin_from is not None:
            begin_from(model, self.classes, Path(options.begin_from).expanduser(), autoencoder)
        self.model = model.to(device)
        self.lr = options.lr or LR * HIDDEN / self.model.shape.hidden
        self.average = AveragedGroups(
            self.model, self.model.route, options.average, paged=options.resting_weights == "page"
        )
        optimizer = attach(
            self.model, method, lr=self.lr, weight_decay=options.weight_decay, seed=options.seed, blocks="blocks",
            max_grad_norm=options.max_grad_norm or None, paging=options.paging,
        )  # fmt: skip
        assert isinstance(optimizer, ExpertsAdamW)
        self.optimizer = optimizer
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self.batches = Batches(train, options.batch_size, options.label_dropout, self.model.any_class, options.seed)
        self.step, self.seconds = 0, 0.0
        self._began_at, self._began_seconds = 0, 0.0
        self.history = HistoryFile(options.output, console)
        self.losses: list[float] = []
        # Of the steps since the last log.
        self._loss, self._logged_at = torch.zeros((), device=device), 0

    # Training

    def train(self, stop: Callable[[], bool]) -> bool:
        """Take the steps that are left; False where `stop` said to end sooner."""
        options, every = self.options, max(1, self.options.steps // 50)
        progress = FlowProgress(self.console, options.steps, self.step)
        self.model.train()
        with progress:
            while self.step < options.steps:
                if stop():
                    return False
                begun = time.perf_counter()
                group = self.optimizer.active_group
                self._loss += self._take_step()
                self.average.update(self.model, group)
                self.step += 1
                self.seconds += time.perf_counter() - begun
                progress.advance(group, self.speed)
                if self.step == 1 or self.step % every == 0:
                    self._log(progress)
                if options.eval_every and self.step % options.eval_every == 0 and self.step < options.steps:
                    self._evaluate()
                if options.save_every and self.step % options.save_every == 0:
                    self.save()
        return True

    def _take_step(self) -> torch.Tensor:
        options, optimizer = self.options, self.optimizer
        for group, rate in zip(optimizer.param_groups, self._rates):
            group["lr"] = rate * share_of_rate(options, self.step)
        total = torch.zeros((), device=self.device)
        for part in range(options.accumulate):
            batch = self.batches[self.step * options.accumulate + part]
            pixels, labels, noise = (each.to(self.device) for each in (batch.pixels, batch.labels, batch.noise))
            times, condition = optimizer.times(len(pixels)), self.model.condition(labels)
            loss = flow_loss(self.model, pixels, times, condition, noise) / options.accumulate
            loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total

    @property
    def speed(self) -> float:
        """Images per second of training steps since this start."""
        images = (self.step - self._began_at) * self.options.batch_size * self.options.accumulate
        return images / seconds if (seconds := self.seconds - self._began_seconds) else 0.0

    def _log(self, progress: FlowProgress) -> None:
        """Tell the mean loss of the steps since the last time, of all groups alike."""
        loss = float(self._loss) / (self.step - self._logged_at)
        self._loss, self._logged_at = torch.zeros_like(self._loss), self.step
        norm = self.optimizer.last_grad_norm
        self.losses.append(loss)
        rate = self.lr * share_of_rate(self.options, self.step - 1)
        progress.log(self.step, loss, rate)
        self.history.add(
            "log", self.step, loss=loss, learning_rate=rate, grad_norm=None if norm is None else float(norm),
            seconds=self.seconds, tokens_per_second=self.speed, peak_bytes=self.meter.peak_bytes(),
        )  # fmt: skip

    # Evaluation

    def averaged(self) -> GroupedFlow:
        """Return a model with the averaged weights, in evaluation."""
        model = self.model.like().to(self.device)
        self.average.copy_into(model)
        return model.eval()

    def held_out_loss(self, averaged: bool = True) -> HeldOutLoss | None:
        """Return the loss of what is held out, of the averaged weights or of those that train."""
        model = self.averaged() if averaged else self.model
        return held_out_loss(model, self.held_out, self.options.seed)

    def _evaluate(self) -> None:
        found = self.held_out_loss()
        if found is not None:
            self.console.print(f"step {self.step}: held-out loss {found.mean:.4f}", highlight=False)
            self.history.add("evaluation", self.step, loss=found.mean, loss_of_groups=found.of_groups)

    def begin_facts(self) -> dict[str, Any]:
        """Return what the history of the run begins with."""
        fields = dataclasses.fields(FlowOptions)
        return {
            "max_steps": self.options.steps, "device": self.device.type, "counted": "images",
            "loss_unit": "mean squared error of the velocity",
            "parameters": sum(param.numel() for param in self.model.parameters()),
            "method": self.optimizer.method.settings(), "layers": self.optimizer.layer_names,
            "defaults": {field.name: field.default for field in fields if field.default is not dataclasses.MISSING},
        }  # fmt: skip

    # Folders

    def save(self) -> Path:
        """Write a checkpoint of the step; what it holds can be sampled from as well."""
        folder = self.options.output / f"checkpoint-{self.step}"
        with written_whole(folder) as partial:
            save_model(self.averaged(), self.classes, partial, self.options.seed, self.autoencoder)
            state = {
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict(), "losses": self.losses, "seconds": self.seconds,
                "loss": self._loss, "logged_at": self._logged_at,
            }  # fmt: skip
            save_tree(state, partial, TRAINING_STATE)
        for old in find_checkpoints(self.options.output)[: -self.options.max_checkpoints]:
            remove_checkpoint(old)
        remove_leftovers(self.options.output)
        return folder

    def load(self, checkpoint: Path) -> None:
        """Go on where the checkpoint was written. Raises InputError for one of another convention, or not whole."""
        check_checkpoint(checkpoint, self.model)
        state = load_tree(checkpoint, TRAINING_STATE)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        self.step = self._began_at = checkpoint_step(checkpoint)
        self.losses, self.seconds = state["losses"], state["seconds"]
        self._began_seconds = self.seconds
        self._loss, self._logged_at = state["loss"].to(self.device), state["logged_at"]

    def finish(self, loss_before: float | None, planned: int | None) -> dict[str, Any]:
        """Save the averaged model, then what may fail without losing it; returns the summary."""
        output, console, peak = self.options.output, self.console, self.meter.peak_bytes()
        model = self.averaged()
        save_model(model, self.classes, output, self.options.seed, self.autoencoder)
        after = held_out_loss(model, self.held_out, self.options.seed)
        summary = {
            "method": self.optimizer.method.name, "settings": self.optimizer.method.settings(), "steps": self.step,
            "lr": self.lr, "train_loss_first": self.losses[0], "train_loss_last": self.losses[-1],
            "eval_loss_before": loss_before, "eval_loss_after": None if after is None else after.mean,
            "eval_loss_of_groups": None if after is None else after.of_groups,
            "boundaries": list(model.route.intervals.bounds), "group_steps": self.optimizer.group_steps,
            "images_per_second": self.speed, "skipped_steps": self.optimizer.skipped_steps,
            "parameters": sum(param.numel() for param in model.parameters()), "peak_bytes_measured": peak,
            "peak_bytes_planned": planned,
        }  # fmt: skip
        self.optimizer.detach()
        ornament(f"the summary ({SUMMARY_FILE})", lambda: write_json(output / SUMMARY_FILE, summary), console)
        each = self.options.samples if self.options.samples is not None else 10 if self.options.backbone is None else 1
        if each:
            ornament("the picture of samples", lambda: self._draw(model, each), console)
        ornament("the page of the run", lambda: _write_page(output, console), console)
        if after is not None and loss_before is not None:
            said = f"held-out loss: {loss_before:.4f} before, {after.mean:.4f} after {self.step} steps"
            console.print(said, style="bold", highlight=False)
        console.print(f"{self.speed:,.0f} images/s; flow and summary in {output}", highlight=False)
        return summary

    def _draw(self, model: GroupedFlow, each: int) -> None:
        where, options = self.options.output / PICTURE_FILE, self.options
        # What was never left out cannot be guided by.
        guidance = GUIDANCE if options.label_dropout else 1.0
        write_samples(
            model, where, self.classes.names, each, seed=options.seed, guidance=guidance, autoencoder=self.autoencoder
        )  # fmt: skip
        self.console.print(f"samples of every class in {where}", highlight=False, soft_wrap=True)


def share_of_rate(options: FlowOptions, step: int) -> float:
    """Return what the rate of step number `step`, counted from 0, is as a share of --lr."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    left = max(1, options.steps - options.warmup_steps)
    done = (step - options.warmup_steps) / left
    if options.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if options.lr_schedule == "linear" else 1.0
