"""ctrl-C as a wish to stop soon, with everything saved."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Interrupt:
    """Notes the first ctrl-C in `interrupted`, for whoever asks; the second stops at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None

    def __enter__(self) -> Any:
        """Take over SIGINT."""
        self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Give SIGINT back."""
        signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
