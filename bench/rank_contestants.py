"""One rank of a run that is measured: our methods, and peers under DDP and FSDP2, on a model made here.

python -m bench.rank_contestants '{"contestant": …}'    # as bench.ranks starts it, with a launcher's environment
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lisa_kernels import LISA, BAdam, GaLore, LoRA, LoRAFA, OwLore, attach
from lisa_kernels.distributed import GradientReduction
from lisa_kernels.methods import FullFineTune, Method, SampledAdamW

# Llama-2-7B: parameters in all, and of linears in the blocks (inputs and outputs of each of its 7, times 32).
PARAMETERS_7B, SIDES_7B = 6_738_415_616, 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))


@dataclass(frozen=True)
class Setting:
    """The model, and the rows of each rank's batches."""

    layers: int = 6
    width: int = 384
    intermediate: int = 1024
    vocabulary: int = 8192
    rows: int = 4
    columns: int = 128
    steps: int = 5

    def model(self, dtype: torch.dtype) -> Any:
        """Return a Llama of these sizes, the same on every rank."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.width // 64, num_key_value_heads=self.width // 64,
            max_position_embeddings=self.columns, use_cache=False,
        )  # fmt: skip
        return LlamaForCausalLM(config).to(dtype)


@dataclass
class Contestant:
    """A model that trains, its optimizer, and what it sends at 7B by formula."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    formula_7b: float | None = None


@dataclass(frozen=True)
class Ours:
    """One of our methods, the dtype of its gradients on their way, and what it sends at 7B by formula."""

    method: Method
    formula_7b: float | None
    wire_dtype: str | None = None

    def __call__(self, setting: Setting) -> Contestant:
        """Return it attached."""
        model = setting.model(torch.bfloat16)
        optimizer = attach(model, self.method, lr=1e-4, wire_dtype=self.wire_dtype)
        return Contestant(model, optimizer, self.formula_7b)


def ddp(setting: Setting) -> Contestant:
    """Return full fine-tuning under DDP."""
    model = nn.parallel.DistributedDataParallel(setting.model(torch.bfloat16), gradient_as_bucket_view=True)
    return Contestant(model, torch.optim.AdamW(model.parameters(), lr=1e-4), 2.0 * PARAMETERS_7B)


def ddp_lora(setting: Setting) -> Contestant:
    """Return peft's LoRA in all linears of the blocks under DDP, its adapters in float32 as peft makes them."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = nn.parallel.DistributedDataParallel(get_peft_model(setting.model(torch.bfloat16), config))
    trained = [param for param in model.parameters() if param.requires_grad]
    return Contestant(model, torch.optim.AdamW(trained, lr=1e-4), 16.0 * SIDES_7B * trained[0].element_size())


def fsdp2(setting: Setting) -> Contestant:
    """Return full fine-tuning under FSDP2, which gathers weights forward and backward and scatters gradients."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = setting.model(torch.bfloat16)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # Embedding, head and norm are gathered once, the blocks twice.
    blocks, others = 32 * 202_383_360, PARAMETERS_7B - 32 * 202_383_360
    share = (dist.get_world_size() - 1) / dist.get_world_size()
    return Contestant(
        model, torch.optim.AdamW(model.parameters(), lr=1e-4), 2.0 * share * (3 * blocks + 2 * others)
    )  # fmt: skip


# As the model here has room for; the figures at 7B are of 5 layers in rank 128.
OWLORE, GALORE = OwLore(active_layers=2, period=50, rank=32, scores="uniform"), GaLore(rank=32, embeddings="low-rank")
CONTESTANTS: dict[str, Callable[[Setting], Contestant]] = {
    "FSDP2, full": fsdp2,
    "DDP, full": ddp,
    "DDP, peft LoRA r = 16": ddp_lora,
    "full": Ours(FullFineTune(), 2.0 * PARAMETERS_7B),
    "LISA (2)": Ours(LISA(active_layers=2), 1334e6),
    "BAdam": Ours(BAdam(), 405e6),
    "LoRA r = 16": Ours(LoRA(rank=16), 160e6),
    "LoRA r = 16, bf16 wire": Ours(LoRA(rank=16), 80e6, "bf16"),
    "LoRA-FA r = 16": Ours(LoRAFA(rank=16), 87e6),
    "GaLore": Ours(GALORE, 183e6),
    "GaLore, bf16 wire": Ours(GALORE, 92e6, "bf16"),
    "OwLore": Ours(OWLORE, 141.6e6),
    "OwLore, bf16 wire": Ours(OWLORE, 70.9e6, "bf16"),
}


class Wire(TorchDispatchMode):
    """Counts what collectives send from each of n ranks, by a ring's share of their tensors: where they begin.

    Python's calls, DDP's and FSDP's all go through these operations. What CPUs tell each other is counted too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation; of a collective note its bytes."""
        name = str(func)
        if name.startswith("c10d."):
            count = dist.get_world_size()
            share = (count - 1) / count
            bytes_in = sum(tensor.nbytes for tensor in _tensors(args))
            if "allreduce" in name:
                self.sent += 2 * share * bytes_in
            elif "broadcast" in name:
                self.sent += bytes_in
            elif "gather" in name or "scatter" in name:
                # Given and made: of both together the larger part is whole.
                self.sent += share * max(tensor_bytes for tensor_bytes in _groups(args))
        return func(*args, **(kwargs or {}))


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for each in values:
            yield from _tensors(each)


def _groups(args: Any) -> list[int]:
    return [sum(tensor.nbytes for tensor in _tensors(each)) for each in args if any(True for _ in _tensors(each))]


@dataclass
class Clock:
    """Seconds that were spent in sums since it was last read."""

    seconds: float = 0.0
    begun: list[float] = field(default_factory=list)


@contextmanager
def timed_sums(clock: Clock) -> Iterator[None]:
    """Have the ranks begin their sums together, and time them."""
    real = GradientReduction.average

    def average(self: GradientReduction) -> None:
        dist.barrier()
        begun = time.perf_counter()
        real(self)
        clock.seconds += time.perf_counter() - begun

    GradientReduction.average = average  # type: ignore[method-assign]
    try:
        yield
    finally:
        GradientReduction.average = real  # type: ignore[method-assign]


def take_step(contestant: Contestant, batch: dict[str, Tensor]) -> None:
    """Go forward, backward and a step."""
    contestant.model(**batch).loss.backward()
    contestant.optimizer.step()
    contestant.optimizer.zero_grad()


def planned_seconds(name: str, setting: Setting) -> tuple[float, float] | None:
    """Return what the plan says a step's gradients take on 1 GbE, of our methods."""
    from lisa_kernels.plan.links import LINKS
    from lisa_kernels.plan.rehearsal import Workload, rehearse
    from lisa_kernels.plan.work import WorkLog

    ours = CONTESTANTS[name]
    if not isinstance(ours, Ours):
        return None
    work = WorkLog()
    workload = Workload(
        setting.model(torch.bfloat16).config, ours.method, batch_size=setting.rows, seq_len=setting.columns, ranks=2,
        wire_dtype=ours.wire_dtype,
    )  # fmt: skip
    rehearse(workload, work=work)
    assert work.travel is not None
    gradients = LINKS[0].seconds(work.travel.gradients, 4 * work.travel.gradient_sums)
    return gradients.low, gradients.high


def measure_one(name: str, setting: Setting) -> dict[str, Any]:
    """Train one contestant for a few steps; returns what it sends and takes in one of them."""
    contestant = CONTESTANTS[name](setting)
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.randint(3, setting.vocabulary, (setting.rows, setting.columns), generator=generator)
    batch = {"input_ids": ids, "labels": ids}
    # The first step finds bases and makes the state; a switch's bases come once in a period, and are not counted here.
    take_step(contestant, batch)
    with Wire() as wire:
        take_step(contestant, batch)
    seconds, cpu, summing, clock = [], [], [], Clock()
    with timed_sums(clock):
        for _ in range(setting.steps):
            dist.barrier()
            begun, used = time.perf_counter(), _cpu_seconds()
            take_step(contestant, batch)
            seconds.append(time.perf_counter() - begun)
            cpu.append(_cpu_seconds() - used)
            summing.append(clock.seconds)
            clock.seconds = 0.0
    if isinstance(contestant.optimizer, SampledAdamW):
        contestant.optimizer.detach()
    return {
        "sent": wire.sent, "formula_7b": contestant.formula_7b, "seconds": seconds, "cpu": cpu, "summing": summing,
        "planned": planned_seconds(name, setting),
    }  # fmt: skip


def main(told: str) -> None:
    """Be one rank of each contestant in turn; rank 0 prints the figures of all as JSON."""
    values = json.loads(told)
    names, setting = values.pop("contestants"), Setting(**values)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = [measure_one(name, setting) for name in names]
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main(sys.argv[1])
