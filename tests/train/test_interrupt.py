"""ctrl-C as a wish to stop soon."""

from __future__ import annotations

import os
import signal

import pytest

from lisa_kernels.train.interrupt import Interrupt


def test_the_first_ctrl_c_is_noted_and_the_second_stops_at_once() -> None:
    """And outside of it ctrl-C is what it was."""
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt.interrupted
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.interrupted
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
