"""Groups that begin as copies of a dense flow: what they compute at first, and flows that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lisa_kernels import InputError
from lisa_kernels.cli import main
from lisa_kernels.flow.begin import begin_from, copy_groups
from lisa_kernels.flow.intervals import Intervals
from lisa_kernels.flow.model_file import Classes, load_model
from lisa_kernels.flow.transformer import FlowShape, FlowTransformer

from .small_run import arguments, summary


def flow(groups: int, layers: int, hidden: int = 32, reuse: str = "before") -> FlowTransformer:
    """Return a flow whose head says something."""
    model = FlowTransformer(FlowShape(1, 8, 8, 3, hidden=hidden, layers=layers, reuse=reuse), Intervals.make(groups))
    torch.nn.init.normal_(model.head.linear.weight)
    return model.eval()


def test_a_run_begins_where_the_dense_one_ended(tmp_path: Path) -> None:
    """Its held-out loss before the first step is the other's last, but for the times at which it is asked."""
    dense, experts = tmp_path / "dense", tmp_path / "experts"
    assert main(arguments(dense, "--groups", "1", "--layers", "2", "--steps", "30", "--lr", "0.01")) == 0
    assert main(arguments(experts, "--begin-from", str(dense))) == 0
    first, last = (summary(dense)[f"eval_loss_{when}"] for when in ("before", "after"))
    assert last < 0.9 * first
    assert summary(experts)["eval_loss_before"] == pytest.approx(last, rel=0.03)


def test_a_resumed_run_needs_the_dense_one_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends as if it had never stopped."""
    from .test_run import stop_after

    dense, whole, stopped = (tmp_path / name for name in ("dense", "whole", "stopped"))
    assert main(arguments(dense, "--groups", "1", "--layers", "2")) == 0
    more = ("--save-every", "3", "--begin-from", str(dense))
    assert main(arguments(whole, *more)) == 0
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(RuntimeError):
            main(arguments(stopped, *more))
    dense.rename(tmp_path / "elsewhere")
    assert main(arguments(stopped, *more, "--resume")) == 0
    assert (stopped / "flow.safetensors").read_bytes() == (whole / "flow.safetensors").read_bytes()


@pytest.mark.parametrize("groups", [1, 3])
def test_every_group_computes_what_its_source_does(groups: int) -> None:
    """At all times, where the source is one group; each at its own, where it has as many."""
    source, model = flow(groups, 2 * groups), flow(3, 6)
    copy_groups(model, source)
    x, t, labels = torch.randn(5, 1, 8, 8), torch.linspace(0, 1, 5), torch.arange(5) % 3
    assert torch.equal(model(x, t, labels), source(x, t, labels))


@pytest.mark.parametrize(
    "source", [flow(1, 3), flow(2, 4), flow(1, 2, hidden=48), flow(1, 2, reuse="none")],
    ids=["deeper", "other groups", "wider", "without residual attention"],
)  # fmt: skip
def test_a_flow_of_other_sizes_is_refused(source: FlowTransformer) -> None:
    """With both sizes in the sentence, and no weight changed."""
    model = flow(3, 6)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(InputError, match=r"3 groups of 2 layers .* begin from one of 1 or 3"):
        copy_groups(model, source)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_flow_of_other_classes_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert main(arguments(output)) == 0
    model, _, _ = load_model(output)
    with pytest.raises(InputError, match="a flow of the same classes"):
        begin_from(model, Classes(("cat", "dog")), output)
