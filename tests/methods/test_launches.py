"""A step does for many matrices at once what it does: operations, which on a GPU are launches, do not grow with layers.

Counted on the CPU, where an operation of ours is one, whatever it runs inside; views are none.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import families
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lisa_kernels import OWS, FullFineTune, GaLore, attach
from lisa_kernels.methods import Method, SampledAdamW

# Linears of a block of a Llama, and the vectors that train beside them.
LINEARS = 7
# What carrying one more slot's moments into its new basis takes where they are float32, and where they have 8 bits: the
# basis that may come back (2), products and sums (7), the state that may stay (2, or 4 and the codec's 4).
OF_A_TURN, OF_AN_8_BIT_TURN = 11, 17


# Memory without values; and numbers that the host reads, which on a GPU are in its own memory or waits.
NO_LAUNCH = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_local_scalar_dense")


class Operations(TorchDispatchMode):
    """Counts operations by name, but for views and what launches nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = [
            value.alias_info for value in func._schema.returns if value.alias_info and not value.alias_info.is_write
        ]
        if not views and not func._schema.name.startswith(NO_LAUNCH):
            self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def steps_of(method: Method, count: int, layers: int = 2, **sizes: int) -> list[tuple[int, Counter[str]]]:
    """Return of each of some steps how many bases had been refreshed for it, and its operations."""
    model = families.llama(layers=layers, **sizes)
    optimizer = attach(model, method, max_grad_norm=1.0)
    ids = torch.arange(24).view(2, 12)
    found = []
    for _ in range(count):
        model(input_ids=ids, labels=ids).loss.backward()
        turned = [layer for layer in optimizer._active_slots() if layer.tracker and layer.tracker.rotation is not None]
        with Operations() as seen:
            optimizer.step()
        optimizer.zero_grad()
        found.append((len(turned), seen.names))
    return found


def total(names: Counter[str]) -> int:
    return sum(names.values())


def steady(method: Method, layers: int) -> Counter[str]:
    """Return the operations of a step that neither makes state nor refreshes a basis."""
    (_, _), (turned, names) = steps_of(method, 2, layers)
    assert not turned
    return names


def test_layers_trained_in_full_cost_no_operations() -> None:
    assert steady(FullFineTune(), 4) == steady(FullFineTune(), 1)


def test_a_layer_trained_through_slots_costs_a_fold_for_each() -> None:
    """And nothing else: neither keys nor decays, neither zeros nor norms."""
    more = steady(GaLore(rank=4, gap=200), 3) - steady(GaLore(rank=4, gap=200), 1)
    assert dict(more) == {"lisa_kernels::fold_": 2 * LINEARS}


@pytest.mark.parametrize(
    ("sizes", "each"),
    [({}, OF_A_TURN), ({"hidden_size": 256, "intermediate_size": 256, "vocab_size": 256}, OF_AN_8_BIT_TURN)],
    ids=["float32", "8-bit"],
)
def test_a_basis_that_is_refreshed_costs_a_few_operations(sizes: dict[str, int], each: int) -> None:
    """Beside what all that are refreshed in a step cost together."""
    rank = 16 if sizes else 4
    by_turns: dict[int, int] = {}
    for gap in (5, 9):
        for turned, names in steps_of(GaLore(rank=rank, gap=gap), 6, **sizes)[1:]:
            by_turns[turned] = total(names)
    few, *_, many = sorted(turned for turned in by_turns if turned)
    assert many > few
    assert by_turns[many] - by_turns[few] <= each * (many - few)


def test_the_norms_of_all_layers_reach_the_host_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the switch of an adaptive sampler, and at no other step."""
    asked = []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (asked.append(tuple(tensor.shape)), plain(tensor))[1])
    model = families.llama(layers=3)
    optimizer: SampledAdamW = attach(model, OWS(active_layers=3, period=2, scores="gradient-norm"))
    ids = torch.arange(24).view(2, 12)
    for wanted in ([], [(3, 2)], []):
        asked.clear()
        model(input_ids=ids, labels=ids).loss.backward()
        asked.clear()
        optimizer.step()
        optimizer.zero_grad()
        assert asked == wanted
