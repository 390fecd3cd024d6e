"""ctrl-C as a wish to stop soon, with everything saved."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any


class Interrupt:
    """Notes the first ctrl-C in `interrupted`, for whoever asks; the second stops at once.

    seconds: for so long after the first another one counts as the same, as of a launcher that passes it on.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.interrupted = False
        self._seconds, self._since = seconds, 0.0
        self._previous: Any = None

    def __enter__(self) -> Any:
        """Take over SIGINT."""
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Give SIGINT back."""
        signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.interrupted and now - self._since >= self._seconds:
            raise KeyboardInterrupt
        if not self.interrupted:
            self.interrupted, self._since = True, now
