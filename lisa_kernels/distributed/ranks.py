"""The processes that train one model together: what they tell each other, and the sums of their tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from lisa_kernels.distributed.connections import ending_when_unheard
from lisa_kernels.distributed.digests import digests
from lisa_kernels.distributed.launcher import Launch
from lisa_kernels.distributed.meeting import find_store
from lisa_kernels.errors import InputError

T = TypeVar("T")
# How long ranks that have all come wait for each other's addresses: of one that died since nothing ends by itself.
SET_UP_SECONDS = 25.0
# In what gloo says of a connection.
TRANSPORT = "gloo/transport"


class LostRankError(InputError):
    """Another process is gone, or cannot be reached."""


class Ranks:
    """Several processes that do the same at the same time.

    Before tensors travel, the ranks tell each other in 8 bytes between CPUs what for. Where they have come for
    different things, all of them raise one sentence, and none waits for what never comes.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        # Whether they have devices of several kinds, which may differ in the last bits of a product.
        self.mixed = False
        # Of our own: words for others never come between.
        members = dist.get_process_group_ranks(group)
        self._whole = len(members) == dist.get_world_size()
        patience = default_pg_timeout
        with ending_when_unheard(), _heard():
            if carries("cpu", group):
                # Where one is gone its connections end this; and then all of them have come.
                dist.all_reduce(torch.zeros(1), group=group)
                patience = timedelta(seconds=SET_UP_SECONDS)
            self._between_cpus = dist.new_group(
                members, backend="gloo", use_local_synchronization=not self._whole, timeout=patience
            )
            # One that has its connections and leaves closes them while others still make theirs.
            dist.all_reduce(torch.zeros(1), group=self._between_cpus)
        _wait_for_work(self._between_cpus)

    def close(self) -> None:
        """Give up the group that words travel in."""
        # That of a part of the processes would be made anew under its old name, and meet what is left of this one.
        if self._whole and dist.is_initialized():
            dist.destroy_process_group(self._between_cpus)
        self._whole = False

    def check_carries(self, device: torch.device) -> None:
        """Raise InputError unless the group's tensors can be of this device."""
        if not carries(device.type, self.group):
            config = dist.get_backend_config(self.group)
            raise InputError(
                f"the model is on {device} and the process group carries other tensors ({config}); make it with "
                f'init_process_group() without a backend, or with backend="{_usual(device)}".'
            )

    def tell(self, value: Any) -> list[Any]:
        """Return what each rank told, in their order; any plain value."""
        found: list[Any] = [None] * self.count
        with _heard():
            dist.all_gather_object(found, value, group=self._between_cpus)
        return found

    def meet(self, occasion: str) -> None:
        """Raise InputError on all ranks unless every one has come for the same; `occasion` follows "rank 0 "."""
        number = int.from_bytes(hashlib.sha256(occasion.encode()).digest()[:7], "big")
        numbers = self._gathered(torch.tensor([number]))
        if bool((numbers != number).any()) or len(numbers.unique()) > 1:
            said = self.tell(occasion)
            other = next(rank for rank, each in enumerate(said) if each != said[0])
            raise InputError(
                f"the ranks are not at the same place: rank 0 {said[0]}, rank {other} {said[other]}; every rank has to "
                "take as many backwards and steps, through the same layers (an expert without tokens on one rank is "
                "not the same: train such models by a full-rank method)."
            )

    def _gathered(self, words: Tensor) -> Tensor:
        """Return [ranks, n] for int64 [n] of each rank, on the CPU."""
        found = [torch.empty_like(words) for _ in range(self.count)]
        with _heard():
            dist.all_gather(found, words, group=self._between_cpus)
        return torch.stack(found)

    def any_has(self, flags: list[bool]) -> list[bool]:
        """Return, for each of as many flags on all ranks, whether it is set on one of them."""
        return self._gathered(torch.tensor(flags, dtype=torch.int64)).any(0).tolist() if flags else []

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add up a contiguous tensor over the ranks, in place; all of them get the same bits."""
        with _heard():
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def take_first_(self, tensor: Tensor) -> Tensor:
        """Put rank 0's values into a contiguous tensor of all ranks, in place."""
        group = self._between_cpus if tensor.device.type == "cpu" else self.group
        with _heard():
            dist.broadcast(tensor, dist.get_global_rank(self.group, 0), group=group)
        return tensor

    @contextmanager
    def together(self) -> Iterator[None]:
        """Have an error that one rank meets within raised on all of them, so that none goes on alone."""
        error: BaseException | None = None
        try:
            yield
        except LostRankError:
            # Nobody is left to be told.
            raise
        except Exception as caught:
            error = caught
        told = self.tell(None if error is None else f"{error}" or type(error).__name__)
        if error is not None:
            raise error
        failed = next((rank for rank, text in enumerate(told) if text is not None), None)
        if failed is not None:
            raise InputError(f"rank {failed} stopped: {told[failed]}")

    def check_alike(self, facts: Mapping[str, Any]) -> None:
        """Raise InputError on all ranks unless they hold the same facts, plain values by name, in the same order."""
        each = self.tell(list(facts.items()))
        for rank, theirs in enumerate(each):
            if theirs == each[0]:
                continue
            for (name, value), (other, found) in zip(each[0], theirs):
                if name != other:
                    raise InputError(f"ranks differ: rank 0 has {name}, where rank {rank} has {other}.")
                if value != found:
                    raise InputError(f"ranks differ in {name}: rank 0 has {value!r}, rank {rank} {found!r}.")
            raise InputError(f"ranks differ: rank 0 has {len(each[0])} parameters, rank {rank} {len(theirs)}.")

    @torch.no_grad()
    def check_equal(self, tensors: Mapping[str, Tensor], when: str) -> None:
        """Raise InputError on all ranks where a tensor's bits differ between them; names as many on each rank."""
        found = self._gathered(digests(tensors.values()))
        differing = (found != found[0]).any(0).tolist()
        if any(differing):
            first = differing.index(True)
            rank = int((found[:, first] != found[0, first]).nonzero()[0])
            raise InputError(
                f"{when}, {sum(differing)} of {len(differing)} tensors differ between ranks: first "
                f"{list(tensors)[first]}, between rank 0 and rank {rank}; load the same weights on every rank, on "
                "devices of one kind, and change none by hand."
            )


def carries(device_type: str, group: dist.ProcessGroup) -> bool:
    """Return whether a group's tensors can be on devices of this type."""
    return f"{device_type}:" in dist.get_backend_config(group)


def _wait_for_work(group: dist.ProcessGroup | None = None) -> None:
    """Have a group that is made, or the default one, wait as long as torch's do: others' work takes what it takes."""
    dist.distributed_c10d._set_pg_timeout(default_pg_timeout, group)


@contextmanager
def _heard() -> Iterator[None]:
    """Raise LostRankError where a collective within fails, as it does on all that wait for a process that is gone."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _lost(error) from error


@contextmanager
def others_heard() -> Iterator[None]:
    """Raise LostRankError where a collective of someone else's code within fails; other errors are what they are."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or TRANSPORT in str(error):
            raise _lost(error) from error
        raise


def _lost(error: RuntimeError) -> LostRankError:
    # Without the place in gloo's sources before it, and advice behind.
    reason = str(error).partition("\n")[0]
    reason = (reason.partition("] ")[2] if reason.startswith("[") else reason).partition(". ")[0]
    return LostRankError(
        f"another rank is gone, or cannot be reached ({reason or type(error).__name__}); start all of them again from "
        "the last checkpoint, which torchrun does by itself with --max-restarts."
    )


def join(launch: Launch) -> Ranks:
    """Make the group of the processes that a launcher has started; for a model on a CPU or on GPUs."""
    if not dist.is_initialized():
        store, patience = find_store(launch), timedelta(seconds=SET_UP_SECONDS)
        with ending_when_unheard(), _heard():
            dist.init_process_group(store=store, rank=launch.rank, world_size=launch.count, timeout=patience)
        _wait_for_work()
    group = dist.group.WORLD
    assert group is not None
    return Ranks(group)


def part() -> None:
    """Give up the group of all processes, at the end of what they did together."""
    if dist.is_initialized():
        dist.destroy_process_group()


def together(ranks: Ranks | None) -> AbstractContextManager[None]:
    """Return a block whose errors are those of all ranks; an ordinary one without ranks."""
    return nullcontext() if ranks is None else ranks.together()


def on_first(ranks: Ranks | None, work: Callable[[], T]) -> T:
    """Return what `work` returns on rank 0, where alone it is done; plain values. Its error is raised on all ranks."""
    if ranks is None:
        return work()
    result = None
    with ranks.together():
        if ranks.rank == 0:
            result = work()
    told: T = ranks.tell(result)[0]
    return told


def ranks_of(group: Any) -> Ranks | None:
    """Return the ranks of what `attach` was given: "auto" (the default group), None or a process group.

    None for a single process, and where the caller reduces gradients. Raises InputError for anything else.
    """
    if group is None or not dist.is_available():
        return None
    if isinstance(group, str) and group == "auto":
        group = dist.group.WORLD if dist.is_initialized() else None
        return None if group is None or dist.get_world_size(group) == 1 else Ranks(group)
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise InputError("this process is not in the group that ranks= names; attach on those that are.")
    if not isinstance(group, dist.ProcessGroup):
        raise InputError(f'ranks is {group!r}; "auto", None or a process group of torch.distributed is wanted.')
    return None if dist.get_world_size(group) == 1 else Ranks(group)


def _usual(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"
