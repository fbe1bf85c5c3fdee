"""JSON lines, read strictly: what is unusable is named, counted and, if allowed, left out."""

import codecs
import collections
import dataclasses
import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from etils import epath

from distill.sources.binding import settings
from distill.sources.rows import note

_SHOWN = 5  # unusable lines in a message
# What a line that is not as declared may raise, in the parser or in a function of the dataset.
UNUSABLE = (
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
            except UNUSABLE as e:
                bad.append(BadLine(number, reason(e)))
                if len(bad) > allowed:
                    raise ValueError(_too_many(path, bad, allowed)) from e
                continue
            used.append(Line(number, len(used) + len(bad), value))
    report = LinesReport(str(path), number, len(used), blank, tuple(bad))
    if bad:
        note(f"left out {report}", warn=True)
    return used, report


def _json_object(raw: bytes, types: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    value = parse_json(raw)
    if not isinstance(value, dict):
        raise ValueError(f"a row must be a JSON object, not {type(value).__name__}")
    if missing := [f for f in types if f not in value]:
        raise ValueError(f"the row lacks {', '.join(missing)}; it has {', '.join(value)}")
    check_types(value, types)
    return value


def check_types(value: Mapping[str, Any], types: Mapping[str, type | tuple[type, ...]]) -> None:
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


def parse_json(raw: bytes) -> Any:
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


def reason(error: Exception) -> str:
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


def read_json(path: epath.PathLike) -> Any:
    """Returns the value of a JSON file, as strictly as `read_json_lines`.

    Raises:
      ValueError: the file is not such JSON.
    """
    path = epath.Path(path)
    try:
        return parse_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}:{e.lineno}: {reason(e)}") from e
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: {reason(e)}") from e
