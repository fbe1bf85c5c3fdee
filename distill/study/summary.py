"""What a study found: means over seeds, differences, and how many examples a method needs.

Seeds are the sample: of n runs that differ in nothing else the mean has the interval
mean +- t(n - 1) * sd / sqrt(n). Test examples are the same for all of them. What is read off a
curve (where it crosses a line) gets its interval by drawing seeds with replacement (bootstrap).
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill.study.manifest import DATASET, MODEL, SEED, Study

# Axes whose values say how many examples there are; curves run over the number itself.
EXAMPLES = ("TRAIN_FRACTION", "NUM_TRAIN_EXAMPLES")
_RESAMPLES = 2000


def is_size(axis: str) -> bool:
    """Whether an axis changes the student; its curves run over the number of parameters."""
    return axis == MODEL or axis.startswith("T5Config.")


@dataclasses.dataclass(frozen=True)
class Point:
    """All seeds of one setting.

    Attributes:
      arm: how it was trained.
      dataset: that it was tested on.
      task: likewise, the SeqIO task.
      axes: its values, but for the seed; the dataset among them is what the manifest says.
      seeds: of the runs.
      test: the metric on the test split of each of them, [seeds].
      validation: on the validation split, at the step that was chosen by it, [seeds].
      parameters: of the student.
      examples: that it could train on.
      steps: updates, the mean over the runs.
      tokens: real training tokens, the mean over the runs.
      n: test examples.
      standard_error: over test examples, the mean over the runs.
      metric: what is measured.
      teacher: the teacher's value on the test split, None where it is not known.
    """

    arm: str
    dataset: str
    task: str
    axes: Mapping[str, Any]
    seeds: Sequence[int]
    test: np.ndarray
    validation: np.ndarray
    parameters: int
    examples: int
    steps: float
    tokens: float
    n: int
    standard_error: float
    metric: str
    teacher: float | None

    @property
    def mean(self) -> float:
        return float(self.test.mean())

    @property
    def half_width(self) -> float:
        """Of the mean's 95 % interval over seeds; NaN of one seed."""
        return half_width(self.test)

    def position(self, axis: str) -> float:
        """Where it lies on an axis of a plot."""
        if axis in EXAMPLES:
            return self.examples
        return self.parameters if is_size(axis) else self.axes[axis]


@dataclasses.dataclass(frozen=True)
class Difference:
    """An arm against the baseline at the same setting, seed by seed.

    Attributes:
      point: the arm's.
      baseline: the other's.
      seeds: that both have.
      mean: of the differences.
      half_width: of their 95 % interval; NaN of one seed.
    """

    point: Point
    baseline: Point
    seeds: int
    mean: float
    half_width: float

    @property
    def verdict(self) -> str:
        if math.isnan(self.half_width):
            return "one seed"
        if abs(self.mean) <= self.half_width or self.mean == 0:
            return "no difference seen"
        return "better" if self.mean > 0 else "worse"


@dataclasses.dataclass(frozen=True)
class Crossing:
    """Where an arm's curve reaches a value.

    Attributes:
      arm: whose curve.
      dataset: that it was tested on.
      where: what else is fixed, as in `beside`.
      line: what is reached, in words.
      level: the value.
      at: the position, between two points on a logarithmic axis; None where no point reaches it.
      low: of the 95 % interval over resampled seeds; None with one seed, or where fewer than half
        of the resamples reach it.
      high: likewise; infinite where more than 2.5 % of the resamples do not reach it.
      reached: fraction of the resamples that reach it; None with one seed.
      span: the axis from its first to its last point.
      of: the position that the level was measured at; None where it is no point of a curve.
    """

    arm: str
    dataset: str
    where: Sequence[str]
    line: str
    level: float
    at: float | None
    low: float | None
    high: float | None
    reached: float | None
    span: tuple[float, float]
    of: float | None = None


@dataclasses.dataclass(frozen=True)
class Summary:
    """All that is shown.

    Attributes:
      study: the manifest.
      lines: of the results file.
      points: in the order of the manifest.
      differences: of every arm from the baseline at the same setting, on the seeds of both.
      examples: what each arm needs to match the baseline on all examples.
      sizes: of each arm, the smallest student that passes the teacher.
      missing: runs that are not done.
    """

    study: Study
    lines: Sequence[Mapping[str, Any]]
    points: Sequence[Point]
    differences: Sequence[Difference]
    examples: Sequence[Crossing]
    sizes: Sequence[Crossing]
    missing: int = 0

    @property
    def axes(self) -> list[str]:
        """Those with several values, but for seeds."""
        return _varied(self.points)


def _varied(points: Sequence[Point]) -> list[str]:
    names = dict.fromkeys(axis for point in points for axis in point.axes)
    return [
        axis for axis in names
        if len({str(p.axes[axis]) for p in points if axis in p.axes}) > 1
    ]  # fmt: skip


def beside(point: Point, axis: str, varied: Sequence[str]) -> list[str]:
    """The values that tell the curves over an axis apart, such as `ALPHA 0.3`."""
    return [
        f"{name} {value}" for name, value in point.axes.items()
        if name in varied and name != axis
        and not (name == DATASET and value == point.dataset)
    ]  # fmt: skip


def half_width(values: np.ndarray) -> float:
    """Of the 95 % interval of the mean of [n] values, by Student's t; NaN for n = 1."""
    from scipy import stats

    if len(values) < 2:
        return math.nan
    t = stats.t.ppf(0.975, len(values) - 1)
    return float(t * values.std(ddof=1) / math.sqrt(len(values)))


def summarize(study: Study, lines: Sequence[Mapping[str, Any]], missing: int = 0) -> Summary:
    """Sums up the results of a study, of which some may be missing.

    Args:
      study: the manifest.
      lines: as `cell.run_cell` writes them, in the order of the manifest.
      missing: how many runs have none yet.
    """
    points = _points(study, lines)
    baseline = study.baseline or study.arms[0].name
    return Summary(
        study, lines, points, _differences(points, baseline), _examples(points, baseline),
        _sizes(points), missing,
    )  # fmt: skip


def _points(study: Study, lines: Sequence[Mapping[str, Any]]) -> list[Point]:
    groups: dict[Any, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for line in lines:
        axes = study.axes_of(study.arm(line["arm"]))
        fixed = tuple((axis, str(line[axis])) for axis in axes if axis != SEED)
        # A mixture is tested on each of its datasets.
        groups[line["arm"], line["tested_on"], line["task"], fixed].append(line)
    return [
        Point(
            arm=first["arm"],
            dataset=first["tested_on"],
            task=first["task"],
            axes={
                axis: first[axis] for axis in study.axes_of(study.arm(first["arm"]))
                if axis != SEED
            },
            seeds=[line[SEED] for line in group],
            test=np.array([line["test"] for line in group], float),
            validation=np.array([line["validation"] for line in group], float),
            parameters=first["parameters"],
            examples=first["examples"],
            steps=float(np.mean([line["steps"] for line in group])),
            tokens=float(np.mean([line["tokens"] for line in group])),
            n=first["n"],
            standard_error=float(np.mean([line["standard_error"] for line in group])),
            metric=first["metric"],
            teacher=first["teacher"],
        )
        for group in groups.values() for first in group[:1]
    ]  # fmt: skip


def _differences(points: Sequence[Point], baseline: str) -> list[Difference]:
    found = []
    for point in points:
        for other in points:
            common = sorted(set(point.seeds) & set(other.seeds))
            if other.arm == baseline != point.arm and _same_setting(point, other) and common:
                mine, others = (dict(zip(p.seeds, p.test, strict=True)) for p in (point, other))
                paired = np.array([mine[seed] - others[seed] for seed in common])
                found.append(
                    Difference(point, other, len(common), float(paired.mean()), half_width(paired))
                )
    return found


def _same_setting(a: Point, b: Point) -> bool:
    """Whether two arms were tested on the same and agree on the axes that both have."""
    shared = set(a.axes) & set(b.axes)
    return a.dataset == b.dataset and all(a.axes[axis] == b.axes[axis] for axis in shared)


def curves(points: Sequence[Point], axis: str) -> dict[tuple, list[Point]]:
    """Points that differ on one axis alone, by (tested on, arm, the other values), in its order."""
    found: dict[tuple, list[Point]] = collections.defaultdict(list)
    for point in points:
        if axis in point.axes:
            rest = tuple((k, str(v)) for k, v in point.axes.items() if k != axis)
            found[point.dataset, point.arm, rest].append(point)
    return {k: sorted(group, key=lambda p: p.position(axis)) for k, group in found.items()}


def _examples(points: Sequence[Point], baseline: str) -> list[Crossing]:
    """What each arm needs to match the baseline on all examples."""
    found = []
    for axis in EXAMPLES:
        lines = [group for group in curves(points, axis).values() if len(group) > 1]
        for group in lines:
            for other in lines:
                full = other[-1]
                at_full = dataclasses.replace(
                    group[0], axes={**group[0].axes, axis: full.axes[axis]}
                )  # fmt: skip
                if full.arm == baseline != group[0].arm and _same_setting(at_full, full):
                    own = set(full.axes) - set(group[0].axes)
                    name = ", ".join([baseline, *(f"{k} {full.axes[k]}" for k in sorted(own))])
                    line = f"{name} on {full.examples:,} examples"
                    where = beside(group[0], axis, _varied(points))
                    found.append(_crossing(group, axis, full.test, where, line, of=full.examples))
    return found


def _sizes(points: Sequence[Point]) -> list[Crossing]:
    """The smallest student of each arm that passes the teacher."""
    sizes = dict.fromkeys(axis for point in points for axis in point.axes if is_size(axis))
    return [
        _crossing(group, axis, np.array([group[0].teacher]),
                  beside(group[0], axis, _varied(points)), "the teacher", steps=True)
        for axis in sizes
        for group in curves(points, axis).values()
        if len(group) > 1 and group[0].teacher is not None
    ]  # fmt: skip


def _crossing(
    group: Sequence[Point], axis: str, level: np.ndarray, where: Sequence[str], line: str, *,
    steps: bool = False, of: float | None = None,
) -> Crossing:  # fmt: skip
    """Where the curve of a group reaches the mean of `level`.

    Between points the curve is straight over a logarithmic axis; `steps`: only the points count.
    """
    xs = np.array([point.position(axis) for point in group], float)
    at = _first_at(xs, np.array([p.mean for p in group]), float(level.mean()), steps)
    # The teacher's value is one number; a baseline's has to have seeds, too.
    several = min(len(p.test) for p in group) > 1 and (of is None or len(level) > 1)
    drawn = []
    rng = np.random.default_rng(0)
    for _ in range(_RESAMPLES if several else 0):
        means = np.array([rng.choice(p.test, len(p.test)).mean() for p in group])
        drawn.append(_first_at(xs, means, float(rng.choice(level, len(level)).mean()), steps))
    positions = np.array([math.inf if x is None else x for x in drawn])
    low = high = reached = None
    if several:
        reached = float(np.isfinite(positions).mean())
        if reached >= 0.5:
            low, high = np.quantile(positions, [0.025, 0.975], method="nearest").tolist()
    return Crossing(
        group[0].arm, group[0].dataset, where, line, float(level.mean()), at, low, high, reached,
        (xs[0], xs[-1]), of,
    )  # fmt: skip


def _first_at(xs: np.ndarray, ys: np.ndarray, level: float, steps: bool) -> float | None:
    """Where a curve first reaches a level; its first point, where that is above it already."""
    if ys[0] >= level:
        return float(xs[0])
    for (x0, y0), (x1, y1) in itertools.pairwise(zip(xs, ys, strict=True)):
        if y1 >= level:
            if steps:
                return float(x1)
            share = (level - y0) / (y1 - y0)
            return float(np.exp(np.log(x0) + share * (np.log(x1) - np.log(x0))))
    return None
