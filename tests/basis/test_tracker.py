"""A tracker decides when a basis is due, and never lets a bad gradient into it."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from tolerances import ORTHONORMAL
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lisa_kernels.basis import BasisTracker, RandomRows, refresh_basis

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


def due_again(**settings: int) -> tuple[BasisTracker, Tensor]:
    """Return a tracker whose second basis is due."""
    followed, basis = started(gap=1, **settings)
    followed.advance()
    assert followed.due
    return followed, basis


def is_orthonormal(basis: Tensor, tolerance: float = ORTHONORMAL) -> bool:
    return torch.allclose(basis.float() @ basis.float().t(), torch.eye(RANK), rtol=0, atol=tolerance)


def due_steps(gap: int, offset: int, steps: int = 40, bad: float = math.nan) -> list[int]:
    """Return after which steps a refresh was due, each done at once, of gradients of which a number is `bad`."""
    found, followed, basis = [], tracker(gap=gap, offset=offset), torch.zeros(RANK, N)
    followed.update(broken(bad), basis)
    for step in range(1, steps + 1):
        followed.advance()
        if followed.due:
            found.append(step)
            followed.update(broken(bad), basis)
    return found


@pytest.mark.parametrize(
    ("gap", "offset", "wanted"),
    [
        (10, 0, [1, 8, 10, 20, 30, 40]),
        (10, 3, [3, 7, 17, 27, 37]),
        (25, 5, [2, 19, 20]),
        (2, 0, [1, *range(2, 41, 2)]),
        (0, 0, []),
        (0, 7, []),
    ],
)
def test_refreshes_are_due_every_gap_and_once_between_powers_of_8_before_it(
    gap: int, offset: int, wanted: list[int]
) -> None:
    """Until a gradient has had a say, which none here has."""
    assert due_steps(gap, offset) == wanted


def test_after_a_good_gradient_only_the_gap_counts() -> None:
    assert due_steps(10, 3, bad=1.0) == [7, 17, 27, 37]


def test_a_good_gradient_that_follows_a_bad_one_ends_the_early_refreshes() -> None:
    """Due at step 1, where it is found, and not at step 8."""
    followed, basis = tracker(gap=100), torch.zeros(RANK, N)
    followed.update(broken(math.nan), basis)
    found = []
    for step in range(1, 20):
        followed.advance()
        if followed.due:
            found.append(step)
            followed.update(gradient_of(step), basis)
    assert found == [1]


def test_early_refreshes_are_spread_too() -> None:
    """Over as many steps as they have time for: seven for the first, seven times as many for the second."""
    steps = [due_steps(1600, offset, 63) for offset in range(0, 1600, 100)]
    counts = [sum(step in due for due in steps) for step in range(1, 64)]
    assert sum(counts[:7]) == sum(counts[7:]) == len(steps)
    assert max(counts[:7]) == 3
    assert max(counts[7:]) == 1


def test_early_refreshes_can_be_left_out() -> None:
    followed, _ = started(gap=10)
    followed.early = False
    found = []
    for step in range(1, 31):
        followed.advance()
        if followed.due:
            found.append(step)
            followed.due = False
    assert found == [10, 20, 30]


def test_a_gap_of_one_refreshes_at_every_step() -> None:
    assert due_steps(1, 0, 5) == [1, 2, 3, 4, 5]


def test_offsets_spread_over_the_gap_never_refresh_two_matrices_at_once() -> None:
    """Once the early refreshes are over, as late as the gap."""
    seen = [step for offset in range(0, 10, 2) for step in due_steps(10, offset) if step > 10]
    assert seen
    assert len(seen) == len(set(seen))


def test_a_new_tracker_is_due_and_its_first_basis_ends_that() -> None:
    new, basis = tracker(), torch.zeros(RANK, N)
    assert new.due
    returned = new.update(gradient_of(), basis)
    assert returned is basis
    assert not new.due
    assert new.has_basis
    assert new.rotation is None
    assert is_orthonormal(basis)


def test_a_basis_that_is_not_due_is_left_alone() -> None:
    followed, basis = started()
    before = basis.clone()
    followed.update(gradient_of(1), basis)
    assert torch.equal(basis, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_refresh_leaves_the_rotation_from_the_old_basis_to_the_new(dtype: torch.dtype) -> None:
    new, basis = tracker(gap=1, seed=3, stream=5), torch.zeros(RANK, N, dtype=dtype)
    new.start(activation=7)
    new.update(gradient_of(), basis)
    old = basis.clone()
    new.advance()
    new.update(gradient_of(1), basis)
    assert torch.equal(basis, refresh_basis(gradient_of(1), old, RandomRows(3, 5, 8)).to(dtype))
    assert new.rotation is not None
    assert new.rotation.dtype == torch.float32
    assert torch.equal(new.rotation, basis.float() @ old.float().t())
    assert new.remade == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_give_what_the_gradient_gives(dtype: torch.dtype) -> None:
    """First basis and refresh of G = dYᵀ x, to the rounding of products in another order."""
    g = torch.Generator().manual_seed(1)
    formed, factored = tracker(gap=1), tracker(gap=1)
    bases = torch.zeros(RANK, N), torch.zeros(RANK, N)
    for _ in range(3):
        dy, x = torch.randn(40, M, generator=g).to(dtype), torch.randn(40, N, generator=g).to(dtype)
        formed.update(dy.float().t() @ x.float(), bases[0])
        factored.update_factored(dy, x, bases[1])
        torch.testing.assert_close(bases[1], bases[0], rtol=0, atol=1e-4)
        for one in (formed, factored):
            one.advance()
    assert factored.rotation is not None


@every_bad_value
def test_a_gradient_that_is_not_finite_postpones_a_refresh_and_keeps_the_basis(bad: float) -> None:
    followed, basis = due_again()
    before = basis.clone()
    followed.update(broken(bad), basis)
    assert torch.equal(basis, before)
    assert followed.rotation is not None
    assert torch.equal(followed.rotation, torch.eye(RANK))
    assert followed.postponed == 1
    followed.advance()
    followed.update(gradient_of(1), basis)
    assert not torch.equal(basis, before)
    assert is_orthonormal(basis)
    assert followed.postponed == 1


@every_bad_value
@pytest.mark.parametrize("factor", ["dy", "x"])
def test_factors_that_are_not_finite_never_reach_the_basis(bad: float, factor: str) -> None:
    """Even where the other factor is zero there."""
    followed, basis = due_again()
    before = basis.clone()
    factors = {"dy": torch.ones(5, M), "x": torch.ones(5, N)}
    for tensor in factors.values():
        tensor[2] = 0
    factors[factor][2, 1] = bad
    followed.update_factored(**factors, basis=basis)
    assert torch.equal(basis, before)
    assert followed.postponed == 1


@every_bad_value
def test_before_the_first_basis_a_bad_gradient_gives_random_directions_and_the_next_step_a_basis(bad: float) -> None:
    """Refreshes that follow soon find from random directions what a first basis would have held."""
    spectrum = 0.5 ** torch.arange(N)
    gradient = gradient_of() * spectrum
    new, basis = tracker(gap=100), torch.zeros(RANK, N)
    new.update(broken(bad), basis)
    assert is_orthonormal(basis)
    assert float((basis @ gradient.t()).square().sum() / gradient.square().sum()) < 0.5
    assert new.postponed == 1
    assert new.rotation is None
    new.advance()
    assert new.due
    new.update(gradient, basis)
    best = torch.linalg.svdvals(gradient)[:RANK].square().sum()
    assert float((basis @ gradient.t()).square().sum() / best) > 0.99


def test_a_first_basis_that_was_found_is_not_found_again() -> None:
    """Where the host does not know it yet, early attempts leave it, and a rotation of one; only the gap moves it."""
    followed, basis = started(gap=4)
    followed._heard = None
    before = basis.clone()
    for step in range(1, 5):
        followed.advance()
        assert followed.due is (step in (1, 4))
        followed.update(gradient_of(step), basis)
        if followed.rotation is not None:
            assert torch.equal(followed.rotation, torch.eye(RANK)) is (step != 4)
        assert torch.equal(basis, before) is (step != 4)
    assert followed.postponed == 0


@pytest.mark.parametrize("has_basis", [False, True], ids=["first", "refresh"])
def test_a_gradient_of_zeros_says_nothing(has_basis: bool) -> None:
    followed, basis = due_again() if has_basis else (tracker(), torch.zeros(RANK, N))
    before = basis.clone()
    followed.update(torch.zeros(M, N), basis)
    assert followed.postponed == 1
    assert torch.equal(basis, before) is has_basis
    assert is_orthonormal(basis)


def test_directions_of_which_a_gradient_says_nothing_stay() -> None:
    """One row of gradient, four of basis: the other three stay within the span of the old ones, but for rounding."""
    followed, basis = due_again()
    old = basis.clone()
    row = torch.randn(1, N, generator=torch.Generator().manual_seed(3))
    followed.update(torch.ones(M, 1) @ row, basis)
    assert is_orthonormal(basis)
    both = torch.linalg.qr(torch.cat([old, row]).t())[0]
    assert float((basis - basis @ both @ both.t()).norm(dim=1).max()) < 0.1


@pytest.mark.parametrize("damage", ["doubled row", "repeated row", "zeros", "nan"])
def test_a_basis_that_lost_orthonormality_is_made_anew_and_warned_of(damage: str) -> None:
    followed, basis = due_again()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert followed.remade == 0
    if damage == "doubled row":
        basis[1] *= 2
    elif damage == "repeated row":
        basis[1] = basis[0]
    else:
        basis[1] = 0 if damage == "zeros" else math.nan
    followed.update(gradient_of(1), basis)
    assert is_orthonormal(basis)
    assert followed.rotation is not None
    assert bool(torch.isfinite(followed.rotation).all())
    assert float(torch.linalg.matrix_norm(followed.rotation, 2)) < 1 + 1e-5
    with pytest.warns(UserWarning, match="lost its orthonormality 1 times"):
        assert followed.remade == 1
    assert followed.state_dict()["remade"] == 1


def test_a_broken_basis_is_mended_even_where_the_gradient_is_bad() -> None:
    followed, basis = due_again()
    basis[2] = math.nan
    followed.update(broken(math.inf), basis)
    assert is_orthonormal(basis)


def test_no_update_reads_a_number_from_the_device() -> None:
    """Fake tensors have no numbers to read; a read, the negative control, raises."""
    with FakeTensorMode():
        followed, basis = tracker(gap=1), torch.zeros(RANK, N)
        for _ in range(3):
            followed.update(torch.randn(M, N), basis)
            followed.advance()
            followed.update_factored(torch.randn(7, M), torch.randn(7, N), basis)
            followed.advance()
        with pytest.raises(DataDependentOutputException):
            float(torch.randn(M, N).norm())
    assert followed.rotation is not None


def test_a_backward_under_autocast_gives_the_same_basis() -> None:
    bases = [torch.zeros(RANK, N), torch.zeros(RANK, N)]
    for basis, enabled in zip(bases, (False, True)):
        followed = tracker(gap=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for seed in range(2):
                followed.update(gradient_of(seed), basis)
                followed.advance()
    assert torch.equal(*bases)


def test_a_new_period_forgets_the_basis() -> None:
    followed, _ = started(gap=1)
    followed.rotation = torch.eye(RANK)
    followed.start(7)
    assert (followed.activation, followed.steps, followed.due, followed.has_basis) == (7, 0, True, False)
    assert followed.rotation is None


def test_a_tracker_continues_from_its_state() -> None:
    """Halfway to a first basis that no gradient has had a say in yet."""
    followed, basis = tracker(gap=4, offset=1), torch.zeros(RANK, N)
    followed.update(broken(math.nan), basis)
    followed.advance()
    other, other_basis = tracker(gap=4, offset=1), basis.clone()
    other.load_state_dict(json.loads(json.dumps(followed.state_dict())))
    assert other.state_dict() == followed.state_dict()
    assert other.postponed == 1
    for step in range(6):
        for one, its_basis in ((followed, basis), (other, other_basis)):
            one.advance()
            one.update(gradient_of(step), its_basis)
        assert torch.equal(basis, other_basis)
        assert other.state_dict() == followed.state_dict()


def test_the_state_survives_a_text_format() -> None:
    """It may give 0 and 1 back for booleans."""
    other = tracker()
    other.load_state_dict(
        {"activation": 2, "steps": 3, "due": 0, "has_basis": 1, "retrying": 0, "postponed": 0, "remade": 0, "found": 1}
    )
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
    draws = {tuple(RandomRows(*numbers).draw(1, 4, torch.device("cpu"))[0].tolist()) for numbers in grid}
    assert len(draws) == len(grid)


def test_global_random_state_is_not_touched() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    started()
    assert torch.equal(torch.rand(3), wanted)


class HeardLate:
    """A value that is true, and that the host does not know yet."""

    def is_true(self) -> bool:
        return False

    def wait(self) -> bool:
        return True


@pytest.mark.parametrize("case", ["alone", "with other ranks", "waits"])
def test_ranks_that_hear_late_decide_as_those_that_heard(case: str) -> None:
    """Alone an early attempt is made and thrown away; ranks wait, for one alone would find a basis with nobody.

    So does one that is told to, since what it does when a basis is due can be seen in the weights.
    """
    followed, _ = started(gap=10)
    followed.summed = (lambda sketch: sketch) if case == "with other ranks" else None
    followed.waits = case == "waits"
    followed._heard = HeardLate()  # type: ignore[assignment]
    followed.advance()
    assert followed.due is (case == "alone")
