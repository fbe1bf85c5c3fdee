"""What a task holds, before a run is paid for: counts, lengths, packing, and examples as tokens.

    corpus = cache.load(config, "train")
    found = inspect(corpus, config, vocabulary.load(config.vocabulary), packing.Flops.of(model))
    print(text_report(found))

All of it comes from the row cache and needs no TensorFlow, but for `teacher_reports`, which reads
the dataset's own files again. `html_report` gives one page without scripts or external resources.

Nothing that comes from data is trusted: characters that a terminal or browser would act upon, or
not show, are replaced by visible ones (`visible`), and HTML is escaped.
"""

import base64
import contextlib
import dataclasses
import html
import io
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from etils import epath

from distill import cache, data, objectives, packing, sources
from distill import vocabulary as vocabulary_lib

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


def histogram(values: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts values in bins of a round width.

    Args:
      values: whole numbers [n].
      most: bins.

    Returns:
      (edges, counts), int [k + 1] and [k], k <= most: bin i holds edges[i] <= value < edges[i+1].
    """
    if not len(values):
        return np.array([0, 1]), np.array([0])
    low, high = int(np.min(values)), int(np.max(values))
    widths = (m * 10**e for e in range(19) for m in (1, 2, 5))
    width = next(w for w in widths if high // w - low // w < most)
    edges = np.arange(low // width, high // width + 2) * width
    return edges, np.bincount(np.asarray(values) // width - low // width, minlength=len(edges) - 1)


# --- Tokens as text -------------------------------------------------------------------------------


_NAMED = {"\t": "<TAB>", "\n": "<LF>", "\r": "<CR>", "\x1b": "<ESC>"}


def visible(text: str) -> str:
    """Returns a text in which every character can be seen and none does anything.

    Control characters, white space other than the space, and what turns the direction of writing
    or has no width become `<LF>` or `<U+202E>`. (Unicode's control pictures lack in many fonts.)
    """
    return "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    if character == " " or character.isascii() and character.isprintable():
        return character
    if character in _NAMED:
        return _NAMED[character]
    # C*: control, format, surrogate, private, unassigned; Z*: white space.
    unseen = unicodedata.category(character)[0] in "CZ"
    return f"<U+{ord(character):04X}>" if unseen else character


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

    task.bind(
        vocabulary=config.vocabulary,
        data_dir=config.data_dir,
        parsing=config.parsing,
        teacher_filter=config.teacher_filter,
        rationale_store=config.rationale_store,
        max_bad_rows=config.max_bad_rows,
    )
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


# --- Tables ---------------------------------------------------------------------------------------

Table = tuple[Sequence[str], list[Sequence[str]]]  # header, rows


def task_table(tasks: Sequence[TaskSummary]) -> Table:
    """Rows, examples and what else decides how a task is trained on, where tasks have it."""
    columns = {
        "task": lambda t: t.name,
        "rows": lambda t: f"{t.rows:,}",
        "examples": lambda t: f"{t.examples:,}",
        "of dataset": lambda t: f"{t.population:,}",
        "without a row": lambda t: f"{t.without:,}",
        "loss group": lambda t: ", ".join(
            name if len(t.loss_groups) == 1 else f"{name} ({n:,})"
            for name, n in t.loss_groups.items()
        ),
    }
    if len({t.rate for t in tasks}) > 1:
        columns["mixing rate"] = lambda t: f"{t.rate:g}"
    if any(t.choices[1] > 1 for t in tasks):
        columns["choices, mean (most)"] = lambda t: f"{t.choices[0]:.2f} ({t.choices[1]})"
    if any(t.weighted for t in tasks):
        columns["weight, mean (range)"] = lambda t: (
            f"{t.weights[1]:.3f} ({t.weights[0]:g} to {t.weights[2]:g})"
        )
    return list(columns), [[cell(t) for cell in columns.values()] for t in tasks]


def length_table(tasks: Sequence[TaskSummary]) -> Table:
    """Token counts of each task and feature, and how many of its rows are cut."""
    header = ["task", "tokens", "mean", "p50", "p95", "max", "total", "cut at", "rows cut"]
    rows = []
    for t in tasks:
        for feature, n in t.lengths.items():
            share = n.truncated / max(t.rows, 1)
            rows.append(
                [t.name, feature, f"{n.mean:.1f}", f"{n.percentile(50):,}",
                 f"{n.percentile(95):,}", f"{n.longest:,}", f"{n.total:,}", f"{n.limit:,}",
                 f"{n.truncated:,} ({_percent(share)})"]
            )  # fmt: skip
    return header, rows


def proposal_table(proposals: Sequence[packing.Proposal]) -> Table:
    """Row lengths, what of them would be padding, and the FLOPs over those needed."""
    header = ["inputs", "targets", "padding of inputs", "padding of targets", "FLOPs factor"]
    return header, [
        [f"{p.inputs:,}", f"{p.targets:,}", _percent(p.waste.inputs), _percent(p.waste.targets),
         f"{p.waste.flops:.3f}"]
        for p in proposals
    ]  # fmt: skip


def teacher_table(reports: Sequence[TeacherReport]) -> Table:
    """Numbers of each dataset, and of each repair below it."""
    header = ["dataset", "rows", "gold", "parsed", "unparsed", "rationales", "teacher accuracy"]
    rows = []
    for t in reports:
        r = t.report
        rows.append(
            [t.dataset, f"{r.rows:,}", f"{r.rows - r.unlabeled:,}", f"{r.parsed:,}",
             f"{r.unparsed:,}", f"{r.rationales:,}", _accuracy(r.teacher_accuracy)]
        )  # fmt: skip
        for step, unparsed, accuracy in t.gains:
            name = f"  {step}" if step == t.gains[0][0] else f"  + {step}"
            rows.append([name, "", "", "", f"{unparsed:,}", "", _accuracy(accuracy)])
    return header, rows


def batch_facts(b: Batching) -> list[tuple[str, str]]:
    """What a step and an epoch are, as (name, value)."""
    origin = "least waste on this data and student" if b.chosen else "as given"
    inputs, targets = (b.capacity[f] for f in FEATURES)
    return [
        ("row", f"{inputs:,} input + {targets:,} target tokens ({origin})"),
        ("step", f"{b.examples / b.steps:,.1f} examples in {b.rows:,} rows of "
                 f"{inputs + targets:,} tokens, {b.tokens:,.0f} of them real"),
        ("epoch", f"{b.steps:,} steps for {b.examples:,} examples"),
        ("padding", f"{_percent(b.waste.inputs)} of inputs, {_percent(b.waste.targets)} of "
                    f"targets, {b.waste.flops:.3f} x the FLOPs needed"),
        ("compute", f"{_flops(b.flops)} a step, {_flops(b.flops * b.steps)} an epoch "
                    "(forward and backward, padding included)"),
    ]  # fmt: skip


def _percent(share: float) -> str:
    return f"{share:.1%}" if share == 0 or share >= 0.001 else "<0.1%"


def _accuracy(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


def _flops(value: float) -> str:
    for name, unit in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= unit:
            return f"{value / unit:.3g} {name}FLOP"
    return f"{value / 1e6:.3g} MFLOP"


# --- The report as text ---------------------------------------------------------------------------

_GROUP_COLOURS = {"label": "36", "rationale": "33"}  # cyan, yellow
_DIM, _BOLD, _REVERSE = "2", "1", "7"
_BINS = 10
_BAR = 22


def text_report(found: Inspection, *, colour: bool = False, width: int = 100) -> str:
    """Returns the report for a terminal, without what the teacher said.

    Args:
      found: from `inspect`.
      colour: use ANSI colours.
      width: of a line, characters.
    """
    rows = sum(t.rows for t in found.tasks)
    facts = "".join(f"\n{name}: {visible(value)}" for name, value in found.facts.items())
    parts = [
        f"{visible(found.name)}, {found.split}: {rows:,} rows of {found.pairs:,} examples{facts}",
        _text_table(task_table(found.tasks), left=(0, 5)),
        _text_table(length_table(found.tasks), left=(0, 1)),
        *(_text_histograms(t) for t in found.tasks if t.rows),
    ]
    if found.batching:
        parts += [_text_batches(found.batching)]
    else:
        parts += ["Only the train split is packed into batches."]
    parts += [_text_example(e, colour, width) for e in found.examples]
    return "\n\n".join(parts)


def teacher_text(reports: Sequence[TeacherReport]) -> str:
    """Returns what the teacher said, for a terminal."""
    if not reports:
        return "The teacher: no dataset of this mixture was made by task.register."
    lines = ["The teacher:", _text_table(teacher_table(reports))]
    for t in reports:
        lines += [f"{visible(t.dataset)}: {visible(note)}" for note in t.report.notes]
    return "\n".join(lines)


def _paint(text: str, code: str | None, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour and code else text


def _text_table(table: Table, left: Sequence[int] = (0,)) -> str:
    header, rows = table
    cells = [[visible(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def _text_histograms(task: TaskSummary) -> str:
    """Both histograms of a task, side by side."""
    sides = [_bars(f"{f}, tokens", task.lengths[f].values) for f in FEATURES]
    height, width = max(map(len, sides)), max(map(len, sides[0]))
    sides = [side + [""] * (height - len(side)) for side in sides]
    lines = [f"{a.ljust(width)}   {b}".rstrip() for a, b in zip(*sides, strict=True)]
    return "\n".join([f"{visible(task.name)}, rows by length:", *lines])


def _bars(title: str, values: np.ndarray) -> list[str]:
    edges, counts = histogram(values, _BINS)
    names = [
        f"{a:,}" if b - a == 1 else f"{a:,} - {b - 1:,}"
        for a, b in zip(edges, edges[1:], strict=False)
    ]
    first, last = max(map(len, names)), len(f"{counts.max():,}")
    lines = [f"  {title}"]
    for name, count in zip(names, counts, strict=True):
        eighths = -(-int(count) * _BAR * 8 // max(int(counts.max()), 1))
        bar = "█" * (eighths // 8) + ("", *"▏▎▍▌▋▊▉")[eighths % 8]
        lines.append(f"  {name:>{first}}  {count:>{last},}  {bar:<{_BAR}}")
    return lines


def _text_batches(b: Batching) -> str:
    table = _text_table(proposal_table(b.proposals), left=()).splitlines()
    best = " (the first is used)" if b.chosen else ""
    facts = batch_facts(b)
    width = max(len(name) for name, _ in facts)
    return "\n".join(
        [
            f"Row lengths that waste least, for batches of {b.size}{best};",
            "within 0.5 % of the least FLOPs, the shortest is the best:",
            *table,
            "",
            "Training on it:",
            *(f"  {name.ljust(width)}  {value}" for name, value in facts),
        ]
    )


def _text_example(example: Example, colour: bool, width: int) -> str:
    lines = [_paint(_example_title(example), _BOLD, colour)]
    for s, known in _with_known_inputs(example):
        group = _paint(s.loss_group, _GROUP_COLOURS.get(s.loss_group), colour)
        lines.append(f"  {visible(s.task)}, loss group {group}{_details(s)}")
        for feature in FEATURES:
            code = _GROUP_COLOURS.get(s.loss_group) if feature == "targets" else None
            tokens = getattr(s, feature)
            if feature == "inputs" and known:
                lines.append("    inputs as before")
                continue
            lines.append(f"    {feature}, {len(tokens.pieces):,} tokens:")
            lines += _text_tokens(tokens, code, colour, max(width - 6, 20))
    if example.left_out:
        lines.append(f"  {_left_out(example)}")
    return "\n".join(lines)


def _example_title(example: Example) -> str:
    rank = {0.0: "the shortest", 1.0: "the longest"}.get(
        example.rank, f"longer than {example.rank:.0%}"
    )
    label = f"gold label {visible(example.label)!r}" if example.label else "no gold label"
    return f"Example {visible(example.example_id)} ({rank}), {label}"


def _details(s: SequenceTokens) -> str:
    choice = f", choice {s.choice}" if s.choice else ""
    weight = f", weight {s.weight:g}" if s.weight != 1 else ""
    return choice + weight


def _with_known_inputs(example: Example) -> Iterator[tuple[SequenceTokens, bool]]:
    """Yields each sequence, and whether it has the inputs of the one before, as choices do."""
    before = None
    for s in example.sequences:
        yield s, s.inputs == before
        before = s.inputs


def _left_out(example: Example) -> str:
    return f"and {example.left_out:,} more sequences, of which one is drawn per epoch"


def _text_tokens(tokens: Tokens, code: str | None, colour: bool, width: int) -> list[str]:
    """Tokens with `|` between them, broken into lines; a `|` inside a token is `\\|`."""
    lines, line, used, in_cut = [], [], 0, False

    def end() -> None:
        nonlocal line, used
        if line:
            lines.append("      " + _paint("|", _DIM, colour).join(line))
        line, used = [], 0

    each = zip(tokens.pieces, tokens.special, tokens.cut, strict=True)
    for piece, special, cut in each:
        if cut != in_cut:
            end()
            lines.append(
                f"      --- {sum(tokens.cut):,} tokens are cut: ---" if cut else "      ---"
            )
            in_cut = cut
        text = piece if special else piece.replace("\\", "\\\\").replace("|", "\\|")
        if line and used + len(text) + 1 > width:
            end()
        paint = _DIM if cut else _REVERSE if special else code
        line.append(_paint(text, paint, colour))
        used += len(text) + 1
    end()
    return lines


# --- The report as HTML ---------------------------------------------------------------------------

_COLOURS = {"label": "#2b6cb0", "rationale": "#b45309"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c; background: #fff;
       max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .3rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem;
     border-bottom: 1px solid #cbd5e0; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; }
p, dd { overflow-wrap: anywhere; } p.note { color: #4a5568; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .22rem .7rem; text-align: right; border-bottom: 1px solid #e2e8f0; }
th { background: #f7fafc; font-weight: 600; } th.l, td.l { text-align: left; }
td { white-space: pre; }
dl { display: grid; grid-template-columns: max-content auto; gap: .15rem 1rem; margin: .6rem 0; }
dt { color: #4a5568; } dd { margin: 0; }
img { max-width: 100%; height: auto; display: block; margin: .5rem 0; }
.tokens { font: 13px/1.9 ui-monospace, monospace; margin: .1rem 0 .6rem; }
.t { border: 1px solid #cbd5e0; border-radius: 3px; background: #f7fafc; padding: 0 .2em;
     margin: 0 1px; white-space: pre-wrap; overflow-wrap: anywhere; }
.t.label { border-color: #2b6cb0; background: #e3effb; }
.t.rationale { border-color: #b45309; background: #fdebd3; }
.t.other { border-color: #6b46c1; background: #efe8fb; }
.t.special { border-style: dashed; border-width: 2px; font-weight: 700; }
.t.cut { opacity: .55; text-decoration: line-through; }
.feature { color: #4a5568; font-size: .88rem; }
.example { border: 1px solid #e2e8f0; border-radius: 6px; padding: .2rem 1rem .6rem;
           margin: 1rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f7fafc; padding: .5rem; }
"""
# No script and no request, whatever a row holds.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_PLOT_BINS = 40


def html_report(found: Inspection) -> str:
    """Returns the report as one HTML page that needs nothing else, and no JavaScript."""
    title = f"{_escape(found.name)}, {_escape(found.split)}"
    rows = sum(t.rows for t in found.tasks)
    body = [
        f"<h1>{title}</h1>",
        f"<p>{rows:,} rows of {found.pairs:,} examples.</p>",
        _html_facts(list(found.facts.items())),
        "<h2>Tasks</h2>",
        _html_table(task_table(found.tasks), left=(0, 5)),
        "<p class=note>A row is one sequence; an example is what its sequences (predict, explain) "
        "share. <i>of dataset</i>: examples of its split. Of several rows for one example "
        "(<i>choices</i>), one is drawn per epoch.</p>",
    ]
    if found.teacher is not None:
        body += ["<h2>The teacher</h2>", _html_teacher(found.teacher)]
    body += ["<h2>Lengths</h2>", _html_table(length_table(found.tasks), left=(0, 1))]
    body += [_html_plot(t) for t in found.tasks if t.rows]
    if found.batching:
        body += ["<h2>Batches</h2>", _html_batches(found.batching)]
    else:
        body += ["<p class=note>Only the train split is packed into batches.</p>"]
    if found.examples:
        body += ["<h2>Examples</h2>", _html_legend(found.examples)]
        body += [_html_example(e) for e in found.examples]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _escape(text: str) -> str:
    return html.escape(visible(text))


def _html_facts(facts: Sequence[tuple[str, str]]) -> str:
    return (
        "<dl>" + "".join(f"<dt>{_escape(n)}</dt><dd>{_escape(v)}</dd>" for n, v in facts) + "</dl>"
    )


def _html_table(table: Table, left: Sequence[int] = (0,)) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        made = (
            f"<{tag}{' class=l' if i in left else ''}>{_escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(made)}</tr>"

    header, rows = table
    body = "\n".join(row(cells, "td") for cells in rows)
    return (
        f"<div class=wide><table>\n<thead>{row(header, 'th')}</thead>\n<tbody>{body}</tbody>\n"
        "</table></div>"
    )


def _html_teacher(reports: Sequence[TeacherReport]) -> str:
    if not reports:
        return "<p>No dataset of this mixture was made by task.register.</p>"
    notes = "".join(
        f"<p>{_escape(t.dataset)}: {_escape(note)}</p>" for t in reports for note in t.report.notes
    )
    return (
        _html_table(teacher_table(reports))
        + notes
        + "<p class=note><i>gold</i>: rows with a gold label. <i>parsed</i>, <i>unparsed</i>: rows "
        "with and without a teacher label. The accuracy is over the rows with a gold label that "
        "the teacher was asked; unparsed is wrong.</p>"
    )


def _html_batches(b: Batching) -> str:
    best = " The first is used." if b.chosen else ""
    return (
        _html_facts(batch_facts(b))
        + f"<h3>Row lengths that waste least, for batches of {_escape(b.size)}</h3>"
        + _html_table(proposal_table(b.proposals), left=())
        + "<p class=note>In tokens; tried on a sample. The FLOPs factor is what is computed over "
        f"what the real tokens need; within 0.5 % of the least, the shortest is the best.{best}</p>"
    )


def _group_class(loss_group: str) -> str:
    return loss_group if loss_group in _COLOURS else "other"


def _html_legend(examples: Sequence[Example]) -> str:
    groups = dict.fromkeys(s.loss_group for e in examples for s in e.sequences)
    boxes = ["<span class=t>input, no loss</span>"]
    boxes += [
        f'<span class="t {_group_class(g)}">target, loss group {_escape(g)}</span>' for g in groups
    ]
    boxes += ['<span class="t special">&lt;/s&gt;</span> an id without text (end of sequence)']
    if any(
        any(tokens.cut)
        for e in examples for s in e.sequences for tokens in (s.inputs, s.targets)
    ):  # fmt: skip
        boxes += ['<span class="t cut">cut off</span>']
    return (
        f"<p class=tokens>{' '.join(boxes)}</p><p class=note>One box is one token; \u2581 is a "
        "space. From the shortest example to the longest.</p>"
    )


def _html_example(example: Example) -> str:
    parts = [f"<h3>{_escape(_example_title(example))}</h3>"]
    for s, known in _with_known_inputs(example):
        parts.append(
            f"<p><b>{_escape(s.task)}</b>, loss group <b>{_escape(s.loss_group)}</b>"
            f"{_escape(_details(s))}</p>"
        )
        for feature in FEATURES:
            tokens = getattr(s, feature)
            if feature == "inputs" and known:
                parts.append("<div class=feature>inputs as before</div>")
                continue
            group = _group_class(s.loss_group) if feature == "targets" else ""
            parts.append(
                f"<div class=feature>{feature}, {len(tokens.pieces):,} tokens</div>"
                f"<div class=tokens>{_html_tokens(tokens, group)}</div>"
            )
    if example.left_out:
        parts.append(f"<p class=note>{_left_out(example)}</p>")
    # Line breaks do no harm here, and show as themselves.
    text = "\n".join(map(_escape, example.text.split("\n")))
    parts.append(
        f"<details><summary>the input before tokenising</summary><pre>{text}</pre></details>"
    )
    return f"<div class=example>{''.join(parts)}</div>"


def _html_tokens(tokens: Tokens, group: str) -> str:
    made = []
    for piece, special, cut in zip(tokens.pieces, tokens.special, tokens.cut, strict=True):
        classes = ["t", group, "special" if special else "", "cut" if cut else ""]
        # Pieces are visible already. Browsers break lines between the boxes.
        made.append(f'<span class="{" ".join(filter(None, classes))}">{html.escape(piece)}</span>')
    return "<wbr>".join(made)


def _html_plot(task: TaskSummary) -> str:
    png = base64.b64encode(length_plot(task)).decode("ascii")
    name = _escape(task.name)
    return (
        f'<img width=1000 alt="Histograms of input and target tokens of {name}" '
        f'src="data:image/png;base64,{png}">'
    )


def length_plot(task: TaskSummary) -> bytes:
    """Returns the length histograms of a task as a PNG."""
    from matplotlib.figure import Figure

    colours = dict.fromkeys(FEATURES, "#718096")
    if len(task.loss_groups) == 1:
        colours["targets"] = _COLOURS.get(next(iter(task.loss_groups)), "#6b46c1")
    figure = Figure(figsize=(10, 2.7), layout="constrained")
    for axes, feature in zip(figure.subplots(1, 2), FEATURES, strict=True):
        lengths = task.lengths[feature]
        edges, counts = histogram(lengths.values, _PLOT_BINS)
        axes.bar(  # Whole numbers: a bar is around the values that it counts.
            edges[:-1] - 0.5, counts, width=np.diff(edges), align="edge", color=colours[feature],
            edgecolor="white", linewidth=0.4,
        )  # fmt: skip
        for position, style, name in (
            (lengths.percentile(50), "-", f"median {lengths.percentile(50):,}"),
            (lengths.percentile(95), "--", f"p95 {lengths.percentile(95):,}"),
            (lengths.limit, ":", f"cut at {lengths.limit:,}"),
        ):
            if position <= edges[-1]:
                axes.axvline(position, color="#1a202c", linestyle=style, linewidth=1, label=name)
        axes.set_xlabel(f"{feature} (tokens, in bins of {edges[1] - edges[0]:,})")
        axes.set_ylabel("rows")
        axes.grid(alpha=0.3, axis="y")
        axes.set_axisbelow(True)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.legend(  # Above the bars, which may be anywhere.
            fontsize=8, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 0.98)
        )
        axes.spines[["top", "right"]].set_visible(False)
    # The name is text, not TeX: a `$` in it would be read as mathematics.
    figure.suptitle(visible(task.name), x=0.01, ha="left", fontsize=10, parse_math=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110, metadata={"Software": None})
    return png.getvalue()
