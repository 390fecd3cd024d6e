"""Traces written by hand."""

from __future__ import annotations

from lisa_kernels.plan.trace import Event, Trace

MB = 10**6


def trace(*changes: tuple[int, int, str, str]) -> Trace:
    """Return a trace of (storage, bytes, category, phase); bytes below 0 are deaths. Operation and module are fixed."""
    return Trace(Event(storage, size, what, phase, "aten.mm.default", "model.layers.3.mlp") for
                 storage, size, what, phase in changes)  # fmt: skip


def sizes(*changes: tuple[int, int]) -> Trace:
    """Return a trace of (storage, bytes)."""
    return trace(*((storage, size, "temporaries", "step 1: forward") for storage, size in changes))


def small_run() -> Trace:
    """Return weights of 100 MB, 60 MB of activations saved in a forward, and a backward that peaks at 190 MB."""
    return trace(
        (1, 100 * MB, "weights", "attach"),
        (2, 40 * MB, "saved activations", "step 1: forward"),
        (3, 20 * MB, "saved activations", "step 1: forward"),
        (4, 30 * MB, "gradients", "step 1: backward"),
        (3, -20 * MB, "saved activations", "step 1: backward"),
        (2, -40 * MB, "saved activations", "step 1: backward"),
        (5, 15 * MB, "optimizer state", "step 1: step"),
        (4, -30 * MB, "gradients", "step 1: step"),
    )
