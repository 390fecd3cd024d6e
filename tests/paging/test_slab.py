"""Named tensors in one byte tensor: apart, aligned, and as they would be on their own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lisa_kernels.paging import Entry, SlabLayout
from lisa_kernels.paging.slab import ALIGNMENT

DTYPES = [torch.uint8, torch.int16, torch.bfloat16, torch.float32, torch.int64]

entries = st.lists(
    st.tuples(st.lists(st.integers(0, 20), max_size=3), st.sampled_from(DTYPES)).map(
        lambda drawn: (tuple(drawn[0]), drawn[1])
    ),
    max_size=8,
)


def layout_of(drawn: list[tuple[tuple[int, ...], torch.dtype]]) -> SlabLayout:
    return SlabLayout(Entry(str(number), shape, dtype) for number, (shape, dtype) in enumerate(drawn))


@settings(max_examples=100, deadline=None)
@given(entries)
def test_tensors_of_a_slab_do_not_touch_each_other(drawn: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
    layout = layout_of(drawn)
    slab = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for number, view in enumerate(layout.views(slab).values()):
        view.fill_(number + 1)
    for number, ((shape, dtype), view) in enumerate(zip(drawn, layout.views(slab).values())):
        assert (view.dtype, tuple(view.shape)) == (dtype, shape)
        assert view.is_contiguous()
        assert (view == number + 1).all()
        assert view.storage_offset() * dtype.itemsize % ALIGNMENT == 0


def test_a_slab_is_no_larger_than_its_aligned_tensors() -> None:
    assert layout_of([]).nbytes == 0
    assert layout_of([((), torch.int64)]).nbytes == ALIGNMENT
    assert layout_of([((ALIGNMENT,), torch.uint8), ((ALIGNMENT + 1,), torch.uint8)]).nbytes == 3 * ALIGNMENT


def test_a_slab_that_is_too_short_is_no_slab() -> None:
    """Negative control: the last tensor would reach beyond it."""
    layout = layout_of([((600,), torch.uint8)])
    with pytest.raises(RuntimeError):
        layout.views(torch.zeros(599, dtype=torch.uint8))
