"""The first ctrl-C is a wish, the second an end; what a launcher passes on at once is the first once more."""

from __future__ import annotations

import signal

import pytest

from lisa_kernels.train.interrupt import Interrupt


def test_a_ctrl_c_that_is_passed_on_is_the_same() -> None:
    """Within the time in which launchers do so, and no later."""
    with Interrupt(seconds=60.0) as interrupt:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert interrupt.interrupted
        interrupt._since -= 61.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_without_a_launcher_the_second_ends() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        assert not interrupt.interrupted
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
