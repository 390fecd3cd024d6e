"""The chunked loss is the plain loss: value and every gradient, whatever is trained and masked."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lisa_kernels.errors import InputError
from lisa_kernels.ops import resting
from lisa_kernels.ops.linear_cross_entropy import Curve, Head, HeadGradient, linear_cross_entropy
from lisa_kernels.ops.linear_cross_entropy.reference import NO_LABEL
from lisa_kernels.ops.lowrank_linear import products
from lisa_kernels.ops.resting import KINDS

ROWS, N, VOCABULARY, RANK = 70, 32, 101, 8
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
    assert isinstance(head.weight, Tensor)
    logits = hidden @ head.weight.t()
    if head.slot is not None and head.basis is not None:
        logits = logits + head.scale * (hidden @ head.basis.t()) @ head.slot
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.curve.scale
    if head.curve.cap is not None:
        logits = head.curve.cap * torch.tanh(logits / head.curve.cap)
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slot", [False, True], ids=["frozen", "slot"])
@pytest.mark.parametrize("tile", [1, 1 << 24], ids=["tiles", "whole"])
def test_a_head_at_rest_is_the_one_that_its_codes_mean(
    kind: str, slot: bool, tile: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few classes at a time: neither the weight nor its logits' errors are formed otherwise."""
    monkeypatch.setattr(resting, "TILE_ELEMENTS", tile)
    labels, plain = labels_of(True).to(device), head_of("adapter")
    codes = resting.quantize_resting(plain.weight.to(device), kind)
    weight = resting.RestingWeight(*codes, kind, VOCABULARY, N)
    results = []
    for each in (weight, weight.woken(torch.float32)):
        hidden = normal(ROWS, N).to(device).requires_grad_()
        leaf = plain.slot.detach().to(device).requires_grad_() if plain.slot is not None and slot else None
        head = Head(each, None, leaf, None if plain.basis is None or not slot else plain.basis.to(device), 0.5)
        loss = linear_cross_entropy(hidden, head, labels, chunk_rows=16) if each is weight else None
        (plain_loss(hidden, head, labels) if loss is None else loss).backward()
        results.append([hidden.grad, *([leaf.grad] if leaf is not None else [])])
    for one, other in zip(*results):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=EXACT, atol=EXACT * float(other.abs().max()))


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


@pytest.mark.parametrize("curve", [Curve(), Curve(1.5, 2.0)], ids=["plain", "bent"])
@pytest.mark.parametrize("kind", ["full", "low-rank", "adapter", "refresh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_go_through_the_head_for_nothing_leave_no_trace(kind: str, curve: Curve, dtype: torch.dtype) -> None:
    """As on a GPU, where none is dropped: loss and gradients are those without them, their own gradient exactly 0."""
    labels, results = labels_of(True), []
    for kept in (True, False):
        hidden = normal(ROWS, N, dtype=dtype).requires_grad_()
        head = head_of("low-rank" if kind == "refresh" else kind, dtype)._replace(curve=curve)
        leaves = [part for part in (head.weight, head.bias, head.slot) if isinstance(part, nn.Parameter)]
        bands: list[Tensor] = []

        def choose(gradient: HeadGradient, head: Head = head, bands: list[Tensor] = bands) -> Tensor:
            bands.append(sum(errors.t() @ rows for errors, rows in gradient.bands()))  # type: ignore[arg-type]
            assert head.basis is not None
            return head.basis

        given = labels.masked_fill(labels == -100, NO_LABEL) if kept else labels
        refresh = choose if kind == "refresh" else None
        loss = linear_cross_entropy(hidden, head, given, chunk_rows=16, refresh=refresh)
        loss.backward()
        assert hidden.grad is not None
        assert not hidden.grad[labels == -100].any()
        results.append([loss.detach(), hidden.grad, *(leaf.grad for leaf in leaves), *bands])
    for one, other in zip(*results):
        assert float((one - other).norm()) <= 2 * torch.finfo(dtype).eps * float(other.norm())


@pytest.mark.parametrize("label", [-5, VOCABULARY])
def test_a_label_that_is_no_class_raises(label: int) -> None:
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        linear_cross_entropy(normal(2, N), head_of("frozen"), torch.tensor([1, label]))


def test_rows_that_are_all_masked_lose_nothing() -> None:
    hidden = normal(ROWS, N).requires_grad_()
    loss = linear_cross_entropy(hidden, head_of("frozen"), torch.full((ROWS,), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def head_gradient(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Return the plain loss's gradient of the head's weight, float64 [V, n]."""
    weight = head.weight.detach().double().requires_grad_()
    plain_loss(hidden.detach().double(), Head(weight), labels).backward()
    assert weight.grad is not None
    return weight.grad


CURVES = [Curve(0.25), Curve(cap=3.0), Curve(1.5, 2.0)]


@pytest.mark.parametrize("curve", CURVES, ids=["scaled", "capped", "both"])
@pytest.mark.parametrize("kind", ["full", "low-rank", "adapter"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaled_and_capped_logits(kind: str, curve: Curve, dtype: torch.dtype, device: torch.device) -> None:
    """What a model does to its logits is in the loss and in every gradient, capped bands of a 16-bit weight's too."""
    labels, results = labels_of(True).to(device), []
    for chunked in (True, False):
        wide = dtype if chunked else torch.float64
        hidden = normal(ROWS, N, dtype=dtype).to(device, wide).requires_grad_()
        made = head_of(kind, dtype)
        parts = [part.detach().to(device) if isinstance(part, Tensor) else part for part in made[:4]]
        parts = [part if part is None or chunked else part.double() for part in parts]
        leaves = [part for part, index in zip(parts, range(3)) if part is not None and (kind == "full") is (index < 2)]
        for leaf in leaves:
            leaf.requires_grad_()
        head = Head(*parts, made.scale, kind == "low-rank", curve)
        loss = (
            linear_cross_entropy(hidden, head, labels, chunk_rows=16) if chunked else plain_loss(hidden, head, labels)
        )
        loss.backward()
        results.append([loss.detach(), hidden.grad, *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results):
        assert float((one.double() - other).norm()) <= 4 * torch.finfo(dtype).eps * float(other.norm()) + 1e-6


@pytest.mark.parametrize("masked", [False, True], ids=["all-rows", "masked"])
@pytest.mark.parametrize("chunk_rows", [16, 1000], ids=str)
def test_a_refresh_sees_the_heads_gradient_and_its_basis_is_used(
    masked: bool, chunk_rows: int, device: torch.device
) -> None:
    """The bands' products add up to G, the basis returned is that of dB, and the other gradients are as ever."""
    labels = labels_of(masked).to(device)
    hidden = normal(ROWS, N).to(device).requires_grad_()
    frozen = head_of("frozen").weight.to(device)
    slot = torch.zeros(RANK, VOCABULARY, device=device, requires_grad=True)
    old, new = (torch.linalg.qr(normal(N, RANK, seed=seed))[0].t().contiguous().to(device) for seed in (3, 4))
    wanted = head_gradient(hidden, Head(frozen), labels)
    seen = []

    def refresh(gradient: HeadGradient) -> Tensor:
        assert gradient.shape == wanted.shape
        assert gradient.device == device or gradient.device.type == device.type
        seen.append(sum(errors.t() @ rows for errors, rows in gradient.bands()))
        return new

    head = Head(frozen, None, slot, old, slot_is_zero=True)
    loss = linear_cross_entropy(hidden, head, labels, chunk_rows=chunk_rows, refresh=refresh)
    (loss * 0.25).backward()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0].double(), wanted, rtol=1e-5, atol=1e-5)
    assert slot.grad is not None
    torch.testing.assert_close(slot.grad.double(), 0.25 * new.double() @ wanted.t(), rtol=1e-5, atol=1e-5)
    plain = hidden.detach().clone().requires_grad_()
    (plain_loss(plain, Head(frozen), labels) * 0.25).backward()
    torch.testing.assert_close(hidden.grad, plain.grad, rtol=1e-5, atol=1e-6)


def test_a_loss_without_gradients_asks_for_no_basis(device: torch.device) -> None:
    """What is only evaluated has no say in what trains; and none of a gradient's products is made."""
    labels, hidden = labels_of(False).to(device), normal(ROWS, N).to(device).requires_grad_()
    found = head_of("low-rank")
    assert found.slot is not None
    assert found.basis is not None
    slot = found.slot.detach().to(device).requires_grad_()
    head = Head(found.weight.to(device), None, slot, found.basis.to(device), slot_is_zero=True)

    def refresh(gradient: HeadGradient) -> Tensor:
        raise AssertionError("a basis was asked for")

    wanted = linear_cross_entropy(hidden, head, labels)
    with pytest.raises(AssertionError, match="asked for"):
        linear_cross_entropy(hidden, head, labels, refresh=refresh)
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        assert linear_cross_entropy(hidden, head, labels, refresh=refresh).equal(wanted.detach())
    assert counted.get_total_flops() == 2 * ROWS * N * VOCABULARY


@pytest.mark.parametrize("kind", ["full", "low-rank"])
def test_under_autocast_products_are_16_bit_and_gradients_their_parameters_own(kind: str, device: torch.device) -> None:
    """Loss and gradients are those of torch's autocast to bfloat16's rounding; a float32 weight keeps its dtype."""
    labels = labels_of(False).to(device)
    results = []
    for chunked in (True, False):
        hidden = normal(ROWS, N).to(device).requires_grad_()
        head = Head(*(part.to(device) if isinstance(part, Tensor) else part for part in head_of(kind)))
        trained = [part.detach().requires_grad_() for part in (head.weight, head.bias, head.slot) if part is not None]
        if kind == "full":
            head = Head(trained[0], trained[1])
        else:
            head, trained = head._replace(slot=trained[1]), trained[1:]
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = (linear_cross_entropy if chunked else plain_loss)(hidden, head, labels)
        loss.backward()
        results.append([loss.detach(), hidden.grad, *(leaf.grad for leaf in trained)])
    for one, other in zip(*results):
        assert one is not None
        assert other is not None
        assert one.dtype == other.dtype == torch.float32
        assert float((one - other).norm()) <= 2**-6 * float(other.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_weights_gradient_is_rounded_once(dtype: torch.dtype, device: torch.device) -> None:
    """Summed over all rows in float32, whatever the chunks: small and large chunks give one result to rounding."""
    labels = labels_of(False).to(device)
    gradients = []
    for chunk_rows in (4, 1000):
        weight = head_of("frozen", dtype).weight.to(device).requires_grad_()
        hidden = normal(ROWS, N, dtype=dtype).to(device)
        linear_cross_entropy(hidden, Head(weight), labels, chunk_rows=chunk_rows).backward()
        assert weight.grad is not None
        assert weight.grad.dtype == dtype
        gradients.append(weight.grad.double())
    wanted = head_gradient(hidden, Head(weight.detach()), labels)
    for found in gradients:
        assert float((found - wanted).norm() / wanted.norm()) < 2**-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_second_backward_gives_the_gradients_again(dtype: torch.dtype, device: torch.device) -> None:
    """With retain_graph, whatever the first one did with the memory of its gradients."""
    hidden = normal(ROWS, N, dtype=dtype).to(device).requires_grad_()
    weight = head_of("frozen", dtype).weight.to(device).requires_grad_()
    loss = linear_cross_entropy(hidden, Head(weight), labels_of(False).to(device), chunk_rows=16) * 0.5
    found = []
    for _ in range(2):
        found.append(torch.autograd.grad(loss, (hidden, weight), retain_graph=True))
        found[-1][1].mul_(1.0)
    rounding = 4 * torch.finfo(dtype).eps
    for one, other in zip(*found):
        assert one.data_ptr() != other.data_ptr()
        torch.testing.assert_close(one, other, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("kind", ["frozen", "full", "low-rank"])
def test_fake_tensors_run_with_every_row_counted(kind: str) -> None:
    """A plan sees loss and gradients without values, as if no label were masked."""
    with FakeTensorMode():
        hidden = torch.empty(ROWS, N, requires_grad=True)
        weight = torch.empty(VOCABULARY, N, requires_grad=kind == "full")
        slot = torch.empty(RANK, VOCABULARY, requires_grad=True) if kind == "low-rank" else None
        basis = torch.empty(RANK, N) if kind == "low-rank" else None
        labels = torch.empty(ROWS, dtype=torch.int64)
        linear_cross_entropy(hidden, Head(weight, None, slot, basis, slot_is_zero=True), labels).backward()
        for part in (hidden, weight, slot):
            if part is not None and part.requires_grad:
                assert part.grad is not None
                assert part.grad.shape == part.shape


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("kind", ["frozen", "low-rank", "refresh"])
def test_neither_logits_nor_a_full_gradient_exist(kind: str) -> None:
    """Negative control: the plain loss makes both."""
    head, labels = head_of("low-rank" if kind == "refresh" else kind), labels_of(False)
    refresh = (lambda gradient: head.basis) if kind == "refresh" else None
    for chunked in (True, False):
        hidden = normal(ROWS, N).requires_grad_()
        with LargestTensor() as seen:
            if chunked:
                loss = linear_cross_entropy(hidden, head, labels, chunk_rows=8, refresh=refresh)
            else:
                loss = plain_loss(hidden, head, labels)
            loss.backward()
        # The weight itself may be seen as a view.
        assert (seen.largest <= max(ROWS * N, VOCABULARY * N)) is chunked


class Storages(TorchDispatchMode):
    """Notes the sizes of the storages that operations make, and the most bytes of them alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.held = self.most = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {value.untyped_storage()._cdata for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.untyped_storage()._cdata not in given:
                self._see(value.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._alive.add(key)
        self.sizes.append(size)
        self.held += size
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.held -= size


def costs(kind: str, hidden: Tensor, labels: Tensor, dtype: torch.dtype, chunk_rows: int) -> tuple[int, Storages]:
    """Return the flops and the storages of the loss and its gradients."""
    head = head_of(kind, dtype)
    rows = hidden.to(dtype).requires_grad_()
    with FlopCounterMode(display=False) as flops, Storages() as storages:
        linear_cross_entropy(rows, head, labels, chunk_rows=chunk_rows).backward()
    return flops.get_total_flops(), storages


@pytest.mark.parametrize("kind", ["frozen", "full", "low-rank"])
def test_masked_rows_cost_neither_flops_nor_bytes(kind: str) -> None:
    """Prompts are dropped before the head: what is left costs what it costs alone, but for a list of places."""
    hidden, labels = normal(ROWS, N), labels_of(True)
    kept = labels != -100
    flops, storages = costs(kind, hidden, labels, torch.float32, 8)
    flops_alone, alone = costs(kind, hidden[kept], labels[kept], torch.float32, 8)
    assert flops == flops_alone
    assert storages.most <= alone.most + 8 * ROWS + 4 * ROWS * N
    unmasked, _ = costs(kind, hidden, labels_of(False), torch.float32, 8)
    assert unmasked > 2 * flops


@pytest.mark.parametrize(("kind", "gradients"), [("frozen", 0), ("low-rank", 0), ("full", 1)])
def test_a_weights_gradient_exists_once_or_not_at_all(kind: str, gradients: int) -> None:
    """The chunks of a head that trains in full add to one buffer, which becomes its gradient."""
    _, storages = costs(kind, normal(ROWS, N), labels_of(False), torch.float32, 4)
    assert storages.sizes.count(4 * VOCABULARY * N) == gradients


@pytest.mark.parametrize(("dtype", "bytes_per_logit"), [(torch.float32, 4.6), (torch.bfloat16, 6.1)], ids=str)
def test_a_chunk_takes_what_it_is_said_to_take(
    dtype: torch.dtype, bytes_per_logit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits in float32 and, of 16-bit models, in their own width; no third buffer of that size."""
    # As on a GPU: CPUs without such units multiply copies in float32.
    monkeypatch.setitem(products._MATRIX_UNITS, torch.bfloat16, True)
    chunk_rows, vocabulary = 256, 5000
    hidden, weight = normal(chunk_rows, 8, dtype=dtype).requires_grad_(), normal(vocabulary, 8, dtype=dtype)
    labels = torch.randint(vocabulary, (chunk_rows,), generator=torch.Generator().manual_seed(5))
    with Storages() as storages:
        linear_cross_entropy(hidden, Head(weight), labels, chunk_rows=chunk_rows).backward()
    assert 4 * chunk_rows * vocabulary < storages.most < bytes_per_logit * chunk_rows * vocabulary


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
