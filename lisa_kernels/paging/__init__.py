"""Where state lives between uses and when it moves: slabs of bytes, and the stores that keep them.

`paging` knows no optimizer and no model. A `SlabLayout` gives named tensors their places in a byte tensor, so that
they move with one copy; a `Store` keeps such byte tensors as `Page`s, at home between uses and on the device during
them: `take()`, work, `give_back()`.
"""

from __future__ import annotations

from lisa_kernels.paging.slab import Entry, SlabLayout
from lisa_kernels.paging.store import Page, Store
from lisa_kernels.paging.stores import STORES, check_paging, open_store

__all__ = ["STORES", "Entry", "Page", "SlabLayout", "Store", "check_paging", "open_store"]
