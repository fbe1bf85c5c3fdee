"""One dataset to its SeqIO tasks: prompts, streams, mixtures, and `register`.

The SeqIO edge of the project: this module and the modules that register tasks import TensorFlow.

    task.bind(data_dir="/data", vocabulary="/data/spiece.model")   # optional, before the import
    task.import_module("tasks")                                    # registers
    task.describe("svamp_step_by_step").members
    for row in task.tokenized_rows("svamp_predict", "train"): ...

The two streams of a dataset follow Hsieh et al. 2023 (arXiv 2305.02301): `predict: ` + input ->
label and `explain: ` + input -> rationale; `register` has the table of all tasks, baselines and
ablations included. Rows come from `distill.sources` when they are asked for, so registering needs
no data.
"""

import dataclasses
import difflib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow looks for a GPU, and says so
import seqio  # noqa: E402
import tensorflow as tf  # noqa: E402

from distill import metrics, prompts, sources  # noqa: E402
from distill import vocabulary as vocabulary_lib  # noqa: E402

LABEL_GROUP = 0
RATIONALE_GROUP = 1
DEFAULT_MODULE = "tasks"


# --- Binding -------------------------------------------------------------------------------------

_vocabulary: vocabulary_lib.Vocabulary | None = None


def bind(vocabulary: str | None = None, **settings: Any) -> None:
    """Resolves the vocabulary and the settings of the sources, once for the whole process.

    Call it before the import of a module that registers tasks: SeqIO fixes the vocabulary when a
    task registers. What is not given comes from the environment (DISTILL_VOCABULARY,
    DISTILL_DATA_DIR, ...), else from what is already bound, else from the defaults; the vocabulary
    is then "bytes".

    Args:
      vocabulary: as in `distill.vocabulary.load`.
      **settings: fields of `sources.Settings`, such as data_dir.

    Raises:
      ValueError: another value is already bound, or it is not allowed.
      FileNotFoundError: there is no such vocabulary.
    """
    global _vocabulary
    if _vocabulary is None:
        new = vocabulary_lib.load(
            vocabulary or os.environ.get("DISTILL_VOCABULARY") or vocabulary_lib.BYTES
        )
    elif vocabulary and vocabulary != _vocabulary.spec:
        raise ValueError(sources.already_bound("vocabulary", _vocabulary.spec, vocabulary))
    else:
        new = _vocabulary
    sources.bind(**settings)
    _vocabulary = new


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
    global _vocabulary
    for name in _registered:
        seqio.TaskRegistry.remove(name)
    for name in _mixtures:
        seqio.MixtureRegistry.remove(name)
    tops = tuple(f"{module}." for module in {DEFAULT_MODULE, *_modules})
    for module in [m for m in sys.modules if f"{m}.".startswith(tops)]:
        del sys.modules[module]
    for state in (_registered, _mixtures, _datasets, _sizes, _modules):
        state.clear()
    sources.reset()
    _vocabulary = None


# --- Registering ---------------------------------------------------------------------------------


_ALL_MIXTURES = {"label": ("label",), **prompts.MIXTURES}  # of `register_all`


# The labels that an answer may be, of all rows or of one with this input.
Options = Sequence[str] | Callable[[str], Sequence[str]]


@dataclasses.dataclass(frozen=True)
class _Dataset:
    """A registered dataset: what its module gave, and its source under the run's settings."""

    source: sources.Source
    remembered: sources.Source
    configured: sources.Source
    metric_fns: tuple[metrics.MetricFn, ...]
    options: Options


@dataclasses.dataclass(frozen=True)
class _Registered:
    """What we know of a task beyond SeqIO."""

    dataset: str
    stream: prompts.Form


_registered: dict[str, _Registered] = {}
_mixtures: list[str] = []
_datasets: dict[str, _Dataset] = {}
_sizes: dict[str, int] = {}
_modules: list[str] = []


def register(
    name: str,
    *,
    source: sources.Source,
    metric_fns: Sequence[metrics.MetricFn] = (metrics.label_accuracy,),
    options: Options = (),
) -> None:
    """Registers the SeqIO tasks and mixtures of one dataset.

    | name                     | input                           | target                          |
    |--------------------------|---------------------------------|---------------------------------|
    | `<name>_label`           | input                           | label                           |
    | `<name>_predict`         | `predict: ` + input             | label                           |
    | `<name>_explain`         | `explain: ` + input             | rationale (loss group 1)        |
    | `<name>_step_by_step`    | mixture of predict and explain, rate 1.0 each                    ||
    | `<name>_rationale_label` | input                           | rationale, then label           |
    | `<name>_label_rationale` | input                           | label, then rationale           |
    | `<name>_with_rationale`  | input + ` Rationale: rationale` | label                           |

    The last three are the single-task ablations; `metrics.answer_target` has their texts. All but
    `explain` are loss group 0. The same seven with the suffix `_llm` have the *teacher's* label in
    the train split. Validation and test have gold labels in every variant, so that all are scored
    alike.

    Which examples a row gives:

    - No label, no example: a row whose teacher label did not parse gives none in `_llm` (but its
      rationale trains `explain_llm`), a row of an unlabeled pool gives none without `_llm`.
    - `explain` and the three single-task forms give one example for each rationale in the train
      split, numbered by `choice`. Our loader draws one of them per epoch; under plain SeqIO all
      appear. In `_llm`, the single-task forms take the rationales that lead to the row's teacher
      label only, so that one target never contradicts itself.
    - In validation and test they take the first rationale. The single-task forms have every
      labeled row there, with the label alone (`rationale_label`: `So the answer is label`) or the
      bare input where there is no rationale; `explain`, which is not scored, leaves it out.

    Every example has `inputs` and `targets` (int32 ids, both ending with EOS),
    `inputs_pretokenized`, `targets_pretokenized`, `example_id`, `label` (gold, "" where none), and
    as int32 `loss_group`, `choice` and `loss_weight` (thousandths: that of the answer for targets
    with a rationale and for teacher labels, else 1000). In validation and test there are also the
    texts `teacher` (its label), `teacher_rationale`, `human_rationale` in place of that where the
    split's answers have no label at all and so are people's, and `options`, one a line; "" where
    none.

    Args:
      name: of the dataset.
      source: gives the rows.
      metric_fns: SeqIO metric functions for the tasks that answer; the first says which labels of
        the teacher are right, in `report` and in the teacher filter.
      options: of a classification task the labels, or a function that finds them in an input;
        evaluation can then choose among them by likelihood.

    Raises:
      ValueError: the name is taken.
    """
    if name in _datasets:
        raise ValueError(
            f"the dataset {name!r} is already registered. A module that registers "
            "tasks must have one import name; another dataset needs another name"
        )
    forms = (*prompts.FORMS, *prompts.MIXTURES)
    _refuse_taken(name, [f"{name}_{form}{by}" for form in forms for by in prompts.LABELERS])
    once = sources.Remembered(source)
    configured = sources.configured(once, *metric_fns[:1])
    dataset = _Dataset(source, once, configured, tuple(metric_fns), options)
    features = {
        key: seqio.Feature(vocabulary().as_seqio(), add_eos=True, dtype=tf.int32)
        for key in ("inputs", "targets")
    }
    for labeler in prompts.LABELERS:
        for stream_name, stream in prompts.FORMS.items():
            task_name = f"{name}_{stream_name}{labeler}"
            seqio.TaskRegistry.add(
                task_name,
                source=seqio.FunctionDataSource(
                    _dataset_fn(task_name, dataset.configured, stream, bool(labeler), options),
                    splits=source.splits,
                ),
                preprocessors=[
                    tokenize,
                    seqio.CacheDatasetPlaceholder(),
                    seqio.preprocessors.append_eos_after_trim,
                ],
                postprocess_fn=functools.partial(postprocess, form=stream.answer_form),
                metric_fns=[] if stream.explains else list(metric_fns),
                output_features=features,
            )
            _registered[task_name] = _Registered(name, stream)
        for mixture, streams in prompts.MIXTURES.items():
            _add_mixture(
                f"{name}_{mixture}{labeler}", [(f"{name}_{s}{labeler}", 1.0) for s in streams]
            )
    _datasets[name] = dataset


def register_all(names: Sequence[str] | None = None) -> None:
    """Registers mixtures of several datasets: `all_label`, `all_step_by_step` and their `_llm`.

    A dataset's rate is the number of its train rows, the same for predict and explain. It is
    counted when the mixture is first used, so that registering needs no data.

    Args:
      names: of registered datasets; None = all that are registered by now.

    Raises:
      ValueError: a dataset is unknown, or the mixtures are registered already.
    """
    names = datasets() if names is None else list(names)
    for name in names:
        dataset(name)
    labelers = prompts.LABELERS
    _refuse_taken("all", [f"all_{mixture}{by}" for mixture in _ALL_MIXTURES for by in labelers])
    for labeler in prompts.LABELERS:
        for mixture, streams in _ALL_MIXTURES.items():
            members = [f"{name}_{stream}{labeler}" for name in names for stream in streams]
            _add_mixture(f"all_{mixture}{labeler}", [(member, train_rows) for member in members])


def train_rows(task: seqio.Task) -> float:
    """SeqIO mixing rate: how many train rows the dataset of a task has, after the teacher filter.

    Raises:
      FileNotFoundError: its data is missing.
    """
    name = _registered[task.name].dataset
    if name not in _sizes:
        _sizes[name] = len(_datasets[name].configured.rows("train"))
    return float(_sizes[name])


def _add_mixture(name: str, members: list[tuple[str, Any]]) -> None:
    seqio.MixtureRegistry.add(name, members)
    _mixtures.append(name)


def _refuse_taken(name: str, wanted: list[str]) -> None:
    """Raises before anything is registered; SeqIO would stop half-way."""
    known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    if taken := sorted(known.intersection(wanted)):
        raise ValueError(
            f"cannot register {name!r}: the names {', '.join(taken)} are taken. Choose another "
            "name for the dataset"
        )


def _dataset_fn(
    task_name: str, source: sources.Source, stream: prompts.Form, teacher: bool, options: Options
):
    """Returns the function that gives SeqIO the texts of one stream."""

    def dataset_fn(split: str, shuffle_files: bool = False, seed: int | None = None):
        del shuffle_files, seed  # Rows have one order; SeqIO shuffles after this.
        rows = source.rows(split)
        # Read before TensorFlow iterates, which would turn our errors into opaque ones.
        examples = [e for row in rows for e in _examples(row, stream, split, teacher)]
        if split == "train" and not examples:
            raise ValueError(_no_example(task_name, stream, teacher, len(rows)))
        types = dict.fromkeys(("inputs", "targets", "example_id", "label"), tf.string)
        types |= dict.fromkeys(("loss_group", "choice", "loss_weight"), tf.int32)
        if split != "train":
            types |= dict.fromkeys(_OF_EVALUATION, tf.string)
            human = not sources.gives_labels(rows)
            texts = {row.id: _of_evaluation(row, options, human) for row in rows}
            examples = [e | texts[e["example_id"]] for e in examples]
        return tf.data.Dataset.from_tensor_slices(
            {
                key: tf.constant([e[key] for e in examples], dtype, [len(examples)])
                for key, dtype in types.items()
            }
        )

    return dataset_fn


# What evaluation shows and scores beside the label.
_OF_EVALUATION = ("teacher", "teacher_rationale", "options", "human_rationale")


def _of_evaluation(row: sources.Row, options: Options, human: bool) -> dict[str, str]:
    said = row.teacher or (row.rationales[0] if row.rationales else sources.Answer())
    allowed = options(row.input) if callable(options) else options
    teachers, humans = ("", said.rationale) if human else (said.rationale, "")
    values = (said.label or "", teachers or "", "\n".join(allowed), humans or "")
    return dict(zip(_OF_EVALUATION, values, strict=True))


def _no_example(task_name: str, stream: prompts.Form, teacher: bool, rows: int) -> str:
    label = "a teacher label that parses" if teacher else "a gold label"
    if stream.explains:
        needed = "a rationale" if teacher else "a rationale and a gold label"
    else:
        needed = f"a rationale and {label}" if stream.single_task else label
    name = _registered[task_name].dataset
    return (
        f"{task_name} has no training example, because none of the {rows} train rows has {needed}. "
        f"Are the teacher's completions there (<data folder>/{name}/llm/train_CoT_0.json, or "
        f"--gin.RATIONALE_STORE), or did TEACHER_FILTER drop all? {name}_label needs gold labels "
        f"only, {name}_label_llm teacher labels only"
    )


def _loss_group(stream: prompts.Form) -> int:
    return RATIONALE_GROUP if stream.explains else LABEL_GROUP


def _examples(
    row: sources.Row, stream: prompts.Form, split: str, teacher: bool
) -> Iterator[dict[str, Any]]:
    """Yields the examples of a row in one stream; the rules are those of `register`."""
    training = split == "train"
    teacher = teacher and training
    said = row.teacher if teacher else sources.Answer(label=row.label)
    label = said.label if said else None
    if stream.explains or stream.single_task:
        answers = row.rationales
        if teacher and stream.single_task:
            answers = tuple(a for a in answers if a.label == label)
        if not training:
            answers = answers[:1]
            if stream.single_task and not answers:
                answers = (sources.Answer(),)
    else:
        answers = (said,)
    if label is None and not (teacher and stream.explains):
        return
    for choice, answer in enumerate(answers):
        inputs = stream.prefix + row.input
        if stream.reads_rationale and answer.rationale:
            # A literal `</s>` in an input becomes an id; from the teacher it is only text.
            inputs += prompts.RATIONALE + answer.rationale.replace(sources.EOS_TEXT, " ")
        gold_only = stream.answer_form == "label" and not stream.explains and not teacher
        yield {
            "inputs": inputs,
            "targets": answer.rationale
            if stream.explains
            else metrics.answer_target(stream.answer_form, label, answer.rationale),
            "example_id": row.id,
            "label": row.label or "",
            "loss_group": _loss_group(stream),
            "choice": choice,
            "loss_weight": sources.FULL_WEIGHT if gold_only else answer.weight,
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
            tf.strings.split(example["inputs"], sources.EOS_TEXT),
            fn_output_signature=tf.RaggedTensorSpec([None], tf.int32, ragged_rank=0),
        ).flat_values[1:]

    has_eos = tf.strings.regex_full_match(example["inputs"], f"(?s).*{sources.EOS_TEXT}.*")
    return {
        **example,
        "inputs_pretokenized": example["inputs"],
        "targets_pretokenized": example["targets"],
        "inputs": tf.cond(has_eos, spliced, lambda: vocab.encode_tf(example["inputs"])),
        "targets": output_features["targets"].vocabulary.encode_tf(example["targets"]),
    }


def postprocess(decoded_model_output, example=None, is_target=False, form="label", **unused):
    """SeqIO postprocessor: the answer in a prediction; for a target the gold `label`.

    The gold label, whatever the model trained on.
    """
    if is_target and example is not None:
        return tf.compat.as_text(example["label"])
    return metrics.answer(decoded_model_output, form)


def datasets() -> list[str]:
    """Returns the names of the registered datasets."""
    return list(_datasets)


def dataset(name: str) -> sources.Source:
    """Returns the source of a registered dataset, such as "svamp".

    Raises:
      ValueError: the dataset is unknown.
    """
    if name not in _datasets:
        raise ValueError(_unknown("dataset", name, datasets()))
    return _datasets[name].source


def judging(name: str) -> tuple[metrics.MetricFn, Options]:
    """Returns the metric that says which labels of a dataset are right, and the labels there are.

    Raises:
      ValueError: the dataset is unknown.
    """
    dataset(name)
    found = _datasets[name]
    return (*found.metric_fns, metrics.label_accuracy)[0], found.options


def datasets_of(name: str) -> dict[str, str | None]:
    """Returns the datasets behind a task or mixture, in order; reads no data.

    Returns:
      dataset -> itself; for a SeqIO task that `register` did not make, the task -> None.

    Raises:
      ValueError: the name is unknown.
    """
    provider = lookup(name)
    members = provider.tasks if isinstance(provider, seqio.Mixture) else [provider]
    found = [_registered.get(member.name) for member in members]
    return {
        ours.dataset if ours else member.name: ours.dataset if ours else None
        for ours, member in zip(found, members, strict=True)
    }


def population(task_name: str, split: str) -> list[str] | None:
    """Returns the ids of all rows of the split of a task's dataset, in order.

    They are the same for every task of the dataset, whatever rows give it an example and whatever
    TEACHER_FILTER leaves of them. None for a SeqIO task that `register` did not make.
    """
    if task_name not in _registered:
        return None
    return [row.id for row in _datasets[_registered[task_name].dataset].remembered.rows(split)]


def report(name: str, split: str) -> sources.SourceReport:
    """Returns what was read from one split of a registered dataset, such as "svamp".

    Raises:
      ValueError: the dataset is unknown.
    """
    dataset(name)
    found = _datasets[name]
    return sources.source_report(found.configured, split, *found.metric_fns[:1])


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
      prompts.UnknownNameError: there is none; the message lists close and all known names.
    """
    if name in seqio.MixtureRegistry.names() or name in seqio.TaskRegistry.names():
        return seqio.get_mixture_or_task(name)
    known = sorted({*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()})
    raise prompts.UnknownNameError(_unknown("task or mixture", name, known))


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _unknown(kind: str, name: str, known: list[str]) -> str:
    hint = _did_you_mean(name, known)
    if _modules:
        imported = f"MIXTURE_OR_TASK_MODULE={','.join(_modules)} was imported; "
    else:
        imported = "No task module was imported: call task.import_module. "
    # Not all names: a dataset has fourteen and its mixtures.
    forms = ", ".join(f"<dataset>_{form}" for form in (*prompts.FORMS, *prompts.MIXTURES))
    others = [
        n for n in known if n not in _registered and n not in _mixtures and n not in _datasets
    ]
    others += [n for n in _mixtures if n.startswith("all_")]
    return (
        f"no {kind} named {name!r}.{hint} {imported}datasets: {', '.join(_datasets) or 'none'}"
        + (f"; their tasks: {forms}, and each with _llm" if kind != "dataset" else "")
        + (f"; others: {', '.join(sorted(others))}" if others else "")
        + ". A new dataset is registered by a module that MIXTURE_OR_TASK_MODULE imports"
    )


@dataclasses.dataclass(frozen=True)
class MemberInfo:
    """One task of a mixture.

    Attributes:
      name: of the task.
      rate: its share of training relative to the others; 1.0 for a task on its own.
      metrics: `module.function` of each of its metrics.
      loss_group: of its targets; None for a task that was not made by `register`.
      dataset: that `register` made it of; None for others.
      answer_form: how its targets and predictions hold the label, see `metrics.answer`.
    """

    name: str
    rate: float
    metrics: tuple[str, ...]
    loss_group: int | None
    dataset: str | None = None
    answer_form: str = "label"


@dataclasses.dataclass(frozen=True)
class MixtureInfo:
    """The tasks behind a name, with nested mixtures flattened.

    Attributes:
      name: of the task or mixture.
      members: its tasks.
      skipped: datasets whose data is missing, and was allowed to be; no member is of them.
    """

    name: str
    members: tuple[MemberInfo, ...]
    skipped: tuple[str, ...] = ()

    def files(self, split: str) -> list[str] | None:
        """Returns all source files of a split; None where a member is a foreign SeqIO task."""
        if any(m.dataset is None for m in self.members):
            return None
        names = {m.dataset for m in self.members}
        return sorted({f for name in names for f in _datasets[name].configured.files(split)})


def describe(
    name: str, *, split: str | None = None, allow_missing: Sequence[str] = ()
) -> MixtureInfo:
    """Returns what is known of a task or mixture.

    That reads no data, but to count rows for the rates of the `all_` mixtures, and no rate where
    the split is not "train", since only training mixes.

    Args:
      name: of the task or mixture.
      split: the data of every member must be there for this split; None = do not look.
      allow_missing: datasets of the mixture that are left out where it is not (ALLOW_MISSING).

    Raises:
      ValueError: the name is unknown, or one of allow_missing is no dataset of the mixture.
      FileNotFoundError: data is missing that is not allowed to be, or all of it.
    """
    provider = lookup(name)
    is_mixture = isinstance(provider, seqio.Mixture)
    tasks = provider.tasks if is_mixture else [provider]
    skipped = _absent(name, tasks, split, allow_missing)
    members = []
    for member in tasks:
        ours = _registered.get(member.name)
        if ours and ours.dataset in skipped:
            continue
        mixes = is_mixture and split in (None, "train")
        members.append(
            MemberInfo(
                name=member.name,
                rate=provider.get_rate(member) if mixes else 1.0,
                metrics=tuple(f"{fn.__module__}.{fn.__name__}" for fn in member.metric_fns),
                loss_group=_loss_group(ours.stream) if ours else None,
                dataset=ours.dataset if ours else None,
                answer_form=ours.stream.answer_form if ours else "label",
            )
        )
    return MixtureInfo(name, tuple(members), skipped)


def _absent(
    name: str, tasks: Sequence[seqio.Task], split: str | None, allow_missing: Sequence[str]
) -> tuple[str, ...]:
    """Returns the datasets without data for a split; all of them are in allow_missing."""
    members = sorted({_registered[t.name].dataset for t in tasks if t.name in _registered})
    for allowed in allow_missing:
        if allowed not in members:
            raise ValueError(
                f"ALLOW_MISSING names {allowed!r}, which is no dataset of {name!r}."
                f"{_did_you_mean(allowed, members)} It has {', '.join(members) or 'none of ours'}"
            )
    absent = {}
    for member in members if split else ():
        source = _datasets[member].source  # A missing rationale store is no missing dataset.
        if split not in source.splits:
            continue  # Not missing: there is none. Whether that is a fault, the caller knows.
        try:
            lost = [f for f in source.files(split) if not epath.Path(f).exists()]
            if lost:
                raise FileNotFoundError(
                    f"{member}: no file {', '.join(lost)}: add it, or set the folder that holds "
                    "the datasets with --gin.DATA_DIR=... or DISTILL_DATA_DIR=..."
                )
        except FileNotFoundError as e:
            absent[member] = e
    needed = [member for member in absent if member not in allow_missing]
    if needed and len(members) == 1:
        raise absent[needed[0]]
    if needed or (absent and len(absent) == len(members)):
        reasons = "".join(f"\n  {e}" for e in absent.values())
        fix = (
            f"Add it, or leave these datasets out: --gin.ALLOW_MISSING={','.join(absent)}"
            if len(absent) < len(members)
            else "Nothing is left: add the data of one of them at least"
        )
        raise FileNotFoundError(f"{name}: no {split} data of {', '.join(absent)}. {fix}.{reasons}")
    return tuple(absent)


def tokenized_rows(task_name: str, split: str) -> Iterator[dict[str, Any]]:
    """Yields the examples of a task through SeqIO, in order and not truncated.

    What `seqio_cache_tasks` wrote is read where it is found (--seqio_additional_cache_dirs).

    Args:
      task_name: a task, not a mixture.
      split: "train", "validation" or "test".

    Yields:
      `inputs`, `targets` (int32 [length]), `inputs_pretokenized`, `targets_pretokenized`,
      `example_id`, `label`, `teacher`, `teacher_rationale`, `options`, `human_rationale` (str),
      `loss_group`, `choice` and `loss_weight` (int; see `register`).
      A SeqIO task from elsewhere gets defaults: example_id "<task>/<split>/<i>", label = the
      target's text, loss_group 0, choice 0, loss_weight 1000.

    Raises:
      ValueError: the name is unknown or a mixture, or there is no such split.
    """
    provider = lookup(task_name)
    if isinstance(provider, seqio.Mixture):
        members = ", ".join(t.name for t in provider.tasks)
        raise ValueError(f"{task_name!r} is a mixture; ask for one of its tasks: {members}")
    if split not in provider.splits:
        raise ValueError(f"{task_name} has no split {split!r}; it has {', '.join(provider.splits)}")
    dataset = provider.get_dataset(
        sequence_length=None,
        split=split,
        shuffle=False,
        num_epochs=1,
        use_cached=provider.supports_caching and provider.cache_dir is not None,
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
            "loss_group": _integer(example, "loss_group", LABEL_GROUP),
            "choice": _integer(example, "choice", 0),
            "loss_weight": _integer(example, "loss_weight", sources.FULL_WEIGHT),
            "label": _text(example, "label", text["targets"]),
            **{key: _text(example, key, "") for key in _OF_EVALUATION},
        }


def _numpy_rows(dataset: tf.data.Dataset) -> Iterator[dict[str, Any]]:
    """Yields the features that `tokenized_rows` reads, one example at a time.

    In batches, because leaving TensorFlow once per example takes more time than tokenising it.
    """
    wanted = {
        *("inputs", "targets", "inputs_pretokenized", "targets_pretokenized"),
        *("example_id", "label", "loss_group", "choice", "loss_weight", *_OF_EVALUATION),
    }
    keys = [k for k in dataset.element_spec if k in wanted]

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


def _integer(example: Mapping[str, Any], key: str, default: int) -> int:
    """Returns an integer feature; in a foreign task the name may mean something else."""
    value = example.get(key)
    return int(value) if isinstance(value, np.integer) else default


def pretokenized_texts(name: str, split: str) -> Iterator[str]:
    """Yields the input and target texts of a task or mixture, to train a vocabulary on.

    Inputs are cut at a literal `</s>`, which is an id and must not become pieces.
    """
    for member in describe(name).members:
        for row in tokenized_rows(member.name, split):
            yield from filter(None, row["inputs_pretokenized"].split(sources.EOS_TEXT))
            yield row["targets_pretokenized"]
