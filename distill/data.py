"""Mixture name -> deterministic, packed batches.

    corpus = load(config, "train")                  # tokenised rows, from a cache on disk
    batches = TrainBatches(corpus, config)          # what a batch holds, as a pure plan
    for batch in batches.iterate(Position(0, 0)):   # numpy arrays under T5X's batch keys
        ...

A mixture's rows are tokenised once. The cache's manifest holds the hashes of all that decided them,
so a fresh cache is recognised, and training starts, without importing SeqIO and TensorFlow.

The sequences that share an `example_id` (the `predict` and the `explain` sequence of an example)
are one *pair*: they are always in the same batch, as in Hsieh et al. 2023, though not necessarily
in the same packed row. A plan (which sequence lies in which row of which batch) is a pure function
of (rows, config, epoch); to resume is to name an epoch and a batch, on any number of hosts.
"""

import collections
import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from absl import logging
from etils import epath

from distill import vocabulary as vocabulary_lib

CACHE_FORMAT = 1
# Where the lengths come from the data, longer sequences are still cut here: the published limits.
MAX_LENGTHS = {"inputs": 1024, "targets": 256}
# How many pairs in a row may fail to fit before a batch is closed; they lead the next one.
LOOKAHEAD = 64


class NoSplitError(FileNotFoundError):
    """The mixture has no such split at all, which is no fault where the split is optional."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on and how to batch it.

    Attributes:
      mixture_or_task_name: a SeqIO task or mixture, e.g. `svamp_step_by_step`.
      mixture_or_task_module: the module whose import registers it.
      data_dir: folder of the datasets; None = $DISTILL_DATA_DIR.
      vocabulary: `bytes`, a SentencePiece file or a Hugging Face folder; None =
        $DISTILL_VOCABULARY, else `bytes`.
      feature_lengths: tokens per packed row, `{"inputs": ..., "targets": ...}`; longer sequences
        are cut, EOS kept. None = chosen from the data.
      batch_size: packed rows per step, as in T5X.
      pairs_per_step: examples per step instead, in as many rows as they need.
      num_train_examples: train on a random subset of this size, drawn by the seed.
      seed: of the order of the examples.
      cache_dir: where tokenised rows are kept; None = $DISTILL_CACHE_DIR, else
        `~/.cache/distill-step-by-step`.
    """

    mixture_or_task_name: str
    mixture_or_task_module: str = "tasks"
    data_dir: str | None = None
    vocabulary: str | None = None
    feature_lengths: Mapping[str, int] | None = None
    batch_size: int | None = 128
    pairs_per_step: int | None = None
    num_train_examples: int | None = None
    seed: int = 0
    cache_dir: str | None = None

    def __post_init__(self):
        def default(field: str, variable: str, last: str | None) -> None:
            value = getattr(self, field) or os.environ.get(variable) or last
            object.__setattr__(self, field, value)

        default("data_dir", "DISTILL_DATA_DIR", None)
        default("vocabulary", "DISTILL_VOCABULARY", "bytes")
        default("cache_dir", "DISTILL_CACHE_DIR", "~/.cache/distill-step-by-step")
        if self.batch_size is None and self.pairs_per_step is None:
            raise ValueError("Set BATCH_SIZE (packed rows) or PAIRS_PER_STEP (examples).")
        for field in ("batch_size", "pairs_per_step", "num_train_examples"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"DataConfig.{field} must be a positive integer, not {value!r}.")
        if self.feature_lengths is not None:
            lengths = dict(self.feature_lengths)
            if set(lengths) != {"inputs", "targets"} or min(lengths.values()) < 2:
                raise ValueError(
                    "TASK_FEATURE_LENGTHS must be {'inputs': n, 'targets': m} with lengths of at "
                    f"least 2 tokens, not {lengths!r}."
                )


# --- Rows, tokenised once and cached --------------------------------------------------------------


class Ragged:
    """Sequences of different lengths in one flat array."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray):
        self.values, self.offsets = values, offsets

    @classmethod
    def of(cls, sequences: list[np.ndarray]) -> "Ragged":
        offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
        flat = np.concatenate(sequences) if sequences else np.zeros(0)
        return cls(flat.astype(np.int32), offsets)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]


@dataclasses.dataclass(frozen=True)
class TaskRows:
    """The tokenised rows of one task's split.

    Attributes:
      name: of the SeqIO task.
      rate: mixing rate in the mixture it was loaded for.
      metrics: names of its metric functions (`distill.metrics.METRICS`, else `module:function`).
      inputs: token ids, EOS last.
      targets: token ids, EOS last.
      loss_groups: int32 [n].
      example_ids: shared by the sequences of one example.
      labels: the gold label of each row, text.
      texts: the input of each row before tokenising.
    """

    name: str
    rate: float
    metrics: tuple[str, ...]
    inputs: Ragged
    targets: Ragged
    loss_groups: np.ndarray
    example_ids: list[str]
    labels: list[str]
    texts: list[str]

    def __len__(self) -> int:
        return len(self.inputs)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A mixture's split, tokenised.

    Attributes:
      name: of the mixture or task.
      split: `train`, `validation` or `test`.
      tasks: the rows of each member.
      fingerprint: sha256 over all rows; two corpora with the same one give the same batches.
    """

    name: str
    split: str
    tasks: list[TaskRows]
    fingerprint: str

    @property
    def loss_groups(self) -> set[int]:
        return {int(g) for task in self.tasks for g in np.unique(task.loss_groups)}


def load(config: DataConfig, split: str, *, prepared: bool = False) -> Corpus:
    """Reads a split of the mixture from the cache, after building it if it is not fresh.

    Args:
      config: names the mixture, and what its rows depend on.
      split: `train`, `validation` or `test`.
      prepared: the caller has just called `prepare`; do not look again.

    Raises:
      ValueError: unknown task, or rows that do not add up (from the task's source).
      FileNotFoundError: the task's data is missing; NoSplitError where it never had this split.
    """
    if not prepared:
        prepare(config, (split,))
    return _read(_folder(config, split))


def prepare(config: DataConfig, splits: Sequence[str]) -> None:
    """Builds the caches of those splits that are not fresh, in one process of its own.

    That process imports SeqIO and TensorFlow (seconds, and 800 MB), so that this one never does.

    Raises:
      As `load`, but a split that the mixture never had is no error here.
    """
    stale = [split for split in splits if not _is_fresh(_folder(config, split), config)]
    if not stale:
        return
    logging.info(
        "Tokenising %s, %s, into %s",
        config.mixture_or_task_name, " and ".join(stale), config.cache_dir,
    )  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "CUDA_VISIBLE_DEVICES": "",  # TensorFlow would take the accelerator's memory
    }
    with tempfile.TemporaryDirectory() as folder:
        outcome = pathlib.Path(folder) / "outcome.json"
        request = json.dumps([dataclasses.asdict(config), stale, str(outcome)])
        child = subprocess.run(
            [sys.executable, "-m", "distill.data", request],
            env=environment, stderr=subprocess.PIPE, text=True, errors="replace",
        )  # fmt: skip
        failure = json.loads(outcome.read_text()) if outcome.exists() else None
    if failure is not None:
        kinds = (ValueError, FileNotFoundError, ModuleNotFoundError)
        raise {kind.__name__: kind for kind in kinds}[failure["kind"]](failure["message"])
    if child.returncode:
        raise RuntimeError(f"Tokenising failed (exit {child.returncode}):\n{child.stderr}")
    for line in child.stderr.splitlines():
        if not _TENSORFLOW_NOTE.match(line):
            logging.warning(line)


# What TensorFlow says of itself whenever it is imported on a machine without a GPU.
_TENSORFLOW_NOTE = re.compile(r"[IWE]0000 |WARNING: All log messages before absl|\s*$")


def _build_all(request: str) -> int:
    """What the process of `prepare` does; user errors go into a file, others are raised."""
    settings, splits, outcome = json.loads(request)
    config = DataConfig(**settings)
    try:
        for split in splits:
            _build(_folder(config, split), config, split)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        kind = next(
            k for k in (ModuleNotFoundError, FileNotFoundError, ValueError) if isinstance(error, k)
        )
        failure = {"kind": kind.__name__, "message": str(error)}
        pathlib.Path(outcome).write_text(json.dumps(failure))
        return 1
    return 0


def _folder(config: DataConfig, split: str) -> pathlib.Path:
    """Where the rows of a split are kept: by all that names them."""
    identity = {
        "format": CACHE_FORMAT,
        "mixture": config.mixture_or_task_name,
        "module": config.mixture_or_task_module,
        "data_dir": config.data_dir and _absolute(config.data_dir),
        "vocabulary": config.vocabulary,
        "split": split,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    root = pathlib.Path(config.cache_dir).expanduser()
    return root / f"{config.mixture_or_task_name}-{split}-{key}"


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def _sha256(path) -> str:
    with epath.Path(path).open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _code_hash(module: str) -> str:
    """Hash of the source that decides the rows: the task module and the code that tokenises."""
    top = importlib.util.find_spec(module.split(".")[0])  # finding a top level imports nothing
    if top is None:
        raise ValueError(
            f"There is no module {module!r} to import tasks from. Set MIXTURE_OR_TASK_MODULE to "
            "one on the Python path (the default is 'tasks')."
        )
    here = pathlib.Path(__file__).parent
    files = [here / "task.py", here / "vocabulary.py"]
    for folder in top.submodule_search_locations or ():
        files += sorted(pathlib.Path(folder).rglob("*.py"))
    if not top.submodule_search_locations:
        files.append(pathlib.Path(top.origin))
    return hashlib.sha256("".join(_sha256(f) for f in files).encode()).hexdigest()


def _is_fresh(folder: pathlib.Path, config: DataConfig) -> bool:
    manifest = folder / "manifest.json"
    if not manifest.exists():
        return False
    manifest = json.loads(manifest.read_text())
    if manifest["files"] is None:  # a foreign SeqIO task: nobody knows what it reads
        return False
    return (
        manifest["code"] == _code_hash(config.mixture_or_task_module)
        and manifest["vocabulary"] == vocabulary_lib.load(config.vocabulary).fingerprint
        and all(epath.Path(f).exists() and _sha256(f) == h for f, h in manifest["files"].items())
    )


def _build(folder: pathlib.Path, config: DataConfig, split: str) -> None:
    """Tokenises through SeqIO into a temporary folder beside `folder`, then renames it.

    That a mixture has no such split is cached too.
    """
    from distill import task  # imports SeqIO and TensorFlow

    task.bind(data_dir=config.data_dir, vocabulary=config.vocabulary)
    task.import_module(config.mixture_or_task_module)
    info = task.describe(config.mixture_or_task_name)
    lacking = [m.name for m in info.members if split not in task.lookup(m.name).splits]
    files = [] if lacking else info.files(split)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = pathlib.Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        members, digest = [], hashlib.sha256()
        for number, member in enumerate(() if lacking else info.members):
            _require_vocabulary(task.lookup(member.name), config)
            rows = list(task.tokenized_rows(member.name, split))
            arrays = {
                "loss_groups": np.asarray([r["loss_group"] for r in rows], np.int32),
                **_flat("inputs", rows),
                **_flat("targets", rows),
            }
            texts = {
                "example_ids": [r["example_id"] for r in rows],
                "labels": [r["label"] for r in rows],
                "texts": [r["inputs_pretokenized"] for r in rows],
            }
            np.savez(new / f"{number}.npz", **arrays)
            (new / f"{number}.json").write_text(json.dumps(texts))
            for name in sorted(arrays):
                digest.update(np.ascontiguousarray(arrays[name]).tobytes())
            digest.update(json.dumps([member.name, member.rate, texts]).encode())
            members.append({"name": member.name, "rate": member.rate, "metrics": member.metrics})
        manifest = {
            "mixture": config.mixture_or_task_name,
            "split": split,
            "lacking": lacking,
            "members": members,
            "code": _code_hash(config.mixture_or_task_module),
            "vocabulary": vocabulary_lib.load(config.vocabulary).fingerprint,
            "files": None if files is None else {str(f): _sha256(f) for f in files},
            "fingerprint": digest.hexdigest(),
        }
        (new / "manifest.json").write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        try:
            new.rename(folder)
        except OSError:
            if not _is_fresh(folder, config):  # else another run has just built the same
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _require_vocabulary(provider, config: DataConfig) -> None:
    """A task from elsewhere brings its own vocabulary; it must be the student's."""
    bound = vocabulary_lib.load(config.vocabulary).as_seqio()
    for key in ("inputs", "targets"):
        own = provider.output_features[key].vocabulary
        if own != bound:
            raise ValueError(
                f"{provider.name} tokenises its {key} with {own}, but VOCABULARY is "
                f"{config.vocabulary!r} ({bound}): set --gin.VOCABULARY to the task's own."
            )


def _flat(feature: str, rows: list[dict]) -> dict[str, np.ndarray]:
    ragged = Ragged.of([row[feature] for row in rows])
    return {feature: ragged.values, f"{feature}_offsets": ragged.offsets}


def _read(folder: pathlib.Path) -> Corpus:
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest["lacking"]:
        raise NoSplitError(f"{', '.join(manifest['lacking'])}: no split {manifest['split']!r}.")
    tasks = []
    for number, member in enumerate(manifest["members"]):
        with np.load(folder / f"{number}.npz") as arrays:
            tasks.append(
                TaskRows(
                    name=member["name"],
                    rate=member["rate"],
                    metrics=tuple(member["metrics"]),
                    inputs=Ragged(arrays["inputs"], arrays["inputs_offsets"]),
                    targets=Ragged(arrays["targets"], arrays["targets_offsets"]),
                    loss_groups=arrays["loss_groups"],
                    **json.loads((folder / f"{number}.json").read_text()),
                )
            )
    return Corpus(manifest["mixture"], manifest["split"], tasks, manifest["fingerprint"])


# --- The plan: which sequence lies in which row of which batch ------------------------------------


@dataclasses.dataclass(frozen=True)
class Position:
    """The next batch of a run; what a checkpoint keeps of the data."""

    epoch: int
    batch: int


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's data.

    Attributes:
      arrays: T5X's batch keys and `decoder_loss_groups`, int32 [rows, length].
      examples: pairs in the (global) batch.
      tokens: real tokens, inputs and targets together, in the (global) batch.
      next: where the run goes on after this batch.
    """

    arrays: dict[str, np.ndarray]
    examples: int
    tokens: int
    next: Position


@dataclasses.dataclass(frozen=True)
class Plan:
    """The batches of one epoch.

    Attributes:
      batches: for each batch its rows, for each row the sequences in it (indices).
      examples: pairs of each batch.
      rows: rows of every batch; batches with fewer are filled up with empty ones.
    """

    batches: list[list[list[int]]]
    examples: list[int]
    rows: int


def pack_rows(
    pairs: list[np.ndarray], lengths: np.ndarray, capacity: np.ndarray, max_rows: int | None
) -> tuple[list[list[int]], list[int]]:
    """Packs pairs into rows, each sequence into the fullest row that still has room for it.

    A pair goes in whole or not at all.

    Args:
      pairs: the sequence indices of each pair, in the order of preference.
      lengths: int [n, 2], input and target tokens of each sequence.
      capacity: int [2], input and target tokens that a row holds.
      max_rows: None = open as many rows as needed.

    Returns:
      (sequences of each row, indices of the pairs that were left out because nothing held them or
      because LOOKAHEAD pairs before them had not fitted).
    """
    free = np.zeros((0 if max_rows is None else max_rows, 2), np.int64) + capacity
    rows: list[list[int]] = [[] for _ in free]
    left_out: list[int] = []
    for number, pair in enumerate(pairs):
        if len(left_out) >= LOOKAHEAD:
            left_out += range(number, len(pairs))
            break
        placed: list[tuple[int, int]] = []
        for sequence in pair:
            need = lengths[sequence]
            fits = (free >= need).all(axis=1)
            if fits.any():
                slack = ((free - need) / capacity).sum(axis=1)
                row = int(np.argmin(np.where(fits, slack, np.inf)))
            elif max_rows is None:
                row = len(rows)
                rows.append([])
                free = np.concatenate([free, capacity[None]])
            else:
                break
            free[row] -= need
            rows[row].append(int(sequence))
            placed.append((row, int(sequence)))
        if len(placed) < len(pair):
            for row, sequence in placed:
                rows[row].remove(sequence)
                free[row] += lengths[sequence]
            left_out.append(number)
    return rows, left_out


class TrainBatches:
    """The packed batches of a corpus.

    Attributes:
      config: see `DataConfig`.
      capacity: tokens of inputs and targets in a row, `{"inputs": ..., "targets": ...}`.
      num_pairs: examples of an epoch.
      num_sequences: sequences of an epoch; a pair has two.
      truncated: sequences cut to fit, `{"inputs": ..., "targets": ...}`.
    """

    def __init__(self, corpus: Corpus, config: DataConfig, row_multiple: int = 1):
        """Prepares the plan of `corpus`.

        Args:
          corpus: from `load`.
          config: see `DataConfig`.
          row_multiple: the rows of a batch are a multiple of this (shards x micro-batches).

        Raises:
          ValueError: no rows; BATCH_SIZE is no multiple of row_multiple; a pair that can never fit.
        """
        self.config, self.row_multiple = config, row_multiple
        if not any(map(len, corpus.tasks)):
            raise ValueError(f"{corpus.name!r} has no rows in split {corpus.split!r}.")
        if config.pairs_per_step is None and config.batch_size % row_multiple:
            raise ValueError(
                f"BATCH_SIZE={config.batch_size} rows do not divide by {row_multiple} (data and "
                "fsdp devices x micro-batches). Choose a multiple, or set PAIRS_PER_STEP."
            )
        self._tasks = corpus.tasks
        # Sequences are numbered through all tasks; task and row of each:
        self._task_of = np.repeat(np.arange(len(corpus.tasks)), [len(t) for t in corpus.tasks])
        self._row_of = np.concatenate([np.arange(len(t)) for t in corpus.tasks])
        full = np.stack(
            [
                np.concatenate([getattr(t, feature).lengths for t in corpus.tasks])
                for feature in ("inputs", "targets")
            ],
            axis=1,
        )
        self.capacity = dict(config.feature_lengths or choose_lengths(full))
        self._capacity = np.array([self.capacity["inputs"], self.capacity["targets"]])
        limit = np.minimum(self._capacity, list(MAX_LENGTHS.values()))
        if config.feature_lengths is not None:
            limit = self._capacity
        self._lengths = np.minimum(full, limit)
        cut = (full > self._lengths).sum(axis=0)
        self.truncated = {"inputs": int(cut[0]), "targets": int(cut[1])}
        self._pairs = self._subset(corpus)
        self.num_pairs = len(self._pairs)
        self.num_sequences = sum(map(len, self._pairs))
        if config.pairs_per_step is None:
            room = config.batch_size * self._capacity
            largest = max(len(p) for p in self._pairs)
            if largest > config.batch_size:  # every sequence alone fits a row
                raise ValueError(
                    f"An example has {largest} sequences (up to {room.tolist()} tokens a batch), "
                    f"but BATCH_SIZE is {config.batch_size} rows. Set it to {largest} or more."
                )

    def _subset(self, corpus: Corpus) -> list[np.ndarray]:
        """The pairs of the corpus, or of the random subset that NUM_TRAIN_EXAMPLES asks for."""
        by_example: dict[str, list[int]] = collections.defaultdict(list)
        rates: dict[str, float] = {}
        ids = (i for task in corpus.tasks for i in task.example_ids)
        for sequence, example in enumerate(ids):
            by_example[example].append(sequence)
            rates[example] = corpus.tasks[self._task_of[sequence]].rate
        if len(set(rates.values())) > 1:
            raise ValueError(
                f"The members of mixture {corpus.name!r} have different rates "
                f"{sorted(set(rates.values()))}; training takes every example once per epoch, so "
                "give all members one rate."
            )
        pairs = [np.array(sequences) for sequences in by_example.values()]
        wanted = self.config.num_train_examples
        if wanted is None:
            return pairs
        if wanted > len(pairs):
            raise ValueError(
                f"NUM_TRAIN_EXAMPLES={wanted}, but {corpus.name!r} has {len(pairs)} examples."
            )
        chosen = np.random.default_rng([self.config.seed, 1]).permutation(len(pairs))[:wanted]
        return [pairs[i] for i in chosen]

    def fingerprint(self, corpus: Corpus) -> dict[str, object]:
        """What decides the batches, by name; a resumed run must find the same."""
        config = self.config
        by_pairs = config.pairs_per_step is not None
        return {
            "mixture": config.mixture_or_task_name,
            "rows": corpus.fingerprint,
            "vocabulary": vocabulary_lib.load(config.vocabulary).fingerprint,
            "lengths": self.capacity,
            "pairs_per_step" if by_pairs else "batch_size": config.pairs_per_step
            or config.batch_size,
            "num_train_examples": config.num_train_examples,
            "seed": config.seed,
        }

    @functools.lru_cache(maxsize=2)  # noqa: B019 - one object a run; consecutive epochs only
    def plan(self, epoch: int, shuffle: bool = True) -> Plan:
        """The batches of an epoch.

        Training (`shuffle`) sees every example at least once; the last batch is filled up with the
        epoch's first examples, so that all steps are of one size. Without shuffling every example
        comes exactly once.
        """
        pairs = self._pairs
        if shuffle:
            order = np.random.default_rng([self.config.seed, 0, epoch]).permutation(len(pairs))
            pairs = [pairs[i] for i in order]
        make = self._fill_rows if self.config.pairs_per_step is None else self._fill_pairs
        batches, examples = make(pairs, wrap=shuffle)
        rows = max(map(len, batches))
        # Coarse steps, so that epochs of slightly different need share one compiled program.
        step = max(1, rows // 16) if self.config.pairs_per_step else 1
        step = -(-step // self.row_multiple) * self.row_multiple
        return Plan(batches, examples, rows=-(-rows // step) * step)

    def _fill_pairs(self, pairs, wrap: bool):
        """PAIRS_PER_STEP examples a batch, in as few rows as they pack into."""
        per_step = self.config.pairs_per_step
        batches, examples = [], []
        for start in range(0, len(pairs), per_step):
            chosen = pairs[start : start + per_step]
            while wrap and len(chosen) < per_step:
                chosen = chosen + pairs[: per_step - len(chosen)]
            # The longest first leaves the fewest holes; each sequence is a "pair" of its own here,
            # since rows are opened until everything is in.
            sequences = np.concatenate(chosen)
            order = np.argsort(-self._lengths[sequences].sum(axis=1), kind="stable")
            rows, _ = pack_rows(
                [sequences[i : i + 1] for i in order], self._lengths, self._capacity, None
            )
            batches.append(rows)
            examples.append(len(chosen))
        return batches, examples

    def _fill_rows(self, pairs, wrap: bool):
        """BATCH_SIZE rows a batch, with as many pairs as fit; the others lead the next batch."""
        size, waiting, used = self.config.batch_size, [], 0
        # More cannot fit, even if all sequences were as short as the shortest.
        most = int(size * self._capacity.sum() // self._lengths.sum(axis=1).min()) + LOOKAHEAD
        batches, examples = [], []
        while waiting or used < len(pairs):
            candidates = waiting + pairs[used : used + most - len(waiting)]
            used = min(len(pairs), used + most - len(waiting))
            fresh = len(candidates)
            if wrap and used == len(pairs):  # the last batches: fill up with the first examples
                while len(candidates) < most:
                    candidates = candidates + pairs[: most - len(candidates)]
            rows, left_out = pack_rows(candidates, self._lengths, self._capacity, size)
            batches.append(rows)
            examples.append(len(candidates) - len(left_out))
            waiting = [candidates[i] for i in left_out if i < fresh]
        return batches, examples

    def iterate(
        self,
        start: Position,
        *,
        shuffle: bool = True,
        epochs: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[Batch]:
        """Batches from `start` on; `arrays` hold this process's rows only.

        Args:
          start: the first batch.
          shuffle: see `plan`.
          epochs: None = for ever.
          process_index: of this host.
          process_count: hosts; each gets an equal, consecutive share of the rows.
        """
        import grain  # here, so that what runs on an accelerator needs no data library

        epoch, first = start.epoch, start.batch
        while epochs is None or epoch < start.epoch + epochs:
            plan = self.plan(epoch, shuffle)
            source = _EpochSource(self, plan, epoch, process_index, process_count)
            # Reads ahead while the device works.
            options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
            if first < len(source):
                yield from grain.MapDataset.source(source)[first:].to_iter_dataset(options)
            epoch, first = epoch + 1, 0

    def assemble(self, rows: list[list[int]]) -> dict[str, np.ndarray]:
        """The arrays of packed rows, int32 [len(rows), capacity]."""
        inputs, targets = self.capacity["inputs"], self.capacity["targets"]
        encoder = ("encoder_input_tokens", "encoder_segment_ids")
        decoder = (
            "decoder_input_tokens", "decoder_target_tokens", "decoder_segment_ids",
            "decoder_loss_weights", "decoder_loss_groups",
        )  # fmt: skip
        arrays = {name: np.zeros((len(rows), inputs), np.int32) for name in encoder}
        arrays |= {name: np.zeros((len(rows), targets), np.int32) for name in decoder}
        for r, row in enumerate(rows):
            i = t = 0
            for segment, sequence in enumerate(row, start=1):
                task, index = self._tasks[self._task_of[sequence]], self._row_of[sequence]
                n_in, n_out = self._lengths[sequence]
                source = truncate(task.inputs[index], n_in)
                target = truncate(task.targets[index], n_out)
                arrays["encoder_input_tokens"][r, i : i + n_in] = source
                arrays["encoder_segment_ids"][r, i : i + n_in] = segment
                # Shifted right within the sequence; the start token is the padding id 0.
                arrays["decoder_input_tokens"][r, t + 1 : t + n_out] = target[:-1]
                arrays["decoder_target_tokens"][r, t : t + n_out] = target
                arrays["decoder_segment_ids"][r, t : t + n_out] = segment
                arrays["decoder_loss_weights"][r, t : t + n_out] = 1
                arrays["decoder_loss_groups"][r, t : t + n_out] = task.loss_groups[index]
                i, t = i + n_in, t + n_out
        return arrays

    def tokens(self, rows: list[list[int]]) -> int:
        """Real tokens of packed rows, inputs and targets together."""
        return int(sum(self._lengths[s].sum() for row in rows for s in row))


class _EpochSource:
    """Random access to the batches of one epoch, for Grain."""

    def __init__(self, batches: TrainBatches, plan: Plan, epoch: int, index: int, count: int):
        if plan.rows % count:
            raise ValueError(f"{plan.rows} rows do not divide by {count} processes.")
        self._batches, self._plan, self._epoch = batches, plan, epoch
        share = plan.rows // count
        self._mine = slice(index * share, (index + 1) * share)

    def __len__(self) -> int:
        return len(self._plan.batches)

    def __getitem__(self, i: int) -> Batch:
        rows = self._plan.batches[i]
        padded = rows + [[]] * (self._plan.rows - len(rows))
        last = i + 1 == len(self)
        return Batch(
            arrays=self._batches.assemble(padded[self._mine]),
            examples=self._plan.examples[i],
            tokens=self._batches.tokens(rows),
            next=Position(self._epoch + 1, 0) if last else Position(self._epoch, i + 1),
        )


def truncate(tokens: np.ndarray, length: int) -> np.ndarray:
    """The first tokens of a sequence; where it is cut, its last token (EOS) ends it."""
    if len(tokens) <= length:
        return tokens
    return np.append(tokens[: length - 1], tokens[-1])


def choose_lengths(lengths: np.ndarray) -> dict[str, int]:
    """Row lengths that suit the data: about four sequences a row, and as much room for targets.

    Longer rows waste attention over other sequences, shorter ones leave holes. The targets get the
    share that they have of the data, because one fixed pair of lengths fits no two datasets.

    Args:
      lengths: int [n, 2], input and target tokens of each sequence.

    Returns:
      `{"inputs": ..., "targets": ...}`, multiples of 32.
    """
    cut = np.minimum(lengths, list(MAX_LENGTHS.values()))
    mean, longest = cut.mean(axis=0), cut.max(axis=0)

    def up(tokens: float) -> int:
        return max(32, int(-(-tokens // 32)) * 32)

    inputs = up(max(4 * mean[0], longest[0]))
    targets = up(max(inputs * mean[1] / mean[0], longest[1]))
    return {"inputs": inputs, "targets": targets}


if __name__ == "__main__":
    sys.exit(_build_all(sys.argv[1]))
