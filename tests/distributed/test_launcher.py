"""What a launcher of several processes started is refused where one process is wanted."""

from __future__ import annotations

import pytest

from lisa_kernels import InputError, cli
from lisa_kernels.distributed import check_one_launched


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_several_processes_are_refused(name: str) -> None:
    """Every launcher's own name for their number is known; the sentence says which it was."""
    with pytest.raises(InputError, match=rf"this run was started 2 times by .* \({name}=2\).*start it once"):
        check_one_launched("this run", {name: "2"})


@pytest.mark.parametrize("count", ["1", "", "many"])
def test_one_process_is_fine(count: str) -> None:
    """As `torchrun --nproc-per-node 1` starts it, and whatever is no number."""
    check_one_launched("this run", {"WORLD_SIZE": count})
    check_one_launched("this run", {})


def test_a_command_says_so_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever was given: no file is read, none written, and the exit code is that of a mistake."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["finetune", "--model", "none", "--data", "none", "--output", "none"]) == cli.USAGE_ERROR
    said = capsys.readouterr().err
    assert said.startswith("lisa-kernels finetune: this command was started 2 times")
    assert said.count("\n") == 1
