"""Under fully_shard the ranks' shards become what each rank's whole model would, however the model is used."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed.ranks import on_ranks
from distributed.runs import METHODS, Run, batch, model_of, train
from distributed.test_ranks import said
from lisa_kernels import LISA, GaLore, LoRA, OwLore, attach
from lisa_kernels.distributed import is_sharded, whole
from lisa_kernels.methods import Method

QUICK = ["LISA", "OwLore"]
# Two switches and, in low rank, three refreshes of a basis.
STEPS = 11
SLOW = [name for name in METHODS if name not in QUICK]


def sharded(model: Any, **settings: Any) -> Any:
    """Share out a model as users do: each block, then what is around them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


def own_parameters(run: Run) -> dict[str, torch.Tensor]:
    """Return the parameters that are the model's own."""
    return {
        name: param for name, param in run.model.named_parameters() if name.rpartition(".")[2] not in ("slot", "basis")
    }


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Return the parameters of a run, whole; gathered by all ranks together."""
    return {name: whole(param.detach()) for name, param in run.model.named_parameters() if param.numel()}


def unequal(one: Run, other: Run) -> list[str]:
    """Return the names of parameters that differ in a bit."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]


def both(rank: int, names: list[str]) -> dict[str, dict[str, Any]]:
    """Train on shards and on whole models; each rank has rows of its own."""
    found = {}
    for name in names:
        make, tied = METHODS[name]
        shards = train(make(), tied, rank, dtype=torch.bfloat16, prepare=sharded, steps=STEPS)
        replicas = train(make(), tied, rank, dtype=torch.bfloat16, steps=STEPS)
        found[name] = {
            "unequal": unequal(shards, replicas),
            "history": shards.optimizer.history == replicas.optimizer.history,
            "losses": shards.losses == replicas.losses,
            "logits": shards.optimizer.forms_logits,
            "shards": all(map(is_sharded, own_parameters(shards).values())),
        }
    return found


def check(name: str, found: list[dict[str, dict[str, Any]]]) -> None:
    for each in found:
        assert each[name] == {"unequal": [], "history": True, "losses": True, "logits": False, "shards": True}


@pytest.fixture(scope="module")
def quick() -> list[dict[str, dict[str, Any]]]:
    return on_ranks(both, QUICK)


@pytest.mark.parametrize("name", QUICK)
def test_shards_become_what_whole_models_do(name: str, quick: list[dict[str, dict[str, Any]]]) -> None:
    """Bit for bit in bfloat16 over switches and refreshes, stochastic rounding and clipping included."""
    check(name, quick)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_shards_of_other_methods_become_what_whole_models_do(name: str) -> None:
    check(name, on_ranks(both, [name]))


# Of embeddings in low rank that are not tied ranks find the basis from scattered rows, and one alone from those of ids.
AS_ALONE = [name for name in METHODS if name not in ("OwLore", "GaLore", "LoRA")]


def beside_one(rank: int, names: list[str]) -> dict[str, list[str]]:
    """Train shards on the same rows on each rank, and one whole model without others."""
    found = {}
    for name in names:
        make, tied = METHODS[name]
        settings: dict[str, Any] = {"dtype": torch.bfloat16, "steps": STEPS}
        shards = train(make(), tied, 0, prepare=sharded, **settings)
        found[name] = unequal(shards, train(make(), tied, 0, alone=True, **settings))
    return found


@pytest.mark.slow
def test_shards_become_what_one_process_would() -> None:
    """Bit for bit, where each rank's gradients are those of one."""
    for each in on_ranks(beside_one, AS_ALONE):
        assert each == {name: [] for name in AS_ALONE}


LOW_RANK = OwLore(active_layers=2, period=3, rank=8, gap=2, scores="uniform")
FULL_RANK = LISA(active_layers=2, period=3)


def accumulated(rank: int) -> list[list[str]]:
    settings: dict[str, Any] = {"steps": 4, "accumulate": 2}
    return [
        unequal(train(method, False, rank, prepare=sharded, **settings), train(method, False, rank, **settings))
        for method in (LOW_RANK, FULL_RANK)
    ]


def recomputed(rank: int) -> list[str]:
    shards = train(LOW_RANK, False, rank, steps=4, recompute=True, prepare=sharded)
    return unequal(shards, train(LOW_RANK, False, rank, steps=4, recompute=True))


def evaluated(rank: int) -> list[str]:
    """Evaluate between steps, and read logits in training too, from the loss's graph."""
    pair = [sharded(model_of()), model_of()]
    runs = [Run(model, attach(model, LOW_RANK, lr=3e-3)) for model in pair]
    for step in range(2):
        logits = []
        for run in runs:
            rows = batch(step, rank)
            output = run.model(**rows)
            (output.loss + 0.1 * output.logits.square().mean()).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.model.eval()
            with torch.no_grad():
                logits.append(run.model(**batch(99, rank)).logits)
            run.model.train()
        assert torch.equal(*logits)
    return unequal(*runs)


def under_policy(rank: int, methods: list[Method]) -> dict[str, Any]:
    """Train float32 shards with bfloat16 weights on their way, layers being frozen at the first forward."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = {}
    for method in methods:
        run = train(method, False, rank, steps=3, prepare=lambda model: sharded(model, mp_policy=policy))
        dtypes = {param.dtype for param in own_parameters(run).values()} | {g.dtype for g in run.gradients.values()}
        alone = train(method, False, rank, steps=3)
        found[method.name] = dtypes, run.losses, alone.losses
    return found


def mixed(rank: int) -> dict[str, Any]:
    return under_policy(rank, [LISA(active_layers=1, period=1), LOW_RANK])


def mixed_otherwise(rank: int) -> dict[str, Any]:
    return under_policy(rank, [GaLore(rank=8, gap=2, embeddings="low-rank"), LoRA(rank=8)])


def dictionaries(rank: int) -> dict[str, Any]:
    """Compare a model's state with that of a whole one, in training and after detaching, and train on detached."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    found: dict[str, Any] = {}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    for method in (LOW_RANK, LoRA(rank=8)):
        shards = train(method, False, rank, steps=2, prepare=sharded)
        replicas = train(method, False, rank, steps=2)
        for when in ("attached", "detached"):
            state, expected = get_model_state_dict(shards.model, options=options), replicas.model.state_dict()
            # Ranks other than the first get none.
            same = rank > 0 or (
                state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in state)
            )
            found[f"{method.name} {when}"] = same, [k for k in shards.model.state_dict() if k not in expected]
            shards.optimizer.detach()
            replicas.optimizer.detach()
        shards.model(**batch(9, rank)).loss.backward()
        found[f"{method.name} goes on"] = all(is_sharded(param.grad) for param in shards.model.parameters()), []
    return found


def refused(rank: int) -> dict[str, str]:
    from torch.distributed.fsdp import fully_shard

    def root_only_around(model: Any) -> Any:
        fully_shard(model.model.layers[0])
        return model

    def head_alone(model: Any) -> Any:
        fully_shard(model.lm_head)
        return sharded(model)

    def ignoring(model: Any) -> Any:
        return fully_shard(model, ignored_params={model.lm_head.weight})

    def read_late(model: Any) -> Tensor:
        sharded(model, reshard_after_forward=True)
        attach(model, LOW_RANK)
        logits: Tensor = model(**batch(0, rank)).logits
        return logits

    def divided(model: Any) -> Any:
        model.set_gradient_divide_factor(3.0)
        return model

    def unsent(model: Any) -> None:
        optimizer = attach(model, FULL_RANK)
        with optimizer.no_sync():
            model(**batch(0, rank)).loss.backward()
        optimizer.step()

    found = {
        "unsent": said(lambda: unsent(sharded(model_of()))),
        "a factor": said(lambda: attach(divided(sharded(model_of())), LOW_RANK)),
        "without ranks": said(lambda: attach(sharded(model_of()), LOW_RANK, ranks=None)),
        "a part": said(lambda: attach(root_only_around(model_of()), LOW_RANK)),
        "a head alone": said(lambda: attach(head_alone(model_of()), LOW_RANK)),
        "ignored": said(lambda: attach(ignoring(model_of()), LOW_RANK)),
        "logits read late": said(lambda: read_late(model_of())),
        "blocks": said(lambda: attach(sharded(model_of()), FULL_RANK, block_size=16384)),
    }
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer = attach(head_alone(model_of()), FULL_RANK)
    found["head alone in full"] = "".join(str(each.message) for each in told if "output layer" in str(each.message))
    optimizer.model(**batch(0, rank)).loss.backward()
    optimizer.step()
    return found


def merged(rank: int) -> list[str]:
    """Merge adapters of a model that is one unit, whose whole weights are still there after an evaluation."""
    from torch.distributed.fsdp import fully_shard

    runs = [
        train(LoRA(rank=8), False, rank, steps=2, prepare=prepare, dtype=torch.bfloat16)
        for prepare in (fully_shard, lambda model: model)
    ]
    found = []
    for use in ("as it is", "merge", "unmerge", "detach"):
        logits = []
        for run in runs:
            run.model.eval()
            for used in (False, True):
                with torch.no_grad():
                    before = run.model(**batch(9, rank)).logits
                if use != "as it is" and not used:
                    getattr(run.optimizer, use)()
            logits.append(before)
        found += [] if torch.equal(*logits) else [use]
    return found + unequal(*runs)


def of_all(rank: int, uses: list[Callable[[int], Any]]) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    return {use.__name__: use(rank) for use in uses}


@pytest.fixture(scope="module")
def uses() -> list[dict[str, Any]]:
    return on_ranks(of_all, [evaluated, mixed, dictionaries, refused])


def test_evaluation_between_steps_changes_nothing(uses: list[dict[str, Any]]) -> None:
    """Bit for bit what whole models become, logits that are read from a training output included."""
    assert [each["evaluated"] for each in uses] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("use", [accumulated, recomputed, merged, mixed_otherwise])
def test_uses_of_shards_are_those_of_whole_models(use: Callable[[int], Any]) -> None:
    """Bit for bit: micro-batches under no_sync, recomputed blocks, merged adapters. Under a policy to rounding."""
    for found in on_ranks(of_all, [use]):
        if use is mixed_otherwise:
            check_mixed(found[use.__name__])
        else:
            assert found[use.__name__] in ([], [[], []])


def check_mixed(found: dict[str, Any]) -> None:
    for dtypes, losses, alone in found.values():
        assert dtypes == {torch.float32}
        assert losses == pytest.approx(alone, rel=2**-8)


def test_gradients_keep_their_dtypes_under_a_policy(uses: list[dict[str, Any]]) -> None:
    """Of layers that were frozen when FSDP first looked too; losses are those of float32 to bfloat16's rounding."""
    for each in uses:
        check_mixed(each["mixed"])


def test_states_of_the_model_are_ordinary(uses: list[dict[str, Any]]) -> None:
    """Whole ones are those of an ordinary model, adapters merged; after detaching it trains on as FSDP's own."""
    for each in uses:
        for name, found in each["dictionaries"].items():
            assert found == (True, []), name


REASONS = {
    "without ranks": 'attach with ranks="auto"',
    "unsent": "gradients are this rank's own; leave the last micro-batch",
    "a factor": "divided by a factor of their own",
    "a part": "parts of the model are under fully_shard",
    "a head alone": "lm_head is under fully_shard by itself|token embedding is under",
    "ignored": "lm_head.weight is on every rank whole",
    "logits read late": r"reshard_after_forward=False\), or attach with keep_logits=True",
    "blocks": "blocks of 16384 would be cut",
    "head alone in full": "output layer is under fully_shard by itself",
}


@pytest.mark.parametrize("attempt", REASONS)
def test_what_shards_cannot_do_is_said(attempt: str, uses: list[dict[str, Any]]) -> None:
    """In one sentence on every rank, before training."""
    for each in uses:
        assert re.search(REASONS[attempt], each["refused"][attempt]), each["refused"][attempt]
        assert "\n" not in each["refused"][attempt]


def test_a_model_of_one_process_has_no_units() -> None:
    from lisa_kernels.distributed import at_rest, is_unit, units_of

    model = nn.Linear(2, 2)
    at_rest(model)
    assert units_of(model) == []
    assert not is_unit(model)
