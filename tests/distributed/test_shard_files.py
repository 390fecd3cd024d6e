"""A folder that ranks write together holds a state's sharded tensors by shards and the rest once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed.ranks import on_ranks
from lisa_kernels import InputError
from lisa_kernels.distributed import local, read_state, read_tensors, write_together

TABLE = torch.arange(15.0).view(5, 3)


def state_of(table: Tensor) -> dict[str, Any]:
    return {"state": {"0": {"m": table, "step": torch.tensor(7)}}, "names": ["a", "b"], "none": None}


def shard(tensor: Tensor) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(tensor, init_device_mesh("cpu", (2,)), [Shard(0)])


def write(rank: int, folder: Path) -> bool:
    """Write twice, and read the second as shards."""
    for factor in (1, 2):
        write_together(folder, {"weight": shard(factor * TABLE)}, state_of(shard(3 * factor * TABLE)))
    weight = shard(torch.zeros(5, 3))
    state = read_tensors(folder, {"weight": weight}, read_state(folder), lambda path: weight)
    m = state["state"]["0"]["m"]
    return local(weight).equal(local(shard(2 * TABLE))) and local(m).equal(local(shard(6 * TABLE)))


def test_what_ranks_wrote_is_read_by_them_and_by_one_process(tmp_path: Path) -> None:
    """The newer in the place of the older, with nothing of more ranks that were killed; all else is as it was."""
    folder = tmp_path / "together"
    left = tmp_path / ".together.partial" / "__7_0.distcp"
    left.parent.mkdir()
    left.write_bytes(b"half")
    assert on_ranks(write, folder) == [True, True]
    weight, asked = torch.zeros(5, 3), list[tuple[Any, ...]]()

    def like(path: tuple[Any, ...]) -> Tensor:
        asked.append(path)
        return weight

    state = read_tensors(folder, {"weight": weight}, read_state(folder), like)
    assert asked == [("state", "0", "m")]
    assert torch.equal(weight, 2 * TABLE)
    assert torch.equal(state["state"]["0"]["m"], 6 * TABLE)
    assert (int(state["state"]["0"]["step"]), state["names"], state["none"]) == (7, ["a", "b"], None)
    assert [path.name for path in tmp_path.iterdir()] == ["together"]
    assert not (folder / left.name).exists()


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no checkpoint that ranks wrote together"):
        read_state(tmp_path)


def fails(rank: int, folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        write_together(folder, {"weight": shard(TABLE)}, {})
    return str(caught.value)


def test_a_rank_that_cannot_write_stops_all_of_them(tmp_path: Path) -> None:
    """In one sentence on each."""
    file = tmp_path / "file"
    file.touch()
    for said in on_ranks(fails, file / "folder"):
        assert "could not be written: rank 0 met" in said
        assert "\n" not in said
