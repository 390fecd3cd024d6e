"""transformers' Trainer with checkpoints that are whole, without pickle, and hold the sampler."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lisa_kernels.distributed import Ranks, at_rest, check_one_process, is_unit, on_first
from lisa_kernels.errors import InputError
from lisa_kernels.files import written_whole
from lisa_kernels.methods import SampledAdamW
from lisa_kernels.train.checkpoint import (
    SHARDS,
    find_checkpoints,
    load_tree,
    random_state,
    remove_checkpoint,
    remove_leftovers,
    save_tree,
    set_random_state,
    tensors_of,
)
from lisa_kernels.train.interrupt import Interrupt
from lisa_kernels.train.linked_checkpoint import is_linked, load_linked, save_model
from lisa_kernels.train.rank_rows import RankBatches, RankLoader

TRAINING_STATE = "training_state"
# Seconds after a ctrl-C in which launchers send it on to processes that have had it already.
PASSED_ON_WITHIN = 5.0


@dataclass
class OneDevice(TrainingArguments):  # type: ignore[misc]
    """Training arguments of a run on one device, however many there are: under DataParallel no layer can be switched.

    run_device: its name; of a GPU with its number.
    """

    run_device: str = "cpu"

    @property
    def n_gpu(self) -> int:
        """How many GPUs the process uses: one, or none."""
        count: int = super().n_gpu
        return min(1, count)

    @property
    def device(self) -> torch.device:
        """The device of the run; a GPU is also the current one, on which accelerate puts batches."""
        super().device  # noqa: B018 (sets up accelerate's state the first time, and the first GPU as the current one)
        device = torch.device(self.run_device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return device


class SamplingState(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keeps sampler and schedule in `trainer_state.json` and logs which layers are active.

    The optimizer's own state holds all that a resumed run needs, in this Trainer and in any other; this callback makes
    it readable beside the losses.
    """

    def __init__(self, optimizer: SampledAdamW | None = None) -> None:
        self.optimizer = optimizer
        self.attachment: dict[str, Any] = {}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the active layers to the log that is being written."""
        logs = kwargs.get("logs")
        if self.optimizer is not None and logs is not None and "loss" in logs and state.log_history:
            state.log_history[-1]["active_layers"] = self.optimizer.active_layers
            if self.optimizer.last_grad_norm is not None:
                logs["grad_norm"] = state.log_history[-1]["grad_norm"] = float(self.optimizer.last_grad_norm)

    def state(self) -> dict[str, Any]:
        """Return the sampler, the active layers and the history of draws as plain values."""
        if self.optimizer is not None:
            sampler = self.optimizer.sampler
            self.attachment = {
                "method": self.optimizer.method.settings(),
                "active_layers": self.optimizer.active_layers,
                "visits": list(self.optimizer.visits),
                "history": [list(row) for row in self.optimizer.history],
                "sampler": None if sampler is None else sampler.state_dict(),
            }
        return {"args": {}, "attributes": {"attachment": self.attachment}}


class StopOnInterrupt(Interrupt, TrainerCallback):  # type: ignore[misc]
    """Turns the first ctrl-C into: finish this step, save a checkpoint, stop. The second stops at once.

    That of one rank is that of all.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        super().__init__(seconds=0.0 if ranks is None else PASSED_ON_WITHIN)
        self._ranks = ranks

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint and the end of training after an interrupt."""
        if self._ranks is not None:
            self.interrupted = self._ranks.any_has([self.interrupted])[0]
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True


class OneOfRanks(nn.Module):
    """An attached model as the training loop calls it on one of several ranks.

    The loop takes all micro-batches of a step but the last under `no_sync`, and their gradients stay at home.
    """

    def __init__(self, model: nn.Module, optimizer: SampledAdamW) -> None:
        super().__init__()
        self.module, self.no_sync = model, optimizer.no_sync

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model returns."""
        return self.module(*args, **kwargs)


class FineTuneTrainer(Trainer):  # type: ignore[misc]
    """A Trainer for an attached model: the optimizer is handed in, checkpoints are safetensors and JSON.

    A checkpoint holds model, tokenizer, optimizer (with sampler, bases and slots), schedule, gradient scaler and random
    state; it is written under another name, synced and renamed: a kill at any instant leaves the last one whole.
    Masters that are files are linked, see `save_model`.

    The loss of a model with float16 weights is scaled by a `GradScaler`. The optimizer undoes that in its step, which
    a gradient beyond float16 skips and counts; the scale is halved then.

    ranks: with others, each rank takes a part of each step's rows, losses are those of all, and rank 0 writes. Of a
    model whose rows they share (`fully_shard`) each writes its own into the folder's `SHARDS`, in the place of the
    model's files; any number of ranks goes on from there, each with its rows or all.
    """

    _last_loss: Tensor | None = None

    def __init__(self, model: Any, ranks: Ranks | None = None, **settings: Any) -> None:
        if ranks is None:
            # Its files, its rows and its losses are those of one process.
            check_one_process("this Trainer without ranks=")
        self._ranks = ranks
        super().__init__(model=model, **settings)
        if any(param.dtype == torch.float16 for param in model.parameters()):
            # The weights are narrow already, so no autocast; gradients below 2⁻²⁴ would be zeros all the same.
            self.accelerator.scaler = torch.amp.GradScaler(self.args.device.type)

    def _base_optimizer(self) -> SampledAdamW:
        inner = getattr(self.optimizer, "optimizer", self.optimizer)
        assert isinstance(inner, SampledAdamW)
        return inner

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """Return what the training loop calls; with ranks no DDP, whose gradients and buffers would be idle copies."""
        if self._ranks is None:
            return super()._wrap_model(model, training, dataloader)
        return OneOfRanks(self.model, self._base_optimizer()) if training else model

    def get_train_dataloader(self) -> Any:
        """Return the loader of the rows, of this rank's where there are others."""
        if self._ranks is None:
            return super().get_train_dataloader()
        size, seed = self.args.per_device_train_batch_size, self.args.data_seed
        batches = RankBatches(len(self.train_dataset), size, seed, self._ranks.rank, self._ranks.count)
        return RankLoader(self.train_dataset, batches, self.data_collator, self.args.dataloader_pin_memory)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return the loader of the held-out rows, all of them on each rank: `held_out_loss` takes this rank's."""
        if self._ranks is None:
            return super().get_eval_dataloader(eval_dataset)
        size = self.args.per_device_eval_batch_size
        return DataLoader(self.eval_dataset, batch_size=size, collate_fn=self.data_collator)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        randoms = None if self._ranks is None else self._ranks.tell(random_state(self.args.device))
        target = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        shards = None
        if is_unit(self.model):
            shards = target.with_name(f"{target.name}-{SHARDS}")
            self._base_optimizer().save_shards(shards)
        on_first(self._ranks, lambda: self._write_checkpoint(target, shards, randoms))

    def _write_checkpoint(self, target: Path, shards: Path | None, randoms: list[Any] | None) -> None:
        """Write what one rank knows into a new folder, and move what all of them have written there."""
        run = target.parent
        with written_whole(target) as folder:
            if shards is None:
                save_model(self.model, folder, self._base_optimizer())
            else:
                shards.rename(folder / SHARDS)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            scaler = getattr(self.accelerator, "scaler", None)
            save_tree(
                {
                    "optimizer": self._base_optimizer().state_dict() if shards is None else None,
                    "scheduler": self.lr_scheduler.state_dict(),
                    "scaler": None if scaler is None else scaler.state_dict(),
                    "random": random_state(self.args.device),
                    # Of each rank.
                    "randoms": randoms,
                },
                folder, TRAINING_STATE,
            )  # fmt: skip
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(folder / "trainer_state.json"))
        if self.args.save_total_limit:
            for old in find_checkpoints(run)[: -self.args.save_total_limit]:
                remove_checkpoint(old)
        remove_leftovers(run)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Take a micro-batch forward and backward; returns its loss, or the one before where it is no number.

        That is what a log is to show, and here the device sees to it: with `logging_nan_inf_filter` transformers would
        ask for each loss, and wait.
        """
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        before = torch.zeros_like(loss) if self._last_loss is None else self._last_loss
        self._last_loss = torch.where(torch.isfinite(loss), loss, before)
        return self._last_loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> None:
        # transformers would measure all gradients once more; the optimizer has the norm, see SamplingState.
        return None

    def _get_learning_rate(self) -> float:
        # Of its groups transformers logs the first one's rate, which may be a multiple of the one that was given.
        rate: float = super()._get_learning_rate()
        first = self.lr_scheduler.base_lrs[0] if self.lr_scheduler is not None else 0.0
        return rate * (self.args.learning_rate / first) if first else rate

    def _load_callback_state(self) -> None:
        # The optimizer restores the sampler; the callback made for this run stays.
        pass

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        tree = load_tree(Path(checkpoint), TRAINING_STATE)
        self._load_optimizer(Path(checkpoint), tree)
        self.lr_scheduler.load_state_dict(tree["scheduler"])
        if tree["scaler"] is not None and getattr(self.accelerator, "scaler", None) is not None:
            self.accelerator.scaler.load_state_dict(tree["scaler"])

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        if (Path(checkpoint) / SHARDS).is_dir():
            # They come with the optimizer's.
            return
        if is_unit(self.model):
            raise InputError(
                f"{checkpoint} was written by processes that had all weights each; resume without --shard, or begin "
                "another run with it."
            )
        if is_linked(Path(checkpoint)):
            load_linked(self.model, Path(checkpoint))
        else:
            super()._load_from_checkpoint(checkpoint, model)

    def _load_optimizer(self, checkpoint: Path, tree: dict[str, Any]) -> None:
        if (checkpoint / SHARDS).is_dir():
            self._base_optimizer().load_shards(checkpoint / SHARDS)
            return
        self._check_same(tree)
        self._base_optimizer().load_state_dict(tree["optimizer"])

    def _check_same(self, tree: dict[str, Any]) -> None:
        """Raise InputError on all ranks unless they have read the same from their disks, the model's weights too."""
        if self._ranks is None:
            return
        read = {**dict(self.model.named_parameters()), **tensors_of(tree["optimizer"], "optimizer")}
        self._ranks.check_alike({"the number of tensors in the checkpoint": len(read)})
        self._ranks.check_equal(read, "in the checkpoint that the run goes on from")

    def train_on(self, checkpoint: Path | None) -> None:
        """Train to the last step, from `checkpoint` if there is one.

        A checkpoint of the last step is only loaded: transformers' loop would take one step more.
        """
        if checkpoint is None or (state := _trainer_state(checkpoint)).global_step < self.args.max_steps:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            return
        self._load_from_checkpoint(str(checkpoint))
        self._load_optimizer(checkpoint, load_tree(checkpoint, TRAINING_STATE))
        self.state = state

    def _load_scaler(self, checkpoint: str | None) -> None:
        pass

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            tree = load_tree(Path(checkpoint), TRAINING_STATE)
            state, each = tree["random"], tree.get("randoms")
            if self._ranks is not None and each is not None and len(each) == self._ranks.count:
                state = each[self._ranks.rank]
            for note in set_random_state(state, self.args.device):
                self.say(note)

    def say(self, note: str) -> None:
        """Tell the user something about the run; commands have their own way."""
        warnings.warn(note, stacklevel=2)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Return the token-weighted mean loss over the held-out rows."""
        loss = held_out_loss(self.model, self.get_eval_dataloader(), self._base_optimizer(), self._ranks)
        metrics = {f"{metric_key_prefix}_loss": loss}
        self.log(dict(metrics))
        handler, control = self.callback_handler, self.control
        self.control: TrainerControl = handler.on_evaluate(self.args, self.state, control, metrics)
        return metrics


def _trainer_state(checkpoint: Path) -> TrainerState:
    try:
        return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{checkpoint} is not a whole checkpoint ({error}); resume from another.") from error


@torch.no_grad()
def held_out_loss(
    model: Any, loader: Any, optimizer: SampledAdamW | None = None, ranks: Ranks | None = None
) -> float:  # fmt: skip
    """Return the mean cross entropy in nats per supervised token over all batches; nan if there are none.

    optimizer: of an attached model, whose loss then needs no logits here either. ranks: share the batches, which each
    of them has all.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    with nullcontext() if optimizer is None else optimizer.evaluation_without_logits():
        for batch, counts in _shared_out(loader, ranks):
            inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
            count = int((inputs["labels"][..., 1:] != -100).sum())
            if is_unit(model) or (counts and count):
                # A forward of weights that ranks share is one of all of them.
                loss = model(**inputs).loss
            if counts and count:
                total += loss.double().cpu() * count
                tokens += count
    model.train(training)
    at_rest(model)
    if ranks is not None:
        each = ranks.tell((float(total), tokens))
        return sum(part for part, _ in each) / max(1, sum(n for _, n in each)) if any(n for _, n in each) else math.nan
    return float(total) / tokens if tokens else float("nan")


def _shared_out(loader: Iterable[Any], ranks: Ranks | None) -> Iterator[tuple[Any, bool]]:
    """Yield this rank's batches of those that each of them has all, and whether one counts: all yield as many."""
    if ranks is None:
        yield from ((batch, True) for batch in loader)
        return
    number, batch, mine = -1, None, None
    for number, batch in enumerate(loader):
        if number % ranks.count == ranks.rank:
            mine = batch
        if number % ranks.count == ranks.count - 1:
            yield mine, True
            mine = None
    if (number + 1) % ranks.count:
        yield (batch, False) if mine is None else (mine, True)
