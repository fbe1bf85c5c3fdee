"""Standard errors, bootstrap intervals and McNemar's test, against theory and simulation."""

import functools
import math
import random
import re
import time

import numpy as np
import pytest

from distill import metrics
from distill.metrics import statistics


def labels(rng, n, right=0.7):
    """Returns n targets of three classes and predictions, right with the given probability."""
    classes = np.array(["a", "b", "c"])
    targets = rng.choice(classes, n, p=[0.6, 0.3, 0.1])
    predictions = np.where(rng.random(n) < right, targets, rng.choice(classes, n))
    return targets.tolist(), predictions.tolist()


def test_standard_error_is_that_of_repeated_draws():
    assert metrics.standard_error(0.5, 100) == pytest.approx(0.05)
    assert metrics.standard_error(1.0, 5) == 0
    rng = random.Random(0)
    means = [sum(rng.random() < 0.3 for _ in range(200)) / 200 for _ in range(2000)]
    spread = math.sqrt(sum((m - 0.3) ** 2 for m in means) / len(means))
    assert metrics.standard_error(0.3, 200) == pytest.approx(spread, rel=0.1)
    for p, n in ((1.5, 10), (0.5, 0)):
        with pytest.raises(ValueError, match=r"fraction in \[0, 1\]"):
            metrics.standard_error(p, n)


def test_an_estimate_has_the_metrics_own_value():
    targets, predictions = labels(np.random.default_rng(0), 300)
    for fn in (metrics.label_accuracy, metrics.macro_f1, metrics.per_class, metrics.rouge_l):
        got = metrics.estimates(fn, targets, predictions, resamples=50)
        assert {name: e.value for name, e in got.items()} == fn(targets, predictions)
        for e in got.values():
            assert e.n == 300 and e.low < e.value < e.high and e.standard_error > 0


@pytest.mark.parametrize("fn", [metrics.label_accuracy, metrics.macro_f1, metrics.per_class])
def test_resampling_is_the_metric_on_the_drawn_examples(fn):
    """The fast way and the plain one, which calls the metric on lists, are the same."""
    targets, predictions = labels(np.random.default_rng(1), 12)  # classes go missing
    fast = metrics.estimates(fn, targets, predictions, resamples=200)
    plain = metrics.estimates(lambda t, p: fn(t, p), targets, predictions, resamples=200)
    assert fast.keys() == plain.keys()
    for name in fast:
        assert (fast[name].low, fast[name].high) == pytest.approx(
            (plain[name].low, plain[name].high)
        )
    if fn is not metrics.label_accuracy:  # binomial
        assert [e.standard_error for e in fast.values()] == pytest.approx(
            [e.standard_error for e in plain.values()]
        )


def test_the_seed_decides():
    targets, predictions = labels(np.random.default_rng(2), 50)
    first, again, other = (
        metrics.estimates(metrics.macro_f1, targets, predictions, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_standard_errors_are_binomial_for_fractions_else_of_the_resamples():
    targets, predictions = labels(np.random.default_rng(3), 400)
    accuracy = metrics.estimates(metrics.label_accuracy, targets, predictions)["accuracy"]
    assert accuracy.standard_error == metrics.standard_error(accuracy.value, 400)
    rng = np.random.default_rng(4)
    scores = rng.beta(2, 1, 400)

    @metrics.mean_per_example
    def score(targets, predictions):
        return {"score": [float(p) for p in predictions]}

    got = metrics.estimates(score, targets, [str(x) for x in scores])["score"]
    assert got.value == pytest.approx(scores.mean())
    assert got.standard_error == pytest.approx(scores.std() / 20, rel=0.1)
    assert got.standard_error != metrics.standard_error(got.value, 400)


def test_examples_that_do_not_count():
    @metrics.mean_per_example
    def half(targets, predictions):
        return {"half": [float(p) for p in predictions], "all": [1.0] * len(targets)}

    got = metrics.estimates(half, list("abcd"), ["1", "nan", "0", "1"])
    assert (got["half"].n, got["half"].value) == (3, pytest.approx(2 / 3))
    assert got["half"].standard_error == metrics.standard_error(2 / 3, 3)
    assert got["all"] == metrics.Estimate(1.0, 4, 0.0, 1.0, 1.0)
    values = metrics.example_values(half, list("abcd"), ["1", "nan", "0", "1"])
    np.testing.assert_array_equal(values["half"], [1, np.nan, 0, 1])
    assert metrics.estimates(half, ["a"], ["nan"]).keys() == {"all"}


def test_values_of_examples():
    got = metrics.example_values(metrics.label_accuracy, ["a", "b"], ["a", "x"])
    np.testing.assert_array_equal(got["accuracy"], [1, 0])

    def plain(targets, predictions):
        return {"accuracy": float(np.mean([t == p for t, p in zip(targets, predictions)]))}  # noqa: B905

    got = metrics.example_values(plain, ["a", "b"], ["a", "x"])
    np.testing.assert_array_equal(got["accuracy"], [1, 0])


def test_a_plain_function_that_is_no_mean_is_called_on_each_resample():
    calls = []

    def longest(targets, predictions):
        calls.append(len(targets))
        return {"longest": np.float32(max(map(len, predictions))), "undefined": math.nan}

    got = metrics.estimates(longest, list("abcd"), ["x", "xx", "xxx", "x"], resamples=20)
    assert got.keys() == {"longest"} and calls[-21:] == [4] * 21
    assert calls[:-21] == [1] * 4 + [4]  # to see whether it is a mean
    assert (got["longest"].value, got["longest"].n, got["longest"].high) == (3, 4, 3)
    assert type(got["longest"].value) is float and got["longest"].low < 3


def test_a_plain_function_that_is_a_mean_is_called_on_each_example():
    """With the same intervals as if it were called on each resample."""
    targets, predictions = labels(np.random.default_rng(5), 60)
    calls = []

    def percent(targets, predictions):
        calls.append(len(targets))
        right = [100.0 * (t == p) for t, p in zip(targets, predictions, strict=True)]
        of_a = [100.0 * (p == "a") for t, p in zip(targets, predictions, strict=True) if t == "a"]
        values = {"right": np.float32(np.mean(right))}
        return values | ({"of_a": float(np.mean(of_a))} if of_a else {})

    got = metrics.estimates(percent, targets, predictions)
    assert len(calls) < 100 and calls.count(1) == 8 + 60
    slow = statistics._draws(lambda i: statistics._called(percent, targets, predictions, i),
                             60, 1000, 0)  # fmt: skip
    for name, e in got.items():
        assert (e.low, e.high) == pytest.approx(statistics._interval([d[name] for d in slow]))
    assert got["right"].value == np.float32(100 * np.mean(np.equal(targets, predictions)))
    assert got["of_a"].n == targets.count("a") < got["right"].n == 60


@pytest.mark.parametrize("what", ["a correlation", "macro-F1 of few", "the mean at first"])
def test_what_is_no_mean_is_not_taken_for_one(what):
    targets, predictions = labels(np.random.default_rng(6), 40)

    def plain(targets, predictions):
        if what == "a correlation":
            if len(targets) < 2:
                raise ZeroDivisionError
            return {"it": len(set(predictions)) / len(targets)}
        if what == "macro-F1 of few":
            return metrics.macro_f1(targets, predictions)
        right = [t == p for t, p in zip(targets, predictions, strict=True)]
        return {"it": float(np.mean(right)) if len(right) < 20 else float(np.median(right))}

    (got,) = metrics.estimates(plain, targets, predictions, resamples=50).values()
    called = functools.partial(statistics._called, plain, targets, predictions)
    drawn = [list(d.values()) for d in statistics._draws(called, 40, 50, 0)]
    assert (got.low, got.high) == statistics._interval(np.ravel(drawn))


def test_a_slow_function_gets_fewer_resamples_and_it_is_said(monkeypatch, caplog):
    monkeypatch.setattr(statistics, "_PATIENCE", 0.3)

    def slow(targets, predictions):
        time.sleep(0.01)
        return {"slow": float(len(set(predictions)))}

    started = time.monotonic()
    got = metrics.estimates(slow, list("abcd"), list("xyzz"))
    assert time.monotonic() - started < 3 and got["slow"].low < got["slow"].high == 3
    (message,) = caplog.messages
    assert re.match(r"slow is slow: its interval is one of [2-9]\d resamples, not 1000", message)


@pytest.mark.parametrize("right, value", [(1, 1.0), (0, 0.0)])
@pytest.mark.parametrize("n", [1, 7])
def test_where_all_examples_agree_so_do_the_resamples(right, value, n):
    for fn in (metrics.label_accuracy, metrics.macro_f1):
        (got,) = metrics.estimates(fn, ["a"] * n, ["a" if right else "b"] * n).values()
        assert got == metrics.Estimate(value, n, 0.0, value, value)


def test_what_cannot_be_estimated():
    with pytest.raises(ValueError, match="0 targets"):
        metrics.estimates(metrics.label_accuracy, [], [])
    with pytest.raises(ValueError, match="2 targets and 1 predictions"):
        metrics.estimates(metrics.label_accuracy, ["a", "b"], ["a"])
    with pytest.raises(ValueError, match="resamples must be at least 2, not 1"):
        metrics.estimates(metrics.label_accuracy, ["a"], ["a"], resamples=1)


def coverage(estimate, truth, datasets=300):
    """Returns the share of simulated data sets whose interval holds the truth."""
    estimates = [estimate(np.random.default_rng(seed)) for seed in range(datasets)]
    return sum(e.low <= truth <= e.high for e in estimates) / datasets


def test_the_interval_covers_the_truth_in_19_of_20_samples():
    def accuracy(rng):
        right = (rng.random(200) < 0.7).astype(str).tolist()
        fn = metrics.label_accuracy
        return metrics.estimates(fn, ["True"] * 200, right, resamples=250)["accuracy"]

    assert 0.92 <= coverage(accuracy, 0.7) <= 0.98

    @metrics.mean_per_example
    def score(targets, predictions):
        return {"score": predictions}

    def skewed(rng):
        return metrics.estimates(score, [""] * 200, rng.beta(1, 3, 200), resamples=250)["score"]

    assert 0.92 <= coverage(skewed, 0.25) <= 0.98

    def macro(rng):
        return metrics.estimates(metrics.macro_f1, *labels(rng, 400), resamples=250)["macro_f1"]

    truth = metrics.macro_f1(*labels(np.random.default_rng(999), 400_000))["macro_f1"]
    assert 0.92 <= coverage(macro, truth) <= 0.98


def test_a_thousand_resamples_of_ten_thousand_examples_take_seconds():
    targets, predictions = labels(np.random.default_rng(5), 10_000)
    for fn in (metrics.label_accuracy, metrics.macro_f1, metrics.per_class, metrics.token_f1):
        start = time.perf_counter()
        metrics.estimates(fn, targets, predictions)
        assert time.perf_counter() - start < 5  # about 0.3 s


# --- Runs in pairs --------------------------------------------------------------------------------


def pair(only_a, only_b, both=5):
    """Returns who is right where, with the given numbers of examples."""
    return (
        [True] * only_a + [False] * only_b + [True] * both,
        [False] * only_a + [True] * only_b + [True] * both,
    )


@pytest.mark.parametrize(
    "only_a, only_b, p",
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (3, 3, 1.0),
        (10, 2, 0.03857421875),
        (6, 15, 0.0783538818359375),
        (7, 16, 0.0931396484375),
        (40, 20, 0.01348929373119186),
        (121, 59, 4.4344492637551645e-06),
    ],
)
def test_mcnemar_is_that_of_statsmodels(only_a, only_b, p):
    """`statsmodels.stats.contingency_tables.mcnemar(table, exact=True).pvalue`, 0.15.0."""
    got = metrics.mcnemar(*pair(only_a, only_b))
    assert (got.only_a, got.only_b, got.n) == (only_a, only_b, only_a + only_b + 5)
    assert got.p == pytest.approx(p, rel=1e-12)
    other = metrics.mcnemar(*reversed(pair(only_a, only_b)))
    assert (other.only_a, other.p, other.difference) == (only_b, got.p, -got.difference)


def test_mcnemars_difference_is_paired():
    """Two runs that agree almost everywhere are told apart by what two single intervals hide."""
    right_a, right_b = pair(30, 5, both=500)
    right_a, right_b = right_a + [False] * 465, right_b + [False] * 465
    got = metrics.mcnemar(right_a, right_b)
    assert got.difference == pytest.approx(0.025) and got.p < 0.001
    spread = math.sqrt((35 / 1000 - 0.025**2) / 1000)
    assert got.low == pytest.approx(0.025 - 1.96 * spread, abs=0.001)
    assert got.high == pytest.approx(0.025 + 1.96 * spread, abs=0.001)
    alone = metrics.standard_error(0.5, 1000)
    assert got.high - got.low < 1.96 * alone
    assert got == metrics.mcnemar(np.array(right_a), np.array(right_b, int))


def test_mcnemar_is_exact_for_many_examples_too():
    start = time.perf_counter()
    assert statistics._coin_p(20_000, 20_000) == 1
    p = statistics._coin_p(20_500, 19_500)  # the normal approximation: z = 4.995
    assert p == pytest.approx(math.erfc(4.995 / math.sqrt(2)), rel=0.01)
    assert time.perf_counter() - start < 10


def test_mcnemar_is_significant_by_chance_as_often_as_it_says():
    rng = np.random.default_rng(0)
    by_chance = [metrics.mcnemar(*(rng.random((2, 300)) < 0.7), resamples=2).p for _ in range(500)]
    assert 0.02 < np.mean(np.array(by_chance) < 0.05) < 0.06


def test_what_cannot_be_paired():
    with pytest.raises(ValueError, match="2 examples of run a and 1 of run b"):
        metrics.mcnemar([True, False], [True])
    with pytest.raises(ValueError, match="at least one"):
        metrics.mcnemar([], [])
    for wrong in (None, "yes", 0.5, math.nan):
        with pytest.raises(ValueError, match="right_b must be True or False for each example, not"):
            metrics.mcnemar([True], [wrong])
