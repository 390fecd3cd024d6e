"""AdamW with 8-bit moments as a drop-in `torch.optim.Optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lisa_kernels.distributed.shards import is_sharded, local, sharded_among
from lisa_kernels.errors import InputError
from lisa_kernels.ops.adamw8 import FLOAT_DTYPES
from lisa_kernels.ops.blockwise8 import block_count
from lisa_kernels.ops.grad_norm import grad_norm
from lisa_kernels.ops.random_bits import keys_at
from lisa_kernels.optim.batches import Batch, KeyBases, by_device, gather, inputs_of, key_bases, with_gradients
from lisa_kernels.optim.moments import read_moments, write_moments
from lisa_kernels.optim.paged import PagedStates
from lisa_kernels.optim.settings import check_hyper, check_settings
from lisa_kernels.optim.sharded import (
    check_own,
    check_steppable,
    joined,
    measure_shards,
    place_among,
    state_for_all,
    state_from_all,
)
from lisa_kernels.paging import Store, open_store

# Tensors of fewer elements keep 32-bit moments, and 1-D ones unless they are so long that they can be no bias and no
# norm but only matrices laid flat: they are few bytes and the most sensitive.
MIN_8BIT_ELEMENTS, MIN_8BIT_VECTOR = 4096, 1 << 20
# The sum of a much larger gradient's squares, v / (1 − β₂), overflows float32 (for β₂ up to 1 − 3e-7), and an infinite
# scale would spoil its whole block.
LARGEST_GRADIENT = 1e16


class AdamW8bit(Optimizer):
    """AdamW whose moments take one byte each: `torch.optim.AdamW`'s update on E4M3 / E5M3 codes with block scales.

    Bytes of state per element: 2 + 8 / block_size (2.03 at 256); 8 for tensors below 4,096 elements, of one
    dimension below 2²⁰.
    Weights may be float32, bfloat16 or float16; those of 16 bits and both moments are rounded stochastically by
    default, with random numbers that depend on (seed, step, parameter index, element index) only. A step that meets a
    NaN, an infinity or a magnitude above 1e16 in any gradient changes nothing and is counted in `skipped_steps`.
    `step()` never waits for the device, and takes one pass over the gradients and one over everything. With
    `max_grad_norm` the gradients' 2-norm is clipped within these passes (`last_grad_norm` tells it); `GradScaler`'s
    unscaling is part of them too. `lr` may be a 0-d tensor, which a captured CUDA graph reads anew. Raises InputError
    for values out of range.

    paging: where the state is between steps: None (on the device), "host" (locked host memory), "managed" (CUDA's
    unified memory) or "file:DIR" (files, for state larger than memory). A step then brings it to the device in pages of
    up to 64 MiB, one ahead, and writes each back; the result is the same bit for bit.

    Update: Loshchilov and Hutter, arXiv 1711.05101; decay first, eps outside the square root.
    """

    _step_supports_amp_scaling = True
    _largest_gradient = LARGEST_GRADIENT
    # Set by GradScaler around step(), absent otherwise.
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, block_size: int = 256, rounding: str = "stochastic", seed: int = 0,
        max_grad_norm: float | None = None, paging: str | None = None,
    ) -> None:  # fmt: skip
        check_settings(block_size, rounding, max_grad_norm, paging)
        self.block_size = block_size
        self.rounding = rounding
        self.seed = seed
        self.max_grad_norm = max_grad_norm
        self.paging = paging
        self._paged: PagedStates | None = None
        # Steps taken and steps skipped, int64 0-d on the device of the first gradient.
        self._counters: tuple[Tensor, Tensor] | None = None
        self._indices: dict[Tensor, int] = {}
        self._key_bases = KeyBases()
        self._forget_last_step()
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._paged = self._page_states()
        if self._paged is not None:
            # Now, so that what cannot work is known before training.
            self._paged.check(map(self._device_of, self._params()))

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle needs, torch's share and our own."""
        self._bring_home()
        names = ("block_size", "rounding", "seed", "max_grad_norm", "paging", "_counters")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over `__getstate__`'s values; `load_state_dict` passes through here too."""
        super().__setstate__(state)
        if "paging" in state:
            self._paged = self._page_states()
        elif self._paged is not None:
            self._paged.clear()
        self._indices = {param: index for index, param in enumerate(self._params())}
        self._key_bases = KeyBases()
        self._forget_last_step()

    def _forget_last_step(self) -> None:
        # Was it skipped (bool 0-d), and how many steps it was, 0 or 1 (int64 0-d)?
        self._last_skip: dict[torch.device, Tensor] = {}
        self._last_taken: dict[torch.device, Tensor] = {}
        self._last_grad_norm: Tensor | None = None
        self._step_keys: dict[Tensor, Tensor] = {}

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer` does; its parameters take the next indices."""
        check_hyper({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            self._check_params(self.param_groups[-1])
        except InputError:
            self.param_groups.pop()
            raise
        self._indices = {param: index for index, param in enumerate(self._params())}

    def _check_params(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            if param.dtype not in FLOAT_DTYPES or param.layout is not torch.strided:
                raise InputError(
                    f"a parameter is {param.layout} {param.dtype}; dense float32, bfloat16 or float16 is wanted."
                )
            if is_sharded(param):
                check_steppable(param, self._in_8_bits(param), self.block_size)

    def index_of(self, param: Tensor) -> int:
        """Return the parameter's position over all groups, which keys its random numbers."""
        return self._indices[param]

    def _counters_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return (steps taken, steps skipped), int64 0-d on `device`; to be read only."""
        if self._counters is None:
            zero = torch.zeros((), dtype=torch.int64, device=device)
            self._counters = (zero, zero.clone())
        return self._counters[0].to(device), self._counters[1].to(device)

    @property
    def steps(self) -> int:
        """How many steps were taken; waits for the device."""
        return int(self._counters[0]) if self._counters else 0

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because a gradient was not finite; waits for the device."""
        return int(self._counters[1]) if self._counters else 0

    def last_skip(self, device: torch.device) -> Tensor:
        """Return a bool 0-d tensor on `device`: was the last step skipped? Costs no wait."""
        return self._last_skip[device]

    @property
    def last_grad_norm(self) -> Tensor | None:
        """The gradients' 2-norm before the last step clipped it, float32 0-d; None without `max_grad_norm`."""
        return self._last_grad_norm

    def _moment_shape(self, param: Tensor) -> torch.Size:
        """Return the shape of each moment: the parameter's, unless a subclass steps something smaller in its place."""
        return local(param).shape

    def _in_8_bits(self, param: Tensor) -> bool:
        """Return whether the moments are codes: of a sharded parameter as of the whole."""
        shape = param.shape if is_sharded(param) else self._moment_shape(param)
        return shape.numel() >= (MIN_8BIT_ELEMENTS if len(shape) >= 2 else MIN_8BIT_VECTOR)

    def _new_state(self, param: Tensor, device: torch.device | None = None) -> dict[str, Tensor]:
        shape, device = self._moment_shape(param), device or param.device
        n = shape.numel()
        state = {"step": torch.zeros((), dtype=torch.int64, device=device)}
        if self._in_8_bits(param):
            blocks = block_count(n, self.block_size)
            for name in ("m", "v"):
                state[f"{name}_codes"] = torch.zeros(n, dtype=torch.uint8, device=device)
                state[f"{name}_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=device)
        else:
            for name in ("m", "v"):
                state[name] = torch.zeros(n, dtype=torch.float32, device=device)
        return state

    # Paging

    @property
    def store(self) -> Store | None:
        """What keeps states that are paged; None where they stay on the device."""
        return None if self._paged is None else self._paged.open()

    def _page_states(self) -> PagedStates | None:
        """Return what keeps the states elsewhere than on the device; None where nothing does."""
        return None if self.paging in (None, "resident") else self._states_in(str(self.paging), stay=False)

    def _states_in(self, paging: str, stay: bool) -> PagedStates:
        return PagedStates(
            lambda: open_store(paging, self._identity()),
            lambda param: self._new_state(param, torch.device("meta")), self._unit_of, self._device_of, stay=stay,
        )  # fmt: skip

    def _identity(self) -> dict[str, Any]:
        """Return what tells this run's pages from another's."""
        shapes = [[str(param.dtype), *param.shape] for param in self._params()]
        return {"seed": self.seed, "block_size": self.block_size, "parameters": shapes}

    def _unit_of(self, param: Tensor) -> int:
        """Return the number of the unit that shares pages with no other."""
        return 0

    def _device_of(self, param: Tensor) -> torch.device:
        """Return where a parameter is when it trains, which is where its state is."""
        return param.device

    def at_hand(self, params: Iterable[Tensor]) -> AbstractContextManager[None]:
        """Have the states of these parameters on the device for a block that reads or writes them."""
        return nullcontext() if self._paged is None else self._paged.at_hand(self.state, params)

    def windows(self, params: Iterable[Tensor]) -> list[list[Tensor]]:
        """Return the parameters in lists to have at hand one after the other, as memory allows."""
        return [list(params)] if self._paged is None else self._paged.windows(params)

    def _bring_home(self) -> None:
        """Have paged states where they can be saved."""
        if self._paged is not None:
            self._paged.bring_home(self.state)

    def _unscaling(self, device: torch.device) -> Tensor:
        """Return the float32 0-d factor that undoes GradScaler's scale: 1 where none is at work."""
        scale = getattr(self, "grad_scale", None)
        if scale is None:
            return torch.ones((), dtype=torch.float32, device=device)
        return torch.reciprocal(scale.to(device, torch.float32).reshape(()))

    def unscaled(self, gradient: Tensor) -> Tensor:
        """Return a gradient as it is without GradScaler's scale."""
        is_scaled = getattr(self, "grad_scale", None) is not None
        return gradient * self._unscaling(gradient.device) if is_scaled else gradient

    def _measure(self, grads: dict[torch.device, list[Tensor]]) -> tuple[Tensor, Tensor]:
        """Return on the first device (take the step? bool 0-d, what to multiply the gradients by, float32 0-d)."""
        first = next(iter(grads))
        limit = self.max_grad_norm
        each = {device: [grad for grad in given if not is_sharded(grad)] for device, given in grads.items()}
        measured = [grad_norm(plain, squares=limit is not None).to(first) for plain in each.values() if plain]
        shards = sharded_among(grad for given in grads.values() for grad in given)
        if shards:
            measured.append(measure_shards(shards, limit is not None).to(first))
        # The largest of all, or a NaN, and the sum of the squares.
        largest, squares = (measured[0] if len(measured) == 1 else joined(torch.stack(measured))).unbind()
        unscaling = self._unscaling(first)
        # Compared so that a NaN counts as too large.
        took = largest * unscaling <= self._largest_gradient
        if getattr(self, "found_inf", None) is not None:
            took = took & (self.found_inf.to(first) <= 0).all()  # type: ignore[union-attr]
        if limit is None:
            return took, unscaling
        norm = squares.sqrt() * unscaling
        self._last_grad_norm = norm.to(torch.float32)
        # The small term is that of torch's clip_grad_norm_.
        return took, unscaling * (limit / (norm + 1e-6)).clamp_max(1.0).to(torch.float32)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step()
        return loss

    @torch.no_grad()
    def _take_step(self) -> None:
        """Do the work of `step`: for subclasses, whose `super().step()` would run every step hook twice."""
        if self._paged is not None:
            self._take_paged_step(self._paged)
            return
        batches = gather(self.param_groups, self._state_of)
        if batches:
            grads = [owner.grad for batch in batches for owner in batch.owners]
            grad_scale = self._begin_step(grads)  # type: ignore[arg-type]
            self._before_update()
            self._update(batches, grad_scale)

    def _before_update(self) -> None:
        """Do what has to wait until the gradients are known to be finite or not: for subclasses."""

    def _take_paged_step(self, paged: PagedStates) -> None:
        """Take a step window by window, the next one's states on their way meanwhile."""
        moving = [pair for group in self.param_groups for pair in with_gradients(group["params"])]
        if not moving:
            return
        windows = paged.windows(param for param, _ in moving)
        paged.prefetch(windows[0])
        # In the order of a step in one go, so that the gradients' norm is summed alike.
        grads: dict[tuple[torch.device, bool], list[Tensor]] = {}
        for param, grad in moving:
            grads.setdefault((param.device, self._in_8_bits(param)), []).append(grad)
        grad_scale = self._begin_step(grad for each in grads.values() for grad in each)
        self._before_update()
        self._key_bases.sets = max(self._key_bases.sets, 2 * len(windows))
        for window, following in zip(windows, [*windows[1:], []]):
            with paged.at_hand(self.state, window, make=True):
                paged.prefetch(following)
                self._update_window(set(window), grad_scale)

    def _update_window(self, window: set[Tensor], grad_scale: Tensor) -> None:
        """Update some parameters. No name outlives it that would keep their states' memory beside the next window's."""
        groups = [{**group, "params": [p for p in group["params"] if p in window]} for group in self.param_groups]
        self._update(gather(groups, self._state_of), grad_scale)

    def _begin_step(self, gradients: Iterable[Tensor]) -> Tensor:
        """Decide from all gradients whether this step is skipped, and count it; returns what to multiply them by."""
        grads: dict[torch.device, list[Tensor]] = {}
        for grad in gradients:
            grads.setdefault(grad.device, []).append(grad)
        took, grad_scale = self._measure(grads)
        self._step_keys = {}
        skip, taken = ~took, took.to(torch.int64)
        if self._counters is None:
            zero = torch.zeros((), dtype=torch.int64, device=took.device)
            self._counters = (zero, zero.clone())
        self._counters[0].add_(taken.to(self._counters[0].device))
        self._counters[1].add_(skip.to(self._counters[1].device))
        self._last_skip = {device: skip.to(device) for device in grads}
        self._last_taken = {device: taken.to(device) for device in grads}
        return grad_scale

    def _update(
        self, batches: Iterable[Batch], grad_scale: Tensor, owners: Mapping[Tensor, Tensor] | None = None
    ) -> None:
        """Update batches; random numbers are keyed by `owners`, the parameters that their tensors stand for, if any."""
        stochastic = self.rounding == "stochastic"
        for device, some in by_device(batches).items():
            skip, clock = self._last_skip[device], self._counters_on(device)[0]
            params = [param if owners is None else owners[param] for batch in some for param in batch.owners]
            bases = self._key_bases.on(device, self.seed, tuple([self._indices[param] for param in params]))
            scalars, keys = inputs_of(some, self._last_taken[device], grad_scale.to(device), bases, clock)
            self._step_keys.update(zip(params, keys.unbind()))
            sizes = [len(batch.params) for batch in some]
            for batch, its_scalars, its_keys in zip(some, scalars.split(sizes), keys.split(sizes)):
                batch.update(its_scalars, its_keys, skip, self.block_size, stochastic)

    def step_key(self, param: Tensor) -> Tensor | None:
        """Return the key of a parameter's random numbers at the step just taken, int64 0-d; None to round nearest."""
        return self._step_keys[param] if self.rounding == "stochastic" else None

    def _state_of(self, param: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[param]
        if not state:
            state.update(self._new_state(param))
        return state

    def moments(self, param: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 copies of (m, v) in the parameter's shape."""
        with self.at_hand([param]):
            state = self.state[param]
            m, v = read_moments(state, self._moment_shape(param), self.block_size)
            return (m.clone(), v.clone()) if "m" in state else (m, v)

    def set_moments(self, param: Tensor, m: Tensor, v: Tensor) -> None:
        """Replace the moments by float32 (m, v) of the parameter's shape, quantising them as a step would."""
        with self.at_hand([param]):
            (key,) = self.rewriting_keys([param])
            write_moments(self.state[param], m, v, self.block_size, key)

    def rewriting_keys(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """Return a key for `write_moments` for each of some parameters of one device, by their forms of state."""
        if self.rounding != "stochastic" or not any(map(self._in_8_bits, params)):
            return [None] * len(params)
        # Beyond the indices that parameters use, so that no step's random numbers are used twice.
        device, indices = params[0].device, [(1 << 32) + self._indices[param] for param in params]
        keys = keys_at(key_bases(device, self.seed, indices), self._counters_on(device)[0])
        return list(keys.unbind())

    def retire(self, params: Iterable[Tensor]) -> None:
        """Forget the state of these parameters and free its memory."""
        params = list(params)
        for param in params:
            self.state.pop(param, None)
        if self._paged is not None:
            self._paged.forget(params)

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain tensors and numbers: codes stay uint8, scales float32."""
        self._bring_home()
        packed = super().state_dict()
        params = self._saved_params(packed)
        for number, state in packed["state"].items():
            param = params[str(number)]
            if is_sharded(param):
                packed["state"][number] = state_for_all(param, state, self.block_size)
        names = ("steps", "skipped")
        packed["counters"] = dict(zip(names, self._counters)) if self._counters else {}
        packed["format"] = {"block_size": self.block_size, "seed": self.seed, **place_among(self._params())}
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over `state_dict()`'s values with their dtypes as they are.

        Refuses a state of another shape before it changes anything. The hyper-parameters of the groups are taken too,
        as in every torch optimizer, and the seed, so that the continuation is bit for bit that of a run never stopped.
        """
        taken: dict[str, Any] = {}

        def set_state_aside(_: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
            self._check_loadable(given)
            taken.update(given)
            return {**given, "state": {}}

        # torch's loader would cast codes and scales to the parameter's dtype: it gets the groups only. Ours runs after
        # the user's hooks that change the state and before those that read the result.
        aside = self.register_load_state_dict_pre_hook(set_state_aside)
        fill = self.register_load_state_dict_post_hook(lambda _: self._take_state(taken), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            aside.remove()
            fill.remove()

    def _saved_params(self, state_dict: dict[str, Any]) -> dict[str, Tensor]:
        """Return the parameter that each saved number stands for, by that number as a string."""
        numbers = [str(number) for group in state_dict["param_groups"] for number in group["params"]]
        return dict(zip(numbers, self._params()))

    def _take_state(self, state_dict: dict[str, Any]) -> None:
        params = self._saved_params(state_dict)
        for number, values in state_dict["state"].items():
            param = params[str(number)]
            values = state_from_all(param, values, self.block_size)
            # Those that get a page are copied into it.
            move, device = self._paged is None, self._device_of(param)
            self.state[param] = {n: value.to(device, copy=True) if move else value for n, value in values.items()}
        if self._paged is not None:
            self._paged.adopt(self.state)
        self.seed = state_dict.get("format", {}).get("seed", self.seed)
        counters = state_dict.get("counters")
        self._counters = None
        if counters:
            device = self._device_of(self._params()[0])
            steps, skipped = (counters[name].to(device, copy=True) for name in ("steps", "skipped"))
            self._counters = (steps, skipped)

    def _check_loadable(self, state_dict: dict[str, Any]) -> None:
        saved_block_size = state_dict.get("format", {}).get("block_size", self.block_size)
        if saved_block_size != self.block_size:
            raise InputError(
                f"the state was saved with block_size={saved_block_size}; this optimizer has {self.block_size}."
            )
        check_own(state_dict.get("format", {}), self._params())
        saved = [len(group["params"]) for group in state_dict["param_groups"]]
        here = [len(group["params"]) for group in self.param_groups]
        if saved != here:
            raise InputError(f"the state has parameter groups of {saved} parameters; this optimizer has {here}.")
        for group in state_dict["param_groups"]:
            check_hyper(group)
        params = self._saved_params(state_dict)
        for number, values in state_dict["state"].items():
            if str(number) not in params:
                raise InputError(f"the state is of a parameter {number} that is in none of its groups.")
            expected = self._new_state(params[str(number)], torch.device("meta"))
            values = state_from_all(params[str(number)], values, self.block_size)
            given = {name: (tuple(value.shape), value.dtype) for name, value in values.items()}
            wanted = {name: (tuple(value.shape), value.dtype) for name, value in expected.items()}
            if given and given != wanted:
                raise InputError(f"the state of parameter {number} is {given}; this optimizer needs {wanted}.")
