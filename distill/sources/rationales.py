"""The rationale store, and the filter on what the teacher said."""

import collections
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from distill import metrics
from distill.sources.binding import CHOICES, in_data_folder
from distill.sources.jsonlines import check_types, read_json_lines
from distill.sources.rows import FULL_WEIGHT, Answer, Row, Source, gives_labels, note

# --- The store ------------------------------------------------------------------------------------

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
        check_types(vars(self), _STORE_TYPES)
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
        note(
            f"store {path}: answers to {asked} of {len(rows)} rows; {len(records) - asked} of its "
            f"ids are not rows of {split}"
        )
        return rows

    def files(self, split: str) -> list[str]:
        return [*self.source.files(split), str(self._path())]

    def _path(self) -> epath.Path:
        return in_data_folder("rationale store", self.path)


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
    if policy not in CHOICES["teacher_filter"]:
        raise ValueError(
            f"a teacher filter is one of {', '.join(CHOICES['teacher_filter'])}, not {policy!r}"
        )
    labels = gives_labels(rows)
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
