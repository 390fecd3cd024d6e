"""The chunked loss is the plain loss: value and every gradient, whatever is trained and masked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lisa_kernels.errors import InputError
from lisa_kernels.ops.linear_cross_entropy import Head, linear_cross_entropy

ROWS, N, VOCABULARY, RANK = 70, 24, 101, 8
# Sums of at most a hundred float32 products.
EXACT = 1e-5


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def head_of(kind: str, dtype: torch.dtype = torch.float32) -> Head:
    weight = normal(VOCABULARY, N, seed=1, dtype=dtype) / 4
    bias = normal(VOCABULARY, seed=2, dtype=dtype)
    if kind == "frozen":
        return Head(weight)
    if kind == "full":
        return Head(nn.Parameter(weight), nn.Parameter(bias))
    basis = torch.linalg.qr(normal(N, RANK, seed=3))[0].t().contiguous().to(dtype)
    start = torch.zeros(RANK, VOCABULARY) if kind == "low-rank" else normal(RANK, VOCABULARY, seed=4) / 10
    return Head(weight, None, nn.Parameter(start), basis, 1.0 if kind == "low-rank" else 0.5)


def plain_loss(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    logits = hidden @ head.weight.t()
    if head.slot is not None and head.basis is not None:
        logits = logits + head.scale * (hidden @ head.basis.t()) @ head.slot
    if head.bias is not None:
        logits = logits + head.bias
    return nn.functional.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1), reduction="sum")


def labels_of(masked: bool) -> Tensor:
    labels = torch.randint(VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(5))
    if masked:
        labels[::3] = -100
        labels[40:] = -100
    return labels


@pytest.mark.parametrize("kind", ["frozen", "full", "low-rank", "adapter"])
@pytest.mark.parametrize("masked", [False, True], ids=["all-rows", "masked"])
@pytest.mark.parametrize("chunk_rows", [1, 16, 1000], ids=str)
def test_loss_and_gradients_are_those_of_the_plain_loss(
    kind: str, masked: bool, chunk_rows: int, device: torch.device
) -> None:
    labels = labels_of(masked).to(device)
    results = []
    for chunked in (True, False):
        hidden = normal(ROWS, N).to(device).requires_grad_()
        head = head_of(kind)
        leaves = [part for part in (head.weight, head.bias, head.slot) if isinstance(part, nn.Parameter)]
        moved = Head(*(part.to(device) if isinstance(part, Tensor) else part for part in head))
        if chunked:
            loss = linear_cross_entropy(hidden, moved, labels, chunk_rows=chunk_rows)
        else:
            loss = plain_loss(hidden, moved, labels)
        (loss * 0.25).backward()
        results.append([loss.detach(), hidden.grad, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, rtol=EXACT, atol=EXACT * float(other.abs().max()))


def test_16_bit_heads_err_by_their_own_rounding_only(device: torch.device) -> None:
    labels = labels_of(False).to(device)
    head = head_of("frozen", torch.bfloat16)
    hidden = normal(ROWS, N, dtype=torch.bfloat16).to(device).requires_grad_()
    exact_hidden = hidden.detach().double().requires_grad_()
    moved = Head(head.weight.to(device))
    loss = linear_cross_entropy(hidden, moved, labels)
    exact = plain_loss(exact_hidden, Head(moved.weight.double()), labels)
    loss.backward()
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=2**-8)
    assert hidden.grad is not None
    assert exact_hidden.grad is not None
    assert float((hidden.grad - exact_hidden.grad).norm() / exact_hidden.grad.norm()) < 2**-7


def test_batches_of_sequences_are_taken_as_they_are() -> None:
    hidden, labels = normal(2, 35, N), labels_of(True).view(2, 35)
    one = linear_cross_entropy(hidden, head_of("frozen"), labels)
    other = linear_cross_entropy(hidden.view(-1, N), head_of("frozen"), labels.view(-1))
    assert float(one) == float(other)


def test_rows_that_are_all_masked_lose_nothing() -> None:
    hidden = normal(ROWS, N).requires_grad_()
    loss = linear_cross_entropy(hidden, head_of("frozen"), torch.full((ROWS,), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("kind", ["frozen", "low-rank"])
def test_neither_logits_nor_a_full_gradient_exist(kind: str) -> None:
    """Negative control: the plain loss makes both."""
    head, labels = head_of(kind), labels_of(False)
    for chunked in (True, False):
        hidden = normal(ROWS, N).requires_grad_()
        with LargestTensor() as seen:
            if chunked:
                loss = linear_cross_entropy(hidden, head, labels, chunk_rows=8)
            else:
                loss = plain_loss(hidden, head, labels)
            loss.backward()
        # The weight itself may be seen as a view.
        assert (seen.largest <= max(ROWS * N, VOCABULARY * N)) is chunked


@pytest.mark.parametrize(
    ("hidden", "labels", "head", "words"),
    [
        pytest.param((3, N + 1), (3,), "frozen", rf"hidden is \[3, {N + 1}\].*{N}\]", id="width"),
        pytest.param((3, N), (4,), "frozen", r"labels \[4\].*one label per row", id="labels"),
        pytest.param((3, N), (3,), "no-basis", "both or neither", id="slot-without-basis"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    hidden: tuple[int, ...], labels: tuple[int, ...], head: str, words: str
) -> None:
    given = head_of("low-rank")._replace(basis=None) if head == "no-basis" else head_of(head)
    with pytest.raises(InputError, match=words):
        linear_cross_entropy(torch.zeros(hidden), given, torch.zeros(labels, dtype=torch.int64))
