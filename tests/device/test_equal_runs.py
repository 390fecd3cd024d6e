"""Equal runs have equal bits, in whatever order a device adds, also where one of them was killed and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import llama
from torch import Tensor, nn

from device.simulated import Order, set_order
from device.training import METHODS, at_rest, batch
from lisa_kernels import attach
from lisa_kernels.layers import OrderedTables
from lisa_kernels.ops.lowrank_embedding import reference

# In bfloat16 the slots' sums of so few tokens are exact in any order.
RESUMED = {
    "lisa-always": torch.bfloat16, "owlore-low-rank": torch.float32, "owlore-page": torch.bfloat16,
    "badam-sampled": torch.bfloat16, "galore": torch.float32, "full": torch.bfloat16,
    "owlore-resting": torch.bfloat16, "owlore-on-masters": torch.bfloat16, "lisa-resting": torch.bfloat16,
}  # fmt: skip
STEPS, KILLED = 5, 3
# So few tokens that each of them comes often, and is added often.
DISTINCT = 5


def steps(model: Any, opt: Any, numbers: range) -> list[Tensor]:
    """Take steps; returns the loss and all gradients of each: weights, of fewer bits, hide a float's last one."""
    seen = []
    for number in numbers:
        inputs = batch("cuda", number)
        inputs["input_ids"] %= DISTINCT
        loss = model(**inputs).loss
        loss.backward()
        seen += [loss.detach(), *(param.grad for group in opt.param_groups for param in group["params"])]
        opt.step()
        opt.zero_grad()
    return [value.cpu() for value in seen if value is not None]


def attached(method: str) -> tuple[Any, Any]:
    model = llama().to("cuda", RESUMED[method])
    settings: dict[str, Any] = {"calibration": [batch("cuda", 99)], **at_rest(method, "nf4")}
    opt = attach(model, METHODS[method], lr=1e-2, max_grad_norm=1.0, seed=0, **settings)
    return model, opt


def weights_of(opt: Any) -> list[Tensor]:
    return [value.cpu() for value in opt.detach().state_dict().values()]


def whole_run(method: str) -> list[Tensor]:
    model, opt = attached(method)
    return [*steps(model, opt, range(STEPS)), *weights_of(opt)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other)) and len(one) == len(other)


@pytest.mark.parametrize("method", RESUMED)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(method: str, order: Order, tmp_path: Path) -> None:
    """Its work, and what is added by atomics, comes in other orders, and weights and state go through a file."""
    whole = whole_run(method)
    set_order(order, seed=1)
    model, opt = attached(method)
    seen = steps(model, opt, range(KILLED))
    torch.save((model.state_dict(), opt.state_dict()), tmp_path / "saved")
    del model, opt
    weights, state = torch.load(tmp_path / "saved", map_location="cpu", weights_only=False)
    model, opt = attached(method)
    model.load_state_dict(weights)
    opt.load_state_dict(state)
    seen += steps(model, opt, range(KILLED, STEPS))
    assert equal(whole, [*seen, *weights_of(opt)])


@pytest.mark.order("late")
def test_an_addition_by_atomics_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the slot of an embedding that adds its tokens so, as `index_add_` does on a GPU."""
    monkeypatch.setattr(reference, "add_rows_", lambda total, place, rows: total.index_add_(0, place, rows))
    assert not equal(whole_run("owlore-low-rank"), whole_run("owlore-low-rank"))


@pytest.mark.order("late")
def test_tables_that_train_in_full_are_added_up_in_one_order() -> None:
    """Not those that train otherwise, that change rows or gradients, of positions, or on a CPU, whose order is one.

    Those of a model that is moved after it was attached, too.
    """

    class Positions(nn.Embedding):
        def forward(self, mask: Tensor, past: int) -> Tensor:
            raise AssertionError("positions are not looked up by ids alone")

    tables = nn.ModuleList(nn.Embedding(9, 4, **settings) for settings in ({}, {}, {"max_norm": 1.0}, {"sparse": True}))
    tables.append(Positions(9, 4))
    ordered = OrderedTables(tables, [table.weight for table in tables[1:]])
    assert [len(table._forward_hooks) for table in tables] == [0, 1, 0, 0, 0]
    names = []
    for device in ("cpu", "cuda"):
        looked_up = tables.to(device)[1](torch.arange(3, device=device))
        names.append(type(looked_up.grad_fn).__name__)
    assert names == ["EmbeddingBackward0", "_OrderedEmbeddingBackward"]
    ordered.remove()
    assert not any(table._forward_hooks for table in tables)
