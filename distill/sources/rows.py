"""Rows, the teacher's answers, the protocol of a source, and the report on one."""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from absl import logging

from distill import metrics
from distill.vocabulary import EOS_TEXT as EOS_TEXT

HOLDOUT = 0.1
FULL_WEIGHT = 1000  # of a training example, in thousandths


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
    with noting() as notes:
        rows = source.rows(split)
    labels = gives_labels(rows)
    return SourceReport(
        rows=len(rows),
        parsed=sum(r.teacher is not None for r in rows),
        unparsed=sum(
            bool(r.answers) and r.teacher is None and (labels or not r.rationales) for r in rows
        ),
        rationales=sum(bool(r.rationales) for r in rows),
        teacher_accuracy=teacher_accuracy(
            rows, getattr(source, "teacher_metric", None) or metric_fn
        ),
        unlabeled=sum(r.label is None for r in rows),
        notes=tuple(notes),
    )


def gives_labels(rows: Sequence[Row]) -> bool:
    """Whether an answer has a label; where none has, the rationales are people's."""
    return any(a.label for r in rows for a in r.answers)


def teacher_accuracy(rows: Sequence[Row], metric_fn: metrics.MetricFn) -> float | None:
    gold = [r for r in rows if r.label is not None and r.answers]
    if not gives_labels(gold):
        return None
    said = [r.teacher.label if r.teacher else "" for r in gold]
    return metric_fn([r.label for r in gold], said)["accuracy"]


_notes: contextvars.ContextVar[dict[str, bool] | None] = contextvars.ContextVar(
    "notes", default=None
)


@contextlib.contextmanager
def noting() -> Iterator[dict[str, bool]]:
    """Collects the sentences of `note` (with their `warn`) meanwhile, each once."""
    notes: dict[str, bool] = {}
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def note(message: str, warn: bool = False) -> None:
    """Adds a sentence to the report that is being made; without one, a warning is logged, once."""
    notes = _notes.get()
    if notes is not None:
        notes[message] = warn
    elif warn:
        warn_once(message)


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning, once."""
    # Each stream of a dataset reads its rows.
    logging.warning("%s", message)


def check_split(name: str, split: str, splits: Sequence[str]) -> None:
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(splits)}")


def held_out(rows: Mapping[int, Row], count: int, split: str) -> list[Row]:
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
