"""What ranks tell each other: where they differ, all of them raise the same sentence, and none waits."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distributed.ranks import on_ranks
from lisa_kernels import InputError
from lisa_kernels.distributed import LostRankError, Ranks, on_first, ranks_of
from lisa_kernels.distributed import ranks as ranks_module


def said(attempt: Callable[[], Any]) -> str:
    try:
        attempt()
    except InputError as error:
        return str(error)
    return ""


def fails_on_one(ranks: Ranks) -> None:
    with ranks.together():
        if ranks.rank == 1:
            raise InputError("rank is 17, too large.")


def everything(rank: int) -> dict[str, Any]:
    ranks = ranks_of("auto")
    assert ranks is not None
    pair = {"one": torch.ones(3), "other": torch.arange(4.0) + (rank if rank else 0.0)}
    facts = {"the method": "lisa", "seed": 7 + rank}
    return {
        "same place": said(lambda: ranks.meet("steps")),
        "other place": said(lambda: ranks.meet("averages" if rank else "compares")),
        "together": said(lambda: fails_on_one(ranks)),
        "facts": said(lambda: ranks.check_alike(facts)),
        "names": said(lambda: ranks.check_alike({"a" if rank else "b": 1})),
        "number": said(lambda: ranks.check_alike({"a": 1, **({"b": 2} if rank else {})})),
        "alike": said(lambda: ranks.check_alike({"a": [1, None]})),
        "equal": said(lambda: ranks.check_equal({"one": pair["one"]}, "before training")),
        "tensors": said(lambda: ranks.check_equal(pair, "before training")),
        "any": ranks.any_has([bool(rank), False, True]),
        "sum": ranks.sum_(torch.tensor([1.0 + rank])).tolist(),
        "meta": said(lambda: ranks.check_carries(torch.device("meta"))),
        "alone": ranks_of(None),
        "given": isinstance(ranks_of(dist.group.WORLD), Ranks),
        "own": ranks_of(dist.new_group([0])) if rank == 0 else said(lambda: ranks_of(dist.new_group([0]))),
        "still together": said(lambda: ranks.meet("ends")),
    }


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return on_ranks(everything)


PLACES = "the ranks are not at the same place: rank 0 compares, rank 1 averages; every rank has to"
SENTENCES = {
    "same place": [""] * 2,
    "other place": [PLACES] * 2,
    "together": ["rank 1 stopped: rank is 17, too large.", "rank is 17, too large."],
    "facts": ["ranks differ in seed: rank 0 has 7, rank 1 8."] * 2,
    "names": ["ranks differ: rank 0 has b, where rank 1 has a."] * 2,
    "number": ["ranks differ: rank 0 has 1 parameters, rank 1 2."] * 2,
    "alike": [""] * 2,
    "equal": [""] * 2,
    "tensors": ["before training, 1 of 2 tensors differ between ranks: first other, between rank 0 and rank 1;"] * 2,
    "meta": ["the model is on meta and the process group carries other tensors"] * 2,
    "still together": [""] * 2,
}


@pytest.mark.parametrize("attempt", SENTENCES)
def test_all_ranks_say_the_same(attempt: str, found: list[dict[str, Any]]) -> None:
    """Each kind of difference in one sentence, on every rank; what is alike passes."""
    for sentence, wanted in zip([each[attempt] for each in found], SENTENCES[attempt]):
        assert sentence.startswith(wanted), sentence
        assert bool(sentence) == bool(wanted)
        assert "\n" not in sentence


def test_flags_and_sums_are_those_of_all(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["any"] == [True, False, True]
        assert each["sum"] == [3.0]


def test_which_group_is_meant(found: list[dict[str, Any]]) -> None:
    """Any group may be named; one process alone shares nothing, and a group without this process is refused."""
    assert [each["alone"] for each in found] == [None, None]
    assert [each["given"] for each in found] == [True, True]
    assert found[0]["own"] is None
    assert "not in the group" in found[1]["own"]


def outlives(rank: int, place: str) -> tuple[str, float]:
    """Return what rank 0 says, and when, after rank 1 was killed in the middle of something."""
    ranks = ranks_of("auto")
    assert ranks is not None
    ranks.meet("begins")
    if rank:
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    waits: dict[str, Callable[[], Any]] = {
        "meet": lambda: ranks.meet("steps"),
        "sum": lambda: ranks.sum_(torch.ones(1000)),
        "together": lambda: on_first(ranks, lambda: None),
    }
    with pytest.raises(LostRankError) as caught:
        waits[place]()
    return str(caught.value), time.monotonic() - began


@pytest.mark.parametrize("place", ["meet", "sum", "together"])
def test_who_outlives_another_says_so_and_ends(place: str) -> None:
    """At once, in one sentence, wherever it waits."""
    (sentence, seconds), _ = on_ranks(outlives, place, lost=1)
    assert sentence.startswith("another rank is gone, or cannot be reached (")
    assert "onnection" in sentence
    assert "\n" not in sentence
    assert seconds < 30


def outlives_setting_up(rank: int, place: str) -> tuple[str, float]:
    """Return what rank 0 says, and when, after rank 1 was killed while they were made ranks."""
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks_module, "SET_UP_SECONDS", 2.0)
        if rank and place == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank:
            patch.setattr(dist, "new_group", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(LostRankError) as caught:
            ranks_of("auto")
    return str(caught.value), time.monotonic() - began


@pytest.mark.parametrize("place", ["before", "within"])
def test_who_outlives_another_while_they_set_up_says_so_too(place: str) -> None:
    """Where no connection is that could end, after a while."""
    (sentence, seconds), _ = on_ranks(outlives_setting_up, place, lost=1)
    assert sentence.startswith("another rank is gone, or cannot be reached (")
    assert "\n" not in sentence
    assert seconds < 10


def patience(rank: int) -> list[float]:
    """Return how long words wait for others, by the groups that they travel in."""
    made = Ranks(dist.group.WORLD)
    backends = [group._get_backend(torch.device("cpu")) for group in (dist.group.WORLD, made._between_cpus)]
    return [backend.options._timeout.total_seconds() for backend in backends]


def test_ranks_wait_for_each_others_work() -> None:
    """The patience of setting up is not that of what comes after."""
    for _, words in on_ranks(patience):
        assert words == 1800.0


def test_without_a_group_there_are_no_ranks() -> None:
    assert ranks_of("auto") is None
    with pytest.raises(InputError, match="ranks is 'all'"):
        ranks_of("all")
