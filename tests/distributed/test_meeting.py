"""Processes of one start find each other in a store that is full of what earlier starts have left."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from lisa_kernels import InputError
from lisa_kernels.distributed import meeting
from lisa_kernels.distributed.meeting import agree_on_name


def names_of(store: dist.Store, order: list[int]) -> dict[int, str]:
    """Return what each of three ranks, begun in this order, takes for the name of its start."""
    found: dict[int, str] = {}
    threads = []
    for rank in order:
        threads.append(threading.Thread(target=lambda r=rank: found.update({r: agree_on_name(store, r, 3)})))
        threads[-1].start()
        threads[-1].join(0.05)
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0]], ids=["rank 0 first", "rank 0 last"])
def test_each_start_has_a_name_of_its_own(order: list[int]) -> None:
    """Of three starts in one store, all ranks of one have its name: none takes an earlier one's."""
    store = dist.HashStore()
    starts = [names_of(store, order) for _ in range(3)]
    assert all(len(found) == 3 for found in starts)
    assert [len(set(found.values())) for found in starts] == [1, 1, 1]
    assert len({found[0] for found in starts}) == 3


def test_who_waits_in_vain_says_for_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    """A word of an earlier start is no word of this one."""
    store = dist.HashStore()
    names_of(store, [0, 1, 2])
    monkeypatch.setattr(meeting, "PATIENCE_SECONDS", 0.1)
    with pytest.raises(InputError, match="rank 1 did not come within 0 seconds"):
        agree_on_name(store, 0, 3)
    with pytest.raises(InputError, match="rank 0 did not come"):
        agree_on_name(store, 1, 3)
