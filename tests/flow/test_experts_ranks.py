"""Two ranks train the groups of one model: the same weights, and times of their own."""

from __future__ import annotations

from typing import Any

from distributed.ranks import on_ranks

from lisa_kernels import TimestepExperts

from .small_flow import add_gradients, start


def _train(rank: int, resting_weights: str) -> tuple[dict[str, Any], list[list[float]], list[int]]:
    model, optimizer = start(TimestepExperts(groups=3, resting_weights=resting_weights))
    times = []
    for step in range(5):
        times.append(optimizer.times(4).tolist())
        add_gradients(model, optimizer, 2 * step + rank)
        optimizer.step()
        optimizer.zero_grad()
    # Plain values: a tensor would be read from a process that is gone.
    weights = {name: value.numpy().tobytes() for name, value in model.state_dict().items()}
    return weights, times, optimizer.group_steps


def test_ranks_hold_one_model_and_draw_their_own_times() -> None:
    """Bit for bit, weights paged or not; what one rank draws for a step, no other draws."""
    found: list[Any] = [each for resting in ("keep", "page") for each in on_ranks(_train, resting)]
    weights, times, steps = zip(*found)
    assert all(other == weights[0] for other in weights[1:])
    assert not any(set(one) & set(other) for one, other in zip(times[0], times[1]))
    assert set(map(tuple, steps)) == {(2, 2, 1)}
