"""An emulator of the PTX that Triton compiles to: kernels run on NumPy arrays, one element per GPU thread.

It executes machine code meant for a GPU without one, and reports what a GPU would leave undefined: accesses out of
bounds or misaligned, races in shared memory and between programs, barriers that part of a program reaches, reads of
unwritten shared memory. It does not know wgmma, tcgen05 and TMA, the memory model beyond barriers, or time.
"""

from .counters import Counters
from .faults import (
    DivergentBarrierError,
    GlobalRaceError,
    InactiveLaneError,
    MisalignedError,
    OutOfBoundsError,
    PtxError,
    SharedRaceError,
    TrapError,
    UninitialisedReadError,
    UnknownInstructionError,
)
from .lanes import Checks
from .memory import Memory
from .program import Program

__all__ = [
    "Checks",
    "Counters",
    "DivergentBarrierError",
    "GlobalRaceError",
    "InactiveLaneError",
    "Memory",
    "MisalignedError",
    "OutOfBoundsError",
    "Program",
    "PtxError",
    "SharedRaceError",
    "TrapError",
    "UninitialisedReadError",
    "UnknownInstructionError",
]
