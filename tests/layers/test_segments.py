"""Which models attend by segments, that each segment comes out as it does alone, and what is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.layers import attend_by_segments, attends_by_segments, borders_mask
from tests.families import DECODERS, LAYERS, common, llama

LENGTHS = (5, 8, 3, 2)
# Of gradients in float32 that are summed in another order.
CLOSE = 2e-6
# Attention with a cap, of an interface of its own.
OTHERS = {"gemma2", "falcon"}
WINDOWED = {"mistral": 8, "gemma3": 8}


def made(family: str) -> Any:
    model = DECODERS[family].make()
    if family not in OTHERS:
        model.set_attn_implementation("sdpa")
    return model


def examples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 60, (length,), generator=generator) for length in LENGTHS]


def flat_batch(rows: list[Tensor]) -> dict[str, Tensor]:
    """Return the rows end to end, the first token of each without a label."""
    ids, positions = torch.cat(rows)[None], torch.cat([torch.arange(len(row)) for row in rows])[None]
    borders = torch.tensor([0, *map(len, rows)]).cumsum(0)
    return {
        "input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions,
        "attention_mask": borders_mask(borders),
    }  # fmt: skip


def loss_and_gradients(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", sorted(DECODERS.keys() - OTHERS))
def test_segments_give_the_loss_and_the_gradients_that_they_give_alone(family: str) -> None:
    model, rows = made(family), examples()
    alone = [loss_and_gradients(model, {"input_ids": row[None], "labels": row[None]}) for row in rows]
    shares = [(len(row) - 1) / (sum(LENGTHS) - len(LENGTHS)) for row in rows]
    loss, gradients = (sum(share * part for share, part in zip(shares, parts)) for parts in zip(*alone))
    assert attend_by_segments(model, max(LENGTHS))
    assert attends_by_segments(model)
    found = loss_and_gradients(model, flat_batch(rows))
    assert abs(found[0] - loss) <= CLOSE * loss
    assert (found[1] - gradients).norm() <= CLOSE * gradients.norm()


def test_without_borders_a_model_attends_as_before() -> None:
    """Padded rows, packed ones whose positions tell of borders, and generation from a cache."""
    model = made("llama").eval()
    ids = torch.stack([torch.arange(3, 11), torch.arange(20, 28)])
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    batches = [{"attention_mask": mask}, {"position_ids": torch.arange(8).remainder(5).expand(2, 8)}]
    before = [model(input_ids=ids, use_cache=False, **batch).logits for batch in batches]
    said = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert attend_by_segments(model, 8)
    for batch, logits in zip(batches, before):
        assert torch.equal(model(input_ids=ids, use_cache=False, **batch).logits, logits)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), said)


@pytest.mark.parametrize(("family", "window"), WINDOWED.items())
def test_a_model_that_sees_less_far_than_the_longest_segment_is_left_alone(family: str, window: int) -> None:
    model = made(family)
    assert not attend_by_segments(model, window + 1)
    assert (model.config._attn_implementation, model.training) == ("sdpa", True)
    assert attend_by_segments(model, window)
    # Asked again, with longer segments.
    assert not attend_by_segments(model, window + 1)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", sorted(OTHERS))
def test_attention_that_is_not_torchs_is_left_alone(family: str) -> None:
    model = made(family)
    assert not attend_by_segments(model, 2)
    assert model.config._attn_implementation == "eager"


def dropout() -> Any:
    return llama(attention_dropout=0.1)


def deaf() -> Any:
    """Return a Llama whose blocks get no mask: what says that segments are apart never arrives."""
    model = llama()

    def without_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, {**kwargs, "attention_mask": None}

    model.model.layers[1].register_forward_pre_hook(without_mask, with_kwargs=True)
    return model


def looks_ahead() -> Any:
    model = llama()
    model.model.layers[1].self_attn.is_causal = False
    return model


def capped() -> Any:
    """Return a Llama whose attention is told to cap its scores."""
    model = llama()

    def with_cap(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return args, {**kwargs, "softcap": 30.0}

    model.model.layers[1].self_attn.register_forward_pre_hook(with_cap, with_kwargs=True)
    return model


@pytest.mark.parametrize("make", [dropout, deaf, looks_ahead, capped])
def test_what_borders_do_not_tell_is_left_to_a_mask(make: Any) -> None:
    model = make()
    model.set_attn_implementation("sdpa")
    assert not attend_by_segments(model, 6)
    assert not attends_by_segments(model)


def test_the_random_state_and_the_saved_configuration_stay(tmp_path: Path) -> None:
    """Nobody who loads the model later meets the name of this attention."""
    model = made("llama")
    state = torch.random.get_rng_state()
    assert attend_by_segments(model, 8)
    assert torch.equal(torch.random.get_rng_state(), state)
    model.save_pretrained(tmp_path)
    assert "segments" not in (tmp_path / "config.json").read_text()


def test_no_tensor_of_all_pairs_of_tokens_is_made() -> None:
    """Of four segments of 64 tokens none holds 256 · 256 numbers, in neither forward nor backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple) else [result]:
                if isinstance(value, Tensor):
                    self.elements = max(self.elements, value.numel())
            return result

    model = llama(max_position_embeddings=64)
    model.set_attn_implementation("sdpa")
    assert attend_by_segments(model, 64)
    batch = flat_batch([torch.arange(64).remainder(50) + 3] * 4)
    masked = {name: value for name, value in batch.items() if name != "attention_mask"}
    found = []
    for given in (batch, masked):
        with Largest() as largest:
            loss_and_gradients(model, given)
        found.append(largest.elements)
    assert found[0] < 256 * 256 <= found[1]


def test_borders_of_several_rows_are_refused() -> None:
    model = made("llama")
    assert attend_by_segments(model, 8)
    ids = torch.arange(3, 9).expand(2, 6)
    with pytest.raises(InputError, match="those of one row, and 2 rows are given"):
        model(input_ids=ids, attention_mask=borders_mask(torch.tensor([0, 6])), use_cache=False)


def test_the_models_of_this_file_are_of_several_layers() -> None:
    """A probe counts calls of attention, which one layer would not tell apart from one call too few."""
    assert LAYERS > 1
    assert common()["num_key_value_heads"] < common()["num_attention_heads"]


def test_it_is_where_the_model_will_compute_that_has_to_have_the_kernel() -> None:
    """No GPU has one for float32; nothing is asked of a device that is not there."""
    model = made("llama")
    assert not attend_by_segments(model, 8, device=torch.device("cuda"))
    assert not attends_by_segments(model)
    assert attend_by_segments(model, 8, device=torch.device("cpu"))
