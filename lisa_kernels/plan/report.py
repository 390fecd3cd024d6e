"""A plan as text: one sentence, where the peak goes, and which cards hold it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lisa_kernels.plan.cards import KEPT_BY_DRIVER
from lisa_kernels.plan.duration import Machine
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


def rows_sentence(plan: Plan) -> str:
    """Return what the data's rows hold, and of how many tokens the largest micro-batch is."""
    workload = plan.workload
    told, rows = workload.data.as_dict(workload.seq_len), workload.rows()
    return (
        f"{told['examples']:,} examples in {told['rows']:,} rows of up to {workload.seq_len} tokens, "
        f"{told['empty_share']:.1%} of these empty; the largest batch has {sum(map(len, rows))} examples of "
        f"{sum(map(sum, rows)):,} tokens"
    )


def moment(peak: Moment) -> str:
    """Return a moment as words."""
    at = f", {peak.operation}" if peak.operation else ""
    return f"in {peak.phase}{at}" + (f" of {peak.module}" if peak.module else "")


def print_plan(plan: Plan, console: Console) -> None:
    """Print the sentence, the split at the peak and the cards."""
    console.print(headline(plan), style="bold", markup=False, highlight=False, soft_wrap=True)
    if getattr(plan.workload, "data", None) is not None:
        console.print(rows_sentence(plan), highlight=False, soft_wrap=True)
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


def print_fit(ranked: Sequence[Fit], device_bytes: int, machine: Machine | None, console: Console) -> None:
    """Print the fastest that fits as a command line, with what it leaves, and the others beside it."""
    left = ranked[0].plan.margin_bytes(device_bytes, ranked[0].expandable)
    console.print(f"fits {gb(device_bytes)} with {gb(left)} to spare:", style="bold", highlight=False)
    # Unwrapped and unstyled, to be copied.
    console.print(
        finetune_command(ranked[0].plan.workload, ranked[0].expandable), markup=False, highlight=False, soft_wrap=True
    )
    if len(ranked) < 2 or machine is None:
        return
    console.print(f"fastest first, on {machine.name} by prediction; all of them teach the same:", highlight=False)
    table = Table("tokens/s", "rows at a time", "blocks recomputed", "to spare", box=None)
    for fit in ranked:
        said, workload = proposal_dict(fit, device_bytes, machine), fit.plan.workload
        recomputed = "all" if workload.checkpointed_blocks is None else str(workload.checkpointed_blocks)
        table.add_row(
            f"{said['tokens_per_second_low']:,.0f}-{said['tokens_per_second_high']:,.0f}",
            f"{workload.batch_size}, {workload.accumulate} times",
            recomputed if workload.gradient_checkpointing else "none", gb(said["margin_bytes"]),
        )  # fmt: skip
    console.print(table)


def proposal_dict(fit: Fit, device_bytes: int, machine: Machine | None) -> dict[str, Any]:
    """Return settings that fit as plain values, with their time on a machine where there is one."""
    time = {} if machine is None else fit.plan.duration(machine).as_dict()
    return {
        **{name: time.get(name) for name in ("machine", "tokens_per_second_low", "tokens_per_second_high")},
        "margin_bytes": fit.plan.margin_bytes(device_bytes, fit.expandable), "expandable_segments": fit.expandable,
        "command": finetune_command(fit.plan.workload, fit.expandable),
    }  # fmt: skip
