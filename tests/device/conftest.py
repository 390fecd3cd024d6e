"""Tests of the simulated device run where its driver is preloaded, that is by `make device`, and nowhere else."""

from __future__ import annotations

import ctypes

collect_ignore_glob = [] if hasattr(ctypes.CDLL(None), "sim_drain") else ["test_*.py"]
