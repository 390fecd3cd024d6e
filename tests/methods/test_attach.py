"""What cannot work is refused by `attach` in one sentence, and the model is as it was."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import anatomy, build, common, llama, logits, t5, tokens, train
from torch import nn

from lisa_kernels import LISA, OWS, BAdam, GaLore, InputError, LoRAFA, OwLore, attach
from lisa_kernels.layers import LowRankLinear
from lisa_kernels.methods import Method

OWLORE = OwLore(active_layers=1, rank=4, scores="uniform")


def uneven() -> Any:
    """Return a model whose last block has a narrower matrix than the others."""
    model = llama()
    model.model.layers[2].mlp.gate_proj = nn.Linear(32, 10, bias=False)
    return model


def on_meta() -> Any:
    model = llama()
    model.lm_head.to("meta")
    return model


def reentrant() -> Any:
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return model


def zero() -> Any:
    model = llama()
    model.lm_head.weight.ds_id = 3
    return model


CASES: dict[str, tuple[Callable[[], Any], Method, dict[str, Any], str]] = {
    "more active layers than layers": (llama, LISA(active_layers=4), {}, r"active_layers is 4.*has 3 layers"),
    "rank too large": (llama, OwLore(active_layers=1, rank=17, scores="uniform"), {}, r"k_proj \[16, 32\].*at most 16"),
    "rank too large in the last block": (
        uneven,
        OwLore(active_layers=1, rank=12, scores="uniform"),
        {},
        r"layers\.2.*10",
    ),
    "rank too large for GaLore": (llama, GaLore(rank=500), {}, "rank 500"),
    "rank too large for LoRA-FA": (llama, LoRAFA(rank=500), {}, "rank 500"),
    "no blocks": (lambda: nn.Sequential(nn.Linear(9, 9)), LISA(), {}, "no list of decoder blocks"),
    "two stacks": (t5, LISA(), {}, "blocks="),
    "bad path of blocks": (llama, OWLORE, {"blocks": "model.layer"}, r"'model\.layer' is not a list.*model\.layers"),
    "targets that match nothing": (llama, LoRAFA(rank=4, targets=("q_prj",)), {}, "unknown target 'q_prj'.*'q_proj'"),
    "one target of two matches nothing": (llama, LoRAFA(rank=4, targets=("q_proj", "query")), {}, "target 'query'"),
    "too few scores with the method": (llama, OWS(active_layers=1, scores=(1.0, 2.0)), {}, "2 scores .* 3 numbers"),
    "too few scores": (llama, OWS(active_layers=1), {"scores": [1.0]}, "1 scores .* 3 numbers"),
    "scores that are no weights": (llama, OWS(active_layers=1), {"scores": [1.0, math.nan, 1.0]}, "finite numbers"),
    "scores below zero": (llama, OWS(active_layers=1), {"scores": [1.0, -1.0, 1.0]}, "at least 0"),
    "outlier scores without calibration": (llama, OWS(active_layers=1), {}, "calibration"),
    "weights in float64": (lambda: llama().double(), OWLORE, {}, r"embed_tokens\.weight holds torch\.float64"),
    "weights on meta": (on_meta, OWLORE, {}, "meta device"),
    "re-entrant checkpointing": (reentrant, OWLORE, {}, "re-entrant"),
    "DeepSpeed ZeRO": (zero, OWLORE, {}, "DeepSpeed"),
    "DataParallel": (lambda: nn.DataParallel(llama()), OWLORE, {}, "DataParallel"),
    "a negative learning rate": (llama, OWLORE, {"lr": -1.0}, "lr is -1"),
    "an unknown rounding": (llama, OWLORE, {"rounding": "up"}, "rounding"),
    "an odd block size": (llama, OWLORE, {"block_size": 3}, "block_size"),
    "a name in place of a method": (llama, "owlore", {}, "an instance such as OwLore"),  # type: ignore[dict-item]
    "a class in place of a method": (llama, OwLore, {}, "an instance such as OwLore"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_work_is_refused_and_the_model_untouched(case: str) -> None:
    """The reason is one sentence or two; modules, parameters, flags and hooks are what they were."""
    make, method, settings, message = CASES[case]
    model = make()
    before = anatomy(model)
    with pytest.raises(InputError, match=message) as caught:
        attach(model, method, **settings)
    assert anatomy(model) == before
    assert "\n" not in str(caught.value)


def test_a_ddp_model_is_refused_and_untouched(tmp_path: Path) -> None:
    """DDP, made in one process."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(llama())
        before = anatomy(model)
        with pytest.raises(InputError, match=r"DistributedDataParallel.*bare model on every rank"):
            attach(model, OWLORE)
        assert anatomy(model) == before
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("second", [OWLORE, LISA(active_layers=1), LoRAFA(rank=4)], ids=lambda method: method.name)
def test_an_attached_model_is_refused_and_trains_on(second: Method) -> None:
    """A second attachment says to detach first; the first goes on."""
    model = llama()
    optimizer = attach(model, OWLORE)
    train(model, optimizer, tokens())
    before = anatomy(model)
    with pytest.raises(InputError, match="already attached"):
        attach(model, second)
    assert anatomy(model) == before
    train(model, optimizer, tokens())
    optimizer.detach()
    attach(model, second).detach()


def test_a_failure_after_the_swap_puts_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """When storage for the first layers cannot be had, no swapped layer, hook or frozen flag is left."""
    model = llama()
    before = anatomy(model)

    def fails(self: LowRankLinear, *tensors: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(LowRankLinear, "activate", fails)
    for method in (OWLORE, LoRAFA(rank=4)):
        with pytest.raises(MemoryError):
            attach(model, method)
        assert anatomy(model) == before


def test_cheap_mistakes_are_found_before_the_scores() -> None:
    """A rank that does not fit is refused before calibration batches are read."""

    def batches() -> Any:
        raise AssertionError("the calibration was read")
        yield

    with pytest.raises(InputError, match="rank 99"):
        attach(llama(), OwLore(active_layers=1, rank=99), calibration=batches())


def test_reentrant_checkpointing_switched_on_later_is_refused_at_the_forward() -> None:
    """The first forward after it says so, not a silent loss of gradients."""
    model = llama()
    attach(model, OWLORE)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(InputError, match="re-entrant"):
        model(**tokens())


@pytest.mark.parametrize("scores", ["outlier", "hill", "weight-norm", "uniform"])
def test_scores_are_computed_and_leave_the_model_alone(scores: str) -> None:
    """Each kind gives the sampler one positive weight per layer, as `layer_scores` does."""
    from lisa_kernels import layer_scores

    model = llama()
    with torch.no_grad():
        for index, block in enumerate(model.model.layers):
            block.mlp.up_proj.weight[: index + 1, 0] = 9.0
    before, plain = anatomy(model), logits(model)
    batches = [tokens(seed=1)]
    wanted = layer_scores(model, scores, batches, threshold=13.0)
    assert anatomy(model) == before
    optimizer = attach(model, OWS(active_layers=1, scores=scores), calibration=batches)
    assert all(score > 0 for score in wanted)
    assert optimizer.sampler.weights == pytest.approx(wanted)
    assert (len(set(wanted)) == 1) == (scores == "uniform")
    assert torch.equal(logits(model), plain)


def test_scores_of_zero_still_train() -> None:
    """A layer without outliers gets the smallest positive weight; if there is none, all are alike and it is said."""
    optimizer = attach(llama(), OWS(active_layers=1, scores=(0.0, 0.5, 2.0)))
    assert optimizer.sampler.weights == [0.5, 0.5, 2.0]
    with pytest.warns(UserWarning, match="drawn uniformly"):
        optimizer = attach(llama(), OWS(active_layers=1, scores=(0.0, 0.0, 0.0)))
    assert optimizer.sampler.weights == [1.0, 1.0, 1.0]


def test_blocks_can_be_named() -> None:
    """`blocks=` trains the stack that it names: here T5's decoder, its encoder staying as it is."""
    model = t5()
    optimizer = attach(model, BAdam(period=1), blocks="decoder.block")
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    batch = tokens()
    for _ in range(3):
        train(model, optimizer, batch)
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert moved
    assert all(name.startswith("decoder.block.") for name in moved)


@pytest.mark.parametrize("embeddings", ["frozen", "always"])
def test_a_classifier_that_no_method_step_moves_is_told_of(embeddings: str) -> None:
    """A new head under frozen embeddings would stay random without a word."""
    model = build("LlamaForSequenceClassification", "LlamaConfig", **common(num_labels=2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(model, LISA(active_layers=1, embeddings=embeddings))
    told = [str(warning.message) for warning in caught if "trains nothing of score" in str(warning.message)]
    assert len(told) == (embeddings == "frozen")
