"""What the emulator reports: one exception class per kind of fault, each naming the line of the Triton source."""

from __future__ import annotations


class PtxError(Exception):
    """A kernel cannot be emulated, or does something that a GPU leaves undefined."""


class UnknownInstructionError(PtxError):
    """The emulator has no meaning for an instruction, a modifier or an operand."""


class OutOfBoundsError(PtxError):
    """An access touches bytes that belong to no buffer."""


class MisalignedError(PtxError):
    """An address is not a multiple of the width of the access."""


class SharedRaceError(PtxError):
    """Two warps touch the same shared byte without a barrier between them, and one of them writes."""


class GlobalRaceError(PtxError):
    """Two programs touch the same global byte in one launch, and one of them writes."""


class DivergentBarrierError(PtxError):
    """A barrier is reached by some of the threads that it waits for."""


class UninitialisedReadError(PtxError):
    """Shared memory is read before it is written."""


class InactiveLaneError(PtxError):
    """A warp instruction takes a value from a lane that does not take part."""


class TrapError(PtxError):
    """The kernel stops itself: a device assertion failed, or it does not end."""
