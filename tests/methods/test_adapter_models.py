"""LoRA-FA beside peft: the same logits from one folder, the same gradients of B, fewer saved bytes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import ADAPTED, HIDDEN, LAYERS, llama, logits, tokens, train
from tolerances import BFLOAT16_PRODUCT
from torch import Tensor, nn

from lisa_kernels import LoRAFA, attach
from lisa_kernels.layers import LowRankLinear

RANK = 4


def lora(model: nn.Module, **settings: Any) -> Any:
    """Return peft's model with LoRA of the same rank and scale on all linear layers."""
    is_conv1d = model.config.model_type == "gpt2"
    settings = {"target_modules": "all-linear", "fan_in_fan_out": is_conv1d, **settings}
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=8, **settings))


def lora_layers(model: Any) -> dict[str, Any]:
    """Return peft's layers by the names that they have in the bare model."""
    modules = model.get_base_model().named_modules()
    return {name: module for name, module in modules if isinstance(module, peft.tuners.lora.LoraLayer)}


def own_layers(model: nn.Module) -> dict[str, LowRankLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def trained_lora(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """Return peft's model after some steps in which A moved too, so that its rows are far from orthonormal."""
    model = lora(model)
    optimizer = torch.optim.AdamW((param for param in model.parameters() if param.requires_grad), lr=3e-2)
    for _ in range(3):
        train(model, optimizer, batch)
    return model


def error(found: Tensor, wanted: Tensor) -> float:
    """Return the relative error in the norm."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in ADAPTED),
        *((name, torch.bfloat16) for name in ("llama", "gpt2", "t5", "roberta-classifier")),
    ],
    ids=str,
)
def test_peft_loads_the_folder_and_gives_the_same_logits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """And what peft then writes is read back, bit for bit."""
    adapted = ADAPTED[name]
    base, batch = adapted.make().to(dtype), adapted.batch()
    model, again, plain = copy.deepcopy(base), copy.deepcopy(base), logits(base, batch)
    optimizer = attach(model, LoRAFA(rank=RANK, alpha=8), lr=1e-2)
    for _ in range(3):
        train(model, optimizer, batch)
    optimizer.save_adapter(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    # In 16 bits the blocks and the head each round as a product does, here and there.
    bound = 1e-5 if dtype == torch.float32 else (LAYERS + 1) * BFLOAT16_PRODUCT
    assert error(logits(theirs, batch), logits(model, batch)) <= bound
    assert error(plain, logits(model, batch)) > 10 * bound
    theirs.save_pretrained(tmp_path / "theirs")
    attach(again, LoRAFA(rank=RANK, alpha=8)).load_adapter(tmp_path / "theirs")
    assert torch.equal(logits(again, batch), logits(model, batch))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "roberta-masked", "phi3"])
def test_an_adapter_that_peft_trained_goes_on_here(name: str, tmp_path: Path) -> None:
    """Its A is split, the logits stay, the basis is orthonormal, training lowers the loss, peft reads it again."""
    adapted = ADAPTED[name]
    base, batch = adapted.make(), adapted.batch()
    model, last = copy.deepcopy(base), copy.deepcopy(base)
    theirs = trained_lora(base, batch)
    theirs.save_pretrained(tmp_path / "theirs")
    layers = lora_layers(theirs)
    optimizer = attach(model, LoRAFA(rank=RANK, alpha=16), lr=1e-3)
    optimizer.load_adapter(tmp_path / "theirs")
    assert own_layers(model).keys() == layers.keys()
    assert error(logits(model, batch), logits(theirs, batch)) <= 1e-5
    for key, layer in own_layers(model).items():
        down = layers[key].lora_A["default"].weight.detach()
        assert not torch.allclose(down @ down.t(), torch.eye(RANK), atol=0.1)
        torch.testing.assert_close(layer.basis @ layer.basis.t(), torch.eye(RANK), rtol=0, atol=1e-5)
    losses = [train(model, optimizer, batch) for _ in range(5)]
    assert losses[-1] < losses[0]
    optimizer.save_adapter(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(last, tmp_path / "ours")
    assert error(logits(back, batch), logits(model, batch)) <= 1e-5


def test_transformers_loads_the_folder_too(tmp_path: Path) -> None:
    """`model.load_adapter(folder)` of a bare transformers model."""
    model, other = llama(), llama()
    optimizer = attach(model, LoRAFA(rank=RANK), lr=1e-2)
    train(model, optimizer, tokens())
    optimizer.save_adapter(tmp_path / "adapter")
    other.load_adapter(str(tmp_path / "adapter"))
    assert error(logits(other), logits(model)) <= 1e-5


def frozen_twin(model: nn.Module, base: nn.Module) -> Any:
    """Return peft's LoRA on the same layers of `base`, with the A of the attached `model`, frozen."""
    own = own_layers(model)
    twin = lora(base, target_modules=list(own))
    for name, layer in lora_layers(twin).items():
        layer.lora_A["default"].weight.data.copy_(own[name].basis)
        layer.lora_A["default"].weight.requires_grad = False
    return twin


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        *((name, "all-linear") for name in ("llama", "gpt2", "t5", "roberta-masked")),
        ("llama", ("q_proj", "lm_head")),
    ],
    ids=str,
)
def test_b_gets_the_gradient_that_peft_gives_it(name: str, targets: Any) -> None:
    """Over five steps, with A ours and frozen in both and B the same: equal losses and gradients, to rounding."""
    adapted = ADAPTED[name]
    base, batch = adapted.make(), adapted.batch()
    model = copy.deepcopy(base)
    optimizer = attach(model, LoRAFA(rank=RANK, alpha=8, targets=targets), lr=1e-2)
    twin = frozen_twin(model, base)
    theirs = lora_layers(twin)
    for _ in range(5):
        for key, layer in own_layers(model).items():
            theirs[key].lora_B["default"].weight.data.copy_(layer.slot.detach().t())
        twin.zero_grad()
        wanted = twin(**batch).loss
        loss = model(**batch).loss
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
        wanted.backward()
        loss.backward()
        gradients = {key: layer.lora_B["default"].weight.grad for key, layer in theirs.items()}
        largest = max(float(gradient.abs().max()) for gradient in gradients.values())
        for key, layer in own_layers(model).items():
            torch.testing.assert_close(layer.slot.grad.t(), gradients[key], rtol=1e-4, atol=1e-6 * largest)
        optimizer.step()
        optimizer.zero_grad()
    assert all(layer.slot.any() for layer in own_layers(model).values())


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Return what one forward keeps for its backward: distinct storages other than those of weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*layer.parameters(), *layer.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_layer_keeps_only_the_projected_input(name: str, dtype: torch.dtype) -> None:
    """r · tokens · itemsize bytes, with an input that wants a gradient or not; peft's layer keeps its input as well."""
    rows, columns = 2, 12
    base = ADAPTED[name].make().to(dtype)
    model = copy.deepcopy(base)
    attach(model, LoRAFA(rank=RANK))
    theirs = lora_layers(lora(base))
    for key, layer in own_layers(model).items():
        for wants_gradient in (True, False):
            x = torch.randn(rows, columns, layer.in_features).to(dtype).requires_grad_(wants_gradient)
            assert saved_bytes(layer, x) == RANK * rows * columns * dtype.itemsize
            assert saved_bytes(theirs[key], x) >= (RANK + HIDDEN) * rows * columns * dtype.itemsize
