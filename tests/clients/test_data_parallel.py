"""torch's DataParallel around an attached model: its replicas are refused, and threads do not mistake each other's."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import llama, tokens
from torch import Tensor, nn
from torch.nn.parallel import replicate

from lisa_kernels import LISA, BAdam, FullFineTune, GaLore, InputError, LoRAFA, OwLore, attach
from lisa_kernels.layers.freezing import REPLICA_ADVICE
from lisa_kernels.methods import Method

METHODS: dict[str, Method] = {
    "lisa": LISA(active_layers=1, period=2),
    "lisa low-rank": LISA(active_layers=1, period=2, embeddings="low-rank", rank=4),
    "owlore": OwLore(active_layers=1, period=2, rank=4, scores="uniform", embeddings="frozen"),
    "badam": BAdam(period=2),
    "galore": GaLore(rank=4),
    "lora-fa": LoRAFA(rank=4),
    "full": FullFineTune(),
}


def replicas(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return two replicas as DataParallel makes them; views on the CPU are the copies that NCCL would send."""

    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[tensor.view_as(tensor) for tensor in tensors] for _ in devices]

    # The package's function of the same name hides the module.
    monkeypatch.setattr(sys.modules[replicate.__module__], "_broadcast_coalesced_reshape", copies)
    return replicate(model, [0, 1])


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("method", METHODS)
def test_a_replica_of_an_attached_model_is_refused(
    method: str, train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """With the sentence that says how to use one GPU, and the model itself goes on."""
    model = llama(layers=2).train(train)
    optimizer = attach(model, METHODS[method])
    with pytest.raises(InputError, match="CUDA_VISIBLE_DEVICES=0"), torch.set_grad_enabled(train):
        replicas(model, monkeypatch)[1](**tokens())
    model(**tokens()).loss.backward()
    optimizer.step()
    optimizer.detach()
    replicas(model, monkeypatch)[1](**tokens())


def test_the_sentence_is_one() -> None:
    assert REPLICA_ADVICE.count(".") == 1
    assert "\n" not in REPLICA_ADVICE


def interleaved(*forwards: Callable[[Callable[[], None]], float]) -> list[float]:
    """Return what each forward returns, each in a thread; all are in the midst of it at once."""
    found = [0.0] * len(forwards)
    barrier = threading.Barrier(len(forwards), timeout=20)

    def run(number: int) -> None:
        found[number] = forwards[number](barrier.wait)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(forwards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_forwards_in_two_threads_have_each_their_own_loss() -> None:
    """Both output layers have run before either loss is computed: what one has seen is not the other's."""
    model = llama(layers=2)
    attach(model, LISA(active_layers=1, period=2))
    meet: dict[int, Callable[[], None]] = {}
    model.lm_head.register_forward_hook(lambda *_: meet.get(threading.get_ident(), lambda: None)())

    def forward(seed: int) -> Callable[[Callable[[], None]], float]:
        def run(wait: Callable[[], None]) -> float:
            meet[threading.get_ident()] = wait
            return model(**tokens(seed=seed)).loss.item()

        return run

    alone = [model(**tokens(seed=seed)).loss.item() for seed in (0, 1)]
    assert alone[0] != alone[1]
    assert interleaved(forward(0), forward(1)) == alone


def test_a_forward_that_ends_leaves_another_threads_reader_its_weight() -> None:
    """Code that reads `lm_head.weight` gets the slot with it until its own forward is over, whoever else is through."""
    model = llama(layers=2)
    attach(model, LISA(active_layers=1, period=2, embeddings="low-rank", rank=4), keep_logits=True)
    done, read = threading.Event(), []
    here = threading.get_ident()

    def reader(*_: Any) -> None:
        if threading.get_ident() == here:
            other.start()
            assert done.wait(20)
            read.append(model.lm_head.weight is model.lm_head.stored_weight)

    def through() -> None:
        model(**tokens(seed=1))
        done.set()

    other = threading.Thread(target=through)
    model.model.norm.register_forward_hook(reader)
    model(**tokens())
    assert read == [False]
