"""Sources made of others: the first that is there, and one with an unlabeled pool."""

import dataclasses
from collections.abc import Sequence

from etils import epath

from distill import metrics
from distill.sources.binding import settings
from distill.sources.rows import Row, Source, note, noting

OR = "; or "  # between the places of `FirstOf` where nothing was


@dataclasses.dataclass(frozen=True)
class FirstOf:
    """For each split, the first of several sources whose files are there.

    Attributes:
      sources: in the order of preference; they name the same dataset.
    """

    sources: tuple[Source, ...]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(s for source in self.sources for s in source.splits))

    @property
    def teacher_metric(self) -> metrics.MetricFn | None:
        found = (getattr(s, "teacher_metric", None) for s in self.sources)
        return next((fn for fn in found if fn), None)

    def first(self, split: str) -> Source:
        """Returns the source that is used for a split.

        Raises:
          FileNotFoundError: none has its files; the message says what was looked for in each.
        """
        absent = []
        for source in self.sources:
            if split not in source.splits:
                continue
            try:
                source.files(split)
                return source
            except FileNotFoundError as e:
                absent.append(str(e))
        if not absent:
            raise ValueError(f"no split {split!r}; there are {', '.join(self.splits)}")
        raise FileNotFoundError(OR.join(absent))

    def rows(self, split: str) -> list[Row]:
        return self.first(split).rows(split)

    def files(self, split: str) -> list[str]:
        return self.first(split).files(split)


class _Around:
    """What a source made of another one takes from it."""

    source: Source

    @property
    def splits(self) -> Sequence[str]:
        return self.source.splits

    @property
    def teacher_metric(self) -> metrics.MetricFn | None:
        return getattr(self.source, "teacher_metric", None)

    def files(self, split: str) -> list[str]:
        return self.source.files(split)


@dataclasses.dataclass(frozen=True)
class WithPool(_Around):
    """A source whose training rows are followed by inputs without a gold label.

    Attributes:
      source: gives the labeled rows, and all of validation and test.
      pool: its train rows are added, without their labels, whether they have some or not.
    """

    source: Source
    pool: Source

    def rows(self, split: str) -> list[Row]:
        """Returns the rows of a split.

        Raises:
          ValueError: an id of the pool is one of the source's.
        """
        rows = self.source.rows(split)
        if split != "train":
            return rows
        pool = [dataclasses.replace(row, label=None) for row in self.pool.rows("train")]
        if taken := {r.id for r in rows} & {r.id for r in pool}:
            raise ValueError(
                f"the pool has the id {min(taken)!r}, which a row has too: give the pool's source "
                "another name"
            )
        note(f"{len(pool)} rows come from an unlabeled pool")
        return rows + pool

    def files(self, split: str) -> list[str]:
        return [*self.source.files(split), *(self.pool.files("train") if split == "train" else ())]


class Remembered(_Around):
    """A source that reads a split once, until its files change.

    The tasks of a dataset read the same rows one after the other, and large files take a minute to
    parse. Only the last split is kept.
    """

    def __init__(self, source: Source):
        self.source = source
        self._last: tuple[object, list[Row], dict[str, bool]] | None = None

    def rows(self, split: str) -> list[Row]:
        paths = [epath.Path(file) for file in self.files(split)]
        stats = [path.stat() for path in paths if path.exists()]
        state = split, settings(), paths, [(stat.mtime, stat.length) for stat in stats]
        if self._last is None or self._last[0] != state:
            with noting() as notes:
                rows = self.source.rows(split)
            self._last = state, rows, notes
        _, rows, notes = self._last
        for message, warn in notes.items():
            note(message, warn)
        return rows
