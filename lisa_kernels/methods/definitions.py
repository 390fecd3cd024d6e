"""The methods as plain records: which layers train, for how long, in which form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.samplers import AdaptiveSampler, CyclicSampler, Sampler, UniformSampler, WeightedSampler
from lisa_kernels.scores import SCORE_KINDS

CHOICES = {
    "embeddings": ("always", "low-rank", "with-first-block", "frozen", "sampled"),
    "retired_state": ("drop", "keep", "page"),
    "design": ("marginals", "sequential", "shallow"),
    "order": ("random", "ascending", "descending"),
    "master": ("none", "remainder"),
    "resting_weights": ("keep", "page"),
}
LEAST = {"active_layers": 1, "period": 1, "rank": 1, "gap": 0, "groups": 1}


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Method:
    """What every method says of itself.

    `form` is how an active layer trains: "full" (its weights), "low-rank" (a slot folded into the weight after each
    step) or "adapter" (a slot that stays). embeddings: "always" trains embedding, head and final norm all the time,
    "low-rank" too, embedding and head through slots of `rank` (one where they are tied), "frozen" never, "sampled"
    makes embedding and head two more layers of the draw (one where they are tied). "with-first-block" is "low-rank"
    with a token embedding, and what else lies before the blocks, that train while the first block is drawn and rest
    otherwise, so that a backward ends at the lowest layer drawn; where embedding and head are tied, their one slot
    trains always, and while the first block rests without the lookup's part of its gradient.
    retired_state: "drop" frees a layer's moments, basis and remainder when it leaves; "page" moves them to the store
    that `attach(paging=...)` names, else to host memory, and back when it is drawn again; "keep" does the same on the
    device. around: what counts as embedding and head, the parameters of the "language" model, or "all" that are no one
    block's. optimizer: the class that trains with it, None for `SampledAdamW`. Raises InputError for values out of
    range.
    """

    name: ClassVar[str]
    form: ClassVar[str] = "full"
    around: ClassVar[str] = "language"
    optimizer: ClassVar[type | None] = None

    def __post_init__(self) -> None:
        """Check every field that has a range."""
        for field, known in CHOICES.items():
            if hasattr(self, field) and getattr(self, field) not in known:
                raise unknown_name(field, str(getattr(self, field)), known)
        for field, least in LEAST.items():
            value = getattr(self, field, least)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{field} is {value!r}; a whole number of at least {least} is wanted.")
        for field in ("scale", "alpha", "rate_ratio"):
            value = getattr(self, field, 1.0)
            if not _is_number(value) or not 0 < value < math.inf:
                raise InputError(f"{field} is {value!r}; a finite number above 0 is wanted.")
        self._check_scores()

    def _check_scores(self) -> None:
        scores = getattr(self, "scores", "uniform")
        if isinstance(scores, str):
            if scores not in SCORE_KINDS:
                raise unknown_name("kind of score", scores, SCORE_KINDS)
            return
        if not isinstance(scores, Sequence) or not all(_is_number(v) and 0 <= v < math.inf for v in scores):
            known = ", ".join(SCORE_KINDS)
            raise InputError(
                f"scores is {scores!r}; one finite number of at least 0 per layer is wanted, or one of {known}."
            )
        object.__setattr__(self, "scores", tuple(scores))

    def get(self, field: str, default: Any) -> Any:
        """Return a field that not every method has."""
        return getattr(self, field, default)

    @property
    def embeddings_rest(self) -> bool:
        """Whether token embedding and output layer never train."""
        return bool(self.get("embeddings", "frozen" if self.form == "adapter" else "always") == "frozen")

    def score_kind(self) -> str | None:
        """Return the kind of layer scores to compute before the first draw, or None."""
        return None

    def make_sampler(self, layers: int, seed: int, scores: Sequence[float] | None) -> Sampler | None:
        """Return the sampler over `layers` layers; None means that all layers are always active."""
        return None

    def settings(self) -> dict[str, Any]:
        """Return the method as plain values, for checkpoints and logs."""
        values = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}
        return {"method": self.name, **values}


@dataclass(frozen=True)
class LISA(Method):
    """Layerwise importance sampled AdamW: layers drawn uniformly every `period` steps, at full rank.

    Source: arXiv 2403.17919. rank: of embedding and head where these are low-rank.
    """

    name: ClassVar[str] = "lisa"
    active_layers: int = 2
    period: int = 20
    embeddings: str = "always"
    retired_state: str = "drop"
    rank: int = 128

    def make_sampler(self, layers: int, seed: int, scores: Sequence[float] | None) -> Sampler | None:
        """Return a uniform sampler."""
        return UniformSampler(layers, self.active_layers, seed)


@dataclass(frozen=True)
class OWS(Method):
    """Outlier-weighed layer sampling at full rank: layers drawn in proportion to their scores.

    Source: arXiv 2405.18380. scores: a kind of `layer_scores`, or one number per layer; "gradient-norm" adapts to the
    gradient norms seen in training. design: "marginals" gives each layer the probability its score asks for (at most
    1); "sequential" draws one after the other, as the published code does, and flattens them; "shallow" keeps the
    probabilities and draws neighbours together, so that backward passes end higher up where embeddings rest.
    rank: of embedding and head where these are low-rank.
    """

    name: ClassVar[str] = "ows"
    active_layers: int = 2
    period: int = 50
    scores: str | tuple[float, ...] = "outlier"
    embeddings: str = "always"
    retired_state: str = "drop"
    design: str = "marginals"
    rank: int = 128

    def __post_init__(self) -> None:
        """Check the settings; sets that are made once cannot follow scores that adapt."""
        super().__post_init__()
        if self.design == "shallow" and self.scores == "gradient-norm":
            raise InputError(
                'design="shallow" makes its sets once, and scores="gradient-norm" change as the run goes; use another '
                "of the two."
            )

    def score_kind(self) -> str | None:
        """Return the kind of scores to compute; adapting and given ones need none."""
        return self.scores if isinstance(self.scores, str) and self.scores != "gradient-norm" else None

    def make_sampler(self, layers: int, seed: int, scores: Sequence[float] | None) -> Sampler | None:
        """Return a sampler weighted by `scores`, one per layer, or one that adapts."""
        if self.scores == "gradient-norm":
            return AdaptiveSampler(layers, self.active_layers, seed)
        if scores is None or len(scores) != layers:
            raise InputError(f"{len(scores or ())} scores were given; {layers} numbers are wanted, one per layer.")
        return WeightedSampler(scores, self.active_layers, seed, design=self.design)


@dataclass(frozen=True)
class OwLore(OWS):
    """Outlier-weighed layer sampling with low-rank gradients in the sampled layers.

    Source: arXiv 2405.18380, where embedding and head train in full (embeddings="always"). gap: steps between refreshes
    of one matrix's basis while its layer stays active (0: only at activation). scale multiplies the learning rate of
    the low-rank slots. master: "remainder" keeps 16 more bits of each bfloat16 matrix while it trains, 2 bytes per
    weight of the active layers, so that updates add up in float32; "none" rounds each update stochastically.
    """

    name: ClassVar[str] = "owlore"
    form: ClassVar[str] = "low-rank"
    active_layers: int = 5
    period: int = 50
    rank: int = 128
    scores: str | tuple[float, ...] = "outlier"
    embeddings: str = "low-rank"
    retired_state: str = "drop"
    gap: int = 200
    scale: float = 1.0
    design: str = "marginals"
    master: str = "none"


@dataclass(frozen=True)
class BAdam(Method):
    """Block coordinate descent with Adam: one block after the other, its state cleared at each switch.

    Source: arXiv 2404.02827. rank: of embedding and head where these are low-rank.
    """

    name: ClassVar[str] = "badam"
    period: int = 50
    order: str = "random"
    active_layers: int = 1
    embeddings: str = "frozen"
    retired_state: str = "drop"
    rank: int = 128

    def make_sampler(self, layers: int, seed: int, scores: Sequence[float] | None) -> Sampler | None:
        """Return a sampler that goes through all blocks before it returns to one."""
        return CyclicSampler(layers, self.active_layers, seed, order=self.order)


@dataclass(frozen=True)
class GaLore(Method):
    """Every layer at once, each with a gradient projected on `rank` directions that are refreshed every `gap` steps.

    Source: arXiv 2403.03507; unlike there, moments are carried into each new basis. master: see `OwLore`.
    """

    name: ClassVar[str] = "galore"
    form: ClassVar[str] = "low-rank"
    rank: int = 128
    gap: int = 200
    scale: float = 0.25
    embeddings: str = "always"
    master: str = "none"


@dataclass(frozen=True)
class AdapterMethod(Method):
    """An adapter on every linear layer: y = x Wᵀ + (alpha / rank) (x Aᵀ) B beside weights that stay as they are.

    targets: "all-linear", or a tuple of names such as ("q_proj", "v_proj") that match the end of a layer's path. Small
    layers of the head (a classifier) train in full.
    """

    form: ClassVar[str] = "adapter"
    rank: int = 16
    alpha: float = 32.0
    targets: str | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        """Check the settings; a single name becomes a tuple of one."""
        super().__post_init__()
        targets = self.targets
        if targets == "all-linear":
            return
        names = (targets,) if isinstance(targets, str) else tuple(targets) if isinstance(targets, Sequence) else ()
        if not names or not all(isinstance(name, str) and name for name in names):
            raise InputError(f'targets is {targets!r}; "all-linear" or names of layers such as ("q_proj",) are wanted.')
        object.__setattr__(self, "targets", names)


@dataclass(frozen=True)
class LoRA(AdapterMethod):
    """Adapters of which both factors train, A from random directions and B from zero.

    Source: arXiv 2106.09685. A layer's input is saved for the gradient of A. embeddings: "low-rank" trains embedding
    and head as well, in slots of the same rank that are folded into their weights (one where they are tied).
    rate_ratio: how many times A's rate B's is, the learning rate lying in the middle (their geometric mean); 1 is LoRA
    as it was published. Of a wide layer A moves too much where both share a rate (LoRA+, arXiv 2402.12354).
    """

    name: ClassVar[str] = "lora"
    embeddings: str = "frozen"
    rate_ratio: float = 4.0

    def __post_init__(self) -> None:
        """Check the settings; embedding and head carry a slot or nothing."""
        super().__post_init__()
        if self.embeddings not in ("frozen", "low-rank"):
            raise InputError(f'embeddings is {self.embeddings!r}; beside adapters "frozen" or "low-rank" is wanted.')


@dataclass(frozen=True)
class LoRAFA(AdapterMethod):
    """LoRA with a frozen A of orthonormal rows: of a layer's input only x Aᵀ is saved.

    Source: arXiv 2308.03303.
    """

    name: ClassVar[str] = "lora-fa"


@dataclass(frozen=True)
class FullFineTune(Method):
    """Every parameter of the language model, always."""

    name: ClassVar[str] = "full"


METHODS: dict[str, type[Method]] = {
    cls.name: cls for cls in (LISA, OWS, OwLore, BAdam, GaLore, LoRA, LoRAFA, FullFineTune)
}


def method_by_name(name: str, **settings: Any) -> Method:
    """Return a method by its short name ("owlore", "lora-fa", …) with those settings that are not None.

    Raises InputError for an unknown name (the nearest is named) and for a setting that the method does not have.
    """
    if name.lower() not in METHODS:
        raise unknown_name("method", name, METHODS)
    cls = METHODS[name.lower()]
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items() if v is not None}
    fields = [field.name for field in dataclasses.fields(cls)]
    for key in given:
        if key not in fields:
            known = ", ".join(fields) or "no settings"
            raise InputError(f"method {cls.name!r} has no setting {key!r}; it has {known}.")
    return cls(**given)
