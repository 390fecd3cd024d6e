"""Models that no method can be attached to are refused, each with the reason and what works instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import anatomy, llama
from torch import nn

from lisa_kernels.errors import InputError
from lisa_kernels.layers import FreezeGuard, check_attachable, without_compiler


def test_a_guarded_model_or_part_is_refused() -> None:
    """Attaching twice, to the model or to a wrapper around it, is refused."""
    model = llama()
    guard = FreezeGuard(model)
    for wanted in (model, nn.Sequential(model)):
        with pytest.raises(InputError, match="already attached"):
            check_attachable(wanted)
    guard.remove(model)
    check_attachable(model)


def test_a_ddp_model_is_refused(tmp_path: Path) -> None:
    """DDP fixes its gradients once; the message says what works instead."""
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(InputError, match=r"DistributedDataParallel.*bare model on every rank"):
            check_attachable(nn.parallel.DistributedDataParallel(llama()))
    finally:
        dist.destroy_process_group()


def test_a_data_parallel_model_is_refused() -> None:
    """DataParallel as well."""
    with pytest.raises(InputError, match="DataParallel"):
        check_attachable(nn.DataParallel(llama()))


def test_a_deepspeed_model_is_refused() -> None:
    """ZeRO marks its parameters with `ds_id`."""
    model = llama()
    model.lm_head.weight.ds_id = 0
    with pytest.raises(InputError, match="DeepSpeed ZeRO"):
        check_attachable(model)


def test_weights_on_meta_are_refused_by_name() -> None:
    """A weight without values is named."""
    model = llama()
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight is on the meta device"):
        check_attachable(model)


def test_quantised_weights_are_refused_by_name() -> None:
    """A packed weight cannot be trained."""
    model = llama()
    packed = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    model.model.layers[1].mlp.gate_proj.weight = packed
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.gate_proj\.weight holds torch\.uint8"):
        check_attachable(model)


def with_lora() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(r=8, target_modules=["q_proj"]))


def with_injected_lora() -> Any:
    from peft import LoraConfig

    model = llama()
    model.add_adapter(LoraConfig(r=8, target_modules=["q_proj"]))
    return model


def with_prompts() -> Any:
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(llama(), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))


def offloaded() -> Any:
    from accelerate import cpu_offload

    return cpu_offload(llama())


def spread() -> Any:
    model = llama()
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    return model


def quantised_by_config() -> Any:
    model = llama()
    model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    return model


def quantised_by_loader() -> Any:
    model = llama()
    model.hf_quantizer = object()
    return model


def packed() -> Any:
    model = llama()
    weight = model.lm_head.weight.detach()
    model.lm_head.weight = nn.Parameter(TwoParts(weight), requires_grad=False)
    return model


class TwoParts(torch.Tensor):
    """A wrapper of a tensor, as libraries of quantisation put in the place of weights."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors: Any, meta: Any, size: Any, stride: Any) -> Any:
        return cls(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inner = [each.inner if isinstance(each, TwoParts) else each for each in args]
        return cls(func(*inner, **(kwargs or {})))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "peft's LoRA": (with_lora, r"adapters of peft \(in base_model\.model\.model\.layers\.0.*q_proj.*merge_and_unload"),
    "LoRA of transformers": (with_injected_lora, r"adapters of peft.*q_proj"),
    "prompts of peft": (with_prompts, r"adapters of peft \(around it\)"),
    "several devices": (spread, r"spread over 0, cpu by its device_map.*one device"),
    "weights moved by hooks": (offloaded, "accelerate moves the weights of model.embed_tokens"),
    "quantised by its configuration": (
        quantised_by_config,
        "by gptq, .*load one in float32.*resting='nf4'",
    ),
    "quantised by its loader": (quantised_by_loader, "the model is quantised"),
    "packed weights": (packed, r"lm_head\.weight is a TwoParts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_others_have_changed_is_refused_and_untouched(case: str) -> None:
    """Adapters, placement by device_map and hooks, quantisation: one sentence."""
    make, message = REFUSED[case]
    model = make()
    before = anatomy(model)
    with pytest.raises(InputError, match=message) as caught:
        check_attachable(model)
    assert "\n" not in str(caught.value)
    assert anatomy(model) == before


def test_a_device_map_of_one_device_is_fine() -> None:
    """As `from_pretrained(device_map="auto")` gives on a machine with one card."""
    model = llama()
    model.hf_device_map = {"model": "cpu", "lm_head": "cpu"}
    check_attachable(model)


def test_a_merged_model_is_fine() -> None:
    """What `merge_and_unload` returns is a plain model again."""
    check_attachable(with_lora().merge_and_unload())


def test_a_compiled_model_is_the_one_inside() -> None:
    model = llama()
    assert without_compiler(torch.compile(model, backend="eager")) is model
    assert without_compiler(model) is model
