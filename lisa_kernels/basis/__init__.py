"""Choose, refresh and track the basis P of a low-rank layer, and carry the moments along when it changes."""

from lisa_kernels.basis.gradients import FactoredGradient, Gradient, ScatteredGradient, SharedGradient
from lisa_kernels.basis.orthonormal import orthonormal_rows
from lisa_kernels.basis.random_rows import RandomRows
from lisa_kernels.basis.range_finder import first_basis, random_basis, refresh_basis
from lisa_kernels.basis.tracker import BasisTracker
from lisa_kernels.basis.transport import transport_many, transport_moments

__all__ = [
    "BasisTracker",
    "FactoredGradient",
    "Gradient",
    "RandomRows",
    "ScatteredGradient",
    "SharedGradient",
    "first_basis",
    "orthonormal_rows",
    "random_basis",
    "refresh_basis",
    "transport_many",
    "transport_moments",
]
