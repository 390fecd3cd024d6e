"""Models that transformers loaded through bitsandbytes: made plain, at rest in the codes that they were stored in."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lisa_kernels import InputError, LoRA, OwLore, attach, dequantize
from lisa_kernels.layers import RestingLinear
from lisa_kernels.ops.resting import reference
from lisa_kernels.train.models import load_model

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

TOKENS = torch.arange(24).view(2, 12) * 3 % 97
WAYS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of one model, as people share them."""
    from transformers import BitsAndBytesConfig

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("stored")
    plain = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attention_bias=True)).to(torch.bfloat16)
    for name, param in plain.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(param, std=0.1)
    plain.save_pretrained(folder / "plain")
    for way, settings in WAYS.items():
        packed = AutoModelForCausalLM.from_pretrained(
            folder / "plain", quantization_config=BitsAndBytesConfig(**settings), dtype=torch.bfloat16
        )
        packed.save_pretrained(folder / way)
    return {way: folder / way for way in WAYS}


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits.float()
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_packed_model_becomes_a_plain_one_that_says_the_same(
    way: str, stored: dict[str, Path], tmp_path: Path
) -> None:
    """And is saved and loaded as any, which what transformers' own dequantize() leaves is not."""
    packed = loaded(stored[way])
    # With gradients on, or a CPU with products of bfloat16 rearranges them.
    before = packed(TOKENS).logits.detach().float()
    model = dequantize(packed)
    assert model is packed
    assert {type(layer) for layer in model.modules() if "Linear" in type(layer).__name__} == {nn.Linear}
    assert {(param.dtype, param.requires_grad) for param in model.parameters()} == {(torch.bfloat16, True)}
    scale = float(before.abs().max())
    # bitsandbytes multiplies 8 bits by 8 bits.
    assert float((logits_of(model) - before).abs().max()) < (0.05 if way == "int8" else 0.02) * scale
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert getattr(again.config, "quantization_config", None) is None
    assert torch.equal(logits_of(again), logits_of(model))
    assert dequantize(again) is again
    # transformers leaves what is not quantised in the dtype that it is stored in.
    wide = load_model(str(stored[way]), torch.float32, 0)
    assert {param.dtype for param in wide.parameters()} == {torch.float32}
    assert float((logits_of(wide) - logits_of(model)).abs().max()) < 0.02 * scale


@pytest.mark.parametrize("way", ["nf4", "nf4-twice"])
def test_it_rests_in_the_codes_that_it_was_stored_in(way: str, stored: dict[str, Path]) -> None:
    """Every one of them; scales, which take a byte here too, lie within 0.5 % of the checkpoint's."""
    packed = loaded(stored[way])
    codes = {path: layer.weight.data.flatten().clone() for path, layer in packed.named_modules() if is_four_bit(layer)}
    meant = {path: layer.weight for path, layer in dequantize(loaded(stored[way])).named_modules() if path in codes}
    model = dequantize(packed)
    attach(model, LoRA(rank=4), resting="nf4")
    resting = {path: layer for path, layer in model.named_modules() if isinstance(layer, RestingLinear)}
    assert len(codes) == 14
    for path, theirs in codes.items():
        assert torch.equal(resting[path].codes, theirs), path
        woken = resting[path].resting.woken(torch.float32)
        assert torch.allclose(woken, meant[path].float(), rtol=0.005 + 2**-8, atol=0), path


def is_four_bit(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Linear4bit"


def test_its_masters_learn_and_are_what_is_saved(stored: dict[str, Path], tmp_path: Path) -> None:
    model = dequantize(loaded(stored["nf4-twice"]))
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = attach(model, OwLore(1, period=2, rank=4, scores="uniform"), lr=1e-2, resting="nf4")
    for _ in range(5):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.detach()
    model.save_pretrained(tmp_path)
    ends = dict(loaded(tmp_path).named_parameters())
    moved = [name for name in before if not torch.equal(before[name], ends[name])]
    assert all(torch.equal(ends[name], param) for name, param in model.named_parameters())
    assert any("q_proj.weight" in name for name in moved)


def test_what_transformers_made_plain_itself_can_be_saved_once_attached(
    stored: dict[str, Path], tmp_path: Path
) -> None:
    """It would find out in saving, after the run, that it cannot undo how it loaded the model."""
    model = loaded(stored["nf4"]).dequantize()
    attach(model, LoRA(rank=4)).detach()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded(tmp_path)), logits_of(model))


def test_a_packed_model_is_told_what_makes_it_plain(stored: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"by bitsandbytes.*lisa_kernels\.dequantize\(model\) first"):
        attach(loaded(stored["nf4"]), LoRA(rank=4), resting="nf4")
    other = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=17))
    assert dequantize(other) is other
    bare = nn.Sequential(nn.Linear(4, 4))
    assert dequantize(bare) is bare
    other.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(InputError, match="by gptq, and only bitsandbytes'"):
        dequantize(other)


def test_codes_that_a_forward_has_rearranged_are_refused(stored: dict[str, Path]) -> None:
    """Dequantised as they lie they would be another model's."""
    model = loaded(stored["nf4"])
    logits_of(model)
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        state.packing_format_for_cpu = True
    with pytest.raises(InputError, match=r"rearranged the codes of model\.layers\.0.*load the model anew"):
        dequantize(model)


def test_codes_are_theirs_whatever_the_scale() -> None:
    """The levels are bitsandbytes' to the bit, or codes of a checkpoint would change at rest."""
    functional = importlib.import_module("bitsandbytes.functional")
    assert functional.get_4bit_type("nf4", device="cpu").tolist() == list(reference.LEVELS)
