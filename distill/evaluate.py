"""Evaluation: greedy predictions of checkpoints on tasks, scored against gold labels.

`score_tasks` is what training calls on its validation split; `evaluate` does the same for saved
checkpoints and prints one table.
"""

import dataclasses
import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from distill import (
    cache,
    checkpoints,
    cluster,
    data,
    decode,
    estimate,
    metrics,
    partitioning,
    t5,
)  # fmt: skip
from distill import vocabulary as vocabulary_lib

# The published code decodes 64 tokens. Where gold labels are longer (in bytes, say), so is this;
# where the student writes a rationale too, it gets what training cuts targets at.
MIN_DECODE_LENGTH = 64


@dataclasses.dataclass(frozen=True)
class Score:
    """One task's result.

    Attributes:
      task: name of the SeqIO task.
      split: `validation` or `test`.
      n: examples.
      metrics: by name; `accuracy` is a fraction in [0, 1].
      predictions: one JSON-ready dict per example; `generated` is the student's whole text,
        `prediction` the answer in it, which is scored.
    """

    task: str
    split: str
    n: int
    metrics: dict[str, float]
    predictions: list[dict[str, str]]

    @property
    def standard_error(self) -> float:
        """Of the accuracy, binomial: sqrt(p (1 - p) / n); NaN where there is no such fraction."""
        accuracy = self.metrics.get("accuracy", math.nan)
        return metrics.standard_error(accuracy, self.n) if 0 <= accuracy <= 1 else math.nan


def metric_function(name: str):
    """The metric of a name as the cache holds it: `module.function`.

    Metrics of `distill.metrics` need no TensorFlow; others import the module that defines them.

    Raises:
      ValueError: there is no such function.
    """
    module, _, function = name.rpartition(".")
    if module == metrics.__name__ and function in metrics.METRICS:
        return metrics.METRICS[function]
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise ValueError(
            f"Metric {name!r} cannot be imported: define metric_fns as functions of a module."
        ) from e


def predict(
    params: Any,
    net: t5.T5,
    inputs: list[np.ndarray],
    vocabulary: vocabulary_lib.Vocabulary,
    mesh,
    *,
    batch_size: int = 64,
    max_length: int = MIN_DECODE_LENGTH,
) -> list[str]:
    """Greedy answers, in the order of the inputs.

    Args:
      params: the model's parameters, on the mesh.
      net: the network.
      inputs: token ids of each input.
      vocabulary: turns ids into text.
      mesh: from `partitioning.make_mesh`.
      batch_size: rows decoded together; rounded up to a multiple of the batch shards.
      max_length: tokens per answer at most.
    """
    found = decode.generate(params, net, inputs, mesh, max_length=max_length, batch_size=batch_size)
    return [vocabulary.decode(answers[0].tolist()) for answers in found.tokens]


def score_tasks(
    params: Any,
    net: t5.T5,
    corpus: cache.Corpus,
    vocabulary: vocabulary_lib.Vocabulary,
    mesh,
    *,
    num_examples: int | None = None,
    batch_size: int = 64,
    row_lengths: Mapping[str, int] = data.MAX_LENGTHS,
) -> list[Score]:
    """Scores each task of the corpus that has metrics (an `explain` task has none).

    Args:
      params: the model's parameters, on the mesh.
      net: the network.
      corpus: the rows of a split.
      vocabulary: the one that the corpus was tokenised with.
      mesh: from `partitioning.make_mesh`.
      num_examples: only the first so many of each task.
      batch_size: see `predict`.
      row_lengths: tokens of inputs and targets that the student was trained on; longer inputs are
        cut, but never below the published limits.
    """
    limit = {name: max(n, row_lengths[name]) for name, n in data.MAX_LENGTHS.items()}
    scores = []
    for task in corpus.tasks:
        n = min(len(task), num_examples or len(task))
        if not task.metrics or not n:
            continue
        records = task.read(range(n))
        inputs = [data.truncate(record.inputs, limit["inputs"]) for record in records]
        longest = -(-int(task.lengths[:, 1].max()) // 16) * 16
        if task.answer_form != "label":
            longest = limit["targets"]
        generated = predict(
            params, net, inputs, vocabulary, mesh, batch_size=batch_size,
            max_length=max(MIN_DECODE_LENGTH, longest),
        )  # fmt: skip
        answers = [metrics.answer(text, task.answer_form) for text in generated]
        labels = [record.label for record in records]
        values: dict[str, float] = {}
        for name in task.metrics:
            values |= metric_function(name)(labels, answers)
        predictions = [
            {
                "example_id": record.example_id,
                "input": record.text,
                "label": record.label,
                "prediction": answer,
                "generated": text,
            }
            for record, answer, text in zip(records, answers, generated, strict=True)
        ]
        scores.append(Score(task.name, corpus.split, n, values, predictions))
    return scores


def table(rows: list[tuple[str, Score]]) -> str:
    """One line per (checkpoint, score), in columns."""
    header = ("checkpoint", "task", "split", "n", "accuracy", "std. error")
    lines = [header]
    for name, s in rows:
        accuracy = s.metrics.get("accuracy", math.nan)
        lines.append(
            (name, s.task, s.split, str(s.n), f"{accuracy:.4f}", f"{s.standard_error:.4f}")
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate on what.

    Attributes:
      checkpoint_path: a MODEL_DIR, or one of its checkpoint folders.
      mixture_or_task_name: None = the mixture that the checkpoint was trained on.
      mixture_or_task_module: the module whose import registers it; None = the run's.
      split: `validation` or `test`.
      restore_mode: of a MODEL_DIR `latest` or `all` checkpoints; `specific` demands one folder.
      eval_output_dir: where predictions and metrics go; None = `inference_eval` in MODEL_DIR.
      num_examples: only the first so many of each task.
      batch_size: rows decoded together.
      data_dir: None = $DISTILL_DATA_DIR, else the run's.
      vocabulary: None = the one that the checkpoint was trained with.
      parsing: see `cache.RowsConfig`; so are the following. It matters to tasks that show the
        student a rationale. None = the run's, where the mixture is the run's.
      rationale_store: the same; '' = none.
      max_bad_rows: None = none.
      allow_missing: datasets of the mixture that may be absent. None as for parsing.
      cache_dir: where tokenised rows are kept.
    """

    checkpoint_path: str
    mixture_or_task_name: str | None = None
    mixture_or_task_module: str | None = None
    split: str = "test"
    restore_mode: str = "latest"
    eval_output_dir: str | None = None
    num_examples: int | None = None
    batch_size: int = 64
    data_dir: str | None = None
    vocabulary: str | None = None
    parsing: str | None = None
    rationale_store: str | None = None
    max_bad_rows: int | None = None
    allow_missing: Sequence[str] | None = None
    cache_dir: str | None = None

    def __post_init__(self):
        if self.restore_mode not in ("latest", "all", "specific"):
            raise ValueError(
                f"EvaluateConfig.restore_mode must be 'latest', 'all' or 'specific', not "
                f"{self.restore_mode!r}."
            )
        for field in ("num_examples", "batch_size"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"EvaluateConfig.{field} must be positive, not {value!r}.")


def evaluate(config: EvaluateConfig) -> list[tuple[str, Score]]:
    """Scores checkpoints on a mixture's tasks, writes the predictions and prints a table.

    Files, in `eval_output_dir`: `<task>-<split>-metrics.jsonl` (one line a checkpoint) and
    `<task>-<split>-<step>.jsonl` (one line an example).

    Returns:
      (checkpoint folder's name, score) in the order of the table.

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: a checkpoint is damaged, or the vocabulary is not the student's.
    """
    path = epath.Path(config.checkpoint_path).expanduser()
    folders = checkpoints.list_checkpoints(path)
    if not folders:
        raise FileNotFoundError(
            f"No checkpoint in {path}: give a MODEL_DIR or a checkpoint_<step> folder "
            "(--gin.CHECKPOINT_PATH=...)."
        )
    single = folders[0].name == path.name
    if config.restore_mode == "specific" and not single:
        raise ValueError(f"restore_mode='specific' needs one checkpoint folder, not {path}.")
    if config.restore_mode != "all":
        folders = folders[-1:]
    model_dir = folders[0].parent
    output = epath.Path(config.eval_output_dir or model_dir / "inference_eval").expanduser()

    chip = estimate.chip_of(jax.devices()[0])
    results: list[tuple[str, Score]] = []
    for folder in folders:
        metadata = checkpoints.read_metadata(folder)
        corpus, vocabulary = _corpus(config, metadata)
        cluster.wait_for_all("data")  # a host may have tokenised for an hour
        student = t5.T5Config(**metadata["model"])
        mesh = partitioning.make_mesh(estimate.choose_mesh(
            partitioning.MeshConfig(), student, None, None, chip, jax.device_count()
        ))  # fmt: skip
        net = t5.T5(student, partitioning.activation_constraint(mesh))
        params, _ = checkpoints.restore(folder, abstract_params(net, mesh), subtree="params")
        scores = score_tasks(
            params, net, corpus, vocabulary, mesh,
            num_examples=config.num_examples, batch_size=config.batch_size,
            row_lengths=metadata.get("data", {}).get("lengths", data.MAX_LENGTHS),
        )  # fmt: skip
        if not scores:
            raise ValueError(f"No task of {corpus.name!r} has a metric, so there is no accuracy.")
        for score in scores:
            results.append((folder.name, score))
            if jax.process_index() == 0:
                write_score(output, score, metadata["step"])
    if jax.process_index() == 0:
        print(table(results))
        logging.info("Predictions and metrics are in %s", output)
    return results


def write_score(folder: epath.Path, score: Score, step: int) -> None:
    """Appends to `<task>-<split>-metrics.jsonl` and writes `<task>-<split>-<step>.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    line = {"step": step, "n": score.n, **score.metrics, "standard_error": score.standard_error}
    # Read and write instead of append: object stores have no append.
    path = folder / f"{score.task}-{score.split}-metrics.jsonl"
    kept = path.read_text().splitlines() if path.exists() else []
    kept = [old for old in kept if json.loads(old)["step"] != step]
    path.write_text("\n".join([*kept, json.dumps(line)]) + "\n")
    (folder / f"{score.task}-{score.split}-{step}.jsonl").write_text(
        "".join(json.dumps(p) + "\n" for p in score.predictions)
    )


def abstract_params(net: t5.T5, mesh) -> Any:
    """Shapes and shardings of the parameters, to restore into."""
    shapes = t5.param_shapes(net.config)
    shardings = partitioning.param_shardings(mesh, shapes, t5.param_axes(net.config))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def _corpus(config: EvaluateConfig, metadata: dict):
    """The rows to score a checkpoint on, in the student's own vocabulary."""
    mixture = config.mixture_or_task_name or metadata.get("mixture")
    spec = config.vocabulary or metadata.get("vocabulary")
    for name, value in (("MIXTURE_OR_TASK_NAME", mixture), ("VOCABULARY", spec)):
        if value is None:  # a checkpoint that was converted, not trained here
            raise ValueError(f"The checkpoint does not say its {name}: set --gin.{name}=...")

    def run_if_unset(field: str):
        """A setting of the rows: the run's, if its own mixture is evaluated."""
        value = getattr(config, field)
        same = mixture == metadata.get("mixture")
        return metadata.get(field) if value is None and same else value

    rows = cache.RowsConfig(
        mixture_or_task_name=mixture,
        mixture_or_task_module=config.mixture_or_task_module or metadata.get("module", "tasks"),
        data_dir=config.data_dir or os.environ.get("DISTILL_DATA_DIR") or metadata.get("data_dir"),
        vocabulary=spec,
        parsing=run_if_unset("parsing"),
        rationale_store=run_if_unset("rationale_store"),
        max_bad_rows=config.max_bad_rows,
        allow_missing=run_if_unset("allow_missing") or (),
        cache_dir=config.cache_dir,
    )
    vocabulary = vocabulary_lib.load(rows.vocabulary)
    if "data" in metadata and vocabulary.fingerprint != metadata["data"]["vocabulary"]:
        raise ValueError(
            f"The vocabulary {rows.vocabulary!r} is not the one that the student was "
            f"trained with ({metadata['vocabulary']!r}); its answers would be noise. Set "
            "--gin.VOCABULARY to the original file."
        )
    return cache.load(rows, config.split), vocabulary
