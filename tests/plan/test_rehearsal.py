"""A rehearsal without storage equals a real run, event by event; and what it costs."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lisa_kernels import LISA, BAdam, FullFineTune, OwLore, attach
from lisa_kernels.errors import InputError
from lisa_kernels.layers import checkpoint_blocks
from lisa_kernels.methods import Method
from lisa_kernels.optim import paged
from lisa_kernels.plan.rehearsal import Workload, rehearse
from lisa_kernels.plan.trace import Trace
from lisa_kernels.plan.tracker import StorageTracker

from .small_runs import METHODS, config, random_batch, real_model, tracked_run, workload

# The numbers of a 7B plan's process: torch, transformers and the trace, and no weights.
LARGEST_PROCESS = 1_000_000_000


def sizes(trace: Trace) -> list[tuple[int, str, str, str]]:
    """Return what must be equal of each event; zeros stand for random tokens, so that operations may differ."""
    return [(event.bytes, event.category, event.phase, event.module) for event in trace.events]


def check_equal(given: Workload) -> None:
    planned, real = rehearse(given), tracked_run(given)
    assert planned.peak_bytes == real.peak_bytes
    assert planned.phases() == real.phases()
    assert sizes(planned) == sizes(real)


@pytest.mark.parametrize("name", METHODS)
def test_a_rehearsal_equals_the_real_run(name: str) -> None:
    """Every method: peak, the peak of every phase, and every single storage's size, category and place."""
    check_equal(workload("llama", METHODS[name]))


@pytest.mark.parametrize("name", ["lisa", "lisa-low-rank", "badam-keep", "owlore-frozen"])
def test_layers_that_are_drawn_on_masters_are_rehearsed(name: str) -> None:
    """Those that rest give their codes up when they are drawn."""
    check_equal(workload("gpt2" if name == "lisa" else "llama", METHODS[name], resting="nf4", active_on="master"))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2", "owlore-low-rank"), ("qwen2", "owlore-with-first-block"), ("qwen2", "lisa"),
        ("gpt2", "owlore-always"), ("gpt2", "lisa"), ("gemma2", "owlore-low-rank"),
    ],
)  # fmt: skip
def test_other_models_are_rehearsed(family: str, name: str) -> None:
    """One table for embedding and head; weights stored the other way round; windows of attention and capped logits."""
    check_equal(workload(family, METHODS[name]))


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": False},
        {"checkpointed_blocks": 1},
        {"accumulate": 3},
        {"keep_logits": True},
        {"max_grad_norm": None},
        {"seq_len": 300, "block_size": 128},
    ],
    ids=["no-checkpointing", "one-block", "accumulation", "logits", "no-clipping", "chunked-loss"],
)
def test_every_setting_is_rehearsed(changes: dict[str, object]) -> None:
    """Whatever a run can be told, on the method with most parts."""
    check_equal(workload("llama", METHODS["owlore-low-rank"], **changes))


# Every pair of method, model and checkpointing once: llama's checkpointed runs are those of the plain tests above.
COMBINED = [("llama", name, False) for name in METHODS] + [
    (family, name, bool((number + odd) % 2))
    for odd, family in enumerate(("qwen2", "gpt2"))
    for number, name in enumerate(METHODS)
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "name", "checkpointing"), COMBINED)
def test_every_method_on_every_model(family: str, name: str, checkpointing: bool) -> None:
    """With two micro-batches."""
    check_equal(workload(family, METHODS[name], gradient_checkpointing=checkpointing, accumulate=2))


def test_a_model_that_cannot_be_rehearsed_says_so() -> None:
    """Experts that are computed together need dtypes that this one does not have; the reason is told."""
    experts = replace(workload(), model=config("mixtral", num_local_experts=4))
    with (
        pytest.warns(UserWarning, match="forming the logits"),
        pytest.raises(InputError, match="MixtralForCausalLM cannot be rehearsed without values"),
    ):
        rehearse(experts)


def test_a_byte_too_many_is_seen() -> None:
    """Negative control: one token more in the real run, and neither peak nor events are equal."""
    given = workload("llama", METHODS["badam"])
    planned, real = rehearse(given), tracked_run(replace(given, seq_len=given.seq_len + 1))
    assert planned.peak_bytes != real.peak_bytes
    assert sizes(planned) != sizes(real)


@pytest.mark.parametrize(
    "name", ["lisa", "owlore-frozen", *(pytest.param(n, marks=pytest.mark.slow) for n in ("badam-keep", "owlore-keep"))]
)
def test_a_run_by_the_public_way_stays_below_the_plan(name: str) -> None:
    """`attach` with its own draws over many switches: never above the plan, and not far below it.

    Above it by one thing alone: the optimizer keeps the keys of random numbers of up to eight sets of layers.
    """
    given = workload("llama", METHODS[name], seq_len=64)
    model = real_model(given)
    checkpoint_blocks(model)
    optimizer = attach(model, replace(given.method, period=2), max_grad_norm=1.0)  # type: ignore[call-arg]
    tracker = StorageTracker("cpu")
    with tracker, tracker.following(model):
        tracker.recording = True
        tracker.label([*model.parameters(), *model.buffers()], "weights")
        for _ in range(16):
            model(**random_batch(given)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    measured, planned = tracker.trace().peak_bytes, rehearse(given).peak_bytes
    keys = 8 * 8 * len(list(model.parameters()))
    assert 0.9 * planned < measured <= planned + keys


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "plain"])
@pytest.mark.parametrize(
    "method",
    [
        BAdam(), LISA(), LISA(embeddings="frozen"), LISA(embeddings="sampled"),
        OwLore(active_layers=2, rank=4, scores="uniform"),
        OwLore(active_layers=2, rank=4, scores="uniform", embeddings="frozen"),
    ],
    ids=lambda method: f"{method.name}-{method.embeddings}",
)  # fmt: skip
def test_no_draw_costs_more_than_the_one_that_is_rehearsed(method: Method, checkpointing: bool) -> None:
    """All draws of four layers, where activations outweigh what a layer's training takes, as they do at scale."""
    given = workload("llama", method, seq_len=128, gradient_checkpointing=checkpointing)
    planned = rehearse(given).peak_bytes
    units = 6 if method.get("embeddings", "") == "sampled" else 4
    for draw in itertools.combinations(range(units), method.get("active_layers", 1)):
        assert rehearse(given, [draw, draw]).peak_bytes <= planned


def test_the_draws_given_are_the_draws_rehearsed() -> None:
    """One step each, and a switch only where layers change."""
    phases = rehearse(workload("llama", BAdam()), [[1], [1], [3]]).phases()
    assert [phase for phase in phases if phase.endswith(": switch")] == ["step 2: switch"]
    assert [phase for phase in phases if phase.endswith(": step")] == [f"step {number}: step" for number in (1, 2, 3)]


def test_categories_are_found() -> None:
    """Weights, state and bases are what they measure; between steps nothing else is left."""
    given = workload("llama", METHODS["owlore-frozen"], seq_len=64)
    trace = rehearse(given)
    names = {"weights", "gradients", "optimizer state", "bases", "saved activations", "loss"}
    assert names <= {event.category for event in trace.events}
    last = len(trace.events) - 1
    left = {name: size for name, size in trace.live_at(last).items() if size}
    weights = sum(param.numel() for param in real_model(given).parameters()) * 4
    assert weights <= left["weights"] <= weights + 1000
    assert left.keys() <= {"weights", "optimizer state", "bases", "temporaries"}
    assert left["temporaries"] < 5000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seq_len": 1}, "seq_len is 1"),
        ({"accumulate": True}, "accumulate is True"),
        ({"method": "lisa"}, "method is 'lisa'"),
        ({"dtype": "bf17"}, "bf17"),
        ({"method": LISA(active_layers=9)}, "active_layers is 9"),
        ({"method": OwLore(rank=64, active_layers=1)}, "rank 64"),
        ({"model": "preset:tinny"}, "tinny"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_mistakes_are_one_clear_error(changes: dict[str, object], message: str) -> None:
    """What the run would refuse, the plan refuses too."""
    with pytest.raises(InputError, match=message):
        rehearse(Workload(**{"model": config("llama"), "method": LISA(), "seq_len": 8, **changes}))  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_7b_plan_makes_no_weights() -> None:
    """The process that plans a 7B model holds less than a fifteenth of its weights; the figure is that of Linux."""
    program = (
        "import json, re\n"
        "from pathlib import Path\n"
        "from lisa_kernels import OwLore\n"
        "from lisa_kernels.plan.rehearsal import Workload, rehearse\n"
        "trace = rehearse(Workload('preset:llama-2-7b', OwLore(embeddings='frozen')))\n"
        # Not getrusage's: a new program begins with the peak of the one that started it.
        "held = re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1]\n"
        "print(json.dumps([trace.peak_bytes, int(held) * 1024]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    planned, held = json.loads(ran.stdout)
    assert planned > 13e9
    assert held < LARGEST_PROCESS


def test_the_default_device_and_random_state_are_left_alone() -> None:
    """A plan is no side effect: what comes after it is what would have come without."""
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    rehearse(workload("llama", BAdam(), seq_len=8))
    after = torch.rand(2)
    assert torch.equal(after, expected)
    assert after.device.type == "cpu"


@pytest.mark.parametrize("name", ["full", "owlore-page"])
def test_pages_of_a_rehearsal_are_those_of_a_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each birth and death of their memory on the device; a CPU has the homes too, which are state."""
    monkeypatch.setattr(paged, "PAGE_BYTES", 1 << 13)
    page = OwLore(active_layers=2, rank=4, embeddings="frozen", scores="uniform", retired_state="page")
    given = replace(
        workload("llama", {**METHODS, "owlore-page": page}[name]), paging="host" if name == "full" else None
    )
    planned, real = (
        [(event.bytes, event.phase) for event in trace.events if event.category == "pages"]
        for trace in (rehearse(given), tracked_run(given))
    )
    assert planned == real
    assert len(planned) >= 4


def test_pages_on_the_device_are_told_apart() -> None:
    """State that visits the device for its step is pages there; without paging it is state, and there are none."""
    given = workload("llama", FullFineTune())
    moved = rehearse(replace(given, paging="host"))
    seen = {name for index in range(len(moved.events)) for name, size in moved.live_at(index).items() if size}
    assert "pages" in seen
    assert "optimizer state" in seen  # the counters
    resident = rehearse(given)
    assert all(event.category != "pages" for event in resident.events)
    state = sum(event.bytes for event in resident.events if event.category == "optimizer state" and event.bytes > 0)
    assert max(moved.live_at(index)["optimizer state"] for index in range(len(moved.events))) < state / 10
