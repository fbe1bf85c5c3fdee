"""Which of the teacher's answers are trained on, and why not the others. Pure: no I/O, no clock.

    found = decide(asked, bought, Policy(answer_match=True), metrics.equation_accuracy)

Answers to one input are taken in the order of their `sample`, plain ones before rationalised ones.
Whatever the policy, every answer gets a `Decision` with all that could have been asked of it, so
that the table of decisions answers what another policy would have kept.
"""

import collections
import dataclasses
import functools
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from distill import metrics
from distill.teacher.store import CLASSES, Asked, Bought

# Why an answer is not kept; the first that holds is its reason.
REASONS = (
    *CLASSES[1:],
    "unparsed",
    "wrong",
    "short",
    "long",
    "leaks",
    "duplicate",
    "low confidence",
    "rationalised",
    "not needed",
)
KEPT = "kept"

Options = Sequence[str] | Callable[[str], Sequence[str]] | None
# (gold or what was said first, label) -> whether they are the same answer
_Same = Callable[[str, str], bool]


@dataclasses.dataclass(frozen=True)
class Policy:
    """What an answer must be to be kept. An answer of a class other than ok, or without a label,
    never is.

    Attributes:
      answer_match: its label must be right by the dataset's metric; in a row without gold, it must
        be the vote's.
      min_words: least words of the rationale; an answer without a rationale has 0. None = any.
      max_words: most words. None = any.
      leaks: `keep`, or `drop` answers whose rationale contains their label (`contains_label`).
        Reasoning that ends in its answer does, so that this is normal for chain of thought.
      duplicates: `keep`, or `drop` answers whose rationale has been kept for this input already;
        white space and case do not matter.
      min_confidence: least `Decision.confidence`, in [0, 1]. Nobody voted for the label of a
        rationalised answer: it is not asked for.
      rationalised: keep answers that were given the gold label, where they come to it and no plain
        answer is right. Whatever the policy, one that comes to another label is wrong, and so is
        one in a row without gold (another row with the same input has it).

    Raises:
      ValueError: a setting is not one of these.
    """

    answer_match: bool = False
    min_words: int | None = None
    max_words: int | None = None
    leaks: str = "keep"
    duplicates: str = "keep"
    min_confidence: float = 0.0
    rationalised: bool = True

    def __post_init__(self):
        for name in ("answer_match", "rationalised"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Policy.{name} must be True or False, not {getattr(self, name)}.")
        for name in ("min_words", "max_words"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise ValueError(
                    f"Policy.{name} must be a number of words from 0, or None for any, "
                    f"not {value!r}."
                )
        if None not in (self.min_words, self.max_words) and self.min_words > self.max_words:
            raise ValueError(
                f"Policy.min_words={self.min_words} is above Policy.max_words={self.max_words}: "
                "no rationale could be kept."
            )
        for name in ("leaks", "duplicates"):
            if getattr(self, name) not in ("keep", "drop"):
                raise ValueError(
                    f"Policy.{name} must be keep or drop, not {getattr(self, name)!r}."
                )
        c = self.min_confidence
        # NaN is no number in [0, 1] either: both comparisons fail.
        if isinstance(c, bool) or not isinstance(c, int | float) or not 0 <= c <= 1:
            raise ValueError(f"Policy.min_confidence must be a number in [0, 1], not {c!r}.")


@dataclasses.dataclass(frozen=True)
class Decision:
    """One answer to one row.

    Attributes:
      id: of the row.
      key: of the answer. Rows with the same input have the same answers.
      parsed: whether it is of class ok and has a label.
      in_options: whether the label is one that the input allows; None where it has no label, or
        the dataset no options.
      right: whether the label is the row's gold label by the dataset's metric; None where either
        is missing.
      vote: the label that most of the input's plain answers gave, of several the one said first,
        as it was first said; None where none has a label. The same for all answers to the input.
      confidence: share of the input's plain answers with a label that gave this label; None for a
        rationalised answer, which was told it, and without a label.
      agrees: whether the label is the vote; None where confidence is.
      words: of the rationale (`metrics.words`); 0 where there is none.
      leaks: whether the rationale contains the label (`contains_label`).
      duplicate_of: key of the first answer to the input with a label and the same rationale, but
        for white space and case; None for that answer itself.
      kept: whether the policy keeps it.
      reason: "kept", or the first of `REASONS` for which it is not.
    """

    id: str
    key: str
    parsed: bool
    in_options: bool | None
    right: bool | None
    vote: str | None
    confidence: float | None
    agrees: bool | None
    words: int
    leaks: bool
    duplicate_of: str | None
    kept: bool
    reason: str


def decide(
    asked: Sequence[Asked],
    bought: Sequence[Bought],
    policy: Policy,
    metric_fn: metrics.MetricFn = metrics.label_accuracy,
    options: Options = None,
) -> list[Decision]:
    """Returns a decision for each row and answer to its input, in the order of the rows.

    Two labels count as one in the vote if they are the same text but for outer white space, or the
    metric takes one for the other: `(84 / 2)` and `( 84.0 / 2.0 )` are one equation. A label is
    compared with the different ones that its input got before it, and each pair of texts once.

    Args:
      asked: the rows. A row that is in several mixtures may be there several times, and is decided
        upon once.
      bought: answers; those to inputs that no row has are passed over.
      policy: what to keep.
      metric_fn: the dataset's; its `accuracy` is 1.0 for a right label, on one target and one
        prediction.
      options: the labels that a dataset allows, or a function that finds them in an input, as in
        `task.register`; None or empty where any text may be one.

    Raises:
      ValueError: two different rows have the same id, or two answers the same key.
    """

    @functools.cache
    def right(gold: str, label: str) -> bool:
        return metric_fn([gold], [label])["accuracy"] == 1

    answers: dict[str, list[Bought]] = {}
    keys = set()
    for answer in bought:
        if answer.key in keys:
            raise ValueError(f"two answers have the key {answer.key!r}")
        keys.add(answer.key)
        answers.setdefault(answer.input_sha256, []).append(answer)
    seen: dict[str, Asked] = {}
    facts: dict[str, list[tuple[Bought, dict[str, Any]]]] = {}
    decisions = []
    for row in asked:
        before = seen.setdefault(row.id, row)
        if before is not row:
            if (before.input_sha256, before.gold) != (row.input_sha256, row.gold):
                raise ValueError(
                    f"two rows have the id {row.id!r}, with another input or gold label: ids must "
                    "be unique"
                )
            continue
        if row.input_sha256 not in facts:
            given = answers.get(row.input_sha256, [])
            ordered = sorted(given, key=lambda a: (a.kind == "rationalised", a.sample))
            allowed = options(row.input) if callable(options) else options
            facts[row.input_sha256] = _facts(ordered, allowed, right)
        decisions += _decided(row, facts[row.input_sha256], policy, right)
    return decisions


def _facts(
    answers: Sequence[Bought], allowed: Sequence[str] | None, right: _Same
) -> list[tuple[Bought, dict[str, Any]]]:
    """Returns the answers to one input, each with what depends on no gold label and no policy."""
    parsed = {a.key: a for a in answers if a.cls == "ok" and a.label and a.label.strip()}
    voters = [a for a in parsed.values() if a.kind != "rationalised"]
    groups = _grouped([a.label for a in voters], right)
    group = {a.key: number for a, number in zip(voters, groups, strict=True)}
    size = collections.Counter(groups)
    # Counted in the order of their first label: max takes the first of equals.
    winner = max(size, key=size.__getitem__, default=None)
    vote = voters[groups.index(winner)].label if voters else None
    options = {option.strip() for option in allowed or ()}
    first: dict[str, str] = {}
    made = []
    for a in answers:
        label = a.label if a.key in parsed else None
        votes = a.key in group
        text = _normalised(a.rationale)
        same = first.setdefault(text, a.key) if label and text else a.key
        fact = dict(
            parsed=label is not None,
            in_options=_is_option(label, options, right) if label and options else None,
            vote=vote,
            confidence=size[group[a.key]] / len(voters) if votes else None,
            agrees=group[a.key] == winner if votes else None,
            words=len(metrics.words(a.rationale or "")),
            leaks=contains_label(a.rationale or "", a.label or ""),
            duplicate_of=same if same != a.key else None,
        )
        made.append((a, fact))
    return made


def _grouped(labels: Sequence[str], right: _Same) -> list[int]:
    """Returns the group of each label; groups are numbered in the order of their first label."""
    number: dict[str, int] = {}
    first: list[str] = []
    for text in (label.strip() for label in labels):
        if text not in number:
            same = (i for i, said in enumerate(first) if right(said, text))
            number[text] = next(same, len(first))
            first += [text] if number[text] == len(first) else []
    return [number[label.strip()] for label in labels]


def _is_option(label: str, options: set[str], right: _Same) -> bool:
    return label.strip() in options or any(right(option, label.strip()) for option in options)


def _normalised(rationale: str | None) -> str:
    return " ".join((rationale or "").casefold().split())


def _decided(
    row: Asked, facts: Sequence[tuple[Bought, dict[str, Any]]], policy: Policy, right: _Same
) -> list[Decision]:
    rights = [
        right(row.gold, a.label) if fact["parsed"] and row.gold is not None else None
        for a, fact in facts
    ]
    plain_right = any(
        is_right and a.kind != "rationalised"
        for (a, _), is_right in zip(facts, rights, strict=True)
    )
    kept_rationales: set[str] = set()
    decisions = []
    for (a, fact), is_right in zip(facts, rights, strict=True):
        text = _normalised(a.rationale)
        reason = _reason(a, fact, is_right, plain_right, text in kept_rationales, policy)
        if reason == KEPT and text:
            kept_rationales.add(text)
        decisions.append(
            Decision(
                id=row.id, key=a.key, right=is_right, kept=reason == KEPT, reason=reason, **fact
            )
        )
    return decisions


def _reason(
    answer: Bought,
    fact: dict[str, Any],
    right: bool | None,
    plain_right: bool,
    kept_before: bool,
    policy: Policy,
) -> str:
    """Returns "kept", or the first of `REASONS` that holds."""
    told = answer.kind == "rationalised"
    if answer.cls != "ok":
        return answer.cls
    if not fact["parsed"]:
        return "unparsed"
    if told:
        # Given a label, a teacher that comes to another has explained neither.
        wrong = not right
    else:
        wrong = policy.answer_match and not (fact["agrees"] if right is None else right)
    if wrong:
        return "wrong"
    if fact["words"] < (policy.min_words or 0):
        return "short"
    if fact["words"] > (math.inf if policy.max_words is None else policy.max_words):
        return "long"
    if policy.leaks == "drop" and fact["leaks"]:
        return "leaks"
    if policy.duplicates == "drop" and kept_before:
        return "duplicate"
    if not told and fact["confidence"] < policy.min_confidence:
        return "low confidence"
    if told and not policy.rationalised:
        return "rationalised"
    if told and plain_right:
        return "not needed"
    return KEPT


# --- Does a rationale contain its label? ----------------------------------------------------------

# What follows the apostrophe of `dog's` and `don't` is no word, though `t` may be a label.
_ENDING = re.compile(r"(?<=\w)['’](?:s|t|d|m|ll|re|ve)\b")
# A word, a number with its sign, or any other character. A minus after a word, a number or a
# bracket subtracts.
_TOKEN = re.compile(r"[^\W\d]\w*|(?:(?<![\w)])-)?(?:\d+(?:\.\d+)?|\.\d+)|\S")


def contains_label(rationale: str, label: str) -> bool:
    """Returns whether a rationale contains its label verbatim.

    Case, Unicode's compatible forms and the kind of white space do not matter. A label is found as
    whole words only: `no` is not in `know`, nor `t` in `don't`; other forms of a word (`rugs` for
    `rug`) do not count. In scripts without spaces any place will do. A label that is a number or an
    equation is found as whole numbers, whatever the spacing, outer brackets and final zeros:
    `( 84.0 / 2.0 )` is in `so 84 / 2 = 42`, `4` is not.

    Reasoning that ends in its answer contains it: for chain of thought this is no fault. Of the
    released completions of PaLM-540B (Hsieh et al. 2023) that have a label, 73.0 % do in
    CommonsenseQA's training rows, 82.3 % in SVAMP's, and none in e-SNLI's test rows
    (tests/test_teacher_decisions.py counts them). It tells whether the label can be copied from the
    rationale, as one that was written for a given label should not allow.

    Of a text with more than 20,000 characters, words are sought in the start (`metrics.words`).

    Args:
      rationale: without what announces the label: the parser cuts before `The answer is`.
      label: blank text is in nothing.
    """
    if not label.strip() or not rationale.strip():
        return False
    if metrics.equation_value(label) is not None:
        # A final period: `84.` is a number to Python, and the end of a sentence in the rationale.
        label = label.strip().removesuffix(".")
        return _spaced(_arithmetic(label, bare=True)) in _spaced(_arithmetic(rationale))
    text, label = (" ".join(_folded(t).split()) for t in (rationale, label))
    return label in text and _spaced(_words(label)) in _spaced(_words(text))


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def _words(text: str) -> list[str]:
    return metrics.words(_ENDING.sub(" ", text))


def _spaced(parts: Sequence[str]) -> str:
    """The parts with a space on either side of each; no parts are in every text."""
    return f" {' '.join(parts)} " if parts else ""


def _arithmetic(text: str, bare: bool = False) -> list[str]:
    """Returns the tokens of a text, numbers without final zeros; `bare` without outer brackets."""
    tokens = [
        _plain_number(token) for token in _TOKEN.findall(metrics.plain_arithmetic(_folded(text)))
    ]
    while bare and tokens[-1] == ")" and _closes(tokens) == len(tokens) - 1:
        tokens = tokens[1:-1]
    return tokens


def _plain_number(token: str) -> str:
    if not token[-1].isdecimal() or "." not in token:
        return token
    whole, _, decimals = token.partition(".")
    decimals = decimals.rstrip("0")
    return (whole if whole not in ("", "-") else f"{whole}0") + (decimals and f".{decimals}")


def _closes(tokens: Sequence[str]) -> int | None:
    """Returns where the bracket that the tokens begin with is closed; None without one."""
    depth = 0
    for i, token in enumerate(tokens):
        depth += (token == "(") - (token == ")")
        if depth == 0:
            return i if i else None
    return None
