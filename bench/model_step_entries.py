"""Who takes part where a given model's steps are measured, and the workload that all of them share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from bench.memory_runs import PEERS, Peer, measured, measured_peer, planned_peer
from bench.step_cases import Case
from bench.step_clock import PartsClock
from bench.step_contestants import CONTESTANTS, PERIOD, Trainee
from lisa_kernels import LISA, BAdam, FullFineTune, GaLore, LoRA, LoRAFA, OwLore
from lisa_kernels.errors import unknown_name
from lisa_kernels.layers import checkpoint_blocks
from lisa_kernels.methods import Method
from lisa_kernels.plan.gpu_memory import GpuMemory
from lisa_kernels.plan.rehearsal import Workload, prepare, rehearse
from lisa_kernels.plan.trace import Trace
from lisa_kernels.plan.work import WorkLog

LORA, FULL = "peft-lora", "torch-full"
# galore-torch decomposes every matrix in its first step: seconds for one of 4096 × 11008 on an A100, and the most that
# all of them together may take here.
SVD_SECONDS, SVD_SIZE, MOST_SVD_SECONDS = 2.4, 4096 * 4096 * 11008, 60.0


def ours(case: Case) -> dict[str, Method]:
    """Return our methods by the names that they have in the benchmark."""
    active = min(case.active_layers, case.layers)
    owlore = OwLore(active, PERIOD, rank=case.rank, scores="uniform")
    return {
        "lora": LoRA(rank=case.lora_rank, embeddings="low-rank"),
        "owlore-frozen": dataclasses.replace(owlore, embeddings="frozen", design="shallow"),
        "owlore-low-rank": dataclasses.replace(owlore, embeddings="low-rank"),
        "owlore-always": dataclasses.replace(owlore, embeddings="always"),
        "galore": GaLore(rank=case.galore_rank, embeddings="low-rank"),
        "lisa": LISA(min(2, case.layers)),
        "badam-ours": BAdam(PERIOD),
        "lora-fa": LoRAFA(case.lora_rank, 2.0 * case.lora_rank),
        "full": FullFineTune(),
    }


def _badam_in_the_middle(model: Any, case: Case) -> Trainee:
    """badam on the block in the middle, which is as deep as its draws are on average, and stays there."""
    trainee = CONTESTANTS["badam"].start(model, case, 1)
    optimizer: Any = trainee.optimizer
    optimizer.switch_block_every = 10**9
    optimizer.current_block_idx = (case.layers - 1) // 2
    optimizer.switch_trainable_params()
    return trainee


PEER_STARTS: Mapping[str, Peer] = {
    LORA: PEERS[LORA],
    FULL: PEERS[FULL],
    "badam": Peer(CONTESTANTS["badam"].title, _badam_in_the_middle),
    "galore-torch": PEERS["galore-torch"],
}


@dataclass(frozen=True)
class Entry:
    """One way to train: a method of ours, or a peer; case: the ranks and numbers of layers that all get."""

    name: str
    case: Case
    method: Method | None = None
    peer: Peer | None = None

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.peer.title if self.peer is not None else repr(self.method)

    def unavailable(self, model: nn.Module) -> str | None:
        """Return why it cannot run here, or not within minutes, or None."""
        if self.peer is None:
            return None
        package = CONTESTANTS[self.name].package
        if find_spec(package) is None:
            return f"not installed: pip install {package.replace('_', '-')}"
        if self.name == "galore-torch":
            shapes = (param.shape for param in model.parameters() if param.dim() == 2)
            seconds = sum(m * n * min(m, n) for m, n in shapes) / SVD_SIZE * SVD_SECONDS
            if seconds > MOST_SVD_SECONDS:
                return f"its first step decomposes every matrix: about {seconds:.0f} s on an A100"
        return None

    def asked(self, workload: Workload) -> Workload:
        """Return the workload with the method, where it is one of ours."""
        return workload if self.method is None else dataclasses.replace(workload, method=self.method)

    def planned(self, workload: Workload, gpu: GpuMemory | None, work: WorkLog) -> Trace:
        """Return the storages of its steps by plan, its operations in `work`."""
        if self.peer is not None:
            return planned_peer(self.peer, workload, work, self.case, gpu)
        return rehearse(self.asked(workload), gpu=gpu, work=work)

    def counted(self, workload: Workload, model: Any, device: torch.device, work: WorkLog) -> Trace:
        """Return the storages of the same steps taken for real, its operations in `work`."""
        if self.peer is not None:
            return measured_peer(self.peer, workload, device, model, work, self.case)
        return measured(self.asked(workload), device, model, work)

    def start(self, workload: Workload, model: Any, clock: PartsClock) -> tuple[nn.Module, Optimizer]:
        """Return the model made ready for its steps, and its optimizer; blocks tell the clock when they recompute."""
        if workload.gradient_checkpointing:
            checkpoint_blocks(model, workload.checkpointed_blocks, context_fn=clock.contexts)
        if self.peer is not None:
            trainee = self.peer.start(model, self.case)
            return trainee.model, trainee.optimizer
        # Blocks are told already.
        told = dataclasses.replace(self.asked(workload), gradient_checkpointing=False, checkpointed_blocks=None)
        return model, prepare(model, told, mean=True)


def parse_entries(text: str, case: Case) -> list[Entry]:
    """Return those that `text` names: all, ours, peers, or names with commas; InputError for others."""
    methods = ours(case)
    # Ours and LoRA first: time may end.
    names = ["lora", LORA, *(name for name in [*methods, *PEER_STARTS] if name not in ("lora", LORA))]
    groups = {"all": names, "ours": list(methods), "peers": list(PEER_STARTS)}
    wanted: set[str] = set()
    for name in (part.strip() for part in text.split(",")):
        if name not in names and name not in groups:
            raise unknown_name("method", name, [*names, *groups])
        wanted.update(groups.get(name, [name]))
    return [Entry(name, case, methods.get(name), PEER_STARTS.get(name)) for name in names if name in wanted]
