"""What a launcher of several processes started is refused where one process is wanted."""

from __future__ import annotations

import pytest

from lisa_kernels import InputError, cli
from lisa_kernels.distributed import Launch, check_one_launched, environment_of_one, read_launch, read_launcher


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
    assert cli.main(["evaluate", "--model", "none", "--data", "none"]) == cli.USAGE_ERROR
    said = capsys.readouterr().err
    assert said.startswith("lisa-kernels evaluate: this command was started 2 times")
    assert said.count("\n") == 1


TORCHRUN = {
    "WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "9",
}  # fmt: skip


def test_a_process_knows_its_place() -> None:
    """As torchrun tells it; a single process has none."""
    assert read_launch(TORCHRUN) == Launch(rank=3, count=4, local_rank=1, local_count=2)
    assert read_launch({}) is None
    assert read_launch({**TORCHRUN, "WORLD_SIZE": "1"}) is None


def test_processes_that_cannot_find_each_other_are_refused() -> None:
    """A number alone, as some schedulers set it, and launchers that give no addresses."""
    with pytest.raises(InputError, match="one of 4 processes, and MASTER_PORT is not set"):
        read_launch({name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"})
    with pytest.raises(InputError, match=r"mpirun has started 2 processes \(PMI_SIZE=2\).*torchrun"):
        read_launch({"PMI_SIZE": "2"})


def test_a_launcher_is_known_over_its_restarts() -> None:
    """By the folder that torchrun makes for all its starts; what starts nothing again has no name."""
    first, again, other = (
        read_launcher({"TORCHELASTIC_ERROR_FILE": f"/tmp/{launch}/attempt_{number}/1/error.json"})
        for launch, number in (("a_1", 0), ("a_1", 3), ("a_2", 0))
    )
    assert first == again != other
    assert first.endswith(":/tmp/a_1")
    assert read_launcher({}) == ""


def test_a_process_without_others_is_told_of_none() -> None:
    """And of all else."""
    assert environment_of_one({**TORCHRUN, "HOME": "/here", "SLURM_STEP_NUM_TASKS": "2"}) == {"HOME": "/here"}
    assert read_launch(environment_of_one(TORCHRUN)) is None
