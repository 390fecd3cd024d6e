"""States move between `AdamW8bit` and real bitsandbytes and torch optimizers, and training goes on."""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import bitsandbytes
import pytest
import torch
from tolerances import ADAMW_UPDATE, ADAMW_WEIGHT, BFLOAT16_ROUNDING, CODEC_NEAREST, CODEC_SCALING, FLOAT32_ROUNDING
from torch import Tensor, nn

from lisa_kernels.errors import InputError
from lisa_kernels.optim import AdamW8bit, from_bitsandbytes, from_torch, to_bitsandbytes, to_torch
from lisa_kernels.optim.interop import dynamic_code_map

# Its names are not exported to type checkers.
BNB: Any = bitsandbytes.optim
STEPS = 20
WRAPPED = "__bnb_optimizer_quant_state__"

# A comparison is the norm of the difference of two runs' weights, relative to the norm of what one of them moved. The
# gradients do not depend on the weights, so runs differ by rounding only.
# Two float32 runs round apart by both errors once each step; a weight is at most 8 times as large as what it moves.
FLOAT32_RUNS = 2 * STEPS * 2 * (8 * ADAMW_WEIGHT + ADAMW_UPDATE)
# bfloat16 weights, at most 4 times as large as what they move, take a random walk: in each of two runs and two halves
# a step errs by 1/√6 = 0.41 of a unit (stochastic; nearest 1/√12), and a unit is two half units.
BFLOAT16_WEIGHTS = math.sqrt(2 * 2 * STEPS) * 0.41 * 2 * BFLOAT16_ROUNDING * 4
# torch keeps bfloat16 moments of bfloat16 weights: nearest rounding of the second moment errs by half a unit a step,
# at worst all in one direction and counting half in its root; of the first moment it lives for 1 / (1 − β₁) = 10 steps.
BFLOAT16_MOMENTS = (2 * STEPS / 2 + 10) * BFLOAT16_ROUNDING
# Our stochastic rounding errs by δ/√6 for a step δ of 1/8 to 1/16, on average 0.09, that is 0.037 of a moment. It
# gathers as √(1 / (1 − β₁²)) = 2.3 in m and as √20 in v, which counts half: together 0.12 of one update; the errors of
# 20 updates are not all of one sign. bitsandbytes' map is finer near the absmax, where these gradients keep it.
EIGHT_BIT_RUNS = 0.12
# One conversion: half a step of ours; a first moment below the smallest code errs by that code at most, relative to the
# block's absmax; and a second moment too is raised to it.
SMALLEST_M = 2.0**-15
SMALLEST_V = 2.0**-31


class Format(NamedTuple):
    """Another library's optimizer, and the functions that take its state over and give ours back."""

    build: Callable[..., torch.optim.Optimizer]
    take: Callable[[AdamW8bit, dict[str, Any]], None]
    give: Callable[[AdamW8bit], dict[str, Any]]


BITSANDBYTES = Format(BNB.AdamW8bit, from_bitsandbytes, to_bitsandbytes)
TORCH = Format(torch.optim.AdamW, from_torch, to_torch)
FORMATS = pytest.mark.parametrize("other", [BITSANDBYTES, TORCH], ids=["bitsandbytes", "torch"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Return a matrix with 8-bit states, a small one, a vector, and a long vector: 8-bit in bitsandbytes only."""
    shapes = [(64, 80), (5, 7), (300,), (4100,)]
    return [nn.Parameter((0.1 * normal(*shape, seed=i)).to(dtype)) for i, shape in enumerate(shapes)]


def grouped(build: Callable[..., Any], params: list[nn.Parameter], lr: float = 1e-2) -> Any:
    """Return an optimizer of two groups with different settings."""
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": lr / 2, "weight_decay": 0.0}]
    return build(groups, lr=lr, betas=(0.9, 0.995), eps=1e-7, weight_decay=0.1)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    """Step on gradients that shrink after half of the way, so that what the moments remember counts."""
    for step in steps:
        scale = 1.0 if step < STEPS else 0.25
        for index, param in enumerate(params):
            gradient = normal(*param.shape, seed=index) + 0.3 * normal(*param.shape, seed=1000 * (step + 1) + index)
            param.grad = (scale * gradient).to(param.dtype)
        optimizer.step()


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def matrix_of(optimizer: torch.optim.Optimizer) -> Tensor:
    return params_of(optimizer)[0]


def moved(one: list[nn.Parameter], other: list[nn.Parameter]) -> list[Tensor]:
    return [a.detach().double() - b.detach().double() for a, b in zip(one, other)]


def differences(run: list[nn.Parameter], wanted: list[nn.Parameter], start: list[nn.Parameter]) -> list[float]:
    """Return each parameter's distance from where it should be, relative to how far that is from the start."""
    return [float(a.norm() / b.norm()) for a, b in zip(moved(run, wanted), moved(wanted, start))]


def tolerances(dtype: torch.dtype, eight_bit: set[int]) -> list[float]:
    exact = FLOAT32_RUNS + (dtype == torch.bfloat16) * (BFLOAT16_WEIGHTS + BFLOAT16_MOMENTS)
    return [exact + EIGHT_BIT_RUNS * (index in eight_bit) for index in range(4)]


def within(given: list[float], wanted: list[float]) -> bool:
    return all(one <= limit for one, limit in zip(given, wanted))


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def trained(build: Callable[..., Any], dtype: torch.dtype = torch.float32) -> tuple[Any, list[nn.Parameter]]:
    params = parameters(dtype)
    optimizer = grouped(build, params)
    run(optimizer, params, range(STEPS))
    return optimizer, params


def snapshot(optimizer: AdamW8bit) -> dict[str, Any]:
    return copy.deepcopy(optimizer.state_dict())


def equal(one: Any, other: Any) -> bool:
    """Compare nested dicts and lists, tensors bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


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


# Refusals


def of_other(build: Callable[..., torch.optim.Optimizer], settings: dict[str, Any]) -> dict[str, Any]:
    params = parameters()
    optimizer = build([{"params": params[:1]}, {"params": params[1:]}], lr=1e-2, **settings)
    run(optimizer, params, range(2))
    return optimizer.state_dict()


def assert_refused(take: Callable[[AdamW8bit, Any], None], state: Any, words: str) -> None:
    ours, params = trained(AdamW8bit)
    before, weights = snapshot(ours), copies(params)
    with pytest.raises(InputError, match=words):
        take(ours, state)
    assert equal(ours.state_dict(), before)
    assert all(map(torch.equal, params, weights))


@pytest.mark.parametrize(
    ("take", "build", "settings", "words"),
    [
        (from_bitsandbytes, BNB.Lion8bit, {}, "other optimizers"),
        (from_bitsandbytes, BNB.Adagrad8bit, {}, "other optimizers"),
        (from_bitsandbytes, BNB.RMSprop8bit, {}, "other optimizers"),
        (from_bitsandbytes, BNB.LAMB8bit, {}, "unorm_vec"),
        (from_bitsandbytes, BNB.AdEMAMix8bit, {}, r"state1 of parameter 0 is .*\[2, 64, 80\]"),
        (from_bitsandbytes, torch.optim.AdamW, {}, "exp_avg.*bitsandbytes"),
        (from_bitsandbytes, AdamW8bit, {}, "m_codes.*bitsandbytes"),
        (from_torch, BNB.AdamW8bit, {}, "not of torch.optim.AdamW"),
        (from_torch, torch.optim.AdamW, {"amsgrad": True}, "amsgrad=True"),
        (from_torch, torch.optim.AdamW, {"maximize": True}, "maximize=True"),
        (from_torch, torch.optim.Adam, {"weight_decay": 0.1}, "couples weight_decay"),
        (from_torch, torch.optim.NAdam, {}, "not of torch.optim.AdamW"),
        (from_torch, torch.optim.RAdam, {}, "not of torch.optim.AdamW"),
        (from_torch, torch.optim.SGD, {}, "not of torch.optim.AdamW"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_states_of_other_optimizers_are_refused(
    take: Callable[[AdamW8bit, Any], None], build: Any, settings: dict[str, Any], words: str
) -> None:
    assert_refused(take, of_other(build, settings), words)


def changed(name: str, change: Callable[[Tensor], Any], number: int = 0) -> Callable[[dict[str, Any]], None]:
    def spoil(state: dict[str, Any]) -> None:
        values = state["state"][number]
        inner = values[WRAPPED] if name in values.get(WRAPPED, {}) else values
        inner[name] = change(inner[name])

    return spoil


def removed(state: dict[str, Any]) -> None:
    del state["state"][3][WRAPPED if WRAPPED in state["state"][3] else "exp_avg_sq"]


def regrouped(state: dict[str, Any]) -> None:
    state["param_groups"][1]["params"].pop()


def homeless(state: dict[str, Any]) -> None:
    state["state"][9] = state["state"].pop(3)


def without_betas(state: dict[str, Any]) -> None:
    del state["param_groups"][1]["betas"]


def percentile(state: dict[str, Any]) -> None:
    state["state"][3][WRAPPED]["gnorm_vec"] = torch.zeros(100)


def without_blocks(state: dict[str, Any]) -> None:
    values = state["state"][3][WRAPPED]
    for which in (1, 2):
        values[f"max{which}"] = values.pop(f"absmax{which}").amax()


def blocks_of_2048(state: dict[str, Any]) -> None:
    values = state["state"][3][WRAPPED]
    for which in (1, 2):
        values[f"absmax{which}"] = values[f"absmax{which}"][::8]


BOTH = [(regrouped, r"groups of \[1, 2\]"), (homeless, "parameter 9"), (without_betas, "betas are None"),
        (removed, "parameter 3 holds"), (changed("step", lambda step: 0.5, 3), "step of parameter 3 is 0.5"),
        (changed("step", lambda step: -1, 3), "step of parameter 3 is -1")]  # fmt: skip
IN_BITSANDBYTES = [
    *BOTH, (percentile, "gnorm_vec"), (without_blocks, "max1"),
    (blocks_of_2048, r"absmax1 of parameter 3 is .*\[3\].*\[17\]"),
    (changed("state2", lambda codes: codes.T), r"state2 of parameter 0 is .*\[80, 64\].*\[64, 80\]"),
    (changed("state2", lambda codes: codes.float()), "state2 of parameter 0 is torch.float32"),
    (changed("state1", lambda m: m[:4], 1), r"state1 of parameter 1 is .*\[4, 7\]"),
    (changed("qmap1", lambda code_map: code_map[:16]), r"qmap1 of parameter 0 is .*\[16\]"),
    (changed("absmax1", lambda absmax: absmax / 0, 3), "parameter 3 holds NaN"),
    (changed("absmax2", lambda absmax: -absmax, 3), "negative second moment"),
    (changed("state1", lambda m: m * math.nan, 2), "parameter 2 holds NaN"),
]  # fmt: skip
IN_TORCH = [
    *BOTH, (changed("exp_avg", lambda m: m[:4], 1), r"exp_avg of parameter 1 is .*\[4, 7\]"),
    (changed("exp_avg_sq", lambda v: v.half(), 3), "torch.float16.*torch.float32 or torch.bfloat16"),
    (changed("exp_avg_sq", lambda v: -v, 3), "negative second moment"),
    (changed("exp_avg", lambda m: None, 3), "exp_avg of parameter 3 is None"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("other", "spoil", "words"),
    [(BITSANDBYTES, *case) for case in IN_BITSANDBYTES] + [(TORCH, *case) for case in IN_TORCH],
    ids=lambda value: re.sub(r"\W+", "-", value).strip("-") if isinstance(value, str) else
    "" if callable(value) else value.build.__module__.partition(".")[0],
)  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(
    other: Format, spoil: Callable[[dict[str, Any]], None], words: str
) -> None:
    """Where the fault is late in the dict, too."""
    theirs, _ = trained(other.build)
    state = copy.deepcopy(theirs.state_dict())
    spoil(state)
    assert_refused(other.take, state, words)


@FORMATS
@pytest.mark.parametrize(
    "state",
    [None, {}, {"state": {}}, {"state": [], "param_groups": []}, {"state": {0: 1}, "param_groups": []}],
    ids=repr,
)
def test_what_is_no_state_dict_is_refused(other: Format, state: Any) -> None:
    assert_refused(other.take, state, "no state dict of")
