"""What the report holds, found in the row cache and (the teacher) in the dataset's own files."""

import contextlib
import dataclasses
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from etils import epath

from distill import cache, data, objectives, packing, sources
from distill import vocabulary as vocabulary_lib
from distill.display import visible

FEATURES = ("inputs", "targets")
PROPOSALS = 5
# Rationales to one input that are shown of an example.
SHOWN_CHOICES = 3
# A training step is a forward and a backward pass, which costs twice as much.
STEP_FLOPS = 3


# --- What was found -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of one feature of a task's rows, EOS counted.

    Attributes:
      values: of each row before it is cut, int32 [n].
      limit: tokens at which longer ones are cut.
    """

    values: np.ndarray
    limit: int

    @property
    def total(self) -> int:
        return int(self.values.sum(dtype=np.int64))

    @property
    def mean(self) -> float:
        return self.total / max(len(self.values), 1)

    @property
    def longest(self) -> int:
        return int(self.values.max(initial=0))

    @property
    def truncated(self) -> int:
        """Rows that are cut."""
        return int((self.values > self.limit).sum())

    def percentile(self, q: float) -> int:
        """The length that `q` percent of the rows do not exceed."""
        if not len(self.values):
            return 0
        return int(np.percentile(self.values, q, method="inverted_cdf"))


@dataclasses.dataclass(frozen=True)
class TaskSummary:
    """One member task.

    Attributes:
      name: of the task.
      dataset: what it was registered for; None for a foreign SeqIO task.
      rate: mixing rate.
      rows: sequences.
      examples: different examples that they belong to.
      population: examples of the dataset's split.
      loss_groups: rows of each loss group, by its name.
      choices: (mean, most) rows of an example, of which one is drawn per epoch.
      weights: (least, mean, greatest) weight of a row in the loss, 1.0 = full.
      lengths: of `inputs` and `targets`.
    """

    name: str
    dataset: str | None
    rate: float
    rows: int
    examples: int
    population: int
    loss_groups: dict[str, int]
    choices: tuple[float, int]
    weights: tuple[float, float, float]
    lengths: dict[str, Lengths]

    @property
    def without(self) -> int:
        """Examples of the dataset that give no row here."""
        return self.population - self.examples

    @property
    def weighted(self) -> bool:
        return self.weights[0] != 1 or self.weights[2] != 1


@dataclasses.dataclass(frozen=True)
class Batching:
    """An epoch, packed for a model.

    Attributes:
      size: of a batch, in words.
      proposals: row lengths, the best first, with what they waste on a sample.
      capacity: the row lengths that are used.
      chosen: they were chosen from the data, and not given.
      waste: of the whole first epoch.
      steps: per epoch.
      examples: drawn per epoch.
      rows: packed rows of a step; of the largest, where epochs come in shards.
      tokens: real tokens of a step, the mean.
      flops: floating-point operations of a step, forward and backward.
    """

    size: str
    proposals: tuple[packing.Proposal, ...]
    capacity: dict[str, int]
    chosen: bool
    waste: packing.Waste
    steps: int
    examples: int
    rows: int
    tokens: float
    flops: float


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One side of a sequence as pieces of text.

    Attributes:
      pieces: one for each token, safe to print.
      special: of these, which stand for an id without text (EOS, padding, unknown).
      cut: which do not fit (not the last, which stays as the end).
    """

    pieces: tuple[str, ...]
    special: tuple[bool, ...]
    cut: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class SequenceTokens:
    """One row of an example."""

    task: str
    loss_group: str
    choice: int
    weight: float
    inputs: Tokens
    targets: Tokens


@dataclasses.dataclass(frozen=True)
class Example:
    """The sequences that share an example id.

    Attributes:
      example_id: as the dataset names it.
      rank: its place among all examples by length, 0.0 = the shortest, 1.0 = the longest.
      label: gold; "" where there is none.
      text: the input before tokenising, of its first sequence.
      sequences: in the order of the tasks, then choices.
      left_out: further choices that are not shown.
    """

    example_id: str
    rank: float
    label: str
    text: str
    sequences: tuple[SequenceTokens, ...]
    left_out: int


@dataclasses.dataclass(frozen=True)
class TeacherReport:
    """What the teacher said to one dataset's split.

    Attributes:
      dataset: its name.
      report: from `sources.source_report`.
      gains: from `sources.repair_gains`, where completions are repaired.
    """

    dataset: str
    report: sources.SourceReport
    gains: tuple[tuple[str, int, float | None], ...] = ()


@dataclasses.dataclass(frozen=True)
class Inspection:
    """All that is reported of a mixture's split.

    Attributes:
      name: of the mixture or task.
      split: of its rows.
      facts: what decides them, by name: the vocabulary, parsing and so on.
      tasks: its members.
      pairs: different examples of all members.
      batching: None where the split is not trained on.
      examples: a few.
      teacher: of each dataset; None where it was not asked for.
    """

    name: str
    split: str
    facts: dict[str, str]
    tasks: tuple[TaskSummary, ...]
    pairs: int
    batching: Batching | None
    examples: tuple[Example, ...]
    teacher: tuple[TeacherReport, ...] | None = None


# --- Finding it -----------------------------------------------------------------------------------


def inspect(
    corpus: cache.Corpus,
    config: data.DataConfig,
    vocabulary: vocabulary_lib.Vocabulary,
    flops: packing.Flops,
    *,
    model: str = "",
    num_examples: int = 3,
) -> Inspection:
    """Returns all but what the teacher said.

    Args:
      corpus: a split, from `cache.load`.
      config: how it would be trained on.
      vocabulary: that it was tokenised with.
      flops: of the student.
      model: the student, in words.
      num_examples: to show.

    Raises:
      ValueError: training would refuse the data or the config; see `data.TrainBatches`.
    """
    limits = dict(config.feature_lengths or data.MAX_LENGTHS)
    batching = None
    if corpus.split == "train":
        batching = describe_batches(data.TrainBatches(corpus, config, flops), flops)
    facts = {
        "vocabulary": f"{vocabulary.spec} ({vocabulary.size:,} ids)",
        "parsing": config.parsing,
        "teacher filter": config.teacher_filter,
        "rationale store": config.rationale_store,
        "student": model,
    }
    return Inspection(
        name=corpus.name,
        split=corpus.split,
        facts={name: str(value) for name, value in facts.items() if value},
        tasks=tuple(describe_task(rows, limits) for rows in corpus.tasks),
        pairs=len(np.unique(np.concatenate([t.keys for t in corpus.tasks]))) if corpus.tasks else 0,
        batching=batching,
        examples=find_examples(corpus, vocabulary, limits, num_examples),
    )


def describe_task(rows: cache.TaskRows, limits: Mapping[str, int]) -> TaskSummary:
    """Returns the numbers of one task.

    Args:
      rows: of the task.
      limits: tokens at which `inputs` and `targets` are cut.
    """
    groups, counts = np.unique(rows.loss_groups, return_counts=True)
    per_example = np.unique(rows.keys, return_counts=True)[1]
    weights = np.asarray(rows.weights, np.float64) / sources.FULL_WEIGHT
    return TaskSummary(
        name=rows.name,
        dataset=rows.dataset,
        rate=rows.rate,
        rows=len(rows),
        examples=len(per_example),
        population=len(rows.population),
        loss_groups={group_name(g): int(n) for g, n in zip(groups, counts, strict=True)},
        choices=(float(per_example.mean()), int(per_example.max())) if len(rows) else (0.0, 0),
        weights=(weights.min(), weights.mean(), weights.max()) if len(rows) else (1.0, 1.0, 1.0),
        lengths={f: Lengths(rows.lengths[:, i], limits[f]) for i, f in enumerate(FEATURES)},
    )


def group_name(group: int) -> str:
    """The name of a loss group; a foreign task may have numbers that mean nothing here."""
    known = objectives.LOSS_GROUPS
    return known[group] if 0 <= group < len(known) else f"group {group}"


def describe_batches(batches: data.TrainBatches, flops: packing.Flops) -> Batching:
    """Returns what an epoch of batches costs on a model; plans the whole first epoch."""
    config = batches.config
    plans = [batches.plan(0, shard) for shard in range(batches.num_shards)]
    wastes = [batches.waste(plan, flops) for plan in plans]
    rows = np.array([len(plan) * plan.rows for plan in plans], np.float64)
    steps = sum(map(len, plans))
    capacity = batches.capacity
    row = float(flops.row(capacity["inputs"], capacity["targets"]))
    return Batching(
        size=f"{config.pairs_per_step:,} examples"
        if config.pairs_per_step is not None
        else f"{config.batch_size:,} rows",
        proposals=tuple(batches.proposals(flops)[:PROPOSALS]),
        capacity=capacity,
        chosen=config.feature_lengths is None,
        waste=packing.Waste(
            inputs=float(np.average([w.inputs for w in wastes], weights=rows)),
            targets=float(np.average([w.targets for w in wastes], weights=rows)),
            # Operations computed are as the rows; those needed are these over the factor.
            flops=float(rows.sum() / (rows / [w.flops for w in wastes]).sum()),
        ),
        steps=steps,
        examples=batches.pairs_per_epoch,
        rows=max(plan.rows for plan in plans),
        tokens=sum(int(plan.tokens.sum()) for plan in plans) / steps,
        flops=STEP_FLOPS * rows.sum() / steps * row,
    )


# --- Tokens as text -------------------------------------------------------------------------------


def pieces_of(vocabulary: vocabulary_lib.Vocabulary) -> Callable[[int], str]:
    """Returns the function from a token id to the text of its piece; a space shows as `▁`.

    A byte shows as its character where that is one in ASCII, else as `<0xC3>`.
    """
    names = {
        vocabulary.pad_id: "<pad>", vocabulary.eos_id: "</s>", vocabulary.unk_id: "<unk>"
    }  # fmt: skip
    if isinstance(vocabulary, vocabulary_lib.SentencePieceVocabulary):
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(epath.Path(vocabulary.path).read_bytes())
        text_of = processor.IdToPiece
    elif isinstance(vocabulary, vocabulary_lib.ByteVocabulary):

        def text_of(i: int) -> str:
            return chr(i - 3) if i - 3 < 128 else f"<0x{i - 3:02X}>"
    else:

        def text_of(i: int) -> str:
            return vocabulary.decode([i])

    def piece(i: int) -> str:
        if i in names:
            return names[i]
        if not 0 <= i < vocabulary.size:
            return f"<id {i}>"
        text = text_of(i).replace(" ", "\u2581")
        # A combining mark needs something to sit on.
        return visible(f"\u25cc{text}" if text and unicodedata.combining(text[0]) else text)

    return piece


def tokens_of(
    ids: np.ndarray, piece: Callable[[int], str], special: int, limit: int | None = None
) -> Tokens:
    """Returns ids as pieces.

    Args:
      ids: int [length].
      piece: see `pieces_of`.
      special: ids up to this one have no text of their own.
      limit: tokens at which longer ones are cut.
    """
    ids = [int(i) for i in ids]
    last = len(ids) - 1
    kept = last if limit is None or len(ids) <= limit else limit - 1
    return Tokens(
        pieces=tuple(map(piece, ids)),
        special=tuple(i <= special for i in ids),
        cut=tuple(kept <= place < last for place in range(len(ids))),
    )


def find_examples(
    corpus: cache.Corpus,
    vocabulary: vocabulary_lib.Vocabulary,
    limits: Mapping[str, int],
    number: int,
) -> tuple[Example, ...]:
    """Returns examples from the shortest to the longest, evenly over the ranks by length.

    Faulty rows are mostly found at the ends. One example alone is the median.
    """
    tasks = [t for t in corpus.tasks if len(t)]
    if not tasks or number < 1:
        return ()
    keys, example = np.unique(np.concatenate([t.keys for t in tasks]), return_inverse=True)
    tokens = np.concatenate([t.lengths.sum(axis=1) for t in tasks])
    # The mean of its rows: several rationales make no example longer.
    mean = np.bincount(example, tokens) / np.bincount(example)
    order = np.argsort(mean, kind="stable")
    ranks = np.linspace(0, 1, number) if number > 1 else np.array([0.5])
    places = np.unique(np.round(ranks * (len(keys) - 1)).astype(int))
    piece = pieces_of(vocabulary)
    return tuple(
        _example(tasks, keys[order[p]], p / max(len(keys) - 1, 1), piece, vocabulary, limits)
        for p in places
    )


def _example(tasks, key, rank: float, piece, vocabulary, limits) -> Example:
    sequences, records, left_out = [], [], 0
    for rows in tasks:
        found = np.flatnonzero(rows.keys == key)
        found = found[np.argsort(rows.choices[found], kind="stable")]
        left_out += max(0, len(found) - SHOWN_CHOICES)
        found = found[:SHOWN_CHOICES]
        for i, record in zip(found, rows.read(found), strict=True):
            records.append(record)
            both = {
                f: tokens_of(getattr(record, f), piece, vocabulary.unk_id, limits[f])
                for f in FEATURES
            }
            sequences.append(
                SequenceTokens(
                    task=rows.name,
                    loss_group=group_name(rows.loss_groups[i]),
                    choice=int(rows.choices[i]),
                    weight=float(rows.weights[i]) / sources.FULL_WEIGHT,
                    **both,
                )
            )
    first = records[0]
    return Example(first.example_id, rank, first.label, first.text, tuple(sequences), left_out)


# --- The teacher ----------------------------------------------------------------------------------


def teacher_reports(config: cache.RowsConfig, split: str) -> tuple[TeacherReport, ...]:
    """Returns what the teacher said, for each dataset of a mixture; imports TensorFlow.

    It binds the process to the config (`task.bind`), so it is for a process of its own.

    Args:
      config: names the mixture, and what its rows depend on.
      split: of the rows.

    Raises:
      ValueError, FileNotFoundError: as `cache.load`.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # TensorFlow would take the accelerator's memory
    with _quiet():
        from distill import task

    task.bind(vocabulary=config.vocabulary, **config.source_settings())
    with _quiet():
        task.import_module(config.mixture_or_task_module)
    info = task.describe(
        config.mixture_or_task_name, split=split, allow_missing=config.allow_missing
    )
    found = []
    for name in dict.fromkeys(m.dataset for m in info.members if m.dataset):
        gains = ()
        if sources.settings().parsing == "repaired" and not sources.settings().rationale_store:
            gains = tuple(sources.repair_gains(task.dataset(name), split))
        found.append(TeacherReport(name, task.report(name, split), gains))
    return tuple(found)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what TensorFlow says of itself when it is imported off the terminal."""
    before = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
