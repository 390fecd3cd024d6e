"""LaTtE-Flow: a transformer of flow matching whose groups of layers are experts, each for an interval of time.

Source: arXiv 2506.06952. Time t runs from noise, t = 0, to data, t = 1: x_t = (1 − t)·x₀ + t·x₁. Group 0 has the
noisiest interval.
"""

from lisa_kernels.flow.experts import TimestepExperts
from lisa_kernels.flow.experts_adamw import ExpertsAdamW
from lisa_kernels.flow.intervals import Intervals, Times
from lisa_kernels.flow.route import Route
from lisa_kernels.flow.routing import Clock, route_model, unroute_model

__all__ = [
    "Clock",
    "ExpertsAdamW",
    "Intervals",
    "Route",
    "Times",
    "TimestepExperts",
    "route_model",
    "unroute_model",
]
