"""Who takes part in the comparison on a pretrained model: the methods of this package, and what people use instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from bench.four_bit import four_bit_blocks
from bench.pretrained_ideas import (
    FlooredOwLore,
    GentleGaLore,
    GentleOwLore,
    RankedGaLore,
    WarmedOwLore,
    WeighedOwLore,
    by_spectrum,
)
from lisa_kernels import LISA, OWS, BAdam, FullFineTune, GaLore, LoRA, LoRAFA, OwLore, attach
from lisa_kernels.methods import Method

WEIGHT_DECAY = 0.01
Start = Callable[[nn.Module, float, int, Iterable[dict[str, Tensor]]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Contestant:
    """One line of the table: how a model is prepared for training, and the learning rates to begin with.

    averaged_steps: the weights asked are the mean of those after each of the last so many steps; 0: the last ones.
    in_place: where weights rest, the model asked is the one that computes at the end, on codes; else the one that
    `detach()` leaves, on masters.
    """

    name: str
    start: Start
    rates: tuple[float, ...]
    method: Method | None = None
    averaged_steps: int = 0
    in_place: bool = False

    @property
    def is_peer(self) -> bool:
        """Whether it is somebody else's."""
        return self.method is None


def ours(
    name: str, method: Method, *rates: float, resting: str | None = None, in_place: bool = False
) -> Contestant:  # fmt: skip
    """Return a method of this package as a contestant."""

    def start(
        model: nn.Module, lr: float, seed: int, calibration: Iterable[dict[str, Tensor]]
    ) -> torch.optim.Optimizer:
        return attach(
            model, method, lr=lr, seed=seed, weight_decay=WEIGHT_DECAY, calibration=calibration, resting=resting
        )

    return Contestant(name, start, rates, method, in_place=in_place)


def _by_spectrum(method: RankedGaLore) -> Contestant:
    """Return GaLore with ranks by the spectra of the first gradients, at the bytes of `method.rank` everywhere."""

    def start(
        model: nn.Module, lr: float, seed: int, calibration: Iterable[dict[str, Tensor]]
    ) -> torch.optim.Optimizer:
        ranked = by_spectrum(method, model, calibration)
        return attach(model, ranked, lr=lr, seed=seed, weight_decay=WEIGHT_DECAY)

    return Contestant(f"GaLore(rank={method.rank}), ranks by spectrum at the same bytes", start, (2.5e-4,), method)


def _torch_adamw(model: nn.Module, lr: float, seed: int, calibration: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)


def _as_it_is(model: nn.Module, lr: float, seed: int, calibration: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def peft_lora(name: str, *rates: float, **settings: Any) -> Contestant:
    """Return peft's LoRA on all linear layers as a contestant, torch's AdamW on its factors."""

    def start(model: nn.Module, lr: float, seed: int, calibration: Any) -> torch.optim.Optimizer:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        # peft wraps the linears inside `model` itself, so the same object is trained.
        get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **settings))
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=WEIGHT_DECAY)

    return Contestant(name, start, rates)


def peft_qlora(name: str, *rates: float, **settings: Any) -> Contestant:
    """Return peft's QLoRA as a contestant: LoRA beside blocks in bitsandbytes' NF4, with which it is asked."""
    lora = peft_lora(name, *rates, **settings)

    def start(model: nn.Module, lr: float, seed: int, calibration: Any) -> torch.optim.Optimizer:
        four_bit_blocks(model)
        model.is_loaded_in_4bit = True  # type: ignore[assignment]
        return lora.start(model, lr, seed, calibration)

    return replace(lora, start=start)


def peft_lora_plus(name: str, ratio: float, *rates: float, **settings: Any) -> Contestant:
    """Return peft's LoRA+ as a contestant: B at the rate named, A at a `ratio`-th of it."""

    def start(model: nn.Module, lr: float, seed: int, calibration: Any) -> torch.optim.Optimizer:
        from peft import LoraConfig, get_peft_model
        from peft.optimizers import create_loraplus_optimizer

        torch.manual_seed(seed)
        wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **settings))
        optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
            wrapped, torch.optim.AdamW, lr=lr / ratio, loraplus_lr_ratio=ratio, weight_decay=WEIGHT_DECAY
        )
        return optimizer

    return Contestant(name, start, rates)


class _BegunAnew(torch.optim.AdamW):
    """AdamW over peft's factors that adds their products to the weights every `period` steps and begins new ones."""

    def __init__(self, model: nn.Module, period: int, **settings: Any) -> None:
        from peft.tuners.lora import LoraLayer

        self._adapters: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self._period, self._done = period, 0
        super().__init__([param for param in model.parameters() if param.requires_grad], **settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self._done += 1
        if self._done % self._period == 0:
            for adapter in self._adapters:
                adapter.get_base_layer().weight.add_(adapter.get_delta_weight("default"))
                adapter.reset_lora_parameters("default", True)
            self.state.clear()
        return loss


def _lora_begun_anew(model: nn.Module, lr: float, seed: int, calibration: Any) -> torch.optim.Optimizer:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=16, lora_alpha=32))
    return _BegunAnew(model, 20, lr=lr, weight_decay=WEIGHT_DECAY)


def _averaged(contestant: Contestant, steps: int, *rates: float) -> Contestant:
    name = f"{contestant.name}, weights averaged over the last {steps} steps"
    return replace(contestant, name=name, rates=rates, averaged_steps=steps)


def _galore_torch(model: nn.Module, lr: float, seed: int, calibration: Any) -> torch.optim.Optimizer:
    """galore-torch at its usual settings: the matrices of the blocks projected on 128 directions, scale 0.25."""
    decoder: Any = model.get_submodule("model.layers")
    projected = [param for param in decoder.parameters() if param.dim() == 2]
    taken = {id(param) for param in projected}
    groups = [
        {"params": [param for param in model.parameters() if id(param) not in taken]},
        {"params": projected, "rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"},
    ]
    build = import_module("galore_torch").GaLoreAdamW
    optimizer: torch.optim.Optimizer = build(groups, lr=lr, weight_decay=WEIGHT_DECAY, no_deprecation_warning=True)
    return optimizer


def _badam(model: nn.Module, lr: float, seed: int, calibration: Any) -> torch.optim.Optimizer:
    """badam in random order, two steps a block, so that 60 steps train each of 30 blocks once."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that float32 weights cost more
        optimizer: torch.optim.Optimizer = import_module("badam").BlockOptimizer(
            torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY), list(model.named_parameters()),
            switch_block_every=2, switch_mode="random", verbose=0,
        )  # fmt: skip
    return optimizer


OUR_LORA = ours('LoRA(rank=16, embeddings="low-rank")', LoRA(rank=16, embeddings="low-rank"), 5e-4, 1e-3, 2e-3)

CONTESTANTS = (
    Contestant("before training", _as_it_is, (0.0,)),
    Contestant("full fine-tuning, torch AdamW fp32", _torch_adamw, (5e-5, 1e-4, 2e-4)),
    peft_lora("peft LoRA r = 16", 5e-4, 1e-3, 2e-3, 4e-3, r=16, lora_alpha=32),
    peft_lora_plus("peft LoRA+ r = 16, ratio 4", 4.0, 2e-3, r=16, lora_alpha=32),
    peft_lora("peft LoRA r = 64", 1e-3, r=64, lora_alpha=128),
    peft_lora("peft rsLoRA r = 64", 5e-4, r=64, lora_alpha=32, use_rslora=True),
    peft_qlora("peft QLoRA r = 16", 5e-4, 1e-3, 2e-3, r=16, lora_alpha=32),
    peft_lora("peft DoRA r = 16", 1e-3, r=16, lora_alpha=32, use_dora=True),
    Contestant("galore-torch GaLoreAdamW, r = 128", _galore_torch, (2e-4, 4e-4, 8e-4)),
    Contestant("badam BlockOptimizer, 2 steps a block", _badam, (5e-4, 1e-3, 2e-3)),
    Contestant("peft LoRA r = 16, merged and begun anew every 20 steps", _lora_begun_anew, (1e-3,)),
    OUR_LORA,
    _averaged(OUR_LORA, 20, 1e-3, 2e-3),
    ours(
        'LoRA(rank=16, embeddings="low-rank", rate_ratio=1)', LoRA(rank=16, embeddings="low-rank", rate_ratio=1.0),
        5e-4, 1e-3,
    ),
    ours(
        'GaLore(rank=32, embeddings="low-rank")', GaLore(rank=32, scale=1.0, embeddings="low-rank"), 2.5e-4, 5e-4
    ),
    ours('GaLore(rank=32, embeddings="frozen")', GaLore(rank=32, scale=1.0, embeddings="frozen"), 5e-4),
    ours('GaLore(rank=8, embeddings="low-rank")', GaLore(rank=8, scale=1.0, embeddings="low-rank"), 5e-4),
    *(
        ours(
            f'GaLore(rank=32, embeddings="low-rank"), bases refreshed every {gap} steps',
            GaLore(rank=32, scale=1.0, embeddings="low-rank", gap=gap), 2.5e-4,
        )
        for gap in (3, 10)
    ),
    *(
        ours(
            f'GaLore(rank=32, embeddings="low-rank"), resting in {kind}',
            GaLore(rank=32, scale=1.0, embeddings="low-rank"), 2.5e-4, resting=kind,
        )
        for kind in ("int8", "mixed", "nf4")
    ),
    # Asked as QLoRA is: adapters beside the codes that they were trained beside, and once beside masters.
    *(
        ours(
            f'LoRA(rank=16, embeddings="low-rank"), resting in {kind}{", its masters asked" * (not in_place)}',
            LoRA(rank=16, embeddings="low-rank"), 5e-4, 1e-3, 2e-3, resting=kind, in_place=in_place,
        )
        for kind, in_place in (("int8", True), ("mixed", True), ("nf4", True), ("nf4", False))
    ),
    # On the way from int8's 136.85 MB to mixed's 97.04, and what else would spare as much beside int8; and below nf4's
    # 83.8, with the output layer in 4 bits too.
    *(
        ours(
            f'GaLore(rank=32, embeddings="low-rank"), resting in {size}',
            GaLore(rank=32, scale=1.0, embeddings="low-rank"), 2.5e-4, 5e-4, resting=size,
        )
        for size in ("123.2MB", "110MB", "69.7MB")
    ),
    ours(
        'LoRA(rank=16, embeddings="low-rank"), resting in 69.7MB',
        LoRA(rank=16, embeddings="low-rank"), 5e-4, 1e-3, 2e-3, resting="69.7MB", in_place=True,
    ),
    ours(
        'GaLore(rank=32, embeddings="frozen"), resting in int8', GaLore(rank=32, scale=1.0, embeddings="frozen"),
        2.5e-4, 5e-4, 1e-3, resting="int8",
    ),
    ours(
        'GaLore(rank=16, embeddings="low-rank"), resting in int8',
        GaLore(rank=16, scale=1.0, embeddings="low-rank"), 2.5e-4, 5e-4, resting="int8",
    ),
    *(
        ours(f"OwLore(20, period=3, rank=32), resting in {kind}", OwLore(20, 3, rank=32), 5e-4, resting=kind)
        for kind in ("int8", "nf4")
    ),
    ours("OwLore(20, period=3, rank=32), embeddings at a quarter of the rate", GentleOwLore(20, 3, rank=32), 5e-4),
    ours(
        'GaLore(rank=32, embeddings="low-rank"), at a quarter of the rate',
        GentleGaLore(rank=32, scale=1.0, embeddings="low-rank"), 2.5e-4, 5e-4,
    ),
    _by_spectrum(RankedGaLore(rank=32, scale=1.0, embeddings="low-rank")),
    ours("OwLore(20, period=3, rank=32)", OwLore(20, 3, rank=32), 2.5e-4, 5e-4, 1e-3),
    ours("OwLore(5, period=5, rank=128), the others in rank 8", FlooredOwLore(5, 5, rank=32), 2.5e-4, 5e-4),
    ours("OwLore(2, period=6), two layers in all directions, the others in rank 8",
         FlooredOwLore(2, 6, rank=32, above=1 << 20), 2.5e-4, 5e-4),
    ours("OwLore(5, period=5, rank=128), a warm-up of 3 steps at each switch", WarmedOwLore(5, 5, rank=128), 1e-3),
    ours("OwLore(10, period=6, rank=64), importance weights", WeighedOwLore(10, 6, rank=64), 5e-4),
    ours(
        "OwLore(20, period=3, rank=32), uniform, state paged",
        OwLore(20, 3, rank=32, scores="uniform", retired_state="page"), 5e-4,
    ),
    ours("OwLore(20, period=3, rank=32), uniform", OwLore(20, 3, rank=32, scores="uniform"), 5e-4, 1e-3),
    ours("OwLore(20, period=20, rank=32)", OwLore(20, 20, rank=32), 5e-4),
    ours("OwLore(10, period=6, rank=64)", OwLore(10, 6, rank=64), 5e-4),
    *(
        ours(
            f'OwLore({layers}, period={period}, rank={rank}, design="{design}", embeddings="{embeddings}")',
            OwLore(layers, period, rank=rank, design=design, embeddings=embeddings), 5e-4,
        )
        for layers, period, rank, design, embeddings in (
            (20, 3, 32, "marginals", "frozen"),
            (20, 3, 32, "shallow", "frozen"),
            (20, 3, 32, "shallow", "with-first-block"),
            (10, 6, 64, "shallow", "with-first-block"),
        )
    ),
    ours("OwLore(5, period=5, rank=128)", OwLore(5, 5, rank=128), 5e-4, 1e-3),
    ours("OwLore(5, period=50, rank=128), as published", OwLore(5, 50, rank=128, embeddings="always"), 1e-3),
    ours("LISA(2, period=6)", LISA(2, 6), 2e-4, 5e-4, 1e-3),
    ours("OWS(2, period=6)", OWS(2, 6), 2e-4),
    ours("BAdam(period=2)", BAdam(2), 2e-4),
    ours("LoRAFA(rank=32, alpha=64)", LoRAFA(rank=32, alpha=64.0), 1e-3, 2e-3),
    ours("FullFineTune()", FullFineTune(), 5e-5),
)  # fmt: skip
