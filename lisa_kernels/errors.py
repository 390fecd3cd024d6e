"""The exception type for mistakes in what a user gave, and how names are suggested."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A mistake in what was given; the message says what was given, what is wanted and what to do.

    The command line prints it as one sentence and exits with code 2.
    """


class NotRehearsedError(InputError):
    """A run that may be sound, whose memory only the run itself can tell."""


def unknown_name(what: str, given: str, known: Iterable[str]) -> InputError:
    """Return the error for a misspelt name, naming the nearest known one."""
    choices = sorted(known)
    near = difflib.get_close_matches(given.lower(), choices, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return InputError(f"unknown {what} {given!r}: {hint}Known: {', '.join(choices)}.")
