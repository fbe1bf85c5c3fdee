"""What a report says: the checkpoint of each run by validation, curves, and pairs of runs."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from etils import epath

from distill import metrics
from distill.report.results import (
    TEACHER,
    TEST,
    VALIDATION,
    Result,
    find,
    json_lines,
    read,
    shortest_names,
)

Student = tuple[str, str]  # run, decoder


@dataclasses.dataclass(frozen=True)
class Column:
    """What a column of the main table is about.

    Attributes:
      dataset: as the results have it.
      task: None where no student has more than one task of the dataset.
      metric: the first of the dataset; it also chooses the checkpoint.
    """

    dataset: str
    task: str | None
    metric: str

    @property
    def name(self) -> str:
        return self.dataset if self.task is None else f"{self.dataset}, {self.task}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A cell of the main table: one student on one dataset.

    Attributes:
      shown: on the test split at the step of `best`, None where that was not measured; without
        validation values, that of the latest step.
      best: the highest validation value, None where there is none; of equal ones the earliest.
      latest: the last step that has any value.
    """

    shown: Result | None
    best: Result | None
    latest: int

    @property
    def step(self) -> int:
        return (self.best or self.shown).step


@dataclasses.dataclass(frozen=True)
class Line:
    """A student's curve.

    Attributes:
      student: its position in `Report.students`.
      split: of the points; validation, where there is any.
      points: in the order of their steps.
      best: the step that validation chose, None where there is none.
      test: at the chosen step, where the points are not test values themselves.
    """

    student: int
    split: str
    points: list[Result]
    best: int | None
    test: Result | None


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot: a metric of a dataset over the training of all students."""

    column: Column
    metric: str
    split: str
    lines: list[Line]
    teacher: Result | None


@dataclasses.dataclass(frozen=True)
class Examples:
    """What a student said to the examples of a split.

    Attributes:
      result: whose predictions they are.
      is_best: at the chosen step.
      is_latest: at the last step.
      rows: as the file has them; see `_prediction`.
    """

    result: Result
    is_best: bool
    is_latest: bool
    rows: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two students, each at its chosen step, on the examples that both were scored on.

    Attributes:
      column: on what.
      a: the predictions of one.
      b: of the other.
      paired: how they differ.
    """

    column: Column
    a: Examples
    b: Examples
    paired: metrics.McNemar


@dataclasses.dataclass(frozen=True)
class Report:
    """All that the tables, plots and the page show.

    Attributes:
      results: every value, in the order of the files.
      students: (run, decoder), in the order of the files.
      columns: of the main table.
      choices: its cells.
      teacher: its last row, on the split of the cells.
      panels: the plots, by metric and then by dataset.
      examples: predictions of the chosen and of the latest checkpoints.
      comparisons: of all pairs of students.
      notes: what was left out, and why.
      names: of the runs, as short as they can be.
    """

    results: list[Result]
    students: list[Student]
    columns: list[Column]
    choices: dict[tuple[Student, Column], Choice]
    teacher: dict[Column, Result]
    panels: list[Panel]
    examples: list[Examples]
    comparisons: list[Comparison]
    notes: list[str]
    names: dict[str, str]

    def label(self, student: Student) -> str:
        """The run's name, with its decoder where the report has several."""
        several = len({decoder for _, decoder in self.students}) > 1
        return ", ".join([self.names[student[0]], *([student[1]] if several else [])])


def build(patterns: Sequence[str]) -> Report:
    """Reads evaluations and returns what there is to say of them.

    Args:
      patterns: results files, folders that hold some, and globs.

    Raises:
      FileNotFoundError: there is no results file.
      ValueError: the files hold no value of a student.
    """
    files, notes = find(patterns)
    results, damaged = read(files)
    notes += damaged
    of_students = [r for r in results if r.run != TEACHER]
    if not of_students:
        raise ValueError(f"No value of a student in {', '.join(map(str, files))}. {damaged or ''}")
    values = _one_per_cell(of_students, notes)
    students = list(dict.fromkeys(r.student for r in values))
    names = shortest_names([TEACHER, *dict.fromkeys(r.run for r in values)])
    columns = _columns(values)
    choices = {
        (student, column): choice
        for student in students
        for column in columns
        if (choice := _choose(_of(values, student, column, column.metric)))
    }
    unvalidated = [
        f"{names[student[0]]} on {column.name}"
        for (student, column), choice in choices.items()
        if choice.best is None
    ]
    if unvalidated:
        notes.append(
            f"No validation values of {', '.join(unvalidated)}: the latest checkpoint is shown. "
            "Evaluate the validation split to choose by it."
        )
    panels = [
        _panel(column, metric, values, results, students, choices)
        for metric in dict.fromkeys([*(c.metric for c in columns), *(r.metric for r in values)])
        for column in columns
    ]
    teacher = {}
    for column in columns:
        splits = {c.shown.split for (_, of), c in choices.items() if of == column and c.shown}
        split = next(iter(splits)) if len(splits) == 1 else TEST
        if found := _teacher(results, column.dataset, column.metric, split):
            teacher[column] = found
    examples = _examples(values, choices, names, notes)
    return Report(
        results=results,
        students=students,
        columns=columns,
        choices=choices,
        teacher=teacher,
        panels=[panel for panel in panels if panel.lines],
        examples=examples,
        comparisons=_comparisons(columns, students, choices, examples),
        notes=notes,
        names=names,
    )


def _one_per_cell(results: list[Result], notes: list[str]) -> list[Result]:
    """Of one checkpoint measured more than once: over most examples, then the last."""
    cells: dict[tuple, Result] = {}
    again = set()
    for r in results:
        cell = (r.student, r.dataset, r.task, r.split, r.metric, r.step)
        if cell in cells:
            again.add(cell)
            r = max(r, cells[cell], key=lambda r: (r.n or 0, r.time or ""))
        cells[cell] = r
    if again:
        notes.append(
            f"{len(again):,} values were measured more than once, in different settings. Tables "
            "and plots have the one over most examples, of these the last; the list of all values "
            "has every one."
        )
    return list(cells.values())


def _columns(values: list[Result]) -> list[Column]:
    columns = {}
    for dataset in dict.fromkeys(r.dataset for r in values):
        mine = [r for r in values if r.dataset == dataset]
        of_student: dict[Student, set] = {}
        for r in mine:
            of_student.setdefault(r.student, set()).add(r.task)
        several = any(len(tasks) > 1 for tasks in of_student.values())
        for r in mine:
            task = r.task if several else None
            # The first metric of each column.
            columns.setdefault((dataset, task), Column(dataset, task, r.metric))
    return sorted(columns.values(), key=lambda column: column.name)


def _of(values: list[Result], student: Student, column: Column, metric: str) -> list[Result]:
    return [
        r
        for r in values
        if r.student == student
        and r.dataset == column.dataset
        and column.task in (None, r.task)
        and r.metric == metric
    ]


def _choose(values: list[Result]) -> Choice | None:
    """Chooses by validation, never by test."""
    if not values:
        return None
    latest = max(r.step for r in values)
    validation = [r for r in values if r.split == VALIDATION]
    test = [r for r in values if r.split == TEST]
    if validation:
        best = max(validation, key=lambda r: (r.value, -r.step))
        return Choice(next((r for r in test if r.step == best.step), None), best, latest)
    return Choice(max(test or values, key=lambda r: r.step), None, latest)


def _teacher(results: list[Result], dataset: str, metric: str, split: str) -> Result | None:
    """Of several (a teacher that was evaluated on less, say), that over most examples."""
    lines = [
        r
        for r in results
        if (r.run, r.dataset, r.metric, r.split) == (TEACHER, dataset, metric, split)
    ]
    return max(lines, key=lambda r: (r.n or 0, r.time or ""), default=None)


def _panel(
    column: Column,
    metric: str,
    values: list[Result],
    results: list[Result],
    students: list[Student],
    choices: dict[tuple[Student, Column], Choice],
) -> Panel:
    lines = []
    for i, student in enumerate(students):
        mine = _of(values, student, column, metric)
        choice = choices.get((student, column))
        if not mine or choice is None:
            continue
        splits = {r.split for r in mine}
        split = next((s for s in (VALIDATION, TEST) if s in splits), min(splits))
        points = sorted((r for r in mine if r.split == split), key=lambda r: r.step)
        tested = (r for r in mine if r.split == TEST != split and r.step == choice.step)
        best = choice.best.step if choice.best else None
        lines.append(Line(i, split, points, best, next(tested, None)))
    splits = {line.split for line in lines}
    split = VALIDATION if VALIDATION in splits else min(splits, default=TEST)
    return Panel(column, metric, split, lines, _teacher(results, column.dataset, metric, split))


# --- Predictions ----------------------------------------------------------------------------------


def _examples(
    values: list[Result],
    choices: dict[tuple[Student, Column], Choice],
    names: dict[str, str],
    notes: list[str],
) -> list[Examples]:
    found, missing = [], {}
    for (student, column), choice in choices.items():
        for r in _of(values, student, column, column.metric):
            if r.step not in (choice.step, choice.latest):
                continue
            path = r.predictions and epath.Path(r.file).parent / r.predictions
            # A results file names files beside it only, whoever wrote it.
            inside = r.predictions and not r.predictions.startswith(("/", "~"))
            if not inside or ".." in path.parts or not path.is_file():
                missing.setdefault(names[student[0]], []).append(r.predictions or "none named")
                continue
            rows = _predictions(path, r.key, notes)
            if rows is None:
                notes.append(
                    f"{path}: no examples of this value: the predictions are those of another "
                    "evaluation of the checkpoint, in other settings"
                )
                continue
            found.append(Examples(r, r.step == choice.step, r.step == choice.latest, rows))
    for name, files in missing.items():
        notes.append(
            f"{name}: no examples where the predictions are not beside the results: "
            f"{', '.join(dict.fromkeys(files))}"
        )
    return found


def _predictions(path: epath.Path, key: str, notes: list[str]) -> list[dict[str, Any]] | None:
    """Returns the rows of a file; None where they are not those of the result with this key."""
    rows, unusable = [], 0
    for _, row in json_lines(path, notes):
        if row.get("key", key) != key:
            return None
        if isinstance(row.get("example_id"), str) and isinstance(row.get("prediction"), str):
            rows.append(_prediction(row))
        else:
            unusable += 1
    if unusable:
        notes.append(f"{path}: {unusable:,} lines without example_id or prediction, left out")
    return rows


def _prediction(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that are shown, each text or None, `correct` and `teacher_correct`."""
    texts = ("example_id", "input", "label", "prediction", "generated", "teacher",
             "teacher_rationale", "human_rationale", "rationale")  # fmt: skip
    shown = {name: row[name] if isinstance(row.get(name), str) else None for name in texts}
    correct, probability = row.get("correct"), row.get("probability")
    shown["correct"] = correct if isinstance(correct, bool) else None
    number = isinstance(probability, int | float) and math.isfinite(probability)
    shown["probability"] = round(probability, 4) if number else None
    shown["teacher_correct"] = _same_answer(shown["label"], shown["teacher"])
    return shown


def _same_answer(label: str | None, answer: str | None) -> bool | None:
    """Whether an answer is the gold one: as text, or as equations of one value."""
    if label is None or answer is None:
        return None
    return metrics.same_label(label, answer)


def _comparisons(
    columns: list[Column],
    students: list[Student],
    choices: dict[tuple[Student, Column], Choice],
    examples: list[Examples],
) -> list[Comparison]:
    of_result = {e.result: e for e in examples}
    right = {
        e.result: {r["example_id"]: r["correct"] for r in e.rows if r["correct"] is not None}
        for e in examples
    }
    made = []
    for column in columns:
        shown = [c.shown for student in students if (c := choices.get((student, column)))]
        for a, b in itertools.combinations([r for r in shown if r in of_result], 2):
            both = sorted(right[a].keys() & right[b].keys())
            if both and a.split == b.split:
                paired = metrics.mcnemar(
                    [right[a][key] for key in both], [right[b][key] for key in both]
                )
                made.append(Comparison(column, of_result[a], of_result[b], paired))
    return made
