"""What training and evaluation found, kept beside the run: scalars, and one line a result.

`Store` is the tidy table of an evaluation: `results.jsonl` has one line for every value of every
metric, which is what `scripts/report.py` reads:

    {"key": "9f..", "run": "/runs/svamp", "checkpoint": "checkpoint_500", "step": 500,
     "parameters": 76961152, "tokens": 1234567, "mixture": "svamp_step_by_step",
     "dataset": "svamp", "task": "svamp_predict", "split": "test", "decoder": "greedy",
     "metric": "accuracy", "value": 0.41, "n": 200, "standard_error": 0.035, "low": 0.34,
     "high": 0.48, "predictions": "test/svamp_predict-000500.jsonl", "of": 3,
     "time": "2026-11-21T22:50:00Z"}

`key` stands for all that decided the result, and is shared by the `of` lines of one evaluation. A
later result about the same checkpoint, task, split and decoder replaces an earlier one. The lines
of its predictions have the key, too: those of an evaluation that died before it wrote its result
are not taken for those of an earlier one.

Files that grow are only appended to, with one write a result: a process that dies leaves at most
one torn line, which is ignored, and several may write at once. On object stores (gs://), which
cannot append, of two that do one may lose its lines.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from absl import logging
from etils import epath

FILE = "results.jsonl"
# What a result is about; a later one about the same replaces it.
ABOUT = ("run", "checkpoint", "dataset", "task", "split", "decoder")


class Store:
    """The results in a folder."""

    def __init__(self, folder: epath.PathLike):
        self.folder = epath.Path(folder).expanduser()
        self.path = self.folder / FILE

    def lines(self) -> list[dict[str, Any]]:
        """All whole lines, in the order in which they were written."""
        found = []
        for number, text in enumerate(self._text().split("\n"), 1):
            try:
                line = json.loads(text) if text.strip() else None
            except ValueError:
                line = text
            if isinstance(line, dict):
                found.append(line)
            elif line is not None:
                logging.warning("%s:%d is not a result, and is left out", self.path, number)
        return found

    def complete(self) -> dict[str, list[dict[str, Any]]]:
        """The lines of every result that is there as a whole, with its predictions, by key.

        Of results about the same checkpoint, task, split and decoder only the last one is: the
        predictions of the earlier ones have been replaced.
        """
        last: dict[tuple, str] = {}
        by_key: dict[str, dict[str, dict[str, Any]]] = {}
        for line in self.lines():
            key = line.get("key", "")
            last[tuple(line.get(name) for name in ABOUT)] = key
            lines, metric = by_key.setdefault(key, {}), line.get("metric", "")
            if metric in lines:  # computed anew: nothing of the earlier one stays
                lines.clear()
            lines[metric] = line
        found = {key: list(by_key[key].values()) for key in last.values() if key}
        return {key: lines for key, lines in found.items() if self._is_whole(lines)}

    def _is_whole(self, lines: list[dict[str, Any]]) -> bool:
        predictions = lines[0].get("predictions")
        return all(line.get("of") == len(lines) for line in lines) and (
            predictions is None or self._are_of(lines[0]["key"], predictions)
        )

    def _are_of(self, key: str, predictions: str) -> bool:
        """Whether the predictions are there, and this result's."""
        path = self.folder / predictions
        if not path.exists():
            return False
        with path.open("rb") as f:
            first = f.readline()
        try:
            return not first or json.loads(first).get("key") == key  # training may keep none
        except (AttributeError, ValueError):
            return False

    def add(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Appends the lines of one result."""
        text = "".join(json.dumps(finite(line)) + "\n" for line in lines)
        append(self.path, text)

    def _text(self) -> str:
        return self.path.read_text() if self.path.exists() else ""


def append(path: epath.Path, text: str) -> None:
    """Appends whole lines in one write; a torn line at the end stays one of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if "://" in str(path):  # object stores cannot append
        before = path.read_text() if path.exists() else ""
        path.write_text(before + ("\n" if before and not before.endswith("\n") else "") + text)
        return
    content = text.encode()
    # Unbuffered: a buffer would write much text in parts, and other processes in between.
    with open(os.fspath(path), "ab+", buffering=0) as f:
        if f.tell() and os.pread(f.fileno(), 1, f.tell() - 1) != b"\n":
            content = b"\n" + content
        while content:
            content = content[f.write(content) :]
        os.fsync(f.fileno())


def finite(line: Mapping[str, Any]) -> dict[str, Any]:
    """NaN and infinities are no JSON: null."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
    }


def write_lines(path: epath.Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes a file of JSON lines that is there as a whole or not at all."""
    write_text(path, "".join(json.dumps(finite(line), ensure_ascii=False) + "\n" for line in lines))


def write_text(path: epath.Path, text: str) -> None:
    """Writes a file that is there as a whole or not at all."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))  # whatever the locale is


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a file that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if "://" in str(path):  # an object appears when it is complete
        path.write_bytes(content)
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


class MetricWriter:
    """Writes scalars as TensorBoard event files and as JSON lines, one folder a kind.

    `<kind>/events.out.tfevents.*` and `<kind>/metrics.jsonl` under the folder.
    """

    def __init__(self, folder: epath.Path | None):
        """folder: of the run; None writes nothing (all processes but one)."""
        self._folder = folder
        self._boards: dict[str, Any] = {}

    def write(self, kind: str, step: int, scalars: Mapping[str, float]) -> None:
        if self._folder is None:
            return
        # A loss group that is absent has no mean: no point on the board, and null in JSON.
        values = finite(scalars)
        path = self._folder / kind / "metrics.jsonl"
        append(path, json.dumps({"step": step, **values}) + "\n")
        if kind not in self._boards:
            from tensorboardX import SummaryWriter  # no TensorFlow; 2 s to import

            self._boards[kind] = SummaryWriter(str(path.parent))
        for name, value in values.items():
            if value is not None:
                self._boards[kind].add_scalar(name, value, step)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        for board in self._boards.values():
            board.close()
