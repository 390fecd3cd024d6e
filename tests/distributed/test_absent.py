"""A process that has no others is one of several for a while, and nothing of that stays."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist

from lisa_kernels.distributed import absent_others
from lisa_kernels.errors import NotRehearsedError


def test_nothing_is_left_behind() -> None:
    """Neither the group nor what torch was told of its meta device, whether the block ends well or not."""
    for error in (None, RuntimeError):
        try:
            with absent_others(3):
                assert dist.get_world_size() == 3
                assert hasattr(torch, "meta")
                if error is not None:
                    raise error
        except RuntimeError:
            assert error is RuntimeError
        assert not dist.is_initialized()
        assert not hasattr(torch, "meta")
        assert "torch.meta" not in sys.modules


def test_who_has_others_is_told() -> None:
    with absent_others(2), pytest.raises(NotRehearsedError, match="before you start several"), absent_others(2):
        pass
