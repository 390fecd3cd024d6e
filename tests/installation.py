"""Commands of the package as they run where other packages are not installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

_PROGRAM = """
import contextlib, io, json, sys, traceback

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.path[:0] = PATH
ABSENT, COMMANDS = json.loads(sys.stdin.read())
sys.meta_path[:] = map(Without, sys.meta_path)
from lisa_kernels.cli import main

answers = []
for argv in COMMANDS:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv) if argv[0] != "exec" else exec(argv[1]) or 0
        except BaseException:
            code = -1
            traceback.print_exc()
    answers.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(answers))
"""


class Answer(NamedTuple):
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str


def run_without(absent: list[str], commands: list[list[str]], folder: Path) -> list[Answer]:
    """Run commands in one new process in `folder`, in which the packages `absent` cannot be found."""
    program = _PROGRAM.replace("PATH", repr([path for path in sys.path if path]), 1)
    run = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps([absent, commands]), cwd=folder, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return [Answer(*answer) for answer in json.loads(run.stdout.splitlines()[-1])]
