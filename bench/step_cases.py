"""The case of the step benchmark: a Llama geometry, one batch of tokens, and what the methods are given."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import DTYPES
from lisa_kernels.errors import InputError

# The outlier ratios of Llama-2-7B's layers in percent, as published for OwLore (arXiv 2405.18380).
LLAMA_2_7B_SCORES = (
    0.2678, 0.2953, 0.1274, 0.1145, 0.0988, 0.0884, 0.0878, 0.0838, 0.0801, 0.0722, 0.0707, 0.0696, 0.0630, 0.0591,
    0.0552, 0.0537, 0.0468, 0.0392, 0.0336, 0.0340, 0.0316, 0.0279, 0.0278, 0.0229, 0.0254, 0.0209, 0.0242, 0.0182,
    0.0184, 0.0209, 0.0241, 0.0825,
)  # fmt: skip
SCORES = ("uniform", "llama-2-7b")


@dataclass(frozen=True)
class Case:
    """What is trained, on what, and the ranks and numbers of layers that the methods get."""

    device: str = "cpu"
    dtype: str = "fp32"
    layers: int = 12
    width: int = 768
    intermediate: int = 2048
    heads: int = 12
    vocabulary: int = 8192
    batch: int = 4
    seq_len: int = 256
    rank: int = 64
    active_layers: int = 5
    lora_rank: int = 16
    galore_rank: int = 128
    scores: str = "uniform"

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.seq_len

    @property
    def geometry(self) -> str:
        """The model's shape in words."""
        return f"{self.layers} layers, {self.width} wide, {self.intermediate} inside, vocabulary {self.vocabulary}"

    def check(self) -> None:
        """Raise InputError for a shape that is none, and for ranks and layers that the model does not have."""
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value}: a number of at least 1 is wanted.")
        if self.width % (2 * self.heads):
            raise InputError(
                f"--width {self.width}: an even number of columns for each of {self.heads} heads is wanted."
            )
        if self.active_layers > self.layers:
            raise InputError(f"--active-layers {self.active_layers}: the model has {self.layers} layers.")
        least = min(self.width, self.intermediate)
        for name in ("rank", "lora_rank", "galore_rank"):
            if getattr(self, name) > least:
                raise InputError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: the model's matrices allow at most {least}."
                )

    def layer_scores(self) -> tuple[float, ...]:
        """Return what OwLore draws by: the same for all layers, or the published profile stretched over them."""
        if self.scores == "uniform":
            return (1.0,) * self.layers
        profile = torch.tensor(LLAMA_2_7B_SCORES)[None, None]
        return tuple(nn.functional.interpolate(profile, size=self.layers, mode="linear")[0, 0].tolist())

    def model(self) -> Any:
        """Return the model with random weights, ready to train."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            "llama", hidden_size=self.width, intermediate_size=self.intermediate, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.heads, vocab_size=self.vocabulary,
            max_position_embeddings=max(self.seq_len, 16), tie_word_embeddings=False, use_cache=False,
            pad_token_id=None, bos_token_id=None, eos_token_id=0,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[self.dtype])
        return model.to(self.device).train()

    def tokens_and_labels(self) -> dict[str, Tensor]:
        """Return one batch, its labels the tokens themselves."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocabulary, (self.batch, self.seq_len), generator=generator).to(self.device)
        return {"input_ids": ids, "labels": ids}


def on_the_same_weights(model: Any) -> Any:
    """Return a copy with modules and parameters of its own, whose parameters share the storage of `model`'s."""
    shared: dict[int, Any] = {id(param): nn.Parameter(param.data) for param in model.parameters()}
    return copy.deepcopy(model, shared)
