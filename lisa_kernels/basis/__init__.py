"""Choose, refresh and track the basis P of a low-rank layer, and carry the moments along when it changes."""

from lisa_kernels.basis.range_finder import first_basis, orthonormal_rows, random_basis, refresh_basis
from lisa_kernels.basis.tracker import BasisTracker, stream_generator
from lisa_kernels.basis.transport import transport_moments

__all__ = [
    "BasisTracker",
    "first_basis",
    "orthonormal_rows",
    "random_basis",
    "refresh_basis",
    "stream_generator",
    "transport_moments",
]
