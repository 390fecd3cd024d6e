"""Find the settings of a run that fit a device, those that cost least first, and the fastest that teach the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lisa_kernels.errors import InputError
from lisa_kernels.methods import Method
from lisa_kernels.methods.precision import AS_THEY_ARE, is_picked
from lisa_kernels.methods.resting import check_resting
from lisa_kernels.plan.filling import filled, resting_bytes, written
from lisa_kernels.plan.result import Plan
from lisa_kernels.sizes import gb

if TYPE_CHECKING:
    from lisa_kernels.plan.rehearsal import Workload

FEW_LAYERS = 2  # what LISA was published with
SMALL_RANK = 32
NEIGHBOURS = 2  # sizes of micro-batches tried on either side
# Of the bytes of 8 bits, those with which a run learns as well: 0.001 less of SmolLM2's 0.48; with 80 % of them 0.008.
NEARLY = 0.9


@dataclass(frozen=True)
class Fit:
    """The plan that was found, whether it needs expandable segments, and how many workloads were rehearsed for it."""

    plan: Plan
    expandable: bool
    rehearsals: int


def fit(
    workload: Workload, device_bytes: int, make_plan: Callable[[Workload], Plan], blocks: int = 0,
    at_rest: Callable[[Workload], int] = resting_bytes,
) -> Fit:  # fmt: skip
    """Return the first of the settings, in order of preference, with which `workload` fits `device_bytes` in all.

    First what changes no result beyond rounding: fewer rows at a time and as many more accumulated (tokens per step
    stay), gradient checkpointing, its inputs offloaded to host memory, state paged to it (of methods that train every
    layer, and of layers that left where it is kept). Then what changes the training, see `lighter_workloads`. Memory
    falls along each of these lists, which are searched by halving.

    blocks: of the model, where not all need be recomputed: then as few are as fit. at_rest: what a size of resting
    weights bounds. Raises InputError, with the bytes that are missing, where nothing fits.
    """
    search = _Search(device_bytes, make_plan, at_rest)
    return search.result(_found(workload, search, blocks))


def proposals(
    workload: Workload, device_bytes: int, make_plan: Callable[[Workload], Plan], seconds: Callable[[Plan], float],
    blocks: int = 0, at_rest: Callable[[Workload], int] = resting_bytes,
) -> list[Fit]:  # fmt: skip
    """Return what `fit` finds and others that fit and teach the same, fastest first.

    They have other numbers of rows at a time, and as many in all, each with as few blocks recomputed as fit: more rows
    read the weights less often, fewer leave memory in which nothing is recomputed. seconds: of a step of a plan. Among
    equals the one that `fit` finds is first.
    """
    search = _Search(device_bytes, make_plan, at_rest)
    found = _found(workload, search, blocks)
    chosen = [found, *_other_batches(found, search, blocks)]
    return sorted((search.result(each) for each in chosen), key=lambda each: seconds(each.plan))


def _found(workload: Workload, search: _Search, blocks: int) -> Workload:
    found = workload if search.fits(workload) else _lighter(workload, search)
    if blocks and found.gradient_checkpointing and not found.offload_activations:
        found = search.first([*_fewer_recomputed(found, blocks), found]) or found
    return found


def _other_batches(found: Workload, search: _Search, blocks: int) -> Iterator[Workload]:
    """Yield the workload with fewer and with more rows at a time, as many in all, where those fit."""
    rows = found.batch_size * found.accumulate
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    place = sizes.index(found.batch_size)
    free = bool(blocks) and not found.offload_activations
    # Fewer rows save no time but by what they spare of recomputation.
    fewer = sizes[max(0, place - NEIGHBOURS) : place] if free and found.gradient_checkpointing else []
    for size in [*fewer, *sizes[place + 1 : place + 1 + NEIGHBOURS]]:
        resized = replace(found, batch_size=size, accumulate=rows // size)
        if free:
            every = replace(resized, gradient_checkpointing=True, checkpointed_blocks=None)
            choices = [*_fewer_recomputed(every, blocks), every]
            # More rows need at least as many blocks recomputed, unless gradients wait for others beside one of the two.
            at = choices.index(replace(every, **_recomputation(found)))
            if min(found.accumulate, resized.accumulate) > 1:
                choices = choices[at:] if size > found.batch_size else choices[: at + 1]
        else:
            choices = [resized]
        fitting = search.first(choices)
        if fitting is not None:
            yield fitting


def _recomputation(workload: Workload) -> dict[str, Any]:
    return {name: getattr(workload, name) for name in ("gradient_checkpointing", "checkpointed_blocks")}


def _lighter(workload: Workload, search: _Search) -> Workload:
    for lighter in lighter_workloads(workload, search.at_rest):
        best = search.first(lighter, search.fits_somehow)
        if best is not None:
            by_stage = (search.most_rows(stage) for stage in _stages(best))
            found = next(found for found in by_stage if found is not None)
            chosen = workload.resting is None and _may_be_filled(found)
            return filled(found, search.left, search.at_rest) if chosen else found
    raise search.nothing_fits(_most_frugal(lighter[-1]))


def _may_be_filled(workload: Workload) -> bool:
    """Return whether what is left of the card can go to more bits of what rests on it."""
    return _rests_on_device(workload) and (workload.resting == "nf4" or is_picked(workload.resting))


def _rests_on_device(workload: Workload) -> bool:
    return workload.resting_where in (None, "device")


def _fewer_recomputed(workload: Workload, blocks: int) -> Iterator[Workload]:
    """Yield the workload with none of its blocks recomputed, one, and so on, but for all of them."""
    yield replace(workload, gradient_checkpointing=False)
    for count in range(1, blocks):
        yield replace(workload, checkpointed_blocks=count)


class _Search:
    """Plans that were made, and which of them fit."""

    def __init__(
        self, device_bytes: int, make_plan: Callable[[Workload], Plan], at_rest: Callable[[Workload], int]
    ) -> None:  # fmt: skip
        self.device_bytes, self.make_plan, self.at_rest = device_bytes, make_plan, at_rest
        self.plans: list[Plan] = []

    def plan(self, workload: Workload) -> Plan:
        """Return the plan of a workload, made the first time."""
        for plan in self.plans:
            if plan.workload == workload:
                return plan
        self.plans.append(self.make_plan(workload))
        return self.plans[-1]

    def fits(self, workload: Workload) -> bool:
        """Tell whether the workload fits, with expandable segments if need be."""
        plan = self.plan(workload)
        return plan.fits(self.device_bytes) or plan.fits(self.device_bytes, expandable=True)

    def left(self, workload: Workload) -> int:
        """Return what the workload leaves, with expandable segments where that is more; below 0 what it lacks."""
        plan = self.plan(workload)
        return max(plan.margin_bytes(self.device_bytes, expandable) for expandable in (False, True))

    def first(
        self, workloads: Sequence[Workload], fits: Callable[[Workload], bool] | None = None
    ) -> Workload | None:  # fmt: skip
        """Return the first that fits of workloads that take less and less memory; None where the last does not."""
        fits = fits or self.fits
        if not fits(workloads[-1]):
            return None
        low, high = 0, len(workloads) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(workloads[middle]) else (middle + 1, high)
        return workloads[high]

    def most_rows(self, workload: Workload) -> Workload | None:
        """Return the workload with as many rows at a time as fit, and as many in all; None where not one does.

        Fewer take less memory, but for rows that come all at once: their gradients never wait for others'.
        """
        given, *fewer = _smaller_batches(workload)
        if not fewer or workload.accumulate > 1:
            return self.first([given, *fewer])
        found = self.first(fewer)
        too_many = fewer if found is None else fewer[: fewer.index(found)]
        if too_many and not self.lacks_gradients(too_many[-1]):
            return found
        return given if self.fits(given) else found

    def fits_somehow(self, workload: Workload) -> bool:
        """Tell whether the workload fits with one row at a time, or all of them, and all else that spares memory."""
        one, every = _most_frugal(workload), _stages(workload)[-1]
        return self.fits(one) or (every.accumulate == 1 and self.lacks_gradients(one) and self.fits(every))

    def lacks_gradients(self, workload: Workload) -> bool:
        """Tell whether what a workload that does not fit lacks is no more than the gradients alive at its peak."""
        return -self.left(workload) <= self.plan(workload).split.get("gradients", 0)

    def result(self, workload: Workload) -> Fit:
        """Return the plan of a workload that fits, and what it took to find it."""
        plan = self.plan(workload)
        return Fit(plan, not plan.fits(self.device_bytes), len(self.plans))

    def nothing_fits(self, smallest: Workload) -> InputError:
        """Return the error that says by how much the most frugal settings are too large."""
        plan, missing = self.plan(smallest), -self.left(smallest)
        return InputError(
            f"no setting of {smallest.method.name} fits {gb(self.device_bytes)}: the smallest"
            f" ({_described(smallest)}) takes {gb(self.device_bytes + missing)} with {gb(plan.context_bytes)} for CUDA"
            f" itself, {gb(missing)} too much; give a larger size, shorter rows, another method or a smaller model."
        )


def _described(workload: Workload) -> str:
    fields = ("active_layers", "rank", "embeddings")
    settings = [f"{name}={getattr(workload.method, name)}" for name in fields if hasattr(workload.method, name)]
    given = ((name, getattr(workload, name)) for name in ("resting", "resting_where"))
    settings += [f"{name}={value}" for name, value in given if value is not None]
    return ", ".join([*settings, f"batch {workload.batch_size} × {workload.seq_len}"])


def lighter_workloads(workload: Workload, at_rest: Callable[[Workload], int]) -> Iterator[list[Workload]]:
    """Yield lists of workloads, the first with the one given, each in less and less memory: lighter methods, at rest.

    Where weights are in 16 bits and could rest, they do so in 8 bits, or in a size of nearly as many bytes, before
    anything is given up, which changes a loss in its third digit, and in fewer only where all that can be given up is
    not enough: what "mixed" or "nf4" leaves then goes to a size. Where that is not enough either, or bits are given,
    they are streamed from the host before anything more is given up, unless it is said where they are: that changes no
    bit of what is learnt. at_rest: what a size of resting weights bounds.
    """
    methods = list(lighter_methods(workload.method))
    if workload.resting is None and _can_rest(workload):
        yield [workload]
        all_in_8, *lighter = (replace(workload, method=method, resting="int8") for method in methods)
        yield [all_in_8]
        if _rests_on_device(workload):
            least = at_rest(replace(workload, resting="nf4"))
            yield [replace(workload, resting=written(max(least, math.ceil(NEARLY * at_rest(all_in_8)))))]
        if lighter:
            yield lighter
        yield [replace(workload, resting="mixed")]
        if workload.resting_where is None:
            yield [replace(workload, resting="nf4")]
            yield [replace(workload, resting="int8", resting_where="host")]
        workload = replace(workload, resting="nf4", resting_where=workload.resting_where or "host")
    if workload.resting not in (None, AS_THEY_ARE) and workload.resting_where is None:
        yield [workload]
        workload = replace(workload, resting_where="host")
    yield [replace(workload, method=method) for method in methods]


def _can_rest(workload: Workload) -> bool:
    try:
        return check_resting("int8", workload.method, workload.ranks > 1) is not None
    except InputError:
        return False


def lighter_methods(method: Method) -> Iterator[Method]:
    """Yield `method` and then others that train less and less, each in less memory than the one before.

    The rank halved down to 32, which costs little where as many layers train; active layers one by one down to 2;
    embedding and head in low rank; a single active layer; embedding and head frozen, which costs most quality. What a
    method does not have is passed over.
    """
    yield method
    while method.get("rank", 0) >= 2 * SMALL_RANK and _uses_rank(method):
        method = _with(method, rank=method.get("rank", 0) // 2)
        yield method
    while method.get("active_layers", 0) > FEW_LAYERS:
        method = _with(method, active_layers=method.get("active_layers", 0) - 1)
        yield method
    if method.get("embeddings", None) in ("always", "sampled"):
        method = _with(method, embeddings="low-rank")
        yield method
    if method.get("active_layers", 0) > 1:
        method = _with(method, active_layers=1)
        yield method
    if method.get("embeddings", None) in ("low-rank", "with-first-block"):
        yield _with(method, embeddings="frozen")


def _with(method: Method, **settings: object) -> Method:
    return replace(method, **settings)  # type: ignore[arg-type]


def _uses_rank(method: Method) -> bool:
    return method.form != "full" or method.get("embeddings", None) in ("low-rank", "with-first-block")


def _smaller_batches(workload: Workload) -> Iterator[Workload]:
    """Yield the workload with ever fewer rows at a time, each a divisor of the one before, and as many in all."""
    rows = workload.batch_size * workload.accumulate
    batch = workload.batch_size
    yield workload
    while batch > 1:
        batch = next(size for size in range(batch // 2, 0, -1) if batch % size == 0)
        yield replace(workload, batch_size=batch, accumulate=rows // batch)


def _stages(workload: Workload) -> list[Workload]:
    """Return the workload as it is, with checkpointing, offloaded as well, and paged as well; each once."""
    checkpointed = replace(workload, gradient_checkpointing=True)
    offloaded = replace(checkpointed, offload_activations=True)
    stages = [workload, checkpointed, offloaded, _paged(offloaded)]
    return [stage for place, stage in enumerate(stages) if stage not in stages[:place]]


def _paged(workload: Workload) -> Workload:
    """Return the workload with its state in host memory; as it is where all state is in use at every step."""
    method = workload.method
    if method.get("retired_state", None) == "keep":
        return replace(workload, method=_with(method, retired_state="page"))
    if workload.paging is None and not hasattr(method, "period") and method.form != "adapter":
        return replace(workload, paging="host")
    return workload


def _most_frugal(workload: Workload) -> Workload:
    *_, last = _smaller_batches(_stages(workload)[-1])
    return last
