"""A plan as text: one sentence, where the peak goes, and which cards hold it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lisa_kernels.plan.cards import KEPT_BY_DRIVER
from lisa_kernels.plan.fit import Fit
from lisa_kernels.plan.options import finetune_command
from lisa_kernels.plan.result import Moment, Plan
from lisa_kernels.sizes import gb

SHOWN_FROM = 0.0005  # of the peak: what would be shown as 0.0 % is left out


def headline(plan: Plan) -> str:
    """Return the peak, what runs, and the moment of the peak, in one sentence."""
    workload = plan.workload
    checkpointing = ("with " if workload.gradient_checkpointing else "without ") + "gradient checkpointing"
    if workload.checkpointed_blocks is not None:
        checkpointing += f" of {workload.checkpointed_blocks} blocks"
    if workload.offload_activations:
        checkpointing += " in host memory"
    batches = f"{workload.accumulate} batches of " if workload.accumulate > 1 else ""
    return (
        f"{gb(plan.peak_bytes)} at the peak, {moment(plan.peak)}: {workload.method.name} on {workload.model}, {batches}"
        f"{workload.batch_size} × {workload.seq_len} tokens, {workload.dtype}, {checkpointing}"
    )


def moment(peak: Moment) -> str:
    """Return a moment as words."""
    at = f", {peak.operation}" if peak.operation else ""
    return f"in {peak.phase}{at}" + (f" of {peak.module}" if peak.module else "")


def print_plan(plan: Plan, console: Console) -> None:
    """Print the sentence, the split at the peak and the cards."""
    console.print(headline(plan), style="bold", markup=False, highlight=False, soft_wrap=True)
    split = Table("alive at the peak", box=None)
    for _ in ("bytes", "share"):
        split.add_column(justify="right")
    for category, size in sorted(plan.split.items(), key=lambda item: -item[1]):
        if size >= SHOWN_FROM * plan.peak_bytes > 0:
            split.add_row(category, gb(size), f"{size / plan.peak_bytes:.1%}")
    console.print(split)
    cards = Table("card", "it fits", "with expandable segments", box=None)
    for card in plan.cards():
        cards.add_row(f"{card.gb} GB", _verdict(card.margin_bytes), _verdict(card.margin_bytes_expandable))
    console.print(cards)
    console.print(
        f"torch's allocator reserves {gb(plan.reserved().reserved)}, with expandable_segments:True "
        f"{gb(plan.reserved(expandable=True).reserved)}; {gb(plan.context_bytes)} are allowed for CUDA itself. "
        f"A card of 24 GB is taken to have 24 GiB less the {KEPT_BY_DRIVER:.0%} that its driver keeps.",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    if plan.workload.length is not None:
        console.print(plan.workload.length.describe(plan.workload.method), highlight=False, soft_wrap=True)


def _verdict(margin_bytes: int) -> str:
    return f"yes, {gb(margin_bytes)} left" if margin_bytes >= 0 else f"no, {gb(-margin_bytes)} missing"


def print_fit(fit: Fit, device_bytes: int, console: Console) -> None:
    """Print what fits as a command line, with what it leaves."""
    left = fit.plan.margin_bytes(device_bytes, fit.expandable)
    console.print(f"fits {gb(device_bytes)} with {gb(left)} to spare:", style="bold", highlight=False)
    # Unwrapped and unstyled, to be copied.
    console.print(finetune_command(fit.plan.workload, fit.expandable), markup=False, highlight=False, soft_wrap=True)
