"""Checkpoints wait in host memory: the inputs of blocks and nothing else, and no bit of a run changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import DECODERS, llama, tokens
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lisa_kernels import LISA, OwLore, attach
from lisa_kernels.errors import InputError
from lisa_kernels.layers import find_blocks, offload, offload_checkpoints
from lisa_kernels.plan.rehearsal import Workload, rehearse
from lisa_kernels.train.presets import preset_config

SETTINGS = {"use_reentrant": False}


def checkpointed(model: Any) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=SETTINGS)
    return model


class Moves(saved_tensors_hooks):
    """Stands for torch's own hooks: what they would move becomes a copy, and is noted."""

    seen: list[Tensor]

    def __init__(self, pin_memory: bool, device_type: str) -> None:
        assert device_type == "cpu"
        assert not pin_memory
        super().__init__(self._pack, lambda copied: copied)

    @classmethod
    def _pack(cls, tensor: Tensor) -> Tensor:
        cls.seen.append(tensor)
        return tensor.clone()


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is sent to host memory."""
    Moves.seen = []
    monkeypatch.setattr(offload, "save_on_cpu", Moves)
    return Moves.seen


def train(model: Any, embeddings: str) -> dict[str, Tensor]:
    """Return the weights after six steps with a switch after every second."""
    method = OwLore(active_layers=1, period=2, rank=4, scores="uniform", embeddings=embeddings)
    optimizer = attach(model, method, lr=1e-2)
    for seed in range(6):
        model(**tokens(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("copied", [False, True], ids=["on a CPU", "copied"])
@pytest.mark.parametrize("embeddings", ["frozen", "always", "low-rank"])
def test_no_bit_of_a_run_changes(embeddings: str, copied: bool, request: pytest.FixtureRequest) -> None:
    """Neither with torch's hooks, which copy nothing on a CPU, nor with copies."""
    if copied:
        request.getfixturevalue("moved")
    plain, model = checkpointed(llama(layers=5)), checkpointed(llama(layers=5))
    offload_checkpoints(model)
    wanted = train(plain, embeddings)
    for name, value in train(model, embeddings).items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "opt", "falcon", "mixtral", "gemma2"])
def test_only_what_enters_blocks_above_the_lowest_active_moves(name: str, moved: list[Tensor]) -> None:
    """One tensor for each of them, as wide as the hidden states; no weight among them."""
    model = checkpointed(DECODERS[name].make())
    offload_checkpoints(model)
    optimizer = attach(model, LISA(active_layers=1, period=1, embeddings="frozen"))
    _, blocks = find_blocks(model)
    weights = {param.data_ptr() for param in model.parameters()}
    lowest = set()
    for seed in range(6):
        moved.clear()
        inputs = tokens(seed=seed)
        model(**inputs).loss.backward()
        assert len(moved) == len(blocks) - 1 - optimizer.active_layers[0]
        lowest.add(optimizer.active_layers[0])
        assert {tensor.shape[:2] for tensor in moved} <= {inputs["input_ids"].shape}
        assert not weights & {tensor.data_ptr() for tensor in moved}
        optimizer.step()
        optimizer.zero_grad()
    assert len(lowest) > 1


def test_torchs_context_around_a_step_would_move_weights(moved: list[Tensor]) -> None:
    """Negative control: the one-line idiom sends every weight that the backward needs."""
    model = llama(layers=2)
    with Moves(pin_memory=False, device_type="cpu"):
        model(**tokens()).loss.backward()
    assert {param.data_ptr() for param in model.parameters()} & {tensor.data_ptr() for tensor in moved}


def test_evaluation_and_frozen_models_move_nothing(moved: list[Tensor]) -> None:
    model = checkpointed(llama())
    offload_checkpoints(model)
    with torch.no_grad():
        model(**tokens())
    model.eval()
    model(**tokens()).loss.backward()
    model.disable_input_require_grads()
    model.train().requires_grad_(False)
    model(**tokens())
    assert not moved


def test_the_settings_of_checkpointing_stay() -> None:
    """The guard of an attached model looks at them before each step, and re-entrant ones are still refused there."""
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    offload_checkpoints(model)
    with pytest.raises(InputError, match="re-entrant"):
        attach(model, LISA(active_layers=1))


def test_a_model_without_checkpoints_is_refused() -> None:
    for model in (llama(), nn.Linear(2, 2)):
        with pytest.raises(InputError, match="switch gradient checkpointing on first"):
            offload_checkpoints(model)


def test_a_plan_knows_that_checkpoints_are_elsewhere() -> None:
    """At the end of the forward the device holds one block's input where it would hold those of all."""
    held = []
    for offloaded in (False, True):
        workload = Workload(
            "preset:tiny", LISA(active_layers=1), batch_size=2, seq_len=64, dtype="fp32",
            offload_activations=offloaded,
        )  # fmt: skip
        trace = rehearse(workload)
        first = next(index for index, event in enumerate(trace.events) if event.phase.endswith("backward"))
        held.append(trace.live_at(first - 1)["saved activations"])
    config = preset_config("tiny")
    checkpoint_bytes = 2 * 64 * config.hidden_size * 4
    assert held[0] - held[1] == config.num_hidden_layers * checkpoint_bytes
