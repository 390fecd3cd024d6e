"""The search for settings that fit: its order, what it leaves alone, how few plans it takes, and its refusal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from lisa_kernels.errors import InputError
from lisa_kernels.methods import LISA, BAdam, FullFineTune, GaLore, LoRAFA, Method, OwLore
from lisa_kernels.plan.allocator import MIB
from lisa_kernels.plan.cards import CONTEXT_BYTES
from lisa_kernels.plan.filling import TRIES, written
from lisa_kernels.plan.fit import Fit, fit, lighter_methods, proposals
from lisa_kernels.plan.result import Plan
from lisa_kernels.sizes import parse_size

from .traces import sizes, trace


@dataclass(frozen=True)
class Run:
    """As much of a workload as the search changes."""

    method: Method = field(default_factory=OwLore)
    batch_size: int = 8
    accumulate: int = 1
    gradient_checkpointing: bool = False
    offload_activations: bool = False
    paging: str | None = None
    seq_len: int = 512
    checkpointed_blocks: int | None = None
    # As someone has chosen who wants no other; None leaves it to the search.
    resting: str | None = "16-bit"
    resting_where: str | None = None
    ranks: int = 1


WEIGHTS = {None: 1000, "16-bit": 1000, "int8": 530, "mixed": 400, "nf4": 300}


def need_mib(run: Run) -> int:
    """A formula in place of a rehearsal: it falls along every list that the search goes through."""
    method = run.method
    embeddings = {"always": 400, "sampled": 400, "low-rank": 40, "frozen": 0}[method.get("embeddings", "frozen")]
    layers = 20 * method.get("active_layers", 8) * (method.get("rank", 256) / 256 if method.form == "low-rank" else 1)
    kept = method.get("retired_state", "drop" if hasattr(method, "period") else "keep") == "keep"
    state = 100 * (run.paging is None and kept)
    return (
        at_rest(run) // MIB // (20 if run.resting_where == "host" else 1)
        + embeddings
        + int(layers)
        + state
        + run.batch_size * (2 if run.offload_activations else 10 if run.gradient_checkpointing else 50)
    )


def search(run: Run, mib: int, need: Callable[[Run], int] = need_mib, waiting: int = 0) -> Fit:
    """Fit a run of which the gradients of several micro-batches take some MiB while they wait."""
    workload: Any = run

    def make_plan(asked: Any) -> Plan:
        gradients = waiting * MIB * (asked.accumulate > 1)
        beside = (1, 2 * (need(asked) // 2) * MIB, "temporaries", "")
        return Plan(asked, trace(beside, *([(2, gradients, "gradients", "")] if gradients else [])))

    return fit(workload, CONTEXT_BYTES + mib * MIB, make_plan, at_rest=lambda asked: at_rest(asked))  # type: ignore[arg-type]


def at_rest(run: Run) -> int:
    """What a size bounds; one that is given is filled by matrices of 3 MiB."""
    if run.resting in WEIGHTS:
        return WEIGHTS[run.resting] * MIB
    assert run.resting is not None
    return parse_size(run.resting) // (3 * MIB) * 3 * MIB


def found(run: Run, mib: int) -> Any:
    return search(run, mib).plan.workload


def test_what_fits_is_left_as_it_is() -> None:
    result = search(Run(), need_mib(Run()))
    assert (result.plan.workload, result.expandable, result.rehearsals) == (Run(), False, 1)


def test_first_fewer_rows_at_a_time_with_the_same_tokens_per_step() -> None:
    """8 rows become 2 × 4, not 1 × 8: the most that fit."""
    assert found(Run(), need_mib(Run(batch_size=2))) == Run(batch_size=2, accumulate=4)
    assert found(Run(batch_size=6, accumulate=2), need_mib(Run(batch_size=3))) == Run(batch_size=3, accumulate=4)
    assert found(Run(batch_size=7), need_mib(Run(batch_size=1))) == Run(batch_size=1, accumulate=7)


def test_then_checkpointing_again_with_as_many_rows_as_fit() -> None:
    wanted = Run(batch_size=4, accumulate=2, gradient_checkpointing=True)
    assert found(Run(), need_mib(wanted)) == wanted


FRUGAL: dict[str, Any] = {"batch_size": 1, "accumulate": 8, "gradient_checkpointing": True, "offload_activations": True}


def test_then_offloading_what_checkpointing_keeps() -> None:
    wanted = Run(batch_size=4, accumulate=2, gradient_checkpointing=True, offload_activations=True)
    assert found(Run(), need_mib(wanted)) == wanted


def test_then_paging_where_every_layer_has_state() -> None:
    wanted = Run(GaLore(), batch_size=8, gradient_checkpointing=True, offload_activations=True, paging="host")
    assert found(Run(GaLore()), need_mib(Run(GaLore(), **FRUGAL)) - 2) == wanted


def test_kept_state_of_layers_that_left_is_paged_before_layers_are_given_up() -> None:
    wanted = Run(LISA(retired_state="page"), batch_size=8, gradient_checkpointing=True, offload_activations=True)
    kept = Run(LISA(retired_state="keep"))
    assert found(kept, need_mib(replace(kept, **FRUGAL)) - 2) == wanted


def test_paging_is_not_tried_where_only_active_layers_have_state() -> None:
    tried: list[Run] = []
    with pytest.raises(InputError):
        search(Run(), 10, lambda run: tried.append(run) or need_mib(run))  # type: ignore[func-returns-value]
    assert tried
    assert all(run.paging is None for run in tried)


def test_then_the_rank_is_halved_and_active_layers_go_one_by_one() -> None:
    for method in (OwLore(rank=64), OwLore(active_layers=3, rank=32)):
        wanted = Run(method, **FRUGAL)
        assert found(Run(), need_mib(wanted)) == wanted


def test_last_of_all_the_embeddings_freeze() -> None:
    wanted = Run(OwLore(active_layers=1, rank=32, embeddings="frozen"), **FRUGAL)
    assert found(Run(), need_mib(wanted)) == wanted


def test_weights_rest_in_8_bits_before_anything_is_given_up_and_in_4_after_all_else() -> None:
    """After 4 it is 8 on the host, and 4, before anything is given up beside them."""
    free = Run(resting=None)
    for wanted in (
        Run(resting="int8", **FRUGAL),
        Run(OwLore(active_layers=1, rank=32, embeddings="frozen"), resting="int8", **FRUGAL),
        Run(resting="mixed", **FRUGAL),
        Run(resting="nf4", **FRUGAL),
        Run(resting="int8", resting_where="host", **FRUGAL),
        Run(resting="nf4", resting_where="host", **FRUGAL),
        Run(OwLore(active_layers=1, rank=32, embeddings="frozen"), resting="nf4", resting_where="host", **FRUGAL),
    ):
        assert found(free, need_mib(wanted)) == wanted


def test_weights_stay_where_someone_wants_them() -> None:
    """Who names bits alone gets them from the host before anything is given up."""
    few = OwLore(active_layers=1, rank=32, embeddings="frozen")
    for wanted in (
        Run(resting="int8", resting_where="host", **FRUGAL), Run(few, resting="int8", resting_where="host", **FRUGAL)
    ):  # fmt: skip
        assert found(Run(resting="int8"), need_mib(wanted)) == wanted
    wanted = Run(few, resting="int8", resting_where="device", **FRUGAL)
    assert found(Run(resting="int8", resting_where="device"), need_mib(wanted)) == wanted


@pytest.mark.parametrize("lacking", [10, 30, 50])
@pytest.mark.parametrize("method", [OwLore(), OwLore(rank=32), LISA()], ids=["ranks", "layers", "embeddings"])
def test_a_tenth_of_what_8_bits_take_is_given_up_before_anything_else(method: Method, lacking: int) -> None:
    """Of what is left then rows have theirs first, bits the rest; someone who wants 8 bits keeps them."""
    least = Run(method, resting="int8", **FRUGAL)
    run = found(Run(method, resting=None), need_mib(least) - lacking)
    assert run.method == method
    assert 0.9 * WEIGHTS["int8"] - 3 <= at_rest(run) // MIB < WEIGHTS["int8"]
    assert -1 <= need_mib(least) - lacking - need_mib(run) <= 6
    kept = found(Run(method, resting="int8", resting_where="device"), need_mib(least) - lacking)
    assert kept.resting == "int8"
    assert kept.method != method


@pytest.mark.parametrize(("base", "mib"), [("nf4", 24), ("nf4", 60), ("mixed", 16), ("mixed", 36)])
def test_what_is_left_beside_four_bits_goes_to_a_size(base: str, mib: int) -> None:
    """The rest is as it would be with these bits alone; less is left than a matrix takes and what is rounded off."""
    room = need_mib(Run(resting=base, **FRUGAL)) + mib
    run = found(Run(resting=None), room)
    assert replace(run, resting=base) == found(Run(resting=base), room)
    assert run.resting not in WEIGHTS
    assert 0 <= room - need_mib(run) <= 6
    # Whatever the run finds, there is nothing left to fill.
    assert parse_size(run.resting) - at_rest(run) < MIB


def test_a_size_takes_few_plans_and_holds_where_segments_are_cut_unevenly() -> None:
    """Each size has up to 14 MiB of its own beside it; one that is too large is followed by what it lacks."""
    tried: list[Run] = []

    def uneven(run: Run) -> int:
        tried.append(run)
        return need_mib(run) + (at_rest(run) // MIB % 15 if run.resting not in WEIGHTS else 0)

    for mib in range(20, 90, 7):
        room = need_mib(Run(resting="nf4", **FRUGAL)) + mib
        tried.clear()
        run: Any = search(Run(resting=None, **FRUGAL), room, uneven).plan.workload
        sized = {each.resting for each in tried} - set(WEIGHTS)
        assert run.resting in sized
        assert len(sized) <= TRIES
        assert room - 25 <= uneven(run) <= room + 1


def test_a_size_is_proposed_between_8_and_4_bits_alone() -> None:
    """Not where all is in 8, where someone wants 4, nor where the device holds two blocks of what is on the host."""
    spare = 60
    for run in (Run(resting="nf4"), Run(resting="mixed", resting_where="device")):
        assert found(run, need_mib(replace(run, **FRUGAL)) + spare).resting == run.resting
    assert found(Run(resting=None), need_mib(Run(resting="int8", **FRUGAL)) + spare).resting == "int8"
    assert found(Run(resting=None, **FRUGAL), need_mib(Run(resting="int8", **FRUGAL)) - 100).resting not in WEIGHTS
    on_host = Run(OwLore(active_layers=1, rank=32, embeddings="frozen"), resting="mixed", resting_where="host")
    held = replace(on_host, resting=None)
    assert found(held, need_mib(replace(on_host, **FRUGAL)) + 3).resting in WEIGHTS


@pytest.mark.parametrize(
    ("nbytes", "size"),
    [
        (5_310_000_001, "5.311GB"),
        (10**9, "1.000GB"),
        (999_990_001, "1000.00MB"),
        (10**6, "1.00MB"),
        (999_999, "999999"),
    ],
)
def test_a_size_is_written_as_people_do_and_is_no_less_than_its_bytes(nbytes: int, size: str) -> None:
    assert written(nbytes) == size
    assert nbytes <= parse_size(size) < nbytes + 10**6


def test_no_size_that_is_written_is_read_as_less() -> None:
    """Of what decimal digits are as binary fractions nothing is lost."""
    for nbytes in range(10**9, 12 * 10**9, 10**6):
        assert parse_size(written(nbytes)) == nbytes
    for nbytes in range(10**6, 10**9, 7_777_777):
        assert 0 <= parse_size(written(nbytes)) - nbytes < 10**4


def test_weights_of_layers_that_are_drawn_at_full_rank_rest_first_too() -> None:
    """Before embedding and head train in low rank."""
    for wanted in (Run(LISA(), resting="int8", **FRUGAL), Run(LISA(embeddings="low-rank"), resting="int8", **FRUGAL)):
        assert found(Run(LISA(), resting=None), need_mib(wanted)) == wanted


@pytest.mark.parametrize(
    "run", [Run(FullFineTune(), resting=None), Run(resting=None, ranks=2)], ids=["method", "ranks"]
)
def test_weights_that_cannot_rest_are_left_as_they_are(run: Run) -> None:
    tried: list[Run] = []
    with pytest.raises(InputError):
        search(run, 10, lambda asked: tried.append(asked) or need_mib(asked))  # type: ignore[func-returns-value]
    assert {each.resting for each in tried} == {None}


BLOCKS = 32


def partly(run: Run) -> int:
    """Each block that is recomputed spares as much as any other."""
    if not run.gradient_checkpointing or run.checkpointed_blocks is None:
        return need_mib(run)
    none, every = (
        need_mib(replace(run, gradient_checkpointing=flag, checkpointed_blocks=None)) for flag in (False, True)
    )
    return none - (none - every) * run.checkpointed_blocks // BLOCKS


@pytest.mark.parametrize(("mib", "count"), [(0, 32), (100, 22), (319, 1), (320, 0), (4000, 0)])
def test_what_is_left_over_spares_recomputation(mib: int, count: int) -> None:
    """As few blocks are recomputed as fit; rows and method are what they were found to be."""
    run: Any = Run(gradient_checkpointing=True)
    size = CONTEXT_BYTES + (need_mib(run) + mib) * MIB
    result = fit(run, size, lambda asked: Plan(asked, sizes((1, partly(asked) * MIB))), BLOCKS)  # type: ignore[arg-type]
    found = result.plan.workload
    recomputed = BLOCKS if found.checkpointed_blocks is None else found.checkpointed_blocks
    assert (recomputed if found.gradient_checkpointing else 0) == count
    assert (found.method, found.batch_size) == (run.method, run.batch_size)
    assert result.rehearsals <= 8


def seconds(run: Run, blocks: int = 4) -> float:
    """Of a step: each micro-batch reads the weights, and recomputation is a third of the rest."""
    recomputed = 0 if not run.gradient_checkpointing else run.checkpointed_blocks or blocks
    return run.accumulate * (1.0 + run.batch_size * (1 + recomputed / blocks / 2))


def ranked(run: Run, mib: int, blocks: int = 4, waiting: int = 0) -> list[Any]:
    """The proposals for a model of four blocks, of which each spares as much as any other and is recomputed if need be.

    waiting: what gradients of several micro-batches take.
    """

    def need(asked: Run) -> int:
        none, every = (need_mib(replace(asked, gradient_checkpointing=flag)) for flag in (False, True))
        share = 0.0 if not asked.gradient_checkpointing else (asked.checkpointed_blocks or 4) / 4
        return int(none - (none - every) * share) + waiting * (asked.accumulate > 1)

    workload: Any = run
    found = proposals(
        workload, CONTEXT_BYTES + mib * MIB, lambda asked: Plan(asked, sizes((1, need(asked) * MIB))),  # type: ignore[arg-type]
        lambda plan: seconds(plan.workload), blocks,
    )  # fmt: skip
    assert all(need(each.plan.workload) <= mib for each in found)
    for each in (each.plan.workload for each in found if blocks and not each.plan.workload.offload_activations):
        fewer = [replace(each, checkpointed_blocks=count) for count in range(1, each.checkpointed_blocks or blocks)]
        fewer += [replace(each, gradient_checkpointing=False, checkpointed_blocks=None)]
        assert all(need(other) > mib for other in fewer if each.gradient_checkpointing)
    return [each.plan.workload for each in found]


@pytest.mark.parametrize(("rows", "waiting"), [(8, 0), (4, 300)])
@pytest.mark.parametrize("mib", [900, 1350, 1500, 1700, 1900, 4000])
def test_proposals_are_fastest_first_and_teach_the_same(mib: int, rows: int, waiting: int) -> None:
    """Each has as few blocks recomputed as fit; whatever else there is of rows and blocks that fits is no faster."""
    few = OwLore(active_layers=1, rank=32, embeddings="frozen")
    run = Run(few, gradient_checkpointing=True, batch_size=rows, accumulate=8 // rows)
    if need_mib(replace(run, batch_size=1)) + waiting > mib:
        with pytest.raises(InputError):
            ranked(run, mib, waiting=waiting)
        return
    found = ranked(run, mib, waiting=waiting)
    assert [seconds(each) for each in found] == sorted(seconds(each) for each in found)
    assert {each.batch_size * each.accumulate for each in found} == {8}
    assert {each.method for each in found} == {run.method}
    assert len({each.batch_size for each in found}) == len(found)


def test_memory_that_is_left_goes_where_it_saves_most() -> None:
    """8 rows with all blocks recomputed, 4 with three, or 2 with none, which reads the weights four times, and wins."""
    run = Run(OwLore(active_layers=1, rank=32, embeddings="frozen"), gradient_checkpointing=True)
    base = need_mib(replace(run, batch_size=1)) - 10
    first, *others = ranked(run, base + 100)
    assert (first.batch_size, first.accumulate, first.gradient_checkpointing) == (2, 4, False)
    assert [(each.batch_size, each.checkpointed_blocks) for each in others] == [(8, None), (4, 3)]
    roomy = ranked(replace(run, batch_size=1, accumulate=8), base + 400)
    assert [(each.batch_size, each.gradient_checkpointing) for each in roomy] == [(4, False), (2, False), (1, False)]


def test_a_given_recomputation_is_kept_and_more_rows_are_tried() -> None:
    """Where the number of blocks was told; fewer rows would save no time."""
    run = Run(OwLore(active_layers=1, rank=32, embeddings="frozen"), batch_size=2, accumulate=4)
    found = ranked(run, 4000, blocks=0)
    assert [each.batch_size for each in found] == [8, 4, 2]
    assert {each.gradient_checkpointing for each in found} == {False}


LADDERS: dict[str, tuple[Method, list[Method]]] = {
    "owlore": (
        OwLore(active_layers=3, embeddings="always"),
        [
            OwLore(active_layers=3, embeddings="always"),
            OwLore(active_layers=3, rank=64, embeddings="always"),
            OwLore(active_layers=3, rank=32, embeddings="always"),
            OwLore(active_layers=2, rank=32, embeddings="always"),
            OwLore(active_layers=2, rank=32, embeddings="low-rank"),
            OwLore(active_layers=1, rank=32, embeddings="low-rank"),
            OwLore(active_layers=1, rank=32, embeddings="frozen"),
        ],
    ),
    "lisa keeps the rank that it does not use": (
        LISA(),
        [
            LISA(),
            LISA(embeddings="low-rank"),
            LISA(active_layers=1, embeddings="low-rank"),
            LISA(active_layers=1, embeddings="frozen"),
        ],
    ),
    "an embedding that trains with the first block": (
        OwLore(active_layers=1, rank=32, embeddings="with-first-block"),
        [
            OwLore(active_layers=1, rank=32, embeddings="with-first-block"),
            OwLore(active_layers=1, rank=32, embeddings="frozen"),
        ],
    ),
    "badam": (BAdam(), [BAdam()]),
    "galore": (
        GaLore(rank=64, embeddings="low-rank"),
        [
            GaLore(rank=64, embeddings="low-rank"),
            GaLore(rank=32, embeddings="low-rank"),
            GaLore(rank=32, embeddings="frozen"),
        ],
    ),
    "lora-fa": (LoRAFA(), [LoRAFA()]),
    "full": (FullFineTune(), [FullFineTune()]),
}


@pytest.mark.parametrize("name", LADDERS)
def test_the_ladder_of_a_method(name: str) -> None:
    method, expected = LADDERS[name]
    assert list(lighter_methods(method)) == expected


@pytest.mark.parametrize(
    "method", [OwLore(active_layers=8, rank=256), LISA(), GaLore(), FullFineTune()], ids=lambda m: m.name
)
@pytest.mark.parametrize("batch", [1, 8, 12])
@pytest.mark.parametrize("waiting", [0, 30, 60, 300])
def test_the_best_by_halving_is_the_best_of_all(method: Method, batch: int, waiting: int) -> None:
    """At every size, the first in the whole list of preference that fits, and few plans to find it.

    Where gradients wait, all rows at once may fit where fewer do not.
    """
    run = Run(method, batch_size=batch)
    for mib in range(900, need_mib(run) + 20, 10):
        preferred = first_that_fits(run, mib, waiting)
        if preferred is None:
            with pytest.raises(InputError):
                search(run, mib, waiting=waiting)
            continue
        result = search(run, mib, waiting=waiting)
        assert result.plan.workload == preferred
        assert result.rehearsals <= 4 + math.ceil(math.log2(12)) + 4 * math.ceil(math.log2(5))


def first_that_fits(run: Run, mib: int, waiting: int) -> Run | None:
    """Go through every setting in order of preference."""
    batches = [size for size in range(run.batch_size, 0, -1) if run.batch_size % size == 0]
    if run.batch_size == 12:
        batches = [12, 6, 3, 1]
    every_layer = not hasattr(run.method, "period")
    for method in lighter_methods(run.method):
        stages = [(False, False, None), (True, False, None), (True, True, None)]
        for checkpointing, offload, paging in [*stages, *([(True, True, "host")] if every_layer else [])]:
            for size in batches:
                tried = Run(method, size, run.batch_size // size, checkpointing, offload, paging)
                if 2 * (need_mib(tried) // 2) + waiting * (tried.accumulate > 1) <= mib:
                    return tried
    return None


def test_nothing_fits_is_one_sentence_with_the_bytes_that_are_missing() -> None:
    """The last of all settings lacks 100 MiB, and so it is said."""
    smallest = Run(OwLore(active_layers=1, rank=32, embeddings="frozen"), **FRUGAL)
    with pytest.raises(InputError) as error:
        search(Run(), need_mib(smallest) - 100)
    text = str(error.value)
    assert "no setting of owlore fits" in text
    assert "active_layers=1, rank=32, embeddings=frozen, resting=16-bit, batch 1 × 512" in text
    assert "104.9 MB too much" in text
    assert text.count(". ") == 0


def test_a_run_that_fits_only_with_expandable_segments_says_so() -> None:
    """2 MiB stay in a segment of 30, which holds no 40; the segment that grows puts them behind the 2."""
    workload: Any = Run(FullFineTune(), **FRUGAL, paging="host")
    pinned = sizes((1, 30 * MIB), (1, -30 * MIB), (2, 2 * MIB), (3, 40 * MIB))
    assert fit(workload, CONTEXT_BYTES + 65 * MIB, lambda asked: Plan(asked, pinned)).expandable
    assert not fit(workload, CONTEXT_BYTES + 75 * MIB, lambda asked: Plan(asked, pinned)).expandable
