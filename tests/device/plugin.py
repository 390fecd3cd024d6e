"""pytest plugin: every test runs on the simulated device, once in the late order and once in a random one.

It fails a test during which a fault is noted.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, _tensor_str

from .simulated import Order, drain, faults, set_order
from .simulation import SimulatedDevice

HERE = Path(__file__).parent
SEEDS = 2**31
ORDERS = ("late", "random")
# Tests that other devices have too look at one operation or optimizer, on one stream: work there has one order whatever
# the seed, and what is too early on the host's side is so in the late order, where the device does nothing before it
# is waited for. Where an optimizer has streams of its own, in pages, `tests/device` has its tests.
ORDERS_OF_ONE_STREAM = ("late",)
_plain_text = _tensor_str._str


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--order-seed", type=int, help="seed of the random order of queued work; by default a new one")
    parser.addoption("--orders", default="eager,late,random", help="run tests in those of their orders that are named")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "order(*names): run a test in these orders only: eager, late, random")
    if config.option.order_seed is None:
        config.option.order_seed = random.randrange(SEEDS)
    # Their kernels exist on a device only: attention's values come from torch's plain operations.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def pytest_report_header(config: pytest.Config) -> str:
    return f"simulated device: late order, and random order of --order-seed {config.option.order_seed}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"random order of --order-seed {terminalreporter.config.option.order_seed}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of tests that other devices have too, keep those on a device; of all, those in the orders that are asked for."""
    wanted = config.option.orders.split(",")
    kept = [item for item in items if HERE in item.path.parents or "cuda" in item.name]
    kept = [item for item in kept if item.callspec.params["order"] in wanted]  # type: ignore[attr-defined]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("order")
    ours = HERE in metafunc.definition.path.parents
    metafunc.parametrize("order", marker.args if marker else ORDERS if ours else ORDERS_OF_ONE_STREAM, indirect=True)


def _text_of(tensor: Tensor, **options: Any) -> str:
    """Return what torch prints: on a device it would run kernels past all modes."""
    if not tensor.is_cuda:
        return _plain_text(tensor, **options)
    with SimulatedDevice():
        text = _plain_text(tensor.detach().cpu(), **options)
    return f"{text[:-1]}, device='{tensor.device}')"


@pytest.fixture(autouse=True)
def order(request: pytest.FixtureRequest) -> Iterator[Order]:
    """The order in which queued work runs during the test."""
    chosen = Order[request.param.upper()]
    # A test has the same order whichever ran before it.
    seed = (request.config.option.order_seed + zlib.crc32(request.node.nodeid.encode())) % SEEDS
    set_order(chosen, seed)
    before = len(faults)
    with SimulatedDevice(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tensor_str, "_str", _text_of)
        yield chosen
    drain()
    set_order(Order.EAGER)
    noted = faults[before:]
    assert not noted, f"{len(noted)} faults on the simulated device, the first: {noted[0]}"
