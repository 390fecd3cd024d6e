"""Who takes part in the step benchmark: our methods, and the ways people train in their place."""

from __future__ import annotations

import dataclasses
import statistics
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.four_bit import four_bit_blocks
from bench.step_cases import Case, on_the_same_weights
from lisa_kernels import LISA, BAdam, FullFineTune, GaLore, LoRAFA, OwLore, attach
from lisa_kernels.errors import unknown_name
from lisa_kernels.methods import Method
from lisa_kernels.samplers import Sampler

LR, WEIGHT_DECAY, GAP, GALORE_SCALE = 1e-6, 0.01, 200, 0.25
# Steps like all others that are timed in a draw, of which the middle one counts.
PLAIN_STEPS = 3
# Steps that a draw lasts here: its first, where bases are found; its second, where those may be found again; those like
# all others; its last, with the switch.
CYCLE = 3 + PLAIN_STEPS
# Of the layers, where a method trains as large a share of them as 5 of 32 are.
SHARE = 5 / 32
# Draws after the timed ones, in which the peak of memory is looked for.
PEAK_DRAWS = 2
SEEDS_TRIED, DRAWS_TRIED = 2000, 500
PERIODS_COUNTED = 4
PERIOD = 50


@dataclass
class Trainee:
    """A model with its optimizer, and how often what only some steps do comes in true training.

    cycle: steps from switch to switch here, 1 without any; warmup: steps before the first whole cycle. In true training
    a draw lasts `period` steps, and its later ones find `repeats` bases again for each that its first finds. Without
    draws `matrices` bases are found once in a period, or whatever the first step does is done. expected_lowest: the
    mean lowest active layer over the sampler's draws.
    """

    model: nn.Module
    optimizer: Optimizer
    blocks: list[nn.Module]
    cycle: int = 1
    warmup: int = 2
    period: int | None = None
    repeats: float = 0.0
    matrices: int = 0
    expected_lowest: float | None = None
    kept: Callable[[], Iterable[Any]] | None = field(default=None, repr=False)

    def kept_tensors(self) -> list[Any]:
        """Return what holds the tensors that stay from step to step, besides the model's parameters and buffers."""
        return list(self.kept()) if self.kept is not None else list(self.optimizer.state.values())

    def lowest_layer(self) -> int | None:
        """Return the lowest layer with something to train, down to which a backward must reach, or None."""
        trains = (any(param.requires_grad for param in block.parameters()) for block in self.blocks)
        return next((index for index, does in enumerate(trains) if does), None)


@dataclass(frozen=True)
class Contestant:
    """One way to train: how it is called and built, whose it is, and about how much it keeps per byte of weights."""

    name: str
    title: str
    start: Callable[[Any, Case, int], Trainee]
    kept_share: float
    package: str = "lisa_kernels"

    @property
    def is_peer(self) -> bool:
        """Whether it is somebody else's."""
        return self.package != "lisa_kernels"

    def unavailable(self) -> str | None:
        """Return why it cannot run here at all, or None."""
        if find_spec(self.package) is None:
            return f"not installed: pip install {self.package.replace('_', '-')}"
        return None


def representative_seed(sampler: Callable[[int], Sampler], rounds: int) -> tuple[int, float]:
    """Return a seed whose draws 1 … `rounds` lie as deep in the model as all draws do in the mean, and that mean.

    The `PEAK_DRAWS` draws after them are of the deepest kind, where the whole model is in the backward pass.
    """
    lowest = [min(sampler(0).draw(number)) for number in range(DRAWS_TRIED)]
    mean, deepest = statistics.mean(lowest), min(lowest)

    def distance(seed: int) -> tuple[int, float]:
        drawn = [min(sampler(seed).draw(number)) for number in range(1, rounds + PEAK_DRAWS + 1)]
        shallow = sum(layer > deepest for layer in drawn[rounds:])
        return shallow, abs(statistics.mean(drawn[:rounds]) - mean)

    return min(range(SEEDS_TRIED), key=distance), mean


def captures(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose next backward gives them a basis."""
    return [module for module in model.modules() if getattr(module, "capturing", False)]


def repeated_refreshes(method: Method, case: Case, period: int) -> float:
    """Return how many bases the later steps of a period find for each that its first step does.

    Counted on a model with as many, but tiny, layers, without its very first period.
    """
    tiny = dataclasses.replace(
        case, device="cpu", dtype="fp32", width=16, intermediate=24, heads=2, vocabulary=32, batch=1, seq_len=4
    )
    model, batch = tiny.model(), tiny.tokens_and_labels()
    optimizer = attach(model, dataclasses.replace(method, rank=4), lr=LR)  # type: ignore[call-arg]
    counts = []
    for _ in range(PERIODS_COUNTED * period):
        counts.append(len(captures(model)))
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    first = sum(counts[period::period])
    return (sum(counts[period:]) - first) / first if first else 0.0


def _ours(method_for: Callable[[Case], Method], resting: str | None = None) -> Callable[[Any, Case, int], Trainee]:
    """Return how one of our methods is attached: its draws are its own, each lasts `CYCLE` steps."""

    def start(model: Any, case: Case, rounds: int) -> Trainee:
        method = method_for(case)
        blocks, switches, seed, expected = list(model.model.layers), method.get("period", None), 0, None
        refreshes = method.form == "low-rank"
        repeats = repeated_refreshes(method, case, switches) if switches and refreshes else 0.0
        if switches:
            seed, expected = representative_seed(
                lambda seed: _sampler(method.make_sampler(case.layers, seed, case.layer_scores())), rounds
            )
            method = dataclasses.replace(method, period=CYCLE)  # type: ignore[call-arg]
        optimizer = attach(model, method, lr=LR, weight_decay=WEIGHT_DECAY, seed=seed, resting=resting)
        if switches:
            return Trainee(model, optimizer, blocks, CYCLE, CYCLE, switches, repeats, expected_lowest=expected)
        period = method.get("gap", None) if refreshes else None
        matrices = sum(hasattr(module, "capturing") for module in model.modules()) if period else 0
        return Trainee(model, optimizer, blocks, period=period, matrices=matrices)

    return start


def _sampler(sampler: Sampler | None) -> Sampler:
    assert sampler is not None
    return sampler


def _owlore(embeddings: str, design: str = "marginals", share: float | None = None) -> Callable[[Case], Method]:
    return lambda case: OwLore(
        case.active_layers if share is None else max(1, round(share * case.layers)), PERIOD, rank=case.rank,
        scores=case.layer_scores(), embeddings=embeddings, design=design,
    )  # fmt: skip


class EmptyAdamW(Optimizer):
    """What torch's fused AdamW holds of parameters without values, which it refuses, and the work that it does."""

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {"lr": LR, "weight_decay": WEIGHT_DECAY})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the state of every parameter with a gradient, and call the fused kernel as torch's class does."""
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        for param in params:
            if not self.state[param]:
                zero = torch.zeros((), device=param.device)
                self.state[param] = {"step": zero, **{name: torch.zeros_like(param) for name in ("m", "v")}}
        if params:
            steps, m, v = ([self.state[param][name] for param in params] for name in ("step", "m", "v"))
            with torch.no_grad():
                torch._foreach_add_(steps, 1)
                torch._fused_adamw_(
                    params, [param.grad for param in params], m, v, [], steps, lr=LR, beta1=0.9, beta2=0.999,
                    weight_decay=WEIGHT_DECAY, eps=1e-8, amsgrad=False, maximize=False,
                )  # fmt: skip


def _adamw(params: Iterable[Tensor]) -> Optimizer:
    params = list(params)
    if params[0].is_meta:
        return EmptyAdamW(params)
    return torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)


def _torch_full(model: Any, case: Case, rounds: int) -> Trainee:
    return Trainee(model, _adamw(model.parameters()), list(model.model.layers))


def _peft_model(model: Any, case: Case) -> Any:
    peft = import_module("peft")
    config = peft.LoraConfig(
        r=case.lora_rank, lora_alpha=2 * case.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def _peft_lora(model: Any, case: Case, rounds: int) -> Trainee:
    blocks, wrapped = list(model.model.layers), _peft_model(model, case)
    return Trainee(wrapped, _adamw(param for param in wrapped.parameters() if param.requires_grad), blocks)


def _peft_qlora(model: Any, case: Case, rounds: int) -> Trainee:
    four_bit_blocks(model)
    return _peft_lora(model, case, rounds)


def _peft_lora_fa(model: Any, case: Case, rounds: int) -> Trainee:
    blocks, wrapped = list(model.model.layers), _peft_model(model, case)
    optimizer = import_module("peft.optimizers").create_lorafa_optimizer(
        wrapped, r=case.lora_rank, lora_alpha=2 * case.lora_rank, lr=LR, weight_decay=WEIGHT_DECAY
    )
    return Trainee(wrapped, optimizer, blocks)


def _galore_torch(model: Any, case: Case, rounds: int) -> Trainee:
    """Project the matrices of the blocks; all are decomposed in the first step and then in every `GAP`th."""
    projected = [param for param in model.model.layers.parameters() if param.dim() == 2]
    taken = {id(param) for param in projected}
    groups = [
        {"params": [param for param in model.parameters() if id(param) not in taken]},
        {
            "params": projected, "rank": case.galore_rank, "update_proj_gap": GAP, "scale": GALORE_SCALE,
            "proj_type": "std",
        },
    ]  # fmt: skip
    adamw = import_module("galore_torch").GaLoreAdamW
    optimizer = adamw(groups, lr=LR, weight_decay=WEIGHT_DECAY, no_deprecation_warning=True)
    return Trainee(model, optimizer, list(model.model.layers), period=GAP)


def _badam(model: Any, case: Case, rounds: int) -> Trainee:
    """Train one block after the other, those of the timed draws spread evenly over the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that float32 weights cost more
        optimizer = import_module("badam").BlockOptimizer(
            _adamw(model.parameters()), list(model.named_parameters()), switch_block_every=CYCLE,
            switch_mode="random", verbose=0,
        )  # fmt: skip
    order = [round((number + 0.5) * case.layers / rounds - 0.5) for number in range(rounds)] + [0] * (PEAK_DRAWS + 2)
    optimizer.current_block_idx, optimizer.block_order = order[0], order[:0:-1]
    return Trainee(
        model, optimizer, list(model.model.layers), CYCLE, CYCLE - 1, PERIOD,
        expected_lowest=(case.layers - 1) / 2,
        kept=lambda: [dict(optimizer.base_optimizer.state), optimizer.param_idx2hp],
    )  # fmt: skip


FULL, LORA = "torch-full", "peft-lora"
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("owlore-frozen", "OwLore, embeddings frozen", _ours(_owlore("frozen")), 0.1),
        Contestant(
            "owlore-shallow", "OwLore, embeddings frozen, shallow draws", _ours(_owlore("frozen", "shallow")), 0.1
        ),
        Contestant(
            "owlore-sixth", "OwLore, a sixth of the layers, embeddings frozen, shallow draws",
            _ours(_owlore("frozen", "shallow", SHARE)), 0.1,
        ),
        Contestant(
            "owlore-first-block", "OwLore, embeddings with the first block, shallow draws",
            _ours(_owlore("with-first-block", "shallow")), 0.1,
        ),
        Contestant("owlore-low-rank", "OwLore, embeddings low-rank", _ours(_owlore("low-rank")), 0.1),
        Contestant("owlore-always", "OwLore, embeddings always", _ours(_owlore("always")), 0.2),
        *(
            Contestant(
                f"owlore-{kind}", f"OwLore, embeddings frozen, shallow draws, at rest in {kind}",
                _ours(_owlore("frozen", "shallow"), kind), 0.7,
            )
            for kind in ("int8", "nf4")
        ),
        Contestant("lisa", "LISA, 2 layers", _ours(lambda case: LISA(min(2, case.layers))), 0.3),
        Contestant("badam-ours", "BAdam()", _ours(lambda case: BAdam(PERIOD)), 0.1),
        Contestant("galore", "GaLore()", _ours(lambda case: GaLore(case.galore_rank, GAP, GALORE_SCALE)), 0.5),
        Contestant(
            "lora-fa", "LoRAFA()", _ours(lambda case: LoRAFA(case.lora_rank, 2.0 * case.lora_rank)), 0.1
        ),
        Contestant("full", "FullFineTune()", _ours(lambda case: FullFineTune()), 0.6),
        Contestant(FULL, "full, AdamW fused", _torch_full, 2.0, "torch"),
        Contestant(LORA, "peft LoRA, AdamW fused", _peft_lora, 0.1, "peft"),
        Contestant("peft-qlora", "peft QLoRA (NF4 blocks)", _peft_qlora, 0.2, "peft"),
        Contestant("peft-lora-fa", "peft LoRA-FA", _peft_lora_fa, 0.1, "peft"),
        Contestant("galore-torch", "galore-torch GaLoreAdamW", _galore_torch, 1.0, "galore_torch"),
        Contestant("badam", "badam, AdamW fused", _badam, 0.3, "badam"),
    )
}  # fmt: skip


def parse_methods(text: str) -> list[Contestant]:
    """Return the contestants that `text` names: `all`, `ours`, `peers`, or names with commas; InputError for others."""
    groups = {
        "all": list(CONTESTANTS),
        "ours": [name for name, contestant in CONTESTANTS.items() if not contestant.is_peer],
        "peers": [name for name, contestant in CONTESTANTS.items() if contestant.is_peer],
    }
    wanted = set()
    for name in (part.strip() for part in text.split(",")):
        if name not in CONTESTANTS and name not in groups:
            raise unknown_name("method", name, [*CONTESTANTS, *groups])
        wanted.update(groups.get(name, [name]))
    return [contestant for name, contestant in CONTESTANTS.items() if name in wanted]


def start(contestant: Contestant, case: Case, model: Any, rounds: int) -> Trainee | str:
    """Build the contestant on the weights of `model`; returns the reason where a peer cannot be built."""
    try:
        return contestant.start(on_the_same_weights(model), case, rounds)
    except Exception as error:
        if not contestant.is_peer:
            raise
        return reason_of(error)


def reason_of(error: Exception) -> str:
    """Return the first line of what an error says."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
