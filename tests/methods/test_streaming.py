"""Weights that rest in host memory or a file and are streamed to where a model computes: bits of those there."""

from __future__ import annotations

import copy
import os
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import gpt2, llama, logits, tokens, train
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lisa_kernels import LISA, GaLore, InputError, LoRA, OwLore, attach, plan
from lisa_kernels.layers import RestingLinear, checkpoint_blocks
from lisa_kernels.methods import Method, SampledAdamW
from lisa_kernels.paging import page_file
from lisa_kernels.paging.page_file import PageFile
from lisa_kernels.paging.streamed import StreamedPages
from lisa_kernels.plan import Plan
from lisa_kernels.plan.rehearsal import Workload, rehearse

LAYERS = 4
METHODS: dict[str, Method] = {
    "owlore": OwLore(active_layers=2, period=3, gap=2, rank=4, scores="uniform", embeddings="frozen"),
    "owlore-page": OwLore(active_layers=1, period=2, gap=3, rank=4, scores="uniform", retired_state="page"),
    "galore-tied": GaLore(rank=4, gap=3, embeddings="low-rank"),
    "lora": LoRA(rank=4, alpha=8.0),
    # Drawn layers compute on their masters.
    "lisa": LISA(active_layers=1, period=2, embeddings="frozen"),
}


def made(name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    if name == "gpt2":
        return gpt2(LAYERS).to(dtype)
    return llama(LAYERS, tied=name.endswith("tied"), hidden_size=64, intermediate_size=96).to(dtype)


def start(name: str, where: str, kind: str = "nf4", recomputed: str = "kept") -> tuple[Any, SampledAdamW]:
    model = made(name)
    if recomputed == "recomputed":
        checkpoint_blocks(model)
    elif recomputed == "re-entrant":
        model.config.use_cache = False
        for block in model.model.layers:
            # By someone's own hand; transformers' way is refused.
            block.forward = partial(re_entrant, block.forward)
    method = METHODS.get(name, METHODS["owlore"])
    return model, attach(model, method, lr=3e-3, seed=0, resting=kind, resting_where=where)


def re_entrant(forward: Any, hidden: Tensor, **others: Any) -> Any:
    return checkpoint(lambda rows: forward(rows, **others), hidden, use_reentrant=True)


def pages(optimizer: SampledAdamW) -> StreamedPages:
    assert optimizer.layout.streamed is not None
    return optimizer.layout.streamed


def resting(model: Any) -> dict[str, RestingLinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, RestingLinear)}


def codes(model: Any) -> dict[str, Tensor]:
    found = {}
    at_rest = {path: layer for path, layer in resting(model).items() if not getattr(layer, "awake", False)}
    for path, layer in at_rest.items():
        with layer.lend() as weight:
            found |= {f"{path}.codes": weight.codes.clone(), f"{path}.scales": weight.scales.clone()}
    return found


def trained(name: str, where: str, kind: str, recomputed: str) -> dict[str, Tensor]:
    """Return all there is to see of a run: losses, gradients, logits between steps, codes, masters after it."""
    model, optimizer = start(name, where, kind, recomputed)
    seen: dict[str, Tensor] = {}
    for step in range(7):
        loss = model(**tokens(1, 6, seed=step)).loss
        loss.backward()
        seen[f"{step}: loss"] = loss.detach()
        for path, param in model.named_parameters():
            if param.grad is not None:
                seen[f"{step}: {path}"] = param.grad.clone()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2:
            # An evaluation of the model, and of a block by itself.
            seen[f"{step}: logits"] = logits(model, tokens())
            seen[f"{step}: block"] = next(iter(resting(model).values()))(torch.ones(2, 3, 64, dtype=torch.bfloat16))
    seen |= codes(model)
    return {**seen, **optimizer.detach().state_dict()}


# Of `CASES`, which the others leave little to be seen in.
LONG = [("owlore-page", "mixed", "kept"), ("lora", "nf4", "kept")]
CASES = [
    ("owlore", "nf4", "recomputed"), ("owlore-page", "mixed", "kept"), ("galore-tied", "int8", "re-entrant"),
    ("lora", "nf4", "kept"), ("lisa", "int8", "recomputed"),
]  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in LONG), id="-".join(case)) for case in CASES]
)
def test_a_streamed_run_has_the_bits_of_a_resident_one(case: tuple[str, str, str], tmp_path: Path) -> None:
    """From the host and from a file, which is not seen in its folder."""
    one, *others = (trained(case[0], where, *case[1:]) for where in ("device", "host", str(tmp_path)))
    for other in others:
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]), key
    assert not any(tmp_path.iterdir())


def test_weights_stored_transposed_are_streamed_too(tmp_path: Path) -> None:
    """And under autocast."""
    ends = []
    for where in ("device", "host", str(tmp_path)):
        model, optimizer = start("gpt2", where)
        for step in range(4):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**tokens(1, 6, seed=step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(optimizer.detach().state_dict())
    for other in ends[1:]:
        assert all(torch.equal(one, value) for one, value in zip(ends[0].values(), other.values()))


@pytest.mark.parametrize("where", ["host", "file"])
def test_the_device_holds_two_blocks_and_the_host_all_of_them(where: str, tmp_path: Path) -> None:
    """Or the file has them; none of them after the end; the layers themselves hold no codes but the head's."""
    model, optimizer = start("owlore", where if where == "host" else str(tmp_path))
    train(model, optimizer, tokens())
    held, streamed = pages(optimizer).held(), pages(optimizer)
    assert [buffer.numel() for buffer in held] == [streamed.nbytes // LAYERS] * 2
    at_home = sum(buffer.numel() for buffer in streamed.homes())
    assert (at_home, optimizer.code_bytes_written > 0) == ((streamed.nbytes, False) if where == "host" else (0, True))
    for path, layer in resting(model).items():
        assert (layer.codes.numel() > 0) == (path == "lm_head")
    optimizer.detach()
    assert not streamed.held()
    assert not resting(model)


@pytest.mark.parametrize("recomputed", [pytest.param("kept", marks=pytest.mark.slow), "recomputed"])
def test_a_step_copies_what_its_blocks_need(recomputed: str) -> None:
    """Forward all but the one that is there, backward all down to the lowest that trains but the two that are there."""
    method = OwLore(active_layers=1, period=50, gap=50, rank=4, scores="uniform", embeddings="frozen")
    lowest = set()
    for seed in (3, 5, 0, 7):
        model = made("owlore")
        if recomputed == "recomputed":
            checkpoint_blocks(model)
        optimizer = attach(model, method, seed=seed, resting="nf4", resting_where="host")
        copied: list[int] = []
        pages(optimizer).watchers.append(copied.append)
        for step in range(5):
            copied.clear()
            train(model, optimizer, tokens(1, 6, seed=step))
        [active] = optimizer.active_layers
        lowest.add(active)
        # With a lowest of 0 or 1 the second one is there, too, when a step begins.
        forwards = LAYERS if active >= 2 else LAYERS - 1
        backwards = max(0, LAYERS - 2 - active) - (active == 0)
        assert copied == [pages(optimizer).nbytes // LAYERS] * (forwards + backwards), active
    assert len(lowest) == LAYERS


@pytest.mark.parametrize("where", ["host", "file"])
def test_copies_of_a_model_compute_by_themselves(where: str, tmp_path: Path) -> None:
    """Those of one whose codes are in a file have them in host memory."""
    model, optimizer = start("owlore", where if where == "host" else str(tmp_path))
    train(model, optimizer, tokens())
    here, other = logits(model, tokens()), copy.deepcopy(model)
    for step in range(4):
        train(model, optimizer, tokens(seed=step))
    assert torch.equal(logits(other, tokens()), here)
    assert not torch.equal(logits(model, tokens()), here)


def test_a_resumed_run_goes_on_wherever_codes_are(tmp_path: Path) -> None:
    """Saved with codes on the host and gone on with on the device, and the other way; from and to a file."""
    ends = []
    file = str(tmp_path)
    for first, then in (("device", "host"), ("host", file), (file, "device"), (file, file)):
        model, optimizer = start("owlore", first)
        for step in range(2):
            train(model, optimizer, tokens(1, 6, seed=step))
        weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        model, optimizer = start("owlore", then)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        for step in range(2, 5):
            train(model, optimizer, tokens(1, 6, seed=step))
        ends.append({**codes(model), **model.state_dict()})
    for other in ends[1:]:
        for key, value in ends[0].items():
            assert torch.equal(value, other[key]), key


def test_a_model_writes_the_same_words() -> None:
    words = []
    for where in ("device", "host"):
        model, optimizer = start("owlore", where)
        for step in range(3):
            train(model, optimizer, tokens(1, 6, seed=step))
        ids = tokens(1, 6)["input_ids"]
        words.append(model.eval().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False))
        train(model.train(), optimizer, tokens())
    assert torch.equal(*words)


@pytest.mark.slow
def test_a_plan_holds_two_blocks_of_codes() -> None:
    """In the place of all of them; on a CPU, where host and device are one, all of them and the masters beside."""
    method, model = METHODS["owlore"], made("owlore")
    streamed = pages(start("owlore", "host")[1]).nbytes
    settings: dict[str, Any] = {"seq_len": 64, "dtype": "bf16", "resting": "nf4", "gradient_checkpointing": False}
    found = {where: plan(model.config, method, resting_where=where, **settings) for where in ("device", "host")}
    on_card = {where: each.split["weights"] for where, each in found.items()}
    # Each tensor of a page begins at a multiple of 512 bytes, of which there are 14 in a block.
    between = 14 * 512
    assert 0 <= on_card["host"] - on_card["device"] + (streamed - 2 * streamed // LAYERS) <= LAYERS * between
    on_cpu, of_file = (
        rehearse(Workload(model.config, method, resting_where=where, **settings)) for where in ("host", "/nowhere")
    )
    # Of a master that is elsewhere a plan has a single number.
    masters = sum(2 * (param.numel() - 1) for param in model.parameters() if param.dim() == 2)
    assert Plan(None, on_cpu).split["weights"] == on_card["host"] + streamed + masters
    assert Plan(None, of_file).split["weights"] == on_card["host"] + masters


def test_a_disk_that_fails_in_a_step_leaves_the_masters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, in a forward or a backward; with the disk back the run goes on, and to the same end."""
    ends = []
    for failing in (False, True):
        model, optimizer = start("galore-tied", str(tmp_path), recomputed="recomputed")
        for step in range(4):
            if failing:
                masters = {path: layer.stored_weight.clone() for path, layer in resting(model).items()}
                # Of a forward the first, of a backward the second.
                for count in (0, 3):
                    with monkeypatch.context() as patch:
                        fail_after(count, patch)
                        with pytest.raises(InputError, match="cannot be read from a file"):
                            train(model, optimizer, tokens(1, 6, seed=step))
                assert all(torch.equal(layer.stored_weight, masters[path]) for path, layer in resting(model).items())
                optimizer.zero_grad()
            train(model, optimizer, tokens(1, 6, seed=step))
        ends.append({**codes(model), **optimizer.detach().state_dict()})
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key


def fail_after(reads: int, patch: pytest.MonkeyPatch) -> None:
    """Have the disk fail after so many reads."""
    done, real = [0], PageFile._read

    def read(file: PageFile, begin: int, into: Tensor, after: Any) -> None:
        done[0] += 1
        if done[0] > reads:
            file._file, kept = open(os.devnull, "rb", buffering=0), file._file  # type: ignore[assignment]  # noqa: SIM115
            try:
                real(file, begin, into, after)
            finally:
                file._file = kept
        real(file, begin, into, after)

    patch.setattr(PageFile, "_read", read)


def test_a_disk_that_fills_in_a_settle_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run that goes on from before has the end of one that nothing happened to."""
    ends, write = [], PageFile._write
    for failing in (False, True):
        model, optimizer = start("owlore", str(tmp_path))
        for step in range(2):
            train(model, optimizer, tokens(1, 6, seed=step))
        if failing:
            weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            written: list[int] = []

            def full(file: PageFile, begin: int, content: Tensor, written: list[int] = written) -> None:
                written.append(begin)
                if len(written) > 3:
                    monkeypatch.setattr(file, "_file", open("/dev/full", "wb", buffering=0))  # noqa: SIM115
                write(file, begin, content)

            with monkeypatch.context() as patch:
                patch.setattr(PageFile, "_write", full)
                with pytest.raises(InputError, match=r"cannot be written to a file in .* \(No space left on device\)"):
                    train(model, optimizer, tokens(1, 6, seed=2))
            model, optimizer = start("owlore", str(tmp_path))
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        for step in range(2, 4):
            train(model, optimizer, tokens(1, 6, seed=step))
        ends.append({**codes(model), **optimizer.detach().state_dict()})
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key


@pytest.mark.parametrize("how", ["small", "not finite", "no folder"])
def test_a_start_that_fails_leaves_the_model(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no file: the disk has its place back at once."""
    model, folder, opened = made("owlore"), tmp_path, list[PageFile]()
    if how == "small":
        usage, words = namedtuple("usage", "total used free"), r"take [\d,]+ bytes on the disk, and .* has 12,345 left"
        monkeypatch.setattr(page_file.shutil, "disk_usage", lambda path: usage(0, 0, 12_345))
    elif how == "not finite":
        model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.nan
        words = "holds a NaN or an infinity"
    else:
        folder, words = tmp_path / "none", "names a folder that is not there"
    place = PageFile.place
    monkeypatch.setattr(PageFile, "place", lambda file, nbytes: opened.append(file) or place(file, nbytes))
    with pytest.raises(InputError, match=words):
        attach(model, METHODS["owlore"], resting="nf4", resting_where=folder)
    assert all(file._file is None or file._file.closed for file in opened)
    assert opened
    assert not resting(model)
    assert logits(model, tokens()).shape


def test_what_cannot_be_streamed_is_refused() -> None:
    for resting, where, words in (
        (None, "host", "resting_where='host' is for weights that rest"),
        (None, "/tmp", "resting_where='/tmp' is for weights that rest"),
        ("nf4", "", "'host' or a folder is wanted"),
        ("nf4", 3, "resting_where is 3; 'device', 'host' or a folder is wanted"),
        ("nf4", "disk", r"'disk' names a folder that is not there; give 'device', 'host', or a folder"),
    ):
        with pytest.raises(InputError, match=words):
            attach(llama(), METHODS["owlore"], resting=resting, resting_where=where)
