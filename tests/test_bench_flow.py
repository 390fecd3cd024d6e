"""The experiment on layers as experts: what its arms are, a row of a real run, what is run again, and its tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import flow, rows
from bench.flow_arms import ARMS, Arm, Size
from bench.flow_measures import (
    Judge,
    frechet,
    kernel_distance,
    layers_per_evaluation,
    load_pictures,
    losses_by_time,
    nearest,
    seams,
)
from bench.flow_memory import RUNS, planned
from bench.flow_table import REAL, TABLES, differences_table, flow_table, report, rows_of, seams_table
from bench.readme import README as PAGE
from lisa_kernels.flow.begin import copy_groups

SIZE = Size(dense_steps=3, batch=8, hidden=16, heads=2)
BY_NAME = {arm.name: arm for arm in ARMS}
EXPERTS = BY_NAME["C 3 groups"]


def test_budgets_are_equal_in_steps_or_in_layer_passes() -> None:
    """Whatever an arm's layers are, it passes through as many as the dense model of all layers."""
    for arm in ARMS:
        budgets = arm.budgets(400)
        assert budgets.get("steps", 400) == 400
        assert budgets["passes"] * arm.layers_run == 400 * 12


def test_a_control_trains_every_group_on_all_times() -> None:
    """And is routed as the experts are."""
    control = BY_NAME["F 4 groups, each on all t"].method().intervals()
    assert control.bounds == BY_NAME["C 4 groups"].method().intervals().bounds
    assert {control.training_interval(group) for group in range(4)} == {(0.0, 1.0)}


@pytest.mark.slow
def test_one_run_gives_a_row_for_each_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the quality of the averages at that step; the same numbers again."""
    monkeypatch.setattr("bench.flow_measures.PER_CLASS", 2)
    train, held_out = load_pictures("digits")
    judge = Judge(train)
    found = [list(flow.run(EXPERTS, SIZE, 0, train, held_out, judge)) for _ in range(2)]
    assert [(row["budgets"], row["steps"], row["layer_passes"]) for row in found[0]] == [
        (["steps"], 3, 12), (["passes"], 9, 36),
    ]  # fmt: skip
    assert len(found[0][0]["seams"]) == 2
    for one, other in zip(*found):
        assert {**one, "training_cpu_seconds": 0} == {**other, "training_cpu_seconds": 0}


def test_copies_of_one_go_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds of the steps are a dense model's; what all groups begin with is its average."""
    train, _ = load_pictures("digits")
    begun: list[Any] = []
    monkeypatch.setattr(flow, "copy_groups", lambda model, source: begun.append(source) or copy_groups(model, source))
    found = list(flow.trained(BY_NAME["G 3 groups, copies of one after 2/3"], SIZE, 0, train))
    assert [(steps, ended) for _, steps, ended, _ in found] == [(9, ["passes"])]
    *_, (dense, _, _, _) = flow._trained(EXPERTS.dense(), SIZE, 0, flow.batches(train, SIZE, 0), {"all": 6})
    for name, weight in dense.state_dict().items():
        assert torch.equal(weight, begun[0].state_dict()[name])


def test_samples_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each arm that is shown, and real digits."""
    monkeypatch.setattr("bench.flow_measures.PER_CLASS", 2)
    monkeypatch.setattr(flow, "SHOWN", ("C 3 groups",))
    flow.plot(SIZE, tmp_path / "digits.png")
    assert (tmp_path / "digits.png").stat().st_size > 1_000


def test_rows_that_exist_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped between its rows adds the one that is missing."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.setattr(flow, "ARMS", [EXPERTS])
    monkeypatch.setattr(flow, "cost", lambda arm, *_: {"arm": arm.name, "cost": True})
    monkeypatch.setattr(flow, "Judge", lambda *_: None)
    monkeypatch.setattr(flow, "real_quality", lambda *_: {})
    asked: list[str] = []

    def run(arm: Arm, size: Size, seed: int, *_: Any) -> Any:
        asked.append(f"{arm.name}, {seed}")
        for name, steps in arm.budgets(size.dense_steps).items():
            yield {"arm": arm.name, "seed": seed, "budgets": [name], "steps": steps, "layer_passes": steps * 4}

    monkeypatch.setattr(flow, "run", run)
    flow.measure(SIZE, (0,))
    kept = (tmp_path / "flow.jsonl").read_text().splitlines()
    assert len(kept) == 4
    flow.measure(SIZE, (0,))
    assert asked == ["C 3 groups, 0"]
    (tmp_path / "flow.jsonl").write_text("\n".join(kept[:-1]) + "\n")
    flow.measure(SIZE, (0,))
    assert asked == ["C 3 groups, 0"] * 2
    assert len((tmp_path / "flow.jsonl").read_text().splitlines()) == 4


def test_an_evaluation_runs_a_groups_layers_only() -> None:
    """Counted by hooks: exactly M of 12 layers."""
    for name, layers in (("C 3 groups", 4), ("C 4 groups", 3), ("B dense, 4 layers", 4), ("A dense, 12 layers", 12)):
        assert layers_per_evaluation(BY_NAME[name].model(SIZE), torch.arange(4)) == layers


def test_what_a_step_holds_is_counted() -> None:
    """A third of what the dense model of all layers holds, and what is shared."""
    train, _ = load_pictures("digits")
    size = Size(batch=8)
    found = []
    for name in ("A dense, 12 layers", "C 3 groups"):
        model, optimizer = flow.start(BY_NAME[name], size, 0, retired_state="page")
        pixels, labels, noise = next(flow.batches(train, size, 0))

        def loss(model: Any = model, optimizer: Any = optimizer, batch: Any = (pixels, labels, noise)) -> Any:
            return flow.flow_loss(model, batch[0], optimizer.times(8), batch[1], batch[2])

        found.append(flow.training_bytes(model, optimizer, loss))
    dense, experts = found
    for part in dense:
        assert dense[part] / 3 < experts[part] < 0.4 * dense[part], part


def test_distances_are_those_of_their_definitions() -> None:
    """Of two normal distributions with known means and variances, and of an image that is in training."""
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    other = 2 * torch.randn(20_000, 3, generator=generator, dtype=torch.float64) + 1
    assert frechet(one, other) == pytest.approx(3 * 1 + 3 * (1 - 2) ** 2, rel=0.03)
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)
    # By hand: k(a, b) = (a b + 1)³ of {0, 1} and {1, 2}.
    points = [torch.tensor(each, dtype=torch.float64)[:, None] for each in ([0.0, 1.0], [1.0, 2.0])]
    assert kernel_distance(*points) == pytest.approx(1 + 27 - 2 * (1 + 1 + 8 + 27) / 4)
    train, held_out = load_pictures("digits")
    assert nearest(train.pixels[:50], train.pixels) == pytest.approx(0, abs=2e-2)
    assert nearest(held_out.pixels, train.pixels) > 1


def test_groups_of_equal_weights_have_no_seam() -> None:
    """And groups of other weights do; losses are of velocities, 1 + the data's power for a model that says nothing."""
    torch.manual_seed(0)
    model = EXPERTS.model(SIZE).eval()
    _, held_out = load_pictures("digits")
    # The head is zero until it has trained.
    silent = losses_by_time(model, held_out)
    power = 1 + float(held_out.pixels.square().mean())
    assert silent == pytest.approx([power] * 12, rel=0.02)
    torch.nn.init.normal_(model.head.linear.weight)
    assert all(seam > 0 for seam in seams(model, held_out))
    for number, block in enumerate(model.blocks):
        block.load_state_dict(model.blocks[number % 4].state_dict())
    assert seams(model, held_out) == [0.0, 0.0]


def row(arm: str, seed: int, loss: float, budgets: list[str]) -> dict[str, Any]:
    """Return a row as a run writes it."""
    return {
        "arm": arm, "seed": seed, "loss": loss, "budgets": budgets, "accuracy": 0.5, "frechet": 4.0, "nearest": 3.0,
        "losses": [loss] * 12, "seams": [0.25, 0.5],
    }  # fmt: skip


def test_the_table_shows_means_and_deviations_of_seeds() -> None:
    """Of the newest row of each; what is missing is a dash."""
    found = [
        row("C 3 groups", 0, 9.0, ["passes"]), row("C 3 groups", 0, 0.5, ["passes"]),
        row("C 3 groups", 1, 0.7, ["passes"]),
        {"arm": REAL["digits"], "accuracy": 0.98, "frechet": 1.6, "nearest": 2.1},
    ]  # fmt: skip
    assert [each["loss"] for each in rows_of(found, EXPERTS, "passes")] == [0.5, 0.7]
    lines = flow_table(found).splitlines()
    assert lines[2].startswith("| C 3 groups | - | 0.600 ± 0.141 | 0.500 ± 0.000 | 4.00 ± 0.00 | - | 3.00 ± 0.00 |")
    assert lines[3].startswith(f"| {REAL['digits']} | - | - | 0.980 | 1.60 | - | 2.10 |")
    assert "| 0.25 ± 0.00 | 0.50 ± 0.00 | - |" in seams_table(found)


def test_differences_are_taken_seed_by_seed() -> None:
    """So that what a seed does to both is not in them."""
    found = [row("C 3 groups", seed, 0.5 + seed, ["passes"]) for seed in range(3)]
    found += [row("F 3 groups, each on all t", seed, 0.75 + seed, ["passes"]) for seed in (0, 2)]
    lines = differences_table(found).splitlines()
    assert lines[2:] == ["| C 3 groups | F 3 groups, each on all t | - | -0.250 ± 0.000 | 0.00 ± 0.00 |"]


def test_the_plan_of_the_published_size_meets_its_bounds() -> None:
    """Gradients, moments and activations of four groups are at most 0.27 of the dense twin's."""
    dense, experts = (
        planned(**RUNS[name]) for name in ("dense, all layers together", "4 groups in turn, moments paged")
    )
    held = [plan.peak_bytes - plan.split["weights"] for plan in (dense, experts)]
    assert held[1] <= 0.27 * held[0]


@pytest.mark.parametrize("name", TABLES)
def test_the_page_shows_the_recorded_rows(name: str, tmp_path: Path) -> None:
    """Writing a table anew changes nothing: no figure was typed, and none is older than its row."""
    page = tmp_path / "README.md"
    page.write_text(PAGE.read_text())
    report([name], page)
    assert page.read_text() == PAGE.read_text()
    assert f"<!-- {name} table: written by bench -->" in page.read_text()
