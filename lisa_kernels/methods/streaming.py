"""Resting weights that are at home in host memory or a file and streamed a block at a time, one block ahead."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lisa_kernels.layers import RestingLinear, linear_shape
from lisa_kernels.layers.codes_home import CodesHome
from lisa_kernels.methods.resting import ON_HOST, Kinds
from lisa_kernels.methods.survey import Survey
from lisa_kernels.ops.resting import RestingWeight, code_count, scale_count
from lisa_kernels.paging import Entry, SlabLayout
from lisa_kernels.paging.page_file import PageFile
from lisa_kernels.paging.streamed import StreamedPage, StreamedPages


class InPage:
    """A weight's place in the page of its block."""

    stays = False

    def __init__(self, page: StreamedPage, name: str) -> None:
        self._page, self._codes, self._scales = page, f"{name}.codes", f"{name}.scales"

    @contextmanager
    def lend(self, layer: RestingLinear) -> Iterator[RestingWeight]:
        """Lend what the page's copy on the device has."""
        with self._page.lent(layer.device) as parts:
            yield RestingWeight(
                parts[self._codes], parts[self._scales], layer.kind, layer.out_features, layer.in_features
            )

    def put(self, layer: RestingLinear, weight: RestingWeight, first: int) -> None:
        """Write codes and scales home."""
        start = first * layer.in_features
        self._page.write(self._codes, code_count(start, layer.kind), weight.codes)
        self._page.write(self._scales, scale_count(start), weight.scales)


class StreamedHomes:
    """The homes of all linears of a model's blocks: a page for each block, in host memory or a file of a folder."""

    def __init__(self, survey: Survey, kinds: Kinds, where: str) -> None:
        self.pages = StreamedPages(file=None if where == ON_HOST else PageFile(where))
        self._homes: dict[nn.Module, InPage] = {}
        blocks: dict[int, dict[nn.Module, str]] = defaultdict(dict)
        seen: set[nn.Module] = set()
        for place in [*survey.places(), *kinds.still]:
            inside = place.path.removeprefix(f"{survey.path}.")
            # One in several blocks is in the page of the first.
            if inside != place.path and place.layer not in seen:
                seen.add(place.layer)
                blocks[int(inside.partition(".")[0])][place.layer] = place.path
        for _, paths in sorted(blocks.items()):
            self._make_page(paths, kinds)

    def of(self, layer: nn.Module) -> CodesHome | None:
        """Return the home of a model's own linear; None of one outside of the blocks."""
        return self._homes.get(layer)

    def _make_page(self, paths: Mapping[nn.Module, str], kinds: Kinds) -> None:
        entries: list[Entry] = []
        for layer, path in paths.items():
            rows, columns = linear_shape(layer)
            entries += [
                Entry(f"{path}.codes", (code_count(rows * columns, kinds.of(layer)),), torch.uint8),
                Entry(f"{path}.scales", (scale_count(rows * columns),), torch.uint8),
            ]
        weight = next(iter(paths)).weight
        assert isinstance(weight, Tensor)
        page = self.pages.page(SlabLayout(entries), weight.device)
        self._homes |= {layer: InPage(page, path) for layer, path in paths.items()}
