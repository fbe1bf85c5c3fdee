"""Arithmetic on a dial: the embedded task. It needs no file and no network.

    The dial is at 7. Turn it up 5, down 8, up 4.
    rationale: up to 2, down to 4, up to 8.
    label:     8

The dial has the digits 0 to 9 and wraps around, so every label is equally likely and neither the
first nor the last number alone says anything: who always gives the most frequent label is right in
about 10 % of the cases. A student that writes the running values has only one small sum to do at a
time; one that must give the label at once has to do them all in its head.

A chain (start and turns) belongs to one split by its hash, so that no chain is in two of them. The
teacher is exact, but for `teacher_error_rate` of the rows, in which one turn is miscalculated and
the label follows from the mistake.
"""

import dataclasses
import hashlib

import numpy as np

from distill import metrics, task

SPLITS = ("train", "validation", "test")
# Percent of all chains that belong to each split.
SHARES = {"train": 80, "validation": 5, "test": 15}


@dataclasses.dataclass(frozen=True)
class DialSource:
    """Generated dial problems; the same arguments always give the same rows.

    Attributes:
      name: of the dataset, for the ids of the rows.
      turns: how often the dial is turned.
      sizes: rows of each split.
      teacher_error_rate: fraction of rows, in [0, 1], in which the teacher miscalculates a turn.
      equation: the label is the equation `(7 + 5 - 8 + 4)`, not the digit that the dial shows.
      seed: of the generator.
    """

    name: str
    turns: int = 3
    sizes: tuple[int, int, int] = (16_000, 500, 2_000)
    teacher_error_rate: float = 0.0
    equation: bool = False
    seed: int = 0
    splits = SPLITS

    def __post_init__(self):
        if not 0 <= self.teacher_error_rate <= 1:
            raise ValueError(
                f"teacher_error_rate must be in [0, 1], not {self.teacher_error_rate!r}"
            )
        chains = 10 * 18**self.turns
        for split, size in zip(SPLITS, self.sizes, strict=True):
            # Half, because a chain is drawn at random and the last ones are hard to hit.
            most = chains * SHARES[split] // 200
            if size > most:
                raise ValueError(
                    f"{self.turns} turns give too few chains for {size} {split} rows (at most "
                    f"{most}): use more turns or fewer rows"
                )

    def files(self, split: str) -> list[str]:
        """No file: the rows come from the arguments."""
        del split
        return []

    def rows(self, split: str) -> list[task.Row]:
        """All rows of a split, no chain twice."""
        rng = np.random.default_rng([self.seed, SPLITS.index(split)])
        rows: dict[tuple[int, ...], task.Row] = {}
        while len(rows) < self.sizes[SPLITS.index(split)]:
            turns = rng.integers(1, 10, self.turns) * rng.choice([-1, 1], self.turns)
            chain = (int(rng.integers(10)), *map(int, turns))
            teacher_errs = rng.random() < self.teacher_error_rate
            wrong_turn, slip = int(rng.integers(self.turns)), int(rng.integers(1, 10))
            if chain not in rows and _split_of(chain) == split:
                slips = {wrong_turn: slip} if teacher_errs else {}
                rows[chain] = self._row(f"{self.name}/{split}/{len(rows)}", chain, slips)
        return list(rows.values())

    def _row(self, row_id: str, chain: tuple[int, ...], slips: dict[int, int]) -> task.Row:
        start, *turns = chain
        gold, taught = [], []
        value = teacher_value = start
        for i, turn in enumerate(turns):
            value = (value + turn) % 10
            teacher_value = (teacher_value + turn + slips.get(i, 0)) % 10
            gold.append(value)
            taught.append(teacher_value)
        words = [("up" if turn > 0 else "down", abs(turn)) for turn in turns]
        problem = ", ".join(f"{way} {by}" for way, by in words)
        reasoning = ", ".join(f"{way} to {at}" for (way, _), at in zip(words, taught, strict=True))
        label, teacher_label = str(gold[-1]), str(taught[-1])
        if self.equation:
            label = teacher_label = _equation(start, turns)
        return task.Row(
            id=row_id,
            input=f"The dial is at {start}. Turn it {problem}.",
            label=label,
            rationale=f"{reasoning}.",
            teacher_label=teacher_label,
            has_completion=True,
        )


def _equation(start: int, turns: list[int]) -> str:
    return f"({start}" + "".join(f" {'+' if t > 0 else '-'} {abs(t)}" for t in turns) + ")"


def _split_of(chain: tuple[int, ...]) -> str:
    percent = int.from_bytes(hashlib.sha256(repr(chain).encode()).digest()[:4], "big") % 100
    for split, share in SHARES.items():
        if percent < share:
            return split
        percent -= share
    raise AssertionError("SHARES add up to 100")


task.register("arithmetic", source=DialSource("arithmetic"), metric_fns=[metrics.label_accuracy])
# A teacher who is wrong in a quarter of the rows, as PaLM-540B is on the published datasets.
task.register(
    "arithmetic_noisy",
    source=DialSource("arithmetic_noisy", teacher_error_rate=0.25),
    metric_fns=[metrics.label_accuracy],
)
task.register(
    "arithmetic_equation",
    source=DialSource("arithmetic_equation", equation=True),
    metric_fns=[metrics.equation_accuracy],
)
