"""The stores by name: "host", "managed" and "file:DIR"; "resident" is none, everything stays on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.paging.file import FileStore
from lisa_kernels.paging.host import HostStore
from lisa_kernels.paging.store import Store

STORES = ("resident", "host", "managed", "file:DIR")


def check_paging(paging: str | None) -> None:
    """Raise InputError unless `paging` names a store, or none: "resident" and None."""
    if paging is None or paging in ("resident", "host", "managed"):
        return
    if not isinstance(paging, str):
        raise InputError(f"paging is {paging!r}; None or one of {', '.join(STORES)} is wanted.")
    kind, _, folder = paging.partition(":")
    if kind != "file":
        raise unknown_name("paging", paging, STORES)
    if not folder:
        raise InputError(f"paging is {paging!r}; name the folder for the pages, as in file:/scratch/pages.")


def open_store(paging: str, identity: Mapping[str, Any]) -> Store:
    """Return the store that `paging` names, ready for pages.

    identity: what tells this run from others, as JSON can hold it; kept with pages that outlive the process. Raises
    InputError for a name that is none, and where the store cannot work here.
    """
    check_paging(paging)
    if paging == "managed":
        # The driver is looked for only where it is asked for.
        from lisa_kernels.paging.managed import ManagedStore

        return ManagedStore()
    return HostStore() if paging == "host" else FileStore(paging.removeprefix("file:"), identity)
