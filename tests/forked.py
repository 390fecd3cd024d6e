"""Work in a process of its own, which may be killed in the middle of it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable


def in_another_process(work: Callable[[], None], seconds: float | None = None) -> int:
    """Do some work in a process of its own, killed after some time; returns the status with which it ended."""
    process = os.fork()
    if not process:
        try:
            work()
        finally:
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
