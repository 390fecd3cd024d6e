"""A model whose weights rest computes on the device, with its masters and its table in host memory."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from families import anatomy, llama

from lisa_kernels import GaLore, LoRA, OwLore, attach, layer_scores
from lisa_kernels.layers import RestingLinear, is_linear, visits
from lisa_kernels.methods import Method
from lisa_kernels.methods.code_losses import measure_code_losses
from lisa_kernels.paging.locked import LOCKED_PIECE

from .simulated import driver
from .training import batch


@pytest.mark.order("late")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("first", ["attach", "move"])
@pytest.mark.parametrize(
    "method", [GaLore(rank=4, gap=3, embeddings="low-rank"), LoRA(rank=4), LoRA(rank=4, targets="q_proj")], ids=str
)
def test_a_model_says_where_it_computes(method: Method, tied: bool, first: str) -> None:
    """To those who ask its first parameter, such as transformers' generation; masters stay on the host."""
    model: Any = llama(tied=tied)
    if first == "move":
        model.to("cuda")
    opt = attach(model, method, lr=1e-2, resting="int8")
    for _ in range(2):
        # A trainer moves what it is given.
        model.to("cuda")
        assert model.device == model.model.device == torch.device("cuda", 0)
        assert model.model.embed_tokens.weight.device.type == "cpu"
    for seed in range(2):
        model(**batch("cuda", seed)).loss.backward()
        opt.step()
        opt.zero_grad()
    model.eval()
    ids = batch("cuda", 2)["input_ids"][:, :5]
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    plain: Any = opt.detach()
    assert plain.device.type == "cpu"
    plain.to("cpu")
    assert made.device.type == "cuda"
    mask = torch.ones_like(ids, device="cpu")
    wanted = plain.generate(ids.cpu(), attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert (made.cpu() == wanted).float().mean() > 0.8


@pytest.mark.parametrize("first", ["attach", "move"])
def test_masters_lock_as_much_memory_as_they_take(first: str) -> None:
    """Not the next power of two of each; and no more once nobody holds them."""
    gc.collect()
    before = driver.sim_locked_bytes()
    model: Any = llama(layers=2, hidden_size=96, intermediate_size=160)
    if first == "move":
        model.to("cuda")
    opt = attach(model, OwLore(1, 2, rank=4, scores="uniform", embeddings="low-rank"), lr=1e-2, resting="nf4")
    model.to("cuda")
    masters = [param for param in model.parameters() if param.device.type == "cpu"]
    assert len(masters) == 2 * 7 + 2
    assert all(master.is_pinned() for master in masters)
    taken = driver.sim_locked_bytes() - before
    least = sum(master.nbytes for master in masters)
    assert least <= taken <= least + len(masters) * LOCKED_PIECE
    model(**batch("cuda", 0)).loss.backward()
    opt.step()
    opt.detach()
    del model, opt, masters
    gc.collect()
    assert driver.sim_locked_bytes() - before < least / 2


def test_a_size_is_filled_on_the_device_as_on_the_host() -> None:
    """By what the same rows say, up to the order of sums."""
    found = []
    for first, there in (("cpu", None), ("cuda", None), ("cpu", "cuda")):
        model: Any = llama(hidden_size=64, intermediate_size=96).to(first)
        calibration = [batch(first, seed) for seed in range(2)]
        attach(model, LoRA(rank=4), resting="80kB", calibration=calibration, device=there)
        found.append({path: part.kind for path, part in model.named_modules() if isinstance(part, RestingLinear)})
    assert {"int8", "nf4"} == set(found[0].values())
    for other in found[1:]:
        assert sum(found[0][path] != kind for path, kind in other.items()) <= 1


@pytest.mark.order("late")
def test_what_is_measured_before_weights_rest_is_measured_there() -> None:
    """What matrices lose and outlier scores: no forward computes a block on the host, where the weights are."""
    model: Any = llama(hidden_size=64, intermediate_size=96)
    layer, seen = model.model.layers[0].mlp.up_proj, []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].device.type))
    batches = [batch("cpu", seed) for seed in range(2)]
    method = OwLore(1, 2, rank=4, scores="outlier", embeddings="frozen")
    attach(model, method, resting="80kB", calibration=batches, device="cuda", keep_logits=True)
    # Each twice where there is a backward, and once for the scores.
    assert seen == ["cuda"] * 3 * len(batches)


@pytest.mark.order("late")
def test_spectra_are_computed_there_a_matrix_at_a_time() -> None:
    model: Any = llama(hidden_size=256, intermediate_size=512).to(torch.bfloat16)
    expected = layer_scores(model, "hill")
    gc.collect()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert layer_scores(model, "hill", device="cuda") == pytest.approx(expected, rel=1e-3)
    assert all(param.device.type == "cpu" for param in model.parameters())
    largest = 4 * 256 * 512
    assert largest < torch.cuda.max_memory_allocated() - held < 4 * largest
    torch.cuda.reset_peak_memory_stats()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_what_matrices_lose_is_measured_there_a_block_at_a_time(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model on the host, which stays there, with what one block takes; an output layer comes in tiles."""
    monkeypatch.setattr(visits, "TILE_BYTES", 300 << 10)
    model: Any = llama(layers=8, hidden_size=256, intermediate_size=512, vocab_size=8000, tied=tied)
    model.to(torch.bfloat16)
    blocks = list(model.model.layers)
    layers = [layer for block in blocks for layer in block.modules() if is_linear(layer)]
    batches = [batch("cpu", seed) for seed in range(2)]
    before = anatomy(model)
    expected = measure_code_losses(model, layers, batches, blocks)
    gc.collect()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = measure_code_losses(model, layers, batches, blocks, torch.device("cuda"))
    assert expected is not None
    assert found is not None
    assert anatomy(model) == before
    assert all(param.device.type == "cpu" and param.grad is None for param in model.parameters())
    for layer in layers:
        for kind in ("nf4", "int8"):
            assert getattr(found[layer], kind) == pytest.approx(getattr(expected[layer], kind), rel=0.05)
    of_a_block = sum(param.nbytes for param in blocks[0].parameters())
    assert 2 * of_a_block < model.lm_head.weight.nbytes
    assert of_a_block < torch.cuda.max_memory_allocated() - held < 2 * of_a_block
    torch.cuda.reset_peak_memory_stats()
    # Outlier scores are the other thing that is measured before weights rest.
    scores = [layer_scores(model, "outlier", batches, threshold=3, device=there) for there in (None, "cuda")]
    assert scores[1] == pytest.approx(scores[0], rel=0.05)
    assert anatomy(model) == before
    assert of_a_block < torch.cuda.max_memory_allocated() - held < 2 * of_a_block
    del expected, found
    gc.collect()
    assert torch.cuda.memory_allocated() == held
