"""The embedded task: true rationales, even labels, splits that share nothing."""

import collections
import re

import numpy as np
import pytest

from distill import metrics
from tasks import arithmetic

SOURCE = arithmetic.NutsSource("nuts", sizes=(2_000, 200, 1_000))
NOISY = arithmetic.NutsSource("nuts", sizes=(2_000, 200, 1_000), teacher_error_rate=0.25)


def solve(text):
    """The running amounts of a problem, from its words alone."""
    amounts = [int(re.search(r"has (\d+)", text)[1])]
    for verb, number in re.findall(r"(gets|eats) (\d)", text):
        amounts.append(amounts[-1] + (int(number) if verb == "gets" else -int(number)))
    return amounts


def test_rationale_and_label_follow_from_the_problem():
    for row in SOURCE.rows("train"):
        _, *amounts = solve(row.input)
        assert row.label == row.teacher.label == str(amounts[-1])
        assert row.answers[0].rationale == ", then ".join(map(str, amounts)) + "."
        assert all(0 <= a <= 9 for a in amounts)


def test_no_problem_is_in_two_splits_or_twice_in_one():
    chains = {s: [tuple(solve(r.input)) for r in SOURCE.rows(s)] for s in arithmetic.SPLITS}
    for split, rows in chains.items():
        assert len(set(rows)) == len(rows) == dict(zip(
            arithmetic.SPLITS, SOURCE.sizes, strict=True))[split]  # fmt: skip
    assert not set(chains["train"]) & set(chains["test"])
    assert not set(chains["train"]) & set(chains["validation"])
    assert not set(chains["validation"]) & set(chains["test"])


def test_the_most_frequent_label_is_right_in_at_most_12_percent():
    for source in (SOURCE, arithmetic.NutsSource("shipped")):
        labels = collections.Counter(r.label for r in source.rows("test"))
        assert max(labels.values()) / labels.total() <= 0.12


def test_teacher_errs_at_the_rate_and_its_label_follows_its_rationale():
    rows = NOISY.rows("train")
    wrong = [r for r in rows if r.teacher.label != r.label]
    assert len(wrong) / len(rows) == pytest.approx(0.25, abs=0.03)
    for row in rows:
        assert row.answers[0].rationale.rstrip(".").endswith(row.teacher.label)
        assert row.label == str(solve(row.input)[-1])


def test_the_same_arguments_give_the_same_rows_and_a_seed_others():
    again = arithmetic.NutsSource("nuts", sizes=(2_000, 200, 1_000))
    assert again.rows("train") == SOURCE.rows("train")
    other = arithmetic.NutsSource("nuts", sizes=(2_000, 200, 1_000), seed=1)
    assert other.rows("train") != SOURCE.rows("train")


def test_equation_has_the_value_of_the_label():
    source = arithmetic.NutsSource("nuts", sizes=(50, 10, 10), equation=True)
    for row in source.rows("train"):
        assert metrics.equation_value(row.label) == solve(row.input)[-1]


@pytest.mark.parametrize(
    "settings,message",
    [(dict(changes=1), "too few chains"), (dict(teacher_error_rate=2.0), "teacher_error_rate")],
)
def test_impossible_settings_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        arithmetic.NutsSource("nuts", **settings)


def test_other_rationales_belong_to_the_same_problems():
    sources = {
        kind: arithmetic.NutsSource("nuts", sizes=(2_000, 200, 1_000), rationale=kind)
        for kind in arithmetic.RATIONALES
    }
    rows = {kind: source.rows("train") for kind, source in sources.items()}
    for row, sums, last in zip(SOURCE.rows("train"), rows["sums"], rows["last"], strict=True):
        assert (row.input, row.label) == (sums.input, sums.label) == (last.input, last.label)
        amounts = solve(row.input)
        assert last.answers[0].rationale == f"{amounts[-2]}."
        steps = sums.answers[0].rationale.removesuffix(".").split(", ")
        worked = [re.fullmatch(r"(\d) ([+-]) (\d) = (\d)", step).groups() for step in steps]
        assert [int(a) + int(f"{op}{b}") for a, op, b, _ in worked] == amounts[1:]
        assert [int(c) for *_, c in worked] == amounts[1:]
    same = [
        row.answers[0].rationale == other.answers[0].rationale
        for row, other in zip(SOURCE.rows("train"), rows["unrelated"], strict=True)
    ]
    assert np.mean(same) < 0.01  # one in a thousand by chance
    ends = [r.answers[0].rationale.rstrip(".")[-1] == r.label for r in rows["unrelated"]]
    assert np.mean(ends) == pytest.approx(0.1, abs=0.03)
    with pytest.raises(ValueError, match="rationale must be one of amounts"):
        arithmetic.NutsSource("nuts", rationale="long")
