"""What ranks send each other, as text."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lisa_kernels.errors import InputError
from lisa_kernels.plan.links import LINKS
from lisa_kernels.plan.machines import Seconds
from lisa_kernels.plan.ranks import HIDDEN
from lisa_kernels.plan.result import Plan


def check_ranks(ranks: int, shard: bool) -> None:
    """Raise InputError for a number of processes that is none, and for one that would share the weights with nobody."""
    if ranks < 1:
        raise InputError(f"--ranks is {ranks}; at least 1 is wanted.")
    if shard and ranks == 1:
        raise InputError("--shard shares the weights out among ranks, and there is one; give --ranks too.")


def travel_sentences(plan: Plan) -> list[str]:
    """Return what there is to say of the bytes of a step, by kind; nothing of a single rank."""
    travel = plan.travel
    if travel is None:
        return []
    said = [
        f"each of {travel.ranks} ranks, whose peak that is, sends {travel.gradients / 1e6:,.2f} MB of gradients a step "
        f"and on average {travel.sketches / 1e6:,.2f} MB of what bases are found from "
        f"({travel.first_bases / 1e6:,.1f} MB in a step after a switch)"
        + (f"; rank 0 sends {travel.broadcast / 1e6:,.2f} MB of bases" if travel.broadcast else "")
    ]
    if plan.workload.shard:
        said.append(
            f"weights are shared out: {travel.gathered / 1e6:,.2f} MB of them are gathered a step, and "
            f"{travel.scattered / 1e6:,.2f} MB of gradients of them scattered as sums, bytes of all ranks together; "
            "gathers may hide behind products, which is not reckoned here"
        )
    return said


def print_travel(plan: Plan, console: Console) -> None:
    """Print the bytes of a step, and how long each link takes for them; nothing of a single rank."""
    travel = plan.travel
    if travel is None:
        return
    for sentence in travel_sentences(plan):
        console.print(sentence, highlight=False, soft_wrap=True)
    table = Table("link", "a step's part of it", "hidden behind the backward", box=None)
    for link in LINKS:
        table.add_row(link.name, _milliseconds(travel.seconds(link)), f"{HIDDEN:.0%}")
    console.print(table)


def _milliseconds(seconds: Seconds) -> str:
    return f"{seconds.low * 1e3:,.1f}-{seconds.high * 1e3:,.1f} ms"
