"""Tokenised rows -> deterministic, packed batches.

    corpus = cache.load(config, "train")               # tokenised rows, see cache.py
    batches = TrainBatches(corpus, config, flops)      # what a batch holds, as a pure plan
    for batch in batches.iterate(Position()):          # numpy arrays under T5X's batch keys
        ...

The sequences that share an `example_id` (the `predict` and the `explain` sequence of an example)
are one *pair*: they are always in the same batch, as in Hsieh et al. 2023, though not necessarily
in the same packed row.

An epoch is shuffled as a whole and cut into shards of at most 65,536 pairs. A plan (which sequence
lies in which row of which batch) is made for one shard at a time, from the lengths alone, while the
shard before it is trained on; it is a pure function of (rows, config, epoch, shard). To resume is
to name an epoch, a shard and a batch, on any number of hosts; each host reads only its own rows.
"""

import concurrent.futures
import copy
import dataclasses
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import flags

from distill import cache, packing, sources
from distill import vocabulary as vocabulary_lib

# Where the lengths come from the data, longer sequences are still cut here: the published limits.
MAX_LENGTHS = {"inputs": 1024, "targets": 256}
SHARD_PAIRS = 1 << 16
# Pairs on which row lengths are tried.
SAMPLE_PAIRS = 4096
# Changes when the same rows and configuration give other batches than before.
PLAN_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class DataConfig(cache.RowsConfig):
    """What to train on and how to batch it.

    Attributes:
      mixture_or_task_name: this and the others of `cache.RowsConfig` say what to read.
      feature_lengths: tokens per packed row, `{"inputs": ..., "targets": ...}`; longer sequences
        are cut, EOS kept. None = those that waste least on this data and model.
      row_budget: tokens, inputs and targets together, that a row may have where the lengths are
        chosen.
      batch_size: packed rows per step, as in T5X.
      pairs_per_step: examples per step instead, in as many rows as they need.
      train_fraction: train on this fraction of the dataset's examples, in (0, 1]; drawn by the
        seed, the same for every method, and a smaller one lies within a larger one.
      num_train_examples: the same as a number.
      seed: of the order of the examples.
      loader_processes: processes that assemble batches; 0 = threads of this one, which is enough
        for one or two million tokens a second (docs/performance.md).
    """

    feature_lengths: Mapping[str, int] | None = None
    row_budget: int = 1024
    batch_size: int | None = 128
    pairs_per_step: int | None = None
    train_fraction: float | None = None
    num_train_examples: int | None = None
    seed: int = 0
    loader_processes: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.batch_size is None and self.pairs_per_step is None:
            raise ValueError("Set BATCH_SIZE (packed rows) or PAIRS_PER_STEP (examples).")
        for field in ("batch_size", "pairs_per_step", "num_train_examples", "row_budget"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"DataConfig.{field} must be a positive integer, not {value!r}.")
        if not isinstance(self.loader_processes, int) or self.loader_processes < 0:
            raise ValueError(
                f"DataConfig.loader_processes must be an integer >= 0, not "
                f"{self.loader_processes!r}."
            )
        if self.train_fraction is not None:
            if not 0 < self.train_fraction <= 1:
                raise ValueError(f"TRAIN_FRACTION must be in (0, 1], not {self.train_fraction!r}.")
            if self.num_train_examples is not None:
                raise ValueError("Set TRAIN_FRACTION or NUM_TRAIN_EXAMPLES, not both.")
        if self.feature_lengths is not None:
            lengths = dict(self.feature_lengths)
            if set(lengths) != {"inputs", "targets"} or min(lengths.values()) < 2:
                raise ValueError(
                    "TASK_FEATURE_LENGTHS must be {'inputs': n, 'targets': m} with lengths of at "
                    f"least 2 tokens, not {lengths!r}."
                )


@dataclasses.dataclass(frozen=True)
class Position:
    """The next batch of a run; what a checkpoint keeps of the data."""

    epoch: int = 0
    batch: int = 0
    shard: int = 0


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's data.

    Attributes:
      arrays: T5X's batch keys, `decoder_loss_groups`, where rows have weights
        `decoder_example_weights`, and on demand `decoder_pair_ids`, int32 [rows, length]; this
        process's rows.
      examples: pairs in the (global) batch.
      tokens: real tokens, inputs and targets together, in the (global) batch.
      sequences: numbers of the (global) batch's sequences, see `TrainBatches.example_ids`.
      next: where the run goes on after this batch.
    """

    arrays: dict[str, np.ndarray]
    examples: int
    tokens: int
    sequences: np.ndarray
    next: Position


@dataclasses.dataclass(frozen=True)
class Plan:
    """The batches of one shard of an epoch.

    Attributes:
      sequences: in the order of batches, rows, and places in the row, int [n].
      pair_ids: the pair of each of them, counted from 1 in its batch, int32 [n].
      offsets: where each row begins in `sequences`, int [batches * rows + 1].
      examples: pairs of each batch, int [batches].
      tokens: real tokens of each batch, int [batches].
      rows: rows of every batch; where a batch needs fewer, the last are empty.
    """

    sequences: np.ndarray
    pair_ids: np.ndarray
    offsets: np.ndarray
    examples: np.ndarray
    tokens: np.ndarray
    rows: int

    def __len__(self) -> int:
        return len(self.examples)

    def slice(self, batch: int, first: int, count: int) -> tuple[np.ndarray, ...]:
        """(sequences, offsets into them, pair ids) of `count` rows of a batch from `first` on."""
        start = batch * self.rows + first
        offsets = self.offsets[start : start + count + 1]
        part = slice(offsets[0], offsets[-1])
        return self.sequences[part], offsets - offsets[0], self.pair_ids[part]


class TrainBatches:
    """The packed batches of a corpus.

    Attributes:
      config: see `DataConfig`.
      capacity: tokens of inputs and targets in a row, `{"inputs": ..., "targets": ...}`.
      num_pairs: examples to train on.
      num_sequences: their sequences; a pair has two.
      pairs_per_epoch: examples drawn per epoch; with mixing rates not the same number.
      truncated: sequences cut to fit, `{"inputs": ..., "targets": ...}`.
      row_multiple: the rows of a batch are a multiple of this (shards x micro-batches).
      with_pair_ids: batches say which tokens belong to one pair.
    """

    def __init__(
        self,
        corpus: cache.Corpus,
        config: DataConfig,
        flops: packing.Flops = packing.T5_BASE,
        row_multiple: int = 1,
        with_pair_ids: bool = False,
    ):
        """Prepares the plan of `corpus`.

        Args:
          corpus: from `cache.load`.
          config: see `DataConfig`.
          flops: of the student, for which row lengths are chosen.
          row_multiple: the rows of a batch are a multiple of this.
          with_pair_ids: whether `decoder_pair_ids` are wanted (`Objective.needs_pairs`).

        Raises:
          ValueError: no rows; mixing rates that split a pair; BATCH_SIZE is no multiple of
            row_multiple; a pair that can never fit.
        """
        self.config, self.corpus, self.with_pair_ids = config, corpus, with_pair_ids
        if not any(map(len, corpus.tasks)):
            raise ValueError(f"{corpus.name!r} has no rows in split {corpus.split!r}.")
        # Sequences are numbered through all tasks.
        tasks = corpus.tasks
        self._first = np.cumsum([0, *map(len, tasks)])
        self._weighted = any((t.weights != sources.FULL_WEIGHT).any() for t in tasks)
        self._find_pairs()
        self._full = np.concatenate([t.lengths for t in tasks])
        self.capacity = dict(config.feature_lengths or self._choose_lengths(flops))
        self._capacity = np.array([self.capacity["inputs"], self.capacity["targets"]])
        limit = self._capacity
        if config.feature_lengths is None:
            limit = np.minimum(limit, list(MAX_LENGTHS.values()))
        self._lengths = np.minimum(self._full, limit)
        cut = (self._full > self._lengths).sum(axis=0)
        self.truncated = {"inputs": int(cut[0]), "targets": int(cut[1])}
        members = self._slots.shape[1]
        if config.pairs_per_step is None and members > config.batch_size:
            raise ValueError(  # every sequence alone fits a row
                f"An example has {members} sequences, but BATCH_SIZE is {config.batch_size} rows. "
                f"Set it to {members} or more."
            )
        self._order: tuple[int, np.ndarray] | None = None
        self._last_plan: tuple[tuple, Plan] | None = None
        self._require_multiple(row_multiple)
        self.row_multiple = row_multiple

    def with_row_multiple(self, row_multiple: int) -> "TrainBatches":
        """The same with another `row_multiple`."""
        self._require_multiple(row_multiple)
        other = copy.copy(self)
        other.row_multiple, other._last_plan = row_multiple, None
        return other

    def _require_multiple(self, row_multiple: int) -> None:
        rows = self.config.batch_size
        if self.config.pairs_per_step is None and rows % row_multiple:
            less = rows // row_multiple * row_multiple
            fits = f"{less} or {less + row_multiple}" if less else f"{row_multiple}"
            raise ValueError(
                f"BATCH_SIZE={rows} rows do not divide by {row_multiple} (data and fsdp devices x "
                f"micro-batches): {fits} would do, or set PAIRS_PER_STEP."
            )

    # --- Pairs

    def _find_pairs(self) -> None:
        """Sorts the sequences into pairs, their members (slots), and the choices of each member."""
        tasks = self.corpus.tasks
        kept = np.concatenate([self._kept(task) for task in tasks])
        if not kept.any():
            raise ValueError(
                f"{self.corpus.name!r} has no rows left: raise TRAIN_FRACTION or "
                "NUM_TRAIN_EXAMPLES."
            )
        sequences = np.flatnonzero(kept)
        task_of = np.repeat(np.arange(len(tasks)), [len(t) for t in tasks])[kept]
        pair = self.corpus.pairs[kept]
        if not kept.all():  # number those that are left
            pair = (np.cumsum(np.bincount(pair) > 0) - 1)[pair]
        # Stable: by pair, then by task, then in the order of the rows.
        order = np.argsort(pair, kind="stable")
        pair, task_of = pair[order], task_of[order]
        self._ordered = sequences[order]
        starts = np.flatnonzero(
            np.r_[True, (pair[1:] != pair[:-1]) | (task_of[1:] != task_of[:-1])]
        )
        self._slot_start = starts
        self._slot_count = np.diff(np.r_[starts, len(pair)])
        of_pair = pair[starts]
        place = np.arange(len(starts)) - np.searchsorted(of_pair, of_pair)
        self._slots = np.full((pair[-1] + 1, place.max() + 1), -1)
        self._slots[of_pair, place] = np.arange(len(starts))
        self.num_pairs, self.num_sequences = len(self._slots), len(starts)
        self._groups = self._mixing(pair, task_of)
        self.pairs_per_epoch = sum(drawn for _, drawn in self._groups)

    def _kept(self, task: cache.TaskRows) -> np.ndarray:
        """Which rows of a task belong to the subset of the examples to train on, bool [n]."""
        fraction, number = self.config.train_fraction, self.config.num_train_examples
        if fraction is None and number is None:
            return np.ones(len(task), bool)
        size = len(task.population)
        if number is None:
            number = math.ceil(round(fraction * size, 6))  # 0.07 x 100 is a little more than 7
        elif len({t.dataset or t.name for t in self.corpus.tasks}) > 1:
            raise ValueError(
                f"NUM_TRAIN_EXAMPLES is for one dataset, and {self.corpus.name!r} has several: set "
                "TRAIN_FRACTION."
            )
        if number > size:
            raise ValueError(
                f"NUM_TRAIN_EXAMPLES={number}, but {self.corpus.name!r} has {size} examples."
            )
        chosen = task.population[subsets(task.population, self.config.seed) < number]
        return np.isin(task.keys, chosen)

    def _mixing(self, pair: np.ndarray, task_of: np.ndarray) -> list[tuple[np.ndarray, int]]:
        """(pairs, how many to draw per epoch) of each part of the mixture with a rate of its own.

        Tasks that share examples are one part. As in SeqIO, a rate is a part's share of what is
        drawn. An epoch draws as many examples as there are, so rates by size draw each about once.
        """
        tasks = self.corpus.tasks
        part = np.arange(len(tasks))
        # Sorted by pair: the first task of each stands for all tasks that the pair has.
        leader = task_of[np.flatnonzero(np.r_[True, pair[1:] != pair[:-1]])]
        links = np.bincount(leader[pair] * len(tasks) + task_of)
        for a, b in zip(*np.divmod(np.flatnonzero(links), len(tasks)), strict=True):
            part[part == part[b]] = part[a]
        groups = []
        of_pair = part[leader]
        for p in np.unique(of_pair):
            members = [t for t, q in zip(tasks, part, strict=True) if q == p]
            rates = {t.rate for t in members}
            if len(rates) > 1:
                raise ValueError(
                    f"The tasks {', '.join(t.name for t in members)} of {self.corpus.name!r} share "
                    f"their examples but have different rates {sorted(rates)}. Give them one rate; "
                    "ALPHA weighs labels against rationales."
                )
            if (rate := rates.pop()) > 0:
                groups.append((np.flatnonzero(of_pair == p), rate))
        if not groups:
            raise ValueError(f"All members of {self.corpus.name!r} have the mixing rate 0.")
        total = sum(rate for _, rate in groups)
        drawn = [max(1, round(self.num_pairs * rate / total)) for _, rate in groups]
        return [(pairs, n) for (pairs, _), n in zip(groups, drawn, strict=True)]

    def _epoch_order(self, epoch: int, shuffle: bool) -> np.ndarray:
        """The pairs of an epoch, in order; kept, since every shard needs it."""
        if not shuffle:
            return np.arange(self.num_pairs)
        kept = self._order
        if kept is None or kept[0] != epoch:
            kept = self._order = epoch, self._shuffled(epoch)
        return kept[1]

    def _shuffled(self, epoch: int) -> np.ndarray:
        """What an epoch draws. A part that is drawn from again and again is drawn from in whole
        passes, so that its examples are seen equally often."""
        seed, drawn = self.config.seed, []
        for number, (pairs, wanted) in enumerate(self._groups):
            first, size = epoch * wanted, len(pairs)
            passes = range(first // size, (first + wanted - 1) // size + 1)
            orders = [np.random.default_rng([seed, number, p]).permutation(size) for p in passes]
            start = first - passes.start * size
            drawn.append(pairs[np.concatenate(orders)[start : start + wanted]])
        if len(drawn) == 1:
            return drawn[0]
        rng = np.random.default_rng([seed, 1 << 20, epoch])
        return rng.permutation(np.concatenate(drawn))

    def _members(self, pairs: np.ndarray, epoch: int) -> np.ndarray:
        """The sequences of pairs, int [n, members], -1 where there is none.

        Of several rationales to an input, one is drawn for each epoch.
        """
        slots = self._slots[pairs]
        place = self._slot_start[slots]
        if (self._slot_count > 1).any():
            rng = np.random.default_rng([self.config.seed, (1 << 20) + 1, epoch])
            drawn = (rng.random(len(self._slot_count)) * self._slot_count).astype(np.int64)
            place = place + drawn[slots]
        return np.where(slots >= 0, self._ordered[place], -1)

    def _member_lengths(self, members: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return np.where((members >= 0)[..., None], lengths[members], 0)

    def pair_lengths(self, pairs: np.ndarray, epoch: int = 0) -> np.ndarray:
        """Tokens of pairs, cut to the published limits, int [n, members, 2]; 0 where no member."""
        cut = np.minimum(self._full, list(MAX_LENGTHS.values()))
        return self._member_lengths(self._members(pairs, epoch), cut)

    def proposals(self, flops: packing.Flops) -> list[packing.Proposal]:
        """Row lengths for a model, the best first; see `packing.propose_lengths`."""
        # Not by the seed: runs that differ in nothing else share one compiled program.
        order = np.random.default_rng(0).permutation(self.num_pairs)[:SAMPLE_PAIRS]
        return packing.propose_lengths(
            self.pair_lengths(order),
            flops,
            rows=self.config.batch_size,
            pairs=self.config.pairs_per_step,
            row_budget=self.config.row_budget,
        )

    def _choose_lengths(self, flops: packing.Flops) -> dict[str, int]:
        best = self.proposals(flops)[0]
        return {"inputs": best.inputs, "targets": best.targets}

    def fingerprint(self) -> dict[str, object]:
        """What decides the batches, by name; a resumed run must find the same."""
        config = self.config
        by_pairs = config.pairs_per_step is not None
        return {
            "mixture": config.mixture_or_task_name,
            "rows": self.corpus.fingerprint,
            "vocabulary": vocabulary_lib.load(config.vocabulary).fingerprint,
            "lengths": self.capacity,
            "pairs_per_step" if by_pairs else "batch_size": config.pairs_per_step
            or config.batch_size,
            "train_fraction": config.train_fraction,
            "num_train_examples": config.num_train_examples,
            "seed": config.seed,
            "plan": PLAN_FORMAT,
        }

    def example_ids(self, sequences: np.ndarray) -> list[str]:
        """The example ids of sequences by their numbers, read from the cache."""
        return [record.example_id for record in self._read(sequences, texts=True)]

    # --- Plans

    @property
    def num_shards(self) -> int:
        """Shards of an epoch."""
        return -(-self.pairs_per_epoch // SHARD_PAIRS)

    def plan(self, epoch: int, shard: int = 0, shuffle: bool = True) -> Plan:
        """The batches of a shard of an epoch.

        Training (`shuffle`) sees every example of the shard at least once; its last batch is filled
        up with the first examples, so that all steps are of one size. Without shuffling every
        example comes exactly once.

        The last plan is kept: a run asks for its first one several times, and every evaluation for
        the same.
        """
        key, kept = (epoch, shard, shuffle), self._last_plan
        if kept is None or kept[0] != key:
            kept = self._last_plan = key, self._make_plan(*key)
        return kept[1]

    def _make_plan(self, epoch: int, shard: int, shuffle: bool) -> Plan:
        order = self._epoch_order(epoch, shuffle)
        bounds = np.linspace(0, len(order), self.num_shards + 1).astype(int)
        members = self._members(order[bounds[shard] : bounds[shard + 1]], epoch)
        lengths = self._member_lengths(members, self._lengths)
        if self.config.pairs_per_step is not None:
            units = packing.fill_pairs(
                lengths, self._capacity, self.config.pairs_per_step, wrap=shuffle
            )
            rows, per_batch = packing.rows_for(units, self.row_multiple), 1
        else:
            rows = self.config.batch_size
            # In units of 64 to 128 rows where the batch divides into such, else as a whole.
            sizes = range(2, rows // (packing.UNIT_ROWS // 2) + 1)
            fits = (k for k in sizes if rows % k == 0 and rows // k <= packing.UNIT_ROWS)
            per_batch = 1 if rows <= packing.UNIT_ROWS else next(fits, 1)
            units = packing.fill_rows(
                lengths, self._capacity, rows // per_batch, wrap=shuffle, multiple=per_batch
            )
        pairs = np.concatenate([unit.pairs for unit in units])
        unit_of = np.repeat(np.arange(len(units)), [len(unit.pairs) for unit in units])
        row = np.concatenate([unit.rows for unit in units])
        there = row >= 0
        batches = -(-len(units) // per_batch)
        examples = np.bincount(unit_of // per_batch, minlength=batches)
        # By place, not by pair: a small dataset fills a batch with copies, each a pair of its own.
        first = np.cumsum(examples) - examples
        ids = np.arange(len(pairs)) - np.repeat(first, examples) + 1
        ids = np.repeat(ids, there.sum(axis=1)).astype(np.int32)
        # A unit is rows // per_batch rows of its batch.
        row = (unit_of * (rows // per_batch))[:, None] + row
        sequences, row = members[pairs][there], row[there]
        order = np.argsort(row, kind="stable")
        sequences, row, ids = sequences[order], row[order], ids[order]
        tokens = self._lengths[sequences].sum(axis=1)
        return Plan(
            sequences=sequences,
            pair_ids=ids,
            offsets=np.searchsorted(row, np.arange(batches * rows + 1)),
            examples=examples,
            tokens=np.bincount(row // rows, tokens, minlength=batches).astype(np.int64),
            rows=rows,
        )

    @property
    def max_pairs(self) -> int:
        """Pairs that no batch of any epoch exceeds; with BATCH_SIZE as if all were the shortest."""
        config = self.config
        if config.pairs_per_step is not None:
            return config.pairs_per_step
        shortest = np.minimum.reduceat(self._lengths[self._ordered], self._slot_start)  # of choices
        there = (self._slots >= 0)[..., None]
        lengths = np.where(there, shortest[self._slots], 0).sum(axis=1)
        room = config.batch_size * self._capacity
        times = np.zeros(len(lengths), int)  # of each pair in an epoch, by its mixing rate
        for pairs, drawn in self._groups:
            times[pairs] = -(-drawn // len(pairs))
        # Each unit of a batch may end with the first pairs again, several times if they are few.
        units = max(1, config.batch_size // (packing.UNIT_ROWS // 2))
        copies = int((room // (lengths * times[:, None]).sum(axis=0)).min()) + 2 * units
        repeated = np.repeat(lengths, times * copies, axis=0)
        used = np.cumsum(np.sort(repeated, axis=0), axis=0)
        return min(
            int(np.searchsorted(u, r, side="right")) for u, r in zip(used.T, room, strict=True)
        )

    def waste(self, plan: Plan, flops: packing.Flops) -> packing.Waste:
        """What the batches of a plan waste on a model."""
        return packing.Waste.of(
            self._lengths[plan.sequences], self._capacity, len(plan) * plan.rows, flops
        )

    # --- Batches

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

        source = _Stream(self, start, shuffle, epochs, process_index, process_count)
        # Reads ahead while the device works.
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
        stream = grain.MapDataset.source(source).to_iter_dataset(options)
        if self.config.loader_processes:
            if not flags.FLAGS.is_parsed():  # in a notebook or a test; Grain reads its flags
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self.config.loader_processes, per_worker_buffer_size=4
                )
            )
        yield from stream

    def assemble(
        self, sequences: np.ndarray, offsets: np.ndarray, pair_ids: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The arrays of packed rows.

        Args:
          sequences: numbers of the sequences, in the order of the rows.
          offsets: where each row begins in `sequences`, and the end, int [rows + 1].
          pair_ids: the pair of each sequence, from 1 on; used where `with_pair_ids`.

        Returns:
          int32 [rows, capacity] under T5X's batch keys.
        """
        rows = len(offsets) - 1
        row = np.repeat(np.arange(rows), np.diff(offsets))
        segment = np.arange(len(sequences)) - offsets[row] + 1
        read = self._read(sequences)
        arrays = {}
        for feature, side, prefix in ((0, "inputs", "encoder"), (1, "targets", "decoder")):
            length = self._lengths[sequences, feature]
            parts = [truncate(both[feature], n) for both, n in zip(read, length, strict=True)]
            tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
            start = np.cumsum(length) - length  # in `tokens`
            in_row = start - np.r_[start, 0][offsets[row]]
            width = self.capacity[side]
            place = np.repeat(row * width + in_row - start, length) + np.arange(len(tokens))

            def spread(values, place=place, width=width):
                array = np.zeros(rows * width, np.int32)
                array[place] = values
                return array.reshape(rows, width)

            arrays[f"{prefix}_segment_ids"] = spread(np.repeat(segment, length))
            if side == "inputs":
                arrays["encoder_input_tokens"] = spread(tokens)
                continue
            # Shifted right within the sequence; the start token is the padding id 0.
            shifted = np.r_[0, tokens[:-1]]
            shifted[start] = 0
            groups = self._column("loss_groups", sequences)
            arrays["decoder_input_tokens"] = spread(shifted)
            arrays["decoder_target_tokens"] = spread(tokens)
            arrays["decoder_loss_weights"] = spread(1)
            arrays["decoder_loss_groups"] = spread(np.repeat(groups, length))
            if self._weighted:
                weights = self._column("weights", sequences)
                arrays["decoder_example_weights"] = spread(np.repeat(weights, length))
            if self.with_pair_ids:
                arrays["decoder_pair_ids"] = spread(np.repeat(pair_ids, length))
        return arrays

    def _by_task(self, sequences: np.ndarray) -> Iterator[tuple[cache.TaskRows, np.ndarray, Any]]:
        """(task, places in `sequences`, row numbers in the task) of each task that occurs."""
        task_of = np.searchsorted(self._first, sequences, side="right") - 1
        for t in np.unique(task_of):
            places = np.flatnonzero(task_of == t)
            yield self.corpus.tasks[t], places, sequences[places] - self._first[t]

    def _read(self, sequences: np.ndarray, texts: bool = False) -> list[Any]:
        """The records (or only their tokens) of sequences, with one read per task."""
        found: list[Any] = [None] * len(sequences)
        for task, places, rows in self._by_task(sequences):
            records = task.read(rows) if texts else task.read_tokens(rows)
            for place, record in zip(places, records, strict=True):
                found[place] = record
        return found

    def _column(self, name: str, sequences: np.ndarray) -> np.ndarray:
        values = np.zeros(len(sequences), np.int32)
        for task, places, rows in self._by_task(sequences):
            values[places] = getattr(task, name)[rows]
        return values


class _Stream:
    """Random access to the batches of a run from a position on, for Grain."""

    def __init__(
        self,
        batches: TrainBatches,
        start: Position,
        shuffle: bool,
        epochs: int | None,
        process_index: int,
        process_count: int,
    ):
        self._batches, self._start, self._shuffle = batches, start, shuffle
        self._epochs, self._index, self._count = epochs, process_index, process_count
        if start.shard >= batches.num_shards:  # of other data, which had more of them
            self._start = start = Position(start.epoch + 1)
        self._last_epoch = None if epochs is None else start.epoch + epochs - 1
        # The number of the first batch of each shard that is known so far, counted from `start`.
        self._shards = [(-start.batch, start.epoch, start.shard)]
        self._plans: dict[tuple[int, int], concurrent.futures.Future] = {}
        self._planner = concurrent.futures.ThreadPoolExecutor(1, "plan")
        self._lock = threading.Lock()
        self._length = self._total()

    def __reduce__(self):  # for loader processes; each makes its own plans
        own = self._batches, self._start, self._shuffle, self._epochs, self._index, self._count
        return _Stream, own

    def __len__(self) -> int:
        return self._length

    def _total(self) -> int:
        if self._epochs is None:
            return 1 << 60
        total, shards = -self._start.batch, self._batches.num_shards
        for epoch in range(self._start.epoch, self._start.epoch + self._epochs):
            first = self._start.shard if epoch == self._start.epoch else 0
            total += sum(len(self._plan(epoch, shard)) for shard in range(first, shards))
        return total

    def _after(self, epoch: int, shard: int) -> tuple[int, int]:
        return (epoch, shard + 1) if shard + 1 < self._batches.num_shards else (epoch + 1, 0)

    def _plan(self, epoch: int, shard: int) -> Plan:
        """The plan of a shard; the one after it is begun in the background."""
        wanted = [(epoch, shard)]
        following = self._after(epoch, shard)
        if self._last_epoch is None or following[0] <= self._last_epoch:
            wanted.append(following)
        for key in wanted:
            if key not in self._plans:
                self._plans[key] = self._planner.submit(self._batches.plan, *key, self._shuffle)
        for key in [k for k in self._plans if k not in wanted][:-1]:  # one before is kept
            del self._plans[key]
        return self._plans[epoch, shard].result()

    def __getitem__(self, i: int) -> Batch:
        with self._lock:
            while True:  # which shard holds it
                first, epoch, shard = next(s for s in reversed(self._shards) if s[0] <= i)
                plan = self._plan(epoch, shard)
                if i - first < len(plan):
                    break
                # max: a batch that the shard does not have, of data that has changed.
                self._shards.append((max(0, first + len(plan)), *self._after(epoch, shard)))
        batch = i - first
        if plan.rows % self._count:
            raise ValueError(
                f"{plan.rows} rows do not divide by {self._count} processes: set BATCH_SIZE to a "
                "multiple."
            )
        share = plan.rows // self._count
        following = Position(epoch, batch + 1, shard)
        if batch + 1 == len(plan):
            epoch, shard = self._after(epoch, shard)
            following = Position(epoch, 0, shard)
        return Batch(
            arrays=self._batches.assemble(*plan.slice(batch, self._index * share, share)),
            examples=int(plan.examples[batch]),
            tokens=int(plan.tokens[batch]),
            sequences=plan.slice(batch, 0, plan.rows)[0],
            next=following,
        )


def subsets(keys: np.ndarray, seed: int) -> np.ndarray:
    """Ranks of examples in an order that depends on nothing but their keys and the seed.

    The first n of it are a random subset that holds every smaller one.

    Args:
      keys: uint64 [n], one per example.
      seed: of the order.

    Returns:
      int64 [n]: the place of each example.
    """
    with np.errstate(over="ignore"):  # splitmix64 (Steele et al. 2014)
        x = keys + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    rank = np.empty(len(keys), np.int64)
    rank[np.lexsort((keys, x))] = np.arange(len(keys))
    return rank


def truncate(tokens: np.ndarray, length: int) -> np.ndarray:
    """The first tokens of a sequence; where it is cut, its last token (EOS) ends it."""
    if len(tokens) <= length:
        return tokens
    return np.append(tokens[: length - 1], tokens[-1])
