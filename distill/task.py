"""One dataset to its SeqIO tasks: reading, parsing the teacher, prompts, and `register`.

The SeqIO edge of the project: this module and the modules that register tasks import TensorFlow.

    task.bind(data_dir="/data", vocabulary="/data/spiece.model")   # optional, before the import
    task.import_module("tasks")                                    # registers
    task.describe("svamp_step_by_step").members
    for row in task.tokenized_rows("svamp_predict", "train"): ...

The two streams of a dataset follow Hsieh et al. 2023 (arXiv 2305.02301): `predict: ` + input ->
label and `explain: ` + input -> rationale. Rows are read when they are asked for, so registering
needs no data.
"""

import dataclasses
import difflib
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow looks for a GPU, and says so
import seqio  # noqa: E402
import tensorflow as tf  # noqa: E402
from etils import epath  # noqa: E402

from distill import metrics  # noqa: E402
from distill import vocabulary as vocabulary_lib  # noqa: E402

PREDICT = "predict: "
EXPLAIN = "explain: "
LABEL_GROUP = 0
RATIONALE_GROUP = 1
EOS_TEXT = "</s>"
HOLDOUT = 0.1
DEFAULT_MODULE = "tasks"


# --- Binding -------------------------------------------------------------------------------------

_data_dir: str | None = None
_vocabulary: vocabulary_lib.Vocabulary | None = None


def bind(data_dir: str | None = None, vocabulary: str | None = None) -> None:
    """Resolves the data folder and the vocabulary, once for the whole process.

    Call it before the import of a module that registers tasks: SeqIO fixes the vocabulary when a
    task registers. What is not given comes from the environment (DISTILL_DATA_DIR,
    DISTILL_VOCABULARY), else from what is already bound, else there is no data folder and the
    vocabulary is "bytes".

    Args:
      data_dir: the folder that holds the datasets, local or gs://.
      vocabulary: as in `distill.vocabulary.load`.

    Raises:
      ValueError: another value is already bound.
      FileNotFoundError: there is no such vocabulary.
    """
    global _data_dir, _vocabulary
    new_dir = data_dir or _data_dir or os.environ.get("DISTILL_DATA_DIR") or None
    if _data_dir is not None and new_dir.rstrip("/") != _data_dir.rstrip("/"):
        raise ValueError(_already("data folder", "DATA_DIR", _data_dir, new_dir))
    if _vocabulary is None:
        _vocabulary = vocabulary_lib.load(
            vocabulary or os.environ.get("DISTILL_VOCABULARY") or vocabulary_lib.BYTES
        )
    elif vocabulary and vocabulary != _vocabulary.spec:
        raise ValueError(_already("vocabulary", "VOCABULARY", _vocabulary.spec, vocabulary))
    _data_dir = _data_dir or new_dir


def _already(what: str, macro: str, old: str, new: str) -> str:
    return (
        f"the {what} is already {old!r} and cannot become {new!r}: it is fixed once tasks are "
        f"registered or read. Set it before, with --gin.{macro}=... or DISTILL_{macro}, or "
        "use another process"
    )


def data_dir() -> str | None:
    """Returns the data folder, None where there is none; binds it if it is not bound yet."""
    global _data_dir
    _data_dir = _data_dir or os.environ.get("DISTILL_DATA_DIR") or None
    return _data_dir


def vocabulary() -> vocabulary_lib.Vocabulary:
    """Returns the vocabulary; binds it if it is not bound yet.

    Registering needs this and not the data folder, which may still be bound before it is read.
    """
    global _vocabulary
    if _vocabulary is None:
        _vocabulary = vocabulary_lib.load(
            os.environ.get("DISTILL_VOCABULARY") or vocabulary_lib.BYTES
        )
    return _vocabulary


def reset() -> None:
    """Forgets bindings, registrations and imported task modules. For tests and notebooks only.

    Tasks that were handed out before keep working with the old vocabulary.
    """
    global _data_dir, _vocabulary
    for name in _registered:
        seqio.TaskRegistry.remove(name)
    for name in _datasets:
        for suffix in ("", "_llm"):
            seqio.MixtureRegistry.remove(f"{name}_step_by_step{suffix}")
    tops = tuple(f"{module}." for module in {DEFAULT_MODULE, *_modules})
    for module in [m for m in sys.modules if f"{m}.".startswith(tops)]:
        del sys.modules[module]
    _registered.clear()
    _datasets.clear()
    _modules.clear()
    _data_dir = _vocabulary = None


# --- Rows and sources ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One example of a dataset.

    Attributes:
      id: unique in the dataset and stable, for example "svamp/train/17".
      input: the text of the problem, without a prefix. A literal `</s>` becomes the EOS id.
      label: the gold label.
      rationale: the teacher's reasoning, None where there is none.
      teacher_label: the teacher's label, None where there is none or it did not parse.
      has_completion: the teacher answered, whether or not its answer parsed.
    """

    id: str
    input: str
    label: str
    rationale: str | None = None
    teacher_label: str | None = None
    has_completion: bool = False


class Source(Protocol):
    """Where the rows of a dataset come from: files, or a generator."""

    splits: Sequence[str]

    def rows(self, split: str) -> list[Row]:
        """Returns the rows of a split, always in the same order."""

    def files(self, split: str) -> list[str]:
        """Returns the files that decide the rows, for the cache's fingerprint; [] if generated."""


@dataclasses.dataclass(frozen=True)
class SourceReport:
    """What was read from one split.

    Attributes:
      rows: rows of the split.
      parsed: rows with a teacher label.
      unparsed: rows whose teacher answered without a label that parses.
      rationales: rows with a rationale.
      teacher_accuracy: of the teacher's labels, a fraction of all rows (unparsed is wrong); None
        where no row has a teacher label.
    """

    rows: int
    parsed: int
    unparsed: int
    rationales: int
    teacher_accuracy: float | None


def source_report(
    source: Source, split: str, metric_fn: metrics.MetricFn = metrics.label_accuracy
) -> SourceReport:
    """Returns the numbers of one split of any source.

    Args:
      source: gives the rows.
      split: one of its splits.
      metric_fn: scores the teacher's labels, unless the source has a `teacher_metric`.
    """
    metric_fn = getattr(source, "teacher_metric", None) or metric_fn
    rows = source.rows(split)
    parsed = sum(r.teacher_label is not None for r in rows)
    accuracy = None
    if parsed:
        accuracy = metric_fn([r.label for r in rows], [r.teacher_label or "" for r in rows])[
            "accuracy"
        ]
    return SourceReport(
        rows=len(rows),
        parsed=parsed,
        unparsed=sum(r.has_completion and r.teacher_label is None for r in rows),
        rationales=sum(r.rationale is not None for r in rows),
        teacher_accuracy=accuracy,
    )


@dataclasses.dataclass(frozen=True)
class ReleasedLayout:
    """A dataset in the layout of the released data of Hsieh et al. 2023.

    `<data_dir>/<name>/<name>_{train,valid,test}.json` are JSON lines, and
    `<name>/llm/{train,valid,test}_CoT_{0,1,..}.json` are JSON lists of the teacher's raw
    completions, aligned with the rows by position. Completions may be absent; the streams that
    need them then say so.

    Attributes:
      name: of the dataset and its folder.
      fields: the fields every row must have.
      example: a row's fields -> (input, label); ValueError for a value that it cannot use.
      parse: a completion -> (rationale, label), None for what it does not contain.
      holdout: True where the dataset has no valid file: the validation split is then the first
        ceil(n / 10) of `numpy.random.default_rng(0).permutation(n)` over the train file, and
        the train split is the rest, in that order.
      teacher_metric: counts the teacher's labels in a report, where that was published otherwise
        than the dataset's first metric counts.
    """

    name: str
    fields: tuple[str, ...]
    example: Callable[[Mapping[str, Any]], tuple[str, str]]
    parse: Callable[[str], tuple[str | None, str | None]]
    holdout: bool = False
    teacher_metric: metrics.MetricFn | None = None
    splits: tuple[str, ...] = ("train", "validation", "test")

    def rows(self, split: str) -> list[Row]:
        """Returns the rows of a split.

        Raises:
          FileNotFoundError: the data folder or the file is missing.
          ValueError: a line is not JSON or lacks a field, or the completions do not line up.
        """
        stem = self._stem(split)
        path = self._path(stem)
        examples = self._examples(path)
        completions = self._completions(stem, len(examples), path)
        rows = []
        for i, (text, label) in enumerate(examples):
            rationale, teacher_label = (None, None)
            if completions is not None:
                rationale, teacher_label = self.parse(completions[i])
            rows.append(
                Row(
                    id=f"{self.name}/{stem}/{i}",
                    input=text,
                    label=label,
                    rationale=rationale or None,
                    teacher_label=teacher_label or None,
                    has_completion=completions is not None,
                )
            )
        if self.holdout and split != "test":
            order = np.random.default_rng(0).permutation(len(rows))
            cut = math.ceil(HOLDOUT * len(rows))
            rows = [rows[i] for i in (order[:cut] if split == "validation" else order[cut:])]
        return rows

    def files(self, split: str) -> list[str]:
        """Returns the row file and the completion files of a split."""
        stem = self._stem(split)
        return [str(p) for p in (self._path(stem), *self._shards(stem))]

    def _stem(self, split: str) -> str:
        if split not in self.splits:
            raise ValueError(f"{self.name} has no split {split!r}; it has {', '.join(self.splits)}")
        if split == "validation":
            return "train" if self.holdout else "valid"
        return split

    def _path(self, stem: str) -> epath.Path:
        """Returns `<data_dir>/<name>/<name>_<stem>.json`, which exists."""
        fix = (
            "set the folder that holds the datasets with --gin.DATA_DIR=... or DISTILL_DATA_DIR=..."
        )
        if data_dir() is None:
            raise FileNotFoundError(
                f"{self.name} is read from "
                f"<data folder>/{self.name}/{self.name}_{stem}.json, but no "
                f"data folder is set: {fix}"
            )
        path = epath.Path(data_dir()) / self.name / f"{self.name}_{stem}.json"
        if not path.exists():
            raise FileNotFoundError(
                f"{self.name}: no file {path} (data folder {data_dir()}): add it, or {fix}"
            )
        return path

    def _shards(self, stem: str) -> list[epath.Path]:
        folder, shards = self._path(stem).parent / "llm", []
        while (shard := folder / f"{stem}_CoT_{len(shards)}.json").exists():
            shards.append(shard)
        return shards

    def _examples(self, path: epath.Path) -> list[tuple[str, str]]:
        """Returns (input, label) of each line of a JSON-lines file."""
        examples = []
        # Not splitlines(): JSON allows U+2028 and others inside strings.
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as e:
                raise ValueError(f"{path}:{number}: not valid JSON: {e}") from e
            if not isinstance(fields, dict):
                raise ValueError(
                    f"{path}:{number}: a row must be a JSON object, not {type(fields).__name__}"
                )
            missing = [f for f in self.fields if f not in fields]
            if missing:
                raise ValueError(
                    f"{path}:{number}: the row lacks {', '.join(missing)}; "
                    f"it has {', '.join(fields)}"
                )
            try:
                text, label = self.example(fields)
                if not isinstance(text, str) or not isinstance(label, str):
                    raise TypeError(f"input and label must be text, got {text!r}, {label!r}")
                examples.append((text, label))
            except (ValueError, TypeError, IndexError) as e:
                raise ValueError(f"{path}:{number}: {e}") from e
        return examples

    def _completions(self, stem: str, rows: int, path: epath.Path) -> list[str] | None:
        """Returns one completion for each row, or None where there are no completion files."""
        shards = self._shards(stem)
        if not shards:
            return None
        completions, seen = [], []
        for shard in shards:
            try:
                part = json.loads(shard.read_text(encoding="utf-8"))
            except json.JSONDecodeError as e:
                raise ValueError(f"{shard}:{e.lineno}: not valid JSON: {e}") from e
            if not isinstance(part, list) or not all(isinstance(c, str) for c in part):
                raise ValueError(f"{shard}: must be a JSON list of strings, one for each row")
            completions += part
            seen.append(f"{shard} ({len(part)})")
        if len(completions) != rows:
            raise ValueError(
                f"{self.name}: {len(completions)} completions for {rows} rows of {path}; they are "
                f"joined by position, so the numbers must agree. Read: {', '.join(seen)}. Is a "
                "file missing or from another version of the data?"
            )
        return completions


# --- Registering ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Registered:
    """What we know of a task beyond SeqIO: where its rows come from, and its loss group."""

    source: Source
    loss_group: int


_registered: dict[str, _Registered] = {}
_datasets: dict[str, tuple[Source, tuple[metrics.MetricFn, ...]]] = {}
_modules: list[str] = []


def register(
    name: str, *, source: Source, metric_fns: Sequence[metrics.MetricFn] = (metrics.label_accuracy,)
) -> None:
    """Registers the SeqIO tasks and mixtures of one dataset.

    | name                        | input                 | target    | loss group |
    |-----------------------------|-----------------------|-----------|------------|
    | `<name>_label`              | input                 | label     | 0          |
    | `<name>_predict`            | `predict: ` + input   | label     | 0          |
    | `<name>_explain`            | `explain: ` + input   | rationale | 1          |
    | `<name>_step_by_step`       | mixture of predict and explain, rate 1.0 each   |||

    The same four with the suffix `_llm` have the *teacher's* label as the target of the train
    split. Validation and test have gold labels in every variant, so that all are scored alike.

    A row without a rationale gives no `explain` example, and one whose teacher label did not
    parse gives no label example in `_llm`; `report` counts both. Every example has, beside
    `inputs` and `targets` (int32 ids, both ending with EOS), `inputs_pretokenized`,
    `targets_pretokenized`, `example_id`, `loss_group` (int32) and `label` (gold).

    Args:
      name: of the dataset.
      source: gives the rows.
      metric_fns: SeqIO metric functions for the label tasks; `report` scores the teacher by the
        first.

    Raises:
      ValueError: the name is taken.
    """
    if name in _datasets:
        raise ValueError(
            f"the dataset {name!r} is already registered. A module that registers "
            "tasks must have one import name; another dataset needs another name"
        )
    features = {
        key: seqio.Feature(vocabulary().as_seqio(), add_eos=True, dtype=tf.int32)
        for key in ("inputs", "targets")
    }
    for suffix in ("", "_llm"):
        for stream, group in (
            ("label", LABEL_GROUP),
            ("predict", LABEL_GROUP),
            ("explain", RATIONALE_GROUP),
        ):
            task_name = f"{name}_{stream}{suffix}"
            seqio.TaskRegistry.add(
                task_name,
                source=seqio.FunctionDataSource(
                    _dataset_fn(name, source, stream, teacher=bool(suffix)), splits=source.splits
                ),
                preprocessors=[tokenize, seqio.preprocessors.append_eos_after_trim],
                postprocess_fn=postprocess,
                metric_fns=[] if stream == "explain" else list(metric_fns),
                output_features=features,
            )
            _registered[task_name] = _Registered(source, group)
        seqio.MixtureRegistry.add(
            f"{name}_step_by_step{suffix}",
            [(f"{name}_predict{suffix}", 1.0), (f"{name}_explain{suffix}", 1.0)],
        )
    _datasets[name] = source, tuple(metric_fns)


def _dataset_fn(name: str, source: Source, stream: str, teacher: bool):
    """Returns the function that gives SeqIO the texts of one stream."""

    def dataset_fn(split: str, shuffle_files: bool = False, seed: int | None = None):
        del shuffle_files, seed  # Rows have one order; SeqIO shuffles after this.
        rows = source.rows(split)
        # Read before TensorFlow iterates, which would turn our errors into opaque ones.
        examples = [e for r in rows if (e := _texts(r, stream, teacher and split == "train"))]
        if split == "train" and not examples:
            needed = "a rationale" if stream == "explain" else "a teacher label that parses"
            raise ValueError(
                f"{name}: the {stream} stream has no training example, because none of the "
                f"{len(rows)} rows has {needed}. Are the teacher's completions there "
                f"(<data folder>/{name}/llm/train_CoT_0.json)? {name}_label needs none"
            )
        keys = ("inputs", "targets", "example_id", "label")
        columns = {
            k: tf.constant([e[k] for e in examples], tf.string, [len(examples)]) for k in keys
        }
        group = RATIONALE_GROUP if stream == "explain" else LABEL_GROUP
        columns["loss_group"] = tf.fill([len(examples)], tf.constant(group, tf.int32))
        return tf.data.Dataset.from_tensor_slices(columns)

    return dataset_fn


def _texts(row: Row, stream: str, teacher: bool) -> dict[str, str] | None:
    """Returns the texts of a row in one stream, None where the row has no target there."""
    prefix = {"label": "", "predict": PREDICT, "explain": EXPLAIN}[stream]
    if stream == "explain":
        target = row.rationale
    else:
        target = row.teacher_label if teacher else row.label
    if target is None:
        return None
    return {
        "inputs": prefix + row.input,
        "targets": target,
        "example_id": row.id,
        "label": row.label,
    }


@seqio.map_over_dataset
def tokenize(example, output_features):
    """SeqIO preprocessor: texts to ids; a literal `</s>` inside the inputs becomes the EOS id.

    SentencePiece gives no control id for the text of a control symbol, so the pieces between are
    tokenised one by one and joined by the id, as the published code's tokeniser does. EOS at the
    end is left to SeqIO, which keeps it when it trims. Targets are not spliced: an EOS would end
    them.
    """
    vocab = output_features["inputs"].vocabulary
    eos = tf.constant([vocab.eos_id], tf.int32)

    def spliced():
        return tf.map_fn(
            lambda piece: tf.concat([eos, vocab.encode_tf(piece)], 0),
            tf.strings.split(example["inputs"], EOS_TEXT),
            fn_output_signature=tf.RaggedTensorSpec([None], tf.int32, ragged_rank=0),
        ).flat_values[1:]

    has_eos = tf.strings.regex_full_match(example["inputs"], f"(?s).*{EOS_TEXT}.*")
    return {
        **example,
        "inputs_pretokenized": example["inputs"],
        "targets_pretokenized": example["targets"],
        "inputs": tf.cond(has_eos, spliced, lambda: vocab.encode_tf(example["inputs"])),
        "targets": output_features["targets"].vocabulary.encode_tf(example["targets"]),
    }


def postprocess(decoded_model_output, example=None, is_target=False, **unused):
    """SeqIO postprocessor: a target is the gold `label`, whatever the model trained on."""
    if is_target and example is not None:
        return tf.compat.as_text(example["label"])
    return decoded_model_output


def datasets() -> list[str]:
    """Returns the names of the registered datasets."""
    return list(_datasets)


def dataset(name: str) -> Source:
    """Returns the source of a registered dataset, such as "svamp".

    Raises:
      ValueError: the dataset is unknown.
    """
    if name not in _datasets:
        raise ValueError(_unknown("dataset", name, datasets()))
    return _datasets[name][0]


def report(name: str, split: str) -> SourceReport:
    """Returns what was read from one split of a registered dataset, such as "svamp".

    Raises:
      ValueError: the dataset is unknown.
    """
    metric_fns = _datasets[name][1] if name in _datasets else ()
    return source_report(dataset(name), split, *metric_fns[:1])


# --- Looking up ----------------------------------------------------------------------------------


def import_module(module: str = DEFAULT_MODULE) -> None:
    """Imports the module that registers the tasks (MIXTURE_OR_TASK_MODULE).

    Raises:
      ModuleNotFoundError: there is no such module.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module}.".startswith(f"{e.name}."):
            raise  # The module is there; something that it imports is not.
        raise ModuleNotFoundError(
            f"no module {module!r} to register tasks (--gin.MIXTURE_OR_TASK_MODULE). It must be "
            "importable: install it, run from the folder that holds it, or add that folder to "
            "PYTHONPATH",
            name=e.name,
        ) from e
    if module not in _modules:
        _modules.append(module)
    if folders := os.environ.get("DISTILL_SEQIO_CACHE_DIRS"):  # --seqio_additional_cache_dirs
        seqio.add_global_cache_dirs(folders.split(","))


def lookup(name: str) -> seqio.Task | seqio.Mixture:
    """Returns the task or mixture of that name.

    Raises:
      ValueError: it is unknown; the message lists close and all known names.
    """
    if name in seqio.MixtureRegistry.names() or name in seqio.TaskRegistry.names():
        return seqio.get_mixture_or_task(name)
    known = sorted({*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()})
    raise ValueError(_unknown("task or mixture", name, known))


def _unknown(kind: str, name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    if _modules:
        return (
            f"no {kind} named {name!r}.{hint} MIXTURE_OR_TASK_MODULE={','.join(_modules)} "
            f"was imported; known: {', '.join(known) or 'none'}. A new dataset is registered "
            "by a module that it imports"
        )
    return (
        f"no {kind} named {name!r}.{hint} No task module was imported: call "
        f"task.import_module (MIXTURE_OR_TASK_MODULE). Known: {', '.join(known) or 'none'}"
    )


@dataclasses.dataclass(frozen=True)
class MemberInfo:
    """One task of a mixture.

    Attributes:
      name: of the task.
      rate: its share relative to the others; 1.0 for a task on its own.
      metrics: `module.function` of each of its metrics.
      loss_group: of its targets; None for a task that was not made by `register`.
    """

    name: str
    rate: float
    metrics: tuple[str, ...]
    loss_group: int | None


@dataclasses.dataclass(frozen=True)
class MixtureInfo:
    """The tasks behind a name, with nested mixtures flattened."""

    name: str
    members: tuple[MemberInfo, ...]

    def files(self, split: str) -> list[str] | None:
        """Returns all source files of a split; None where a member is a foreign SeqIO task."""
        if any(m.name not in _registered for m in self.members):
            return None
        return sorted({f for m in self.members for f in _registered[m.name].source.files(split)})


def describe(name: str) -> MixtureInfo:
    """Returns what is known of a task or mixture without reading its data.

    Raises:
      ValueError: the name is unknown.
    """
    provider = lookup(name)
    is_mixture = isinstance(provider, seqio.Mixture)
    members = []
    for member in provider.tasks if is_mixture else [provider]:
        members.append(
            MemberInfo(
                name=member.name,
                rate=provider.get_rate(member) if is_mixture else 1.0,
                metrics=tuple(f"{fn.__module__}.{fn.__name__}" for fn in member.metric_fns),
                loss_group=_registered[member.name].loss_group
                if member.name in _registered
                else None,
            )
        )
    return MixtureInfo(name, tuple(members))


def tokenized_rows(
    task_name: str, split: str, use_cached: bool = False
) -> Iterator[dict[str, Any]]:
    """Yields the examples of a task through SeqIO, in order and not truncated.

    Args:
      task_name: a task, not a mixture.
      split: "train", "validation" or "test".
      use_cached: demand what `seqio_cache_tasks` wrote; where it is found it is read anyway.

    Yields:
      `inputs`, `targets` (int32 [length]), `inputs_pretokenized`, `targets_pretokenized`,
      `example_id`, `label` (str) and `loss_group` (int). A SeqIO task from elsewhere gets
      defaults: example_id "<task>/<split>/<i>", loss_group 0, label = the target's text.

    Raises:
      ValueError: the name is unknown or a mixture, or there is no such split.
    """
    provider = lookup(task_name)
    if isinstance(provider, seqio.Mixture):
        members = ", ".join(t.name for t in provider.tasks)
        raise ValueError(f"{task_name!r} is a mixture; ask for one of its tasks: {members}")
    if split not in provider.splits:
        raise ValueError(f"{task_name} has no split {split!r}; it has {', '.join(provider.splits)}")
    use_cached = use_cached or (provider.supports_caching and provider.cache_dir is not None)
    dataset = provider.get_dataset(
        sequence_length=None,
        split=split,
        shuffle=False,
        num_epochs=1,
        use_cached=use_cached,
        try_in_mem_cache=False,
    )
    for i, example in enumerate(_numpy_rows(dataset)):
        text = {
            key: tf.compat.as_text(example[f"{key}_pretokenized"])
            if f"{key}_pretokenized" in example
            else provider.output_features[key].vocabulary.decode(example[key].tolist())
            for key in ("inputs", "targets")
        }
        yield {
            "inputs": example["inputs"].astype(np.int32),
            "targets": example["targets"].astype(np.int32),
            "inputs_pretokenized": text["inputs"],
            "targets_pretokenized": text["targets"],
            "example_id": _text(example, "example_id", f"{task_name}/{split}/{i}"),
            "loss_group": int(example.get("loss_group", LABEL_GROUP)),
            "label": _text(example, "label", text["targets"]),
        }


def _numpy_rows(dataset: tf.data.Dataset) -> Iterator[dict[str, Any]]:
    """Yields the features that `tokenized_rows` reads, one example at a time.

    In batches, because leaving TensorFlow once per example takes more time than tokenising it.
    """
    keys = [
        k
        for k in dataset.element_spec
        if k
        in (
            "inputs",
            "targets",
            "inputs_pretokenized",
            "targets_pretokenized",
            "example_id",
            "loss_group",
            "label",
        )
    ]

    def rows_of(column):
        if isinstance(column, tf.compat.v1.ragged.RaggedTensorValue):
            return np.split(column.values, column.row_splits[1:-1])
        return column

    batches = dataset.map(lambda example: {k: example[k] for k in keys}).ragged_batch(256)
    for batch in batches.as_numpy_iterator():
        for values in zip(*(rows_of(batch[k]) for k in keys), strict=True):
            yield dict(zip(keys, values, strict=True))


def _text(example: Mapping[str, Any], key: str, default: str) -> str:
    """Returns a string feature; a foreign task may have none, or one of another type."""
    value = example.get(key)
    return tf.compat.as_text(value) if isinstance(value, bytes) else default


def pretokenized_texts(name: str, split: str) -> Iterator[str]:
    """Yields the input and target texts of a task or mixture, to train a vocabulary on.

    Inputs are cut at a literal `</s>`, which is an id and must not become pieces.
    """
    for member in describe(name).members:
        for row in tokenized_rows(member.name, split):
            yield from filter(None, row["inputs_pretokenized"].split(EOS_TEXT))
            yield row["targets_pretokenized"]
