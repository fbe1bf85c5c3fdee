"""One run of a study: trained, its best step by validation tested once, its result kept."""

import contextlib
import dataclasses
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging
from etils import epath

from distill import (
    cache,
    cluster,
    configure,
    data,
    evaluate,
    packing,
    prompts,
    results,
    scoring,
    students,
    t5,
    train,
)
from distill.study.manifest import DATASET, STEPS, Cell, Study

RUNS, RESULTS = "runs", "cells"
# Another process has this run in hand.
EXIT_BUSY = 76
# Where things are, and how fast: another value is the same run.
_PLACES = ("DATA_DIR", "CACHE_DIR", "LOADER_PROCESSES")


@dataclasses.dataclass(frozen=True)
class Job:
    """A study that is being run.

    Attributes:
      study: the manifest.
      output_dir: where it goes; local or gs://.
      settings: the user's, `NAME=value`; they hold before the manifest's.
      flags: of `scripts/train.py`, for every run, such as `--gin_allow_import=mine`.
    """

    study: Study
    output_dir: str
    settings: Sequence[str] = ()
    flags: Sequence[str] = ()

    def run_dir(self, cell: Cell) -> epath.Path:
        """The MODEL_DIR of a run."""
        return epath.Path(self.output_dir).expanduser() / RUNS / cell.name

    def argv(self, cell: Cell, *more: str) -> list[str]:
        """A command line of `scripts/train.py`."""
        model_dir = f"--gin.MODEL_DIR={self.run_dir(cell)}"
        return ["study", *self.study.command(cell, self.settings), *self.flags, model_dir, *more]

    def resolved(self, cell: Cell, *more: str) -> dict[str, Any]:
        """What `train.train` would be called with."""
        return configure.resolved_arguments(train.train, self.argv(cell, *more))

    def identity(self, cell: Cell) -> dict[str, Any]:
        """All that decides a run's result, for a comparison with what it was made with."""
        settings = self.study.settings_of(cell, self.settings)
        found = {name: text for name, text in sorted(settings.items()) if name not in _PLACES}
        found |= {
            "files": " ".join(self.study.files_of(cell)),
            "evaluations": str(self.study.evaluations),
        }
        if cell.arm.tokens_of:
            reference = self.study.reference(cell)
            found["tokens_of"] = self.identity(reference)
        return found


def read_result(job: Job, cell: Cell) -> list[dict[str, Any]] | None:
    """The lines of a run that is done; None where it is not.

    Raises:
      ValueError: the result, or the run that is under way, is of other settings.
    """
    path, now = _result_path(job, cell), job.identity(cell)
    for file in (path, job.run_dir(cell) / "study.json"):
        if file.exists():
            _require_same(file, json.loads(file.read_text())["made_with"], now)
    return json.loads(path.read_text())["lines"] if path.exists() else None


def _result_path(job: Job, cell: Cell) -> epath.Path:
    return epath.Path(job.output_dir).expanduser() / RESULTS / f"{cell.name}.json"


def _require_same(file: epath.Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError where a run was made with other settings."""
    if before == now:
        return
    different = [
        f"{name} was {before.get(name, 'not given')}, is {now.get(name, 'not given')}"
        for name in sorted({*before, *now}) if before.get(name) != now.get(name)
    ]  # fmt: skip
    raise ValueError(
        f"{file} is of other settings: {'; '.join(different)}. Give the same manifest and "
        "--gin settings again, or another --output_dir."
    )


def run_cell(job: Job, cell: Cell) -> None:
    """Trains a run, or goes on with it, tests its best step, and writes its result.

    Raises:
      SystemExit: 75 where the run was preempted, 76 where another process has it in hand.
      ValueError: a setting does not fit, see `train.train`; the dataset has no validation or test
        split; or the run was begun with other settings.
    """
    configure.start_processes(job.argv(cell))
    with _alone(job.run_dir(cell)):
        if read_result(job, cell) is not None:
            logging.info("%s is done", cell.name)
            return
        made_with, given = job.identity(cell), job.resolved(cell)
        if cluster.is_first():
            text = json.dumps({"made_with": made_with}, indent=1)
            results.write_text(job.run_dir(cell) / "study.json", text + "\n")
        _require_splits(given["data"])
        batches = _batches(given)
        length = _length(job, cell, given, batches)
        trained = configure.execute(train.train, job.argv(cell, *length))
        (best,) = students.find(str(job.run_dir(cell)), "best")
        scores = configure.execute(evaluate.evaluate, _test(job, cell, given["data"]))
        sizes = {
            "parameters": t5.param_count(given["model"]), "examples": batches.num_pairs,
            "steps": trained.step - best.metadata["base_step"], "tokens": trained.tokens,
        }  # fmt: skip
        lines = [_line(job, cell, sizes, best, score) for _, score in scores]
        if cluster.is_first():
            text = json.dumps({"made_with": made_with, "lines": lines}, indent=1)
            results.write_text(_result_path(job, cell), text + "\n")
        cluster.wait_for_all("result")


@contextlib.contextmanager
def _alone(folder: epath.Path) -> Iterator[None]:
    """Holds a run, so that no other process of this machine trains it too.

    Of several processes that are one run the first one holds it for all.
    """
    if "://" in str(folder):  # object stores have no locks: give each host its own --shard
        yield
        return
    with contextlib.ExitStack() as stack:
        is_free = True
        if cluster.is_first():
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(os.fspath(folder / ".lock"), "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                is_free = False
        if not cluster.agreed(is_free):
            logging.warning("%s: another process has it in hand", folder)
            sys.exit(EXIT_BUSY)
        yield


def _require_splits(config: data.DataConfig) -> None:
    """Raises ValueError where a run could not be selected or tested, before it is trained."""
    for split in ("validation", "test"):
        try:
            tasks = scoring.scored(cache.load(config, split))
        except cache.NoSplitError as e:
            raise ValueError(f"A study needs a {split} split: {e}") from None
        if not tasks:
            raise ValueError(
                f"A study needs a {split} split that can be scored: {config.mixture_or_task_name} "
                "has no rows there, or no task with a metric."
            )


def _length(
    job: Job, cell: Cell, given: dict[str, Any], batches: data.TrainBatches
) -> list[str]:  # fmt: skip
    """Updates of the run, and how often it is evaluated and saved."""
    steps = given["config"].train_steps
    if cell.arm.tokens_of:
        other = job.resolved(job.study.reference(cell))
        tokens = other["config"].train_steps * _tokens_per_step(_batches(other))
        steps = round(tokens / _tokens_per_step(batches))
    period = max(1, -(-steps // job.study.evaluations))
    return [
        f"--gin.{STEPS}={steps}", f"--gin.EVAL_PERIOD={period}",
        f"--gin.CHECKPOINT_PERIOD={period}",  # what is best can only be tested where it was saved
        "--gin.CHECKPOINTS_TO_KEEP=1",  # and the best
    ]  # fmt: skip


def _batches(given: dict[str, Any]) -> data.TrainBatches:
    corpus = cache.load(given["data"], "train")
    return data.TrainBatches(corpus, given["data"], packing.Flops.of(given["model"]))


def _tokens_per_step(batches: data.TrainBatches) -> float:
    """Real tokens of a step, inputs and targets: the mean over the first epoch."""
    return float(batches.plan(0).tokens.mean())


def _test(job: Job, cell: Cell, rows: cache.RowsConfig) -> list[str]:
    """The command that tests the step that validation chose."""
    settings = {"CHECKPOINT_PATH": job.run_dir(cell), "RESTORE_MODE": "best", "SPLIT": "test"}
    if cell.arm.dataset:
        settings["MIXTURE_OR_TASK_NAME"] = cell.point[DATASET]
    for name in ("data_dir", "cache_dir", "max_bad_rows"):
        if getattr(rows, name) is not None:
            settings[name.upper()] = getattr(rows, name)
    bindings = [f"--gin.{name}={value}" for name, value in settings.items()]
    return ["study", "--gin_file=eval.gin", *bindings, *job.flags]


def _line(
    job: Job, cell: Cell, sizes: dict[str, int], best: students.Checkpoint, score: scoring.Score
) -> dict[str, Any]:  # fmt: skip
    """A line of the results file. Nothing in it differs when the run is made again."""
    metric, estimate = score.main
    taught = [
        line["value"] for line in results.Store(job.run_dir(cell) / students.RESULTS).lines()
        if line["run"] == "teacher" and line["metric"] == metric and line["split"] == "test"
        and line["dataset"] == score.dataset
    ]  # fmt: skip
    return {
        "study": job.study.name,
        "cell": cell.name,
        "arm": cell.arm.name,
        **cell.point,
        "trained_on": cell.task,
        "tested_on": score.dataset,
        "task": score.task,
        **sizes,
        "chosen_step": best.step - best.metadata["base_step"],
        "metric": metric,
        "validation": _validation(best, cell.arm.dataset or score.dataset, score.task, metric),
        "test": estimate.value,
        "n": estimate.n,
        "standard_error": estimate.standard_error,
        "teacher": taught[-1] if taught else None,
    }


def _validation(best: students.Checkpoint, dataset: str, task: str, metric: str) -> float | None:
    """What training noted for the task that stands for `task` on the dataset it trained on."""
    wanted = dataset, prompts.split_name(task)[1]
    for name, values in best.metadata["metrics"].items():
        own, _, split = name.rpartition("/")
        if split == "validation" and (own == task or prompts.split_name(own) == wanted):
            return values.get(metric)
    return None
