"""States move between `AdamW8bit` and real bitsandbytes and torch optimizers, and training goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from tolerances import CODEC_NEAREST, CODEC_SCALING, FLOAT32_ROUNDING
from torch import Tensor

from lisa_kernels.optim import AdamW8bit, from_bitsandbytes, from_torch, to_bitsandbytes, to_torch
from lisa_kernels.optim.interop import dynamic_code_map

from .interop_cases import (
    BITSANDBYTES,
    BNB,
    DTYPES,
    FORMATS,
    SMALLEST_M,
    SMALLEST_V,
    STEPS,
    TORCH,
    WRAPPED,
    Format,
    copies,
    differences,
    equal,
    grouped,
    matrix_of,
    normal,
    parameters,
    params_of,
    run,
    saved_and_loaded,
    tolerances,
    trained,
    within,
)

# Training goes on


@FORMATS
@DTYPES
def test_a_run_of_the_other_goes_on_in_ours(other: Format, dtype: torch.dtype) -> None:
    """It stays with the other's uninterrupted run from where it moved, and with ours from the start."""
    theirs, params = trained(other.build, dtype)
    middle, ours_params = copies(params), copies(params)
    ours = grouped(AdamW8bit, ours_params, lr=1.0)
    other.take(ours, saved_and_loaded(theirs.state_dict()))
    assert [group["lr"] for group in ours.param_groups] == [1e-2, 5e-3]
    assert ours.steps == STEPS
    run(ours, ours_params, range(STEPS, 2 * STEPS))
    run(theirs, params, range(STEPS, 2 * STEPS))
    # The long vector's states are 8-bit in bitsandbytes.
    limits = tolerances(dtype, {0, 3} if other is BITSANDBYTES else {0})
    assert within(differences(ours_params, params, middle), limits)
    alone = parameters(dtype)
    run(grouped(AdamW8bit, alone), alone, range(2 * STEPS))
    assert within(differences(ours_params, alone, parameters(dtype)), limits)


@FORMATS
@DTYPES
def test_a_run_of_ours_goes_on_in_the_other(other: Format, dtype: torch.dtype) -> None:
    """It stays with our uninterrupted run from where it moved, and with the other's from the start."""
    ours, params = trained(AdamW8bit, dtype)
    middle, their_params = copies(params), copies(params)
    theirs = grouped(other.build, their_params, lr=1.0)
    theirs.load_state_dict(saved_and_loaded(other.give(ours)))
    assert [group["lr"] for group in theirs.param_groups] == [1e-2, 5e-3]
    run(theirs, their_params, range(STEPS, 2 * STEPS))
    run(ours, params, range(STEPS, 2 * STEPS))
    limits = tolerances(dtype, {0, 3} if other is BITSANDBYTES else {0})
    assert within(differences(their_params, params, middle), limits)
    alone = parameters(dtype)
    run(grouped(other.build, alone), alone, range(2 * STEPS))
    assert within(differences(their_params, alone, parameters(dtype)), limits)


def swapped(state: dict[str, Any]) -> None:
    for values in state["state"].values():
        inner = values.get(WRAPPED, values)
        for one, other in (("state1", "state2"), ("qmap1", "qmap2"), ("absmax1", "absmax2"), ("exp_avg", "exp_avg_sq")):
            if one in inner:
                inner[one], inner[other] = inner[other], inner[one].abs()


def forgetful(state: dict[str, Any]) -> None:
    for values in state["state"].values():
        values["step"] = 0


def reset(state: dict[str, Any]) -> None:
    state["state"] = {}


@FORMATS
@pytest.mark.parametrize("spoil", [swapped, forgetful, reset], ids=lambda it: it.__name__)
def test_a_wrong_state_would_fail_the_comparison(other: Format, spoil: Callable[[dict[str, Any]], None]) -> None:
    """Negative control, for every parameter: moments exchanged, steps forgotten, or nothing taken over."""
    theirs, params = trained(other.build)
    state = saved_and_loaded(theirs.state_dict())
    spoil(state)
    middle, ours_params = copies(params), copies(params)
    ours = grouped(AdamW8bit, ours_params)
    other.take(ours, state)
    run(ours, ours_params, range(STEPS, 2 * STEPS))
    run(theirs, params, range(STEPS, 2 * STEPS))
    limits = tolerances(torch.float32, {0, 3} if other is BITSANDBYTES else {0})
    seen = [one > limit for one, limit in zip(differences(ours_params, params, middle), limits)]
    # A lost step count changes these updates by a few hundredths, which 8-bit states hide.
    assert seen[1] and seen[2] if spoil is forgetful else all(seen)


# What is taken over


def test_moments_come_through_bitsandbytes_own_map() -> None:
    """Checked against its own dequantisation: within our step, 32-bit states exactly, long vectors without a loss."""
    theirs, params = trained(BITSANDBYTES.build)
    ours = grouped(AdamW8bit, copies(params))
    from_bitsandbytes(ours, theirs.state_dict())
    for index, (param, own) in enumerate(zip(params, params_of(ours))):
        state = theirs.state[param]
        for moment, which, smallest in zip(ours.moments(own), (1, 2), (SMALLEST_M, SMALLEST_V)):
            wanted = decoded(state, which)
            if index == 0:
                absmax = state[f"absmax{which}"].repeat_interleave(256).view(wanted.shape)
                limit = (CODEC_NEAREST + CODEC_SCALING) * wanted.abs() + smallest * absmax
                assert bool(((moment - wanted).abs() <= limit).all())
                assert not torch.equal(moment, wanted)
            else:
                assert torch.equal(moment, wanted)


def decoded(state: dict[str, Any], which: int) -> Tensor:
    codes: Tensor = state[f"state{which}"]
    if codes.dtype == torch.float32:
        return codes
    code_map, absmax = state[f"qmap{which}"], state[f"absmax{which}"]
    values: Tensor = bitsandbytes.functional.dequantize_blockwise(codes, absmax=absmax, code=code_map, blocksize=256)
    return values


def flattened(state: dict[str, Any]) -> dict[str, Any]:
    """Return the form that older versions of bitsandbytes wrote."""
    flat = {number: {**values, **values[WRAPPED]} for number, values in state["state"].items()}
    for values in flat.values():
        del values[WRAPPED]
    return {**state, "state": flat}


def with_names(state: dict[str, Any]) -> dict[str, Any]:
    """Return what JSON makes of the numbers."""
    return {**state, "state": {str(number): values for number, values in state["state"].items()}}


@pytest.mark.parametrize("form", [flattened, with_names], ids=["flat", "numbers-as-strings"])
def test_every_form_of_a_bitsandbytes_state_is_read_alike(form: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    theirs, params = trained(BITSANDBYTES.build)
    wrapped, other = (grouped(AdamW8bit, copies(params)) for _ in range(2))
    from_bitsandbytes(wrapped, theirs.state_dict())
    from_bitsandbytes(other, form(theirs.state_dict()))
    assert equal(other.state_dict(), wrapped.state_dict())


def test_a_matrix_that_bitsandbytes_kept_in_32_bits_is_quantised() -> None:
    """As its users set for embeddings; the result is that of torch's state of the same moments."""
    theirs, params = trained(lambda groups, **settings: BNB.AdamW32bit(groups, **settings))
    ours, wanted = (grouped(AdamW8bit, copies(params)) for _ in range(2))
    from_bitsandbytes(ours, theirs.state_dict())
    same, _ = trained(TORCH.build)
    for param, own in zip(params, params_of(same)):
        same.state[own].update(exp_avg=theirs.state[param]["state1"], exp_avg_sq=theirs.state[param]["state2"])
    from_torch(wanted, same.state_dict())
    assert ours.state[matrix_of(ours)]["m_codes"].dtype == torch.uint8
    assert equal(ours.state_dict()["state"], wanted.state_dict()["state"])


def test_a_second_moment_that_bitsandbytes_lost_does_not_divide_by_eps() -> None:
    """Its code 0 beside a first moment that is not 0: the largest value that it rounds to 0."""
    theirs, params = trained(BITSANDBYTES.build)
    state = theirs.state[params[0]]
    state["state2"].view(-1)[:4] = 0
    state["state1"].view(-1)[:4] = torch.tensor([200, 50, 127, 255], dtype=torch.uint8)
    ours = grouped(AdamW8bit, copies(params))
    from_bitsandbytes(ours, theirs.state_dict())
    v = ours.moments(matrix_of(ours))[1].view(-1)[:4]
    lost = float(state["qmap2"][1] / 2 * state["absmax2"][0])
    assert v.tolist() == pytest.approx([lost, lost, 0.0, lost], rel=CODEC_NEAREST + CODEC_SCALING)


@FORMATS
def test_parameters_without_a_state_start_afresh_and_old_state_is_forgotten(other: Format) -> None:
    theirs, params = trained(other.build)
    del theirs.state[params[1]]
    ours, ours_params = trained(AdamW8bit)
    run(ours, ours_params, range(STEPS, STEPS + 5))
    other.take(ours, theirs.state_dict())
    assert ours_params[1] not in ours.state
    assert ours.steps == STEPS
    run(ours, ours_params, range(STEPS, STEPS + 1))
    assert [int(ours.state[param]["step"]) for param in ours_params] == [STEPS + 1, 1, STEPS + 1, STEPS + 1]


@FORMATS
def test_the_rate_a_scheduler_started_from_moves_along(other: Format) -> None:
    theirs, params = trained(other.build)
    torch.optim.lr_scheduler.LambdaLR(theirs, lambda step: 0.5)
    ours = grouped(AdamW8bit, copies(params), lr=1.0)
    other.take(ours, theirs.state_dict())
    assert [(group["initial_lr"], group["lr"]) for group in ours.param_groups] == [(1e-2, 5e-3), (5e-3, 2.5e-3)]
    assert [group["initial_lr"] for group in other.give(ours)["param_groups"]] == [1e-2, 5e-3]


# What is given


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_the_code_map_is_that_of_bitsandbytes(signed: bool) -> None:
    wanted = bitsandbytes.functional.create_dynamic_map(signed=signed)
    # It works in float32: a boundary, a mean and a product, each rounded; so is ours, once.
    assert torch.allclose(dynamic_code_map(signed), wanted, rtol=6 * FLOAT32_ROUNDING, atol=0)
    assert torch.equal(dynamic_code_map(signed) == 0, wanted == 0)


def test_exported_codes_are_the_nearest_of_the_map() -> None:
    """Over magnitudes of six decades and their squares; where a v > 0 is nearest to 0, it gets code 1."""
    ours, _ = trained(AdamW8bit)
    param = matrix_of(ours)
    spread = 10.0 ** (-6 * torch.linspace(0, 1, 256)).repeat(20).view(64, 80)
    ours.set_moments(param, normal(64, 80, seed=5) * spread, (normal(64, 80, seed=6) * spread).square())
    exported = to_bitsandbytes(ours)["state"][0]
    for which, moment in enumerate(ours.moments(param), start=1):
        code_map, absmax = exported[f"qmap{which}"], exported[f"absmax{which}"]
        ratio = moment.double() / absmax.double().repeat_interleave(256).view(64, 80)
        nearest = (ratio.unsqueeze(-1) - code_map.double()).abs().argmin(-1)
        codes, own = bitsandbytes.functional.quantize_blockwise(moment, code=code_map, blocksize=256)
        assert torch.equal(own.absmax, absmax)
        if which == 2:
            assert bool((nearest[moment > 0] == 0).any())
            nearest = torch.where(moment > 0, nearest.clamp_min(1), nearest)
        given, wanted, theirs = (
            (code_map[it.int()].double() - ratio).abs() for it in (exported[f"state{which}"], nearest, codes)
        )
        # At a tie, to a rounding of the float32 quotient, either neighbour will do.
        assert bool((given <= wanted + 2 * FLOAT32_ROUNDING * ratio.abs()).all())
        assert float(given.norm()) <= float(theirs.norm()) * (1 + 1e-6)
        assert bool((exported["state2"][ours.moments(param)[1] > 0] != 0).all())


@FORMATS
def test_an_exported_state_has_the_form_of_the_others_own(other: Format) -> None:
    ours, params = trained(AdamW8bit)
    loaded, own = grouped(other.build, copies(params)), trained(other.build)[0]
    loaded.load_state_dict(other.give(ours))
    one, two = (form_of(optimizer.state_dict()) for optimizer in (loaded, own))
    assert one == two


def form_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape)
    if isinstance(value, dict):
        return {name: form_of(item) for name, item in value.items() if name != "initial_lr"}
    return [form_of(item) for item in value] if isinstance(value, list) else type(value)


@FORMATS
def test_an_exported_state_shares_no_memory(other: Format) -> None:
    ours, params = trained(AdamW8bit)
    given = other.give(ours)
    before = copy.deepcopy(given)
    run(ours, params, range(STEPS, STEPS + 2))
    assert equal(given, before)


# There and back


def test_a_round_trip_through_torch_keeps_every_code() -> None:
    ours, params = trained(AdamW8bit)
    back = grouped(AdamW8bit, copies(params))
    from_torch(back, saved_and_loaded(to_torch(ours)))
    assert_codes_kept(ours, back, everywhere=True)


def test_a_round_trip_through_bitsandbytes_keeps_the_codes_that_its_map_can_hold() -> None:
    """Those whose value has a code of the map within half of our step, in blocks whose absmax has a code (no −1)."""
    ours, params = trained(AdamW8bit)
    back = grouped(AdamW8bit, copies(params))
    from_bitsandbytes(back, saved_and_loaded(to_bitsandbytes(ours)))
    assert_codes_kept(ours, back, everywhere=False)


def assert_codes_kept(ours: AdamW8bit, back: AdamW8bit, everywhere: bool) -> None:
    one, other = (it.state[matrix_of(it)] for it in (ours, back))
    for name, moment in zip("mv", ours.moments(matrix_of(ours))):
        ratio = moment.view(20, 256) / one[f"{name}_absmax"].view(20, 1)
        code_map = dynamic_code_map(signed=name == "m")
        distance = (ratio.unsqueeze(-1) - code_map).abs().amin(-1)
        # A value in [2^e, 2^(e+1)) · 0.9375 has steps of 2^(e−3); at its lower end the step below is half of that.
        step = 2.0 ** (torch.floor(torch.log2(ratio.abs() * 0.9375 * (1 - 1e-6))) - 3) / 0.9375
        held = (distance < 0.499 * step) & (ratio.amax(1, keepdim=True) > 1 - 1e-6) & (ratio != 0)
        kept = one[f"{name}_codes"] == other[f"{name}_codes"]
        assert bool(kept.all() if everywhere else kept[held.view(-1)].all())
        assert float(held.float().mean()) > 0.2
        assert everywhere or not bool(kept.all())
    for given, wanted in zip(params_of(back)[1:3], params_of(ours)[1:3]):
        assert equal(dict(back.state[given]), dict(ours.state[wanted]))
