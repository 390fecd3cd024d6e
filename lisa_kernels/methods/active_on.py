"""What layers that train compute on beside weights at rest: their codes, or their 16-bit masters."""

from __future__ import annotations

from lisa_kernels.errors import InputError, unknown_name
from lisa_kernels.methods.definitions import Method

CODES, MASTER = "codes", "master"
WAYS = (CODES, MASTER)


def on_masters(active_on: str | None, resting: str | None, method: Method) -> bool:
    """Return whether drawn layers compute on their masters; raises InputError where they cannot as is asked.

    None is "master" for methods that train the weights themselves and "codes" for those that train slots.
    """
    if active_on is not None and active_on not in WAYS:
        raise unknown_name("active_on", active_on, WAYS)
    if resting is None:
        if active_on is not None:
            raise InputError(
                f"active_on={active_on!r} is for weights that rest, and these are in 16 bits always; give resting too, "
                "or leave it out."
            )
        return False
    if method.form == "full" and active_on == CODES:
        raise InputError(
            f"method {method.name!r} trains the weights themselves, which codes cannot; leave active_on out, or use "
            "OwLore."
        )
    if active_on == MASTER and not draws(method):
        raise InputError(
            f"method {method.name!r} trains all layers always: on their masters none would rest; leave active_on out, "
            "or use OwLore."
        )
    return method.form == "full" or active_on == MASTER


def draws(method: Method) -> bool:
    """Return whether a method draws the layers that train, so that others rest meanwhile."""
    return method.around == "language" and method.get("period", None) is not None
