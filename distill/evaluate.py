"""Evaluation: any number of checkpoints on any number of tasks, nothing twice, and one table."""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath
from tqdm import tqdm

from distill import cache, cluster, prompts, results, scoring, students

# How often a run is looked at for new checkpoints.
POLL_SECONDS = 5.0


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
      split: `validation`, `test`, or `train` to see what a student learnt by heart.
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
    answering: scoring.Answering = scoring.Answering()  # noqa: RUF009 (frozen)
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
            raise ValueError(f"SPLIT must be 'validation', 'test' or 'train', not {self.split!r}.")
        if self.wait_minutes is not None and not self.wait_minutes > 0:
            raise ValueError(f"WAIT_MINUTES must be positive, not {self.wait_minutes!r}.")


@dataclasses.dataclass(frozen=True)
class _Unit:
    """What is computed once: a checkpoint on a task."""

    checkpoint: students.Checkpoint
    task: cache.TaskRows
    split: str
    how: scoring.Answering
    folder: epath.Path
    predictions: str  # file in the folder
    kind: str  # TensorBoard's folder in it
    key: str


def evaluate(config: EvaluateConfig) -> list[tuple[str, scoring.Score]]:
    """Scores checkpoints on tasks, keeps results and predictions, and prints a table.

    What is there already, of the same checkpoint, rows and way of asking, is not computed again. In
    `eval_output_dir`: `results.jsonl` (see `results`), `<split>/<task>-<step>.jsonl` (one line an
    example), `<split>/<task>-metrics.jsonl` (one line an evaluation) and TensorBoard's files.

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
    for found in _rounds(config):
        wanted = [unit for checkpoint in found for unit in _units(config, checkpoint, corpora)]
        units |= {unit.key: unit for unit in wanted}
        missing = _missing(wanted)
        if missing:
            _compute(config, missing, len(wanted), computed, failed)
    if not units:
        raise FileNotFoundError(
            f"No checkpoint at {config.checkpoint_path} (RESTORE_MODE={config.restore_mode}) after "
            f"{config.wait_minutes:g} minutes (WAIT_MINUTES), or until the run ended."
        )
    failed |= cluster.agreed(_never_came(config) if cluster.is_first() else {})

    cluster.wait_for_all("results")  # the first process may still be writing
    scores = []
    folders = list(dict.fromkeys(unit.folder for unit in units.values()))
    for folder in folders:
        kept = results.Store(folder).complete()
        scores += [
            (unit, scoring.from_lines(kept[unit.key]))
            for unit in units.values() if unit.folder == folder and unit.key in kept
        ]  # fmt: skip
    named = list(zip(_names([unit for unit, _ in scores]), (s for _, s in scores), strict=True))
    if jax.process_index() == 0:
        print(scoring.table(named))
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


def _rounds(config: EvaluateConfig) -> Iterator[list[students.Checkpoint]]:
    """Yields the checkpoints that are there, then those that come; the same on all processes.

    The first process looks; the others get what it saw, since it may have gone when they look.
    """
    seen: set[str] = set()
    more = True
    while more:
        found, more = cluster.together(
            lambda: _look(config, seen) if cluster.is_first() else ([], False)
        )
        seen.update(f"{c.path}@{c.fingerprint}" for c in found)
        told = [(str(c.path), str(c.run), c.step, c.fingerprint, dict(c.metadata)) for c in found]
        told, more = cluster.agreed([told, more])
        yield [
            students.Checkpoint(epath.Path(path), epath.Path(run), *facts)
            for path, run, *facts in told
        ]


def _look(config: EvaluateConfig, seen: set[str]) -> tuple[list[students.Checkpoint], bool]:
    """Returns the checkpoints that are not in `seen`, and whether more may come.

    Waits for them, where that is wanted, as long as a run goes on.
    """
    started = time.monotonic()
    while True:
        # Asked before looking: the last checkpoint may come in between.
        left = students.unfinished(config.checkpoint_path) if config.wait_minutes else {}
        found = students.find(
            config.checkpoint_path, config.restore_mode, must_exist=config.wait_minutes is None
        )
        new = [c for c in found if f"{c.path}@{c.fingerprint}" not in seen]
        if new or not left:
            return new, bool(left)
        if time.monotonic() - started > config.wait_minutes * 60:
            runs = ", ".join(f"{run} ({why})" for run, why in left.items())
            logging.warning("No new checkpoint for %g minutes: %s", config.wait_minutes, runs)
            return [], False
        time.sleep(POLL_SECONDS)


def _never_came(config: EvaluateConfig) -> dict[str, str]:
    """The paths that were waited for in vain."""
    if config.wait_minutes is None:
        return {}
    return {
        path: f"no checkpoint in {config.wait_minutes:g} minutes (WAIT_MINUTES)"
        for path in students.paths(config.checkpoint_path)
        if not students.find(path, must_exist=False)
    }


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
        tasks |= {task.name: task for task in scoring.scored(corpus)}
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
    units = []
    # Several runs may share a folder of results.
    shared = f"{_run_name(checkpoint)}/" if config.eval_output_dir else ""
    for task in tasks.values():
        how = _answering(config, checkpoint, task)
        settings = [
            scoring.FORMAT, checkpoint.fingerprint, shared, scoring.digest(task), config.split,
            dataclasses.asdict(dataclasses.replace(how, batch_size=1)),
        ]  # fmt: skip
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        step = "" if checkpoint.step is None else f"-{checkpoint.step:06}"
        decoder = "" if how.name == "greedy" else f"-{how.name}"
        predictions = f"{shared}{config.split}/{task.name}{decoder}{step}.jsonl"
        kind = f"{shared}{task.name}{decoder}/{config.split}"
        units.append(_Unit(checkpoint, task, config.split, how, folder, predictions, kind, key))
    return units


def _answering(
    config: EvaluateConfig, checkpoint: students.Checkpoint, task: cache.TaskRows
) -> scoring.Answering:
    """How a student is asked: not for reasons where it has none to give."""
    how = config.answering
    asked = how.explain and prompts.answering_form(task.name) == "predict"
    if asked and checkpoint.explains is not False:
        return how
    if how.explain and task.answer_form == "label":
        _warn_once(
            f"EXPLAIN has no effect on {checkpoint.run}, {task.name}: it is for tasks of the form "
            "'predict', and students that learnt to explain beside it (this one was trained on "
            f"{checkpoint.metadata.get('mixture')!r})."
        )
    return dataclasses.replace(how, explain=False)


@functools.cache
def _warn_once(message: str) -> None:
    logging.warning("%s", message)


def _run_name(checkpoint: students.Checkpoint) -> str:
    digest = hashlib.sha256(str(checkpoint.run).encode()).hexdigest()[:6]
    return f"{checkpoint.run.name}-{digest}"


def _missing(units: Sequence[_Unit]) -> list[_Unit]:
    """Those whose results are not there, as the first process sees it."""
    there: dict[epath.Path, Any] = {}
    if cluster.is_first():
        there = {f: results.Store(f).complete() for f in {unit.folder for unit in units}}
    missing = cluster.agreed([u.key for u in units if u.key not in there.get(u.folder, ())])
    return [unit for unit in units if unit.key in set(missing)]


def _compute(
    config: EvaluateConfig, units: Sequence[_Unit], total: int, computed: set, failed: dict
) -> None:
    """Evaluates, checkpoint by checkpoint, and writes each result when it is there."""
    is_writer = jax.process_index() == 0
    started, seen = time.monotonic(), 0
    done = total - len(units)  # results that are there
    rows = sum(len(scoring.rows_of(unit.task, unit.split, unit.how)) for unit in units)
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
                except (FileNotFoundError, ValueError) as e:  # on all processes
                    if not cluster.agreed(students.is_there(unit.checkpoint)):
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

                found = scoring.score(student, unit.task, unit.split, unit.how, progress)
                bar.update(before + found.n - bar.n)
                seen += found.n
                computed.add(unit.key)
                done += 1
                if is_writer:
                    step = unit.checkpoint.step or 0
                    writers[unit.folder].write(unit.kind, step, found.scalars)
                    scoring.keep(  # last: it says that all is there
                        unit.folder, unit.predictions, unit.key, found, unit.checkpoint, unit.task
                    )
                    speed = seen / (time.monotonic() - started)
                    left = datetime.timedelta(seconds=round((rows - seen) / speed))
                    bar.write(
                        f"{name}, {unit.split}: {found.summary}  "
                        f"({done} of {total}, {speed:.1f} rows/s, {left} left)",
                        file=sys.stderr,
                    )
            del student  # before the next one is read


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
