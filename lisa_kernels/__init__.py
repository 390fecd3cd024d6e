"""Fine-tune language models by layer sampling and low-rank gradients, with optimizer state in 8 bits."""

from lisa_kernels.errors import InputError
from lisa_kernels.flow import TimestepExperts
from lisa_kernels.layers import checkpoint_blocks, compile_blocks, dequantize
from lisa_kernels.methods import (
    LISA,
    OWS,
    BAdam,
    FullFineTune,
    GaLore,
    GaLoreAdamW8bit,
    LoRA,
    LoRAFA,
    OwLore,
    attach,
    layer_scores,
)
from lisa_kernels.optim import AdamW8bit
from lisa_kernels.plan import plan

__all__ = [
    "LISA",
    "OWS",
    "AdamW8bit",
    "BAdam",
    "FullFineTune",
    "GaLore",
    "GaLoreAdamW8bit",
    "InputError",
    "LoRA",
    "LoRAFA",
    "OwLore",
    "TimestepExperts",
    "attach",
    "checkpoint_blocks",
    "compile_blocks",
    "dequantize",
    "layer_scores",
    "plan",
]
