"""The CPU that a plan is made on, as a machine whose speed is measured: each operation of a step, with real tensors."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lisa_kernels.methods import FullFineTune
from lisa_kernels.ops.lowrank_linear.products import matmul
from lisa_kernels.plan.machines import Seconds
from lisa_kernels.plan.rehearsal import Workload, empty_batch, prepare, rehearse
from lisa_kernels.plan.work import Operation, WorkLog

MOST_SECONDS, LEAST_REPEATS, MOST_REPEATS = 0.05, 4, 50
# Products of more are measured on fewer rows, and what moves more by the rate of a copy.
MOST_PRODUCTS, LEAST_ROWS = 4e9, 16
MOST_BYTES, COPY_BYTES = 1 << 30, 256 << 20
# What repeated runs of one step lie apart on a machine that does nothing else.
UNCERTAINTY = 0.1
# A model whose steps are all overhead.
SMALL = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
ROUNDS = 15


class ThisCpu:
    """Measures what it is asked, once for each function and shapes.

    clock: seconds that only grow; the process's own where others share the machine.
    """

    name = "this CPU"
    is_cpu = True

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._known: dict[Any, float] = {}
        self._overhead = self._measure_overhead()

    def seconds(self, operation: Operation) -> tuple[Seconds, str]:
        """Return what the operation takes here."""
        taken = self._alone(operation) + self._overhead
        bound = "matrices" if operation.products else "bandwidth"
        if taken < 2 * self._overhead:
            bound = "launches"
        return Seconds(taken * (1 - UNCERTAINTY), taken * (1 + UNCERTAINTY)), bound

    @staticmethod
    def host_seconds(launches: int) -> Seconds:
        """Return nothing: host and device are one, and each operation counts its start."""
        return Seconds(0.0, 0.0)

    def copy_seconds(self, nbytes: float) -> Seconds:
        """Return what a copy from memory to memory takes here."""
        taken = 2 * nbytes / self._bytes_per_second if nbytes else 0.0
        return Seconds(taken * (1 - UNCERTAINTY), taken * (1 + UNCERTAINTY))

    def _alone(self, operation: Operation) -> float:
        if operation.key not in self._known:
            self._known[operation.key] = self._measure(operation)
        return self._known[operation.key]

    def _measure(self, operation: Operation) -> float:
        func, args, kwargs = operation.example
        if operation.bytes > MOST_BYTES and not operation.products:
            return operation.bytes / self._bytes_per_second
        share, (left, right) = 1.0, _product_of(func, args)
        with torch.no_grad():
            if left is not None and right is not None:
                rows = left.shape[0]
                fewer = max(LEAST_ROWS, int(rows * MOST_PRODUCTS / max(1, operation.products)))
                share = min(rows, fewer) / rows
                a, b = _real(left[: min(rows, fewer)]), _real(right)
                return self._median(lambda: matmul(a, b)) / share
            real_args, real_kwargs = _real(args), _real(kwargs)
            return self._median(lambda: func(*real_args, **real_kwargs))

    def _median(self, call: Callable[[], object]) -> float:
        taken: list[float] = []
        begin_of_all = self._clock()
        while len(taken) < LEAST_REPEATS or (len(taken) < MOST_REPEATS and self._clock() - begin_of_all < MOST_SECONDS):
            begin = self._clock()
            result = call()
            taken.append(self._clock() - begin)
            del result
        # The first one finds nothing in the caches.
        return statistics.median(taken[1:])

    @cached_property
    def _bytes_per_second(self) -> float:
        """The rate of a copy too large for any cache, bytes read and written."""
        source, target = (torch.zeros(COPY_BYTES // 4) for _ in range(2))
        return 2 * COPY_BYTES / self._median(lambda: target.copy_(source))

    def _measure_overhead(self) -> float:
        """Return what an operation of a model costs beyond what it takes by itself: Python, modules, autograd.

        A model so small that there is little else takes steps, and its operations are measured one by one.
        """
        from transformers import AutoModelForCausalLM, LlamaConfig

        config = LlamaConfig(**SMALL)
        workload = Workload(config, FullFineTune(), dtype="fp32", seq_len=8, gradient_checkpointing=False)
        work = WorkLog()
        rehearse(workload, work=work)
        parts = work.of_phases(lambda phase: phase.startswith("step 2:"))
        counts = sum(parts.values(), Counter[Any]())
        operations = ((work.operations[key], count) for key, count in counts.items())
        alone = sum(self._alone(operation) * count for operation, count in operations if operation is not None)
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config).train()
        optimizer = prepare(model, workload)
        batch = empty_batch(workload, torch.device("cpu"))
        taken = []
        for _ in range(ROUNDS):
            begin = self._clock()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            taken.append(self._clock() - begin)
        return max(0.0, statistics.median(taken) - alone) / counts.total()


def _product_of(func: Any, args: tuple[Any, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Return the two matrices of a plain product [rows, k] @ [k, n]; None and None of any other operation."""
    aten = torch.ops.aten
    if func.overloadpacket in (aten.mm, aten.matmul) and args[0].dim() == args[1].dim() == 2:
        return args[0], args[1]
    if func.overloadpacket is aten.addmm:
        return args[1], args[2]
    if func.overloadpacket is aten.linear and args[0].dim() == 2:
        return args[0], args[1].t()
    return None, None


def _real(value: Any) -> Any:
    """Return an argument with real tensors of zeros, or of small numbers where they are multiplied, for empty ones."""
    if isinstance(value, Tensor):
        if not value.is_meta:
            return value
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
        return made.fill_(0.01) if value.is_floating_point() else made.zero_()
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, (tuple, list)):
        return type(value)(_real(item) for item in value)
    if isinstance(value, dict):
        return {name: _real(item) for name, item in value.items()}
    return value
