"""A program: methods train models on a device that does nothing; prints as JSON what raised and where the host waits.

python tests/idle_device/steps.py            # what test_idle_device.py looks at
python tests/idle_device/steps.py --record   # notes the waits of today as those that are allowed
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from idle_device import load  # noqa: E402

load.load()

import families  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

from idle_device.record import write_record  # noqa: E402
from idle_device.waits import IdleMode, lists_in_one_wait  # noqa: E402
from lisa_kernels import LISA, OWS, AdamW8bit, BAdam, FullFineTune, GaLore, LoRAFA, OwLore, attach  # noqa: E402
from lisa_kernels.layers import LossWithoutLogits, SlotModule, embedding  # noqa: E402
from lisa_kernels.methods import outer_slots, sampled_adamw  # noqa: E402

# The current device is cuda:0.
DEVICE = torch.device("cuda:1")
# A first step, a steady one, and one that switches.
PERIOD = 3
# Bases are refreshed at different times: the last matrix's in the third step.
LOW_RANK = {"rank": 8, "gap": 16}
# One step more, so that the third, which refreshes a basis, switches nothing; layers that come find theirs after it.
OWLORE = OwLore(1, PERIOD + 1, **LOW_RANK, scores="uniform")
# Switches at the end of the second step.
SHORT = OwLore(1, 2, **LOW_RANK, scores="uniform")


class Case(NamedTuple):
    """A method and the model that it trains. parts: the devices of embedding, blocks and head, where they differ."""

    method: Any
    model: Callable[[], Any] = lambda: families.llama(layers=2)
    parts: tuple[str, ...] = ()
    steps: int = PERIOD


CASES = {
    "lisa": Case(LISA(1, PERIOD)),
    "lisa low-rank": Case(LISA(1, PERIOD, embeddings="low-rank", rank=8)),
    "ows adaptive": Case(OWS(1, PERIOD, scores="gradient-norm")),
    "owlore": Case(OWLORE, steps=PERIOD + 2),
    "owlore remainder": Case(dataclasses.replace(SHORT, master="remainder"), steps=3),
    "badam": Case(BAdam(PERIOD)),
    "galore": Case(GaLore(**LOW_RANK), lambda: families.llama(layers=1), steps=4),
    "lora-fa": Case(LoRAFA(rank=4), lambda: families.llama(layers=1), steps=2),
    "full": Case(FullFineTune(), lambda: families.llama(layers=1), steps=2),
    "owlore gpt2": Case(SHORT, lambda: families.gpt2(layers=2), steps=3),
    "owlore tied": Case(SHORT, lambda: families.llama(layers=2, tied=True), steps=2),
    "lisa experts": Case(LISA(1, 2), families.llama4, steps=2),
    "owlore on two devices": Case(SHORT, parts=("cuda:0", "cuda:0", "cuda:1", "cuda:1"), steps=2),
    "full tied on two devices": Case(
        FullFineTune(), lambda: families.llama(layers=2, tied=True), ("cuda:0", "cuda:0", "cuda:1", "cuda:0"), steps=2
    ),
}


class Event:
    """Stands for an event that the device has come to."""

    def query(self) -> bool:
        """Return that it has."""
        return True


class Stream:
    """Stands for a device's stream: torch's CPU build has none."""

    def __init__(self, device: Any = None) -> None:
        pass

    def record_event(self) -> Event:
        """Return an event."""
        return Event()


@contextmanager
def stand_ins() -> Iterator[None]:
    """Answer what attaching asks of values, which are not there, and for torch.cuda's own objects."""
    replaced = (
        (sampled_adamw, "leave_out_logits", lambda model: LossWithoutLogits(model, model.get_output_embeddings())),
        (embedding, "lookup_factor", lambda module: 1.0),
        (outer_slots, "lookup_factor", lambda module: 1.0),
        (torch.cuda, "current_stream", Stream),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
    )
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(lists_in_one_wait())
        yield


def make_model(case: Case) -> Any:
    """Return the case's model in bfloat16, on the second device or split over two."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with DEVICE:
            model = case.model()
    finally:
        torch.set_default_dtype(default)
    model.config.use_cache = False
    return split(model, case.parts) if case.parts else model


def split(model: Any, parts: tuple[str, ...]) -> Any:
    """Put embedding, blocks and head on devices, and have each take what it is given to its own."""
    first, *blocks, last = parts
    named = {f"model.layers.{number}": device for number, device in enumerate(blocks)}
    named |= {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": blocks[-1], "lm_head": last}
    tied = model.config.tie_word_embeddings
    for path, device in named.items():
        root = model.get_submodule(path)
        for module in root.modules():
            for name, param in list(module.named_parameters(recurse=False)):
                module._parameters[name] = nn.Parameter(param.to(device))
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = buffer.to(device)
        root.register_forward_pre_hook(partial(bring, device), with_kwargs=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def bring(device: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Return what a module is called with, on its device."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), (args, kwargs))


def run(case: Case) -> dict[str, Counter[str]]:
    """Attach, train over a refresh and a switch, and detach; returns the waits by kind of step, of each the most."""
    mode = IdleMode()
    with mode, stand_ins():
        model = make_model(case)
        homes = {name: param.device for name, param in model.named_parameters()}
        optimizer = attach(model, case.method, max_grad_norm=1.0)
        waits: dict[str, Counter[str]] = {}
        fresh = True
        for _ in range(case.steps):
            due = any(module.capturing for module in model.modules() if isinstance(module, SlotModule))
            periods = len(optimizer.history)
            mode.own.clear()
            step(model, optimizer)
            switched = len(optimizer.history) > periods
            kind = "switch" if switched else "first" if fresh else "refresh" if due else "steady"
            waits[kind] = waits.get(kind, Counter()) | mode.own
            fresh = switched
        check_devices(optimizer)
        optimizer.detach()
        if homes != {name: param.device for name, param in model.named_parameters()}:
            raise AssertionError("parameters have moved to another device.")
    return waits


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take one step on a batch whose every token is a label."""
    ids = torch.ones(2, 12, dtype=torch.int64, device=next(model.parameters()).device)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def check_devices(optimizer: torch.optim.Optimizer) -> None:
    """Raise where a state is not on its parameter's device."""
    for param, state in optimizer.state.items():
        for name, tensor in state.items():
            if tensor.device != param.device:
                raise AssertionError(f"{name} of a parameter on {param.device} is on {tensor.device}.")


def outcome(case: Case) -> dict[str, Any]:
    """Run a case; returns its waits, or what it raised."""
    start = time.process_time()
    try:
        found: dict[str, Any] = {"waits": run(case)}
    except Exception as error:  # what it was is what the test wants to know
        found = {"raised": f"{type(error).__name__}: {error}"}
    return {**found, "seconds": time.process_time() - start}


def controls() -> dict[str, dict[str, Any]]:
    """Run a case with each of three faults put in."""
    begin, eye = AdamW8bit._begin_step, torch.eye

    def asks(optimizer: AdamW8bit, gradients: Any) -> Any:
        scale = begin(optimizer, gradients)
        float(scale)
        return scale

    def forgets(*size: int, device: Any = None, **others: Any) -> Any:
        return eye(*size, **others)

    faults = {
        "a hidden float()": (2, AdamW8bit, "_begin_step", asks),
        "a forgotten device": (1, torch, "eye", forgets),
        "memory that is not locked": (1, torch.Tensor, "pin_memory", lambda tensor: tensor),
    }
    found = {}
    for name, (steps, *fault) in faults.items():
        with mock.patch.object(*fault):
            found[name] = outcome(Case(OWLORE, steps=steps))
    return found


def main() -> None:
    """Run all and print it."""
    warnings.filterwarnings("ignore")
    cases = {name: outcome(case) for name, case in CASES.items()}
    if "--record" in sys.argv:
        write_record(cases)
    print(json.dumps({"cases": cases, "controls": controls(), "seconds": time.process_time()}))


if __name__ == "__main__":
    main()
