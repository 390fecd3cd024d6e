"""Sizes of the GPU memory that is sold, and what of it programs see."""

from __future__ import annotations

GIB = 2**30
# What is on the card and no plan sees: CUDA's context, cuBLAS without its workspaces, loaded kernels and the buffers
# inside of them. An allowance, not a measurement: people report 0.3 to 0.6 GB from Ampere on.
CONTEXT_BYTES = 600_000_000
CARDS_GB = (8, 10, 12, 16, 24, 32, 48, 80)
# A card sold as 24 GB has 24 GiB, of which driver and firmware keep 1 to 3 %: torch's messages speak of 7.8 GiB in all
# where 8 were sold, 23.7 of 24, 79.2 of 80. Error correction takes 6 % more of the GDDR cards that have it on.
KEPT_BY_DRIVER = 0.03


def card_bytes(card_gb: int) -> int:
    """Return the bytes that programs see of a card sold as `card_gb` GB."""
    return int(card_gb * GIB * (1 - KEPT_BY_DRIVER))
