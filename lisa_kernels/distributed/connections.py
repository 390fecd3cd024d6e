"""Connections that end by themselves when the machine at their other end is gone without a word."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The kernel asks after so many seconds of silence, again after so many, and gives up after so many questions.
SILENT_SECONDS, AGAIN_SECONDS, QUESTIONS = 10, 5, 3
# As long as that altogether, where something was on its way.
UNHEARD_SECONDS = SILENT_SECONDS + AGAIN_SECONDS * QUESTIONS
DESCRIPTORS = Path("/proc/self/fd")


@contextmanager
def ending_when_unheard() -> Iterator[None]:
    """Have the TCP connections that are made within fail once their peer was unheard of for `UNHEARD_SECONDS`.

    A machine that lost its power or its cable says no good-bye, and who waits for it would wait for half an hour. A
    peer that is merely slow is heard: its kernel answers. On systems other than Linux nothing changes.
    """
    before = _sockets()
    yield
    for descriptor in (number for name, number in _sockets().items() if name not in before):
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                _watch(connection)


def _watch(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, SILENT_SECONDS), (socket.TCP_KEEPINTVL, AGAIN_SECONDS), (socket.TCP_KEEPCNT, QUESTIONS),
        (socket.TCP_USER_TIMEOUT, 1000 * UNHEARD_SECONDS),
    ):  # fmt: skip
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _sockets() -> dict[str, int]:
    """Return the sockets that this process has open: their names, which no two have in a system's life, and numbers."""
    found = {}
    for entry in DESCRIPTORS.iterdir() if DESCRIPTORS.is_dir() else ():
        try:
            name = os.readlink(entry)
        except OSError:
            # That of the listing itself, or closed meanwhile.
            continue
        if name.startswith("socket:"):
            found[name] = int(entry.name)
    return found
