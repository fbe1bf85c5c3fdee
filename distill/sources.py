"""Where the rows of a dataset come from: files, a generator, the teacher's rationale store.

A *source* gives `Row`s. A row is one input with its gold label, and 0..N `Answer`s of the teacher
to it.

| source            | rows                                                                      |
|-------------------|---------------------------------------------------------------------------|
| `ReleasedLayout`  | the released data of Hsieh et al. 2023: rows and raw completions          |
| `JsonLines`       | any JSON-lines files, by the names of their fields                        |
| `Tfds`            | a prepared TensorFlow dataset                                             |
| `FirstOf`         | those of the first of several sources whose files are there               |
| `WithPool`        | another source's, and unlabeled inputs for training                       |
| `WithRationales`  | another source's, with the answers of a rationale store                   |
| `Configured`      | another source's, with what the run chose: store, then teacher filter     |

What a run may choose about all sources is bound once for the process (`bind`), from gin through
`task.bind`, else from the environment (DISTILL_DATA_DIR, ...). Sources read when they are asked for
rows, so that making one needs no data. Nothing here imports TensorFlow.
"""

import codecs
import collections
import contextvars
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging
from etils import epath

from distill import metrics

EOS_TEXT = "</s>"
HOLDOUT = 0.1
FULL_WEIGHT = 1000  # of a training example, in thousandths
OR = "; or "  # between the places of `FirstOf` where nothing was


# --- Settings ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run chooses about all its sources; None = from the environment, else the default.

    Attributes:
      data_dir: the folder that holds the datasets, local or gs:// (DISTILL_DATA_DIR).
      parsing: how the teacher's completions are read: `reference` (the published rules) or
        `repaired` (DISTILL_PARSING).
      teacher_filter: what becomes of training rows whose teacher label is unparsed or disagrees
        with gold: `keep`, `drop`, `label_only` or `keep_gold` (DISTILL_TEACHER_FILTER).
      rationale_store: a rationale store, whose answers replace those of the sources
        (DISTILL_RATIONALE_STORE).
      max_bad_rows: lines of a JSON-lines file that may be unusable; they are reported and left
        out (DISTILL_MAX_BAD_ROWS).
    """

    data_dir: str | None = None
    parsing: str | None = None
    teacher_filter: str | None = None
    rationale_store: str | None = None
    max_bad_rows: int | None = None


_DEFAULTS = {"parsing": "reference", "teacher_filter": "keep", "max_bad_rows": 0}
_CHOICES = {
    "parsing": ("reference", "repaired"),
    "teacher_filter": ("keep", "drop", "label_only", "keep_gold"),
}
_bound = Settings()


def bind(**values: Any) -> None:
    """Sets fields of `Settings`, once for the whole process; None leaves a field as it is.

    Args:
      **values: fields of `Settings`.

    Raises:
      ValueError: another value is already bound, or the value is not allowed.
    """
    global _bound
    new = dataclasses.replace(_bound)
    for field, value in values.items():
        if value is None:
            continue
        if field in _CHOICES and value not in _CHOICES[field]:
            raise ValueError(
                f"{field.upper()} must be one of {', '.join(_CHOICES[field])}, not {value!r}"
            )
        if field == "max_bad_rows":
            value = _whole_number(field, value)
        old = getattr(_bound, field)
        if old is not None and str(old).rstrip("/") != str(value).rstrip("/"):
            raise ValueError(already_bound(field, old, value))
        new = dataclasses.replace(new, **{field: value if old is None else old})
    _bound = new


def already_bound(field: str, old: Any, new: Any) -> str:
    """Returns the message for a setting that cannot change any more."""
    return (
        f"{field} is already {old!r} and cannot become {new!r}: it is fixed once tasks are "
        f"registered or read. Set it before, with --gin.{field.upper()}=... or "
        f"DISTILL_{field.upper()}, or use another process"
    )


def settings() -> Settings:
    """Returns what is bound, completed from the environment and the defaults.

    What comes from the environment is bound by being asked for.
    """
    missing = {}
    for field in dataclasses.fields(Settings):
        if getattr(_bound, field.name) is None:
            value = os.environ.get(f"DISTILL_{field.name.upper()}") or None
            if value is not None:
                missing[field.name] = value
    bind(**missing)
    unset = {k: v for k, v in _DEFAULTS.items() if getattr(_bound, k) is None}
    return dataclasses.replace(_bound, **unset)


def _whole_number(field: str, value: Any) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,9}", str(value)):
        raise ValueError(f"{field.upper()} must be a whole number, 0 or more, not {value!r}")
    return int(value)


def reset() -> None:
    """Forgets the settings. For tests and notebooks only."""
    global _bound
    _bound = Settings()
    _warn_once.cache_clear()


def _in_data_folder(name: str, relative: str) -> epath.Path:
    """Returns the path of a file or folder that must be in the data folder."""
    fix = "set the folder that holds the datasets with --gin.DATA_DIR=... or DISTILL_DATA_DIR=..."
    folder = settings().data_dir
    if epath.Path(relative).is_absolute():
        path, where = epath.Path(relative), ""
    elif folder is None:
        raise FileNotFoundError(
            f"{name} is read from <data folder>/{relative}, but no data folder is set: {fix}"
        )
    else:
        there = "" if epath.Path(folder).exists() else ", which does not exist"
        path, where = epath.Path(folder) / relative, f" (data folder {folder}{there})"
    if not path.exists():
        raise FileNotFoundError(f"{name}: no file {path}{where}: add it, or {fix}")
    return path


# --- Rows -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the teacher said to one input, once.

    Attributes:
      rationale: its reasoning, None where there is none or it did not parse.
      label: its label, None where there is none or it did not parse.
      weight: of the training examples made of it, in thousandths (1000 = full); the confidence of
        a vote, say.
    """

    rationale: str | None = None
    label: str | None = None
    weight: int = FULL_WEIGHT


@dataclasses.dataclass(frozen=True)
class Row:
    """One example of a dataset.

    Attributes:
      id: unique in the dataset and stable, for example "svamp/train/17".
      input: the text of the problem, without a prefix. A literal `</s>` becomes the EOS id.
      label: the gold label; None for an input from an unlabeled pool.
      answers: of the teacher, in its order; () where it was not asked. An answer that did not
        parse is `Answer()`.
    """

    id: str
    input: str
    label: str | None = None
    answers: tuple[Answer, ...] = ()

    @property
    def rationales(self) -> tuple[Answer, ...]:
        """The answers that have a rationale."""
        return tuple(a for a in self.answers if a.rationale)

    @property
    def teacher(self) -> Answer | None:
        """The teacher's label by a weighted vote over its answers; None where none has one.

        Ties go to the label that was said first. The weight is the mean weight of the answers
        that agree with it. The rationale is that of the first of them.
        """
        votes: dict[str, list[Answer]] = {}
        for answer in self.answers:
            if answer.label:
                votes.setdefault(answer.label, []).append(answer)
        if not votes:
            return None
        won = max(votes.values(), key=lambda same: sum(a.weight for a in same))
        return dataclasses.replace(won[0], weight=round(sum(a.weight for a in won) / len(won)))


class Source(Protocol):
    """Where the rows of a dataset come from: files, or a generator."""

    splits: Sequence[str]

    def rows(self, split: str) -> list[Row]:
        """Returns the rows of a split, always in the same order."""

    def files(self, split: str) -> list[str]:
        """Returns the files that decide the rows, for the cache's fingerprint; [] if generated."""


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """What was read from one split.

    Attributes:
      rows: rows of the split.
      parsed: rows with a teacher label.
      unparsed: rows whose teacher answered without a label that parses. An answer that is a
        rationale alone counts only where other answers have labels: human rationales have none.
      rationales: rows with a rationale.
      teacher_accuracy: of the teacher's labels, a fraction of the rows with a gold label that the
        teacher was asked (unparsed is wrong); None where it gave no label to any of them.
      unlabeled: rows without a gold label.
      notes: what was left out, joined or filtered on the way, one sentence each.
    """

    rows: int
    parsed: int
    unparsed: int
    rationales: int
    teacher_accuracy: float | None
    unlabeled: int = 0
    notes: tuple[str, ...] = ()


def source_report(
    source: Source, split: str, metric_fn: metrics.MetricFn = metrics.label_accuracy
) -> SourceReport:
    """Returns the numbers of one split of any source.

    Args:
      source: gives the rows.
      split: one of its splits.
      metric_fn: scores the teacher's labels, unless the source has a `teacher_metric`.
    """
    notes: list[str] = []
    token = _notes.set(notes)
    try:
        rows = source.rows(split)
    finally:
        _notes.reset(token)
    labels = _gives_labels(rows)
    return SourceReport(
        rows=len(rows),
        parsed=sum(r.teacher is not None for r in rows),
        unparsed=sum(
            bool(r.answers) and r.teacher is None and (labels or not r.rationales) for r in rows
        ),
        rationales=sum(bool(r.rationales) for r in rows),
        teacher_accuracy=_teacher_accuracy(
            rows, getattr(source, "teacher_metric", None) or metric_fn
        ),
        unlabeled=sum(r.label is None for r in rows),
        notes=tuple(dict.fromkeys(notes)),
    )


def _gives_labels(rows: Sequence[Row]) -> bool:
    return any(a.label for r in rows for a in r.answers)


def _teacher_accuracy(rows: Sequence[Row], metric_fn: metrics.MetricFn) -> float | None:
    gold = [r for r in rows if r.label is not None and r.answers]
    if not _gives_labels(gold):
        return None
    said = [r.teacher.label if r.teacher else "" for r in gold]
    return metric_fn([r.label for r in gold], said)["accuracy"]


_notes: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("notes", default=None)


def _note(message: str, warn: bool = False) -> None:
    """Adds a sentence to the report that is being made; a warning is logged too, once."""
    notes = _notes.get()
    if notes is not None:
        notes.append(message)
    elif warn:
        _warn_once(message)


@functools.cache
def _warn_once(message: str) -> None:
    # Each stream of a dataset reads its rows.
    logging.warning("%s", message)


# --- JSON lines -----------------------------------------------------------------------------------

_SHOWN = 5  # unusable lines in a message
# What a line that is not as declared may raise, in the parser or in a function of the dataset.
_UNUSABLE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


@dataclasses.dataclass(frozen=True)
class Line:
    """One usable line.

    Attributes:
      number: in the file, from 1.
      position: among the lines that are not blank, from 0. Unusable ones count, so that what is
        joined by position stays aligned when they are left out.
      value: what was read.
    """

    number: int
    position: int
    value: Any


@dataclasses.dataclass(frozen=True)
class BadLine:
    """One unusable line: its number in the file, from 1, and why."""

    number: int
    reason: str


@dataclasses.dataclass(frozen=True)
class LinesReport:
    """What became of the lines of a file; `lines == used + blank + len(bad)`."""

    path: str
    lines: int
    used: int
    blank: int
    bad: tuple[BadLine, ...] = ()

    def __str__(self) -> str:
        first = "; ".join(f"{self.path}:{b.number}: {b.reason}" for b in self.bad[:_SHOWN])
        more = "; ..." if len(self.bad) > _SHOWN else ""
        return f"{len(self.bad)} unusable of {self.lines} lines: {first}{more}"


def read_json_lines(
    path: epath.PathLike,
    fields: Sequence[str] | Mapping[str, type | tuple[type, ...]],
    make: Callable[[dict[str, Any]], Any] | None = None,
    key: Callable[[Any], Hashable | None] | None = None,
) -> tuple[list[Line], LinesReport]:
    """Returns the usable lines of a JSON-lines file, and what became of all its lines.

    A line is a JSON object in UTF-8; a byte-order mark, CRLF and blank lines are fine. Unusable is
    what Python's `json` would let through and what breaks later too: a field given twice, NaN and
    Infinity, half of a surrogate pair (UTF-8 cannot hold it) and the character NUL.

    Args:
      path: of the file.
      fields: those that every object must have; with types, they are checked.
      make: an object -> the line's value; what it cannot use raises ValueError.
      key: a value -> what no two lines may share; None is not compared.

    Raises:
      ValueError: more lines are unusable than `settings().max_bad_rows`, 0 unless it is set. The
        message names file, line and reason.
    """
    types = fields if isinstance(fields, Mapping) else dict.fromkeys(fields, object)
    allowed = settings().max_bad_rows
    used: list[Line] = []
    bad: list[BadLine] = []
    seen: dict[Hashable, int] = {}
    blank = number = 0
    with epath.Path(path).open("rb") as file:
        # Lines end at \n only: JSON allows U+2028 and others inside strings.
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if not raw.strip():
                blank += 1
                continue
            try:
                value = _json_object(raw.rstrip(b"\r\n"), types)
                value = make(value) if make else value
                same = key(value) if key else None
                if same is not None and seen.setdefault(same, number) != number:
                    raise ValueError(f"{same!r} is given twice, first on line {seen[same]}")
            except _UNUSABLE as e:
                bad.append(BadLine(number, _reason(e)))
                if len(bad) > allowed:
                    raise ValueError(_too_many(path, bad, allowed)) from e
                continue
            used.append(Line(number, len(used) + len(bad), value))
    report = LinesReport(str(path), number, len(used), blank, tuple(bad))
    if bad:
        _note(f"left out {report}", warn=True)
    return used, report


def _json_object(raw: bytes, types: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    value = _parse_json(raw)
    if not isinstance(value, dict):
        raise ValueError(f"a row must be a JSON object, not {type(value).__name__}")
    if missing := [f for f in types if f not in value]:
        raise ValueError(f"the row lacks {', '.join(missing)}; it has {', '.join(value)}")
    _check_types(value, types)
    return value


def _check_types(value: Mapping[str, Any], types: Mapping[str, type | tuple[type, ...]]) -> None:
    for field, allowed in types.items():
        # To Python, True is an int.
        wrong_bool = isinstance(value[field], bool) and allowed is not object
        if not isinstance(value[field], allowed) or wrong_bool:
            kinds = allowed if isinstance(allowed, tuple) else (allowed,)
            raise ValueError(
                f"{field} must be {' or '.join(map(_kind, kinds))}, not {_kind(type(value[field]))}"
            )


def _kind(kind: type) -> str:
    return {str: "text", type(None): "null", dict: "an object", list: "a list"}.get(
        kind, kind.__name__
    )


def _parse_json(raw: bytes) -> Any:
    """Returns the value of strict JSON in UTF-8; ValueError or RecursionError otherwise."""
    text = raw.decode("utf-8")
    value = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    if "\\u" in text:  # Otherwise neither of both can be in it.
        _check_texts(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = next(k for k, n in collections.Counter(k for k, _ in pairs).items() if n > 1)
        raise ValueError(f"the field {twice!r} is given twice")
    return made


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is not a finite number")
    return value


def _check_texts(value: Any) -> None:
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            values += value
        elif isinstance(value, str):
            if "\0" in value:
                raise ValueError("a text has the character NUL")
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as e:
                raise ValueError(
                    f"a text has half of a surrogate pair at character {e.start}, which UTF-8 "
                    "cannot hold"
                ) from e


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} (column {error.colno})"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.reason} at byte {error.start}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return reason if len(reason) <= 300 else f"{reason[:300]}..."


def _too_many(path: epath.PathLike, bad: list[BadLine], allowed: int) -> str:
    last = f"{path}:{bad[-1].number}: {bad[-1].reason}"
    if not allowed:
        return f"{last}. (--gin.MAX_BAD_ROWS=n leaves out up to n such lines and reports them)"
    before = "; ".join(f"line {b.number}: {b.reason}" for b in bad[:-1][:_SHOWN])
    return f"{last}. More than {allowed} unusable lines (MAX_BAD_ROWS); before it: {before}"


# --- The released layout --------------------------------------------------------------------------

# (completion, fields of the row, rationale, label) -> (rationale, label)
Repair = Callable[[str, Mapping[str, Any], str | None, str | None], tuple[str | None, str | None]]


@dataclasses.dataclass(frozen=True)
class ReleasedLayout:
    """A dataset in the layout of the released data of Hsieh et al. 2023.

    `<data_dir>/<name>/<name>_{train,valid,test}.json` are JSON lines, and
    `<name>/llm/{train,valid,test}_CoT_{0,1,..}.json` are JSON lists of the teacher's raw
    completions, aligned with the rows by position. Completions may be absent; the streams that
    need them then say so.

    Attributes:
      name: of the dataset and its folder.
      fields: the fields every row must have.
      example: a row's fields -> (input, label); ValueError for a value that it cannot use.
      parse: a completion -> (rationale, label), None for what it does not contain.
      repairs: applied in turn to what `parse` found, if `settings().parsing` is "repaired". They
        see the completion and the row's fields, and must not look at the gold label.
      holdout: True where the dataset has no valid file: the validation split is then the first
        ceil(n / 10) of `numpy.random.default_rng(0).permutation(n)` over the train file, and
        the train split is the rest, in that order.
      teacher_metric: counts the teacher's labels in a report, where that was published otherwise
        than the dataset's first metric counts.
      check_alignment: refuse completions that are about other rows (`first_misaligned`). False
        for rationales that do not take up words of their input.
      file: of the rows, in the dataset's folder; `{stem}` is train, valid or test.
      read: (path, stem) -> the fields of every row, where the file is not JSON lines.
    """

    name: str
    fields: tuple[str, ...]
    example: Callable[[Mapping[str, Any]], tuple[str, str]]
    parse: Callable[[str], tuple[str | None, str | None]]
    repairs: tuple[Repair, ...] = ()
    holdout: bool = False
    teacher_metric: metrics.MetricFn | None = None
    check_alignment: bool = True
    splits: tuple[str, ...] = ("train", "validation", "test")
    file: str = "{name}_{stem}.json"
    read: Callable[[epath.Path, str], list[Mapping[str, Any]]] | None = None

    def rows(self, split: str) -> list[Row]:
        """Returns the rows of a split.

        Raises:
          FileNotFoundError: the data folder or the file is missing.
          ValueError: a line is not JSON or lacks a field, or the completions do not line up.
        """
        repairs = self.repairs if settings().parsing == "repaired" else ()
        return self._rows(*self._taught(split), split, repairs)

    def files(self, split: str) -> list[str]:
        """Returns the row file and the completion files of a split."""
        stem = self._stem(split)
        return [str(p) for p in (self._path(stem), *self._shards(stem))]

    def _rows(
        self, taught: "list[_Taught]", count: int, split: str, repairs: Sequence[Repair]
    ) -> list[Row]:
        stem, rows = self._stem(split), {}
        for t in taught:
            answers = ()
            if t.completion is not None:
                rationale, label = self.parse(t.completion)
                for repair in repairs:
                    rationale, label = repair(t.completion, t.fields, rationale, label)
                answers = (Answer(rationale or None, label or None),)
            row_id = f"{self.name}/{stem}/{t.position}"
            rows[t.position] = Row(row_id, t.input, t.label, answers)
        return _held_out(rows, count, split) if self.holdout else list(rows.values())

    def _taught(self, split: str) -> "tuple[list[_Taught], int]":
        """Returns the examples behind a split, with their completions, and the file's rows."""
        stem = self._stem(split)
        path = self._path(stem)
        if self.read:
            lines = []
            for i, fields in enumerate(self.read(path, stem)):
                try:
                    lines.append(Line(i + 1, i, self._example(fields)))
                except _UNUSABLE as e:
                    raise ValueError(f"{path}: row {i} of {stem}: {_reason(e)}") from e
            count = len(lines)
        else:
            lines, report = read_json_lines(path, self.fields, self._example)
            count = report.used + len(report.bad)
        completions = self._completions(stem, count, path)
        taught = [
            _Taught(line.position, *line.value, completions and completions[line.position])
            for line in lines
        ]
        if completions and self.check_alignment:
            said = [self.parse(t.completion)[0] or "" for t in taught]
            row = first_misaligned([t.input for t in taught], said)
            if row is not None:
                line = lines[row]
                raise ValueError(
                    f"{self.name}: the teacher's completions belong to other rows, from about row "
                    f"{line.position} ({path}:{line.number}) on. Its input begins "
                    f"{taught[row].input[:60]!r}, and its completion {said[row][:60]!r}. They are "
                    "joined by position: is a completion missing, or a file in another order? Get "
                    "both files from the same release. (check_alignment=False, for rationales "
                    "that do not take up words of their input)"
                )
        return taught, count

    def _example(self, fields: Mapping[str, Any]) -> tuple[Mapping[str, Any], str, str]:
        text, label = self.example(fields)
        if not isinstance(text, str) or not isinstance(label, str):
            raise ValueError(f"input and label must be text, got {text!r}, {label!r}")
        return fields, text, label

    def _stem(self, split: str) -> str:
        _check_split(self.name, split, self.splits)
        if split == "validation":
            return "train" if self.holdout else "valid"
        return split

    def _path(self, stem: str) -> epath.Path:
        file = self.file.format(name=self.name, stem=stem)
        return _in_data_folder(self.name, f"{self.name}/{file}")

    def _shards(self, stem: str) -> list[epath.Path]:
        folder, shards = self._path(stem).parent / "llm", []
        while (shard := folder / f"{stem}_CoT_{len(shards)}.json").exists():
            shards.append(shard)
        return shards

    def _completions(self, stem: str, rows: int, path: epath.Path) -> list[str] | None:
        """Returns one completion for each row, or None where there are no completion files."""
        shards = self._shards(stem)
        if not shards:
            return None
        completions, seen = [], []
        for shard in shards:
            part = read_json(shard)
            if not isinstance(part, list) or not all(isinstance(c, str) for c in part):
                raise ValueError(f"{shard}: must be a JSON list of strings, one for each row")
            completions += part
            seen.append(f"{shard} ({len(part)})")
        if len(completions) != rows:
            raise ValueError(
                f"{self.name}: {len(completions)} completions for {rows} rows of {path}; they are "
                f"joined by position, so the numbers must agree. Read: {', '.join(seen)}. Is a "
                "file missing or from another version of the data?"
            )
        return completions


@dataclasses.dataclass(frozen=True)
class _Taught:
    """A row of the released layout before its completion is parsed."""

    position: int
    fields: Mapping[str, Any]
    input: str
    label: str
    completion: str | None


def read_json(path: epath.PathLike) -> Any:
    """Returns the value of a JSON file, as strictly as `read_json_lines`.

    Raises:
      ValueError: the file is not such JSON.
    """
    path = epath.Path(path)
    try:
        return _parse_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}:{e.lineno}: {_reason(e)}") from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: {_reason(e)}") from e


def _check_split(name: str, split: str, splits: Sequence[str]) -> None:
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(splits)}")


def _held_out(rows: Mapping[int, Row], count: int, split: str) -> list[Row]:
    """Returns the train or validation part of a train file.

    Args:
      rows: by their position in the file.
      count: of positions, also of unusable rows: leaving one out moves no other between splits.
      split: train or validation; of any other, all rows.
    """
    order = np.arange(count)
    if split in ("train", "validation"):
        order = np.random.default_rng(0).permutation(count)
        cut = math.ceil(HOLDOUT * count)
        order = order[:cut] if split == "validation" else order[cut:]
    return [rows[i] for i in order.tolist() if i in rows]


def repair_gains(
    source: Source, split: str, metric_fn: metrics.MetricFn = metrics.label_accuracy
) -> list[tuple[str, int, float | None]]:
    """Returns (name, unparsed, accuracy) of the published rules and after each repair in turn.

    Args:
      source: a `ReleasedLayout`, or a source made of one; for others the list is empty.
      split: one of its splits.
      metric_fn: scores the teacher's labels, unless the layout has a `teacher_metric`.
    """
    layout = source
    while not isinstance(layout, ReleasedLayout):
        if isinstance(layout, Configured) and settings().rationale_store:
            return []  # The completions are not used.
        layout = layout.first(split) if isinstance(layout, FirstOf) else layout
        layout = getattr(layout, "source", layout)
        if not isinstance(layout, ReleasedLayout | FirstOf) and not hasattr(layout, "source"):
            return []
    taught, size = layout._taught(split)
    gains = []
    for count in range(len(layout.repairs) + 1):
        rows = layout._rows(taught, size, split, layout.repairs[:count])
        gains.append(
            (
                layout.repairs[count - 1].__name__ if count else "reference",
                sum(bool(r.answers) and r.teacher is None for r in rows),
                _teacher_accuracy(rows, layout.teacher_metric or metric_fn),
            )
        )
    return gains


# A word is rare if at most this fraction of the inputs has it.
_COMMON = 0.1
_WINDOW = 50  # judged rows
_LEAST = 20  # judged rows; fewer say too little
_MARGIN = 0.1


def first_misaligned(inputs: Sequence[str], rationales: Sequence[str]) -> int | None:
    """Returns about where rationales stop being about their own inputs; None if they are.

    A rationale takes up the rare words of its input. A row's margin is the share of its
    rationale's rare words, weighted by the log of their rarity, that its own input has, minus the
    mean share that the two inputs beside it have. Rows whose rationale has no rare word of any
    input (another language, numbers) are not judged. The mean margin over 50 judged rows must be
    0.1. On the six released files that come with completions it is, over all windows:

    | completions         | cqa             | svamp           | e-SNLI          |
    |---------------------|-----------------|-----------------|-----------------|
    | as released         | 0.275 and more  | 0.656 and more  | 0.305 and more  |
    | shuffled            | 0.012 and less  | 0.016 and less  | 0.024 and less  |
    | shifted by one      | -0.125 and less | -0.331 and less | -0.041 and less |
    | shifted by two      | 0.014 and less  | 0.038 and less  | 0.069 and less  |

    (e-SNLI has three rows with each premise.) Two rows that changed places are not found.

    Args:
      inputs: of all rows.
      rationales: of the same rows, "" where there is none.
    """
    words = [set(re.findall(r"\w+", text.lower())) for text in inputs]
    counts = collections.Counter(word for some in words for word in some)
    most = max(1, _COMMON * len(words))
    rarity = {w: math.log(len(words) / n) for w, n in counts.items() if n <= most}
    judged, margins = [], []
    for i, rationale in enumerate(rationales):
        said = {w: rarity[w] for w in re.findall(r"\w+", rationale.lower()) if w in rarity}
        if not said:
            continue
        own, before, after = (
            sum(r for w, r in said.items() if w in words[j])
            for j in (i, i - 1, (i + 1) % len(words))
        )
        judged.append(i)
        margins.append((own - (before + after) / 2) / sum(said.values()))
    ends = list(range(_WINDOW, len(judged), _WINDOW))
    ends[-1:] = [len(judged)]  # The last window has the rest too.
    if len(judged) < _LEAST:
        return None
    for start, end in zip([0, *ends], ends, strict=False):
        if np.mean(margins[start:end]) < _MARGIN:
            # Where the running sum stops rising, which may be in the window before.
            start = max(0, start - _WINDOW)
            risen = np.cumsum(np.subtract(margins[start:end], _MARGIN))
            return judged[start + int(np.argmax([0, *risen]))]
    return None


# --- Declared fields: JSON lines and TensorFlow datasets ------------------------------------------

# The name of a field, or a function of all fields of a row.
Field = str | Callable[[Mapping[str, Any]], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Declared:
    """A source whose rows are made of declared fields; its user names files or a builder.

    Every field is given by its name, or as a function of a row's fields.

    Attributes:
      input: the text of the problem.
      label: the gold label; None for data without labels.
      rationale: a text, a list of texts (several answers), or null; a row may lack the field.
      teacher_label: the label that the rationale leads to, in the same forms; one text holds for
        all rationales of a row. None where the rationales are a human's, who was shown the gold
        label: they train `explain`, and there is no `_llm` variant.
      id: unique in its file; without it, the position in the file identifies a row.
      holdout: take the validation split out of the train split, as in `ReleasedLayout`.
    """

    input: Field
    label: Field | None = None
    rationale: Field | None = None
    teacher_label: Field | None = None
    id: Field | None = None
    holdout: bool = False

    def rows(self, split: str) -> list[Row]:
        """Returns the rows of a split, in the order of the data.

        Raises:
          FileNotFoundError: the data is not there.
          ValueError: a row is not as declared.
        """
        rows, count = self._read(self._stem(split))
        return _held_out(rows, count, split) if self.holdout else list(rows.values())

    @property
    def splits(self) -> tuple[str, ...]:
        given = self._given()
        if not self.holdout:
            return tuple(given)
        return "train", "validation", *(s for s in given if s != "train")

    def __post_init__(self):
        given = self._given()
        allowed = ("train", "test") if self.holdout else ("train", "validation", "test")
        if unknown := [s for s in given if s not in allowed]:
            why = " (holdout=True makes validation out of train)" if self.holdout else ""
            raise ValueError(
                f"{self.name}: no split may be named {', '.join(unknown)}; allowed are "
                f"{', '.join(allowed)}{why}"
            )

    def _stem(self, split: str) -> str:
        _check_split(self.name, split, self.splits)
        return "train" if self.holdout and split == "validation" else split

    def _required(self) -> list[str]:
        return [f for f in (self.input, self.label, self.id) if isinstance(f, str)]

    def _example(self, fields: Mapping[str, Any]) -> tuple[str | None, str, str | None, tuple]:
        """Returns (id, input, label, answers) of a row's fields."""
        row_id = None if self.id is None else _value(fields, self.id)
        wrong = isinstance(row_id, bool) or not isinstance(row_id, str | int)
        if self.id is not None and wrong:
            raise ValueError(f"an id must be text or a whole number, not {row_id!r}")
        text = _text(_value(fields, self.input), "input")
        label = None if self.label is None else _text(_value(fields, self.label), "label")
        return (None if row_id is None else str(row_id)), text, label, self._answers(fields)

    def _answers(self, fields: Mapping[str, Any]) -> tuple[Answer, ...]:
        rationales = self._samples(fields, self.rationale, "rationale")
        labels = self._samples(fields, self.teacher_label, "teacher_label")
        if len(labels) == 1:
            labels *= max(1, len(rationales))
        rationales = rationales or [None] * len(labels)
        labels = labels or [None] * len(rationales)
        if len(rationales) != len(labels):
            raise ValueError(
                f"{len(rationales)} rationales and {len(labels)} teacher labels; give as many, or "
                "one label for all"
            )
        return tuple(Answer(r, said) for r, said in zip(rationales, labels, strict=True))

    def _samples(
        self, fields: Mapping[str, Any], field: Field | None, what: str
    ) -> list[str | None]:
        """Returns the texts of a field that may be absent, a text or a list."""
        if field is None or (isinstance(field, str) and field not in fields):
            return []
        value = _value(fields, field)
        values = list(value) if isinstance(value, list | tuple) else [value]
        if wrong := [v for v in values if not isinstance(v, str | None)]:
            raise ValueError(f"{what} must be text, a list of texts or null, not {wrong[0]!r}")
        if values == [None]:
            return []
        return [v or None for v in values]

    def _row(self, stem: str, position: int, example: tuple) -> Row:
        row_id, text, label, answers = example
        row_id = f"{stem}/{position}" if row_id is None else row_id
        return Row(f"{self.name}/{row_id}", text, label, answers)


def _value(fields: Mapping[str, Any], field: Field) -> Any:
    return fields[field] if isinstance(field, str) else field(fields)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"the {what} must be text that is not empty, not {value!r} (declare a function of the "
            "row's fields where it needs to be made)"
        )
    return value


@dataclasses.dataclass(frozen=True)
class JsonLines(_Declared):
    """Rows of JSON-lines files, one for each split.

        JsonLines(
            "reviews",
            {"train": "reviews/train.jsonl", "test": "reviews/test.jsonl"},
            input="text", label="sentiment", rationale="why", teacher_label="teacher_says",
            holdout=True,
        )

    Attributes:
      name: of the dataset; the ids of its rows begin with it.
      paths: split (train, validation, test) -> file, absolute or relative to the data folder.
    """

    name: str
    paths: Mapping[str, str]

    def files(self, split: str) -> list[str]:
        """Returns the file behind a split."""
        return [str(_in_data_folder(self.name, self.paths[self._stem(split)]))]

    def _given(self) -> Sequence[str]:
        return tuple(self.paths)

    def _read(self, stem: str) -> tuple[dict[int, Row], int]:
        path = _in_data_folder(self.name, self.paths[stem])
        seen: set[str] = set()

        def example(fields):
            seen.update(fields)
            return self._example(fields)

        lines, report = read_json_lines(path, self._required(), example, key=lambda made: made[0])
        for what in ("rationale", "teacher_label"):
            field = getattr(self, what)
            if stem == "train" and lines and isinstance(field, str) and field not in seen:
                raise ValueError(
                    f"{path}: no row has the field {field!r}, which {self.name} declares as its "
                    f"{what}; the rows have {', '.join(sorted(seen))}"
                )
        rows = {line.position: self._row(stem, line.position, line.value) for line in lines}
        return rows, report.used + len(report.bad)


@dataclasses.dataclass(frozen=True)
class Tfds(_Declared):
    """Rows of a prepared TensorFlow dataset, in TFRecord or ArrayRecord files.

    It is looked for in `<data_dir>`, in `<data_dir>/tfds`, then where TFDS prepares by default
    ($TFDS_DATA_DIR, ~/tensorflow_datasets); nothing is downloaded. Texts come as str, sequences as
    lists. The order is that of the prepared files.

    Attributes:
      name: of the dataset; the ids of its rows begin with it.
      builder: such as "gsm8k", "anli/r1" or "anli/r1:0.1.0"; without a version, the newest.
      from_splits: split (train, validation, test) -> a split of the builder.
    """

    name: str
    builder: str
    from_splits: Mapping[str, str]

    def files(self, split: str) -> list[str]:
        """Returns the files behind a split."""
        builder = self._open()
        info = builder.info.splits[self.from_splits[self._stem(split)]]
        about = [builder.data_path / name for name in ("dataset_info.json", "features.json")]
        return [str(path) for path in (*about, *info.filepaths)]

    def _given(self) -> Sequence[str]:
        return tuple(self.from_splits)

    def _read(self, stem: str) -> tuple[dict[int, Row], int]:
        builder, split = self._open(), self.from_splits[stem]
        rows, ids = {}, set()
        for position, raw in enumerate(_tfds_examples(builder, split)):
            try:
                fields = {key: _plain(value) for key, value in raw.items()}
                row = self._row(stem, position, self._example(fields))
                if row.id in ids:
                    raise ValueError(f"the id {row.id!r} is given twice")
            except _UNUSABLE as e:
                where = f"{builder.data_path}: example {position} of {split}"
                raise ValueError(f"{self.name}: {where}: {_reason(e)}") from e
            ids.add(row.id)
            rows[position] = row
        return rows, len(rows)

    def _open(self) -> Any:
        """Returns the builder of the prepared files, which needs no code of the dataset."""
        folder = self._folder()
        import tensorflow_datasets as tfds  # Slow, and it needs TensorFlow.

        return tfds.builder_from_directory(folder)

    def _folder(self) -> epath.Path:
        path, _, wanted = self.builder.partition(":")
        data_dir = settings().data_dir
        roots = [epath.Path(data_dir), epath.Path(data_dir) / "tfds"] if data_dir else []
        default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        for root in (*roots, epath.Path(default).expanduser()):
            folder = root / path
            versions = [
                version
                for version in (folder.iterdir() if folder.exists() else ())
                if re.fullmatch(r"\d+\.\d+\.\d+", version.name)
                and wanted in ("", version.name)
                and (version / "dataset_info.json").exists()
            ]
            if versions:
                return max(versions, key=lambda v: [int(n) for n in v.name.split(".")])
        to = data_dir or default
        name, _, config = path.partition("/")
        raise FileNotFoundError(
            f"{self.name}: no TensorFlow dataset {self.builder} in "
            f"{', '.join(map(str, (*roots, default)))}. Prepare it with `tfds build {name}"
            f"{f' --config={config}' if config else ''} --data_dir={to}` (needs apache-beam), or "
            f'with `python -c "import tensorflow_datasets as t; t.builder({path!r}, '
            f'data_dir={str(to)!r}).download_and_prepare()"`'
        )


def _tfds_examples(builder: Any, split: str) -> Any:
    """Yields the examples of a split in the order of the files, whatever their format."""
    import tensorflow_datasets as tfds

    if builder.info.file_format.value == "array_record":
        return iter(builder.as_data_source(split))
    # One file after the other; by default TFDS interleaves sixteen of them.
    config = tfds.ReadConfig(
        interleave_cycle_length=1, interleave_block_length=1, try_autocache=False
    )
    dataset = builder.as_dataset(split=split, shuffle_files=False, read_config=config)
    return tfds.as_numpy(dataset)


def _plain(value: Any) -> Any:
    """Returns bytes as str, arrays as lists, numpy's scalars as Python's."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


# --- Composition ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FirstOf:
    """For each split, the first of several sources whose files are there.

    Attributes:
      sources: in the order of preference; they name the same dataset.
    """

    sources: tuple[Source, ...]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(s for source in self.sources for s in source.splits))

    @property
    def teacher_metric(self) -> metrics.MetricFn | None:
        found = (getattr(s, "teacher_metric", None) for s in self.sources)
        return next((fn for fn in found if fn), None)

    def first(self, split: str) -> Source:
        """Returns the source that is used for a split.

        Raises:
          FileNotFoundError: none has its files; the message says what was looked for in each.
        """
        absent = []
        for source in self.sources:
            if split not in source.splits:
                continue
            try:
                source.files(split)
                return source
            except FileNotFoundError as e:
                absent.append(str(e))
        if not absent:
            raise ValueError(f"no split {split!r}; there are {', '.join(self.splits)}")
        raise FileNotFoundError(OR.join(absent))

    def rows(self, split: str) -> list[Row]:
        return self.first(split).rows(split)

    def files(self, split: str) -> list[str]:
        return self.first(split).files(split)


@dataclasses.dataclass(frozen=True)
class WithPool:
    """A source whose training rows are followed by inputs without a gold label.

    Attributes:
      source: gives the labeled rows, and all of validation and test.
      pool: its train rows are added, without their labels, whether they have some or not.
    """

    source: Source
    pool: Source

    @property
    def splits(self) -> Sequence[str]:
        return self.source.splits

    @property
    def teacher_metric(self) -> metrics.MetricFn | None:
        return getattr(self.source, "teacher_metric", None)

    def rows(self, split: str) -> list[Row]:
        """Returns the rows of a split.

        Raises:
          ValueError: an id of the pool is one of the source's.
        """
        rows = self.source.rows(split)
        if split != "train":
            return rows
        pool = [dataclasses.replace(row, label=None) for row in self.pool.rows("train")]
        if taken := {r.id for r in rows} & {r.id for r in pool}:
            raise ValueError(
                f"the pool has the id {min(taken)!r}, which a row has too: give the pool's source "
                "another name"
            )
        _note(f"{len(pool)} rows come from an unlabeled pool")
        return rows + pool

    def files(self, split: str) -> list[str]:
        return [*self.source.files(split), *(self.pool.files("train") if split == "train" else ())]


# --- The rationale store --------------------------------------------------------------------------

STORE_SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class StoreRecord:
    """One answer of a teacher, one line of a rationale store; all fields must be there.

    A store is JSON lines. The version of this schema is in every line, as `"schema": 1`, so that
    stores can be joined and cut by lines.

    Attributes:
      id: of the row, text: `Row.id`, such as "svamp/train/17".
      input_sha256: of the row's input, text: `input_sha256(row.input)`. Never null: it tells
        whether the teacher saw the input that a student trains on.
      sample: which answer to this input it is, a whole number from 0.
      rationale: text; null where the completion did not parse or has none.
      label: text; null where the completion did not parse or has none.
      confidence: a number in [0, 1], the weight of the examples made of it; null counts as 1.
      provenance: an object that says how the answer was made (model, prompt, parameters, time);
        its fields are the writer's, it may be empty and is never null.
    """

    id: str
    input_sha256: str
    sample: int = 0
    rationale: str | None = None
    label: str | None = None
    confidence: float | None = None
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        _check_types(vars(self), _STORE_TYPES)
        if not self.id:
            raise ValueError("id must not be empty")
        if not re.fullmatch("[0-9a-f]{64}", self.input_sha256):
            raise ValueError(
                f"input_sha256 must be 64 hexadecimal digits, not {self.input_sha256!r}"
            )
        if self.sample < 0:
            raise ValueError(f"sample must be 0 or more, not {self.sample}")
        if self.confidence is not None and not 0 <= self.confidence <= 1:
            raise ValueError(f"confidence must be in [0, 1] or null, not {self.confidence!r}")

    @property
    def answer(self) -> Answer:
        """The answer as sources give it."""
        weight = FULL_WEIGHT if self.confidence is None else round(FULL_WEIGHT * self.confidence)
        return Answer(self.rationale or None, self.label or None, weight)


_STORE_TYPES = {
    "id": str,
    "input_sha256": str,
    "sample": int,
    "rationale": (str, type(None)),
    "label": (str, type(None)),
    "confidence": (int, float, type(None)),
    "provenance": dict,
}


def input_sha256(text: str) -> str:
    """Returns the SHA-256 of an input's UTF-8 bytes, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def read_store(path: epath.PathLike) -> list[StoreRecord]:
    """Returns the records of a rationale store, in the order of the file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is no record, or two have the same id and sample; see `read_json_lines`.
    """

    def record(fields):
        if fields["schema"] != STORE_SCHEMA:
            raise ValueError(
                f"the record has schema {fields['schema']!r}; this version reads {STORE_SCHEMA}"
            )
        if unknown := [f for f in fields if f not in ("schema", *_STORE_TYPES)]:
            raise ValueError(
                f"unknown field {', '.join(unknown)}; a record has {', '.join(_STORE_TYPES)}"
            )
        return StoreRecord(**{f: fields[f] for f in _STORE_TYPES})

    lines, _ = read_json_lines(
        path, {"schema": int, **_STORE_TYPES}, record, key=lambda r: (r.id, r.sample)
    )
    return [line.value for line in lines]


def write_store(path: epath.PathLike, records: Sequence[StoreRecord]) -> None:
    """Writes a rationale store; who reads it finds the old file or the new one, never a part.

    Raises:
      ValueError: two records have the same id and sample, or one holds what JSON in UTF-8 cannot.
    """
    twice = collections.Counter((r.id, r.sample) for r in records)
    if twice and max(twice.values()) > 1:
        raise ValueError(f"two records have (id, sample) = {twice.most_common(1)[0][0]}")
    path = epath.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for record in records:
                fields = {"schema": STORE_SCHEMA, **dataclasses.asdict(record)}
                line = json.dumps(fields, ensure_ascii=False, allow_nan=False)
                file.write(line.encode("utf-8") + b"\n")
            file.flush()
            if "://" not in str(path):  # An object store commits when the file is closed.
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class WithRationales:
    """A source with the answers of a rationale store in place of its own, joined by id.

    Several records of an id become several answers, in the order of their `sample`. Rows that the
    store does not have were not asked. The store may hold other splits and datasets too; how many
    of its ids are not rows of this split is in the report.

    Attributes:
      source: gives the rows.
      path: of the store, absolute or relative to the data folder.
    """

    source: Source
    path: str

    @property
    def splits(self) -> Sequence[str]:
        return self.source.splits

    def rows(self, split: str) -> list[Row]:
        """Returns the rows of a split.

        Raises:
          FileNotFoundError: the store or the source's files are missing.
          ValueError: the store is not as `StoreRecord` says, a record was made from another input
            than its row's, or (train) no row is in the store.
        """
        path = self._path()
        records: dict[str, list[StoreRecord]] = {}
        for record in read_store(path):
            records.setdefault(record.id, []).append(record)
        rows, asked = [], 0
        for row in self.source.rows(split):
            samples = sorted(records.get(row.id, ()), key=lambda r: r.sample)
            sha256 = input_sha256(row.input)
            if wrong := [r for r in samples if r.input_sha256 != sha256]:
                raise ValueError(
                    f"{path}: sample {wrong[0].sample} of {row.id!r} answers another input "
                    f"(sha256 {wrong[0].input_sha256[:12]}.., the row's is {sha256[:12]}..): the "
                    "dataset has changed since. Ask the teacher again, or use the data it saw"
                )
            asked += bool(samples)
            rows.append(dataclasses.replace(row, answers=tuple(r.answer for r in samples)))
        if split == "train" and rows and not asked:
            example = f"{next(iter(records))!r}" if records else "none"
            raise ValueError(
                f"{path}: none of its {len(records)} ids is a training row; an id of the store is "
                f"{example}, one of the rows {rows[0].id!r}. Is it the store of this dataset?"
            )
        _note(
            f"store {path}: answers to {asked} of {len(rows)} rows; {len(records) - asked} of its "
            f"ids are not rows of {split}"
        )
        return rows

    def files(self, split: str) -> list[str]:
        return [*self.source.files(split), str(self._path())]

    def _path(self) -> epath.Path:
        return _in_data_folder("rationale store", self.path)


# --- The teacher filter ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FilterCounts:
    """What the teacher filter saw and did.

    Attributes:
      answers: of the teacher.
      unparsed: of these, without a label.
      disagreeing: of these, with a label that is not gold (or not the vote's).
      bad_rows: rows that were asked and have no good answer.
      touched: rows that were changed or left out.
    """

    answers: int = 0
    unparsed: int = 0
    disagreeing: int = 0
    bad_rows: int = 0
    touched: int = 0


def filter_rows(
    rows: Sequence[Row], policy: str, metric_fn: metrics.MetricFn = metrics.label_accuracy
) -> tuple[list[Row], FilterCounts]:
    """Returns the rows after a teacher filter, and what it did.

    An answer is good if it has a label and the label is right by the metric: it agrees with gold,
    or in a row without gold with the vote (`Row.teacher`). Except under `keep`, answers that are
    not good are dropped. A row that was asked and has no good answer left is bad:

    | policy       | a bad row                                                                   |
    |--------------|-----------------------------------------------------------------------------|
    | `keep`       | stays as it is, and so do all others: what was published                    |
    | `drop`       | leaves                                                                      |
    | `label_only` | loses its rationales; the teacher's label stays, where it parsed            |
    | `keep_gold`  | loses its rationales; the gold label becomes the teacher's label too        |

    A row without gold and without a vote (no answer parsed) is bad. Nothing can be trained on it:
    it leaves under `drop`, and under the other two it stays without a label of either kind. Where
    no answer of all rows has a label, they are human rationales: there is nothing to compare, and
    those that have text are good.

    Args:
      rows: of the training split.
      policy: `keep`, `drop`, `label_only` or `keep_gold`.
      metric_fn: its `accuracy` is 1.0 for a right label, on one target and one prediction.

    Raises:
      ValueError: there is no such policy.
    """
    if policy not in _CHOICES["teacher_filter"]:
        raise ValueError(
            f"a teacher filter is one of {', '.join(_CHOICES['teacher_filter'])}, not {policy!r}"
        )
    labels = _gives_labels(rows)
    counts: collections.Counter[str] = collections.Counter()
    kept = []
    for row in rows:
        right = row.label
        if right is None and row.teacher:
            right = row.teacher.label
        good = []
        for answer in row.answers:
            counts["answers"] += 1
            if not answer.label:
                counts["unparsed"] += labels or not answer.rationale
                good += [answer] if answer.rationale and not labels else []
            elif right is not None and metric_fn([right], [answer.label])["accuracy"] == 1:
                good.append(answer)
            else:
                counts["disagreeing"] += 1
        bad = bool(row.answers) and not good
        counts["bad_rows"] += bad
        made = _filtered(row, tuple(good), policy) if policy != "keep" else row
        counts["touched"] += made != row
        if made is not None:
            kept.append(made)
    return kept, FilterCounts(**counts)


def _filtered(row: Row, good: tuple[Answer, ...], policy: str) -> Row | None:
    if good or not row.answers:
        return dataclasses.replace(row, answers=good)
    if policy == "drop":
        return None
    if policy == "label_only":
        answer = dataclasses.replace(row.teacher or Answer(), rationale=None)
    else:
        answer = Answer(label=row.label)
    return dataclasses.replace(row, answers=(answer,))


# --- What a run chose -----------------------------------------------------------------------------


def configured(source: Source, metric_fn: metrics.MetricFn = metrics.label_accuracy) -> Source:
    """Returns a source that follows the settings: rationale store, then teacher filter.

    The settings are asked for when rows are, so that they may be bound after this.

    Args:
      source: as the dataset declares it.
      metric_fn: says which labels of the teacher are right.
    """
    return source if isinstance(source, Configured) else Configured(source, metric_fn)


@dataclasses.dataclass(frozen=True)
class Configured:
    """A source as the run wants it; made by `configured`."""

    source: Source
    metric_fn: metrics.MetricFn

    @property
    def splits(self) -> Sequence[str]:
        return self.source.splits

    @property
    def teacher_metric(self) -> metrics.MetricFn | None:
        return getattr(self._stored(), "teacher_metric", None)

    def rows(self, split: str) -> list[Row]:
        """Returns the rows of a split; the filter applies to training rows only."""
        rows = self._stored().rows(split)
        policy = settings().teacher_filter
        if split != "train" or policy == "keep":
            return rows
        kept, c = filter_rows(rows, policy, self.metric_fn)
        _note(
            f"teacher filter {policy}: of {c.answers} answers {c.unparsed} unparsed and "
            f"{c.disagreeing} disagreeing; {c.bad_rows} bad rows, {c.touched} changed or left out, "
            f"{len(kept)} of {len(rows)} left"
        )
        return kept

    def files(self, split: str) -> list[str]:
        return self._stored().files(split)

    def _stored(self) -> Source:
        store = settings().rationale_store
        return WithRationales(self.source, store) if store else self.source
