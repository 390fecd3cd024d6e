"""A function in a process of its own, for one that has others: shards are rehearsed by a process without."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from lisa_kernels.distributed import environment_of_one
from lisa_kernels.errors import InputError, NotRehearsedError

T = TypeVar("T")
# Modules are found where this process finds them, and nothing beside it is imported.
_CHILD = "import sys; sys.path[:] = {path!r}; from lisa_kernels.plan.apart import answer; answer()"


def run_apart(function: Callable[..., T], *arguments: Any) -> T:
    """Return what a module's function returns, or raise the InputError that it raises, of a process without others.

    Raises NotRehearsedError where that process does not end as it should.
    """
    done = subprocess.run(
        [sys.executable, "-c", _CHILD.format(path=sys.path)], input=pickle.dumps((function, arguments)),
        capture_output=True, env=environment_of_one(), check=False,
    )  # fmt: skip
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise NotRehearsedError(f"the process that rehearses it ended with {done.returncode} ({last}).")
    result = pickle.loads(done.stdout)
    if isinstance(result, InputError):
        raise result
    found: T = result
    return found


def answer() -> None:
    """Run the function that the standard input holds; what it returns or raises is all of the standard output."""
    out = os.dup(1)
    # What libraries say is no part of the answer.
    os.dup2(2, 1)
    function, arguments = pickle.loads(sys.stdin.buffer.read())
    try:
        result = function(*arguments)
    except InputError as error:
        result = error
    with os.fdopen(out, "wb") as file:
        file.write(pickle.dumps(result))
