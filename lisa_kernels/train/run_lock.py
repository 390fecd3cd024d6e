"""One run at a time in a folder."""

from __future__ import annotations

import os
from pathlib import Path

from lisa_kernels.errors import InputError
from lisa_kernels.train.run_folder import RUN_FILE


class RunLock:
    """The right to write into a run's folder, on its run.json: it goes with the process, so none is ever left behind.

    Where the system has no such locks (Windows, some network folders) nothing is refused.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        """Take the lock if there is a run already."""
        self.take()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Give it back."""
        self.release()

    def take(self) -> None:
        """Hold the run.json that is there now, instead of an earlier one; raises InputError if another process does."""
        try:
            import fcntl
        except ImportError:
            return
        self.release()
        try:
            self._descriptor = os.open(self._folder / RUN_FILE, os.O_RDWR)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise InputError(
                f"another process is running in --output {self._folder}; wait for its end, or give another folder."
            ) from None
        except OSError:
            # No run yet, or no locks here; what cannot be written is found by rehearsing to write it.
            self.release()

    def release(self) -> None:
        """Give it back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
