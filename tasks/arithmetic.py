"""Arithmetic word problems: the embedded task. It needs no file and no network.

    Ann has 7 nuts, gets 2, eats 5, gets 4.
    rationale: 9, then 4, then 8.
    label:     8

Every amount on the way is a digit, drawn evenly, so each of the ten labels is about equally likely
and always giving the most frequent one is right in about 10 % of the cases. A student that writes
the running values has one small sum to do at a time; one that gives the label at once has to do
all of them in its head. Half an answer is easier: who looks at the last change alone knows that
after six nuts were eaten at most three are left.

A chain (the running amounts) belongs to one split by its hash, so no problem is in two of them,
whoever it is about. The teacher is exact, but for `teacher_error_rate` of the rows, in which one
sum is wrong and the label follows from the mistake.
"""

import dataclasses
import hashlib

import numpy as np

from distill import metrics, sources, task

SPLITS = ("train", "validation", "test")
# Percent of all chains that belong to each split.
SHARES = {"train": 75, "validation": 5, "test": 20}
# `9, then 4, then 8.`; `7 + 2 = 9, 9 - 5 = 4, 4 + 4 = 8.`; `4.`, the amount before the last change;
# the amounts of another problem, which teach nothing about this one.
RATIONALES = ("amounts", "sums", "last", "unrelated")
NAMES = ("Ann", "Ben", "Eva", "Kim", "Sam", "Tom")


@dataclasses.dataclass(frozen=True)
class NutsSource:
    """Generated problems; the same arguments always give the same rows.

    Attributes:
      name: of the dataset, for the ids of the rows.
      changes: how often the amount changes.
      sizes: rows of each split; no chain comes twice.
      teacher_error_rate: fraction of rows, in [0, 1], in which the teacher gets a sum wrong.
      equation: the label is the equation `(7 + 2 - 5 + 4)`, not the final amount.
      rationale: what the teacher says, one of RATIONALES; inputs and labels are the same.
      seed: of the generator.
    """

    name: str
    changes: int = 3
    sizes: tuple[int, int, int] = (4_800, 300, 1_200)
    teacher_error_rate: float = 0.0
    equation: bool = False
    rationale: str = "amounts"
    seed: int = 0
    splits = SPLITS

    def __post_init__(self):
        if not 0 <= self.teacher_error_rate <= 1:
            raise ValueError(
                f"teacher_error_rate must be in [0, 1], not {self.teacher_error_rate!r}"
            )
        if self.rationale not in RATIONALES:
            raise ValueError(
                f"rationale must be one of {', '.join(RATIONALES)}, not {self.rationale!r}"
            )
        chains = 10 * 9**self.changes
        for split, size in zip(SPLITS, self.sizes, strict=True):
            # Not all of them: chains are drawn at random, and the last ones are hard to hit.
            most = chains * SHARES[split] * 9 // 1000
            if size > most:
                raise ValueError(
                    f"{self.changes} changes give too few chains for {size} {split} rows (at most "
                    f"{most}): use more changes or fewer rows"
                )

    def files(self, split: str) -> list[str]:
        """No file: the rows come from the arguments."""
        del split
        return []

    def rows(self, split: str) -> list[sources.Row]:
        """All rows of a split, no chain twice."""
        rng = np.random.default_rng([self.seed, SPLITS.index(split)])
        rows: dict[tuple[int, ...], sources.Row] = {}
        while len(rows) < self.sizes[SPLITS.index(split)]:
            amounts = tuple(map(int, rng.integers(10, size=self.changes + 1)))
            who = NAMES[rng.integers(len(NAMES))]
            teacher_errs = rng.random() < self.teacher_error_rate
            wrong, slip = int(rng.integers(self.changes)), int(rng.integers(1, 10))
            repeats = any(a == b for a, b in zip(amounts, amounts[1:], strict=False))
            if amounts in rows or repeats or _split_of(amounts) != split:
                continue
            taught = _with_slip(amounts, wrong, slip) if teacher_errs else amounts
            rows[amounts] = self._row(f"{self.name}/{split}/{len(rows)}", who, amounts, taught)
        return list(rows.values())

    def _row(self, row_id: str, who: str, amounts: tuple[int, ...], taught) -> sources.Row:
        changes = [b - a for a, b in zip(amounts, amounts[1:], strict=False)]
        story = ", ".join(f"{'gets' if c > 0 else 'eats'} {abs(c)}" for c in changes)
        label, teacher_label = str(amounts[-1]), str(taught[-1])
        if self.equation:
            terms = "".join(f" {'+' if c > 0 else '-'} {abs(c)}" for c in changes)
            label = teacher_label = f"({amounts[0]}{terms})"
        return sources.Row(
            id=row_id,
            input=f"{who} has {amounts[0]} nuts, {story}.",
            label=label,
            answers=(sources.Answer(self._said(taught), teacher_label),),
        )

    def _said(self, taught: tuple[int, ...]) -> str:
        """The teacher's rationale for these amounts."""
        if self.rationale == "sums":
            steps = zip(taught, taught[1:], strict=False)
            sums = (f"{a} {'+' if b > a else '-'} {abs(b - a)} = {b}" for a, b in steps)
            return ", ".join(sums) + "."
        if self.rationale == "last":
            return f"{taught[-2]}."
        if self.rationale == "unrelated":
            digest = hashlib.sha256(repr(taught).encode()).digest()
            taught = (0, *(byte % 10 for byte in digest[: self.changes]))
        return ", then ".join(map(str, taught[1:])) + "."


def _with_slip(amounts: tuple[int, ...], wrong: int, slip: int) -> tuple[int, ...]:
    """The teacher's amounts: one is off, and all that follow from it (kept to digits)."""
    return (*amounts[: wrong + 1], *((a + slip) % 10 for a in amounts[wrong + 1 :]))


def _split_of(amounts: tuple[int, ...]) -> str:
    digest = hashlib.sha256(repr(amounts).encode()).digest()
    percent = int.from_bytes(digest[:4], "big") % 100
    for split, share in SHARES.items():
        if percent < share:
            return split
        percent -= share
    raise AssertionError("SHARES add up to 100")


AMOUNTS = [str(n) for n in range(10)]

task.register(
    "arithmetic",
    source=NutsSource("arithmetic"),
    metric_fns=[metrics.label_accuracy],
    options=AMOUNTS,
)
# A teacher who is wrong in a quarter of the rows, as PaLM-540B is on the published datasets.
task.register(
    "arithmetic_noisy",
    source=NutsSource("arithmetic_noisy", teacher_error_rate=0.25),
    metric_fns=[metrics.label_accuracy],
    options=AMOUNTS,
)
task.register(
    "arithmetic_equation",
    source=NutsSource("arithmetic_equation", equation=True),
    metric_fns=[metrics.equation_accuracy],
)
# The same problems under other rationales: does their length matter, does what they say?
for _rationale in RATIONALES[1:]:
    task.register(
        f"arithmetic_{_rationale}",
        source=NutsSource(f"arithmetic_{_rationale}", rationale=_rationale),
        metric_fns=[metrics.label_accuracy],
        options=AMOUNTS,
    )
