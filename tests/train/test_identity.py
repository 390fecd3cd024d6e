"""What a run is made of: checksums that change with every token, label, order and weight, and with nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lisa_kernels.errors import InputError
from lisa_kernels.train.identity import check_unchanged, checksum_of_folder, checksum_of_rows


def row(ids: list[int], labels: list[int]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def test_rows_that_differ_in_anything_differ() -> None:
    """Tokens, labels, order, where a row ends."""
    rows = [row([1, 2], [-100, 2]), row([3, 4], [3, 4])]
    others = [
        [row([1, 5], [-100, 2]), rows[1]],
        [row([1, 2], [1, 2]), rows[1]],
        rows[::-1],
        rows[:1],
        [row([1, 2, 3, 4], [-100, 2, 3, 4])],
        [],
    ]
    sums = [checksum_of_rows(rows), *map(checksum_of_rows, others)]
    assert len(set(sums)) == len(sums)
    assert checksum_of_rows([dict(one) for one in rows]) == sums[0]


def test_a_model_that_was_trained_on_is_another(tmp_path: Path) -> None:
    """Weights in the first or the last megabyte, a setting; not what lies beside them."""
    (tmp_path / "config.json").write_text("{}")
    weights = torch.zeros(1 << 20)
    save_file({"weights": weights}, tmp_path / "model.safetensors")
    before = checksum_of_folder(tmp_path)
    (tmp_path / "README.md").write_text("about it")
    assert checksum_of_folder(tmp_path) == before
    for place in (0, -1):
        changed = weights.clone()
        changed[place] = 1
        save_file({"weights": changed}, tmp_path / "model.safetensors")
        assert checksum_of_folder(tmp_path) != before
    save_file({"weights": weights}, tmp_path / "model.safetensors")
    assert checksum_of_folder(tmp_path) == before
    (tmp_path / "config.json").write_text('{"rope_theta": 1}')
    assert checksum_of_folder(tmp_path) != before


def test_a_change_is_one_sentence_and_a_run_without_checksums_goes_on(tmp_path: Path) -> None:
    now = {"rows": "a", "held_out": "b", "model": "c"}
    check_unchanged({}, now, tmp_path)
    check_unchanged(now, now, tmp_path)
    for name, said in (("rows", "training data have changed"), ("held_out", "held-out"), ("model", "--model")):
        with pytest.raises(InputError, match=said):
            check_unchanged({**now, name: "other"}, now, tmp_path)
