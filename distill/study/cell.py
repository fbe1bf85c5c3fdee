"""One run of a study: trained, its best step by validation tested once, its result kept."""

import contextlib
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
    configure,
    data,
    evaluate,
    packing,
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


def result_path(output_dir: str, cell: Cell) -> epath.Path:
    return epath.Path(output_dir).expanduser() / RESULTS / f"{cell.name}.json"


def read_result(output_dir: str, cell: Cell, study: Study, user: Sequence[str]) -> Any:
    """The lines of a run that is done; None where it is not.

    Raises:
      ValueError: the result is of other settings.
    """
    path = result_path(output_dir, cell)
    if not path.exists():
        return None
    kept = json.loads(path.read_text())
    wanted = study.command(cell, user)
    if kept["command"] != wanted:
        gone = [a for a in kept["command"] if a not in wanted]
        new = [a for a in wanted if a not in kept["command"]]
        raise ValueError(
            f"{path} is of other settings: it had {' '.join(gone) or 'nothing'} where there is "
            f"{' '.join(new) or 'nothing'} now. Give another --output_dir, or delete it and "
            f"{RUNS}/{cell.name}."
        )
    return kept["lines"]


def run_cell(study: Study, cell: Cell, output_dir: str, user: Sequence[str] = ()) -> None:
    """Trains a run, or goes on with it, tests its best step, and writes its result.

    Args:
      study: the manifest.
      cell: which run.
      output_dir: of the study; local or gs://.
      user: settings from the command line, `NAME=value`.

    Raises:
      SystemExit: 75 where the run was preempted, 76 where another process has it in hand.
      ValueError: a setting does not fit, see `train.train`.
    """
    folder = epath.Path(output_dir).expanduser() / RUNS / cell.name
    with _alone(folder):
        if read_result(output_dir, cell, study, user) is not None:
            logging.info("%s is done", cell.name)
            return
        command = study.command(cell, user)
        argv = ["study", *command, *_length(study, cell, command, user)]
        trained = configure.execute(train.train, [*argv, f"--gin.MODEL_DIR={folder}"])
        given = configure.resolved_arguments(train.train, [*argv, f"--gin.MODEL_DIR={folder}"])
        (best,) = students.find(str(folder), "best")
        scores = configure.execute(evaluate.evaluate, _test(cell, folder, given["data"]))
        lines = [
            _line(study, cell, given, trained, best, score, folder) for _, score in scores
        ]  # fmt: skip
    path = result_path(output_dir, cell)
    text = json.dumps({"command": command, "lines": lines}, indent=1)
    results.write_text(path, text + "\n")


@contextlib.contextmanager
def _alone(folder: epath.Path) -> Iterator[None]:
    """Holds a run, so that no other process of this machine trains it too."""
    if "://" in str(folder):  # object stores have no locks: give each host its own --shard
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(os.fspath(folder / ".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.warning("%s: another process has it in hand", folder)
            sys.exit(EXIT_BUSY)
        yield


def _length(study: Study, cell: Cell, command: Sequence[str], user: Sequence[str]) -> list[str]:
    """Steps of the run, and how often it is evaluated and saved."""
    config = _resolved(command)["config"]
    steps = _updates(config)
    if cell.arm.tokens_of:
        reference = study.command(study.reference(cell), user)
        tokens = _updates(_resolved(reference)["config"]) * _tokens_per_step(reference)
        steps = round(tokens / _tokens_per_step(command))
    said = {a.removeprefix("--gin.").partition("=")[0] for a in command}
    period = config.eval_period if "EVAL_PERIOD" in said else -(-steps // study.evaluations)
    wanted = {
        "EVAL_PERIOD": period,
        "CHECKPOINT_PERIOD": period,  # what is best can only be tested where it was saved
        "CHECKPOINTS_TO_KEEP": 1,  # and the best
    }
    chosen = {name: value for name, value in wanted.items() if name not in said}
    return [f"--gin.{k}={v}" for k, v in {**chosen, STEPS: steps}.items()]


def _updates(config: train.TrainConfig) -> int:
    return config.train_steps_relative or config.train_steps


def _resolved(command: Sequence[str]) -> dict[str, Any]:
    argv = ["study", *command, "--gin.MODEL_DIR=/nowhere"]
    return configure.resolved_arguments(train.train, argv)


def _tokens_per_step(command: Sequence[str]) -> float:
    """Real tokens of a step, inputs and targets: the mean over the first epoch."""
    given = _resolved(command)
    corpus = cache.load(given["data"], "train")
    batches = data.TrainBatches(corpus, given["data"], packing.Flops.of(given["model"]))
    return float(batches.plan(0).tokens.mean())


def _test(cell: Cell, folder: epath.Path, rows: cache.RowsConfig) -> list[str]:
    """The command that tests the step that validation chose."""
    settings = {"CHECKPOINT_PATH": folder, "RESTORE_MODE": "best", "SPLIT": "test"}
    if cell.arm.dataset:
        settings["MIXTURE_OR_TASK_NAME"] = cell.point[DATASET]
    for name in ("data_dir", "cache_dir", "max_bad_rows"):
        if getattr(rows, name) is not None:
            settings[name.upper()] = getattr(rows, name)
    return ["study", "--gin_file=eval.gin", *(f"--gin.{k}={v}" for k, v in settings.items())]


def _line(
    study: Study, cell: Cell, given: dict[str, Any], trained: train.TrainResult,
    best: students.Checkpoint, score: scoring.Score, folder: epath.Path,
) -> dict[str, Any]:  # fmt: skip
    """A line of the results file. Nothing in it differs when the run is made again."""
    metric, estimate = score.main
    own = cell.arm.dataset  # that it was validated on
    task = score.task.replace(score.dataset, own, 1) if own else score.task
    validation = best.metadata["metrics"].get(f"{task}/validation", {})
    corpus = cache.load(given["data"], "train")
    batches = data.TrainBatches(corpus, given["data"], packing.Flops.of(given["model"]))
    taught = [
        line["value"] for line in results.Store(folder / students.RESULTS).lines()
        if line["run"] == "teacher" and line["metric"] == metric and line["split"] == "test"
        and line["dataset"] == score.dataset
    ]  # fmt: skip
    return {
        "study": study.name,
        "cell": cell.name,
        "arm": cell.arm.name,
        "trained_on": cell.task,
        **cell.point,
        "dataset": score.dataset,
        "task": score.task,
        "parameters": t5.param_count(given["model"]),
        "examples": batches.num_pairs,
        "steps": trained.step - best.metadata["base_step"],
        "tokens": trained.tokens,
        "chosen_step": best.step - best.metadata["base_step"],
        "metric": metric,
        "validation": validation.get(metric),
        "test": estimate.value,
        "n": estimate.n,
        "standard_error": estimate.standard_error,
        "teacher": taught[-1] if taught else None,
    }
