"""What a step of Llama-2-7B costs by count: operations, bytes, launches, and the time that a card would take for them.

Ours and peers' steps are rehearsed without weights, one row of 1024 tokens in bfloat16, and every operation is counted
as it is dispatched: with all blocks recomputed, and with as few as a card of 24 GB allows. Layers are drawn as deep as
a draw is on average. Rows that exist are not counted again.

    python -m bench.work                # what is missing, then the table into bench/README.md
    python -m bench.work --again        # count anew what is there, with as many blocks recomputed as it has
    python -m bench.work --report       # the table alone
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

from bench.memory_runs import PEERS, planned_peer
from bench.readme import markdown, put
from bench.rows import append_row, read_rows
from lisa_kernels import LISA, FullFineTune, GaLore, LoRA, OwLore
from lisa_kernels.methods import Method
from lisa_kernels.plan.cards import card_bytes
from lisa_kernels.plan.duration import Duration, predict
from lisa_kernels.plan.gpu_memory import GpuMemory
from lisa_kernels.plan.machines import CARDS
from lisa_kernels.plan.rehearsal import Workload, rehearse
from lisa_kernels.plan.result import Plan
from lisa_kernels.plan.trace import Trace
from lisa_kernels.plan.work import WorkLog

ROWS, MODEL, BLOCKS, CARD_GB = "work", "preset:llama-2-7b", 32, 24
# All blocks recomputed, or as few as fill the card.
ALL, FILLING = "", f"{CARD_GB} GB"
CARD = CARDS["rtx-4090"]
PEER = "peft LoRA, AdamW fused"


def owlore(**settings: Any) -> OwLore:
    return OwLore(5, 50, rank=128, scores="uniform", **settings)


METHODS: dict[str, Method] = {
    "OwLore, embeddings frozen, shallow draws": owlore(embeddings="frozen", design="shallow"),
    "OwLore, embeddings frozen": owlore(embeddings="frozen"),
    "OwLore, embeddings low-rank": owlore(),
    "LISA(2)": LISA(2),
    "GaLore(rank=32), embeddings low-rank": GaLore(rank=32, embeddings="low-rank"),
    "LoRA(rank=16), embeddings low-rank": LoRA(rank=16, embeddings="low-rank"),
    "FullFineTune()": FullFineTune(),
}
PEER_NAMES = ("peft-lora", "badam", "torch-full")


def rows(known: Collection[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each method and each peer in both settings, those left out that are known."""
    for name, method in METHODS.items():
        for fills in (ALL, FILLING):
            if (name, fills) not in known:
                asked = _settled(Workload(MODEL, method), fills, lambda each: rehearse(each, gpu=GpuMemory.here()))
                if asked is not None:
                    yield _row(name, False, fills, asked, Plan(asked, Trace(())).duration(CARD))
    for name in PEER_NAMES:
        peer = PEERS[name]
        for fills in (ALL, FILLING):
            if (peer.title, fills) not in known:
                asked = _settled(Workload(MODEL, LoRA(rank=16)), fills, partial(planned_peer, peer))
                if asked is not None:
                    work = WorkLog()
                    planned_peer(peer, asked, work)
                    yield _row(peer.title, True, fills, asked, predict(work, asked, CARD, None))


def again(known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rows that exist, counted anew."""
    peers = {PEERS[name].title: PEERS[name] for name in PEER_NAMES}
    for row in {(row["method"], row["fills"]): row for row in known}.values():
        name, blocks = row["method"], row["recomputed_blocks"]
        workload = Workload(MODEL, METHODS.get(name, LoRA(rank=16)))
        asked = _recomputing(workload, 0 if blocks == 0 else blocks if blocks < BLOCKS else None)
        if row["peer"]:
            work = WorkLog()
            planned_peer(peers[name], asked, work)
            yield _row(name, True, row["fills"], asked, predict(work, asked, CARD, None))
        else:
            yield _row(name, False, row["fills"], asked, Plan(asked, Trace(())).duration(CARD))


def _settled(workload: Workload, fills: str, trace: Callable[[Workload], Trace]) -> Workload | None:
    """Return the workload with all blocks recomputed, or as few as the card allows; None where it does not fit."""
    if fills == ALL:
        return workload

    def fits(blocks: int) -> bool:
        asked = _recomputing(workload, blocks)
        return Plan(asked, trace(asked)).fits(card_bytes(CARD_GB), expandable=True)

    if not fits(BLOCKS):
        return None
    low, high = 0, BLOCKS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return _recomputing(workload, high)


def _recomputing(workload: Workload, blocks: int | None) -> Workload:
    return dataclasses.replace(workload, gradient_checkpointing=blocks != 0, checkpointed_blocks=blocks or None)


def _row(name: str, peer: bool, fills: str, workload: Workload, found: Duration) -> dict[str, Any]:
    recomputed = workload.checkpointed_blocks or (BLOCKS if workload.gradient_checkpointing else 0)
    return {
        "method": name, "peer": peer, "fills": fills, "recomputed_blocks": recomputed, "operations": found.products,
        "bytes": found.bytes, "launches": found.launches, "seconds": list(found.step), "card": CARD.name,
    }  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """Return the Markdown table, those of least operations first."""
    latest = {(row["method"], row["fills"]): row for row in found}
    peers = {row["fills"]: row for row in latest.values() if row["method"] == PEER}
    lines = []
    for (name, fills), row in sorted(latest.items(), key=lambda item: (item[0][1], item[1]["operations"])):
        beside = [f"{row[field] / peers[fills][field]:.2f}×" for field in ("operations", "bytes", "launches")]
        lines.append([
            name, f"{row['recomputed_blocks']}", f"{row['operations'] / 1e12:.1f} ({beside[0]})",
            f"{row['bytes'] / 1e9:.0f} ({beside[1]})", f"{row['launches']:,} ({beside[2]})",
            "{:.2f}-{:.2f} s".format(*row["seconds"]),
        ])  # fmt: skip
    head = [
        "method", "blocks recomputed", "1e12 operations (LoRA = 1)", "GB moved", "launches", f"{CARD.name}, predicted"
    ]  # fmt: skip
    return markdown(head, lines)


def main() -> None:
    """Count, append and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="only write the table from the rows that exist")
    parser.add_argument("--again", action="store_true", help="count anew what is there")
    given, known = parser.parse_args(), read_rows(ROWS)
    if not given.report:
        for row in again(known) if given.again else rows({(row["method"], row["fills"]) for row in known}):
            append_row(ROWS, row)
            print(row, flush=True)
    put("work", table(read_rows(ROWS)))
    print(table(read_rows(ROWS)))


if __name__ == "__main__":
    main()
