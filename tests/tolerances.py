"""Every tolerance of the tests of the definitions, each with where it comes from."""

from __future__ import annotations

import torch

# Half a unit in the last place of float32, relative: 24 significant bits.
FLOAT32_ROUNDING = 2.0**-24
# Half a unit in the last place of bfloat16, relative: 8 significant bits.
BFLOAT16_ROUNDING = 2.0**-8 / 2
# Three mantissa bits: neighbours differ by at most 1/8; nearest errs by at most half of that, stochastic by all of it.
CODEC_NEAREST = 1 / 16
CODEC_STOCHASTIC = 1 / 8
# Scaling into and out of a block costs five float32 roundings (a reciprocal, four products), relative, and what the top
# code decodes to lies four units in the last place above the block's absmax.
CODEC_SCALING = 10 * FLOAT32_ROUNDING
# 4 standard errors: a fair test fails with odds of 6e-5; seeds are fixed, so it fails always or never.
STANDARD_ERRORS = 4.0
# The same for chi-square statistics, in standard deviations √(2k) of k degrees of freedom; the tail is heavier.
CHI_SQUARE_DEVIATIONS = 5.0

# One AdamW step: a weight is rounded three times (decay, product, difference), relative to its size …
ADAMW_WEIGHT = 3 * FLOAT32_ROUNDING
# … and the update nine times (two moments of up to three, root, quotient, two products), relative to itself.
ADAMW_UPDATE = 12 * FLOAT32_ROUNDING
# 100 steps against torch, which rounds as often in another order: both errors twice per step, weights up to 4, updates
# up to lr = 1e-2 (the update's share is small beside the weight's and is covered by rounding 4 up to 5).
ADAMW_100_STEPS = 100 * 2 * ADAMW_WEIGHT * 5
# 800 unsynchronised steps: the design's own figures are 1.5e-3 · 1.7 at worst; a third more for another problem.
TRAJECTORY_NMSE = 2e-3
TRAJECTORY_WORST_UPDATE = 3.0
# A product of up to 512 terms summed in float32 errs by up to 512 roundings of the sum of magnitudes; the bound is
# taken relative to the result's norm, and errors of random signs are √512 ≈ 23 of them.
PRODUCT = 64 * FLOAT32_ROUNDING
# bfloat16 inputs and outputs: each of the up to three roundings on the way is one half unit, relative to the norm.
BFLOAT16_PRODUCT = 3 * BFLOAT16_ROUNDING

# Two passes of Cholesky QR, the last product in float32: |QQᵀ − 1| is a modest multiple (here 50) of a rounding.
ORTHONORMAL = 50 * FLOAT32_ROUNDING
# Of directions that fill a basis up and nearly cancel what it has: they may come out shorter by a few thousandths, less
# than a bfloat16's rounding changes a basis.
FILLED_UP = 2.0**-8
# What a first or refreshed basis keeps of the energy that the exact SVD of the same rank keeps.
BASIS_ENERGY = 0.99
# Transport back and forth through the bias corrections and one product of rank terms.
TRANSPORT = PRODUCT

# What a GPU's update of a weight may differ by from the definition's, relative to itself. The kernel takes m · r · r
# with r = rsqrt(√v + ε): root 2⁻²³, sum 2⁻²⁴ (both halved by r, doubled by its square), twice rsqrt's 2⁻²²·⁹ (errors of
# both instructions from the PTX manual), two products and step_size: 2 + 1 + 4.3 + 3 roundings; the definition's root,
# sum, quotient and step_size are four; the rest is for the root of a subnormal v, which counts as zero.
APPROXIMATE_UPDATE = 15 * FLOAT32_ROUNDING

# The sum of squares of a GPU's tile of 4,096 elements, relative: a square is rounded, passes through 15 sums of its
# thread's 16 and 8 of a tree over the 256 threads, all of them of positive numbers. Tiles are added in float64.
SQUARES_OF_A_TILE = (1 + 15 + 8) * FLOAT32_ROUNDING


def product_of_parts(left: torch.dtype, right: torch.dtype, terms: int) -> float:
    """Return what a GPU kernel's sum of `terms` products may err by, as a share of the sum of their magnitudes.

    Factors that are not both of one 16-bit dtype are taken in bfloat16 parts of 8 bits each, and products of the
    smallest parts are left out: two parts each leave 2⁻¹⁶, three parts of two float32 leave 2⁻²³. The sums of tensor
    cores need not round to nearest: 2⁻²³ for each term.
    """
    if left == right == torch.float32:
        parts = 2.0**-23
    else:
        parts = 0.0 if left == right else 2.0**-16
    return parts + terms * 2.0**-23


# How far a weight of two runs, whose losses take their sums in another order, may be apart, as a share of its way since
# the start. Gradients differ in their last bits; a moment may then be rounded to the neighbouring code (1/16 of itself,
# 1/8 of an update between two runs), and the few elements whose gradient is all rounding noise take whole updates in
# either direction. A step, a slot or a term of the loss that one of the runs lacks differs by the whole way: 1.
ANOTHER_ORDER_OF_SUMS = 0.25
