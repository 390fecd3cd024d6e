"""The optimizer of an attached model: which layers train when, and what the others own meanwhile."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from families import DECODERS, changed, llama, logits, snapshot, tokens, train
from torch import nn

from lisa_kernels import LISA, OWS, AdamW8bit, BAdam, FullFineTune, GaLore, InputError, LoRA, LoRAFA, OwLore, attach
from lisa_kernels.methods import Method, SampledAdamW
from lisa_kernels.samplers import AdaptiveSampler, CyclicSampler, UniformSampler, WeightedSampler

SWITCHING: dict[str, Method] = {
    "lisa": LISA(active_layers=1, period=1),
    "lisa-sampled": LISA(active_layers=1, period=1, embeddings="sampled"),
    "owlore": OwLore(active_layers=2, period=1, rank=4, scores="uniform"),
    "ows": OWS(active_layers=2, period=1, scores="gradient-norm"),
    "badam": BAdam(period=1),
    "owlore-keep": OwLore(active_layers=2, period=1, rank=4, scores="uniform", retired_state="keep"),
}
ALL: dict[str, Method] = {
    **SWITCHING,
    "galore": GaLore(rank=4),
    "lora": LoRA(rank=4),
    "lora-fa": LoRAFA(rank=4),
    "full": FullFineTune(),
}


def quick(model: nn.Module, optimizer: SampledAdamW, seed: int = 0) -> None:
    train(model, optimizer, tokens(1, 4, seed))


# Schedule


@pytest.mark.parametrize("period", [1, 2, 3])
def test_layers_switch_every_period(period: int) -> None:
    """`active_layers` are those that the next step moves; visits and history count them."""
    model = llama(layers=5)
    optimizer = attach(model, LISA(active_layers=2, period=period))
    seen, visits = [], [0] * 5
    for _ in range(7):
        active, before = optimizer.active_layers, snapshot(model)
        quick(model, optimizer)
        moved = {int(name.split(".")[2]) for name in changed(model, before) if name.startswith("model.layers.")}
        assert moved == set(active)
        seen.append(active)
        for index in active:
            visits[index] += 1
    assert all(seen[i] == seen[i - i % period] for i in range(7))
    assert optimizer.visits == visits
    assert optimizer.history == [*seen[::period], *([optimizer.active_layers] if 7 % period == 0 else [])]
    assert len({tuple(active) for active in seen}) > 1


def test_a_step_without_gradients_is_no_step() -> None:
    """Calling `step()` before any backward moves nothing and does not count."""
    model = llama()
    optimizer = attach(model, LISA(active_layers=1, period=1))
    before = snapshot(model)
    optimizer.step()
    assert optimizer.calls == 0
    assert not changed(model, before)


def test_a_skipped_step_counts_as_a_call_and_moves_nothing() -> None:
    """A NaN in the gradients leaves every weight; the schedule goes on."""
    model = llama()
    optimizer = attach(model, LISA(active_layers=1, period=1))
    before = snapshot(model)
    (model(**tokens()).loss * float("inf")).backward()
    optimizer.step()
    assert (optimizer.calls, optimizer.steps, optimizer.skipped_steps) == (1, 0, 1)
    assert not changed(model, before)


@pytest.mark.parametrize("name", SWITCHING)
def test_equal_seeds_give_equal_schedules_and_others_do_not(name: str) -> None:
    """The history is a function of the seed."""
    histories = []
    for seed in (3, 3, 4):
        model = llama(layers=6)
        optimizer = attach(model, SWITCHING[name], seed=seed)
        for _ in range(8):
            quick(model, optimizer)
        histories.append(optimizer.history)
    assert histories[0] == histories[1] != histories[2]


@pytest.mark.parametrize(
    ("method", "sampler"),
    [
        (LISA(active_layers=1), UniformSampler),
        (OWS(active_layers=1, scores="weight-norm"), WeightedSampler),
        (OwLore(active_layers=1, rank=4, scores=(1.0, 2.0, 3.0)), WeightedSampler),
        (BAdam(), CyclicSampler),
        (OwLore(active_layers=1, rank=4, scores="gradient-norm"), AdaptiveSampler),
        (GaLore(rank=4), type(None)),
        (LoRA(rank=4), type(None)),
        (LoRAFA(rank=4), type(None)),
        (FullFineTune(), type(None)),
    ],
    ids=lambda value: getattr(value, "name", getattr(value, "__name__", "")),
)
def test_each_method_has_its_sampler(method: Method, sampler: type) -> None:
    """LISA draws uniformly, OWS and OwLore by weight, BAdam in turn, gradient norms adapt; the others do not draw."""
    optimizer = attach(llama(), method)
    assert type(optimizer.sampler) is sampler
    assert (optimizer.period is None) == (sampler is type(None))


def test_the_design_of_the_draw_is_the_methods() -> None:
    """Given scores (5, 1, 1) and one layer of three, marginals are exact; the sequential design is passed on."""
    scores = (5.0, 1.0, 1.0)
    for design in ("marginals", "sequential"):
        optimizer = attach(llama(), OWS(active_layers=2, scores=scores, design=design))
        assert optimizer.sampler.design == design
        assert optimizer.sampler.weights == list(scores)
    wanted = attach(llama(), OWS(active_layers=1, scores=scores)).sampler.inclusion_probabilities()
    assert wanted == pytest.approx([5 / 7, 1 / 7, 1 / 7])


def test_badam_visits_every_layer_once_per_round() -> None:
    """Four layers, four periods: each once."""
    model = llama(layers=4)
    optimizer = attach(model, BAdam(period=2))
    for _ in range(8):
        quick(model, optimizer)
    assert optimizer.visits == [2, 2, 2, 2]


def test_gradient_norms_reach_the_sampler() -> None:
    """After a period the sampler knows the mean gradient norm of exactly the layers that trained."""
    model = llama()
    optimizer = attach(model, OWS(active_layers=1, period=2, scores="gradient-norm"))
    active = optimizer.active_layers[0]
    norms = []
    for seed in range(2):
        model(**tokens(seed=seed)).loss.backward()
        grads = [p.grad for p in model.model.layers[active].parameters()]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        optimizer.step()
        optimizer.zero_grad()
    averages = optimizer.sampler.averages
    assert averages[active] == pytest.approx(sum(norms) / 2)
    assert [averages[i] for i in range(3) if i != active] == [None, None]


def test_a_norm_that_is_not_finite_is_left_out() -> None:
    """One overflow in a period does not hide the norms of its other steps, nor does GradScaler's scale enter them."""
    model = llama()
    optimizer = attach(model, OWS(active_layers=1, period=2, scores="gradient-norm"))
    active = optimizer.active_layers[0]
    (model(**tokens()).loss * float("nan")).backward()
    optimizer.step()
    optimizer.zero_grad()
    (model(**tokens()).loss * 1024).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.model.layers[active].parameters()]).item()
    optimizer.grad_scale = torch.tensor(1024.0)
    optimizer.step()
    assert optimizer.sampler.averages[active] == pytest.approx(norm / 1024)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_sampled_embeddings_are_layers_of_the_draw(tied: bool) -> None:
    """Embedding and head are two more layers, or one when they share their matrix, and train only when drawn."""
    model = llama(tied=tied)
    optimizer = attach(model, LISA(active_layers=1, period=1, embeddings="sampled"), seed=1)
    around = ["embeddings"] if tied else ["embeddings", "head"]
    assert optimizer.layer_names == [*(f"model.layers.{i}" for i in range(3)), *around]
    wanted = {
        "embeddings": {"model.embed_tokens.weight"} | ({"model.norm.weight"} if tied else set()),
        "head": {"lm_head.weight", "model.norm.weight"},
    }
    seen = set()
    for _ in range(25):
        name, before = optimizer.layer_names[optimizer.active_layers[0]], snapshot(model)
        quick(model, optimizer)
        moved = changed(model, before)
        assert moved == wanted.get(name, {key for key in before if key.startswith(f"{name}.")})
        seen.add(name)
    assert seen == set(optimizer.layer_names)


@pytest.mark.parametrize("name", ALL)
def test_groups_never_change(name: str) -> None:
    """Schedulers and Accelerate hold on to the groups: same groups, same parameters, every parameter once."""
    model = llama(layers=4)
    optimizer = attach(model, ALL[name])
    before = [[id(param) for param in group["params"]] for group in optimizer.param_groups]
    everything = [key for group in before for key in group]
    assert len(everything) == len(set(everything))
    for step in range(5):
        quick(model, optimizer, step)
        assert [[id(param) for param in group["params"]] for group in optimizer.param_groups] == before


# Freezing and checkpoints of the model


def test_freezing_is_checked_again_at_each_step() -> None:
    """Someone who unfreezes everything, before the forward or before the step, trains no other layer; told once."""
    model = llama()
    optimizer = attach(model, LISA(active_layers=1, period=10))
    active = optimizer.active_layers[0]
    before = snapshot(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model.requires_grad_(True)
            loss = model(**tokens()).loss
            model.requires_grad_(True)
            loss.backward()
            model.requires_grad_(True)
            optimizer.step()
            optimizer.zero_grad()
    assert len([w for w in caught if "outside the sampler" in str(w.message)]) == 1
    moved = {name for name in changed(model, before) if name.startswith("model.layers.")}
    assert {int(name.split(".")[2]) for name in moved} == {active}


def test_frozen_embeddings_stay() -> None:
    """embeddings="frozen" trains no table, norm or head around the blocks."""
    model = llama()
    optimizer = attach(model, OwLore(active_layers=1, period=1, rank=4, scores="uniform", embeddings="frozen"))
    before = snapshot(model)
    for _ in range(4):
        quick(model, optimizer)
    assert all(name.startswith("model.layers.") for name in changed(model, before))


def test_tied_embeddings_train_once() -> None:
    """A shared matrix is one parameter with the sum of both gradients, moved as torch's AdamW moves it."""
    model, twin = llama(tied=True), llama(tied=True)
    optimizer = attach(model, LISA(active_layers=1), lr=1e-2)
    table = model.get_input_embeddings().weight
    assert sum(param is table for group in optimizer.param_groups for param in group["params"]) == 1
    reference = torch.optim.AdamW([twin.get_input_embeddings().weight], lr=1e-2)
    twin(**tokens()).loss.backward()
    reference.step()
    train(model, optimizer, tokens())
    assert model.lm_head.weight is table
    torch.testing.assert_close(table, twin.get_input_embeddings().weight)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "falcon", "mixtral"])
@pytest.mark.parametrize("name", ["lisa", "owlore", "galore"])
def test_saving_in_mid_training_gives_an_ordinary_checkpoint(family: str, name: str, tmp_path: Any) -> None:
    """`save_pretrained` gives the plain model's keys, and plain transformers loads it with the same logits."""
    from transformers import AutoModelForCausalLM

    make = DECODERS[family].make
    model = make()
    keys = list(model.state_dict())
    optimizer = attach(model, ALL[name], lr=1e-2)
    for step in range(3):
        quick(model, optimizer, step)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert {name: type(module) for name, module in loaded.named_modules()} == {
        name: type(module) for name, module in make().named_modules()
    }
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("name", ALL)
def test_strict_loading_works_on_an_attached_model(name: str) -> None:
    """The plain model's weights go into the attached one with strict=True, and training goes on."""
    model = llama(layers=4)
    optimizer = attach(model, ALL[name])
    quick(model, optimizer)
    weights = llama(layers=4, initializer_range=0.1).state_dict()
    model.load_state_dict(weights, strict=True)
    found = model.state_dict()
    assert list(found) == list(weights)
    assert all(torch.equal(found[key], value) for key, value in weights.items())
    quick(model, optimizer)


# The end


def test_detach_frees_state_and_refuses_further_steps() -> None:
    """After `detach()` the optimizer owns nothing, a second call changes nothing, and a step says what to do."""
    model = llama()
    optimizer = attach(model, OwLore(active_layers=2, rank=4, scores="uniform"))
    quick(model, optimizer)
    assert optimizer.detach() is model
    assert optimizer.detach() is model
    assert not optimizer.state
    assert optimizer.active_layers == []
    with pytest.raises(InputError, match="detached"):
        optimizer.step()
    with pytest.raises(InputError, match="detached"):
        optimizer.load_state_dict(optimizer.state_dict())
    attach(model, LISA(active_layers=1)).detach()


def test_detach_gives_back_flags_that_the_user_had_set() -> None:
    """A parameter that was frozen before is frozen again."""
    model = llama()
    model.model.layers[2].requires_grad_(False)
    before = {name: param.requires_grad for name, param in model.named_parameters()}
    optimizer = attach(model, OwLore(active_layers=2, rank=4, scores="uniform"))
    quick(model, optimizer)
    optimizer.detach()
    assert {name: param.requires_grad for name, param in model.named_parameters()} == before


def test_hooks_on_the_step_run_once() -> None:
    """Also after a plain AdamW8bit was made, whose class torch has wrapped by then."""
    AdamW8bit([nn.Parameter(torch.zeros(2))])
    model = llama()
    optimizer = attach(model, LISA(active_layers=1))
    calls = []
    optimizer.register_step_post_hook(lambda *args: calls.append(1))
    quick(model, optimizer)
    assert calls == [1]


def test_a_closure_gives_the_loss() -> None:
    """`step(closure)` evaluates with gradients and returns what the closure returns."""
    model = llama()
    optimizer = attach(model, LISA(active_layers=1))

    def closure() -> torch.Tensor:
        loss = model(**tokens()).loss
        loss.backward()
        return loss

    before = snapshot(model)
    assert float(optimizer.step(closure).detach()) > 0
    assert changed(model, before)


def test_clipping_counts_all_active_gradients_and_shrinks_the_step() -> None:
    """With an eps of the gradients' size the step grows with the gradients, unless they are clipped."""
    moved = []
    for limit in (None, 1e-3):
        model = llama(layers=4)
        optimizer = attach(model, LISA(active_layers=2, period=9), lr=1e-2, eps=1.0, max_grad_norm=limit)
        before = snapshot(model)
        model(**tokens(2, 8, 0)).loss.backward()
        norm = torch.nn.utils.get_total_norm([param.grad for param in model.parameters() if param.grad is not None])
        optimizer.step()
        if limit is not None:
            assert optimizer.last_grad_norm is not None
            assert optimizer.last_grad_norm.item() == pytest.approx(norm.item(), rel=1e-5)
        moved.append(max(float((param - before[name]).abs().max()) for name, param in model.state_dict().items()))
    assert moved[1] < 0.1 * moved[0]
