"""What every store promises, and the names of the stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lisa_kernels.errors import InputError
from lisa_kernels.paging import Store, check_paging, open_store

CPU = torch.device("cpu")
N = 5000


@pytest.fixture(params=["host", "file", "managed"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    paging = f"file:{tmp_path / 'pages'}" if request.param == "file" else request.param
    if paging == "managed":
        request.getfixturevalue("paging_managed")
    opened = open_store(paging, {"seed": 1})
    assert opened.kind == request.param
    yield opened
    opened.close()


def content(seed: int) -> Tensor:
    return torch.randint(0, 256, (N,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_a_new_page_is_zeros(store: Store) -> None:
    page = store.page("new", N, CPU)
    page.prefetch()
    assert torch.equal(page.take(), torch.zeros(N, dtype=torch.uint8))


@pytest.mark.parametrize("ahead", [False, True], ids=["taken", "prefetched"])
def test_a_page_comes_back_as_it_was_given(store: Store, ahead: bool) -> None:
    pages = [store.page(f"page-{number}", N, CPU) for number in range(3)]
    for turn in range(3):
        for number, page in enumerate(pages):
            if ahead:
                page.prefetch()
            slab = page.take()
            if turn:
                assert torch.equal(slab, content(10 * turn - 10 + number))
            slab.copy_(content(10 * turn + number))
            page.give_back()
    for number, page in enumerate(pages):
        page.settle()
        assert torch.equal(page.home(), content(20 + number))


def test_taking_twice_gives_the_same_slab_and_giving_back_twice_changes_nothing(store: Store) -> None:
    page = store.page("twice", N, CPU)
    slab = page.take()
    slab.copy_(content(0))
    assert page.take().data_ptr() == slab.data_ptr()
    page.give_back()
    page.give_back()
    assert torch.equal(page.take(), content(0))


def test_pages_of_the_same_sizes_over_and_over_take_no_more_bytes(store: Store) -> None:
    """Layers that leave and layers that come: what the first took serves all."""
    held = []
    for turn in range(50):
        pages = [store.page(f"turn-{turn}-{number}", N + number % 2, CPU) for number in range(4)]
        for page in pages:
            assert not page.take().any()
            page.take().fill_(turn + 1)
            page.give_back()
        held.append(store.nbytes)
        for page in pages:
            page.free()
    assert held == [4 * N + 2] * 50


@pytest.mark.parametrize(
    ("paging", "words"),
    [("hots", "did you mean 'host'"), ("file", "name the folder"), ("file:", "name the folder"), (7, "paging is 7")],
)
def test_a_name_that_is_no_store_is_refused(paging: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_paging(paging)
    with pytest.raises(InputError, match=words):
        open_store(paging, {})


@pytest.mark.parametrize("paging", [None, "resident", "host", "managed", "file:x"])
def test_the_names_of_stores_are_known_without_opening_one(paging: str | None) -> None:
    check_paging(paging)
    assert not Path("x").exists()
