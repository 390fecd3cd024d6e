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
    save_tree({"a": torch.ones(1), "random": random_state()}, tmp_path, "state")
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
    save_tree({"random": random_state()}, tmp_path, "state")
    first = (random.random(), np.random.rand(), torch.rand(3).tolist())
    set_random_state(load_tree(tmp_path, "state")["random"])
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == first
