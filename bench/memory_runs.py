"""Storages of training steps: our methods' by their plan, peers' by the same tracker, without weights or for real."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.step_cases import Case
from bench.step_contestants import CONTESTANTS, Trainee
from lisa_kernels.layers import checkpoint_blocks
from lisa_kernels.plan.gpu_memory import GpuMemory
from lisa_kernels.plan.rehearsal import Workload, empty_batch, micro_batch, prepare, take_steps
from lisa_kernels.plan.stand_ins import META, EmptyOperations, FusedAttention
from lisa_kernels.plan.trace import Trace
from lisa_kernels.plan.tracker import StorageTracker
from lisa_kernels.plan.work import WorkLog
from lisa_kernels.train.configs import load_config
from lisa_kernels.train.empty_model import empty_model
from lisa_kernels.train.models import parse_dtype

# A peer's state is there from its first step on; its second has everything at once.
STEPS = 2
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Peer:
    """Somebody else's way to train: from a model and its case to what trains, and what needs values to be built."""

    title: str
    start: Callable[[Any, Case], Trainee]


def _contestant(name: str) -> Peer:
    contestant = CONTESTANTS[name]
    return Peer(contestant.title, lambda model, case: contestant.start(model, case, 1))


def _badam(model: Any, case: Case) -> Trainee:
    """badam on the lowest block, with which the backward reaches deepest: as in our own plans, the costliest draw."""
    trainee = CONTESTANTS["badam"].start(model, case, 1)
    optimizer: Any = trainee.optimizer
    optimizer.current_block_idx = 0
    optimizer.switch_trainable_params()
    return trainee


PEERS = {
    "torch-full": _contestant("torch-full"),
    "peft-lora": _contestant("peft-lora"),
    "peft-qlora": _contestant("peft-qlora"),
    "galore-torch": _contestant("galore-torch"),
    "badam": Peer(CONTESTANTS["badam"].title, _badam),
}


def measured(
    workload: Workload, device: torch.device = CPU, model: Any = None, work: WorkLog | None = None
) -> Trace:  # fmt: skip
    """Return our method's storages in the same steps with real tensors.

    model: the workload's, where there is one already. `work` is told each operation, as in `rehearse`.
    """
    tracker, model = _tracker_of(device, work), real_model(workload, device) if model is None else model
    with tracker:
        optimizer = prepare(model, workload, mean=work is not None)
        take_steps(model, optimizer, workload, tracker, lambda: random_batch(workload, model))
    return tracker.trace()


def planned_peer(
    peer: Peer, workload: Workload, work: WorkLog | None = None, case: Case | None = None, gpu: GpuMemory | None = None
) -> Trace:  # fmt: skip
    """Return a peer's storages in training steps of a model without weights; `work` is told each operation.

    case: the ranks that the peer gets. gpu: whose workspaces are counted, those of the thread of forward and step and
    of autograd's.
    """
    tracker = StorageTracker("meta", EmptyOperations(workload.batch_size * (workload.seq_len - 1)), watch=work)
    model = empty_model(workload.model, workload.dtype)
    with FusedAttention(), tracker:
        _train(peer, model, workload, tracker, lambda: empty_batch(workload, META), case, gpu)
    return tracker.trace()


def measured_peer(
    peer: Peer, workload: Workload, device: torch.device = CPU, model: Any = None, work: WorkLog | None = None,
    case: Case | None = None,
) -> Trace:  # fmt: skip
    """Return a peer's storages in the same steps with real tensors; arguments as of `measured` and `planned_peer`."""
    tracker, model = _tracker_of(device, work), real_model(workload, device) if model is None else model
    with tracker:
        _train(peer, model, workload, tracker, lambda: random_batch(workload, model), case)
    return tracker.trace()


def _tracker_of(device: torch.device, work: WorkLog | None) -> StorageTracker:
    if device.type == "cpu" or work is None:
        return StorageTracker(device.type, watch=work)
    return StorageTracker(device.type, definitions=GpuMemory.definitions, watch=work)


def real_model(workload: Workload, device: torch.device = CPU) -> Any:
    """Return the workload's model with random weights."""
    from transformers import AutoModelForCausalLM

    config = load_config(workload.model) if isinstance(workload.model, str) else workload.model
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=parse_dtype(workload.dtype))
    model.config.use_cache = False
    return model.train()


def random_batch(workload: Workload, model: Any) -> dict[str, Tensor]:
    """Return a micro-batch of random tokens, each a label of its own, on the model's device."""
    ids = torch.randint(1, model.config.vocab_size, (workload.batch_size, workload.seq_len), device=model.device)
    return {"input_ids": ids, "labels": ids.clone()}


def _case(workload: Workload, layers: int) -> Case:
    method = workload.method
    return Case(layers=layers, lora_rank=16, galore_rank=method.get("rank", 128))


def _train(
    peer: Peer, model: Any, workload: Workload, tracker: StorageTracker, make_batch: Callable[[], dict[str, Tensor]],
    case: Case | None = None, gpu: GpuMemory | None = None,
) -> None:  # fmt: skip
    if workload.gradient_checkpointing:
        checkpoint_blocks(model, workload.checkpointed_blocks, context_fn=lambda: (nullcontext(), FusedAttention()))
    trainee = peer.start(model, case or _case(workload, len(model.model.layers)))
    model, optimizer = trainee.model, trainee.optimizer
    tracker.recording = True
    with tracker.phase("attach"):
        _label(trainee, tracker)
    workspaces = [] if gpu is None else [gpu.workspace(), gpu.workspace()]
    with tracker.following(model):
        for number in range(1, STEPS + 1):
            micro_batch(model, workload, tracker, make_batch, f"step {number}")
            with tracker.phase(f"step {number}: step"):
                optimizer.step()
                _label(trainee, tracker)
                optimizer.zero_grad()
    del trainee, model, optimizer, workspaces
    gc.collect()


def _label(trainee: Trainee, tracker: StorageTracker) -> None:
    tracker.label(_with_scales([*trainee.model.parameters(), *trainee.model.buffers()]), "weights")
    tracker.label(_tensors(trainee.kept_tensors()), "optimizer state")


def _with_scales(params: list[Tensor]) -> list[Tensor]:
    """Return the parameters with what 4-bit ones are decoded by."""
    scales = [getattr(param, "quant_state", None) for param in params]
    return [*params, *(tensor for state in scales if state is not None for tensor in _tensors([vars(state)]))]


def _tensors(values: Any) -> list[Tensor]:
    """Return the tensors in nested values, objects' attributes too."""
    found: list[Tensor] = []
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (dict, list, tuple)):
            found += _tensors(value)
        elif hasattr(value, "__dict__"):
            found += _tensors(vars(value))
    return found
