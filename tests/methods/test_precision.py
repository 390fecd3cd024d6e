"""A size for what rests is filled by what is lost, and never exceeded."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from families import anatomy, gpt2, llama, t5, tokens, train
from rich.console import Console
from torch import nn

from bench.held_bytes import status_bytes
from lisa_kernels import LISA, GaLore, InputError, LoRA, OwLore, attach, plan
from lisa_kernels.layers import RestingLinear, find_blocks
from lisa_kernels.methods import Method, SampledAdamW, code_losses
from lisa_kernels.methods.code_losses import measure_code_losses
from lisa_kernels.methods.precision import CodeLoss, bytes_at_rest, losses_by_place, pick_kinds
from lisa_kernels.methods.resting import Kinds
from lisa_kernels.methods.survey import survey_model
from lisa_kernels.ops.resting import KINDS, dequantize_resting_, quantize_resting
from lisa_kernels.progress import progress_bar

METHODS: dict[str, Method] = {
    "owlore": OwLore(1, 2, rank=4, scores="uniform", embeddings="frozen"),
    "galore": GaLore(rank=4, gap=3, embeddings="low-rank"),
    "lora": LoRA(rank=4),
    # What is drawn has no codes meanwhile.
    "lisa": LISA(1, 2, embeddings="frozen"),
    "lora-targets": LoRA(rank=4, targets=("q_proj", "lm_head")),
}


def made(**settings: Any) -> Any:
    return llama(layers=3, hidden_size=64, intermediate_size=96, **settings)


def resting(model: nn.Module) -> dict[str, RestingLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, RestingLinear)}


def held(model: nn.Module) -> int:
    return sum(layer.codes.nbytes + layer.scales.nbytes for layer in resting(model).values())


def kinds(model: nn.Module) -> dict[str, str]:
    return {path: layer.kind for path, layer in resting(model).items()}


def sizes() -> tuple[int, int, int]:
    """Return what rests of the model in 4 bits, in 4 but for the head in 8, and in 8."""
    ends = []
    for kind in ("nf4", "int8"):
        model = made()
        attach(model, METHODS["lora"], resting=kind)
        ends.append(held(model))
    more = bytes_at_rest(made().lm_head, "int8") - bytes_at_rest(made().lm_head, "nf4")
    return ends[0] - more, *ends


LEAST, NF4, MOST = sizes()


def test_bytes_go_where_they_save_most() -> None:
    """By loss for a byte: two small matrices before a large one that loses more than either; none that loses less."""
    large, small, other, poor = nn.Linear(64, 64), nn.Linear(64, 16), nn.Linear(64, 16), nn.Linear(64, 16)
    losses = {
        large: CodeLoss(3.0, 0.1), small: CodeLoss(2.0, 0.1), other: CodeLoss(1.0, 0.0), poor: CodeLoss(0.9, 0.85)
    }  # fmt: skip
    least = sum(bytes_at_rest(layer, "nf4") for layer in losses)
    assert least == (64 * 64 + 3 * 64 * 16) // 2 + (2 + 3) * 36
    expected = {
        511: [], 512: [small], 1024: [small, other], 1535: [small, other], 1536: [small, other, poor],
        3071: [small, other, poor], 3072: [small, large, other], 3583: [small, large, other], 3584: [*losses],
    }  # fmt: skip
    for room, in_8_bits in expected.items():
        picked = pick_kinds(losses, str(least + room), 0, losses)
        assert {layer for layer, kind in picked.items() if kind == "int8"} == set(in_8_bits), room
    assert pick_kinds(losses, str(least + 512), 512, losses) == dict.fromkeys(losses, "nf4")
    with pytest.raises(InputError, match=f"takes {least + 1} bytes"):
        pick_kinds(losses, str(least), 1, losses)


@pytest.mark.parametrize("name", ["owlore", "galore", "lora", "lora-targets"])
def test_what_rests_fills_a_size(name: str) -> None:
    """But for less than another matrix would take; the head and those without a slot are counted.

    The head has 8 bits where there is room for them, before any other.
    """
    smallest = 32 * 64 // 2
    for size in (LEAST, NF4 - 1, NF4, NF4 + smallest - 1, (NF4 + MOST) // 2, MOST, 10 * MOST):
        model = made()
        before = anatomy(model)
        optimizer = attach(model, METHODS[name], resting=str(size))
        assert held(model) <= size
        in_8_bits = sum(kind == "int8" for path, kind in kinds(model).items() if path != "lm_head")
        assert kinds(model)["lm_head"] == ("int8" if size >= NF4 else "nf4")
        assert len(kinds(model)) == 3 * 7 + 1
        if size == LEAST or NF4 <= size < NF4 + smallest:
            assert in_8_bits == 0
        elif size >= MOST:
            assert in_8_bits == 3 * 7
        else:
            assert 0 < in_8_bits < 3 * 7
            assert size - held(model) < 64 * 96 // 2
        train(model, optimizer, tokens())
        optimizer.detach()
        assert anatomy(model) == before


@pytest.mark.parametrize("name", ["owlore", "galore", "lora"])
@pytest.mark.parametrize("make", [made, partial(made, tied=True)], ids=["apart", "tied"])
def test_what_will_rest_is_counted_before_it_does(name: str, make: Callable[[], nn.Module]) -> None:
    """In every way, of a model that nobody has changed: all that rests, the output layer where it does too."""
    for way in ("nf4", "mixed", "int8", str(LEAST), str((NF4 + MOST) // 2)):
        expected = Kinds(way, survey_model(make(), METHODS[name])).nbytes
        model = make()
        attach(model, METHODS[name], resting=way)
        assert held(model) == expected


@pytest.mark.parametrize("seed", range(3))
def test_what_is_measured_takes_no_more_than_a_plan_has_it(seed: int) -> None:
    """Other matrices have 8 bits, "mixed" or by size, in as many bytes but for less than one takes."""
    largest = bytes_at_rest(made().model.layers[0].mlp.down_proj, "int8")
    for way in ("mixed", str(NF4 - 1), *(str(NF4 + (MOST - NF4) * share // 7) for share in (1, 2, 3, 5))):
        planned = made()
        attach(planned, METHODS["lora"], resting=way)
        model = made()
        # Without what they are told by, matrices as they are made lose alike.
        model.model.layers[seed].mlp.up_proj.weight.data.mul_(8)
        attach(model, METHODS["lora"], resting=way, calibration=[tokens(seed=seed)])
        assert held(planned) - largest < held(model) <= held(planned)
        assert kinds(model) != kinds(planned)


def test_a_size_that_is_none_or_too_small_is_refused() -> None:
    for size, words in (
        ("5.5", "not a size|too little"), ("9 bits", "not a size"), ("5,5GB", "not a size"), ("all", "way to rest"),
        (str(LEAST - 1), f"takes {LEAST} bytes"), (5_500_000_000, "way to rest"),
    ):  # fmt: skip
        model = made()
        before = anatomy(model)
        with pytest.raises(InputError, match=words):
            attach(model, METHODS["lora"], resting=size)  # type: ignore[arg-type]
        assert anatomy(model) == before
    model = made()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.nan
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.weight .* holds a NaN"):
        attach(model, METHODS["lora"], resting=str(MOST), calibration=[tokens()])
    with pytest.raises(InputError, match="calibration batch 0"):
        attach(made(), METHODS["lora"], resting=str(MOST), calibration=["text"])  # type: ignore[list-item]


@pytest.mark.parametrize(("make", "recomputed"), [(made, True), (made, False), (gpt2, True)])
def test_what_is_measured_is_what_it_is_defined_as(make: Any, recomputed: bool) -> None:
    """Half of Σ Δ_ij² E[x_j²] E[g_i²] for each kind, of every linear, with nothing left behind."""
    model = make()
    batches = [tokens(seed=seed) for seed in range(2)]
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    # What nobody asks for.
    batches[1]["attention_mask"][:, 8:] = 0
    names = [path for path, module in model.named_modules() if path.endswith(("proj", "c_attn", "c_fc", "c_proj"))]
    layers = [model.get_submodule(path) for path in names]
    model.get_submodule(names[0]).weight.requires_grad_(False)
    blocks = find_blocks(model)[1] if recomputed else ()
    runs: list[nn.Module] = []
    heard = [block.register_forward_hook(lambda block, *_: runs.append(block)) for block in blocks]
    inside = [layers[0].register_forward_hook(lambda layer, *_: runs.append(layer))]
    before = anatomy(model)
    found = measure_code_losses(model, layers, batches, blocks)
    assert found is not None
    assert anatomy(model) == before
    assert runs.count(layers[0]) == (2 if recomputed else 1) * len(batches)
    assert all(runs.count(block) == len(batches) for block in blocks)
    for handle in heard + inside:
        handle.remove()
    assert all(param.grad is None for param in model.parameters())
    inputs: dict[Any, list[Any]] = {layer: [] for layer in layers}
    outputs: dict[Any, list[Any]] = {layer: [] for layer in layers}

    def note(layer: Any, args: Any, y: Any) -> None:
        inputs[layer].append(args[0].detach().reshape(-1, args[0].shape[-1]))
        outputs[layer].append(y)
        y.retain_grad()

    handles = [layer.register_forward_hook(note) for layer in layers]
    generator = torch.Generator().manual_seed(0)
    model.eval()
    for batch in batches:
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.flatten(0, 1)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        losses = nn.functional.cross_entropy(logits, drawn, reduction="none")
        (losses * batch["attention_mask"].flatten()).sum().backward()
    for handle in handles:
        handle.remove()
    for layer in layers:
        weight = layer.weight.detach() if isinstance(layer, nn.Linear) else layer.weight.detach().t().contiguous()
        x = torch.cat(inputs[layer]).square().mean(0)
        g = torch.cat([y.grad.reshape(-1, y.shape[-1]) for y in outputs[layer]]).square().mean(0)
        for kind in KINDS:
            codes, scales = quantize_resting(weight, kind)
            error = dequantize_resting_(torch.empty_like(weight), codes, scales, kind) - weight
            wanted = 0.5 * torch.einsum("ij,j,i->", error.square(), x, g)
            assert getattr(found[layer], kind) == pytest.approx(float(wanted), rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")
def test_what_is_measured_takes_no_more_memory_of_a_deeper_model() -> None:
    """But for what enters its blocks: the C library keeps nothing of what they let go of."""
    model = llama(layers=16, hidden_size=256, intermediate_size=1024, max_position_embeddings=1024)
    layers = [layer for layer in model.model.layers.modules() if isinstance(layer, nn.Linear)]
    most, before = 0, status_bytes("RssAnon")

    def note(*_: Any) -> None:
        nonlocal most
        most = max(most, status_bytes("RssAnon") - before)

    handles = [layer.register_forward_hook(note) for layer in layers]
    measure_code_losses(model, layers, [tokens(1, 1024)], model.model.layers)
    for handle in handles:
        handle.remove()
    of_mlp = 1024 * 1024 * 4
    assert most < 40 * of_mlp


def test_how_far_it_is_is_told_and_comes_to_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told = io.StringIO()
    terminal = Console(file=told, force_terminal=True, width=100)
    monkeypatch.setattr(code_losses, "progress_bar", lambda *given: progress_bar(*given, terminal))
    model = made()
    layers = [layer for layer in model.model.layers.modules() if isinstance(layer, nn.Linear)]
    measure_code_losses(model, layers, [tokens(seed=seed) for seed in range(2)], model.model.layers)
    parts = len(layers) * (2 * 2 + 1)
    assert f"{parts}/{parts}" in told.getvalue()


def test_of_a_model_with_an_encoder_it_is_measured_too() -> None:
    """Whose decoder is told what it reads by labels, which others are not shown."""
    model = t5()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not model.lm_head]
    found = measure_code_losses(model, layers, [tokens()])
    assert found is not None
    assert all(loss.nf4 > loss.int8 > 0 for loss in found.values())
    model = made()
    unread: Any = {"input_ids": tokens()["input_ids"], "labels": "of no use"}
    assert measure_code_losses(model, [model.model.layers[0].mlp.up_proj], [unread])
    assert measure_code_losses(model, [], [unread]) == {}


def test_what_reaches_nothing_is_raised_last() -> None:
    """The matrices before a down projection of zeros lose nothing, whatever their errors are."""
    model = made()
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    size = MOST - 3 * 64 * 96 // 2
    attach(model, METHODS["lora"], resting=str(size), calibration=(tokens(seed=seed) for seed in range(2)))
    in_4_bits = {path for path, kind in kinds(model).items() if kind == "nf4"}
    assert in_4_bits == {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}


@pytest.mark.slow
def test_without_values_the_ends_and_small_matrices_come_first() -> None:
    """As a plan has it, which is in no more bytes either."""
    blocks: dict[int | None, list[nn.Module]] = {number: [nn.Linear(64, 32), nn.Linear(128, 64)] for number in range(8)}
    losses = losses_by_place(blocks)
    assert [losses[blocks[number][1]].nf4 for number in range(8)] == [4.0] * 3 + [1.0] * 3 + [4.0] * 2
    assert {losses[blocks[number][0]].nf4 for number in range(8)} == {1.0}
    settings: dict[str, Any] = {"seq_len": 64, "dtype": "bf16", "gradient_checkpointing": False}
    plans = [plan("preset:tiny", METHODS["lora"], resting=way, **settings) for way in ("nf4", "int8")]
    low, high = (each.split["weights"] for each in plans)
    room = (high - low) // 3
    least = least_of("preset:tiny")
    filled = plan("preset:tiny", METHODS["lora"], resting=str(least + room), **settings).split["weights"]
    assert low + room // 2 < filled <= low + room


def least_of(preset: str) -> int:
    from lisa_kernels.train.empty_model import empty_model

    model = empty_model(preset, "bf16")
    linears = [layer for layer in model.get_submodule("model.layers").modules() if isinstance(layer, nn.Linear)]
    return sum(bytes_at_rest(layer, "nf4") for layer in linears) + bytes_at_rest(model.lm_head, "int8")


def run(model: Any, optimizer: SampledAdamW, first: int, last: int) -> None:
    for step in range(first, last):
        train(model, optimizer, tokens(1, 6, seed=step))


@pytest.mark.parametrize("way", ["mixed", str((LEAST + MOST) // 2)], ids=["mixed", "size"])
@pytest.mark.parametrize("name", ["owlore", "lora", "lisa"])
def test_a_resumed_run_rests_as_it_did(name: str, way: str) -> None:
    """Though other matrices would be picked now; a state is refused where codes cannot change."""

    def start(seed: int | None, **settings: Any) -> tuple[Any, SampledAdamW]:
        model = made()
        batches = None if seed is None else [tokens(seed=seed)]
        return model, attach(model, METHODS[name], lr=1e-2, seed=0, resting=way, calibration=batches, **settings)

    model, optimizer = start(None)
    run(model, optimizer, 0, 3)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    run(model, optimizer, 3, 6)
    other, after = start(5)
    assert kinds(other) != kinds(model)
    other.load_state_dict(weights)
    after.load_state_dict(state)
    assert kinds(other) == kinds(model)
    run(other, after, 3, 6)
    for (path, one), another in zip(resting(model).items(), resting(other).values(), strict=True):
        for part in ("stored_weight", "codes", "scales", "slot", "basis"):
            assert torch.equal(getattr(one, part), getattr(another, part)), (path, part)
    _, streamed = start(5, resting_where="host")
    with pytest.raises(InputError, match="resting_where='device'"):
        streamed.load_state_dict(state)
