"""Checkpoint files: every value comes back as it was, and a folder is whole or not there."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lisa_kernels import InputError
from lisa_kernels.train.checkpoint import (
    find_checkpoints,
    load_tree,
    random_state,
    remove_leftovers,
    save_tree,
    set_random_state,
)

CPU = torch.device("cpu")


def test_a_tree_comes_back_with_values_and_dtypes(tmp_path: Path) -> None:
    tree = {
        "codes": torch.arange(256, dtype=torch.uint8),
        "half": torch.randn(3, 4).to(torch.bfloat16).t(),
        "empty": torch.empty(0),
        "nested": {0: {"step": torch.tensor(7)}, "list": [1, 2.5, None, True, "text", (3, torch.ones(2))]},
    }
    save_tree(tree, tmp_path, "state")
    back = load_tree(tmp_path, "state")
    assert back["codes"].dtype == torch.uint8
    assert torch.equal(back["codes"], tree["codes"])
    assert torch.equal(back["half"], tree["half"])
    assert back["half"].dtype == torch.bfloat16
    assert back["empty"].shape == (0,)
    assert int(back["nested"]["0"]["step"]) == 7
    assert back["nested"]["list"][:5] == [1, 2.5, None, True, "text"]
    assert torch.equal(back["nested"]["list"][5][1], torch.ones(2))


def test_there_is_no_pickle_in_it(tmp_path: Path) -> None:
    save_tree({"a": torch.ones(1), "random": random_state(CPU)}, tmp_path, "state")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_views_of_one_storage_are_saved_apart(tmp_path: Path) -> None:
    whole = torch.arange(10.0)
    save_tree({"a": whole[:5], "b": whole[3:]}, tmp_path, "state")
    assert torch.equal(load_tree(tmp_path, "state")["b"], whole[3:])


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_broken_checkpoint_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    save_tree({"a": torch.ones(100)}, tmp_path, "state")
    if damage == "missing":
        (tmp_path / "state.json").unlink()
    else:
        path = tmp_path / "state.safetensors"
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="not a whole checkpoint"):
        load_tree(tmp_path, "state")


def test_leftovers_of_a_killed_write_are_removed(tmp_path: Path) -> None:
    for name in ("checkpoint-3", ".checkpoint-4.partial", ".checkpoint-3.old"):
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_checkpoints_are_ordered_by_step(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-x", ".checkpoint-11.partial"):
        (tmp_path / name).mkdir()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10"]


def test_all_generators_continue_where_they_were(tmp_path: Path) -> None:
    save_tree({"random": random_state(CPU)}, tmp_path, "state")
    first = (random.random(), np.random.rand(), torch.rand(3).tolist())
    set_random_state(load_tree(tmp_path, "state")["random"], CPU)
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == first


class Gpus:
    """As many GPUs as asked for, of which nothing is there but a random state each."""

    def __init__(self, count: int) -> None:
        self.states = [torch.tensor([100 + number], dtype=torch.uint8) for number in range(count)]

    def put_in(self, monkeypatch: pytest.MonkeyPatch) -> Gpus:
        """Have torch.cuda speak of these."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(self.states))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(self.states))
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(self.states))
        monkeypatch.setattr(torch.cuda, "set_rng_state", self._set)
        return self

    def _set(self, state: torch.Tensor, device: int | torch.device) -> None:
        self.states[device if isinstance(device, int) else device.index] = state


# GPUs and device of the start, those of the resumption; what its generators then are, and the words of what is said.
MOVES = {
    "the same": (2, "cuda:0", 2, "cuda:0", [0, 1], ""),
    "fewer": (3, "cuda:0", 1, "cuda:0", [0], "with 3 GPUs in sight, and 1 are here"),
    "fewer, and the run's was another": (2, "cuda:1", 1, "cuda:0", [1], "with 2 GPUs in sight, and 1 are here"),
    "more": (1, "cuda:0", 3, "cuda:0", [0, 101, 102], "with 1 GPUs in sight, and 3 are here"),
    "another": (2, "cuda:0", 2, "cuda:1", [0, 0], ""),
    "onto the CPU": (1, "cuda:0", 0, "cpu", [], "written on cuda:0 and the run goes on on cpu"),
    "onto the CPU of the same machine": (1, "cuda:0", 1, "cpu", [100], "goes on on cpu"),
    "from the CPU": (0, "cpu", 2, "cuda:0", [100, 101], "written on cpu and the run goes on on cuda:0"),
    "from the CPU of a machine with GPUs": (1, "cpu", 1, "cpu", [100], ""),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_run_goes_on_where_there_are_other_gpus(move: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generators that are there are restored, the run's own wherever it is now, and what is not is said."""
    count, device, there, now, found, said = MOVES[move]
    before = Gpus(count).put_in(monkeypatch)
    for number in range(count):
        before.states[number] = torch.tensor([number], dtype=torch.uint8)
    save_tree({"random": random_state(torch.device(device))}, tmp_path, "state")
    drawn = torch.rand(3).tolist()
    after = Gpus(there).put_in(monkeypatch)
    notes = set_random_state(load_tree(tmp_path, "state")["random"], torch.device(now))
    assert [int(state) for state in after.states] == found
    assert len(notes) == bool(said)
    assert said in "".join(notes)
    assert torch.rand(3).tolist() == drawn


def test_a_checkpoint_that_does_not_name_its_device_is_of_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those were that runs wrote before they could be told a device."""
    Gpus(2).put_in(monkeypatch)
    state = random_state(torch.device("cuda:0"))
    del state["device"]
    after = Gpus(1).put_in(monkeypatch)
    assert set_random_state(state, torch.device("cuda:0"))
    assert [int(each) for each in after.states] == [100]
