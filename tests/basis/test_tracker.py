"""A tracker decides when a basis is due, and never lets a bad gradient into it."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import ORTHONORMAL
from torch import Tensor

from lisa_kernels.basis import BasisTracker, refresh_basis, stream_generator

M, N, RANK = 24, 32, 4
BAD = [math.nan, math.inf, -math.inf]
every_bad_value = pytest.mark.parametrize("bad", BAD, ids=["nan", "inf", "minus-inf"])


def tracker(gap: int = 10, offset: int = 0, seed: int = 0, stream: int = 0) -> BasisTracker:
    return BasisTracker(rank=RANK, gap=gap, offset=offset, seed=seed, stream=stream)


def gradient_of(seed: int = 0) -> Tensor:
    return torch.randn(M, N, generator=torch.Generator().manual_seed(seed))


def broken(bad: float) -> Tensor:
    gradient = gradient_of()
    gradient[3, 5] = bad
    return gradient


def started(**settings: int) -> tuple[BasisTracker, Tensor]:
    """Return a tracker with a first basis."""
    new, basis = tracker(**settings), torch.zeros(RANK, N)
    new.update(gradient_of(), basis)
    return new, basis


def due_steps(gap: int, offset: int, steps: int = 40) -> list[int]:
    """Return after which steps a refresh was due, each done at once."""
    found, (followed, basis) = [], started(gap=gap, offset=offset)
    for step in range(1, steps + 1):
        followed.advance()
        if followed.due:
            found.append(step)
            followed.update(gradient_of(step), basis)
    return found


@pytest.mark.parametrize(
    ("gap", "offset", "wanted"),
    [
        (10, 0, [10, 20, 30, 40]),
        (10, 3, [7, 17, 27, 37]),
        (10, 9, [1, 11, 21, 31]),
        (25, 5, [20]),
        (0, 0, []),
        (0, 7, []),
    ],
)
def test_refreshes_are_due_every_gap_shifted_by_the_offset(gap: int, offset: int, wanted: list[int]) -> None:
    assert due_steps(gap, offset) == wanted


def test_a_gap_of_one_refreshes_at_every_step() -> None:
    assert due_steps(1, 0, 5) == [1, 2, 3, 4, 5]


def test_offsets_spread_over_the_gap_never_refresh_two_matrices_at_once() -> None:
    seen = [step for offset in range(0, 10, 2) for step in due_steps(10, offset)]
    assert len(seen) == len(set(seen))


def test_a_new_tracker_is_due_and_its_first_basis_ends_that() -> None:
    new, basis = tracker(), torch.zeros(RANK, N)
    assert new.due
    returned = new.update(gradient_of(), basis)
    assert returned is basis
    assert not new.due
    assert new.has_basis
    assert new.rotation is None
    assert torch.allclose(basis @ basis.t(), torch.eye(RANK), atol=ORTHONORMAL)


def test_a_basis_that_is_not_due_is_left_alone() -> None:
    followed, basis = started()
    before = basis.clone()
    followed.update(gradient_of(1), basis)
    assert torch.equal(basis, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_refresh_leaves_the_rotation_from_the_old_basis_to_the_new(dtype: torch.dtype) -> None:
    new, basis = tracker(gap=1), torch.zeros(RANK, N, dtype=dtype)
    new.update(gradient_of(), basis)
    old = basis.clone()
    new.advance()
    new.update(gradient_of(1), basis)
    assert torch.equal(basis, refresh_basis(gradient_of(1), old).to(dtype))
    assert new.rotation is not None
    assert new.rotation.dtype == torch.float32
    assert torch.equal(new.rotation, basis.float() @ old.float().t())


@every_bad_value
def test_a_gradient_that_is_not_finite_postpones_a_refresh_and_keeps_the_basis(bad: float) -> None:
    followed, basis = started(gap=1)
    before = basis.clone()
    followed.advance()
    followed.update(broken(bad), basis)
    assert torch.equal(basis, before)
    assert followed.due
    assert followed.postponed == 1
    assert followed.rotation is None
    followed.update(gradient_of(1), basis)
    assert not followed.due
    assert not torch.equal(basis, before)


@every_bad_value
def test_before_the_first_basis_a_bad_gradient_gives_random_directions_and_stays_due(bad: float) -> None:
    new, basis = tracker(), torch.zeros(RANK, N)
    new.update(broken(bad), basis)
    assert torch.allclose(basis @ basis.t(), torch.eye(RANK), atol=ORTHONORMAL)
    assert new.due
    assert not new.has_basis
    assert new.postponed == 1
    undisturbed = started()[1]
    new.update(gradient_of(), basis)
    assert torch.equal(basis, undisturbed)
    assert new.rotation is None


@pytest.mark.parametrize("has_basis", [False, True], ids=["first", "refresh"])
def test_a_gradient_of_zeros_says_nothing_and_is_waited_out(has_basis: bool) -> None:
    followed, basis = started(gap=1) if has_basis else (tracker(), torch.zeros(RANK, N))
    before = basis.clone()
    followed.advance()
    followed.update(torch.zeros(M, N), basis)
    assert followed.due
    assert followed.has_basis is has_basis
    assert torch.equal(basis, before) is has_basis
    assert torch.allclose(basis @ basis.t(), torch.eye(RANK), atol=ORTHONORMAL)


def test_a_new_period_forgets_the_basis() -> None:
    followed, _ = started(gap=1)
    followed.rotation = torch.eye(RANK)
    followed.start(7)
    assert (followed.activation, followed.steps, followed.due, followed.has_basis) == (7, 0, True, False)
    assert followed.rotation is None


def test_a_tracker_continues_from_its_state() -> None:
    followed, basis = started(gap=4, offset=1)
    for _ in range(2):
        followed.advance()
    followed.postponed = 3
    other, other_basis = tracker(gap=4, offset=1), basis.clone()
    other.load_state_dict(followed.state_dict())
    assert other.state_dict() == followed.state_dict()
    for step in range(6):
        for one, its_basis in ((followed, basis), (other, other_basis)):
            one.advance()
            one.update(gradient_of(step), its_basis)
        assert torch.equal(basis, other_basis)
        assert other.state_dict() == followed.state_dict()


def test_the_state_survives_json_types() -> None:
    """JSON gives numbers and booleans back; a text format may give 0 and 1."""
    other = tracker()
    other.load_state_dict({"activation": 2, "steps": 3, "due": 0, "has_basis": 1, "postponed": 0})
    assert other.due is False
    assert other.has_basis is True


def first_basis_of(seed: int, stream: int, activation: int) -> Tensor:
    new, basis = tracker(seed=seed, stream=stream), torch.zeros(RANK, N)
    new.start(activation)
    return new.update(torch.full((M, N), math.nan), basis)


def test_random_numbers_are_a_function_of_seed_stream_and_activation() -> None:
    assert torch.equal(first_basis_of(1, 2, 3), first_basis_of(1, 2, 3))
    combinations = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3), (3, 2, 1), (1, 3, 2)]
    bases = [first_basis_of(*numbers) for numbers in combinations]
    for index, one in enumerate(bases):
        assert not any(torch.equal(one, other) for other in bases[:index])


def test_streams_of_a_grid_draw_different_numbers() -> None:
    grid = [(seed, stream, activation) for seed in range(6) for stream in range(12) for activation in range(6)]
    draws = {float(torch.rand((), generator=stream_generator(*numbers), dtype=torch.float64)) for numbers in grid}
    assert len(draws) == len(grid)


def test_global_random_state_is_not_touched() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    started()
    assert torch.equal(torch.rand(3), wanted)
