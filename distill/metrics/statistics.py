"""From examples to a number: means over examples, their intervals, and runs compared in pairs.

The examples of the test set are taken as a sample of those that could be; the seed of a run is not
looked at, so that two seeds may differ by more than an interval says.
"""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

MetricFn = Callable[[Sequence[str], Sequence[str]], dict[str, float]]
# The value of each example, by name, [n]; NaN where an example does not count.
Examples = Mapping[str, Sequence[float]]
# The metric on the examples of these indices, [any number], by name.
Resampled = Callable[[np.ndarray], dict[str, float]]
# Percent of the resampled values that lie between `low` and `high`.
CONFIDENCE = 95
# A function that is none of ours is tried on so many examples to see whether it is their mean, and
# is called for resamples so long (seconds), but so often.
_TRIED = 8
_PATIENCE = 60.0
_LEAST = 20


def mean_per_example(examples: Callable[[Sequence[Any], Sequence[Any]], Examples]) -> MetricFn:
    """Decorator: makes a metric of a function that gives each example's value.

    The metric is the mean over the examples that count, those whose value is not NaN; it leaves out
    a name for which none does. `estimates` and `example_values` find the values again.

        @metrics.mean_per_example
        def starts_right(targets, predictions):
            return {"starts_right": [p[:1] == t[:1] for t, p in zip(targets, predictions)]}
    """

    @over_examples
    def metric(targets, predictions):
        return _means(_by_name(examples(targets, predictions)))

    functools.update_wrapper(metric, examples)
    metric.examples = examples
    return metric


def _means(values: dict[str, np.ndarray]) -> Resampled:
    """Returns the means of values [n] over any choice of the examples; NaN does not count."""
    stacked = np.array(list(values.values())).T  # [n, names]
    counts = ~np.isnan(stacked)
    stacked = np.where(counts, stacked, 0)

    def resampled(index):
        totals, n = stacked[index].sum(0).tolist(), counts[index].sum(0).tolist()
        return {name: t / m for name, t, m in zip(values, totals, n, strict=True) if m}

    return resampled


def over_examples(prepare: Callable[[Sequence[Any], Sequence[Any]], Resampled]) -> MetricFn:
    """Decorator: makes a metric of a function that prepares it for any choice of the examples.

    For metrics that are no mean over examples, such as the macro-F1. What is decorated does the
    work on the texts, once, and returns `resampled(index) -> {name: value}`.
    """

    @functools.wraps(prepare)
    def metric(targets, predictions):
        check_aligned(targets, predictions)
        return prepare(targets, predictions)(np.arange(len(targets)))

    metric.prepare = prepare
    return metric


def example_values(
    fn: MetricFn, targets: Sequence[Any], predictions: Sequence[Any]
) -> dict[str, np.ndarray]:
    """Returns a metric's value of each example, by name, [n] float64; NaN where it does not count.

    A metric that is no `mean_per_example` is called on each example alone.

    Raises:
      ValueError: the lists differ in length or are empty.
    """
    check_aligned(targets, predictions)
    if hasattr(fn, "examples"):
        return _by_name(fn.examples(targets, predictions))
    alone = [fn([t], [p]) for t, p in zip(targets, predictions, strict=True)]
    names = dict.fromkeys(name for values in alone for name in values)
    return {name: np.array([values.get(name, np.nan) for values in alone]) for name in names}


def _by_name(values: Examples) -> dict[str, np.ndarray]:
    return {name: np.asarray(v, np.float64) for name, v in values.items()}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A metric's value and how far examples alone could move it.

    Attributes:
      value: of the metric.
      n: examples that count.
      standard_error: sqrt(p (1 - p) / n) where the value is a fraction p of examples, else the
        standard deviation over the resamples.
      low: end of the 95 % percentile bootstrap interval over examples (Efron 1979). Where all
        examples agree, all resamples do, and the interval is the value itself: of n right answers
        out of n it does not say that an error rate up to about 3 / n would not have been seen.
      high: the other end.
    """

    value: float
    n: int
    standard_error: float
    low: float
    high: float


def estimates(
    fn: MetricFn,
    targets: Sequence[Any],
    predictions: Sequence[Any],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Returns each value of a metric with its uncertainty; a value that is NaN is left out.

    Examples are drawn with replacement `resamples` times, the same ones for every metric of as many
    examples. A metric of `distill.metrics` reads its texts once. Any other function is called on
    each example alone: where its values are the means of these, on all examples and on three
    resamples, they are resampled. Where they are not it is called anew for each resample, of which
    a slow one gets fewer: those of a minute, at least 20, with a warning.

    Args:
      fn: the metric.
      targets: as the metric takes them.
      predictions: likewise.
      resamples: how often to draw.
      seed: of the draws; the same seed gives the same intervals.

    Raises:
      ValueError: the lists differ in length or are empty, or resamples is below 2.
    """
    check_aligned(targets, predictions)
    n, patience = len(targets), math.inf
    examples: dict[str, np.ndarray] = {}
    if hasattr(fn, "examples"):
        examples = example_values(fn, targets, predictions)
        resampled = _means(examples)
    elif hasattr(fn, "prepare"):
        resampled = fn.prepare(targets, predictions)
    else:
        resampled, patience = functools.partial(_called, fn, targets, predictions), _PATIENCE
        examples = _if_their_mean(fn, targets, predictions, seed)
    values = {name: float(value) for name, value in resampled(np.arange(n)).items()}
    if examples:
        resampled = _means(examples)
    draws = _draws(resampled, n, resamples, seed, patience)
    if len(draws) < resamples:
        logging.getLogger(__name__).warning(
            "%s is slow: its interval is one of %d resamples, not %d. For a mean over examples "
            "decorate it with metrics.mean_per_example, for another with metrics.over_examples.",
            getattr(fn, "__name__", fn), len(draws), resamples,
        )  # fmt: skip
    result = {}
    for name, value in values.items():
        if math.isnan(value):
            continue
        drawn = np.array([draw.get(name, np.nan) for draw in draws])
        counted = n
        error = float(np.nanstd(drawn, ddof=1))
        if name in examples:
            kept = examples[name][~np.isnan(examples[name])]
            counted = len(kept)
            if np.isin(kept, (0, 1)).all():
                error = standard_error(value, counted)
        result[name] = Estimate(value, counted, error, *_interval(drawn))
    return result


def _called(
    fn: MetricFn, targets: Sequence[Any], predictions: Sequence[Any], index: np.ndarray
) -> dict[str, float]:
    rows = index.tolist()
    return fn([targets[i] for i in rows], [predictions[i] for i in rows])


def _if_their_mean(
    fn: MetricFn, targets: Sequence[Any], predictions: Sequence[Any], seed: int
) -> dict[str, np.ndarray]:
    """The values of the examples where a metric is their mean, or seems to be; {} where not."""
    n, few = len(targets), min(_TRIED, len(targets))
    called = functools.partial(_called, fn, targets, predictions)
    started = time.monotonic()
    try:
        values = example_values(fn, targets[:few], predictions[:few])
        if not _same(called(np.arange(few)), _means(values)(np.arange(few))):
            return {}
        if (time.monotonic() - started) / few * n > _PATIENCE:
            return {}
        values = example_values(fn, targets, predictions)
    except Exception:  # of one example it may have no value: a correlation, say
        return {}
    means, rng = _means(values), np.random.default_rng(seed)
    tried = [np.arange(n), *(rng.integers(n, size=n) for _ in range(3))]
    return values if all(_same(called(index), means(index)) for index in tried) else {}


def _same(some: Mapping[str, float], others: Mapping[str, float]) -> bool:
    """Whether two have the same values, up to the rounding of float32; NaN is none."""
    some, others = ({k: v for k, v in x.items() if not math.isnan(v)} for x in (some, others))
    return some.keys() == others.keys() and all(
        math.isclose(some[k], others[k], rel_tol=1e-6, abs_tol=1e-9) for k in some
    )


def _draws(
    resampled: Callable[[np.ndarray], Any], n: int, resamples: int, seed: int,
    patience: float = math.inf,
) -> list[Any]:  # fmt: skip
    """Values of resamples; fewer where they take longer than `patience` seconds."""
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, not {resamples!r}")
    rng, started, drawn = np.random.default_rng(seed), time.monotonic(), []
    for number in range(resamples):
        if number >= _LEAST and time.monotonic() - started > patience:
            break
        drawn.append(resampled(rng.integers(n, size=n)))
    return drawn


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    tail = (100 - CONFIDENCE) / 2
    low, high = np.nanpercentile(drawn, (tail, 100 - tail)).tolist()
    return low, high


def standard_error(p: float, n: int) -> float:
    """Returns the standard error of a fraction `p` measured on `n` independent examples.

    Raises:
      ValueError: p is outside [0, 1], or n is not positive.
    """
    if not 0 <= p <= 1 or n < 1:
        raise ValueError(f"standard_error needs a fraction in [0, 1] and n >= 1; got {p=}, {n=}")
    return math.sqrt(p * (1 - p) / n)


@dataclasses.dataclass(frozen=True)
class McNemar:
    """Two runs on the same examples.

    Attributes:
      only_a: examples that only run a has right.
      only_b: examples that only run b has right.
      p: two-sided p-value of "both are right equally often".
      n: examples.
      difference: accuracy of a minus that of b.
      low: end of its 95 % percentile bootstrap interval over examples, both runs resampled alike.
      high: the other end.
    """

    only_a: int
    only_b: int
    p: float
    n: int
    difference: float
    low: float
    high: float


def mcnemar(
    right_a: Sequence[bool], right_b: Sequence[bool], *, resamples: int = 1000, seed: int = 0
) -> McNemar:
    """Returns the exact McNemar test of two runs (McNemar 1947), and their difference.

    Only examples that one run has right and the other wrong say which is better: if both were
    alike, each of these would fall to either side by the toss of a coin. The p-value is that of the
    binomial distribution, for any number of them.

    Args:
      right_a: whether run a has each example right: bools, or 0 and 1.
      right_b: the same of run b, for the same examples in the same order.
      resamples: how often to draw examples for the interval.
      seed: of the draws.

    Raises:
      ValueError: the lists differ in length or are empty, or hold something else.
    """
    if len(right_a) != len(right_b) or not len(right_a):
        raise ValueError(
            f"{len(right_a)} examples of run a and {len(right_b)} of run b: a paired test needs "
            "the same examples of both, and at least one"
        )
    for name, right in (("right_a", right_a), ("right_b", right_b)):
        if wrong := [x for x in right if x not in (0, 1)]:
            raise ValueError(f"{name} must be True or False for each example, not {wrong[0]!r}")
    difference = np.asarray(right_a, np.float64) - np.asarray(right_b, np.float64)
    only_a, only_b = int((difference > 0).sum()), int((difference < 0).sum())
    drawn = _draws(lambda index: difference[index].mean(), len(difference), resamples, seed)
    return McNemar(
        only_a, only_b, _coin_p(only_a, only_b),
        len(difference), float(difference.mean()), *_interval(np.array(drawn)),
    )  # fmt: skip


def _coin_p(heads: int, tails: int) -> float:
    """Two-sided binomial p-value of a fair coin, in whole numbers until the last division."""
    tosses, ways, total = heads + tails, 1, 0
    for k in range(min(heads, tails) + 1):
        total += ways
        ways = ways * (tosses - k) // (k + 1)
    return min(1.0, 2 * total / 2**tosses)


def check_aligned(targets: Sequence[Any], predictions: Sequence[Any]) -> None:
    """Raises ValueError unless there is one prediction for each target, and at least one."""
    if len(targets) != len(predictions) or not len(targets):
        raise ValueError(
            f"{len(targets)} targets and {len(predictions)} predictions: a metric "
            "needs one prediction for each target, and at least one"
        )
