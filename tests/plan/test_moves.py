"""What a rehearsal says of the copies between host and device."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from families import llama

from lisa_kernels import OwLore
from lisa_kernels.plan.gpu_memory import GpuMemory
from lisa_kernels.plan.moves import CODES_IN, MASTERS_IN, MASTERS_OUT, moves_of
from lisa_kernels.plan.rehearsal import Workload, rehearse

LAYERS = 4


@pytest.mark.slow
def test_layers_that_leave_come_and_go_and_codes_come() -> None:
    """The masters of those that leave at the switches, whole, and blocks of codes one by one, all within the trace."""
    config = llama(LAYERS, hidden_size=64, intermediate_size=96).config
    method = OwLore(active_layers=1, rank=4, scores="uniform", embeddings="frozen")
    workload = Workload(config, method, seq_len=8, dtype="bf16", resting="nf4", resting_where="host")
    moves, trace = moves_of(workload), rehearse(workload, gpu=GpuMemory.here())
    events, found = [move.event for move in moves], Counter[str]()
    for move in moves:
        found[move.kind] += move.bytes
    assert events == sorted(events)
    assert events[0] >= 0
    assert events[-1] <= len(trace.events)
    # q, k, v, o, gate, up and down, 16 bits each.
    layer = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96)
    assert found[MASTERS_IN] == found[MASTERS_OUT] > 0
    assert found[MASTERS_IN] % layer == 0
    blocks = {move.bytes for move in moves if move.kind == CODES_IN}
    assert len(blocks) == 1
    assert found[CODES_IN] >= 3 * LAYERS * blocks.pop()
    assert moves_of(replace(workload, resting=None, resting_where=None)) == []
