"""Masters in files: each is old or new at any instant, whatever becomes of the process that writes."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forked import in_another_process
from safetensors.torch import load_file
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.paging.masters import SUFFIX, MasterFolder
from lisa_kernels.paging.tensor_file import PARTIAL, header_of, mapped_whole

SHAPE = 64, 96
KILLS = 40


def master(number: int) -> Tensor:
    """Return the master of a generation."""
    return torch.full(SHAPE, float(number), dtype=torch.bfloat16)


def tiles(weight: Tensor) -> Iterator[Tensor]:
    yield from weight.split(8)


def test_a_master_is_written_in_tiles_and_mapped(tmp_path: Path) -> None:
    """Numbers begin on a page; what is written into the tensor is in no file."""
    folder = MasterFolder(tmp_path / "masters", 0)
    file = folder.file("layer.weight", torch.bfloat16, SHAPE)
    mapped = file.write(tiles(master(1)))
    assert torch.equal(mapped, master(1))
    mapped.fill_(7.0)
    [path] = (tmp_path / "masters").glob(f"*{SUFFIX}")
    assert header_of(path)[1] == 4096
    assert torch.equal(load_file(path)["layer.weight"], master(1))
    assert torch.equal(mapped_whole(path, torch.bfloat16, SHAPE), master(1))
    assert folder.bytes_written == path.stat().st_size == 4096 + 2 * 64 * 96
    later = file.write(tiles(master(2)))
    assert torch.equal(later, master(2))
    assert torch.equal(mapped, master(7))
    assert len(list((tmp_path / "masters").glob(f"*{SUFFIX}"))) == 1
    folder.close()
    assert torch.equal(later, master(2))
    assert not (tmp_path / "masters").exists()


def test_tiles_that_end_early_leave_the_one_before(tmp_path: Path) -> None:
    folder = MasterFolder(tmp_path, 0)
    file = folder.file("layer.weight", torch.bfloat16, SHAPE)
    before = file.write(tiles(master(1)))

    def broken() -> Iterator[Tensor]:
        yield master(2)[:8]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        file.write(broken())
    file.check()
    assert torch.equal(before, master(1))
    assert len(list(tmp_path.glob(f"*{SUFFIX}*"))) == 1
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_what_is_aside_goes_with_its_tensor(tmp_path: Path) -> None:
    folder = MasterFolder(tmp_path, 0)
    file = folder.file("layer.weight", torch.bfloat16, SHAPE)
    file.write(tiles(master(1)))
    aside = file.aside(tiles(master(5)))
    assert torch.equal(aside, master(5))
    assert len(list(tmp_path.glob(f"*{SUFFIX}"))) == 1
    file.check()
    assert folder.bytes_written == 2 * (4096 + 2 * 64 * 96)


def test_a_limit_of_the_system_is_one_sentence(tmp_path: Path) -> None:
    """A real one, on the size of files, in a process of its own: the write fails in the middle."""
    import resource

    def fail() -> None:
        folder = MasterFolder(tmp_path / "masters", 0)
        file = folder.file("layer.weight", torch.bfloat16, SHAPE)
        before = file.write(tiles(master(1)))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        with pytest.raises(InputError, match=r"cannot write the master of layer.weight into .*\(File too large\)"):
            file.write(tiles(master(2)))
        assert torch.equal(before, master(1))
        file.check()
        folder.close()
        os._exit(0)

    assert in_another_process(fail) == 0
    assert not (tmp_path / "masters").exists()


@pytest.mark.slow
def test_killed_at_any_instant_each_generation_is_whole(tmp_path: Path) -> None:
    """Forty kills while three masters are written over and over; the next start finds nothing that it refuses."""
    draw = random.Random(0)
    halves = 0

    def write() -> None:
        folder = MasterFolder(tmp_path / "masters", 0)
        files = [folder.file(f"layer.{number}.weight", torch.bfloat16, SHAPE) for number in range(3)]
        for generation in range(1, 100_000):
            for file in files:
                file.write(tiles(master(generation % 200)))

    for _ in range(KILLS):
        assert in_another_process(write, 0.02 + 0.1 * draw.random()) == -signal.SIGKILL
        found = sorted((tmp_path / "masters").glob(f"*{SUFFIX}"))
        for path in found:
            [(name, tensor)] = load_file(path).items()
            number = int(path.name.removesuffix(SUFFIX).rsplit(".", 1)[1])
            assert path.name.startswith(name)
            assert torch.equal(tensor, master(number % 200)), path.name
        halves += any((tmp_path / "masters").glob(f"*{SUFFIX}{PARTIAL}"))
    assert halves > 5
    MasterFolder(tmp_path / "masters", 0).close()
    assert not (tmp_path / "masters").exists()
