"""The slot's gradient of an embedding is the plain table's, projected; the table's own never exists."""

from __future__ import annotations

import pytest
import torch
from atomic_adds import AtomicAdds
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lisa_kernels.ops.lowrank_embedding import capture_embedding, lowrank_embedding, ordered_embedding, reference
from lisa_kernels.ops.lowrank_embedding.reference import add_rows_, compact_gradient, slot_gradient, table_gradient

VOCABULARY, N, RANK = 101, 24, 8
FACTOR = 1.5


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens(kind: str) -> Tensor:
    """Return ids: as they come, of one token only, or none at all."""
    drawn = torch.randint(VOCABULARY // 4, (3, 20), generator=torch.Generator().manual_seed(1))
    return {"repeated": drawn, "one id": torch.full((3, 20), 7), "none": drawn[:, :0]}[kind]


def plain_gradient(ids: Tensor, dy: Tensor, padding: int | None) -> Tensor:
    table = nn.Embedding(VOCABULARY, N, padding_idx=padding, dtype=torch.float64)
    (FACTOR * table(ids)).backward(dy.double())
    assert table.weight.grad is not None
    return table.weight.grad


def basis_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linalg.qr(normal(N, RANK, seed=3))[0].t().contiguous().to(dtype)


@pytest.mark.parametrize("padding", [None, 0, 7], ids=str)
@pytest.mark.parametrize("kind", ["repeated", "one id", "none"])
@pytest.mark.parametrize("capturing", [False, True], ids=["with basis", "capturing"])
def test_the_slots_gradient_is_the_projected_one(
    kind: str, padding: int | None, capturing: bool, device: torch.device
) -> None:
    """dB = P Gᵀ with G from torch's own embedding; tokens of one id add up, the padding's count nothing."""
    ids, basis = tokens(kind), basis_of()
    dy = normal(*ids.shape, N, seed=2)
    wanted = basis.double() @ plain_gradient(ids, dy, padding).t()
    slot = torch.zeros(RANK, VOCABULARY, device=device, requires_grad=True)
    looked_up, on_device = normal(*ids.shape, N).to(device), basis.to(device)
    settings = (FACTOR, -1 if padding is None else padding)
    if capturing:
        y = capture_embedding(looked_up, ids.to(device), slot, lambda gradient: on_device, *settings)
    else:
        y = lowrank_embedding(looked_up, ids.to(device), slot, on_device, *settings)
    assert torch.equal(y, looked_up)
    y.backward(dy.to(device))
    assert slot.grad is not None
    torch.testing.assert_close(slot.grad.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["repeated", "one id", "none"])
def test_the_compact_gradient_has_the_tables_row_space(kind: str, device: torch.device) -> None:
    """CᵀC = GᵀG: each id's tokens are one row, the rest of the rows is zero."""
    ids = tokens(kind)
    dy = normal(*ids.shape, N, seed=2)
    full = plain_gradient(ids, dy, 7)
    compact = compact_gradient(dy.to(device), ids.to(device), FACTOR, 7, least_rows=RANK).cpu().double()
    assert compact.shape == (max(ids.numel(), RANK), N)
    torch.testing.assert_close(compact.t() @ compact, full.t() @ full, rtol=1e-4, atol=1e-4)
    distinct = len(ids.unique())
    assert not compact[distinct:].any()


@pytest.mark.parametrize("padding", [None, 0, 7], ids=str)
@pytest.mark.parametrize("kind", ["repeated", "one id", "none"])
def test_a_tables_gradient_is_torchs_own(
    kind: str, padding: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is looked up, with a model's own factor; bands of columns change nothing."""
    ids, dy = tokens(kind).to(device), normal(3, tokens(kind).shape[1], N, seed=2)
    table = normal(VOCABULARY, N).to(device).requires_grad_()
    y = FACTOR * table.detach()[ids]
    out = ordered_embedding(y, ids, table, FACTOR, -1 if padding is None else padding)
    assert torch.equal(out, y)
    out.backward(dy.to(device))
    assert table.grad is not None
    torch.testing.assert_close(table.grad.cpu().double(), plain_gradient(ids.cpu(), dy, padding), rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(reference, "BAND", 5 * 60)
    again = table_gradient(dy.to(device), ids, VOCABULARY, FACTOR, -1 if padding is None else padding)
    assert torch.equal(again, table.grad)


def test_16_bit_gradients_are_summed_in_float32(device: torch.device) -> None:
    """A thousand equal tokens of one id in bfloat16 lose nothing to the sum, of a slot or of a table."""
    ids = torch.full((1024,), 5, device=device)
    basis = torch.eye(RANK, N, dtype=torch.bfloat16, device=device)
    slot = torch.zeros(RANK, VOCABULARY, device=device, requires_grad=True)
    y = lowrank_embedding(torch.zeros(1024, N, dtype=torch.bfloat16, device=device), ids, slot, basis)
    y.backward(torch.full_like(y, 1.0 + 2**-7))
    assert slot.grad is not None
    assert slot.grad.dtype == torch.float32
    assert torch.equal(slot.grad[:, 5], torch.full((RANK,), 1024 + 8.0, device=device))
    assert torch.equal(table_gradient(torch.full_like(y, 1.0 + 2**-7), ids, 6, 1.0, -1)[5], torch.full_like(y[0], 1032))


def test_the_tokens_of_an_id_are_added_in_their_order(device: torch.device) -> None:
    """Bit for bit, on every device; negative control: in another order the bits are others."""
    place, rows = torch.tensor([2, 0, 2, 2, 1, 2] * 50), normal(300, 3, seed=5)
    rows *= 10.0 ** (torch.arange(300) % 7).unsqueeze(1)
    wanted = torch.zeros(4, 3)
    for at, row in zip(place, rows):
        wanted[at] += row
    found = add_rows_(torch.zeros(4, 3, device=device), place.to(device), rows.to(device))
    assert torch.equal(found.cpu(), wanted)
    assert not torch.equal(add_rows_(torch.zeros(4, 3), place.flip(0), rows.flip(0)), wanted)


def test_no_gradient_is_added_up_in_an_order_of_its_own() -> None:
    """On the route that GPUs take, which is that of every device but CPUs."""
    dy, ids = torch.empty(60, N, device="meta"), torch.empty(60, dtype=torch.int64, device="meta")
    basis = torch.empty(RANK, N, device="meta")
    with AtomicAdds() as adds:
        slot_gradient(dy, ids, basis, VOCABULARY, FACTOR, 7)
        compact_gradient(dy, ids, FACTOR, 7, RANK)
        table_gradient(dy, ids, VOCABULARY, FACTOR, 7)
    assert not adds.seen


def test_a_gradient_for_what_came_in_passes_through() -> None:
    """Where the looked-up rows are in a graph themselves, theirs is dy as it is."""
    ids, basis = tokens("repeated"), basis_of()
    for capturing in (False, True):
        y = normal(*ids.shape, N).requires_grad_()
        slot = torch.zeros(RANK, VOCABULARY)
        out = capture_embedding(y, ids, slot, lambda g: basis) if capturing else lowrank_embedding(y, ids, slot, basis)
        dy = normal(*ids.shape, N, seed=2)
        out.backward(dy)
        assert y.grad is not None
        assert torch.equal(y.grad, dy)


class LargestTensor(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("capturing", [False, True], ids=["with basis", "capturing"])
def test_the_tables_gradient_never_exists(capturing: bool) -> None:
    """Nothing as large as [V, n] is made; negative control: torch's own embedding makes it."""
    vocabulary, ids, basis = 1000, tokens("repeated"), basis_of()
    dy = normal(*ids.shape, N)
    slot = torch.zeros(RANK, vocabulary, requires_grad=True)
    with LargestTensor() as seen:
        rows = torch.zeros(*ids.shape, N)
        if capturing:
            capture_embedding(rows, ids, slot, lambda gradient: basis).backward(dy)
        else:
            lowrank_embedding(rows, ids, slot, basis).backward(dy)
    assert seen.largest <= RANK * vocabulary
    with LargestTensor() as seen:
        nn.functional.embedding(ids, torch.zeros(vocabulary, N, requires_grad=True)).backward(dy)
    assert seen.largest >= vocabulary * N


def test_compiled_and_fake_runs_see_it() -> None:
    """torch.compile traces it without a break, with the same gradient."""
    ids, basis = tokens("repeated"), basis_of()

    def loss(slot: Tensor) -> Tensor:
        return lowrank_embedding(normal_rows, ids, slot, basis, FACTOR).square().sum()

    normal_rows = normal(*ids.shape, N)
    slots = [torch.zeros(RANK, VOCABULARY, requires_grad=True) for _ in range(2)]
    loss(slots[0]).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(slots[1]).backward()
    assert slots[0].grad is not None
    torch.testing.assert_close(slots[1].grad, slots[0].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_given_what_a_slot_has_accumulated(dtype: torch.dtype, device: torch.device) -> None:
    """y + f · B[:, ids]ᵀ P, and the slot's gradient as beside one of zeros."""
    ids, basis = tokens("repeated").to(device), basis_of(dtype).to(device)
    start, looked_up = normal(RANK, VOCABULARY, seed=4).to(device), normal(3, 20, N, dtype=dtype).to(device)
    dy, gradients = normal(3, 20, N, seed=2, dtype=dtype).to(device), []
    for is_zero in (False, True):
        slot = start.clone().requires_grad_()
        y = lowrank_embedding(looked_up, ids, slot, basis, FACTOR, -1, is_zero)
        gradients.append(torch.autograd.grad(y, slot, dy)[0])
        wanted = looked_up.double() + (0.0 if is_zero else FACTOR) * (start.t().double() @ basis.double())[ids]
        rounding = 1e-5 if dtype == torch.float32 else 2**-6
        torch.testing.assert_close(y.double(), wanted, rtol=rounding, atol=rounding * float(wanted.abs().max()))
    assert torch.equal(*gradients)
    arguments = (looked_up, ids, start.requires_grad_(), basis, FACTOR, -1, False)
    torch.library.opcheck(torch.ops.lisa_kernels.lowrank_embedding, arguments)
