"""Connections made within the block notice a machine that is gone; all others stay as they are."""

from __future__ import annotations

import socket
import sys

import pytest

from lisa_kernels.distributed.connections import UNHEARD_SECONDS, ending_when_unheard

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="open sockets are listed by Linux alone")


def test_what_is_made_within_is_watched() -> None:
    """By the kernel's own questions, within half a minute; a socket of another kind passes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        before = socket.create_connection(server.getsockname())
        with ending_when_unheard():
            within = socket.create_connection(server.getsockname())
            pair = socket.socketpair()
        try:
            assert not before.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert within.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            silent, again, questions = (
                within.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert silent + again * questions == UNHEARD_SECONDS <= 30
            assert within.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1000 * UNHEARD_SECONDS
        finally:
            for each in (before, within, *pair):
                each.close()
