"""Scores: one student's answers to one task, compared with the gold labels, kept and shown.

`score_tasks` is what training calls on its validation split; `evaluate` scores any number of saved
checkpoints and tasks.
"""

import dataclasses
import datetime
import functools
import hashlib
import importlib
import inspect
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from distill import cache, decode, metrics, prompts, results, students, t5

# The published code decodes 64 tokens. Where gold labels are longer (in bytes, say), so is this;
# where the student writes a rationale too, it gets what training cuts targets at.
MIN_DECODE_LENGTH = 64
# Of results: a number that goes up when the same answers would be scored in another way.
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Answering:
    """How a student is asked.

    Attributes:
      decoding: how it writes. Of several samples the label with most votes is the answer.
      by: `generation`, the label is what it writes; `likelihood`, the label is the one it finds
        most probable of those that a task allows.
      explain: also ask a step-by-step student for its rationale.
      num_examples: only the first so many of each task.
      batch_size: rows decoded together; does not change the result.
    """

    decoding: decode.Decoding = decode.Decoding()  # noqa: RUF009 (frozen)
    by: str = "generation"
    explain: bool = False
    num_examples: int | None = None
    batch_size: int = 64

    def __post_init__(self):
        if self.by not in ("generation", "likelihood"):
            raise ValueError(f"ANSWER_BY must be 'generation' or 'likelihood', not {self.by!r}.")
        if self.by == "likelihood" and self.decoding != decode.Decoding():
            raise ValueError("ANSWER_BY='likelihood' writes no label: DECODER has no effect on it.")
        for field, macro in (("num_examples", "EVALUATOR_NUM_EXAMPLES"), ("batch_size",) * 2):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{macro.upper()} must be a positive integer, not {value!r}.")

    @property
    def name(self) -> str:
        """Of the decoder, in tables and file names."""
        return self.decoding.name if self.by == "generation" else "likelihood"


@dataclasses.dataclass(frozen=True)
class Score:
    """One task's result.

    Attributes:
      task: name of the SeqIO task.
      dataset: that it was registered for; the task where that is not known.
      split: `validation`, `test` or `train`.
      decoder: `Answering.name`.
      n: examples.
      estimates: of each metric; `accuracy` is a fraction in [0, 1].
      predictions: one JSON-ready dict per example; `generated` is the student's whole text,
        `prediction` the answer in it, which is scored.
    """

    task: str
    dataset: str
    split: str
    decoder: str
    n: int
    estimates: Mapping[str, metrics.Estimate]
    predictions: Sequence[Mapping[str, Any]] = ()

    @property
    def values(self) -> dict[str, float]:
        """The values alone."""
        return {name: e.value for name, e in self.estimates.items()}

    @property
    def scalars(self) -> dict[str, float]:
        """The values, and the standard error of the main one."""
        return {**self.values, "standard_error": self.main[1].standard_error}

    @property
    def summary(self) -> str:
        """The main value and its interval."""
        name, e = self.main
        return f"{name} {e.value:.4f} [{e.low:.4f}, {e.high:.4f}]"

    @property
    def main(self) -> tuple[str, metrics.Estimate]:
        """The metric that a table shows: accuracy, else the task's first."""
        name = "accuracy" if "accuracy" in self.estimates else next(iter(self.estimates))
        return name, self.estimates[name]


def metric_function(name: str) -> metrics.MetricFn:
    """The metric of a name as the cache holds it: `module.function`.

    Metrics of `distill.metrics` need no TensorFlow; others import the module that defines them.

    Raises:
      ValueError: there is no such function.
    """
    module, _, function = name.rpartition(".")
    if f"{module}.".startswith(f"{metrics.__name__}.") and function in metrics.METRICS:
        return metrics.METRICS[function]
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise ValueError(
            f"Metric {name!r} cannot be imported: define metric_fns as functions of a module."
        ) from e


# --- One task -------------------------------------------------------------------------------------


def score_tasks(
    student: students.Student,
    corpus: cache.Corpus,
    how: Answering = Answering(),  # noqa: B008
) -> list[Score]:
    """Scores each task of a corpus that has metrics (an `explain` task has none)."""
    return [score(student, task, corpus.split, how) for task in scored(corpus)]


def scored(corpus: cache.Corpus) -> list[cache.TaskRows]:
    """The tasks of a corpus that can be scored."""
    return [task for task in corpus.tasks if task.metrics and len(task)]


def rows_of(task: cache.TaskRows, split: str, how: Answering) -> np.ndarray:
    """The numbers of the rows that are asked: one of each example, int64 [n]."""
    rows = np.arange(len(task))
    if split == "train":  # there an example has a row for each of its rationales
        rows = np.sort(np.unique(task.keys, return_index=True)[1])
    return rows[: how.num_examples]


def score(
    student: students.Student,
    task: cache.TaskRows,
    split: str,
    how: Answering,
    progress: Callable[[int], None] | None = None,
) -> Score:
    """Asks a student for every example of a task, and scores its answers.

    In the train split examples without a gold label are left out.

    Args:
      student: the model.
      task: the rows, in the student's vocabulary.
      split: of the rows.
      how: to ask.
      progress: is told how many rows are done.

    Raises:
      ValueError: answering by likelihood, but the task does not say which labels it allows; or no
        example has a gold label.
    """
    records = task.read(rows_of(task, split, how))
    if split == "train":
        records = [record for record in records if record.label]
        if not records:
            raise ValueError(f"No example of {task.name}, train, has a gold label to compare with.")
    if how.by == "likelihood":
        answered = _by_likelihood(student, task, records, how, progress)
    else:
        answered = _by_generation(student, task, records, how, progress)
    if how.explain and prompts.answering_form(task.name) == "predict":
        rationales = _explanations(student, [r.text for r in records], how.batch_size)
        answered = [a | {"rationale": r} for a, r in zip(answered, rationales, strict=True)]
    labels = [record.label for record in records]
    answers = [a["prediction"] for a in answered]
    found: dict[str, metrics.Estimate] = {}
    for name in task.metrics:
        found |= metrics.estimates(metric_function(name), labels, answers)
    found |= _beyond_labels(records, answered)
    right = _right(task, labels, answers) if "accuracy" in found else [None] * len(records)
    predictions = [
        {
            "example_id": record.example_id,
            "input": record.text,
            "label": record.label,
            **answer,
            "correct": correct,
            "teacher": record.teacher or None,
            "teacher_rationale": record.teacher_rationale or None,
            "human_rationale": record.human_rationale or None,
        }
        for record, answer, correct in zip(records, answered, right, strict=True)
    ]
    dataset = task.dataset or task.name
    return Score(task.name, dataset, split, how.name, len(records), found, predictions)


def _by_generation(student, task, records, how: Answering, progress) -> list[dict[str, Any]]:
    """The answer that the student writes to each row, with its probability."""
    longest = -(-int(task.lengths[:, 1].max()) // 16) * 16
    if task.answer_form != "label":
        longest = student.limit("targets")
    generated = student.answer(
        [record.inputs for record in records], how.decoding, batch_size=how.batch_size,
        max_length=max(MIN_DECODE_LENGTH, longest), progress=progress,
    )  # fmt: skip
    found = []
    for texts, log_probs in zip(student.texts(generated), generated.log_probs, strict=True):
        answers = [metrics.answer(text, task.answer_form) for text in texts]
        chosen, probability = 0, math.exp(log_probs[0])
        if how.decoding.method == "sample" and len(answers) > 1:
            chosen, probability = vote(answers)
        found.append({
            "prediction": answers[chosen],
            "generated": texts[chosen],
            "probability": probability,
            "rationale": metrics.rationale(texts[chosen], task.answer_form),
        })  # fmt: skip
    return found


def vote(answers: Sequence[str]) -> tuple[int, float]:
    """Self-consistency: the answer that most samples agree on (Wang et al. 2022, arXiv 2203.11171).

    Answers agree where they are the same text, or equations of the same value. Samples without an
    answer have no vote; of two answers with as many, the one that was said first is taken.

    Returns:
      The index of the first sample that says it, and its share of all samples.
    """
    groups: list[list[int]] = []
    for i, answer in enumerate(answers):
        if not answer.strip():
            continue
        for group in groups:
            if metrics.same_label(answers[group[0]], answer):
                group.append(i)
                break
        else:
            groups.append([i])
    if not groups:
        return 0, 0.0
    won = max(groups, key=len)
    return won[0], len(won) / len(answers)


def _by_likelihood(student, task, records, how: Answering, progress) -> list[dict[str, Any]]:
    """The most probable of the labels that a row allows; probabilities are among these."""
    # A choice that is listed twice is one answer.
    options = [list(dict.fromkeys(record.options.split("\n"))) for record in records]
    if not all(record.options for record in records) or task.answer_form != "label":
        raise ValueError(
            f"{task.name} does not say which labels it allows, so that ANSWER_BY=likelihood cannot "
            "choose among them: give task.register(..., options=...), which holds for validation "
            "and test, or take ANSWER_BY=generation."
        )
    scores = student.likelihoods([record.inputs for record in records], options, how.batch_size)
    if progress:
        progress(len(records))
    found = []
    for allowed, log_probs in zip(options, scores, strict=True):
        shares = np.exp(log_probs - np.max(log_probs))
        best = int(np.argmax(log_probs))
        found.append({
            "prediction": allowed[best],
            "generated": allowed[best],
            "probability": float(shares[best] / shares.sum()),
            "rationale": None,
        })  # fmt: skip
    return found


def _explanations(student, texts: Sequence[str], batch_size: int) -> list[str]:
    """What a step-by-step student gives as its reasons."""
    asked = [
        np.array(student.vocabulary.encode_input(prompts.EXPLAIN + text), np.int32)
        for text in (text.removeprefix(prompts.PREDICT) for text in texts)
    ]
    generated = student.answer(asked, max_length=student.limit("targets"), batch_size=batch_size)
    return [answers[0] for answers in student.texts(generated)]


def _beyond_labels(records, answered) -> dict[str, metrics.Estimate]:
    """Estimates that need more than the gold label: the teacher, the options, the rationales."""
    labels, inputs = [r.label for r in records], [r.text for r in records]
    answers = [a["prediction"] for a in answered]
    found: dict[str, metrics.Estimate] = {}
    allowed = [frozenset(r.options.split("\n")) if r.options else None for r in records]
    equations = all(metrics.equation_value(label) is not None for label in labels)
    if all(allowed) or (equations and not any(allowed)):
        found |= metrics.estimates(metrics.parse_failure, allowed, answers)
    if any(r.teacher for r in records):
        found |= metrics.estimates(metrics.teacher_agreement, [r.teacher for r in records], answers)
    rationales = [a["rationale"] for a in answered]
    if not any(rationales):
        return found
    taught = [
        (reference, said or "")
        for r, said in zip(records, rationales, strict=True)
        if (reference := r.teacher_rationale or r.human_rationale)
    ]
    for fn in (metrics.rouge_l, metrics.chrf) if taught else ():
        found |= metrics.estimates(fn, *map(list, zip(*taught, strict=True)))
    conclusion = metrics.conclusion_for(labels, inputs)
    concluded = [
        conclusion(said, text) if said else None
        for said, text in zip(rationales, inputs, strict=True)
    ]
    return found | metrics.estimates(metrics.rationale_consistency, concluded, answers)


def _right(task: cache.TaskRows, labels, answers) -> list[bool | None]:
    """Whether each answer is right, by the task's first metric; None where that is no yes or no."""
    values = metrics.example_values(metric_function(task.metrics[0]), labels, answers)
    column = values.get("accuracy", np.full(len(labels), np.nan))
    return [bool(v) if v in (0.0, 1.0) else None for v in column]


# --- What is kept, and shown ----------------------------------------------------------------------


def keep(
    folder: epath.Path, predictions: str, key: str, found: Score,
    checkpoint: students.Checkpoint, task: cache.TaskRows, *, most: int | None = None,
) -> None:  # fmt: skip
    """Writes what was found into a folder of results.

    The lines of the result come last: whoever finds them finds the rest, whenever this ends.

    Args:
      folder: of `results.jsonl`.
      predictions: where in it the predictions go, `<split>/<task>-<step>.jsonl`.
      key: of the result.
      found: the score.
      checkpoint: whose it is.
      task: its rows.
      most: predictions to keep; None = all.
    """
    results.write_lines(folder / predictions, ({**p, "key": key} for p in found.predictions[:most]))
    stem = predictions.removesuffix(".jsonl")
    if checkpoint.step is not None:
        stem = stem.rpartition("-")[0]
    line = {"step": checkpoint.step or 0, "n": found.n, **found.scalars}
    # As T5X's; of several lines of a step the last holds.
    results.append(folder / f"{stem}-metrics.jsonl", json.dumps(results.finite(line)) + "\n")
    store = results.Store(folder)
    taught = _teacher_lines(task, found)
    if taught and all(line.get("key") != taught[0]["key"] for line in store.lines()):
        store.add(taught)
    store.add(_lines_of_checkpoint(found, checkpoint, key, predictions))


def _lines_of_checkpoint(
    found: Score, checkpoint: students.Checkpoint, key: str, predictions: str | None
) -> list[dict[str, Any]]:
    """The lines of `results.jsonl` for one score."""
    model = checkpoint.metadata.get("model")
    about = {
        "key": key,
        "run": str(checkpoint.run),
        "checkpoint": checkpoint.path.name,
        "step": checkpoint.step,
        "parameters": t5.param_count(t5.T5Config(**model)) if model else None,
        "tokens": checkpoint.metadata.get("tokens"),
        "mixture": checkpoint.metadata.get("mixture"),
    }
    return _lines(about, found, predictions)


def _lines(about: Mapping[str, Any], found: Score, predictions: str | None):
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return [
        {
            **about, "dataset": found.dataset, "task": found.task, "split": found.split,
            "decoder": found.decoder, "metric": name, **dataclasses.asdict(estimate),
            "predictions": predictions, "of": len(found.estimates), "time": now,
        }
        for name, estimate in found.estimates.items()
    ]  # fmt: skip


def _teacher_lines(task: cache.TaskRows, found: Score) -> list[dict[str, Any]]:
    """The teacher's own accuracy on the rows of a score; [] where it said nothing."""
    said = [p["teacher"] or "" for p in found.predictions]
    if not any(said):
        return []
    estimates: dict[str, metrics.Estimate] = {}
    for name in task.metrics:
        labels = [p["label"] for p in found.predictions]
        estimates |= metrics.estimates(metric_function(name), labels, said)
    teacher = dataclasses.replace(found, estimates=estimates, decoder="teacher")
    key = hashlib.sha256(json.dumps([FORMAT, "teacher", digest(task), found.split, found.n])
                         .encode()).hexdigest()[:16]  # fmt: skip
    about = dict.fromkeys(("checkpoint", "step", "parameters", "tokens", "mixture"))
    return _lines({"key": key, "run": "teacher", **about}, teacher, None)


def from_lines(lines: Sequence[Mapping[str, Any]]) -> Score:
    fields = [f.name for f in dataclasses.fields(metrics.Estimate)]
    estimates = {}
    for line in lines:
        numbers = {f: math.nan if line[f] is None else line[f] for f in fields}
        estimates[line["metric"]] = metrics.Estimate(**numbers)
    first = lines[0]
    n = max(e.n for e in estimates.values())
    return Score(first["task"], first["dataset"], first["split"], first["decoder"], n, estimates)


def digest(task: cache.TaskRows) -> str:
    """Changes with the rows of a task and with the code of all metrics, its own and ours."""
    sources = {inspect.getsourcefile(inspect.unwrap(metric_function(m))) for m in task.metrics}
    # One file of ours uses another, and `_beyond_labels` uses more than the task names.
    sources |= set(map(str, pathlib.Path(metrics.__file__).parent.glob("*.py")))
    codes = [
        hashlib.sha256(pathlib.Path(f).read_bytes()).hexdigest()
        for f in sorted(filter(None, sources))
    ]
    facts = [task.name, task.metrics, task.answer_form, _file_digest(task.path), codes]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@functools.lru_cache(maxsize=256)  # a generation of the row cache never changes
def _file_digest(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def table(rows: Sequence[tuple[str, Score]]) -> str:
    """One line a checkpoint, one column a dataset: the main metric and its 95 % interval."""
    tasks: dict[Any, set[str]] = {}
    for name, s in rows:
        tasks.setdefault((name, s.dataset, s.split), set()).add(s.task)
    # Of several tasks of a dataset each has its own column.
    several = {dataset for (_, dataset, _), names in tasks.items() if len(names) > 1}
    cells: dict[str, dict[Any, str]] = {}
    for name, s in rows:
        metric, e = s.main
        column = s.task if s.dataset in several else s.dataset, s.split, metric, s.n
        cells.setdefault(name, {})[column] = f"{e.value:.4f} [{e.low:.4f}, {e.high:.4f}]"
    columns = list(dict.fromkeys(column for of in cells.values() for column in of))
    lines = [
        ["checkpoint", *(f"{d} {split}, {metric} (n = {n})" for d, split, metric, n in columns)]
    ]
    lines += [[name, *(of.get(c, "") for c in columns)] for name, of in cells.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)
