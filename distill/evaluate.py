"""Evaluation: answers of checkpoints to tasks, scored against gold labels.

`score_tasks` is what training calls on its validation split; `evaluate` does the same for any
number of saved checkpoints and tasks, keeps what it found, and prints one table.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib
import inspect
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from tqdm import tqdm

from distill import cache, cluster, decode, metrics, prompts, results, students, t5

# The published code decodes 64 tokens. Where gold labels are longer (in bytes, say), so is this;
# where the student writes a rationale too, it gets what training cuts targets at.
MIN_DECODE_LENGTH = 64
# Of results: a number that goes up when the same answers would be scored in another way.
FORMAT = 1
# How often a run is looked at for new checkpoints.
POLL_SECONDS = 5.0


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
      split: `validation` or `test`.
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


def num_rows(task: cache.TaskRows, how: Answering) -> int:
    return min(len(task), how.num_examples or len(task))


def score(
    student: students.Student,
    task: cache.TaskRows,
    split: str,
    how: Answering,
    progress: Callable[[int], None] | None = None,
) -> Score:
    """Asks a student for every row of a task, and scores its answers.

    Args:
      student: the model.
      task: the rows, in the student's vocabulary.
      split: of the rows.
      how: to ask.
      progress: is told how many rows are done.

    Raises:
      ValueError: answering by likelihood, but the task does not say which labels it allows.
    """
    records = task.read(range(num_rows(task, how)))
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
    right = _right(task, labels, answers)
    predictions = [
        {
            "example_id": record.example_id,
            "input": record.text,
            "label": record.label,
            **answer,
            "correct": correct,
            "teacher": record.teacher or None,
            "teacher_rationale": record.teacher_rationale or None,
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
            "choose among them: give task.register(..., options=...), or take ANSWER_BY=generation."
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
        (r.teacher_rationale, said or "")
        for r, said in zip(records, rationales, strict=True) if r.teacher_rationale
    ]  # fmt: skip
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


# --- Many checkpoints, many tasks -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate on what.

    Attributes:
      checkpoint_path: what `students.find` takes: a checkpoint, a run's MODEL_DIR, a pattern such
        as `/runs/*`, a T5X checkpoint, a folder in Hugging Face's format; several with commas.
      restore_mode: which checkpoints of each run, see `students.find`.
      mixture_or_task_name: tasks, mixtures or datasets, several with commas; None = the mixture
        that the checkpoint was trained on. A dataset stands for its task in the student's form.
      mixture_or_task_module: the module whose import registers it; None = the run's.
      split: `validation` or `test`.
      force: evaluate on tasks of another form than the student's all the same.
      answering: how the student is asked.
      eval_output_dir: where predictions and results go; None = `inference_eval` in each run.
      wait_minutes: then also evaluates every checkpoint that a run still writes, until the run ends
        or none has come for so long; None = do not wait.
      data_dir: None = $DISTILL_DATA_DIR, else the run's.
      vocabulary: None = the one that the checkpoint was trained with.
      parsing: see `cache.RowsConfig`; so are the following. It matters to tasks that show the
        student a rationale. None = the run's, where the dataset is the run's.
      rationale_store: the same; '' = none.
      max_bad_rows: None = none.
      allow_missing: datasets of the mixture that may be absent. None as for parsing.
      cache_dir: where tokenised rows are kept.
    """

    checkpoint_path: str
    restore_mode: str = "latest"
    mixture_or_task_name: str | None = None
    mixture_or_task_module: str | None = None
    split: str = "validation"
    force: bool = False
    answering: Answering = Answering()  # noqa: RUF009 (frozen)
    eval_output_dir: str | None = None
    wait_minutes: float | None = None
    data_dir: str | None = None
    vocabulary: str | None = None
    parsing: str | None = None
    rationale_store: str | None = None
    max_bad_rows: int | None = None
    allow_missing: Sequence[str] | None = None
    cache_dir: str | None = None

    def __post_init__(self):
        if self.split not in ("validation", "test", "train"):
            raise ValueError(f"SPLIT must be 'validation' or 'test', not {self.split!r}.")
        if self.wait_minutes is not None and not self.wait_minutes > 0:
            raise ValueError(f"WAIT_MINUTES must be positive, not {self.wait_minutes!r}.")


@dataclasses.dataclass(frozen=True)
class _Unit:
    """What is computed once: a checkpoint on a task."""

    checkpoint: students.Checkpoint
    task: cache.TaskRows
    split: str
    folder: epath.Path
    predictions: str  # file in the folder
    kind: str  # TensorBoard's folder in it
    key: str


def evaluate(config: EvaluateConfig) -> list[tuple[str, Score]]:
    """Scores checkpoints on tasks, keeps results and predictions, and prints a table.

    What is there already, of the same checkpoint, rows and way of asking, is not computed again. In
    `eval_output_dir`: `results.jsonl` (see `results`), `<split>/<task>-<step>.jsonl` (one line an
    example), `<split>/<task>-metrics.jsonl` (one line a step) and TensorBoard's files.

    Returns:
      (checkpoint, score) in the order of the table; scores that were kept have no predictions.

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: a checkpoint is damaged (the others are evaluated first), its vocabulary or form
        does not fit, or no task has a metric.
    """
    computed: set[str] = set()
    failed: dict[str, str] = {}
    units: dict[str, _Unit] = {}  # of all rounds: what was evaluated stays in the table
    corpora: dict[cache.RowsConfig, cache.Corpus] = {}
    waited_since = time.monotonic()
    while True:
        # Asked before looking: the last checkpoint may come while others are evaluated.
        ended = config.wait_minutes is not None and cluster.agreed(
            cluster.is_first() and _has_ended(config)
        )
        found = _find(config)
        wanted = [unit for checkpoint in found for unit in _units(config, checkpoint, corpora)]
        units |= {unit.key: unit for unit in wanted}
        missing = [u for u in _missing(wanted) if str(u.checkpoint.path) not in failed]
        cluster.wait_for_all("units")  # nobody writes before all have seen what is there
        if missing:
            _compute(config, missing, len(wanted), computed, failed)
            waited_since = time.monotonic()
        patience = config.wait_minutes is not None and (
            time.monotonic() - waited_since < config.wait_minutes * 60
        )
        if cluster.agreed(ended or not patience):
            break
        time.sleep(POLL_SECONDS)
    if not units:
        raise FileNotFoundError(
            f"No checkpoint at {config.checkpoint_path} (RESTORE_MODE={config.restore_mode}) after "
            f"{config.wait_minutes:g} minutes (WAIT_MINUTES), or until the run ended."
        )
    if config.wait_minutes is not None and not ended:
        logging.warning("No new checkpoint for %s minutes.", f"{config.wait_minutes:g}")

    scores = []
    folders = list(dict.fromkeys(unit.folder for unit in units.values()))
    for folder in folders:
        kept = results.Store(folder).complete()
        scores += [
            (unit, _score_of(kept[unit.key]))
            for unit in units.values() if unit.folder == folder and unit.key in kept
        ]  # fmt: skip
    named = list(zip(_names([unit for unit, _ in scores]), (s for _, s in scores), strict=True))
    if jax.process_index() == 0:
        print(table(named))
        number = len({unit.checkpoint.path for unit, _ in scores})
        before = sum(unit.key not in computed for unit, _ in scores)
        print(
            f"{len(scores)} results of {number} checkpoint{'s' * (number != 1)}: "
            f"{len(computed)} computed, {before} kept from before. "
            f"In {', '.join(map(str, folders))}."
        )
    if failed:
        reasons = "".join(f"\n  {path}: {reason}" for path, reason in failed.items())
        raise ValueError(f"{len(failed)} checkpoints could not be evaluated:{reasons}")
    return named


def _find(config: EvaluateConfig) -> list[students.Checkpoint]:
    """The checkpoints that are there, the same ones on all processes."""
    if not cluster.is_first():
        paths = cluster.agreed(None)
        return [c for path in paths for c in students.find(path, "specific")]
    try:
        found = students.find(config.checkpoint_path, config.restore_mode)
    except FileNotFoundError:
        if config.wait_minutes is None:
            raise
        found = []
    cluster.agreed([str(c.path) for c in found])
    return found


def _units(
    config: EvaluateConfig,
    checkpoint: students.Checkpoint,
    corpora: dict[cache.RowsConfig, cache.Corpus],
) -> list[_Unit]:
    """The tasks that a checkpoint is to be evaluated on; corpora are opened once for all."""
    wanted = config.mixture_or_task_name or checkpoint.metadata.get("mixture")
    if wanted is None:  # a checkpoint that was converted, not trained here
        raise ValueError(
            f"{checkpoint.path} does not say what it was trained on: set "
            "--gin.MIXTURE_OR_TASK_NAME=..."
        )
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    tasks: dict[str, cache.TaskRows] = {}
    for corpus in (_corpus(config, checkpoint, name, corpora) for name in names):
        tasks |= {task.name: task for task in scored(corpus)}
    if not tasks:
        raise ValueError(f"No task of {wanted!r} has a metric, so there is no accuracy.")
    for name in tasks:
        form = prompts.answering_form(name)
        if form != checkpoint.form and None not in (form, checkpoint.form) and not config.force:
            raise ValueError(
                f"{checkpoint.path} was trained on {checkpoint.metadata['mixture']!r} and answers "
                f"to the form {checkpoint.form!r}; {name!r} has another prompt or target. Evaluate "
                f"on {prompts.split_name(name)[0]}_{checkpoint.form}, or set --gin.FORCE=True."
            )
    folder = epath.Path(config.eval_output_dir or checkpoint.run / students.RESULTS).expanduser()
    how, units = config.answering, []
    # Several runs may share a folder of results.
    shared = f"{_run_name(checkpoint)}/" if config.eval_output_dir else ""
    for task in tasks.values():
        settings = [
            FORMAT, checkpoint.fingerprint, shared, _rows_digest(task), config.split,
            dataclasses.asdict(dataclasses.replace(how, batch_size=1)),
        ]  # fmt: skip
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        step = "" if checkpoint.step is None else f"-{checkpoint.step:06}"
        decoder = "" if how.name == "greedy" else f"-{how.name}"
        predictions = f"{shared}{config.split}/{task.name}{decoder}{step}.jsonl"
        kind = f"{shared}{task.name}{decoder}/{config.split}"
        units.append(_Unit(checkpoint, task, config.split, folder, predictions, kind, key))
    return units


def _run_name(checkpoint: students.Checkpoint) -> str:
    digest = hashlib.sha256(str(checkpoint.run).encode()).hexdigest()[:6]
    return f"{checkpoint.run.name}-{digest}"


def _missing(units: Sequence[_Unit]) -> list[_Unit]:
    there = {f: results.Store(f).complete() for f in {unit.folder for unit in units}}
    return [unit for unit in units if unit.key not in there[unit.folder]]


def _compute(
    config: EvaluateConfig, units: Sequence[_Unit], total: int, computed: set, failed: dict
) -> None:
    """Evaluates, checkpoint by checkpoint, and writes each result when it is there."""
    is_writer = jax.process_index() == 0
    started, seen = time.monotonic(), 0
    done = total - len(units)  # results that are there
    rows = sum(num_rows(unit.task, config.answering) for unit in units)
    bar = tqdm(
        total=rows, unit="row", dynamic_ncols=True,
        disable=not (is_writer and sys.stderr.isatty()),
    )  # fmt: skip
    by_checkpoint: dict[str, list[_Unit]] = {}
    for unit in units:
        by_checkpoint.setdefault(str(unit.checkpoint.path), []).append(unit)
    with bar, contextlib.ExitStack() as stack:
        writers = {
            folder: stack.enter_context(results.MetricWriter(folder))
            for folder in {unit.folder for unit in units}
        }
        for path, mine in by_checkpoint.items():
            student = None
            for unit in mine:
                name = f"{_names([unit])[0]}, {unit.task.name}"
                bar.set_description(f"{done + 1} of {total}: {name}")
                try:
                    student = student or students.load(unit.checkpoint, config.vocabulary)
                except (FileNotFoundError, ValueError) as e:
                    if not students.is_there(unit.checkpoint):
                        # The run that wrote it keeps its newest only.
                        logging.warning("%s has gone meanwhile: %s", path, e)
                    elif isinstance(e, FileNotFoundError):
                        raise
                    else:
                        failed[path] = str(e)
                        logging.error("%s: %s", path, e)
                    break
                before = bar.n

                def progress(done: int, before=before) -> None:
                    bar.update(before + done - bar.n)

                found = score(student, unit.task, unit.split, config.answering, progress)
                bar.update(before + found.n - bar.n)
                seen += found.n
                computed.add(unit.key)
                done += 1
                if is_writer:
                    keep(unit.folder, unit.predictions, unit.key, found, unit.checkpoint, unit.task)
                    step = unit.checkpoint.step or 0
                    writers[unit.folder].write(unit.kind, step, found.scalars)
                    speed = seen / (time.monotonic() - started)
                    left = datetime.timedelta(seconds=round((rows - seen) / speed))
                    bar.write(
                        f"{name}, {unit.split}: {_shown(found)}  "
                        f"({done} of {total}, {speed:.1f} rows/s, {left} left)"
                    )
            del student  # before the next one is read


def keep(
    folder: epath.Path, predictions: str, key: str, found: Score,
    checkpoint: students.Checkpoint, task: cache.TaskRows, *, most: int | None = None,
) -> None:  # fmt: skip
    """Writes what was found into a folder of results; predictions first, so that it is whole.

    Args:
      folder: of `results.jsonl`.
      predictions: where in it the predictions go, `<split>/<task>-<step>.jsonl`.
      key: of the result.
      found: the score.
      checkpoint: whose it is.
      task: its rows.
      most: predictions to keep; None = all.
    """
    results.write_lines(folder / predictions, found.predictions[:most])
    store = results.Store(folder)
    store.add(_lines_of_checkpoint(found, checkpoint, key, predictions))
    taught = _teacher_lines(task, found)
    if taught and all(line.get("key") != taught[0]["key"] for line in store.lines()):
        store.add(taught)
    step, stem = checkpoint.step or 0, predictions.removesuffix(".jsonl")
    if checkpoint.step is not None:
        stem = stem.rpartition("-")[0]
    path = folder / f"{stem}-metrics.jsonl"  # as T5X's
    kept = [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []
    kept = [line for line in kept if line["step"] != step]
    kept.append({"step": step, "n": found.n, **found.scalars})
    results.write_lines(path, sorted(kept, key=lambda line: line["step"]))


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
    key = hashlib.sha256(json.dumps([FORMAT, "teacher", _rows_digest(task), found.split, found.n])
                         .encode()).hexdigest()[:16]  # fmt: skip
    about = dict.fromkeys(("checkpoint", "step", "parameters", "tokens", "mixture"))
    return _lines({"key": key, "run": "teacher", **about}, teacher, None)


def _score_of(lines: Sequence[Mapping[str, Any]]) -> Score:
    fields = [f.name for f in dataclasses.fields(metrics.Estimate)]
    estimates = {}
    for line in lines:
        numbers = {f: math.nan if line[f] is None else line[f] for f in fields}
        estimates[line["metric"]] = metrics.Estimate(**numbers)
    first = lines[0]
    n = max(e.n for e in estimates.values())
    return Score(first["task"], first["dataset"], first["split"], first["decoder"], n, estimates)


def _rows_digest(task: cache.TaskRows) -> str:
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


def _has_ended(config: EvaluateConfig) -> bool:
    """Whether all runs have written their last checkpoint; one that is no run of ours has.

    The newest of each says so, whichever are evaluated: every other one, or the best, may be older,
    and a run that was made longer has passed what was its last step.
    """
    try:
        newest = students.find(config.checkpoint_path, "latest")
    except FileNotFoundError:
        return False
    return all(c.step == c.metadata.get("last_step", c.step) for c in newest)


def _names(units: Sequence[_Unit]) -> list[str]:
    """Of each unit's checkpoint, with the end of the run's path that tells the runs apart."""
    runs = {unit.checkpoint.run for unit in units}
    depth = 1
    while len({run.parts[-depth:] for run in runs}) < len(runs):
        depth += 1
    names = []
    for unit in units:
        run = "/".join(unit.checkpoint.run.parts[-depth:])
        path = unit.checkpoint.path
        names.append(run if path == unit.checkpoint.run else f"{run}/{path.name}")
    return names


def _shown(found: Score) -> str:
    name, e = found.main
    return f"{name} {e.value:.4f} [{e.low:.4f}, {e.high:.4f}]"


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


def _corpus(
    config: EvaluateConfig,
    checkpoint: students.Checkpoint,
    name: str,
    corpora: dict[cache.RowsConfig, cache.Corpus],
) -> cache.Corpus:
    """The rows of a task, mixture or dataset, in the student's own vocabulary."""
    metadata = checkpoint.metadata
    trained = metadata.get("mixture") or ""

    def run_if_unset(field: str):
        """A setting of the rows: the run's, if its own dataset is evaluated."""
        value = getattr(config, field)
        same = prompts.split_name(name)[0] == prompts.split_name(trained)[0]
        return metadata.get(field) if value is None and same else value

    def rows(name: str) -> cache.RowsConfig:
        data_dir = os.environ.get("DISTILL_DATA_DIR") or metadata.get("data_dir")
        return cache.RowsConfig(
            mixture_or_task_name=name,
            mixture_or_task_module=(
                config.mixture_or_task_module or metadata.get("module") or "tasks"
            ),
            data_dir=config.data_dir or data_dir,
            vocabulary=students.vocabulary_of(checkpoint, config.vocabulary),
            parsing=run_if_unset("parsing"),
            rationale_store=run_if_unset("rationale_store"),
            max_bad_rows=config.max_bad_rows,
            allow_missing=run_if_unset("allow_missing") or (),
            cache_dir=config.cache_dir,
        )

    names = [name]
    if prompts.split_name(name)[1] is None and checkpoint.form is not None:
        names = [f"{name}_{checkpoint.form}", name]
    for number, wanted in enumerate(map(rows, names), 1):
        if wanted in corpora:
            return corpora[wanted]
        try:
            corpora[wanted] = cache.load(wanted, config.split)
        except prompts.UnknownNameError:
            if number == len(names):
                raise
            continue
        cluster.wait_for_all("data")  # a host may have tokenised for an hour
        return corpora[wanted]
