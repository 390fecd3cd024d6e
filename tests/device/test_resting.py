"""A model whose weights rest computes on the device, with its masters and its table in host memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import llama

from lisa_kernels import GaLore, attach

from .training import batch


@pytest.mark.order("late")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("first", ["attach", "move"])
def test_a_model_says_where_it_computes(tied: bool, first: str) -> None:
    """To those who ask its first parameter, such as transformers' generation; masters stay on the host."""
    model: Any = llama(tied=tied)
    if first == "move":
        model.to("cuda")
    opt = attach(model, GaLore(rank=4, gap=3, embeddings="low-rank"), lr=1e-2, resting="int8")
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
