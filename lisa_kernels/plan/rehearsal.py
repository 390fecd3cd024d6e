"""The real steps of a run, taken on tensors without storage, and every storage that they would have had."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lisa_kernels.distributed import GradientReduction, absent_others, check_wire_dtype
from lisa_kernels.errors import InputError, NotRehearsedError
from lisa_kernels.layers import (
    SlotModule,
    attend_by_segments,
    checkpoint_blocks,
    hold_masters,
    offload_checkpoints,
)
from lisa_kernels.methods import Method, SampledAdamW
from lisa_kernels.methods.active_on import on_masters
from lisa_kernels.methods.masters import IN_MEMORY
from lisa_kernels.methods.resting import Rest, check_resting, check_resting_where
from lisa_kernels.methods.survey import survey_model
from lisa_kernels.methods.units import make_layout
from lisa_kernels.paging import check_paging
from lisa_kernels.paging.host import HostStore
from lisa_kernels.plan.data_rows import DataRows, Rows, packed_batch
from lisa_kernels.plan.draws import GivenDraws, draws_of, every_layer, mean_draws
from lisa_kernels.plan.gpu_memory import GpuMemory
from lisa_kernels.plan.host import RehearsedMasters
from lisa_kernels.plan.length import RunLength
from lisa_kernels.plan.moves import Moves
from lisa_kernels.plan.ranks import RehearsedRanks, travel_of
from lisa_kernels.plan.shards import GatheredWeights, share_out_rehearsed
from lisa_kernels.plan.stand_ins import META, Answers, EmptyOperations, FusedAttention
from lisa_kernels.plan.streaming import Turns
from lisa_kernels.plan.trace import Trace
from lisa_kernels.plan.tracker import StorageTracker
from lisa_kernels.plan.work import WorkLog
from lisa_kernels.train.empty_model import empty_model

# Without a sampler: a step that finds bases and makes the state, and one that has both.
STEPS = 2
# Of several micro-batches the second adds to the gradients that the first one made, and all others do as the second.
MICRO_BATCHES = 2


@dataclass(frozen=True)
class Workload:
    """Everything that decides the bytes of a run; numbers of rows and tokens are those of one micro-batch.

    model: as for `load_config` (`preset:NAME`, a directory, the path of a config.json), or a configuration of
    transformers. dtype: "fp32", "bf16" or "fp16". checkpointed_blocks: how many are recomputed where activations are,
    None for all. length: of the run, where its method's period is the published one
    and the run's follows from it; no bytes depend on it. ranks: processes that train one model, all others as this one,
    with gradients in wire_dtype on their way, on devices of several kinds if mixed_cards; shard: each holds a part of
    the weights, and what is said is of rank 0, whose part is the largest. data: rows whose examples share them, None: a
    row is one sequence of seq_len tokens. resting, resting_where, active_on: see `attach`; masters: "host" or, of files
    that are mapped, "files". steps or epochs: of the run, where they are given; no bytes depend on them. Raises
    InputError for values out of range.
    """

    model: Any
    method: Method
    batch_size: int = 1
    seq_len: int = 1024
    accumulate: int = 1
    dtype: str = "bf16"
    gradient_checkpointing: bool = True
    checkpointed_blocks: int | None = None
    offload_activations: bool = False
    max_grad_norm: float | None = 1.0
    block_size: int = 256
    paging: str | None = None
    keep_logits: bool = False
    seed: int = 0
    length: RunLength | None = None
    ranks: int = 1
    wire_dtype: str | None = None
    mixed_cards: bool = False
    shard: bool = False
    data: DataRows | None = None
    resting: str | None = None
    resting_where: str | None = None
    active_on: str | None = None
    masters: str | None = None
    steps: int | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without the model."""
        for name, least in (("batch_size", 1), ("seq_len", 2), ("accumulate", 1), ("ranks", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} is {value!r}; a whole number of at least {least} is wanted.")
        check_wire_dtype(self.wire_dtype)
        check_resting_where(self.resting_where, self.resting)
        if self.shard and self.ranks == 1:
            raise InputError("shard is given for one rank, which has nobody to share the weights with; give ranks too.")
        if not isinstance(self.method, Method):
            raise InputError(f"method is {self.method!r}; an instance such as OwLore(active_layers=5) is wanted.")
        if self.method.around != "language":
            raise InputError(
                f"method {self.method.name!r} trains models that are told a time, and not language models; plan it "
                "with plan_flow of lisa_kernels.plan.flow."
            )

    def rows(self, typical: bool = False) -> Rows:
        """Return the tokens of each example of each row of a micro-batch: the largest, or one of mean size."""
        if self.data is None:
            return ((self.seq_len,),) * self.batch_size
        return self.data.typical(self.batch_size) if typical else self.data.fullest(self.batch_size)

    def steps_between(self) -> int | None:
        """Return the steps between switches; None where no layers are drawn: refreshes are in every step."""
        method = self.method if self.length is None else self.length.applied_to(self.method)
        period: int | None = method.get("period", None)
        return period


def rehearse(
    workload: Workload, draws: Sequence[Sequence[int]] | None = None, gpu: GpuMemory | None = None,
    work: WorkLog | None = None, moves: Moves | None = None,
) -> Trace:  # fmt: skip
    """Return the storages of a run's steps; no weights are made, and no operation computes anything.

    Two steps with the layers that cost most, one that finds bases and one that has them, and after a switch one with
    layers in the middle of what a draw may bring; or, with `draws`, one step with each of these lists of layers, as
    many as the method has active. Of several micro-batches two are taken. Bytes are those of a GPU's device memory,
    and `gpu` says what it holds beside tensors; see `StorageTracker` for what no plan sees. `work` is told each
    operation, and layers are then drawn that cost what draws do on average; without it, `moves` is told what crosses
    between host and device. Raises InputError for what the run itself would refuse.
    """
    model = empty_model(workload.model, workload.dtype)
    rows, by_segments = workload.rows(typical=work is not None), keeps_segments(model, workload, gpu)
    # The last token of a row is no label, for nothing follows it; on a GPU nobody asks, and its row stays.
    tokens, ends = sum(map(sum, rows)), sum(map(len, rows))
    operations = EmptyOperations(tokens - (gpu is None) * ends, workload.data is None or by_segments)
    tracker = StorageTracker("meta", operations, watch=work or moves)
    if gpu is not None:
        tracker = StorageTracker("meta", operations, gpu.inside, gpu.definitions, work or moves)
    make_batch = partial(empty_batch, workload, META)
    if workload.data is not None:
        make_batch = partial(packed_batch, rows, by_segments, META)
    try:
        with _others(workload), FusedAttention(), tracker:
            reduction = _reduction(workload, tracker)
            if workload.shard and reduction is not None:
                share_out_rehearsed(model, reduction.ranks.count_sent)  # type: ignore[attr-defined]
            optimizer = prepare(model, workload, draws, mean=work is not None, reduction=reduction)
            if gpu is None:
                hold_masters(model)
                if optimizer.layout.streamed is not None:
                    optimizer.layout.streamed.hold()
            if work is not None and optimizer.layout.streamed is not None:
                work.turns = Turns(optimizer.layout.streamed, lambda: tracker.phase_name)
            if moves is not None:
                moves.event = lambda: tracker.events
                moves.follow_masters(optimizer.layout.copies)
                if optimizer.layout.streamed is not None:
                    moves.follow(optimizer.layout.streamed)
            take_steps(model, optimizer, workload, tracker, make_batch, gpu)
            if work is not None and reduction is not None and isinstance(reduction.ranks, RehearsedRanks):
                repeats = workload.accumulate / min(workload.accumulate, MICRO_BATCHES)
                work.travel = travel_of(reduction.ranks, optimizer, workload.steps_between(), repeats)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise NotRehearsedError(
            f"the steps of a {type(model).__name__} cannot be rehearsed without values ({reason}); run a few of them "
            "and see the peak that is logged."
        ) from error
    return tracker.trace()


def keeps_segments(model: nn.Module, workload: Workload, gpu: GpuMemory | None) -> bool:
    """Have the model attend by the borders of examples where the run's would, and return whether it does."""
    if workload.data is None or (gpu is not None and workload.dtype == "fp32"):
        return False
    return attend_by_segments(model, workload.data.longest, Answers())


def _reduction(workload: Workload, tracker: StorageTracker) -> GradientReduction | None:
    """Return what averages gradients over ranks that are not there; None without others."""
    if workload.ranks == 1:
        return None
    return GradientReduction(
        RehearsedRanks(workload.ranks, lambda: tracker.phase_name, workload.mixed_cards),
        check_wire_dtype(workload.wire_dtype),
    )


def _others(workload: Workload) -> AbstractContextManager[None]:
    return absent_others(workload.ranks) if workload.shard else nullcontext()


def empty_batch(workload: Workload, device: torch.device) -> dict[str, Tensor]:
    """Return a micro-batch of zeros, every token a label of its own."""
    shape = workload.batch_size, workload.seq_len
    return {name: torch.zeros(shape, dtype=torch.int64, device=device) for name in ("input_ids", "labels")}


def prepare(
    model: nn.Module, workload: Workload, draws: Sequence[Sequence[int]] | None = None, mean: bool = False,
    reduction: GradientReduction | None = None,
) -> SampledAdamW:  # fmt: skip
    """Attach the method as `attach` does, with draws of its own in the place of the sampler's: costly ones, or mean."""
    if workload.gradient_checkpointing:
        # Recomputation runs in the backward, where a mode of ours is not at work unless it is entered again.
        checkpoint_blocks(model, workload.checkpointed_blocks, context_fn=lambda: (nullcontext(), FusedAttention()))
        if workload.offload_activations:
            offload_checkpoints(model)
    device = next(model.parameters()).device
    with device:
        resting = check_resting(workload.resting, workload.method, reduction is not None)
        masters = None if workload.masters in (None, IN_MEMORY) else RehearsedMasters()
        where = check_resting_where(workload.resting_where, workload.resting)
        awake = on_masters(workload.active_on, resting, workload.method)
        rest = None if resting is None else Rest(resting, where, awake)
        layout = make_layout(survey_model(model, workload.method), workload.seed, rest, masters)
    method, sampler = workload.method, None
    if method.get("period", None) is not None:
        method = dataclasses.replace(method, period=1)  # type: ignore[call-arg]
        active = method.get("active_layers", 1)
        earlier = every_layer(len(layout.drawn), active) if keeps_all(workload) else []
        draws = draws or (mean_draws(layout, method) if mean else draws_of(layout, active))
        sampler = GivenDraws(len(layout.drawn), [*earlier, *draws], len(earlier))
    return SampledAdamW(
        model, method, layout, sampler, lr=1e-4, weight_decay=1e-2, block_size=workload.block_size, seed=workload.seed,
        max_grad_norm=workload.max_grad_norm, keep_logits=workload.keep_logits, paging=device_paging(workload.paging),
        reduction=reduction,
    )  # fmt: skip


def keeps_all(workload: Workload) -> bool:
    """Return whether the state of layers that left stays on the device."""
    retired = workload.method.get("retired_state", "drop")
    return retired == "keep" or (retired == "page" and workload.paging == "resident")


def device_paging(paging: str | None) -> str | None:
    """Return the store that takes a device's memory as `paging` does, and needs neither files nor a driver.

    Raises InputError for a name that is none.
    """
    check_paging(paging)
    return paging if paging in (None, "resident") else "host"


def take_steps(
    model: nn.Module, optimizer: SampledAdamW, workload: Workload, tracker: StorageTracker,
    make_batch: Callable[[], dict[str, Tensor]], gpu: GpuMemory | None = None,
) -> None:  # fmt: skip
    """Take the steps of a rehearsal with an attached model, whose storages so far are the phase "attach"."""
    tracker.recording = True
    tracker.resized = GatheredWeights(model)
    sampler = optimizer.sampler
    store = optimizer.store
    if isinstance(store, HostStore):
        store.watchers.append(lambda slab: tracker.label([slab], "pages"))
    with tracker.phase("attach"):
        label_held(model, optimizer, tracker)
    if isinstance(sampler, GivenDraws) and sampler.visits:
        with tracker.phase("earlier periods"):
            for _ in range(sampler.visits):
                _leave_state(optimizer)
            label_held(model, optimizer, tracker)
    steps = len(sampler.draws) - sampler.visits if isinstance(sampler, GivenDraws) else STEPS
    # The backward's from the start too: too much, and never too little, where a small run is at its peak before it.
    workspaces = [] if gpu is None else [gpu.workspace(), gpu.workspace()]
    with tracker.following(model):
        for number in range(1, steps + 1):
            micro_batches = min(workload.accumulate, MICRO_BATCHES)
            for batch in range(1, micro_batches + 1):
                with nullcontext() if batch == micro_batches else optimizer.no_sync():
                    micro_batch(model, workload, tracker, make_batch, f"step {number}")
            if isinstance(sampler, GivenDraws):
                sampler.before_switch = partial(_enter_switch, model, optimizer, tracker, f"step {number}: switch")
            with tracker.phase(f"step {number}: step"):
                optimizer.step()
                label_held(model, optimizer, tracker)
                optimizer.zero_grad()
    del workspaces


def micro_batch(
    model: nn.Module, workload: Workload, tracker: StorageTracker, make_batch: Callable[[], dict[str, Tensor]],
    step: str,
) -> None:  # fmt: skip
    with tracker.phase(f"{step}: forward", "forward"):
        loss = model(**make_batch()).loss / workload.accumulate
    tracker.follow_sizes()
    tracker.label_saved()
    with tracker.phase(f"{step}: backward", "backward"):
        torch.autograd.backward(loss)
        del loss
    tracker.follow_sizes()
    tracker.label((param.grad for param in model.parameters()), "gradients")


def _leave_state(optimizer: SampledAdamW) -> None:
    """Take a step with gradients of zero: what a period of the layers now active leaves behind."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.requires_grad:
                param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad()


def _enter_switch(model: nn.Module, optimizer: SampledAdamW, tracker: StorageTracker, phase: str) -> None:
    # The state of layers that leave is known by its name now only.
    label_held(model, optimizer, tracker)
    tracker.enter(phase)


def label_held(model: nn.Module, optimizer: SampledAdamW, tracker: StorageTracker) -> None:
    """Say what the tensors are that model and optimizer hold between steps."""
    layers = [module for module in model.modules() if isinstance(module, SlotModule)]
    slots = [tensor for layer in layers for tensor in (layer.slot, layer.basis, layer.remainder)]
    own = {id(tensor) for tensor in slots}
    held: Iterable[Tensor] = [*model.parameters(), *model.buffers()]
    tracker.label(slots, "bases")
    tracker.label((tensor for tensor in held if id(tensor) not in own), "weights")
    if optimizer.layout.streamed is not None:
        tracker.label(optimizer.layout.streamed.held(), "weights")
    states: list[Any] = [*optimizer.state.values()]
    tracker.label((tensor for state in states for tensor in state.values()), "optimizer state")
    tracker.label(optimizer._counters or (), "optimizer state")
