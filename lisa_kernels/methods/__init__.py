"""Fine-tuning methods: a sampler, a layer mode and the optimizer, put together by `attach`."""

from lisa_kernels.methods.attach import attach
from lisa_kernels.methods.definitions import (
    LISA,
    METHODS,
    OWS,
    BAdam,
    FullFineTune,
    GaLore,
    LoRA,
    LoRAFA,
    Method,
    OwLore,
    method_by_name,
)
from lisa_kernels.methods.galore_adamw import GaLoreAdamW8bit
from lisa_kernels.methods.sampled_adamw import SampledAdamW
from lisa_kernels.methods.scoring import layer_scores

__all__ = [
    "LISA",
    "METHODS",
    "OWS",
    "BAdam",
    "FullFineTune",
    "GaLore",
    "GaLoreAdamW8bit",
    "LoRA",
    "LoRAFA",
    "Method",
    "OwLore",
    "SampledAdamW",
    "attach",
    "layer_scores",
    "method_by_name",
]
