"""The memory of training a flow model in groups, known before: its real steps, on tensors without storage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lisa_kernels.errors import InputError
from lisa_kernels.flow import ExpertsAdamW, TimestepExperts
from lisa_kernels.methods.survey import survey_model
from lisa_kernels.methods.units import make_layout
from lisa_kernels.paging.host import HostStore
from lisa_kernels.plan.gpu_memory import GpuMemory
from lisa_kernels.plan.rehearsal import device_paging, label_held
from lisa_kernels.plan.result import Plan
from lisa_kernels.plan.stand_ins import EmptyOperations, FusedAttention
from lisa_kernels.plan.trace import Trace
from lisa_kernels.plan.tracker import StorageTracker

# Of several micro-batches the second adds to the gradients that the first one made, and all others do as the second.
MICRO_BATCHES = 2


@dataclass(frozen=True)
class FlowWorkload:
    """Everything but model and loss that decides the bytes of a run; model: what it is called."""

    model: str
    method: TimestepExperts
    batch_size: int = 1
    accumulate: int = 1
    max_grad_norm: float | None = 1.0
    block_size: int = 256
    paging: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without the model."""
        for name in ("batch_size", "accumulate"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} is {value!r}; a whole number of at least 1 is wanted.")


def plan_flow(
    model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], workload: FlowWorkload, blocks: str | None = None,
    on_gpu: bool = True,
) -> Plan:  # fmt: skip
    """Rehearse training a flow model with two turns of each group, and return what it takes.

    model: on torch's meta device (`with torch.device("meta")`), in training mode. loss: given the model and times
    [batch] there, returns the loss of a micro-batch. Pages are counted where the device has them, and homes are not.
    on_gpu: with what a GPU holds beside tensors, which a CPU does not.
    Raises InputError for a model with values, and for what `attach` refuses.
    """
    if not all(param.is_meta for param in model.parameters()):
        raise InputError('the model has values; a plan wants one without: make it in `with torch.device("meta"):`.')
    gpu, tracker = None, StorageTracker("meta", EmptyOperations(0))
    if on_gpu:
        gpu = GpuMemory.here()
        tracker = StorageTracker("meta", EmptyOperations(0), gpu.inside, gpu.definitions)
    return Plan(workload, rehearse_flow(model, loss, workload, blocks, tracker, gpu))


def rehearse_flow(
    model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], workload: FlowWorkload, blocks: str | None,
    tracker: StorageTracker, gpu: GpuMemory | None = None,
) -> Trace:  # fmt: skip
    """Take the steps and return their storages."""
    # A group's first turn makes its moments, its second has them come back; more steps of one turn take as much.
    method = replace(workload.method, period=2 if workload.method.retired_state == "drop" else 1)
    with FusedAttention(), tracker:
        layout = make_layout(survey_model(model, method, blocks))
        optimizer = ExpertsAdamW(
            model, method, layout, method.make_sampler(len(layout.drawable), 0, None), lr=1e-4, weight_decay=1e-2,
            block_size=workload.block_size, max_grad_norm=workload.max_grad_norm,
            paging=device_paging(workload.paging),
        )  # fmt: skip
        tracker.recording = True
        store = optimizer.store
        if isinstance(store, HostStore):
            store.watchers.append(lambda slab: tracker.label([slab], "pages"))
        with tracker.phase("attach"):
            label_held(model, optimizer, tracker)
        workspaces = [] if gpu is None else [gpu.workspace(), gpu.workspace()]
        with tracker.following(model):
            for number in range(1, 2 * method.groups * method.period + 1):
                for _ in range(min(workload.accumulate, MICRO_BATCHES)):
                    _micro_batch(model, optimizer, loss, workload, tracker, f"step {number}")
                with tracker.phase(f"step {number}: step"):
                    optimizer.step()
                    label_held(model, optimizer, tracker)
                    optimizer.zero_grad()
        del workspaces
    return tracker.trace()


def _micro_batch(
    model: nn.Module, optimizer: ExpertsAdamW, loss: Callable[[nn.Module, Tensor], Tensor], workload: FlowWorkload,
    tracker: StorageTracker, step: str,
) -> None:  # fmt: skip
    with tracker.phase(f"{step}: forward", "forward"):
        value = loss(model, optimizer.times(workload.batch_size)) / workload.accumulate
    tracker.label_saved()
    with tracker.phase(f"{step}: backward", "backward"):
        value.backward()
        del value
    tracker.label((param.grad for param in model.parameters()), "gradients")
