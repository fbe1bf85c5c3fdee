"""Runs the runs of a study that are not done, each in a process of its own."""

import collections
import dataclasses
import glob
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from tqdm import tqdm

from distill.study.cell import EXIT_BUSY
from distill.study.manifest import Cell
from distill.train import EXIT_PREEMPTED

_POLL_SECONDS = 0.2


@dataclasses.dataclass
class Outcome:
    """How the runs ended, by name.

    Attributes:
      done: their result is there.
      failed: with the last lines of their log.
      busy: another process has them in hand.
      stopped: by a signal; they are saved and go on when the study is started again.
      signalled: a signal ended the pool; what was waiting was not begun.
    """

    done: list[str] = dataclasses.field(default_factory=list)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    busy: list[str] = dataclasses.field(default_factory=list)
    stopped: list[str] = dataclasses.field(default_factory=list)
    signalled: bool = False


@dataclasses.dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen
    place: dict[str, str]
    log: str
    started: float
    log_start: int  # where this attempt's output begins
    told: bool = False  # to stop


def places(workers: int | None) -> list[dict[str, str]]:
    """What each of the runs at one time has to itself: environment variables.

    NVIDIA GPUs are shared out, and on a machine without them processor cores: two runs of a small
    student on a core each are faster than one after the other on two. Any other accelerator belongs
    to one process.

    Args:
      workers: runs at a time; None = one on each GPU, without GPUs one.

    Raises:
      ValueError: more workers than GPUs, or than cores.
    """
    cards = _cards()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    units, name = (cards, "GPUs") if cards else (cores, "processor cores")
    workers = workers or (len(cards) or 1)
    if workers == 1:
        return [{}]
    if not cards and glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*"):
        raise ValueError(
            f"--workers={workers}: the chips of a TPU host belong to one process; give every host "
            "a part of the runs with --shard."
        )
    if workers > len(units):
        raise ValueError(
            f"--workers={workers}, but there are {len(units)} {name}: give at most so many."
        )
    share = len(units) // workers
    variable = "CUDA_VISIBLE_DEVICES" if cards else "STUDY_CORES"
    return [
        {variable: ",".join(map(str, units[i * share : (i + 1) * share]))} for i in range(workers)
    ]


def _cards() -> list[str]:
    """The NVIDIA GPUs that JAX may use here."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]
    cards = [card.strip() for card in given.split(",") if card.strip()]
    return cards[: cards.index("-1")] if "-1" in cards else cards  # as CUDA reads it


def take_place() -> None:
    """Keeps this process to the cores that `places` gave it; call it before JAX starts."""
    if os.environ.get("STUDY_CORES"):
        os.sched_setaffinity(0, map(int, os.environ["STUDY_CORES"].split(",")))


def run_cells(
    cells: Sequence[Cell],
    command: Callable[[Cell], Sequence[str]],
    log_dir: str,
    workers: int | None = None,
) -> Outcome:
    """Runs them, so many at a time; one that fails does not stop the others.

    SIGTERM and SIGINT are passed on: the runs save and end, and `Outcome.stopped` names them.

    Args:
      cells: the runs, in this order.
      command: the process of each.
      log_dir: where what each one prints goes, `<name>.txt`; a local folder.
      workers: see `places`.
    """
    os.makedirs(log_dir, exist_ok=True)
    idle, running, outcome = places(workers), [], Outcome()
    waiting = collections.deque(cells)
    signals: list[int] = []

    def stop(number, frame):
        del frame
        signals.append(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    bar = tqdm(total=len(cells), unit="run", dynamic_ncols=True, disable=not sys.stderr.isatty())
    try:
        with bar:
            while running or (waiting and not signals):
                while waiting and idle and not signals:
                    cell, place = waiting.popleft(), idle.pop(0)
                    log = os.path.join(log_dir, f"{cell.name}.txt")
                    running.append(_start(cell, command(cell), log, place))
                bar.set_description(", ".join(at.cell.name for at in running)[:80])
                time.sleep(_POLL_SECONDS)
                if signals:
                    for at in running:
                        if not at.told:
                            at.process.send_signal(signal.SIGTERM)
                            at.told = True
                for at in [at for at in running if at.process.poll() is not None]:
                    running.remove(at)
                    idle.append(at.place)
                    if at.process.returncode == EXIT_PREEMPTED and not signals:
                        waiting.append(at.cell)  # somebody else's signal: it goes on
                        continue
                    _note(at, outcome)
                    bar.update()
    finally:
        for at in running:
            at.process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    outcome.signalled = bool(signals)
    return outcome


def _start(cell: Cell, command: Sequence[str], log: str, place: dict[str, str]) -> _Running:
    with open(log, "ab") as file:
        log_start = file.tell()
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**os.environ, **place},
            start_new_session=True,  # Ctrl-C comes to us, and we pass it on
        )  # fmt: skip
    return _Running(cell, process, place, log, time.monotonic(), log_start)


def _note(at: _Running, outcome: Outcome) -> None:
    """Files how a run ended, and says so in a line."""
    name, code = at.cell.name, at.process.returncode
    minutes = (time.monotonic() - at.started) / 60
    if code == 0:
        outcome.done.append(name)
        said = "done"
    elif code == EXIT_BUSY:
        outcome.busy.append(name)
        said = "another process has it in hand"
    elif code in (EXIT_PREEMPTED, -signal.SIGTERM):
        outcome.stopped.append(name)
        said = "stopped"
    else:
        outcome.failed[name] = _end_of(at.log, at.log_start)
        said = f"FAILED with exit status {code}, see {at.log}"
    tqdm.write(f"{name}: {said} ({minutes:.1f} minutes)", file=sys.stderr)


def _end_of(log: str, start: int) -> str:
    """The error, else the last lines, that an attempt printed."""
    with open(log, "rb") as file:
        file.seek(max(start, os.path.getsize(log) - 2000))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").splitlines()
    errors = [line for line in lines if line.startswith("Error")]
    return "\n".join(errors[-1:] or lines[-3:]) or "it printed nothing"
