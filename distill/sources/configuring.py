"""A source as the run wants it: rationale store, then teacher filter; and what repairs gain."""

import dataclasses
from collections.abc import Sequence

from distill import metrics
from distill.sources.binding import settings
from distill.sources.composed import FirstOf
from distill.sources.rationales import WithRationales, filter_rows
from distill.sources.released import ReleasedLayout
from distill.sources.rows import Row, Source, note, teacher_accuracy


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
        note(
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


def repair_gains(
    source: Source, split: str, metric_fn: metrics.MetricFn = metrics.label_accuracy
) -> list[tuple[str, int, float | None]]:
    """Returns (name, unparsed, accuracy) of the published rules and after each repair in turn.

    Args:
      source: a `ReleasedLayout`, or a source made of one; for others the list is empty.
      split: one of its splits.
      metric_fn: scores the teacher's labels, unless the layout has a `teacher_metric`.
    """
    if isinstance(source, Configured) and settings().rationale_store:
        return []  # The completions are not used.
    layout = _released(source, split)
    if layout is None:
        return []
    taught, size = layout._taught(split)
    gains = []
    for count in range(len(layout.repairs) + 1):
        rows = layout._rows(taught, size, split, layout.repairs[:count])
        gains.append(
            (
                layout.repairs[count - 1].__name__ if count else "reference",
                sum(bool(r.answers) and r.teacher is None for r in rows),
                teacher_accuracy(rows, layout.teacher_metric or metric_fn),
            )
        )
    return gains


def released_completions(source: Source, split: str) -> dict[str, str]:
    """Returns id -> the raw completion that was released with a dataset.

    Args:
      source: a `ReleasedLayout`, or a source made of one.
      split: one of its splits.

    Raises:
      ValueError: it is not made of one, or no completions are there for this split.
    """
    layout = _released(source, split)
    found = layout.completions(split) if layout else {}
    if not found:
        raise ValueError(
            f"no completions were released for {split} of this dataset: they would be in "
            "<data folder>/<name>/llm/, see docs/tasks.md"
        )
    return found


def _released(source: Source, split: str) -> ReleasedLayout | None:
    """Returns the released layout that a source is made of; None where it is made of none."""
    while not isinstance(source, ReleasedLayout):
        source = source.first(split) if isinstance(source, FirstOf) else source
        source = getattr(source, "source", source)
        if not isinstance(source, ReleasedLayout | FirstOf) and not hasattr(source, "source"):
            return None
    return source
