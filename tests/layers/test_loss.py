"""The loss without logits is the model's own loss, in every use that it takes over; all other uses stay the model's."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from families import DECODERS, VOCABULARY, anatomy, build, common, llama, roberta_classifier, roberta_masked, t5, tokens
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lisa_kernels.layers import leave_out_logits
from lisa_kernels.ops.linear_cross_entropy import Curve

ROWS, COLUMNS = 3, 40


def batch(masked: bool = True) -> dict[str, Tensor]:
    made = tokens(rows=ROWS, columns=COLUMNS)
    if masked:
        made["labels"][0, :10] = -100
        made["labels"][2, 20:] = -100
    return made


class Sizes(TorchDispatchMode):
    """Collects the number of elements of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.seen.add(value.numel())
        return result


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def check_equal(model: nn.Module, plain: nn.Module, inputs: dict[str, Any]) -> None:
    """Assert that one loss and its gradients are the other's, to float32 rounding."""
    losses = []
    for each in (model, plain):
        each.zero_grad()
        losses.append(each(**inputs).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    assert gradients(model).keys() == gradients(plain).keys()
    for name, wanted in gradients(plain).items():
        found = gradients(model)[name]
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()) + 1e-8, msg=name)


@pytest.mark.parametrize("name", DECODERS)
def test_a_familys_loss_and_gradients_are_its_own(name: str) -> None:
    """Every family, with labels masked."""
    plain = DECODERS[name].make()
    model = copy.deepcopy(plain)
    assert leave_out_logits(model) is not None
    check_equal(model, plain, batch())


SHAPED = {
    "gemma2": (DECODERS["gemma2"].make, Curve(cap=30.0)),
    "cohere": (lambda: build("CohereForCausalLM", "CohereConfig", **common(logit_scale=0.0625)), Curve(0.0625)),
    "granite": (lambda: build("GraniteForCausalLM", "GraniteConfig", **common(logits_scaling=6.0)), Curve(1 / 6)),
}


@pytest.mark.parametrize("name", SHAPED)
def test_scaled_and_capped_logits_are_taken_over(name: str) -> None:
    """Also where they are so large that the cap matters: losses, gradients and logits on demand are the model's own."""
    make, curve = SHAPED[name]
    plain = make()
    with torch.no_grad():
        # Logits of some tens, as trained models have.
        plain.get_output_embeddings().weight.mul_(60)
    model = copy.deepcopy(plain)
    without = leave_out_logits(model)
    assert without is not None
    assert without.curve == curve
    assert model(**batch()).logits.abs().max() > 3
    check_equal(model, plain, batch())
    torch.testing.assert_close(model(**batch()).logits, plain(**batch()).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [t5, roberta_masked, roberta_classifier], ids=lambda make: make.__name__)
def test_other_models_are_left_as_they_are(make: Any) -> None:
    """Losses of another kind (no shift, an encoder, classes) are not taken over, and no hook stays."""
    model = make()
    shape, state = anatomy(model), torch.get_rng_state()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert leave_out_logits(model) is None
    # It is said of models with an output layer, not of a classifier.
    assert any("forming the logits" in str(each.message) for each in caught) is (make is not roberta_classifier)
    assert anatomy(model) == shape
    assert "_loss_function" not in vars(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"num_items_in_batch": 57},
        {"num_items_in_batch": torch.tensor(57)},
        {"shift_labels": torch.randint(3, 50, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(4))},
        {"ignore_index": 5},
        {"attention_mask": torch.ones(ROWS, COLUMNS, dtype=torch.int64).tril(20)},
    ],
    ids=["plain", "items", "items as a tensor", "shifted labels", "another index", "a mask"],
)
def test_what_a_trainer_hands_over_is_honoured(inputs: dict[str, Any]) -> None:
    """num_items_in_batch of accumulated steps, labels shifted before, another ignored index, masks."""
    plain, model = llama(), llama()
    assert leave_out_logits(model) is not None
    masked = "ignore_index" not in inputs
    check_equal(model, plain, {**batch(masked), **inputs})


def test_positional_labels_and_accumulated_batches() -> None:
    """Two micro-batches divided by the number of labels of both are one batch of both."""
    plain, model = llama(), llama()
    assert leave_out_logits(model) is not None
    whole = batch()
    count = (whole["labels"][:, 1:] != -100).sum()
    plain(**whole).loss.backward()
    for rows in (slice(0, 1), slice(1, 3)):
        part = {name: value[rows] for name, value in whole.items()}
        model(part["input_ids"], labels=part["labels"], num_items_in_batch=count).loss.backward()
    for name, wanted in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], wanted, rtol=1e-3, atol=1e-6, msg=name)


def test_what_a_model_adds_to_its_loss_stays() -> None:
    """Mixtral's balance of its experts, asked for in the call, is in the loss and in the gradients."""
    plain = DECODERS["mixtral"].make()
    model = copy.deepcopy(plain)
    assert leave_out_logits(model) is not None
    check_equal(model, plain, {**batch(), "output_router_logits": True})
    with_balance = model(**batch(), output_router_logits=True).loss
    assert not torch.allclose(with_balance, model(**batch()).loss)


def test_no_logits_exist_in_a_training_step() -> None:
    """Neither forward nor backward makes a tensor of tokens × vocabulary; negative control: the plain model does."""
    plain, model = (llama(vocab_size=1000).requires_grad_(False) for _ in range(2))
    assert leave_out_logits(model) is not None
    model.model.layers[2].requires_grad_(True)
    plain.model.layers[2].requires_grad_(True)
    inputs = tokens(rows=8, columns=60)
    size = 8 * 60 * 1000
    for each, expected in ((model, False), (plain, True)):
        with Sizes() as sizes:
            each(**inputs).loss.backward()
        assert (max(sizes.seen) >= size) is expected


def test_evaluation_needs_no_logits_where_it_is_asked_to() -> None:
    """The same loss, and nothing of the size of the logits; otherwise evaluation forms them."""
    model = llama().eval()
    without = leave_out_logits(model)
    assert without is not None
    losses, seen = [], []
    for asked in (False, True):
        without.in_evaluation = asked
        with torch.no_grad(), Sizes() as sizes:
            losses.append(model(**batch(), use_cache=False).loss)
        seen.append(ROWS * COLUMNS * VOCABULARY in sizes.seen)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    assert seen == [True, False]


def test_logits_are_formed_when_they_are_read() -> None:
    """Whoever reads them in training gets the model's own, in the graph: an added term has its gradient."""
    plain, model = llama(), llama()
    assert leave_out_logits(model) is not None
    for each in (model, plain):
        output = each(**batch())
        (output.loss + 0.1 * output.logits.square().mean()).backward()
    for name, wanted in gradients(plain).items():
        torch.testing.assert_close(gradients(model)[name], wanted, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("use", ["eval", "no grad", "no labels", "some logits", "a tuple"])
def test_all_other_uses_are_the_models_own(use: str) -> None:
    """Evaluation, generation, and whoever asks for logits or a tuple: bit-equal outputs of the plain kind."""
    plain, model = llama(), llama()
    assert leave_out_logits(model) is not None
    inputs: dict[str, Any] = batch()
    if use == "no labels":
        del inputs["labels"]
    if use == "some logits":
        inputs.update(logits_to_keep=2, labels=inputs["labels"][:, :2])
    if use == "a tuple":
        inputs["return_dict"] = False
    outputs = []
    for each in (model, plain):
        each.train(use != "eval")
        with torch.set_grad_enabled(use != "no grad"):
            outputs.append(each(**inputs))
    assert type(outputs[0]) is type(outputs[1])
    index = 0 if use == "no labels" else 1
    assert torch.equal(outputs[0][index], outputs[1][index])


def fails(*args: Any) -> None:
    raise ArithmeticError


def test_generation_and_a_failed_forward_leave_no_trace() -> None:
    """A forward that raises half-way does not make the next direct use of the head narrow."""
    plain, model = llama(), llama()
    assert leave_out_logits(model) is not None
    prompt = tokens(rows=1, columns=4)["input_ids"]
    for each in (plain, model):
        each.eval()
    wanted = plain.generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), wanted)
    model.train()
    broken = model.model.layers[1].register_forward_pre_hook(fails)
    with pytest.raises(ArithmeticError):
        model(**batch())
    broken.remove()
    broken = model.lm_head.register_forward_hook(fails)
    with pytest.raises(ArithmeticError):
        model(**batch())
    broken.remove()
    hidden = torch.randn(2, 5, model.config.hidden_size)
    assert model.lm_head(hidden).shape == (2, 5, VOCABULARY)
    model.eval()
    assert torch.equal(model(**batch()).logits, plain(**batch()).logits)


@pytest.mark.parametrize(
    "setting", ["autocast", "checkpointing", pytest.param("compiled", marks=pytest.mark.slow), "bfloat16"]
)
def test_other_features_keep_working(setting: str) -> None:
    """Autocast, gradient checkpointing, torch.compile and 16-bit weights give the plain loss and gradients."""
    plain, model = llama(), llama()
    if setting == "bfloat16":
        plain, model = plain.to(torch.bfloat16), model.to(torch.bfloat16)
    assert leave_out_logits(model) is not None
    for each in (plain, model):
        if setting == "checkpointing":
            each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    call = torch.compile(model, backend="aot_eager") if setting == "compiled" else model
    losses = []
    for each in (call, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=setting == "autocast"):
            losses.append(each(**batch()).loss)
        losses[-1].backward()
    rounding = 2**-6 if setting in ("autocast", "bfloat16") else 1e-5
    torch.testing.assert_close(losses[0].float(), losses[1].float(), rtol=rounding, atol=0)
    for name, wanted in gradients(plain).items():
        found = gradients(model)[name]
        assert found.dtype == wanted.dtype
        assert float((found - wanted).norm()) <= 4 * rounding * float(wanted.norm()) + 1e-6, name


def test_logits_are_read_under_the_autocast_of_the_forward() -> None:
    """Accelerate puts its autocast inside the hooks; whoever reads the logits later gets those of the forward."""
    plain, model = llama(), llama()
    assert leave_out_logits(model) is not None
    outputs = []
    for each in (model, plain):
        each.forward = torch.autocast("cpu", dtype=torch.bfloat16)(each.forward)
        outputs.append(each(**batch()))
    assert outputs[0].logits.dtype == outputs[1].logits.dtype == torch.bfloat16
    assert torch.equal(outputs[0].logits, outputs[1].logits)


def test_removing_it_leaves_a_plain_model() -> None:
    """Hooks, loss function and outputs are as before, a loss function of the user's own too."""
    plain, model = llama(), llama()
    shape = anatomy(model)
    without = leave_out_logits(model)
    assert without is not None
    without.remove()
    assert anatomy(model) == shape
    assert "_loss_function" not in vars(model)
    assert model(**batch()).logits.shape == (ROWS, COLUMNS, VOCABULARY)
    own = plain.loss_function

    def users(**kwargs: Any) -> Tensor:
        return own(**kwargs)

    model.loss_function = users
    without = leave_out_logits(model)
    assert without is not None
    without.remove()
    assert model.loss_function is users
