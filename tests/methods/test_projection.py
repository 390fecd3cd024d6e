"""How one matrix's gradient is projected and lifted back, by type and shape."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tolerances import ORTHONORMAL, PRODUCT
from torch import Tensor, nn

from lisa_kernels.errors import InputError
from lisa_kernels.methods import projection as module
from lisa_kernels.methods.projection import DEFAULTS, SIDES, Projection, check_matrices, check_settings, stagger

RANK = 4
SHAPES = {"tall": (24, 16), "wide": (16, 24), "square": (20, 20)}
TYPES = list(SIDES)
BETAS = (0.9, 0.999)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projected(shape: tuple[int, int], proj_type: str, **settings: Any) -> tuple[Projection, dict[str, Tensor]]:
    """Return a projection and its bases, made from a first gradient."""
    group = {**DEFAULTS, "rank": RANK, "proj_type": proj_type, **settings}
    made = Projection(torch.Size(shape), group)
    stagger([made], seed=0)
    bases = made.new_bases(torch.float32, torch.device("cpu"))
    assert made.due
    assert not made.refresh(bases, normal(*shape))
    return made, bases


def lifted(made: Projection, bases: dict[str, Tensor], slot: Tensor) -> Tensor:
    left, right = made.factors(bases, slot)
    return left.t() @ right


@pytest.mark.parametrize(
    ("proj_type", "shape", "slot", "bases"),
    [
        ("std", (24, 16), (4, 24), {"right_basis": (4, 16)}),
        ("std", (16, 24), (4, 24), {"left_basis": (4, 16)}),
        ("std", (20, 20), (4, 20), {"right_basis": (4, 20)}),
        ("reverse_std", (24, 16), (4, 16), {"left_basis": (4, 24)}),
        ("reverse_std", (16, 24), (4, 16), {"right_basis": (4, 24)}),
        ("reverse_std", (20, 20), (4, 20), {"left_basis": (4, 20)}),
        ("right", (16, 24), (4, 16), {"right_basis": (4, 24)}),
        ("left", (24, 16), (4, 16), {"left_basis": (4, 24)}),
        ("full", (24, 16), (4, 4), {"left_basis": (4, 24), "right_basis": (4, 16)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
def test_each_type_has_its_sides(
    proj_type: str, shape: tuple[int, int], slot: tuple[int, int], bases: dict[str, tuple[int, int]]
) -> None:
    made, tensors = projected(shape, proj_type)
    assert made.slot_shape == slot
    assert {name: tuple(basis.shape) for name, basis in tensors.items()} == bases
    assert made.project(tensors, normal(*shape)).shape == slot


@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_lifting_is_the_transpose_of_projecting(shape: tuple[int, int], proj_type: str) -> None:
    """⟨lift(S), G⟩ = ⟨S, project(G)⟩, and projecting what was lifted gives it back."""
    made, bases = projected(shape, proj_type)
    gradient, slot = normal(*shape, seed=1), normal(*made.slot_shape, seed=2)
    up, down = lifted(made, bases, slot), made.project(bases, gradient)
    scale = float(slot.norm() * gradient.norm())
    assert float((up * gradient).sum()) == pytest.approx(float((slot * down).sum()), abs=PRODUCT * scale)
    assert torch.allclose(made.project(bases, up), slot, atol=10 * ORTHONORMAL)


@pytest.mark.parametrize("proj_type", TYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_refresh_carries_the_first_moment_along(shape: tuple[int, int], proj_type: str) -> None:
    """Lifted, the new moment is the old one's share in the new space; on the numbers alone it would be another."""
    made, bases = projected(shape, proj_type, update_proj_gap=1)
    m = normal(*made.slot_shape, seed=3)
    before = lifted(made, bases, m)
    made.advance()
    assert made.due
    assert made.refresh(bases, normal(*shape, seed=4))
    new_m, new_v = made.transport(m, m.square(), torch.tensor(1000), BETAS, m)
    share = lifted(made, bases, made.project(bases, before))
    assert torch.allclose(lifted(made, bases, new_m), share, atol=10 * ORTHONORMAL)
    assert not torch.allclose(lifted(made, bases, m), share, atol=0.1)
    assert new_m.shape == new_v.shape == made.slot_shape
    assert bool((new_v > 0).all())


def test_a_rotation_is_used_once() -> None:
    made, bases = projected((24, 16), "full", update_proj_gap=1)
    made.advance()
    made.refresh(bases, normal(24, 16, seed=4))
    m = normal(4, 4)
    moved = made.transport(m, m.square(), torch.tensor(10), BETAS, m)[0]
    assert not torch.equal(moved, m)
    assert torch.equal(made.transport(m, m.square(), torch.tensor(10), BETAS, m)[0], m)


def test_without_transport_of_one_side_the_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the test of transport sees a moment that stays as it was."""
    monkeypatch.setattr(module, "transport_moments", lambda m, v, *_: (m, v))
    with pytest.raises(AssertionError):
        test_a_refresh_carries_the_first_moment_along((24, 16), "full")


def test_refreshes_are_spread_over_the_gap() -> None:
    """Eight bases and a gap of 16: after the first gap no step refreshes more than one, and each is refreshed once."""
    made = [projected((24, 16), proj_type, update_proj_gap=16) for proj_type in ("full", "left") * 2 + ("right",) * 2]
    stagger([each for each, _ in made], seed=0)
    refreshed: list[list[int]] = []
    for step in range(64):
        refreshed.append([])
        for number, (each, bases) in enumerate(made):
            each.advance()
            due = [side for side, tracker in each.trackers.items() if tracker.due]
            refreshed[-1] += [number] * len(due)
            if due:
                each.refresh(bases, normal(24, 16, seed=step))
    for start in (16, 32):
        gap = refreshed[start : start + 16]
        assert max(map(len, gap)) == 1
        assert sorted(number for step in gap for number in step) == [0, 0, 1, 2, 2, 3, 4, 5]


def test_no_two_bases_share_random_numbers() -> None:
    made = [Projection(torch.Size((8, 8)), {**DEFAULTS, "rank": 2, "proj_type": "full"}) for _ in range(3)]
    stagger(made, seed=7)
    trackers = [tracker for each in made for tracker in each.trackers.values()]
    assert len({tracker.stream for tracker in trackers}) == 6
    assert {tracker.seed for tracker in trackers} == {7}


# Refusals


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"rank": 0}, "rank is 0; a whole number of at least 1"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"rank": True}, "rank is True"),
        ({"rank": 4, "update_proj_gap": 0}, "update_proj_gap is 0"),
        ({"rank": 4, "scale": math.inf}, "scale is inf; a finite number above 0"),
        ({"rank": 4, "scale": math.nan}, "scale is nan"),
        ({"rank": 4, "scale": 0.0}, "scale is 0.0"),
        ({"rank": 4, "scale": "1"}, "scale is '1'"),
        ({"rank": 4, "proj_type": "reverse-std"}, "did you mean 'reverse_std'"),
        ({"rank": 4, "proj_type": None}, "unknown proj_type 'None'"),
        ({"proj_type": "std"}, "has proj_type but no rank"),
        ({"update_proj_gap": 50}, "has update_proj_gap but no rank"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(group: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_settings(group)


@pytest.mark.parametrize("group", [{}, {"rank": None, "proj_type": "std"}, {"lr": 1.0, "scale": 3}], ids=str)
def test_groups_without_a_rank_are_plain(group: dict[str, Any]) -> None:
    check_settings(group)
    assert not module.is_projected(group)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((300,), "only matrices"), ((4, 4, 3, 3), "only matrices"), ((3, 80), "use at most 3"), ((0, 5), "at most 0")],
    ids=str,
)
def test_parameters_that_cannot_be_projected_are_refused(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_matrices({"rank": 4, "params": [nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(shape))]})
