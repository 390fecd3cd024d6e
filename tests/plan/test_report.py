"""A plan as text."""

from __future__ import annotations

import io

from rich.console import Console

from lisa_kernels.methods import LISA
from lisa_kernels.plan.cards import CARDS_GB, CONTEXT_BYTES
from lisa_kernels.plan.fit import Fit
from lisa_kernels.plan.options import finetune_command
from lisa_kernels.plan.rehearsal import Workload
from lisa_kernels.plan.report import headline, moment, print_fit, print_plan
from lisa_kernels.plan.result import Moment, Plan

from .traces import MB, sizes, small_run, trace

WORKLOAD = Workload("preset:tiny", LISA(), batch_size=2, seq_len=64, accumulate=3)


def printed(plan: Plan, width: int = 100) -> list[str]:
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=width))
    return out.getvalue().splitlines()


def test_the_headline_says_how_much_where_and_of_what() -> None:
    assert headline(Plan(WORKLOAD, small_run())) == (
        "190.0 MB at the peak, in step 1: backward, aten.mm.default of model.layers.3.mlp: lisa on preset:tiny, "
        "3 batches of 2 × 64 tokens, bf16, with gradient checkpointing"
    )


def test_a_moment_without_an_operation_is_its_phase() -> None:
    assert moment(Moment("attach", "", "")) == "in attach"


def test_the_split_is_sorted_and_leaves_out_what_is_not_there() -> None:
    lines = [line.split() for line in printed(Plan(WORKLOAD, small_run()))]
    assert ["weights", "100.0", "MB", "52.6%"] in lines
    names = [line[0] for line in lines[2:5]]
    assert names == ["weights", "saved", "gradients"]
    assert not any("pages" in line for line in lines)


def test_crumbs_are_left_out() -> None:
    """0.03 % of the peak are no line of the table, 0.07 % are."""
    run = trace((1, 997 * MB, "weights", "attach"), (2, 300_000, "loss", "attach"), (3, 700_000, "bases", "attach"))
    text = "\n".join(printed(Plan(WORKLOAD, run)))
    assert "loss" not in text
    assert "bases" in text


def test_every_card_has_a_verdict() -> None:
    """A run of 20 GB fits none of the cards of up to 16 GB, and all from 24 on."""
    lines = printed(Plan(WORKLOAD, sizes((1, 20_000 * MB))))
    cards = {
        line.split(" GB")[0].strip(): line for line in lines if " GB  " in line[:12] and ("yes" in line or "no" in line)
    }
    assert [int(card) for card in cards] == list(CARDS_GB)
    assert all((" yes, " in line) == (int(card) > 16) for card, line in cards.items())
    assert "missing" in cards["16"]
    assert "left" in cards["24"]


def test_what_fits_is_one_unbroken_line_to_be_copied() -> None:
    plan, out = Plan(WORKLOAD, sizes((1, 20 * 2**20))), io.StringIO()
    found = Fit(plan, expandable=False, rehearsals=1)
    print_fit([found], CONTEXT_BYTES + 30 * 2**20, None, Console(file=out, width=60))
    first, second = out.getvalue().splitlines()
    assert first == "fits 631.5 MB with 10.5 MB to spare:"
    assert second == finetune_command(WORKLOAD)
