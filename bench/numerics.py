"""What 8-bit moments cost in quality: AdamW with each codec, and real optimizers, beside float64 AdamW.

Three kinds of problem, never re-synchronised with the exact run:

    trajectories  800 steps on noisy quadratics whose gradient scales spread over 1, 3 and 5 decades within every block
    shrinking     gradients that become ten times smaller, but for one coordinate of each block
    recorded      the gradients of a small language model in training, replayed on some blocks of a few of its tensors

Of each: the normalised mean square error of the total update, the largest single update in units of the learning rate,
and the mean of √v over its exact value.

    python -m bench.numerics            # about four minutes on one thread
    python -m bench.numerics --record   # appends the rows to results/numerics.jsonl
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.codecs import CODECS, OURS, Codec
from bench.rows import append_row
from lisa_kernels.ops.adamw8 import Hyper, Scalars, reference, step_scalars
from lisa_kernels.optim import AdamW8bit

HYPER = Hyper(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
BLOCK = 256


# Who is measured


class Run(Protocol):
    """One optimizer on one flat tensor that begins at 0."""

    weight: Tensor

    def step(self, grad: Tensor) -> None:
        """Take a step with this gradient, float32 [n]; `weight` is new or changed in place."""
        ...

    def second_moment(self) -> Tensor:
        """Return v as it is stored, float [n]."""
        ...


class ExactRun:
    """AdamW in float64, by the formulas of arXiv 1711.05101."""

    def __init__(self, count: int) -> None:
        self.weight, self.m, self.v = (torch.zeros(count, dtype=torch.float64) for _ in range(3))
        self.t = 0

    def step(self, grad: Tensor) -> None:
        """Take a step with a gradient of any float dtype [n]."""
        self.t += 1
        grad = grad.double()
        beta1, beta2 = float(HYPER.beta1), float(HYPER.beta2)
        self.m = beta1 * self.m + (1 - beta1) * grad
        self.v = beta2 * self.v + (1 - beta2) * grad * grad
        root = (self.v / (1 - beta2**self.t)).sqrt() + HYPER.eps
        self.weight = self.weight - HYPER.lr * (self.m / (1 - beta1**self.t)) / root

    def second_moment(self) -> Tensor:
        """Return v."""
        return self.v


class CodecRun:
    """The definition's AdamW step, its moments stored through a codec; the update itself uses the fresh ones."""

    def __init__(self, codec: Codec, count: int, seed: int = 0) -> None:
        self.codec, self.t = codec, 0
        self.generator = torch.Generator().manual_seed(seed)
        self.weight = torch.zeros(count)
        nothing = torch.zeros(count)
        self.m, self.v = codec.m.quantize(nothing, nothing), codec.v.quantize(nothing, nothing)

    def step(self, grad: Tensor) -> None:
        """Take a step with a float32 gradient [n]."""
        self.t += 1
        row = Scalars(*step_scalars(torch.tensor([self.t]), HYPER, torch.ones(()))[0].unbind())
        m, v = self.codec.m.dequantize(*self.m), self.codec.v.dequantize(*self.v)
        self.weight, m, v = reference.adamw_update(self.weight, grad, m, row.carry1, v * row.carry2, row)
        m, v = m * row.one_minus_beta1, v * row.one_minus_beta2
        # Two numbers per element: with one, the errors of both moments would go together.
        uniform = torch.rand(2, len(grad), generator=self.generator)
        self.m, self.v = self.codec.m.quantize(m, uniform[0]), self.codec.v.quantize(v, uniform[1])

    def second_moment(self) -> Tensor:
        """Return the decoded v."""
        return self.codec.v.dequantize(*self.v)


class OptimizerRun:
    """A whole optimizer on one parameter."""

    def __init__(self, build: Callable[..., Any], read_v: Callable[[Any, Tensor], Tensor], count: int) -> None:
        self.param = nn.Parameter(torch.zeros(count // BLOCK, BLOCK))
        self.optimizer = build(
            [self.param], lr=HYPER.lr, betas=(HYPER.beta1, HYPER.beta2), eps=HYPER.eps, weight_decay=0.0
        )
        self.read_v = read_v
        self.weight = self.param.detach().view(-1)

    def step(self, grad: Tensor) -> None:
        """Take a step with a float32 gradient [n]."""
        self.param.grad = grad.view_as(self.param)
        self.optimizer.step()

    def second_moment(self) -> Tensor:
        """Return the decoded v."""
        return self.read_v(self.optimizer, self.param).view(-1)


def our_optimizer(count: int, rounding: str = "stochastic") -> OptimizerRun:
    """Return a run of `lisa_kernels.AdamW8bit`."""
    build = partial(AdamW8bit, rounding=rounding)
    return OptimizerRun(build, lambda optimizer, param: optimizer.moments(param)[1], count)


def bitsandbytes_optimizer(count: int) -> OptimizerRun:
    """Return a run of bitsandbytes' own AdamW8bit.

    Its quantiser for CPUs gives no unsigned code below 7, which hides the zero point that its kernels for GPUs, which
    round to the nearest code of the same map, do have: `codecs.DYNAMIC_NEAREST` is those.
    """
    import bitsandbytes

    def read_v(optimizer: Any, param: Tensor) -> Tensor:
        state = optimizer.state[param]
        values: Tensor = bitsandbytes.functional.dequantize_blockwise(
            state["state2"], absmax=state["absmax2"], code=state["qmap2"], blocksize=BLOCK
        )
        return values

    build: Any = bitsandbytes.optim
    return OptimizerRun(build.AdamW8bit, read_v, count)


# What is measured


class Outcome(NamedTuple):
    """How far a run is from the exact one.

    Of the total update the normalised mean square error, of single ones the largest in units of the rate, in this run
    and in the exact one, and the mean of √v over its exact value.
    """

    nmse: float
    worst_update: float
    exact_worst_update: float
    root_v: float


def _finite(value: Tensor) -> float:
    return float(value) if bool(value.isfinite()) else math.inf


def _nmse(weight: Tensor, exact: Tensor) -> float:
    return _finite(((weight.double() - exact) ** 2).sum() / (exact**2).sum())


def _root_v(v: Tensor, exact: Tensor) -> float:
    """Return the mean of √v over exact √v, where that is not 0."""
    seen = exact > 0
    return _finite((v.double()[seen] / exact[seen]).sqrt().mean())


Gradient = Callable[[Tensor], Tensor]


def follow(run: Run, gradients: Iterable[Gradient], counted: Tensor | None = None) -> Outcome:
    """Step a run and the exact one; each step's gradient is a function of a run's own weight.

    counted: bool [n], the elements that the figures are of; all unless given.
    """
    exact = ExactRun(run.weight.numel())
    counted = torch.ones(run.weight.numel(), dtype=torch.bool) if counted is None else counted
    worst, exact_worst = torch.zeros(()), torch.zeros(())
    for gradient in gradients:
        before, exact_before = run.weight.clone(), exact.weight
        run.step(gradient(run.weight).float())
        exact.step(gradient(exact.weight))
        # `maximum` keeps a NaN.
        worst = torch.maximum(worst, (run.weight - before)[counted].abs().max())
        exact_worst = torch.maximum(exact_worst, (exact.weight - exact_before)[counted].abs().max())
    return Outcome(
        _nmse(run.weight[counted], exact.weight[counted]),
        _finite(worst / HYPER.lr), float(exact_worst / HYPER.lr),
        _root_v(run.second_moment()[counted], exact.v[counted]),
    )  # fmt: skip


# Problems


def noisy_quadratic(decades: float, steps: int = 800, count: int = 4096) -> Iterator[Gradient]:
    """Yield gradients s · (w − w* + noise) whose scales s spread over `decades` within every block."""
    generator = torch.Generator().manual_seed(11)
    scale = 10.0 ** (torch.rand(count, generator=generator, dtype=torch.float64) * decades - decades / 2)
    target = torch.randn(count, generator=generator, dtype=torch.float64) * 3
    for _ in range(steps):
        noisy_target = target + torch.randn(count, generator=generator, dtype=torch.float64)
        yield partial(_slope, scale, noisy_target)


def _slope(scale: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return scale * (weight.double() - target)


def _given(grad: Tensor, weight: Tensor) -> Tensor:
    return grad


def shrinking(count: int = 4096, before: int = 300, after: int = 1300) -> tuple[Iterable[Gradient], Tensor]:
    """Return gradients of pure noise, and bool [n]: which elements shrink tenfold after `before` steps.

    All but one of a block do; that one keeps the block's absmax where it is, as one row or one token does in a model.
    """
    generator = torch.Generator().manual_seed(12)
    shrinks = torch.arange(count) % BLOCK != 0
    small = torch.where(shrinks, 0.1, 1.0)
    scales = [torch.ones(count)] * before + [small] * after
    return (partial(_given, scale * torch.randn(count, generator=generator)) for scale in scales), shrinks


# Tensors of `preset:tiny`: attention, the MLP, the first to read a norm's output and the last, and rows that most
# batches leave without gradient.
RECORDED = {
    "attention": "model.layers.3.self_attn.q_proj.weight",
    "MLP down": "model.layers.3.mlp.down_proj.weight",
    "first value": "model.layers.0.self_attn.v_proj.weight",
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
}


def batches(model: Any, batch: int = 4, seq_len: int = 128) -> Iterator[dict[str, Tensor]]:
    """Yield shuffled batches of the standard library's text, without end."""
    from lisa_kernels.train.models import load_tokenizer
    from lisa_kernels.train.records import load_records
    from lisa_kernels.train.tokenize import collate, pad_token_id, tokenize_records

    records = load_records("stdlib", max_bytes=1_500_000)
    tokenizer = load_tokenizer("preset:tiny", records.texts(), model.config.vocab_size)
    rows, pad = tokenize_records(records, tokenizer, seq_len), pad_token_id(tokenizer)
    generator = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(rows) - batch + 1, batch):
            yield collate([rows[i] for i in order[start : start + batch]], pad)


def record_gradients(steps: int = 300, blocks: int = 32) -> dict[str, Tensor]:
    """Train `preset:tiny` from the start and return float32 [steps, blocks · 256] of each recorded tensor's gradients.

    The blocks lie evenly over the tensor. Gradients are clipped at norm 1, as in fine-tuning.
    """
    from lisa_kernels.train.models import load_model

    model = load_model("preset:tiny", torch.float32, 0)
    tensors = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    kept: dict[str, list[Tensor]] = {name: [] for name in RECORDED}
    for _, batch in zip(range(steps), batches(model)):
        model(**batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for name, tensor in RECORDED.items():
            rows = tensors[tensor].grad.view(-1, BLOCK)
            kept[name].append(rows[torch.linspace(0, len(rows) - 1, blocks).long()].flatten())
        optimizer.step()
        optimizer.zero_grad()
    return {name: torch.stack(grads) for name, grads in kept.items()}


def replay(start: Callable[[int], Run], recorded: dict[str, Tensor]) -> dict[str, Outcome]:
    """Return the outcome of each tensor's gradients, float32 [steps, n]."""
    return {
        name: follow(start(grads.shape[1]), [partial(_given, grad) for grad in grads])
        for name, grads in recorded.items()
    }


# The table


def contestants() -> dict[str, tuple[float, Callable[[int], Run]]]:
    """Return for each name the bytes of state per parameter and what starts a run on that many elements."""
    found: dict[str, tuple[float, Callable[[int], Run]]] = {
        codec.name: (codec.bytes_per_parameter, partial(CodecRun, codec)) for codec in CODECS
    }
    found["AdamW8bit, the whole optimizer"] = (OURS.bytes_per_parameter, our_optimizer)
    found["bitsandbytes AdamW8bit, the whole optimizer on CPU"] = (2 + 8 / BLOCK, bitsandbytes_optimizer)
    return found


def measure(start: Callable[[int], Run], recorded: dict[str, Tensor]) -> dict[str, Outcome]:
    """Return the outcome of every problem."""
    outcomes = {f"{decades} decades": follow(start(4096), noisy_quadratic(decades)) for decades in (1, 3, 5)}
    gradients, shrinks = shrinking()
    outcomes["shrinking"] = follow(start(len(shrinks)), gradients, shrinks)
    return {**outcomes, **replay(start, recorded)}


def relative_error(outcomes: dict[str, Outcome], ours: dict[str, Outcome]) -> float:
    """Return the geometric mean over all problems but "shrinking" of the NMSE over that of our codec."""
    logs = [math.log(outcomes[name].nmse / ours[name].nmse) for name in ours if name != "shrinking"]
    return math.exp(sum(logs) / len(logs))


def show(measured: dict[str, dict[str, Outcome]]) -> None:
    """Print the tables: error and worst update, then √v."""
    ours = measured[OURS.name]
    errors = Table("", *ours, "error / ours", title="NMSE of the total update · worst update / lr", show_lines=True)
    roots = Table("", *ours, title="mean of √v / exact √v")
    for name, outcomes in measured.items():
        cells = [f"{outcome.nmse:.1e} · {outcome.worst_update:.1f}" for outcome in outcomes.values()]
        errors.add_row(name, *cells, f"{relative_error(outcomes, ours):.2g}")
        roots.add_row(name, *(f"{outcome.root_v:.3f}" for outcome in outcomes.values()))
    errors.add_row("float64 AdamW", *(f"0 · {outcome.exact_worst_update:.1f}" for outcome in ours.values()))
    console = Console(width=max(200, Console().width))
    console.print(errors)
    console.print(roots)


def main() -> None:
    """Measure everybody, print the tables, and keep the rows if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="append the rows to results/numerics.jsonl")
    parser.add_argument("--steps", type=int, default=300, help="steps of training whose gradients are recorded")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"recording gradients: {arguments.steps} steps of preset:tiny on stdlib", flush=True)
    recorded = record_gradients(arguments.steps)
    measured: dict[str, dict[str, Outcome]] = {}
    for name, (size, start) in contestants().items():
        begin = time.perf_counter()
        measured[name] = measure(start, recorded)
        print(f"{name}: {time.perf_counter() - begin:.1f} s", flush=True)
        if arguments.record:
            problems = {problem: outcome._asdict() for problem, outcome in measured[name].items()}
            append_row("numerics", {"codec": name, "bytes_per_parameter": size, "recorded_steps": arguments.steps,
                                    "problems": problems})  # fmt: skip
    show(measured)


if __name__ == "__main__":
    main()
