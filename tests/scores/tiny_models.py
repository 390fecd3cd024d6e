"""Tiny random models of transformers whose blocks the scores are tested on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

VOCABULARY = 61


def llama() -> tuple[nn.Module, list[nn.Module]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    return model, list(model.model.layers)


def gpt2() -> tuple[nn.Module, list[nn.Module]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=32, bos_token_id=0)
    model = GPT2LMHeadModel(config)
    return model, list(model.transformer.h)


MODELS: dict[str, Callable[[], tuple[nn.Module, list[nn.Module]]]] = {"llama": llama, "gpt2": gpt2}


def padded_batches(count: int = 2, padding: int = 4) -> list[dict[str, Tensor]]:
    """Return batches of 3 rows of 10 tokens, the first row ending in padding."""
    generator = torch.Generator().manual_seed(2)
    batches = []
    for _ in range(count):
        mask = torch.ones(3, 10, dtype=torch.long)
        mask[0, 10 - padding :] = 0
        batches.append({"input_ids": torch.randint(VOCABULARY, (3, 10), generator=generator), "attention_mask": mask})
    return batches
