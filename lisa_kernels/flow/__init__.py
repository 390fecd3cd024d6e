"""LaTtE-Flow: a transformer of flow matching whose groups of layers are experts, each for an interval of time.

Source: arXiv 2506.06952. Time t runs from noise, t = 0, to data, t = 1: x_t = (1 − t)·x₀ + t·x₁. Group 0 has the
noisiest interval.

The paper came without code and leaves open what is guessed here: whether a step trains one group or all (one, in turn);
how t is drawn and how long intervals are (uniformly, equal shares of what is drawn); residual attention before or after
the softmax, the form of its gate, and what a group's first layer reuses (before, linear in the embedding of t from
zero, nothing); the form of a layer's scales (1 + a linear map from zero); what guidance leaves the text out with.
Intervals that overlap by a twentieth in training are DiffusionBlocks'; steps of a solver that end at boundaries are
added here.
"""

from lisa_kernels.flow.experts import TimestepExperts
from lisa_kernels.flow.experts_adamw import ExpertsAdamW
from lisa_kernels.flow.intervals import Intervals, Times
from lisa_kernels.flow.path import flow_loss, interpolate
from lisa_kernels.flow.route import Route
from lisa_kernels.flow.routing import Clock, route_model, unroute_model
from lisa_kernels.flow.transformer import FlowShape, FlowTransformer

__all__ = [
    "Clock",
    "ExpertsAdamW",
    "FlowShape",
    "FlowTransformer",
    "Intervals",
    "Route",
    "Times",
    "TimestepExperts",
    "flow_loss",
    "interpolate",
    "route_model",
    "unroute_model",
]
