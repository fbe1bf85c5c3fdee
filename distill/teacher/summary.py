"""What the teacher's answers are worth, in numbers: yield, accuracy, agreement, lengths, cost."""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from distill import metrics
from distill.display import clipped, shortened
from distill.teacher.decisions import KEPT, REASONS, Decision
from distill.teacher.store import CLASSES, UNHEARD, Asked, Bought

EXAMPLES = 5  # of each reason
# Means over rows, by name. `_row_measures` has them in this order.
MEASURES = (
    "single answer",
    "single answer with a label",
    "vote",
    "at least one answer",
    "kept answer",
    "agreement",
)
_CONFIDENCES = (0.2, 0.4, 0.6, 0.8)
# Characters of an example's texts.
LONG, SHORT = 700, 200


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of one dataset and split, or of all.

    Attributes:
      dataset: its name; "" of all.
      split: likewise.
      rows: asked for.
      gold: of these, with a gold label.
      answered: rows with an answer of the teacher, whatever it is worth.
      parsed: rows with a label of a plain answer: those with a vote.
      kept_rows: rows with an answer that is kept.
      accuracy: by `MEASURES`, those that a row counts in. All but `agreement` are over rows with a
        gold label. The estimates are of means over rows, so that several answers to one row do
        not count as independent.

        - `single answer`: share of the row's plain answers whose label is right; what has no label
          is wrong, what did not arrive (`UNHEARD`) does not count.
        - `single answer with a label`: of those that have one.
        - `vote`: whether the vote is right; where nobody voted, it is not.
        - `at least one answer`: whether any plain answer is right.
        - `kept answer`: share of the row's kept answers whose label is right.
        - `agreement`: share of the pairs of plain answers with a label that have the same one;
          rows with two and more.
    """

    dataset: str
    split: str
    rows: int
    gold: int
    answered: int
    parsed: int
    kept_rows: int
    accuracy: Mapping[str, metrics.Estimate]


@dataclasses.dataclass(frozen=True)
class Confidence:
    """Rows whose vote has a confidence in (low, high].

    Attributes:
      low: below all of them.
      high: of the highest; rows where all agree (1.0) are on their own, as low = high = 1.
      rows: of them.
      gold: rows with a gold label.
      right: of these, with a right vote.
    """

    low: float
    high: float
    rows: int
    gold: int
    right: int


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Words of rationales; a percentile is the least length that so many do not exceed."""

    n: int
    mean: float
    p50: int
    p95: int
    longest: int


@dataclasses.dataclass(frozen=True)
class Usage:
    """What the answers took. An answer that serves several rows counts once.

    Attributes:
      prompt_tokens: sum over the answers that have both counts.
      completion_tokens: likewise.
      counted: these answers.
      cost: sum over the answers that have one, in the user's currency; None where none has.
      priced: answers with a cost.
      latency: seconds of the answers that arrived, 50th and 95th percentile; None without any.
      attempts: of all answers.
      retried: answers that took more than one.
    """

    prompt_tokens: int
    completion_tokens: int
    counted: int
    cost: float | None
    priced: int
    latency: tuple[float, float] | None
    attempts: int
    retried: int


@dataclasses.dataclass(frozen=True)
class Example:
    """One answer to one row, its texts shortened."""

    id: str
    kind: str
    input: str
    gold: str | None
    label: str | None
    right: bool | None
    vote: str | None
    words: int
    finish_reason: str | None
    error: str | None
    text: str | None
    text_length: int


@dataclasses.dataclass(frozen=True)
class Report:
    """All that is shown.

    Attributes:
      total: all rows.
      parts: by dataset and split.
      inputs: different input texts.
      facts: teachers, prompts, parameters and times, as (name, value).
      kinds: answers by kind.
      classes: answers by class.
      parsed: answers of class ok with a label.
      kept: answers that are kept for a row.
      outside: of these, whose label is none of the options; None where nothing has options.
      confidences: rows by the confidence of their vote; () where no row has two votes.
      lengths: of the rationales of answers with a label, by name: all of them, those kept.
      words: of the same rationales, all of them, int [n].
      leaks: how many of the same, by the same names, contain their label.
      duplicates: answers whose rationale repeats another to the same input.
      reasons: decisions, one for each row and answer, by reason.
      usage: what it took.
      examples: of each reason up to `EXAMPLES`, spread evenly over its decisions.
    """

    total: Part
    parts: tuple[Part, ...]
    inputs: int
    facts: tuple[tuple[str, str], ...]
    kinds: Mapping[str, int]
    classes: Mapping[str, int]
    parsed: int
    kept: int
    outside: int | None
    confidences: tuple[Confidence, ...]
    lengths: Mapping[str, Lengths]
    words: np.ndarray
    leaks: Mapping[str, int]
    duplicates: int
    reasons: Mapping[str, int]
    usage: Usage
    examples: Mapping[str, tuple[Example, ...]]

    @property
    def answers(self) -> int:
        return sum(self.classes.values())


# --- What is counted ------------------------------------------------------------------------------


def summary(
    asked: Sequence[Asked], bought: Sequence[Bought], decisions: Sequence[Decision]
) -> Report:
    """Returns the report on a run.

    Args:
      asked: the rows.
      bought: the answers; those to inputs that no row has are passed over.
      decisions: of `decide` on these, for several datasets one after the other.

    Raises:
      ValueError: a decision is about a row or an answer that is not there.
    """
    rows = {row.id: row for row in reversed(asked)}
    rows = {id: rows[id] for id in dict.fromkeys(row.id for row in asked)}
    inputs = {row.input_sha256 for row in rows.values()}
    answers = {a.key: a for a in bought if a.input_sha256 in inputs}
    decided: dict[str, list[tuple[Bought, Decision]]] = {id: [] for id in rows}
    for d in decisions:
        if d.id not in rows or d.key not in answers:
            raise ValueError(
                f"the decision on row {d.id!r} and answer {d.key!r} is about what was not asked or "
                "not answered: give summary the rows and answers that decide was given"
            )
        decided[d.id].append((answers[d.key], d))
    by_key = {d.key: d for d in reversed(decisions)}  # What depends on the row is not read from it.
    kept_keys = {d.key for d in decisions if d.kept}
    measures = {id: _row_measures(rows[id], found) for id, found in decided.items()}
    of_part: dict[tuple[str, str], list[str]] = {}
    for row in rows.values():
        of_part.setdefault((row.dataset, row.split), []).append(row.id)
    total = _part("", "", rows, decided, measures)
    parts = tuple(
        dataclasses.replace(total, dataset=dataset, split=split)
        if len(of_part) == 1
        else _part(dataset, split, {id: rows[id] for id in ids}, decided, measures)
        for (dataset, split), ids in of_part.items()
    )
    parsed = [d for d in by_key.values() if d.parsed]
    explained = [d for d in parsed if (answers[d.key].rationale or "").strip()]
    explained_kept = [d for d in explained if d.key in kept_keys]
    classes = collections.Counter(a.cls for a in answers.values())
    reasons = collections.Counter(d.reason for d in decisions)
    options = [d.in_options for d in parsed if d.in_options is not None]
    return Report(
        total=total,
        parts=parts,
        inputs=len(inputs),
        facts=_facts(list(answers.values())),
        kinds=dict(collections.Counter(a.kind for a in answers.values())),
        classes={c: classes[c] for c in (*CLASSES, *classes) if classes[c]},
        parsed=len(parsed),
        kept=len(kept_keys),
        outside=options.count(False) if options else None,
        confidences=_confidences(rows, decided),
        lengths={"with a label": _lengths(explained), "kept": _lengths(explained_kept)},
        words=np.array([d.words for d in explained], int),
        leaks={
            "with a label": sum(d.leaks for d in explained),
            "kept": sum(d.leaks for d in explained_kept),
        },
        duplicates=sum(d.duplicate_of is not None for d in parsed),
        reasons={r: reasons[r] for r in (KEPT, *REASONS, *reasons) if reasons[r]},
        usage=_usage(list(answers.values())),
        examples=_examples(rows, decided),
    )


def _row_measures(row: Asked, found: Sequence[tuple[Bought, Decision]]) -> tuple[float, ...]:
    """Returns the row's `MEASURES`, NaN where it does not count."""
    plain = [(a, d) for a, d in found if a.kind != "rationalised" and a.cls not in UNHEARD]
    voters = [d for _, d in plain if d.parsed]
    right = [bool(d.right) for d in voters]
    said = [d.right for d in voters if d.agrees]
    kept = [bool(d.right) for _, d in found if d.kept]
    gold = row.gold is not None
    n = len(voters)
    # Of the others, n * confidence - 1 say what an answer says.
    pairs = [(n * d.confidence - 1) / (n - 1) for d in voters] if n > 1 else []
    return (
        sum(right) / len(plain) if gold and plain else math.nan,
        float(np.mean(right)) if gold and right else math.nan,
        float(bool(said and said[0])) if gold and plain else math.nan,
        float(any(right)) if gold and plain else math.nan,
        float(np.mean(kept)) if gold and kept else math.nan,
        float(np.mean(pairs)) if pairs else math.nan,
    )


@metrics.over_examples
def _means(rows: Sequence[tuple[float, ...]], _: Sequence[tuple[float, ...]]):
    """The mean of each measure over the rows that count in it.

    Rows have few different values, and all rows are resampled a thousand times: counting the values
    of a sample is many times faster than averaging its rows.
    """
    values, kind = np.unique(np.nan_to_num(rows, nan=-1.0), axis=0, return_inverse=True)
    counts = values >= 0
    values = np.where(counts, values, 0.0)
    kind = kind.reshape(-1).astype(np.int32)

    def resampled(index):
        weights = np.bincount(kind[index], minlength=len(values))
        n = weights @ counts
        return {
            name: total / m
            for name, total, m in zip(MEASURES, weights @ values, n, strict=True) if m
        }  # fmt: skip

    return resampled


def _accuracy(rows: Sequence[tuple[float, ...]]) -> dict[str, metrics.Estimate]:
    found = metrics.estimates(_means, rows, rows) if rows else {}
    n = dict(
        zip(MEASURES, np.sum(~np.isnan(np.reshape(rows, (-1, len(MEASURES)))), 0), strict=True)
    )
    return {name: dataclasses.replace(e, n=int(n[name])) for name, e in found.items()}


def _part(
    dataset: str,
    split: str,
    rows: Mapping[str, Asked],
    decided: Mapping[str, Sequence[tuple[Bought, Decision]]],
    measures: Mapping[str, tuple[float, ...]],
) -> Part:
    of_rows = [measures[id] for id in rows]
    found = [decided[id] for id in rows]
    return Part(
        dataset=dataset,
        split=split,
        rows=len(rows),
        gold=sum(row.gold is not None for row in rows.values()),
        answered=sum(any(a.cls not in UNHEARD for a, _ in some) for some in found),
        parsed=sum(any(d.agrees for _, d in some) for some in found),
        kept_rows=sum(any(d.kept for _, d in some) for some in found),
        accuracy=_accuracy(of_rows),
    )


def _facts(answers: Sequence[Bought]) -> tuple[tuple[str, str], ...]:
    """Who answered what, when; with how many answers where they differ."""

    def named(values: Sequence[str]) -> str:
        counts = collections.Counter(values)
        if len(counts) == 1:
            return clipped(values[0], SHORT)
        shown = [f"{clipped(value, SHORT)} ({n:,})" for value, n in counts.most_common(4)]
        return "; ".join([*shown, *([f"{len(counts) - 4:,} others"] if len(counts) > 4 else [])])

    if not answers:
        return ()
    times = sorted(a.time for a in answers)
    return (
        ("teacher", named([f"{a.provider} {a.model}" for a in answers])),
        ("parameters", named([a.parameters for a in answers])),
        ("prompt", named([f"{a.prompt}, {a.prompt_sha256[:12]}" for a in answers])),
        (
            "answered",
            " to ".join(dict.fromkeys(clipped(time, SHORT) for time in (times[0], times[-1]))),
        ),
    )


def _confidences(
    rows: Mapping[str, Asked], decided: Mapping[str, Sequence[tuple[Bought, Decision]]]
) -> tuple[Confidence, ...]:
    votes = []  # confidence, whether it is right (None without gold)
    several = False
    for id, found in decided.items():
        voters = [d for _, d in found if d.confidence is not None]
        several |= len(voters) > 1
        if voters:
            vote = next(d for d in voters if d.agrees)
            votes.append((vote.confidence, vote.right if rows[id].gold is not None else None))
    if not several:
        return ()
    made = []
    for low, high in zip((0.0, *_CONFIDENCES, 1.0), (*_CONFIDENCES, 1.0, 1.0), strict=True):
        inside = [right for c, right in votes if c == low == high or low < c <= high and c != 1]
        gold = [right for right in inside if right is not None]
        made.append(Confidence(low, high, len(inside), len(gold), sum(gold)))
    return tuple(made)


def _lengths(decisions: Sequence[Decision]) -> Lengths:
    words = [d.words for d in decisions] or [0]
    return Lengths(len(decisions), float(np.mean(words)), *_percentiles(words), max(words))


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The least values that 50 and 95 percent do not exceed."""
    return tuple(np.percentile(values, (50, 95), method="inverted_cdf").tolist())


def _usage(answers: Sequence[Bought]) -> Usage:
    counted = [a for a in answers if None not in (a.prompt_tokens, a.completion_tokens)]
    priced = [a.cost for a in answers if a.cost is not None]
    arrived = [a.latency for a in answers if a.cls != "transport"]
    return Usage(
        prompt_tokens=sum(a.prompt_tokens for a in counted),
        completion_tokens=sum(a.completion_tokens for a in counted),
        counted=len(counted),
        cost=math.fsum(priced) if priced else None,
        priced=len(priced),
        latency=_percentiles(arrived) if arrived else None,
        attempts=sum(a.attempts for a in answers),
        retried=sum(a.attempts > 1 for a in answers),
    )


def _examples(
    rows: Mapping[str, Asked], decided: Mapping[str, Sequence[tuple[Bought, Decision]]]
) -> dict[str, tuple[Example, ...]]:
    of_reason: dict[str, dict[str, tuple[Bought, Decision]]] = {}
    for found in decided.values():
        for a, d in found:
            of_reason.setdefault(d.reason, {}).setdefault(a.key, (a, d))
    examples = {}
    for reason in dict.fromkeys((*REASONS, *of_reason)):  # Of what is kept last.
        found = list(of_reason.get(reason, {}).values())
        n = min(len(found), EXAMPLES)
        spread = [found[i * len(found) // n] for i in range(n)]
        if found:
            examples[reason] = tuple(_example(rows[d.id], a, d) for a, d in spread)
    return examples


def _example(row: Asked, a: Bought, d: Decision) -> Example:
    def cut(text: str | None, most: int = SHORT) -> str | None:
        return None if text is None else shortened(text, most)

    return Example(
        id=shortened(d.id, SHORT),
        kind=a.kind,
        input=shortened(row.input, LONG),
        gold=cut(row.gold),
        label=cut(a.label),
        right=d.right,
        vote=cut(d.vote),
        words=d.words,
        finish_reason=cut(a.finish_reason),
        error=cut(a.error),
        text=cut(a.text, LONG),
        text_length=a.text_length,
    )
