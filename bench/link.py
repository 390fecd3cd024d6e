"""Two network namespaces with a link between them that is as slow as it is told, as two machines have."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lisa_kernels.errors import InputError

ADDRESSES = ("10.77.0.1", "10.77.0.2")
# What may leave at once, and how long the rest may wait.
BURST, WAIT = "256kb", "50ms"


@dataclass(frozen=True)
class End:
    """One end of the link: its namespace, its device there, and its address."""

    namespace: str
    device: str
    address: str

    def inside(self, words: list[str]) -> list[str]:
        """Return the command that runs `words` there."""
        return ["ip", "netns", "exec", self.namespace, *words]

    def sent_bytes(self) -> int:
        """Return what has left this end since it was made, headers too."""
        path = Path("/sys/class/net") / self.device / "statistics" / "tx_bytes"
        return int(_run(self.inside(["cat", str(path)])))


def _run(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"`{' '.join(words)}` failed ({done.stderr.strip()}); namespaces need root and iproute2.")
    return done.stdout


@contextmanager
def limited_link(rate: str) -> Iterator[tuple[End, End]]:
    """Make two namespaces and a link of this rate each way, such as 1gbit, and take them away again."""
    ends = tuple(End(f"lk-{name}", f"lk-{name}0", address) for name, address in zip("ab", ADDRESSES))
    made = []
    left = [end for end in ends if end.namespace in _run(["ip", "netns", "list"])]
    try:
        for end in left:
            # Of a run that was killed.
            _run(["ip", "netns", "delete", end.namespace])
        for end in ends:
            _run(["ip", "netns", "add", end.namespace])
            made.append(end)
        first, second = ends
        _run(["ip", "link", "add", first.device, "type", "veth", "peer", "name", second.device])
        for end in ends:
            _run(["ip", "link", "set", end.device, "netns", end.namespace])
            for words in (
                ["ip", "addr", "add", f"{end.address}/24", "dev", end.device],
                ["ip", "link", "set", end.device, "up"], ["ip", "link", "set", "lo", "up"],
                ["tc", "qdisc", "add", "dev", end.device, "root", "tbf", "rate", rate, "burst", BURST, "latency", WAIT],
            ):  # fmt: skip
                _run(end.inside(words))
        yield first, second
    finally:
        for end in made:
            _run(["ip", "netns", "delete", end.namespace])


@contextmanager
def unplugged(end: End) -> Iterator[None]:
    """Take the link down at one end, and up again."""
    _run(end.inside(["ip", "link", "set", end.device, "down"]))
    try:
        yield
    finally:
        _run(end.inside(["ip", "link", "set", end.device, "up"]))
