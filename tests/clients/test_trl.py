"""TRL's trainers with an attached model: the weights are those of a plain loop over the same rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, changed, common, llama, snapshot
from tolerances import ANOTHER_ORDER_OF_SUMS
from torch import Tensor, nn

from clients.runs import LR, Recorder, assert_moved_alike, assert_same_weights, mean_over_tokens, plain_loop, tokenizer
from lisa_kernels import LISA, LoRAFA, OwLore, attach
from lisa_kernels.errors import InputError
from lisa_kernels.methods import Method

pytestmark = pytest.mark.slow
METHODS: dict[str, Method] = {
    "lisa": LISA(active_layers=1, period=2),
    "owlore": OwLore(active_layers=1, period=2, rank=4, gap=2, scores="uniform"),
    "lora-fa": LoRAFA(rank=4),
}
# Some of them with weights at rest.
RESTING: dict[str, tuple[str, str]] = {"owlore, nf4": ("owlore", "nf4"), "lora-fa, int8": ("lora-fa", "int8")}
STEPS = 4
TEXTS = [{"text": f"row {n} of twelve, {'x' * n}"} for n in range(12)]
PAIRS = [{"prompt": f"q{n}", "completion": f" answer {n}"} for n in range(12)]
CHATS = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]} for n in range(12)
]
CHOICES = [{"prompt": f"q{n}", "chosen": f" yes {n}", "rejected": " no"} for n in range(12)]


def model_of(words: Any) -> Any:
    """Return a Llama for the tokenizer."""
    return llama(vocab_size=len(words), eos_token_id=0, pad_token_id=0, bos_token_id=None, max_position_embeddings=256)


def attached(model: nn.Module, name: str) -> Any:
    method, resting = RESTING.get(name, (name, None))
    return attach(model, METHODS[method], lr=LR, resting=resting)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 1,
        "report_to": [], "use_cpu": True,
        "bf16": False, "disable_tqdm": True, "save_strategy": "no", "seed": 1, **changes,
    }  # fmt: skip


def run(trainer: Any) -> list[dict[str, Any]]:
    """Train, and return the batches in their order."""
    trainer.data_collator = recorder = Recorder(trainer.data_collator)
    trainer.train()
    return recorder.batches


SUPERVISED: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "all tokens": (TEXTS, {}),
    "packed": (TEXTS, {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
    "completion only": (PAIRS, {}),
    "assistant only": (CHATS, {"assistant_only_loss": True}),
    "accumulated": (PAIRS, {"gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        *[("owlore", rows) for rows in SUPERVISED],
        ("lisa", "accumulated"),
        ("lora-fa", "assistant only"),
        ("owlore, nf4", "accumulated"),
        ("lora-fa, int8", "packed"),
    ],
)
def test_sft_is_the_plain_loop(method: str, rows: str, tmp_path: Path) -> None:
    """Its loss reads the output layer's weight; head, blocks and embedding learn as from the model's own loss."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data, changes = SUPERVISED[rows]
    words = tokenizer()
    model, twin = model_of(words), model_of(words)
    before = snapshot(twin)
    optimizer = attached(model, method)
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**settings(tmp_path, **changes)), train_dataset=Dataset.from_list(data),
        processing_class=words, optimizers=(optimizer, None),
    )  # fmt: skip
    batches = run(trainer)
    reference = attached(twin, method)
    accumulate = changes.get("gradient_accumulation_steps", 1)
    losses = plain_loop(twin, reference, batches, STEPS, mean_over_tokens, accumulate)
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["loss"] for row in logged] == pytest.approx(losses, rel=1e-3)
    assert [row["learning_rate"] for row in logged] == pytest.approx([LR * (STEPS - n) / STEPS for n in range(STEPS)])
    assert optimizer.history == reference.history
    assert_moved_alike(model, twin, before, ANOTHER_ORDER_OF_SUMS)
    reference.detach()
    optimizer.detach()
    head = model.lm_head.weight
    assert method.startswith("lora-fa") or (head - before["lm_head.weight"]).abs().max() > LR
    assert changed(model, before)


def preference_loss(reference: nn.Module) -> Any:
    """Return the sigmoid DPO loss at beta = 0.1, written out."""

    def log_probs(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        picked = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        return (picked * batch["completion_mask"][:, 1:]).sum(1)

    def loss(model: nn.Module, batch: dict[str, Any], tokens: int) -> Tensor:
        with torch.no_grad():
            base = log_probs(reference, batch)
        chosen, rejected = (log_probs(model, batch) - base).chunk(2)
        return -nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()

    return loss


@pytest.mark.parametrize(
    ("method", "reference"),
    [
        ("owlore", "given"),
        ("owlore", "made"),
        ("lisa", "precomputed"),
        ("lora-fa", "given"),
        ("lora-fa", "made"),
        ("owlore, nf4", "given"),
        ("lora-fa, int8", "given"),
    ],
)
def test_dpo_is_the_plain_loop(method: str, reference: str, tmp_path: Path) -> None:
    """The reference stays what it was: a copy from after attaching, one that TRL loads, or numbers noted before."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    words = tokenizer()
    model_of(words).save_pretrained(tmp_path / "base")
    model, twin, base = (AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32) for _ in range(3))
    before = snapshot(base)
    optimizer = attached(model, method)
    trainer = DPOTrainer(
        model=model, ref_model=copy.deepcopy(model) if reference == "given" else None,
        args=DPOConfig(**settings(tmp_path, precompute_ref_log_probs=reference == "precomputed")),
        train_dataset=Dataset.from_list(CHOICES), processing_class=words, optimizers=(optimizer, None),
    )  # fmt: skip
    batches = run(trainer)
    if trainer.ref_model is not None:
        assert_same_weights(trainer.ref_model, base, 0.0)
    plain_loop(twin, attached(twin, method), batches, STEPS, preference_loss(base.eval()))
    assert trainer.state.log_history[-2]["loss"] < 0.69
    assert_moved_alike(model, twin, before, ANOTHER_ORDER_OF_SUMS)


def reward_loss(model: nn.Module, batch: dict[str, Any], tokens: int) -> Tensor:
    """Return the Bradley-Terry loss, written out."""
    chosen, rejected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].chunk(2)
    return -nn.functional.logsigmoid(chosen - rejected).mean()


@pytest.mark.parametrize("method", METHODS)
def test_a_reward_model_is_the_plain_loops(method: str, tmp_path: Path) -> None:
    """The new head learns under every method."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    words = tokenizer()
    sizes = common(vocab_size=len(words), num_labels=1, eos_token_id=0, max_position_embeddings=256)
    model, twin = (build("LlamaForSequenceClassification", "LlamaConfig", **sizes) for _ in range(2))
    before = snapshot(twin)
    optimizer = attached(model, method)
    trainer = RewardTrainer(
        model=model, args=RewardConfig(**settings(tmp_path)), train_dataset=Dataset.from_list(CHOICES),
        processing_class=words, optimizers=(optimizer, None),
    )  # fmt: skip
    batches = run(trainer)
    plain_loop(twin, attached(twin, method), batches, STEPS, reward_loss)
    assert_moved_alike(model, twin, before, ANOTHER_ORDER_OF_SUMS)
    assert not torch.equal(model.state_dict()["score.weight"], before["score.weight"])


def long_answers(completions: list[str], **others: Any) -> list[float]:
    """Reward variety."""
    return [float(len(set(text))) for text in completions]


@pytest.mark.parametrize("method", [*METHODS, "owlore, nf4"])
def test_grpo_generates_with_the_weights_so_far(method: str, tmp_path: Path) -> None:
    """What is generated between two steps comes from the weights of that moment, and the run learns from it."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    words = tokenizer()
    model = model_of(words)
    before = snapshot(model)
    optimizer = attached(model, method)
    trainer = GRPOTrainer(
        model=model, reward_funcs=long_answers, train_dataset=Dataset.from_list([{"prompt": "q"}] * 8),
        args=GRPOConfig(**settings(tmp_path, num_generations=2, max_completion_length=8, beta=0.0, temperature=1.0)),
        processing_class=words, optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    ratios = [row.get("clip_ratio/region_mean", 0.0) for row in logged]
    assert optimizer.calls == STEPS
    # Of one update for each generation: what generated and what learns are the same weights.
    assert ratios == [0.0] * STEPS
    optimizer.detach()
    assert {name for name in changed(model, before) if name.startswith("model.layers")}


def test_a_trainer_left_to_make_its_own_optimizer_is_refused(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    words = tokenizer()
    model = model_of(words)
    optimizer = attach(model, METHODS["lisa"], lr=LR)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings(tmp_path)),
        train_dataset=Dataset.from_list(TEXTS),
        processing_class=words,
    )
    with pytest.raises(InputError, match=r"optimizers=\(optimizer, None\)"):
        trainer.train()
    assert optimizer.calls == 0
