"""Keeps a run going: starts a command again when it dies or is preempted.

  python scripts/supervise.py python scripts/train.py --gin_file=... --gin.MODEL_DIR=...
  python scripts/supervise.py --local_processes=2 python scripts/train.py ...

With --local_processes=N it starts N processes of the command on this machine, each with
--coordinator_address, --process_count and --process_index. When one dies, all are ended and all
are started again: a run of several processes cannot go on without one. On several hosts start one
supervisor on each, with the same flags. Options stand before the command.

Exit codes of the command that mean something here: 0 done; 2 the user's error, which starting again
would repeat; 75 preempted, with a checkpoint saved; 69 the other processes did not come. All but
0 and 2 lead to another start, after a pause that doubles with every one that brought nothing.
Progress is a newer committed checkpoint in MODEL_DIR, where the command line names one on a local
file system; else a run of --progress_seconds.

Exit codes of the supervisor:
  0    the command is done
  2    a user's error, of the command or of the options here
  70   given up: --max_restarts starts in a row brought no progress
  75   stopped by SIGTERM or SIGINT, and the command saved a checkpoint
  130  stopped by SIGINT otherwise (128 + 2)
  143  stopped by SIGTERM otherwise (128 + 15)

SIGTERM and SIGINT go to every process of the command, once; a second one kills them. Where the
supervisor itself is killed, Linux kills them.

Standard library only: it has to outlive whatever brings down what it watches.
"""

import argparse
import ctypes
import os
import pathlib
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

DONE, USER_ERROR, GAVE_UP, PREEMPTED = 0, 2, 70, 75
MAX_PAUSE = 300  # seconds
POLL = 0.1  # seconds
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--local_processes", type=int, default=1, help="processes of the command to start here")
    add("--max_restarts", type=int, default=5, help="in a row without progress")
    add("--pause", type=float, default=5, help="seconds before the first start without progress")
    add("--progress_seconds", type=float, default=600, help="a run so long is progress, where no "
        "checkpoints can be seen")  # fmt: skip
    add("--grace", type=float, default=30, help="seconds for the others to end after one has died")
    add("--stop_grace", type=float, default=600, help="seconds to save and end after SIGTERM")
    add("command", nargs=argparse.REMAINDER, help="and its arguments")
    options = parser.parse_args(argv)
    if options.command[:1] == ["--"]:
        del options.command[0]
    if not options.command:
        parser.error("no command to run")
    if options.local_processes < 1 or options.max_restarts < 0:
        parser.error("--local_processes must be at least 1, --max_restarts at least 0")
    return options


def say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


# --- Processes ------------------------------------------------------------------------------------


def die_with_parent() -> None:
    """Runs in the child before the command: whatever ends the supervisor ends it too."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


# Looked up here, since a child may not import after the fork.
_prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform.startswith("linux") else None


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(command: Sequence[str], number: int) -> list[subprocess.Popen]:
    """Starts the processes, each the leader of a group of its own.

    Raises:
      OSError: the command cannot be run.
    """
    port, started = free_port(), []
    for index in range(number):
        flags = []
        if number > 1:  # another port each time: the old one may still be taken
            flags = [
                f"--coordinator_address=127.0.0.1:{port}", f"--process_count={number}",
                f"--process_index={index}",
            ]  # fmt: skip
        try:
            started.append(
                subprocess.Popen(
                    [*command, *flags], start_new_session=True, preexec_fn=die_with_parent
                )
            )
        except OSError:
            kill(started)
            raise
    return started


def has_ended(process: subprocess.Popen) -> bool:
    """Whether it has; what it started (tokenisers, loaders) is then ended with it.

    It is not reaped before, so that its number cannot be that of another group by now.
    """
    if process.returncode is not None:
        return True
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    if os.waitid(os.P_PID, process.pid, flags) is None:
        return False
    kill([process])
    return True


def kill(processes: Sequence[subprocess.Popen]) -> None:
    """SIGKILL to the groups of those that have not been reaped, which it then does."""
    for process in processes:
        if process.returncode is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except PermissionError:
                pass  # macOS: the group has only the ended process in it
    for process in processes:
        process.wait()


def describe(codes: Sequence[int]) -> str:
    """`0`, `1: killed by SIGKILL`, ... of every process."""

    def one(code: int) -> str:
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    if len(codes) == 1:
        return one(codes[0])
    return ", ".join(f"process {i}: {one(code)}" for i, code in enumerate(codes))


# --- Progress -------------------------------------------------------------------------------------


def model_dir(command: Sequence[str]) -> pathlib.Path | None:
    """MODEL_DIR as the command line gives it; None where there is none, or a remote one."""
    pattern = re.compile(
        r"--?gin(?:\.|_bindings=)(?:MODEL_DIR|(?:.*\.)?TrainConfig\.model_dir)=(.*)"
    )
    found = None
    for argument in command:
        if match := pattern.fullmatch(argument):
            found = match[1].strip().strip("'\"")
    return pathlib.Path(found).expanduser() if found and "://" not in found else None


def newest_checkpoint(folder: pathlib.Path) -> int:
    """The step of the newest committed checkpoint; -1 where there is none."""
    steps = [-1]
    try:
        for path in folder.iterdir():
            match = re.fullmatch(r"checkpoint_(\d+)", path.name)
            if match and (path / "manifest.json").exists():
                steps.append(int(match[1]))
    except OSError:
        pass  # not there yet
    return max(steps)


# --- The loop -------------------------------------------------------------------------------------


class Supervisor:
    """Runs the command until it is done, hopeless, or told to stop."""

    def __init__(self, options: argparse.Namespace):
        self._options = options
        self._processes: list[subprocess.Popen] = []
        self._signals: list[int] = []
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda number, frame: self._signals.append(number))

    def run(self) -> int:
        """Returns the exit code."""
        options = self._options
        folder = model_dir(options.command)
        failures = 0
        while True:
            before = newest_checkpoint(folder) if folder else -1
            started = time.monotonic()
            try:
                self._processes = start(options.command, options.local_processes)
            except OSError as error:
                say(f"cannot run {options.command[0]}: {error.strerror}")
                return USER_ERROR
            say(f"started {shlex.join(options.command)} ({self._pids()})")
            try:
                codes = self._watch()
            finally:
                kill(self._processes)
            seconds = time.monotonic() - started
            say(f"ended after {seconds:.0f} s: {describe(codes)}")
            if all(code == 0 for code in codes):
                return DONE
            if self._signals:
                saved = PREEMPTED in codes
                return PREEMPTED if saved else 128 + self._signals[0]
            if USER_ERROR in codes:
                say("not started again: exit code 2 is the user's error")
                return USER_ERROR
            now = newest_checkpoint(folder) if folder else -1
            progress = now > before if folder else seconds >= options.progress_seconds
            failures = 0 if progress else failures + 1
            if failures > options.max_restarts:
                say(f"given up: {failures} runs in a row without progress")
                return GAVE_UP
            code = self._pause(failures, f"checkpoint {now}" if now >= 0 else "no checkpoint")
            if code is not None:
                return code

    def _pids(self) -> str:
        pids = [str(process.pid) for process in self._processes]
        return f"process{'es' if len(pids) > 1 else ''} {', '.join(pids)}"

    def _watch(self) -> list[int]:
        """Waits until all processes have ended, and sees to it that they do; their exit codes."""
        deadline, told = None, 0
        while not all([has_ended(process) for process in self._processes]):
            now = time.monotonic()
            if len(self._signals) > told:
                told += 1
                if told > 1:
                    say(f"second {signal.Signals(self._signals[-1]).name}: killing")
                    break
                name = signal.Signals(self._signals[0]).name
                say(f"{name}: passed on, waiting for the command to end")
                for process in self._processes:
                    if not has_ended(process):
                        process.send_signal(self._signals[0])
                deadline = now + self._options.stop_grace
            dead = [i for i, p in enumerate(self._processes) if p.returncode is not None]
            if dead and deadline is None:
                code = self._processes[dead[0]].returncode
                grace = self._options.grace
                if code:
                    say(f"process {dead[0]}: {describe([code])}; the others have {grace:.0f} s")
                deadline = now + (grace if code else self._options.stop_grace)
            if deadline is not None and now > deadline:
                say("killing what is left")
                break
            time.sleep(POLL)
        kill(self._processes)
        return [process.returncode for process in self._processes]

    def _pause(self, failures: int, where: str) -> int | None:
        """Waits before another start; an exit code where a signal came meanwhile."""
        # Jitter, so that the supervisors of many runs do not all come back at once.
        longest = min(MAX_PAUSE, self._options.pause * 2 ** max(0, failures - 1))
        seconds = random.uniform(0.5, 1) * longest if failures else 0.0
        count = f", {failures} of {self._options.max_restarts} without progress" if failures else ""
        say(f"starting again in {seconds:.1f} s ({where}{count})")
        deadline = time.monotonic() + seconds
        while not self._signals:
            if time.monotonic() >= deadline:
                return None
            time.sleep(POLL)
        say(f"{signal.Signals(self._signals[0]).name}: not started again")
        return 128 + self._signals[0]


if __name__ == "__main__":
    sys.exit(Supervisor(parse(sys.argv[1:])).run())
