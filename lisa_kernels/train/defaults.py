"""Settings that nobody gave: what they follow from, as functions of plain numbers.

Published values are of models of 7 billion parameters and runs of thousands of steps. A small model wants a higher
rate, and a short run shorter periods, or it ends before most layers were drawn.
"""

from __future__ import annotations

# Hidden size of SmolLM2-135M, on which the rates below were found.
MEASURED_WIDTH = 576
# Peak rates there, of what a method's layers move by: answers of GSM8K, 60 steps of 288 tokens. Those of lora, galore
# and owlore are the best of a grid of factors of two (rows in bench/results/pretrained.jsonl); of full fine-tuning 5e-5
# is a little better there, and 1e-4 what is published for large models. lora's is that between its two factors'. The
# others were not tuned on it.
RATES = {
    "full": 1e-4, "galore": 2.5e-4, "owlore": 1e-3, "lisa": 5e-4, "ows": 5e-4, "badam": 5e-4, "lora": 1e-3,
    "lora-fa": 2e-3,
}  # fmt: skip
# Of OwLore's rate, found with 5 of 30 layers. With 20 of them half of it is best, and with all a quarter (GaLore).
MEASURED_SHARE = 1 / 6
# How often each layer is to be drawn in a run, on average.
VISITS = 2
# One step in so many is warm-up.
STEPS_PER_WARMUP_STEP = 20

# What runs that recorded no rate were trained with: one number for every model.
RATES_OF_OLD_RUNS = {
    "lisa": 5e-5, "ows": 5e-5, "owlore": 3e-4, "badam": 1e-5, "galore": 1e-4, "lora-fa": 4e-4, "full": 1e-5,
}  # fmt: skip

_LENGTH = (
    "steps", "epochs", "batch_size", "accumulate", "data", "columns", "max_data_bytes", "eval_data", "eval_fraction",
    "seq_len", "packing",
)  # fmt: skip
# For each automatic setting the options that it follows from: where one of them changes, what was taken holds no more.
FOLLOWS = {
    "lr": ("lr", "model", "method", "active_layers"),
    "period": ("period", "model", "method", "active_layers", "embeddings", *_LENGTH),
    "warmup_steps": ("warmup_steps", *_LENGTH),
}


def rate(method: str, width: int, scale: float = 1.0, share: float = 0.0) -> float:
    """Return the peak learning rate for a model whose hidden size is `width`, to two digits.

    The best rate of hidden matrices under Adam goes with 1 / fan-in (Tensor Programs V, arXiv 2203.03466, table 3). It
    fits what is known: from width 576 to 4096 full fine-tuning's 1e-4 becomes 1.4e-5 (published 1e-5 to 2e-5), LoRA's
    1e-3 becomes 1.4e-4 (published 1e-4 to 3e-4). scale: what the method multiplies the rate of its low-rank layers by;
    they move by `RATES` all the same. share: of the layers that train at a time; OwLore's rate halves with each half of
    them that is added.
    """
    more = max(0.0, share - MEASURED_SHARE) if method == "owlore" else 0.0
    return float(f"{RATES[method] * 0.25**more * MEASURED_WIDTH / width / scale:.1e}")


def period(steps: int, layers: int, active_layers: int, published: int) -> int:
    """Return the steps between two draws of `active_layers` of `layers` layers in a run of `steps` optimizer steps.

    As many as published, but few enough that layers are drawn `VISITS` times on average; at least 1. As draws by
    chance are independent of each other, some four of 30 layers are left out all the same; in turn, none is. LISA was
    found as good with any period from 1 to 50 steps, and worse where it never switched.
    """
    if active_layers >= layers:
        return published
    return max(1, min(published, steps * active_layers // (VISITS * layers)))


def warmup_steps(steps: int) -> int:
    """Return the steps over which the rate rises: 5 % of the run, none in runs of fewer than 20 steps.

    Adam's second moments are of few gradients at first, and its first steps as large as the rate allows.
    """
    return steps // STEPS_PER_WARMUP_STEP
