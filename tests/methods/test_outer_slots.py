"""Embedding and output layer in low rank: projected gradients, one slot where tied, folds, memory, plain models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DECODERS, HIDDEN, anatomy, changed, llama, logits, snapshot, tokens, train
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lisa_kernels import LISA, OWS, BAdam, GaLore, InputError, OwLore, attach
from lisa_kernels.layers import SlotModule
from lisa_kernels.methods import Method, SampledAdamW

RANK = 4
OWLORE = OwLore(active_layers=1, period=3, rank=RANK, gap=2, scores="uniform", embeddings="low-rank")
TIED = {"llama-tied", "qwen2", "gemma2", "gemma3", "gpt2", "opt", "falcon"}
METHODS: dict[str, Method] = {
    "owlore": OWLORE,
    "lisa": LISA(active_layers=1, period=2, rank=RANK, embeddings="low-rank"),
    "ows": OWS(active_layers=1, period=2, rank=RANK, embeddings="low-rank", scores="uniform"),
    "badam": BAdam(period=2, rank=RANK, embeddings="low-rank"),
    "galore": GaLore(rank=RANK, gap=2, embeddings="low-rank"),
}


def outer(optimizer: SampledAdamW) -> dict[str, SlotModule]:
    return optimizer.layout.always.lowrank


def weight_gradients(plain: nn.Module, *batches: dict[str, Tensor]) -> dict[str, Tensor]:
    plain.zero_grad()
    for batch in batches:
        plain(**batch).loss.backward()
    return {name: param.grad.clone() for name, param in plain.named_parameters() if param.grad is not None}


def check_projected(model: nn.Module, optimizer: SampledAdamW, gradients: dict[str, Tensor]) -> None:
    """Assert dB = P Gᵀ for embedding and head; where they are tied, G is the sum of both uses."""
    names = {id(param): name for name, param in model.named_parameters()}
    for layer in outer(optimizer).values():
        wanted = layer.basis @ gradients[names[id(layer.stored_weight)]].t()
        torch.testing.assert_close(layer.slot.grad, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("keep_logits", [False, True], ids=["without logits", "with logits"])
@pytest.mark.parametrize("name", DECODERS)
def test_slots_get_the_projected_gradients(name: str, keep_logits: bool) -> None:
    """In the step that finds the bases and in a later one, for every family and both ways to the loss."""
    model = DECODERS[name].make()
    plain = copy.deepcopy(model)
    optimizer = attach(model, GaLore(rank=RANK, gap=0, embeddings="low-rank"), lr=0.0, keep_logits=keep_logits)
    assert len(outer(optimizer)) == (1 if name in TIED else 2)
    for seed in range(2):
        batch = tokens(seed=seed)
        model(**batch).loss.backward()
        check_projected(model, optimizer, weight_gradients(plain, batch))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_micro_batches_add_up_in_one_basis(tied: bool) -> None:
    """Three backwards give P (ΣG)ᵀ although the first of them finds the basis."""
    model = llama(tied=tied)
    plain = copy.deepcopy(model)
    optimizer = attach(model, OWLORE)
    batches = [tokens(seed=seed) for seed in range(3)]
    for batch in batches:
        model(**batch).loss.backward()
    check_projected(model, optimizer, weight_gradients(plain, *batches))


def test_a_wrong_basis_fails_the_same_check() -> None:
    """Negative control: a tied slot that misses one of its two uses is noticed."""
    model = llama(tied=True)
    plain = copy.deepcopy(model)
    optimizer = attach(model, OWLORE)
    gradients = weight_gradients(plain, tokens())
    for handle in list(model.model.embed_tokens._forward_hooks):
        del model.model.embed_tokens._forward_hooks[handle]
    model(**tokens()).loss.backward()
    with pytest.raises(AssertionError):
        check_projected(model, optimizer, gradients)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_move_by_the_lifted_adam_step_once(tied: bool) -> None:
    """W ← (1 − lr·wd) W + Bᵀ P with B of torch's own AdamW: a tied table decays and moves once, not twice."""
    lr, decay = 1e-2, 0.1
    model = llama(tied=tied)
    optimizer = attach(model, OwLore(active_layers=1, rank=RANK, gap=0, scores="uniform", embeddings="low-rank"),
                       lr=lr, weight_decay=decay)  # fmt: skip
    twins = {key: nn.Parameter(torch.zeros_like(layer.slot)) for key, layer in outer(optimizer).items()}
    reference = torch.optim.AdamW(twins.values(), lr=lr, weight_decay=0.0)
    for step in range(3):
        model(**tokens(seed=step)).loss.backward()
        old = {}
        for key, layer in outer(optimizer).items():
            twins[key].data.zero_()
            twins[key].grad = layer.slot.grad.clone()
            old[key] = layer.weight.detach().clone()
        reference.step()
        optimizer.step()
        optimizer.zero_grad()
        for key, layer in outer(optimizer).items():
            wanted = (1 - lr * decay) * old[key] + twins[key].detach().t() @ layer.basis
            torch.testing.assert_close(layer.weight.detach(), wanted, rtol=1e-4, atol=1e-5)
            assert not layer.slot.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma3", "gpt2", "opt", "llava"])
def test_every_method_trains_around_its_layers(name: str, method: str) -> None:
    """Each step moves embedding, head and final norm and the active layers, nothing else; detached: a plain model."""
    family = DECODERS[name]
    model = family.make()
    shape, plain = anatomy(model), logits(model)
    optimizer = attach(model, METHODS[method], lr=5e-3)
    assert torch.equal(logits(model), plain)
    losses = []
    for _ in range(6):
        blocks = tuple(f"{family.path}.{index}." for index in optimizer.active_layers)
        wanted = {*family.embeddings, *family.head} | {key for key in snapshot(model) if key.startswith(blocks)}
        before = snapshot(model)
        losses.append(train(model, optimizer, tokens()))
        assert changed(model, before) == wanted
    assert losses[-1] < losses[0]
    trained = logits(model)
    optimizer.detach()
    assert anatomy(model) == shape
    assert torch.equal(logits(model), trained)


class Allocations(TorchDispatchMode):
    """Notes the largest tensor, in elements, that an operation makes in storage of its own."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.largest = known, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("embeddings", ["low-rank", "always"])
def test_the_tables_gradients_never_exist(embeddings: str, tied: bool) -> None:
    """Forwards, backwards, refreshes and steps make nothing of [V, n]; negative control: trained in full they do."""
    width, vocabulary = 256, 2000
    model = llama(vocab_size=vocabulary, hidden_size=width, tied=tied)
    method = OwLore(active_layers=1, rank=RANK, gap=2, scores="uniform", embeddings=embeddings)
    optimizer = attach(model, method, lr=1e-3)
    known = {param.untyped_storage().data_ptr() for param in model.parameters() if param.numel()}
    with Allocations(known) as made:
        for seed in range(3):
            train(model, optimizer, tokens(2, 20, seed))
    assert (made.largest >= vocabulary * width) is (embeddings == "always")


def test_state_and_gradient_are_of_the_rank() -> None:
    """Bytes that embedding and head own beyond their weights: slot, gradient and moments of [r, V], a basis [r, n]."""
    model = llama(vocab_size=1000)
    optimizer = attach(model, OWLORE)
    train(model, optimizer, tokens())
    for layer in outer(optimizer).values():
        assert layer.slot.shape == (RANK, 1000)
        assert layer.basis.shape == (RANK, HIDDEN)
        assert all(moment.shape == (RANK, 1000) for moment in optimizer.moments(layer.slot))
        assert layer.weight not in optimizer.state
        assert layer.weight.grad is None


def test_a_rank_above_a_small_side_is_clipped() -> None:
    """OPT's embeddings are 16 wide: at rank 24 they get 16, the blocks their 24."""
    model = DECODERS["opt"].make()
    optimizer = attach(model, GaLore(rank=24, embeddings="low-rank"))
    assert [layer.rank for layer in outer(optimizer).values()] == [16]
    train(model, optimizer, tokens())


def test_refreshes_are_staggered_and_moments_carried() -> None:
    """Embedding and head refresh at different steps of the gap, each bringing its moments along."""
    model = llama()
    optimizer = attach(model, GaLore(rank=RANK, gap=50, embeddings="low-rank"))
    offsets = [layer.tracker.offset for layer in outer(optimizer).values() if layer.tracker is not None]
    assert len(set(offsets)) == 2
    assert all(0 <= offset < 50 for offset in offsets)


def test_save_pretrained_in_mid_training_is_a_plain_checkpoint(tmp_path: Path) -> None:
    """Tied or not, the folder loads into an ordinary model with the same logits."""
    from transformers import AutoModelForCausalLM

    for tied in (False, True):
        model = llama(tied=tied)
        optimizer = attach(model, OWLORE)
        train(model, optimizer, tokens())
        folder = tmp_path / str(tied)
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        assert torch.equal(logits(loaded.train()), logits(model))


@pytest.mark.parametrize("keep_logits", [False, True], ids=["without logits", "with logits"])
def test_a_skipped_step_leaves_tables_and_goes_on(keep_logits: bool) -> None:
    """A loss that is not finite moves neither table nor basis into the unusable; the next steps train."""
    model = llama(tied=True)
    optimizer = attach(model, OWLORE, keep_logits=keep_logits)
    before = snapshot(model)
    (model(**tokens()).loss * float("nan")).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.skipped_steps == 1
    assert not changed(model, before)
    losses = [train(model, optimizer, tokens()) for _ in range(6)]
    assert losses[-1] < losses[0]
    for layer in outer(optimizer).values():
        torch.testing.assert_close(layer.basis @ layer.basis.t(), torch.eye(RANK), rtol=0, atol=1e-4)


def test_bfloat16_and_checkpointing_train() -> None:
    """16-bit weights with gradient checkpointing: the loss falls, tables stay 16-bit."""
    for tied in (False, True):
        model = llama(tied=tied).to(torch.bfloat16)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = attach(model, OWLORE, lr=1e-2)
        losses = [train(model, optimizer, tokens()) for _ in range(8)]
        assert losses[-1] < losses[0]
        optimizer.detach()
        assert {param.dtype for param in model.parameters()} == {torch.bfloat16}


def no_embedding() -> Any:
    model = llama()
    model.get_input_embeddings = lambda: None
    return model


def renormalised() -> Any:
    model = llama()
    model.model.embed_tokens.max_norm = 1.0
    return model


def tied_to_another_class() -> Any:
    class Output(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.t()

    model = llama()
    model.lm_head = Output(model.model.embed_tokens.weight)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (no_embedding, "names no token embedding"),
        (renormalised, "max_norm"),
        (tied_to_another_class, "tied to an output layer that cannot carry"),
    ],
    ids=["no embedding", "max_norm", "tied to another class"],
)
def test_models_that_cannot_are_refused_and_untouched(make: Any, words: str) -> None:
    """One sentence with what to choose instead; modules, flags and hooks are as they were."""
    model = make()
    shape = anatomy(model)
    with pytest.raises(InputError, match=words) as caught:
        attach(model, OWLORE)
    assert 'embeddings="always"' in str(caught.value)
    assert anatomy(model) == shape


def test_a_resumed_run_of_a_tied_model_is_bit_equal() -> None:
    """Six steps at once; three, a fresh attachment, three more: one slot and one basis for embedding and head."""

    def run(model: nn.Module, optimizer: SampledAdamW, first: int, last: int) -> None:
        for seed in range(first, last):
            train(model, optimizer, tokens(seed=seed))

    whole, stopped, resumed = (llama(tied=True) for _ in range(3))
    reference, before = attach(whole, OWLORE, lr=5e-3), attach(stopped, OWLORE, lr=5e-3)
    run(whole, reference, 0, 6)
    run(stopped, before, 0, 3)
    after = attach(resumed, OWLORE, lr=5e-3, seed=7)
    resumed.load_state_dict(stopped.state_dict())
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    run(resumed, after, 3, 6)
    assert not changed(resumed, snapshot(whole))


def test_a_tied_slot_is_one_parameter() -> None:
    """The optimizer clips, steps and folds it once."""
    optimizer = attach(llama(tied=True), OWLORE)
    slots = [param for group in optimizer.param_groups if group["name"] == "slots" for param in group["params"]]
    (layer,) = outer(optimizer).values()
    assert sum(param is layer.slot for param in slots) == 1
