"""Small models and every method, for rehearsals and for the real runs that they must equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lisa_kernels import LISA, OWS, BAdam, FullFineTune, GaLore, LoRA, LoRAFA, OwLore
from lisa_kernels.methods import Method
from lisa_kernels.plan.rehearsal import Workload, prepare, take_steps
from lisa_kernels.plan.trace import Trace
from lisa_kernels.plan.tracker import StorageTracker

VOCABULARY, LAYERS = 96, 4
EMBEDDINGS = ("always", "low-rank", "with-first-block", "frozen", "sampled")

METHODS: dict[str, Method] = {
    "lisa": LISA(),
    "lisa-low-rank": LISA(embeddings="low-rank", rank=4),
    "ows": OWS(scores="uniform"),
    **{
        f"owlore-{mode}": OwLore(active_layers=2, rank=4, embeddings=mode, scores="uniform") for mode in EMBEDDINGS
    },
    "badam": BAdam(),
    "badam-keep": BAdam(retired_state="keep"),
    "owlore-keep": OwLore(active_layers=2, rank=4, embeddings="frozen", scores="uniform", retired_state="keep"),
    "galore": GaLore(rank=4),
    "lora": LoRA(rank=4),
    "lora-fa": LoRAFA(rank=4),
    "full": FullFineTune(),
}  # fmt: skip


def config(family: str, **changes: Any) -> Any:
    """Return a small configuration: llama with grouped heads, qwen2 with tied embeddings, gpt2 with Conv1D."""
    from transformers import AutoConfig

    # Without dropout, which CPUs have no fused attention for.
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "vocab_size": VOCABULARY,
        "bos_token_id": None, "eos_token_id": 0, **changes,
    }  # fmt: skip
    if family == "gemma2":
        sizes |= {"final_logit_softcapping": 30.0, "head_dim": 8, "sliding_window": 8}
    if family == "gpt2":
        return AutoConfig.for_model("gpt2", n_positions=128, **sizes, **none)
    return AutoConfig.for_model(
        family, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=family == "qwen2", **sizes
    )


def workload(family: str = "llama", method: Method | None = None, **changes: Any) -> Workload:
    """Return a small workload in float32, which a CPU computes as a GPU does."""
    settings = {"batch_size": 2, "seq_len": 16, "dtype": "fp32", **changes}
    return Workload(config(family), method or LISA(), **settings)


def real_model(given: Workload) -> Any:
    """Return the workload's model with random weights on the CPU."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(given.model, dtype=torch.float32)
    model.config.use_cache = False
    return model.train()


def random_batch(given: Workload) -> dict[str, Tensor]:
    """Return a micro-batch of random tokens."""
    shape = given.batch_size, given.seq_len
    return {name: torch.randint(1, VOCABULARY, shape) for name in ("input_ids", "labels")}


def tracked_run(given: Workload) -> Trace:
    """Return the storages of the same steps taken for real, with weights and numbers, on the CPU."""
    tracker = StorageTracker("cpu")
    model = real_model(given)
    with tracker:
        optimizer = prepare(model, given)
        take_steps(model, optimizer, given, tracker, lambda: random_batch(given))
    return tracker.trace()
