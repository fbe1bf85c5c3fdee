"""What every benchmark says of itself: where it ran, with what, when, and how it was called."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy")


def about(packages: Sequence[str] = (), device: str | None = None) -> dict[str, Any]:
    """Machine, versions, date and command.

    Args:
      packages: whose versions count here, beside those of VERSIONS.
      device: what computed, where it is not the CPU.
    """
    versions = {"python": platform.python_version()}
    for name in (*VERSIONS, *packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None  # not installed
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "machine": {
            "cpu": _cpu(), "device": device or _cpu(), "system": platform.platform(),
            "cores": len(affinity(0)) if affinity else os.cpu_count(),
        },
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
    }  # fmt: skip


def _cpu() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def clock() -> tuple[float, float]:
    """Wall clock, and the CPU time of all threads of this process, in seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return time.monotonic(), used.ru_utime + used.ru_stime


def peak_rss() -> int:
    """The most memory that this process has held so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def median(values: Sequence[float]) -> float | None:
    """None where nothing was measured."""
    return statistics.median(values) if values else None


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns side by side; numbers to the right, what is None empty."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    lines = [list(head), *([text(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def save(path: str | None, result: dict[str, Any]) -> None:
    """Writes a benchmark's result as JSON, where a file was asked for."""
    if path:
        pathlib.Path(path).write_text(json.dumps(result, indent=1) + "\n")
