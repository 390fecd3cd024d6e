"""Optimizer states of other libraries, taken over and given back: bitsandbytes' `AdamW8bit` and `torch.optim.AdamW`.

A state moves as float32 moments (m, v), a step count and the groups' hyper-parameters; parameters are matched by their
position in the groups. Nothing of bitsandbytes is imported: its state is plain tensors.

bitsandbytes stores a moment as codes of a 256-entry map (`qmap1` signed, `qmap2` unsigned) times the absmax of its
block of 256. The map is dense near the absmax and has one or two values in its lowest decade, where our small floats
keep the same relative step everywhere: each format rounds what the other one held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.ops.blockwise8 import block_count, quantize_blockwise
from lisa_kernels.ops.blockwise8.reference import block_absmax
from lisa_kernels.optim.adamw import AdamW8bit
from lisa_kernels.optim.settings import as_number

BITSANDBYTES_BLOCK_SIZE = 256
# Tensors below this many elements have 32-bit states in bitsandbytes, whatever their dimensions.
BITSANDBYTES_MIN_8BIT_ELEMENTS = 4096
# Newer versions keep a state's tensors one level deeper, under this key.
_WRAPPED = "__bnb_optimizer_quant_state__"
_HYPER = ("lr", "betas", "eps", "weight_decay")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class _Moments(NamedTuple):
    """A parameter's state between two formats: steps taken, and float32 moments of the parameter's shape."""

    step: int
    m: Tensor
    v: Tensor


def from_bitsandbytes(optimizer: AdamW8bit, state_dict: dict[str, Any]) -> None:
    """Load a `bitsandbytes.optim.AdamW8bit` state dict, in the wrapped or the older flat form, and go on from it.

    Replaces the optimizer's whole state, its step count and the groups' lr, betas, eps, weight_decay and initial_lr;
    block size, rounding and seed stay. Per parameter: `state1`/`state2` of the parameter's shape, uint8 with
    `qmap1`/`qmap2` [256] and `absmax1`/`absmax2` [ceil(n / 256)], or float32 alone. Codes go through their own map to
    float32 and are rounded to our nearest code: one conversion gathers no bias as a thousand steps would, nearest errs
    half as much as stochastic rounding at worst, and the result depends on no seed. A second moment of code 0 whose
    first moment is not 0 was positive and lost to rounding; it becomes the largest value that rounds to 0, half the
    map's smallest, so that it cannot divide by eps. Tensors are converted on the device they come on.

    Raises InputError before anything changes: for the states of other optimizers (Lion, Adagrad, LAMB, AdEMAMix), of
    percentile clipping or of no blocks, for other shapes, block sizes or groups, and for values that are not finite.

    Source: bitsandbytes 0.50, `optim/optimizer.py`; the map is dynamic quantisation, Dettmers, arXiv 1511.04561.
    """
    _take_over(optimizer, state_dict, "bitsandbytes.optim.AdamW8bit", _read_bitsandbytes)


def to_bitsandbytes(optimizer: AdamW8bit) -> dict[str, Any]:
    """Return the state as a dict that `bitsandbytes.optim.AdamW8bit` over the same parameters loads and goes on from.

    Tensors of at least 4,096 elements get uint8 codes, the nearest of the map (the lower at a tie), with blocks of 256;
    a positive second moment never gets code 0. Smaller ones keep float32 moments. The form is the flat one, which every
    version reads. Reads step counts on the host. Nothing in the dict shares memory with the optimizer.

    Source: as `from_bitsandbytes`.
    """
    settings = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}
    return _hand_over(optimizer, settings, _write_bitsandbytes)


def from_torch(optimizer: AdamW8bit, state_dict: dict[str, Any]) -> None:
    """Load a `torch.optim.AdamW` state dict and go on from it, moments rounded to our nearest code where 8-bit.

    Replaces what `from_bitsandbytes` replaces. Per parameter: `step`, and `exp_avg` and `exp_avg_sq` of the parameter's
    shape, float32 or bfloat16. Raises InputError before anything changes: for amsgrad, maximize and the states of other
    optimizers (Adam, whose decay is no decay of weights; NAdam, RAdam, SGD …), for other shapes, dtypes or groups, and
    for values that are not finite.

    Source: torch 2.13, `torch/optim/adam.py`.
    """
    for group in _groups_of(state_dict, "torch.optim.AdamW"):
        if group.get("amsgrad") is None or not group.get("decoupled_weight_decay", True):
            raise InputError(
                "the state is not of torch.optim.AdamW (a group has no amsgrad, or couples weight_decay to the "
                "gradient): save it from AdamW."
            )
        for name in ("amsgrad", "maximize"):
            if group.get(name, False):
                raise InputError(f"the state was saved with {name}=True, which AdamW8bit does not have: train without.")
    _take_over(optimizer, state_dict, "torch.optim.AdamW", _read_torch)


def to_torch(optimizer: AdamW8bit) -> dict[str, Any]:
    """Return the state as a dict that `torch.optim.AdamW` over the same parameters loads and goes on from.

    `exp_avg` and `exp_avg_sq` are float32 of the parameter's shape (torch's loader casts them to its dtype), `step`
    float32 0-d. Reads step counts on the host. Nothing in the dict shares memory with the optimizer.

    Source: as `from_torch`.
    """
    # The installed version's own settings: which there are differs between versions.
    own = torch.optim.AdamW([torch.zeros(1, device="cpu")]).defaults
    return _hand_over(optimizer, own, _write_torch)


def dynamic_code_map(signed: bool) -> Tensor:
    """Return the values of bitsandbytes' 256 codes in rising order, float32 [256] within [−1, 1].

    Decade i = 0 … 6 holds N values 10^(i − 6) · (0.1 + 0.9 (j + 0.5) / N), N = 2^i with both signs when signed and
    2^(i + 1) otherwise; 0 and +1 complete them, −1 has no code.
    """
    decades = [(10.0 ** (i - 6), 2 ** (i if signed else i + 1)) for i in range(7)]
    values = [scale * (0.1 + 0.9 * (j + 0.5) / size) for scale, size in decades for j in range(size)]
    mirrored = [-value for value in values] if signed else []
    return torch.tensor(sorted([*mirrored, 0.0, *values, 1.0]), dtype=torch.float32, device="cpu")


# Taking over: every parameter is read and checked first, then the optimizer loads the whole as a state of its own.


def _groups_of(state_dict: Any, source: str) -> list[dict[str, Any]]:
    try:
        groups: list[dict[str, Any]] = [
            {**group, "params": list(group["params"])} for group in state_dict["param_groups"]
        ]
        well_formed = all(isinstance(values, dict) for values in state_dict["state"].values())
    except (TypeError, KeyError, AttributeError):
        well_formed = False
    if not well_formed:
        raise InputError(
            f"this is no state dict of {source}: a dict with 'state' and 'param_groups' is wanted; save it with "
            "optimizer.state_dict()."
        )
    return groups


def _plain(value: Any) -> Any:
    """Return a number for a 0-d tensor, and each of a pair's likewise."""
    if isinstance(value, (tuple, list)):
        return tuple(_plain(item) for item in value)
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def _take_over(
    optimizer: AdamW8bit, state_dict: dict[str, Any], source: str, read: Callable[[str, Any, Tensor], _Moments]
) -> None:
    groups = _groups_of(state_dict, source)
    saved, here = ([len(group["params"]) for group in each] for each in (groups, optimizer.param_groups))
    if saved != here:
        raise InputError(f"the state has parameter groups of {saved} parameters; this optimizer has {here}.")
    numbers = [str(number) for group in groups for number in group["params"]]
    params = dict(zip(numbers, (param for group in optimizer.param_groups for param in group["params"])))
    state: dict[str, dict[str, Tensor]] = {}
    steps = 0
    for number, values in state_dict["state"].items():
        if str(number) not in params:
            raise InputError(f"the state is of a parameter {number} that is in none of its groups.")
        if values:
            moments = read(str(number), values, params[str(number)].detach())
            _check_values(str(number), moments)
            state[str(number)] = _own_form(optimizer, params[str(number)].detach(), moments)
            steps = max(steps, moments.step)
    counters = {name: torch.tensor(value, device="cpu") for name, value in (("steps", steps), ("skipped", 0))}
    own_groups = [_own_group(ours, theirs) for ours, theirs in zip(optimizer.param_groups, groups)]
    # The loader checks the groups, and refuses for a subclass whose states are more than moments.
    optimizer.load_state_dict({"state": state, "counters": counters, "param_groups": own_groups})


def _own_group(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return our group with their hyper-parameters; one that they lack is None, which the loader refuses."""
    taken = {name: _plain(theirs.get(name)) for name in _HYPER}
    if "initial_lr" in theirs:
        taken["initial_lr"] = _plain(theirs["initial_lr"])
    return {**ours, **taken, "params": theirs["params"]}


def _own_form(optimizer: AdamW8bit, param: Tensor, moments: _Moments) -> dict[str, Tensor]:
    """Return the state that `AdamW8bit` keeps of these moments."""
    state = {"step": torch.tensor(moments.step, dtype=torch.int64, device="cpu")}
    in_8_bits = "m_codes" in optimizer._new_state(param.to("meta"))
    for name, values in (("m", moments.m), ("v", moments.v)):
        flat = values.reshape(-1).contiguous()
        if in_8_bits:
            state[f"{name}_codes"], state[f"{name}_absmax"] = quantize_blockwise(flat, name, optimizer.block_size)
        else:
            state[name] = flat
    return state


def _check_values(number: str, moments: _Moments) -> None:
    # Compared so that a NaN fails.
    if not bool(moments.m.isfinite().all() & moments.v.isfinite().all() & (moments.v >= 0).all()):
        raise InputError(
            f"the state of parameter {number} holds NaN, infinities or a negative second moment; take an earlier one."
        )


def _step_of(number: str, values: dict[str, Any]) -> int:
    step = as_number(values["step"])
    if not 0 <= step < 2**62 or step != int(step):
        raise InputError(f"the step of parameter {number} is {values['step']!r}; a count of at least 0 is wanted.")
    return int(step)


def _check_names(number: str, values: dict[str, Any], wanted: Iterable[str], source: str, others: str) -> None:
    wanted, given = sorted(wanted), sorted(map(str, values))
    if given != wanted:
        raise InputError(
            f"the state of parameter {number} holds {given}; a state of {source} holds {wanted}, and states "
            f"of {others} cannot be taken over."
        )


def _check_tensor(number: str, name: str, value: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(value, Tensor) or value.shape != shape or value.dtype not in dtypes:
        given = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise InputError(f"{name} of parameter {number} is {given}; {wanted} {list(shape)} is wanted.")


# bitsandbytes


def _read_bitsandbytes(number: str, values: Any, param: Tensor) -> _Moments:
    values = {**values, **values.get(_WRAPPED, {})}
    values.pop(_WRAPPED, None)
    codes = values.get("state1")
    in_8_bits = isinstance(codes, Tensor) and codes.dtype == torch.uint8
    parts = ("state", "qmap", "absmax") if in_8_bits else ("state",)
    names = [f"{part}{which}" for part in parts for which in (1, 2)]
    _check_names(
        number, values, ["step", *names], "a block-wise bitsandbytes AdamW8bit",
        "other optimizers, percentile clipping or quantisation without blocks",
    )  # fmt: skip
    blocks = block_count(param.numel(), BITSANDBYTES_BLOCK_SIZE)
    for which in (1, 2):
        dtypes = (torch.uint8,) if in_8_bits else (torch.float32,)
        _check_tensor(number, f"state{which}", values[f"state{which}"], tuple(param.shape), dtypes)
        if in_8_bits:
            _check_tensor(number, f"qmap{which}", values[f"qmap{which}"], (256,), _FLOATS)
            # Also what tells the block size.
            _check_tensor(number, f"absmax{which}", values[f"absmax{which}"], (blocks,), _FLOATS)
    if in_8_bits:
        m, v = _decode_pair(values)
    else:
        m, v = values["state1"], values["state2"]
    return _Moments(_step_of(number, values), m, v)


def _decode(codes: Tensor, code_map: Tensor, absmax: Tensor) -> Tensor:
    """Return float32 [n] of codes uint8 [n], code_map [256] and absmax [ceil(n / 256)]."""
    scale = absmax.float().repeat_interleave(BITSANDBYTES_BLOCK_SIZE)[: codes.numel()]
    return code_map.float().index_select(0, codes.int()).mul_(scale)


def _decode_pair(values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    m, v = (_decode(values[f"state{k}"].reshape(-1), values[f"qmap{k}"], values[f"absmax{k}"]) for k in (1, 2))
    code_map = values["qmap2"].float()
    smallest = code_map.where(code_map > 0, torch.inf).amin()
    limit = (values["absmax2"].float() * (smallest / 2)).repeat_interleave(BITSANDBYTES_BLOCK_SIZE)[: v.numel()]
    v = torch.where((v == 0) & (m != 0), limit, v)
    return m.view(values["state1"].shape), v.view(values["state1"].shape)


def _write_bitsandbytes(moments: _Moments) -> dict[str, Any]:
    packed: dict[str, Any] = {"step": moments.step}
    for which, values in ((1, moments.m), (2, moments.v)):
        if values.numel() < BITSANDBYTES_MIN_8BIT_ELEMENTS:
            packed[f"state{which}"] = values
            continue
        code_map = dynamic_code_map(signed=which == 1).to(values.device)
        codes, absmax = _encode(values.reshape(-1), code_map)
        if which == 2:
            codes = torch.where(values.reshape(-1) > 0, codes.clamp_min(1), codes)
        packed[f"state{which}"] = codes.view(values.shape)
        packed[f"qmap{which}"], packed[f"absmax{which}"] = code_map, absmax
    return packed


def _encode(values: Tensor, code_map: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes uint8 [n], absmax float32 [ceil(n / 256)]): of each float32 value [n] the nearest of the map."""
    absmax = block_absmax(values, BITSANDBYTES_BLOCK_SIZE)
    scaled = values / absmax.repeat_interleave(BITSANDBYTES_BLOCK_SIZE)[: values.numel()]
    between = (code_map[1:] + code_map[:-1]) / 2
    return torch.bucketize(scaled, between, out_int32=True).to(torch.uint8), absmax


# torch


def _read_torch(number: str, values: Any, param: Tensor) -> _Moments:
    names = ("exp_avg", "exp_avg_sq")
    _check_names(number, values, ["step", *names], "torch.optim.AdamW without amsgrad", "other optimizers")
    for name in names:
        # In float16 small second moments are already 0.
        _check_tensor(number, name, values[name], tuple(param.shape), (torch.float32, torch.bfloat16))
    return _Moments(_step_of(number, values), values["exp_avg"].float(), values["exp_avg_sq"].float())


def _write_torch(moments: _Moments) -> dict[str, Any]:
    step = torch.tensor(float(moments.step), dtype=torch.float32, device="cpu")
    return {"step": step, "exp_avg": moments.m, "exp_avg_sq": moments.v}


def _hand_over(
    optimizer: AdamW8bit, settings: dict[str, Any], write: Callable[[_Moments], dict[str, Any]]
) -> dict[str, Any]:
    """Return a state dict whose groups have `settings` where ours say nothing."""
    numbers = count()
    packed: dict[str, Any] = {"state": {}, "param_groups": []}
    for group in optimizer.param_groups:
        numbered = {next(numbers): param for param in group["params"]}
        packed["param_groups"].append({**settings, **group, "params": list(numbered)})
        for number, param in numbered.items():
            state = optimizer.state.get(param)
            if not state:
                continue
            with optimizer.at_hand([param]):
                moments = _Moments(int(state["step"]), *optimizer.moments(param))
            if moments.m.shape != param.shape:
                raise InputError(
                    f"the moments of parameter {number} are those of a projected gradient {list(moments.m.shape)}; "
                    "optimizers that do not project cannot go on from them."
                )
            packed["state"][number] = write(moments)
    return packed
