"""Two ranks train one model: bit-equal to each other, and as one rank trains on the joined batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.ranks import on_ranks
from distributed.runs import LOW_RANK, METHODS, Difference, Run, batch, difference, model_of, train
from torch import Tensor

from lisa_kernels import LISA, FullFineTune, InputError, OwLore, attach
from lisa_kernels.basis import SharedGradient, range_finder
from lisa_kernels.basis.range_finder import OVERSAMPLING
from lisa_kernels.layers import LowRankLinear, SlotModule
from lisa_kernels.methods.rank_access import RankAccess

OWLORE = OwLore(**{**LOW_RANK, "active_layers": 1, "period": 3, "gap": 2})
CLOSE, OVERLAP = 1e-4, 0.9999


@dataclasses.dataclass
class Both:
    """A run beside others: its digests, how far it is from one rank's, and what was sent."""

    digests: list[int]
    difference: Difference
    skipped: int = 0


def compared(rank: int, name: str, accumulate: int, steps: int = 20) -> Both:
    make, tied = METHODS[name]
    ranked = train(make(), tied, rank, accumulate=accumulate, steps=steps)
    return Both(ranked.digests(), difference(ranked, train(make(), tied, None, accumulate=accumulate, steps=steps)))


def check(both: list[Both]) -> None:
    assert both[0].digests == both[1].digests
    for each in both:
        assert each.difference.draws_equal
        assert each.difference.gradients <= CLOSE
        assert each.difference.overlap >= OVERLAP


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_two_ranks(name: str, accumulate: int) -> None:
    """20 steps with switches, refreshes and embeddings in low rank: all tensors equal bit for bit."""
    check(on_ranks(compared, name, accumulate))


# In the same processes, one after the other.


def owlore(rank: int, **settings: Any) -> Run:
    return train(OWLORE, False, rank, steps=7, **settings)


def no_number(rank: int) -> Both:
    """Train on a batch that is good on one rank only."""
    model = model_of()
    optimizer = attach(model, OWLORE, lr=3e-3, scores=[1.0, 1.0, 1.0])
    for step in range(3):
        loss = model(**batch(step, rank)).loss
        (loss * (float("nan") if step == 1 and rank else 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    run = Run(model, optimizer)
    return Both(run.digests(), Difference(True, 0.0, 1.0, 0.0), optimizer.skipped_steps)


def unlabelled(rank: int) -> Both:
    """Train on a batch of which one rank has no label."""
    model = model_of()
    optimizer = attach(model, OWLORE, lr=3e-3, scores=[1.0, 1.0, 1.0])
    for step in range(3):
        given = batch(step, rank)
        if step == 1 and rank:
            given["labels"] = torch.full_like(given["labels"], -100)
        loss = model(**given).loss
        assert bool(loss == 0) == (step == 1 and rank == 1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    run = Run(model, optimizer)
    return Both(run.digests(), Difference(True, 0.0, 1.0, 0.0), optimizer.skipped_steps)


def scaled(rank: int) -> list[int]:
    """Train as float16 is trained: the scaler reads gradients before the step."""
    model = model_of()
    optimizer, scaler = attach(model, LISA(active_layers=1, period=2), lr=3e-3), torch.amp.GradScaler("cpu")
    for step in range(3):
        scaler.scale(model(**batch(step, rank)).loss * (1e38 if step == 1 and rank else 1.0)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [*Run(model, optimizer).digests(), optimizer.skipped_steps, int(scaler.get_scale())]


def prepared(rank: int) -> list[list[int]]:
    """Train a model that accelerate has wrapped in DDP, and one that it has not."""
    from accelerate import Accelerator

    found = []
    for wraps in (True, False):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = model_of()
        optimizer = attach(model, OWLORE, lr=3e-3, scores=[1.0, 1.0, 1.0])
        given = accelerator.prepare(model, optimizer) if wraps else (model, accelerator.prepare(optimizer))
        for step in range(8):
            with accelerator.accumulate(given[0]):
                accelerator.backward(given[0](**batch(step, rank)).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(given[0].parameters(), 0.1)
                given[1].step()
                given[1].zero_grad()
        found.append(Run(model, optimizer).digests())
    return found


def wire(rank: int) -> tuple[list[int], list[int], int]:
    """Return the bytes that are summed in three steps, those that should be, and of words between CPUs the most."""
    model = model_of()
    method = OwLore(active_layers=1, period=2, rank=8, gap=0, scores="uniform", embeddings="frozen")
    optimizer = attach(model, method, lr=3e-3)
    summed, wanted, words = [], [], []
    for step in range(3):
        slots = [layer for layer in model.modules() if isinstance(layer, LowRankLinear) and layer.active]
        trained = [param for param in model.parameters() if param.requires_grad]
        # A first basis: two passes, each of which sums Y [k, m] and Z [k, n]; none afterwards.
        rows = [min(8 + OVERSAMPLING, layer.out_features, layer.in_features) for layer in slots if layer.capturing]
        sides = [layer.out_features + layer.in_features for layer in slots if layer.capturing]
        wanted.append(sum(param.nbytes for param in trained) + sum(8 * k * side for k, side in zip(rows, sides)))
        with traffic() as (sums, gathers):
            model(**batch(step, rank)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        summed.append(sum(sums))
        words.append(max(gathers))
    return summed, wanted, max(words)


@contextmanager
def traffic() -> Iterator[tuple[list[int], list[int]]]:
    """Note the bytes of every tensor that is summed, and of every one that is gathered."""
    sums: list[int] = []
    gathers: list[int] = []
    add, gather = dist.all_reduce, dist.all_gather

    def sum_(tensor: Tensor, **more: Any) -> Any:
        sums.append(tensor.nbytes)
        return add(tensor, **more)

    def gather_(to: list[Tensor], tensor: Tensor, **more: Any) -> Any:
        gathers.append(tensor.nbytes)
        return gather(to, tensor, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", sum_)
        patch.setattr(dist, "all_gather", gather_)
        yield sums, gathers


def changed_by_hand(rank: int) -> str:
    """Change a weight of one rank only, in a period that ends."""
    model = model_of()
    optimizer = attach(model, LISA(active_layers=1, period=2, embeddings="frozen"), lr=3e-3, seed=3)
    layer = optimizer.layer_names[optimizer.active_layers[0]]
    for step in range(2):
        model(**batch(step, rank)).loss.backward()
        if rank and step:
            model.get_submodule(layer).mlp.up_proj.weight.data[5, 7] += 1e-3
        try:
            optimizer.step()
        except InputError as error:
            return str(error).replace(layer, "layer")
    return ""


def other_layers(rank: int) -> str:
    """Leave the last block out on one rank, as an expert without tokens is left out."""
    model = model_of()
    attach(model, OwLore(active_layers=3, rank=4, scores="uniform"), lr=3e-3)
    if rank:
        model.model.layers[2].forward = lambda hidden, *args, **kwargs: hidden
    try:
        model(**batch(0, rank)).loss.backward()
    except InputError as error:
        return str(error)
    return ""


def other_layers_at_full_rank(rank: int) -> list[int]:
    model = model_of()
    optimizer = attach(model, FullFineTune(), lr=3e-3)
    if rank:
        model.model.layers[2].forward = lambda hidden, *args, **kwargs: hidden
    model(**batch(0, rank)).loss.backward()
    optimizer.step()
    return Run(model, optimizer).digests()


def too_few_backwards(rank: int) -> str:
    """Step twice on one rank where the other accumulates."""
    model = model_of()
    optimizer = attach(model, LISA(active_layers=1, embeddings="frozen"), lr=3e-3)
    try:
        for _ in range(2):
            model(**batch(0, rank)).loss.backward()
            if rank:
                optimizer.step()
    except InputError as error:
        return str(error)
    return ""


def detached(rank: int) -> bool:
    """Detach, and train the plain model alone."""
    model = model_of()
    optimizer = attach(model, OWLORE, lr=3e-3, scores=[1.0, 1.0, 1.0])
    model(**batch(0, rank)).loss.backward()
    optimizer.step()
    optimizer.detach()
    model.zero_grad()
    model(**batch(0, rank)).loss.backward()
    grads = torch.stack([param.grad.sum() for param in model.parameters()])
    other = grads.clone()
    dist.broadcast(other, 0)
    return torch.equal(grads, other)


def everything(rank: int) -> dict[str, Any]:
    once, twice = owlore(rank, accumulate=2), owlore(rank, accumulate=2, sync_all=True)
    return {
        "OwLore": compared(rank, "OwLore", 2, steps=8),
        "LISA": compared(rank, "LISA", 1, steps=6),
        "sent once": once.digests(),
        "sent twice": twice.digests(),
        "once or twice": difference(once, twice),
        "wire": wire(rank),
        "bf16 wire": owlore(rank, wire_dtype="bf16").digests(),
        "bf16 weights": owlore(rank, dtype=torch.bfloat16).digests(),
        "plain": owlore(rank).digests(),
        "recomputed": owlore(rank, recompute=True).digests(),
        "clipped by hand": owlore(rank, clip=True).digests(),
        "no number": no_number(rank),
        "unlabelled": unlabelled(rank),
        "scaled": scaled(rank),
        "prepared": prepared(rank),
        "changed by hand": changed_by_hand(rank),
        "other layers": other_layers(rank),
        "other layers, full rank": other_layers_at_full_rank(rank),
        "too few backwards": too_few_backwards(rank),
        "detached": detached(rank),
    }


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return on_ranks(everything)


@pytest.mark.parametrize("name", ["OwLore", "LISA"])
def test_two_ranks_do_as_one_does(name: str, found: list[dict[str, Any]]) -> None:
    """Bit-equal to each other; draws, first gradients and first bases those of one rank with the joined batches."""
    check([each[name] for each in found])


@pytest.mark.parametrize(
    "case",
    ["sent once", "sent twice", "bf16 wire", "bf16 weights", "recomputed", "clipped by hand", "scaled", "prepared"],
)
def test_ranks_stay_equal(case: str, found: list[dict[str, Any]]) -> None:
    """However gradients travel, and whoever reads them before the step: the same bits on all ranks."""
    assert found[0][case] == found[1][case]


def test_recomputation_changes_no_bit(found: list[dict[str, Any]]) -> None:
    """Bases are found in the backward, where blocks are computed once more."""
    assert found[0]["recomputed"] == found[0]["plain"]


def test_gradients_that_travel_twice_are_those_that_travel_once(found: list[dict[str, Any]]) -> None:
    """Of accumulated gradients the mean of means is the mean, but for rounding."""
    assert found[0]["once or twice"].gradients <= CLOSE
    assert found[0]["once or twice"].draws_equal


def test_a_step_is_skipped_on_all_ranks_or_none(found: list[dict[str, Any]]) -> None:
    """A gradient that is no number on one of them is none in the mean."""
    assert found[0]["no number"] == found[1]["no number"]
    assert found[0]["no number"].skipped == 1
    assert found[0]["scaled"][-2:] == [1, 2**15]


def test_a_rank_without_labels_counts_as_none(found: list[dict[str, Any]]) -> None:
    """Its loss is 0, and the step of the others is taken by all."""
    assert found[0]["unlabelled"] == found[1]["unlabelled"]
    assert found[0]["unlabelled"].skipped == 0


def test_a_model_that_accelerate_wraps_trains_the_same(found: list[dict[str, Any]]) -> None:
    """DDP around the attached model leaves its gradients alone."""
    wrapped, bare = found[0]["prepared"]
    assert wrapped == bare


def test_a_weight_that_one_rank_changed_is_named(found: list[dict[str, Any]]) -> None:
    """At the end of the period, on both ranks."""
    for each in found:
        wanted = "after step 2, 1 of 9 tensors differ between ranks: first layer.mlp.up_proj.weight, between rank 0 and"
        assert each["changed by hand"].startswith(wanted)


def test_ranks_that_go_through_other_layers_are_told(found: list[dict[str, Any]]) -> None:
    """No rank waits: both say where each of them is. At full rank the missing gradients are zeros."""
    for each in found:
        assert "not at the same place: rank 0 finds the basis of model.layers.2." in each["other layers"]
        assert "not at the same place: rank 0 averages the gradients of step 0 (time 2)" in each["too few backwards"]
    assert found[0]["other layers, full rank"] == found[1]["other layers, full rank"]


def test_what_travels_is_what_trains_and_little_besides(found: list[dict[str, Any]]) -> None:
    """The gradients of the active layer, the sketches of bases that are due, and words of a few bytes a parameter."""
    for each in found:
        summed, wanted, words = each["wire"]
        assert summed == wanted
        assert words <= 8 * 40


def test_a_detached_model_is_one_rank_s_own(found: list[dict[str, Any]]) -> None:
    assert [each["detached"] for each in found] == [True, False]


# Negative controls.


def bases_left_local(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RankAccess, "_share_bases", lambda self: None)


def summed_after_whitening(patch: pytest.MonkeyPatch) -> None:
    def power_pass(gradient: Any, rows: Tensor) -> Tensor:
        if not isinstance(gradient, SharedGradient):
            return real(gradient, rows)
        return gradient.summed(real(gradient.part, rows))

    real = range_finder._power_pass
    patch.setattr(range_finder, "_power_pass", power_pass)


def unscattered(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SlotModule, "shares_basis", False)


WRONG: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "right": lambda patch: None,
    "bases left local": bases_left_local,
    "summed after whitening": summed_after_whitening,
    "rows of a table unscattered": unscattered,
}


def averaged_late(rank: int) -> float:
    """Return how far clipped gradients are from one rank's where they are averaged after clipping."""
    clipped = []
    for late in (False, True):
        model = model_of()
        optimizer = attach(model, FullFineTune(), lr=1e-3)
        with optimizer.no_sync():
            model(**batch(0, rank)).loss.backward()
        if not late:
            optimizer._reduction.average()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if late:
            optimizer._reduction.average()
        clipped.append(torch.cat([param.grad.flatten() for param in model.parameters()]))
    right, wrong = clipped
    return float((right - wrong).norm() / right.norm())


def controls(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {"averaged late": averaged_late(rank)}
    alone = train(OWLORE, False, None, steps=1)
    for name, spoil in WRONG.items():
        with pytest.MonkeyPatch.context() as patch:
            spoil(patch)
            ranked = train(OWLORE, False, rank, steps=1)
        found[name] = Both(ranked.digests(), difference(ranked, alone))
    return found


@pytest.fixture(scope="module")
def spoilt() -> list[dict[str, Any]]:
    return on_ranks(controls)


def test_what_is_right_passes(spoilt: list[dict[str, Any]]) -> None:
    check([each["right"] for each in spoilt])


def test_what_is_wrong_is_caught(spoilt: list[dict[str, Any]]) -> None:
    """Each by what it spoils: equal bits, the bases' space, or the gradients that are clipped."""
    for name in WRONG.keys() - {"right"}:
        with pytest.raises(AssertionError):
            check([each[name] for each in spoilt])
    assert spoilt[0]["bases left local"].digests != spoilt[1]["bases left local"].digests
    for name in ("summed after whitening", "rows of a table unscattered"):
        assert spoilt[0][name].digests == spoilt[1][name].digests
        assert spoilt[0][name].difference.overlap < OVERLAP
    for each in spoilt:
        assert each["averaged late"] > CLOSE
