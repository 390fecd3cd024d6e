"""What a plan says of a run's memory is what torch's own CUDA allocator says of its steps."""

from __future__ import annotations

import dataclasses
import gc
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes

from device.simulated import drain, driver
from device.simulation import SimulatedDevice
from device.triton_launches import unheard
from lisa_kernels import LISA, OWS, BAdam, FullFineTune, GaLore, LoRA, LoRAFA, OwLore
from lisa_kernels.basis.tracker import Heard
from lisa_kernels.cli import _parser, main
from lisa_kernels.layers import embedding
from lisa_kernels.layers.loss import LossWithoutLogits
from lisa_kernels.methods import Method, outer_slots
from lisa_kernels.ops.resting import RestingWeight
from lisa_kernels.plan import plan
from lisa_kernels.plan.cards import CONTEXT_BYTES
from lisa_kernels.plan.draws import GivenDraws
from lisa_kernels.plan.gpu_memory import GpuMemory
from lisa_kernels.plan.options import workload_of
from lisa_kernels.plan.rehearsal import STEPS, Workload, prepare
from lisa_kernels.train.configs import load_config
from lisa_kernels.train.options import FineTuneOptions

BATCH, SEQ_LEN = 2, 256
KINDS = ("requested_bytes", "allocated_bytes")
CASES: dict[str, tuple[str, Method]] = {
    "lisa": ("Llama", LISA(2)),
    "owlore": ("Llama", OwLore(2, rank=64, scores="uniform")),
    "ows": ("Llama", OWS(2, embeddings="low-rank", rank=64, scores="uniform")),
    "badam": ("Llama", BAdam()),
    "galore": ("Llama", GaLore(rank=64)),
    "lora-fa": ("Llama", LoRAFA(rank=16)),
    "full": ("Llama", FullFineTune()),
    "lisa tied": ("Qwen2", LISA(2)),
    "owlore tied": ("Qwen2", OwLore(2, rank=64, scores="uniform")),
    "owlore resting": ("Llama", OwLore(2, rank=64, scores="uniform")),
    "galore resting tied": ("Qwen2", GaLore(rank=64, embeddings="low-rank")),
    "lora resting": ("Llama", LoRA(rank=16)),
    "lora-fa resting tied": ("Qwen2", LoRAFA(rank=16)),
    "lisa resting": ("Llama", LISA(2)),
    "owlore on masters": ("Llama", OwLore(2, rank=64, scores="uniform", embeddings="frozen")),
    "owlore streamed": ("Llama", OwLore(2, rank=64, scores="uniform", embeddings="frozen")),
    "galore streamed tied": ("Qwen2", GaLore(rank=64, embeddings="low-rank")),
}
RESTING = {
    "owlore resting": "nf4", "galore resting tied": "mixed", "lora resting": "nf4", "lora-fa resting tied": "int8",
    "lisa resting": "int8", "owlore on masters": "nf4", "owlore streamed": "nf4",
    "galore streamed tied": "int8",
}  # fmt: skip
# Where weights rest the peak is in the loss, while the head finds its basis: a plan says up to so much more.
SKETCHES = 1 << 21
# A batch, and bytes by which numbers of the host are rounded up.
SMALL = 1 << 14
# A block of more than 1 MiB keeps up to 1 MiB of what it was cut from; which one is there depends on the order in which
# autograd gives memory back. Four of them at the most are apart at a peak.
UNCUT = 4 << 20
# Its peak is in the first forward, where the head finds its basis; the backward's workspace, which a plan counts from
# the start, is made after it.
BEFORE_A_BACKWARD = ("owlore", "owlore tied")


@pytest.fixture
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only the host's side of the steps: what it would be told of values is what a plan takes for granted."""
    monkeypatch.setattr(LossWithoutLogits, "is_exact", lambda self: True)
    for module in (embedding, outer_slots):
        monkeypatch.setattr(module, "lookup_factor", lambda layer: 1.0)
    for name in ("is_true", "wait"):
        monkeypatch.setattr(Heard, name, lambda self: True)
    monkeypatch.setattr(RestingWeight, "is_finite", lambda self: True)
    driver.sim_set_poison(0)
    # What masks are decided by has values: positions, one more at the head of each row.
    values = SimulatedDevice(largest=BATCH * (SEQ_LEN + 1))
    with _disable_current_modes(), values, unheard(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield
        drain()
    driver.sim_set_poison(1)


def config(family: str) -> Any:
    """Return the geometry of a family: a Llama of 12 heads and untied, or a Qwen2 of 4 for keys, biased and tied."""
    import transformers

    tied = family == "Qwen2"
    return getattr(transformers, f"{family}Config")(
        hidden_size=1536, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=12,
        num_key_value_heads=4 if tied else 12, vocab_size=32000, max_position_embeddings=512, tie_word_embeddings=tied,
    )  # fmt: skip


def peaks_of_steps(workload: Workload) -> tuple[int, int]:
    """Return the most bytes that torch's allocator was asked for, and has given out, in the steps of a rehearsal."""
    from transformers import AutoModelForCausalLM

    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_stats()
    # What rests comes as codes, as a plan takes it to.
    with torch.device("cuda" if workload.resting is None else "cpu"):
        geometry = load_config(workload.model) if isinstance(workload.model, str) else workload.model
        model = AutoModelForCausalLM.from_config(geometry, dtype=torch.bfloat16)
    model.config.use_cache = False
    opt = prepare(model.train(), workload)
    model.to("cuda")
    torch.cuda.reset_peak_memory_stats()
    for _ in range(len(opt.sampler.draws) if isinstance(opt.sampler, GivenDraws) else STEPS):
        shape = workload.batch_size, workload.seq_len
        inputs = {name: torch.ones(shape, dtype=torch.int64).cuda() for name in ("input_ids", "labels")}
        loss = model(**inputs).loss
        loss.backward()
        del loss, inputs
        opt.step()
        opt.zero_grad()
    after = torch.cuda.memory_stats()
    asked, given = (after[f"{name}.all.peak"] - before[f"{name}.all.current"] for name in KINDS)
    return asked, given


@pytest.mark.order("late")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("nothing_computed")
def test_the_allocator_gives_out_what_was_planned(name: str) -> None:
    """It is asked for the plan's bytes, and gives out what the plan's replay says, but for what blocks keep uncut."""
    family, method = CASES[name]
    active_on = "master" if "masters" in name else None
    given: dict[str, Any] = {
        "batch_size": BATCH, "seq_len": SEQ_LEN, "resting": RESTING.get(name), "active_on": active_on,
        "resting_where": "host" if "streamed" in name else None,
    }  # fmt: skip
    planned = plan(config(family), method, **given)
    less = GpuMemory.here().workspace_bytes if name in BEFORE_A_BACKWARD else 0
    asked, given_out = peaks_of_steps(Workload(config(family), method, **given))
    print("APART", name, asked - (planned.peak_bytes - less), given_out - (planned.reserved().allocated - less))
    more = SKETCHES if name in RESTING else SMALL
    assert -more <= asked - (planned.peak_bytes - less) <= SMALL
    assert abs(given_out - (planned.reserved().allocated - less)) <= UNCUT


@pytest.mark.order("late")
@pytest.mark.usefixtures("nothing_computed")
def test_the_command_that_fit_prints_takes_what_was_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model that fits from the host only: as the options of a run, with the switch that is in it."""
    model = config("Llama")
    model.save_pretrained(tmp_path)
    asked = [
        "plan", "--model", str(tmp_path), "--method", "owlore", "--rank", "64", "--active-layers", "2", "--scores",
        "uniform", "--batch-size", "1", "--seq-len", str(SEQ_LEN), "--dtype", "bf16", "--resting", "nf4",
        "--gradient-checkpointing",
    ]  # fmt: skip
    method = OwLore(2, rank=64, scores="uniform")
    wanted = plan(model, method, seq_len=SEQ_LEN, resting="nf4", resting_where="host")
    size = CONTEXT_BYTES + wanted.reserved(expandable=True).reserved + UNCUT
    assert main([*asked, "--fit", str(size), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["resting"], found["resting_where"], found["peak_bytes"]) == ("nf4", "host", wanted.peak_bytes)
    words = shlex.split(found["fit"]["command"])
    told = _parser().parse_args(words[words.index("finetune") :])
    known = {field.name for field in dataclasses.fields(FineTuneOptions)}
    workload = workload_of(FineTuneOptions(**{name: value for name, value in vars(told).items() if name in known}))
    asked_for, _ = peaks_of_steps(workload)
    assert -SKETCHES <= asked_for - found["peak_bytes"] <= SMALL
