"""Fixtures that every test may use."""

from __future__ import annotations

import pytest
import torch

# One thread: results do not depend on the machine's cores, and several test runs can share them.
torch.set_num_threads(1)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every kind of device that is present here."""
    return torch.device(request.param)
