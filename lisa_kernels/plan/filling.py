"""What a plan leaves of a card goes to weights at rest: the largest size for them with which the run still fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from lisa_kernels.methods.resting import Kinds
from lisa_kernels.methods.survey import survey_model
from lisa_kernels.train.empty_model import empty_model

if TYPE_CHECKING:
    from lisa_kernels.plan.rehearsal import Workload

# A size is right at once but for how the allocator cuts its segments.
TRIES = 3
# Of a size, what may be left beside it.
NEAR = 0.004


def resting_bytes(workload: Workload) -> int:
    """Return the bytes that a size such as "5.5GB" bounds, of a workload whose weights rest."""
    assert workload.resting is not None
    return Kinds(workload.resting, survey_model(empty_model(workload.model, workload.dtype), workload.method)).nbytes


def filled(
    workload: Workload, left: Callable[[Workload], int], at_rest: Callable[[Workload], int] = resting_bytes
) -> Workload:  # fmt: skip
    """Return a workload that fits, its weights at rest in as many bits as fit too; as it is where these are no more.

    left: what a workload leaves of the card, below 0 what it lacks. The size is what its matrices take, but for digits:
    a run measures what each of them loses, and one that finds others to lose most has no more room for them.
    """
    best, least = workload, at_rest(workload)
    budget = least + left(workload)
    for _ in range(TRIES):
        # One that is too small is refused.
        taken = least if budget <= least else at_rest(replace(workload, resting=str(budget)))
        if taken <= least:
            break
        tried = replace(workload, resting=written(taken))
        over = left(tried)
        if over >= 0:
            best = tried
        if 0 <= over < NEAR * taken:
            break
        # Of a small model a segment more or less is nearly all that is over.
        budget = max(taken + over, (least + taken) // 2)
    return best


def written(nbytes: int) -> str:
    """Return a number of bytes as people write a size, no less than it and by less than 1 MB more: "5.311GB"."""
    for unit, name, digits in ((10**9, "GB", 3), (10**6, "MB", 2)):
        if nbytes >= unit:
            whole = -(-nbytes * 10**digits // unit)
            return f"{whole / 10**digits:.{digits}f}{name}"
    return str(nbytes)
