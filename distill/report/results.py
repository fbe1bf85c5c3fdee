"""Results of evaluations: found, read and named.

An evaluation writes one line per metric value into `results.jsonl`, and a file of predictions per
checkpoint, task and decoder beside it. What cannot be used is noted with its file and line, not an
error: one torn file must not hide the others.
"""

import collections
import dataclasses
import json
import math
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from etils import epath

from distill.results import FILE

TEACHER = "teacher"
VALIDATION, TEST = "validation", "test"
# Of damaged lines of one file, so many are told one by one.
_TOLD = 3


@dataclasses.dataclass(frozen=True)
class Result:
    """One metric's value, as a line of `results.jsonl` has it.

    Attributes:
      run: MODEL_DIR of the student, or `teacher`.
      dataset: that the task is of.
      task: the SeqIO task; None for the teacher.
      split: `validation`, `test` or another.
      metric: name of the value.
      value: of the metric, higher is better.
      key: names the evaluation; of equal (run, key, metric), the last line holds.
      step: updates of the checkpoint; None for the teacher.
      checkpoint: name of its folder.
      decoder: name of the decoding's settings; None for the teacher.
      mixture: that was evaluated.
      n: examples.
      standard_error: of the value over examples.
      low: of the 95 % interval over examples.
    high: of the same.
      parameters: of the student.
      tokens: trained on so far.
      predictions: file of the predictions, relative to the folder of `file`.
      time: of the evaluation, ISO 8601.
      file: the results file that has it.
    """

    run: str
    dataset: str
    task: str | None
    split: str
    metric: str
    value: float
    key: str = ""
    step: int | None = None
    checkpoint: str | None = None
    decoder: str | None = None
    mixture: str | None = None
    n: int | None = None
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    parameters: int | None = None
    tokens: int | None = None
    predictions: str | None = None
    time: str | None = None
    file: str = ""

    @property
    def student(self) -> tuple[str, str]:
        """What is compared: a run, read by a decoder."""
        return self.run, self.decoder or ""


# --- Reading --------------------------------------------------------------------------------------


def find(patterns: Sequence[str]) -> tuple[list[epath.Path], list[str]]:
    """Returns the results files, and a note for each pattern that matched none.

    Args:
      patterns: files, folders that have a `results.jsonl` at any depth, and globs of both.

    Raises:
      FileNotFoundError: there is no results file at all.
    """
    found, notes = {}, []
    for pattern in patterns:
        files = {str(file): file for path in _matches(pattern) for file in _results_in(path)}
        if not files:
            notes.append(f"{pattern}: no {FILE} here")
        found |= files
    if not found:
        raise FileNotFoundError(
            f"No results: looked for {FILE} in {', '.join(patterns)}, and below it in folders. "
            "Give a run's MODEL_DIR, an EVAL_OUTPUT_DIR, the file itself or a glob of them; "
            "scripts/evaluate.py writes it."
        )
    return list(found.values()), notes


def _matches(pattern: str) -> list[epath.Path]:
    path = epath.Path(pattern).expanduser()
    if not any(c in pattern for c in "*?[") or path.exists():
        return [path]
    if "**" in pattern:
        raise ValueError(
            f"{pattern}: `**` is not supported; give the folder before it, which is searched at "
            "any depth."
        )
    root = path
    while any(c in str(root) for c in "*?["):
        root = root.parent
    relative = str(path)[len(str(root)) :].lstrip("/")
    # A glob of files takes the results files among them only.
    return sorted(p for p in root.glob(relative) if p.name == FILE or p.is_dir())


def _results_in(path: epath.Path) -> Iterator[epath.Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        for folder, folders, files in path.walk():
            # A checkpoint has thousands of files and no results.
            folders[:] = sorted(f for f in folders if not f.startswith("checkpoint_"))
            if FILE in files:
                yield folder / FILE


def json_lines(path: epath.Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) and notes what is no JSON object.

    A last line without a line break that does not parse was torn by a writer that was stopped; it
    is not noted.
    """
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    damaged = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError):
            if number < len(lines):
                damaged.append(number)
        else:
            yield number, row
    if damaged:
        notes.append(f"{path}, {_lines(damaged)}: not a JSON object, left out")


def _lines(numbers: Sequence[int]) -> str:
    told = ", ".join(map(str, numbers[:_TOLD]))
    more = f" and {len(numbers) - _TOLD:,} more" if len(numbers) > _TOLD else ""
    return f"line{'s' if len(numbers) > 1 else ''} {told}{more}"


def read(paths: Iterable[epath.Path]) -> tuple[list[Result], list[str]]:
    """Returns the values in all files, students' and teacher's, and notes on what was left out.

    A line replaces an earlier one with the same run, key and metric.
    """
    found: dict[tuple, Result] = {}
    notes: list[str] = []
    for path in paths:
        unusable: dict[str, list[int]] = {}
        for number, row in json_lines(path, notes):
            try:
                result = _result(row, path)
            except ValueError as e:
                unusable.setdefault(str(e), []).append(number)
                continue
            key = result.key or f"{path}:{number}"
            found[result.run, key, result.metric] = result
        notes += [f"{path}, {_lines(n)}: {why}, left out" for why, n in unusable.items()]
    # Every run that is evaluated writes its dataset's teacher.
    once: dict[Any, Result] = {
        (r.dataset, r.split, r.metric, r.n, r.value) if r.run == TEACHER else r: r
        for r in found.values()
    }
    return list(once.values()), notes


def _result(row: dict[str, Any], path: epath.Path) -> Result:
    """Returns the value of a line; ValueError says which field is missing or wrong."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Result):
        value = row.get(field.name)
        if value is None and field.default is not dataclasses.MISSING:
            continue
        kinds = typing.get_args(field.type) or (field.type,)
        kinds += (int,) if float in kinds else ()
        finite = not isinstance(value, float) or math.isfinite(value)
        if isinstance(value, bool) or not isinstance(value, kinds) or not finite:
            raise ValueError(f"{field.name!r} is missing or unusable")
        values[field.name] = value
    result = Result(**values | {"file": str(path)})
    if result.run != TEACHER and result.task is None:
        raise ValueError("'task' is missing")
    if result.run != TEACHER and result.step is None:  # Hugging Face keeps none
        result = dataclasses.replace(result, step=0)
    return result


def shortest_names(paths: Iterable[str]) -> dict[str, str]:
    """Returns, for each path, the fewest of its last parts that no other path ends in.

    >>> shortest_names(["/runs/a/small", "/runs/b/small", "/runs/b/base"]).values()
    dict_values(['a/small', 'b/small', 'base'])
    """
    names = {path: path for path in paths}
    suffixes = {
        path: ["/".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        for path in names
        if (parts := path.rstrip("/").split("/"))
    }
    used = collections.Counter(suffix for own in suffixes.values() for suffix in own)
    return {
        path: next((suffix for suffix in suffixes[path] if used[suffix] == 1), path)
        for path in names
    }
