"""Two desktops, tried: a run over a limited link between two network namespaces with a folder each, and what ends it.

    python -m bench.desktops               # needs root; a run that is left alone, and one of each happening

Each desktop has torchrun, one process, a name and a disk of its own. Where something dies, the run is to go on and end
with the very weights of the one that was left alone.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from bench.command import main_of, table_console
from bench.link import ADDRESSES, End, limited_link, unplugged
from lisa_kernels.errors import InputError, unknown_name

PORT, RESTARTS = 29517, 3
NAMES, TEXT = ("desktop-a", "desktop-b"), "text.txt"
# In what a process says that has lost another.
LOST = "another rank is gone"
# A name of the machine's own, and a disk: what its runs write under the common path is seen here alone.
AS_A_MACHINE = 'hostname "$1" && mount --bind "$2" "$3" && shift 3 && exec "$@"'
# Something happens within so many seconds after a step; what went is there again some time later.
STEP, WITHIN_SECONDS, AWAY_SECONDS, UNPLUGGED_SECONDS = 6, 1.0, 5.0, 40.0
GIVEN_UP_SECONDS = 400.0


@dataclass(frozen=True)
class Trial:
    """What happened, and the run's figures; seconds until the other one said so, and until the next step was taken.

    sent_bytes: what left the first desktop, headers too.
    """

    happening: str
    seconds: float
    heard_seconds: float | None
    back_seconds: float | None
    restarts: int
    sent_bytes: int
    bit_equal: bool | None


@dataclass
class Desktop:
    """One of the two: its end of the link, its disk, and what runs there and says."""

    name: str
    end: End
    disk: Path
    process: subprocess.Popen[str] | None = None
    said: list[tuple[float, str]] = field(default_factory=list)

    def start(self, common: Path, words: list[str]) -> None:
        """Start a command there, with the common path on its own disk."""
        inside = ["unshare", "--uts", "sh", "-c", AS_A_MACHINE, "sh", self.name, str(self.disk), str(common), *words]
        told = {"GLOO_SOCKET_IFNAME": self.end.device, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            self.end.inside(inside), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
            env={**os.environ, **told}, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self.said.append((time.monotonic(), line.rstrip()))

    def pids(self) -> list[int]:
        """Return torchrun's and that of the process that it has started."""
        assert self.process is not None
        first = self.process.pid
        children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        return [first, *map(int, children)]

    def when(self, text: str, since: float) -> float | None:
        """Return how many seconds after `since` a line with this text came, or None."""
        return next((moment - since for moment, line in list(self.said) if moment > since and text in line), None)

    def has_stopped(self) -> bool:
        """Return whether nothing runs there any more."""
        return self.process is None or self.process.poll() is not None

    def has_ended(self) -> bool:
        """Return whether the run has ended there. Raises RuntimeError, with what was said, where it ended badly."""
        if self.has_stopped() and self.process is not None and self.process.returncode:
            raise RuntimeError(f"{self.name} ended badly:\n" + "\n".join(line for _, line in self.said))
        return self.has_stopped()

    def end_all(self) -> None:
        """End what runs there, as when the power goes."""
        if self.process is not None and self.process.poll() is None:
            for pid in self.pids():
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()


# Told of the desktops, and how to start one of them again.
Happening = Callable[[list[Desktop], Callable[..., None]], None]


def words_of(number: int, data: Path, output: Path, *more: str) -> list[str]:
    """Return the command of the page on two desktops for the first machine (0) or the second, and a small model."""
    torchrun = (
        f"--nnodes 2 --node-rank {number} --nproc-per-node 1 --master-addr {ADDRESSES[0]} --master-port {PORT} "
        f"--max-restarts {RESTARTS}"
    )
    finetune = (
        "--model preset:small --method owlore --rank 32 --period 3 --device cpu --dtype fp32 --batch-size 4 "
        "--seq-len 64 --steps 14 --save-every 2 --samples 0 --calibration-rows 8"
    )
    places = ["--data", str(data), "--output", str(output)]
    return [
        sys.executable, "-m", "torch.distributed.run", *torchrun.split(), "-m", "lisa_kernels.cli", "finetune",
        *finetune.split(), *places, *more,
    ]  # fmt: skip


def kill_process(number: int) -> Happening:
    """Return what kills the training process of one desktop; its torchrun lives."""

    def kill(desktops: list[Desktop], start: Callable[..., None]) -> None:
        for pid in desktops[number].pids()[1:]:
            os.kill(pid, signal.SIGKILL)

    return kill


def lose_second(desktops: list[Desktop], start: Callable[..., None]) -> None:
    """Take the second desktop's processes away, torchrun too, and start the same command there a little later."""
    desktops[1].end_all()
    time.sleep(AWAY_SECONDS)
    start(1)


def lose_first(desktops: list[Desktop], start: Callable[..., None]) -> None:
    """Take the first desktop's processes away, by which the second's end too, and start both again by hand."""
    desktops[0].end_all()
    _wait_until(lambda: desktops[1].has_stopped(), desktops)
    for number in range(2):
        start(number, "--resume")


def pull_cable(desktops: list[Desktop], start: Callable[..., None]) -> None:
    """Take the link away, without a word to anyone, and give it back."""
    with unplugged(desktops[1].end):
        time.sleep(UNPLUGGED_SECONDS)


HAPPENINGS: dict[str, Happening | None] = {
    "nothing": None,
    "the second's process is killed": kill_process(1),
    "the first's process is killed": kill_process(0),
    "the second's torchrun too, which is started again": lose_second,
    "the first's torchrun too, and both are started again": lose_first,
    "the cable is pulled, and plugged in again": pull_cable,
}


def try_one(happening: str, rate: str, base: Path, seed: int, shard: bool) -> Trial:
    """Run on both desktops, have it happen some time after a step, and see how the run ends.

    shard: they share the weights out, and a disk.
    """
    common, happens = base / "run", HAPPENINGS[happening]
    common.mkdir(exist_ok=True)
    with limited_link(rate) as ends, ExitStack() as stack:
        disks = NAMES[:1] * 2 if shard else NAMES
        desktops = [Desktop(name, end, base / happening / disk) for name, end, disk in zip(NAMES, ends, disks)]

        def start(number: int, *more: str) -> None:
            more = ("--shard", *more) if shard else more
            desktops[number].start(common, words_of(number, base / TEXT, common / "out", *more))

        for number, desktop in enumerate(desktops):
            desktop.disk.mkdir(parents=True, exist_ok=True)
            stack.callback(desktop.end_all)
            start(number)
        begun = moment = time.monotonic()
        if happens is not None:
            _wait_until(lambda: desktops[0].when(f"step {STEP}/", begun) is not None, desktops)
            time.sleep(random.Random(seed).random() * WITHIN_SECONDS)
            moment = time.monotonic()
            happens(desktops, start)
        _wait_until(lambda: all(each.has_ended() for each in desktops), desktops)
        seconds = time.monotonic() - begun
        heard = [each.when(LOST, moment) for each in desktops]
        return Trial(
            happening, seconds, next((each for each in heard if each is not None), None),
            None if happens is None else desktops[0].when("step ", moment),
            sum("took: " in line for _, line in desktops[0].said) - 1, ends[0].sent_bytes(),
            None if happens is None else _equal(*(base / each / NAMES[0] for each in (happening, "nothing"))),
        )  # fmt: skip


def _wait_until(done: Callable[[], bool], desktops: list[Desktop]) -> None:
    end = time.monotonic() + GIVEN_UP_SECONDS
    while not done():
        if time.monotonic() > end:
            said = "\n".join(f"{each.name}: {line}" for each in desktops for _, line in each.said[-12:])
            raise RuntimeError(f"nothing came of it in {GIVEN_UP_SECONDS:.0f} seconds:\n{said}")
        time.sleep(0.05)


def _equal(*disks: Path) -> bool:
    ours, theirs = (load_file(each / "out" / "model.safetensors") for each in disks)
    return ours.keys() == theirs.keys() and all(tensor.equal(theirs[name]) for name, tensor in ours.items())


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--rate", default="1gbit", help="of the link, as tc writes it")
    add("--only", action="append", help="a happening; may be given several times")
    add("--shard", action="store_true", help="the two share the weights out, and a disk")
    add("--seed", type=int, default=0, help="of the moments at which things happen")
    add("--json", action="store_true", help="print rows as JSON")
    add("--debug", action="store_true", help="show where mistakes were found")


def run(arguments: argparse.Namespace, console: Console) -> list[Trial]:
    """Try what was asked for, and print a table."""
    for name in arguments.only or ():
        if name not in HAPPENINGS:
            raise unknown_name("happening", name, HAPPENINGS)
    if os.geteuid():
        raise InputError("network namespaces need root; run it as root, on a machine of your own.")
    chosen = [name for name in HAPPENINGS if not arguments.only or name in (*arguments.only, "nothing")]
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        write_rows(base / TEXT)
        for name in chosen:
            console.print(f"trying: {name}", highlight=False)
            trials.append(try_one(name, arguments.rate, base, arguments.seed, arguments.shard))
    if not arguments.json:
        print_trials(trials, table_console())
    return trials


def write_rows(path: Path) -> None:
    """Write some text that a small model can learn from."""
    draw = random.Random(0)
    words = ("the state of a layer", "is kept in eight bits", "while its basis", "follows the gradient", "of the rows")
    path.write_text("\n".join(" ".join(draw.choices(words, k=6)) + "." for _ in range(400)))


def print_trials(trials: Sequence[Trial], console: Console) -> None:
    """Print what happened and what followed."""
    table = Table(
        "happening", "s in all", "heard after, s", "next step after, s", "restarts", "sent, MB", "weights", box=None
    )
    for trial in trials:
        weights = {None: "", True: "bit-equal", False: "DIFFER"}[trial.bit_equal]
        table.add_row(
            trial.happening, f"{trial.seconds:.1f}", _text(trial.heard_seconds), _text(trial.back_seconds),
            str(trial.restarts), f"{trial.sent_bytes / 1e6:.1f}", weights,
        )  # fmt: skip
    console.print(table)


def _text(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    return main_of("desktops", "Two desktops that train one model, and what ends it.", add_options, run, argv)


if __name__ == "__main__":
    sys.exit(main())
