"""Packing: which sequence lies in which row, and which row lengths waste least.

A row holds several sequences, up to a capacity of input tokens and one of target tokens. Every
sequence goes best-fit: into the fullest row that still has room for both of its parts. Pairs (the
sequences of one example) go in whole or not at all.

Best-fit is sequential within a set of rows, and Python is slow at that. So many independent sets
(*units*, one per *lane*) are packed in lockstep with one numpy operation for all of them; that
packs a million sequences in seconds. Scores are integers, so that a plan is the same on every
machine. Order is kept as drawn: sorting by length was tried on CommonsenseQA and packed no denser,
and would correlate length with time.
"""

import dataclasses
import types
from typing import Any

import numpy as np

# Rows that are packed as one unit at most. More rows leave fewer holes but cost more per sequence.
UNIT_ROWS = 128
LANES = 64


# --- Packing --------------------------------------------------------------------------------------


def best_fit(lengths: np.ndarray, capacity: np.ndarray, rows: int) -> np.ndarray:
    """Packs each lane's pairs, in their order, into the lane's own rows.

    Args:
      lengths: int [lanes, pairs, members, 2], input and target tokens of each sequence; (0, 0) for
        a member that is not there.
      capacity: int [2] or [lanes, 2], input and target tokens that a row holds.
      rows: rows of each lane.

    Returns:
      int32 [lanes, pairs, members]: the row of each sequence; -1 for all members of a pair that
      did not fit, and for members that are not there.
    """
    lanes, pairs, members, _ = lengths.shape
    largest = 2 * int(np.prod(np.max(np.atleast_2d(capacity), axis=0)))  # score of an empty row
    dtype = np.int32 if largest < np.iinfo(np.int32).max else np.int64
    lengths = np.ascontiguousarray(lengths.transpose(1, 2, 3, 0), dtype)[..., None]
    capacity = np.broadcast_to(np.asarray(capacity, dtype), (lanes, 2))
    there = lengths.any(axis=2)[..., 0]
    free = np.repeat(capacity.T[:, :, None], rows, axis=2)  # [2, lanes, rows]
    # The score of a row: its free room in fractions of the capacity, times both capacities.
    factor = capacity[:, ::-1].T.copy()  # [2, lanes]
    score = free[0] * factor[0, :, None] + free[1] * factor[1, :, None]
    worst = np.iinfo(dtype).max
    placed = np.full((lanes, pairs, members), -1, np.int32)
    lane = np.arange(lanes)
    for p in range(pairs):
        whole = np.ones(lanes, bool)
        taken = []
        for m in range(members):
            inputs, targets = lengths[p, m]
            fits = (free[0] >= inputs) & (free[1] >= targets)
            row = np.where(fits, score, worst).argmin(axis=1)
            fit = fits[lane, row]
            whole &= fit
            taken.append((row, fit))
            _use(free, score, factor, lane, row, np.where(fit, lengths[p, m, :, :, 0], 0))
        for m, (row, fit) in enumerate(taken):
            placed[:, p, m] = np.where(whole & there[p, m], row, -1)
            if not whole.all():  # give back what half a pair has taken
                back = np.where(fit & ~whole, lengths[p, m, :, :, 0], 0)
                _use(free, score, factor, lane, row, -back)
    return placed


def _use(free, score, factor, lane, row, tokens) -> None:
    """Takes `tokens` [2, lanes] from one row of each lane."""
    free[0, lane, row] -= tokens[0]
    free[1, lane, row] -= tokens[1]
    score[lane, row] -= tokens[0] * factor[0] + tokens[1] * factor[1]


@dataclasses.dataclass(frozen=True)
class Unit:
    """Some pairs, packed.

    Attributes:
      pairs: indices of the pairs, int [n].
      rows: the row of each sequence, int [n, members]; -1 where there is none.
    """

    pairs: np.ndarray
    rows: np.ndarray


def fill_rows(
    lengths: np.ndarray, capacity: np.ndarray, rows: int, *, wrap: bool, multiple: int = 1
) -> list[Unit]:
    """Packs pairs into units of `rows` rows, as many as fit; the others lead the next unit.

    Args:
      lengths: int [n, members, 2], see `best_fit`; every pair fits an empty unit.
      capacity: int [2].
      rows: rows of a unit.
      wrap: fill up the last unit with the first pairs, again and again.
      multiple: with `wrap`, the number of units is a multiple of this.

    Returns:
      The units; every pair is in exactly one, but for those that `wrap` repeats.

    Raises:
      ValueError: a pair does not fit an empty unit, or has no sequence.
    """
    fill = rows * (capacity / np.maximum(lengths.sum(axis=1).mean(axis=0), 1e-9)).min()
    most = int(fill * 1.02) + 8  # pairs to try: a few more than fit on average
    units: list[Unit] = []
    remaining = np.arange(len(lengths))
    # Lanes fill whole units side by side; what is left at their ends goes to half as many lanes, at
    # last to a single one.
    while (lanes := min(LANES, len(remaining) // (2 * most))) > 1:
        share = len(remaining) // lanes
        parts = [remaining[k * share : (k + 1) * share] for k in range(lanes)]
        rest = [remaining[lanes * share :]]
        while min(map(len, parts)) >= most:
            candidates = np.stack([part[:most] for part in parts])
            placed = best_fit(lengths[candidates], capacity, rows)
            fitted = (placed >= 0).any(axis=2)
            for k, part in enumerate(parts):
                units.append(Unit(candidates[k, fitted[k]], placed[k, fitted[k]]))
                parts[k] = np.concatenate([candidates[k, ~fitted[k]], part[most:]])
        remaining = np.concatenate(parts + rest)
    everything = np.arange(len(lengths))
    while len(remaining) or (wrap and len(units) % multiple):
        candidates = remaining[:most]
        if wrap and len(candidates) < most:
            again = np.resize(everything, most - len(candidates))
            candidates = np.concatenate([candidates, again])
        placed = best_fit(lengths[candidates][None], capacity, rows)[0]
        fitted = (placed >= 0).any(axis=1)
        if not fitted.any():
            room = " + ".join(map(str, capacity.tolist()))
            raise ValueError(
                f"A pair does not fit {rows} rows of {room} tokens: raise BATCH_SIZE or "
                "TASK_FEATURE_LENGTHS."
            )
        units.append(Unit(candidates[fitted], placed[fitted]))
        waiting = candidates[: len(remaining)][~fitted[: len(remaining)]]
        remaining = np.concatenate([waiting, remaining[most:]])
    return units


def fill_pairs(
    lengths: np.ndarray, capacity: np.ndarray, pairs_per_unit: int, *, wrap: bool
) -> list[Unit]:
    """Packs units of exactly `pairs_per_unit` pairs into as few rows as best-fit needs.

    Here the longest sequences go first, each on its own: rows are opened until everything is in,
    and within one batch order means nothing.

    Args:
      lengths: int [n, members, 2], see `best_fit`; every sequence fits an empty row.
      capacity: int [2].
      pairs_per_unit: pairs of each unit.
      wrap: fill up the last unit with the first pairs, again and again.
    """
    n, members = lengths.shape[:2]
    count = -(-n // pairs_per_unit)
    chosen = np.resize(np.arange(n), count * pairs_per_unit).reshape(count, pairs_per_unit)
    units: list[Unit] = []
    for start in range(0, count, LANES):
        block = chosen[start : start + LANES]
        sequences = lengths[block].reshape(len(block), -1, 2)
        if not wrap and start + len(block) == count:
            sequences[-1, (n - (count - 1) * pairs_per_unit) * members :] = 0
        order = np.argsort(-sequences.sum(axis=2), axis=1, kind="stable")
        sequences = np.take_along_axis(sequences, order[:, :, None], axis=1)
        rows = int((sequences.sum(axis=1) / capacity).max() * 1.2) + 4
        while True:
            placed = best_fit(sequences[:, :, None], capacity, rows)[..., 0]
            if ((placed >= 0) == sequences.any(axis=2)).all():
                break
            rows *= 2
        back = np.empty_like(placed)
        np.put_along_axis(back, order, placed, axis=1)
        for pairs, where in zip(block, back.reshape(len(block), -1, members), strict=True):
            kept = (where >= 0).any(axis=1)
            units.append(Unit(pairs[kept], where[kept]))
    return units


# --- What a row costs -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of a T5's forward pass; a multiply-add counts as two.

    Attributes:
      per_input: per input token: encoder projections and MLP, and the decoder's keys and values.
      per_target: per target token: decoder projections, MLP and logits.
      input_input: per (query, key) of the encoder's self-attention.
      target_target: per (query, key) of the decoder's self-attention, future keys counted.
      target_input: per (query, key) of the cross-attention.
    """

    per_input: float
    per_target: float
    input_input: float
    target_target: float
    target_input: float

    @classmethod
    def of(cls, model: Any) -> "Flops":
        """Those of a `t5.T5Config`; norms, softmax and the lookup of embeddings are left out."""
        attention = model.num_heads * model.head_dim
        projections = 8 * model.emb_dim * attention
        mlp = 2 * (len(model.mlp_activations) + 1) * model.emb_dim * model.mlp_dim
        encoder, decoder = model.num_encoder_layers, model.num_decoder_layers
        return cls(
            per_input=encoder * (projections + mlp) + decoder * projections / 2,
            per_target=decoder * (projections * 1.5 + mlp) + 2 * model.emb_dim * model.vocab_size,
            input_input=encoder * 4 * attention,
            target_target=decoder * 4 * attention,
            target_input=decoder * 4 * attention,
        )

    def row(self, inputs, targets):
        """Of a row (or sequence) with so many input and target tokens; arrays broadcast.

        Every token attends to the whole row, as a dense attention computes it.
        """
        inputs, targets = np.asarray(inputs, np.float64), np.asarray(targets, np.float64)
        return (
            self.per_input * inputs
            + self.per_target * targets
            + self.input_input * inputs**2
            + self.target_target * targets**2
            + self.target_input * inputs * targets
        )


T5_BASE = Flops.of(
    types.SimpleNamespace(
        emb_dim=768, num_heads=12, head_dim=64, mlp_dim=2048, mlp_activations=("gelu", "linear"),
        num_encoder_layers=12, num_decoder_layers=12, vocab_size=32128,
    )
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Waste:
    """What packing wastes.

    Attributes:
      inputs: fraction of the input positions that is padding.
      targets: fraction of the target positions that is padding.
      flops: operations computed over those needed (>= 1), where a real token needs its
        projections and attention inside its own sequence.
    """

    inputs: float
    targets: float
    flops: float

    @classmethod
    def of(cls, lengths: np.ndarray, capacity, rows: int, flops: Flops) -> "Waste":
        """Of sequences [n, 2] that were computed in so many rows of `capacity`."""
        real = lengths.sum(axis=0) / (rows * np.asarray(capacity, np.float64))
        needed = flops.row(lengths[:, 0], lengths[:, 1]).sum()
        computed = rows * float(flops.row(*capacity))
        return cls(float(1 - real[0]), float(1 - real[1]), computed / float(needed))


# --- Row lengths from the data --------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Row lengths and what they waste on a sample of the data."""

    inputs: int
    targets: int
    waste: Waste


def propose_lengths(
    lengths: np.ndarray,
    flops: Flops,
    *,
    rows: int | None = None,
    pairs: int | None = None,
    row_budget: int = 1024,
) -> list[Proposal]:
    """Tries row lengths on a sample of the pairs, in the way in which they will be packed.

    Long rows have few holes but attend over many strangers; short rows have holes. Which of the two
    costs more depends on the model's width, and the share of the targets on the data.

    Args:
      lengths: int [n, members, 2], in the order of training or shuffled.
      flops: of the model.
      rows: rows of a batch; or
      pairs: pairs of a batch, in as many rows as they need.
      row_budget: input and target tokens together that a row may have; more only where a single
        sequence has more.

    Returns:
      All that was tried, the best first: the shortest rows within 0.5 % of the least FLOPs.
    """
    candidates = _candidates(lengths, row_budget)
    measure = _waste_of_pairs if pairs is not None else _waste_of_rows
    wastes = measure(lengths, candidates, flops, pairs if pairs is not None else rows)
    proposals = [
        Proposal(int(i), int(t), waste) for (i, t), waste in zip(candidates, wastes, strict=True)
    ]
    enough = 1.005 * min(p.waste.flops for p in proposals)
    return sorted(
        proposals,
        key=lambda p: (0, p.inputs + p.targets) if p.waste.flops <= enough else (1, p.waste.flops),
    )


def _candidates(lengths: np.ndarray, row_budget: int) -> np.ndarray:
    """Row lengths to try, int [k, 2]: inputs in steps of 32, targets around their share."""
    sequences = lengths.reshape(-1, 2)
    mean, longest = sequences.mean(axis=0), sequences.max(axis=0)
    share = mean[1] / max(mean[0], 1e-9)
    found = set()
    inputs = int(-(-max(longest[0], 8) // 8) * 8)  # one sequence in a row, then full steps
    while True:
        for factor in (0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.35):
            targets = int(-(-max(longest[1], inputs * share * factor) // 8) * 8)
            found.add((inputs, targets))
        inputs = (inputs // 32 + 1) * 32
        if inputs * (1 + share) > row_budget:
            break
    kept = [c for c in found if sum(c) <= row_budget]
    return np.array(sorted(kept or [min(found, key=sum)]))


def _waste_of_rows(lengths, candidates, flops: Flops, rows: int) -> list[Waste]:
    """Fills one unit of each candidate with the first pairs."""
    rows = min(rows, UNIT_ROWS)
    mean = lengths.sum(axis=1).mean(axis=0)
    # A small set is repeated, as an epoch of it would be.
    most = int(rows * (candidates / np.maximum(mean, 1e-9)).min(axis=1).max() * 1.02) + 8
    sample = np.resize(np.arange(len(lengths)), most)
    wastes = []
    for some in np.array_split(candidates, -(-len(candidates) // LANES)):
        tiled = np.broadcast_to(lengths[sample], (len(some), most, *lengths.shape[1:]))
        placed = (best_fit(tiled, some, rows) >= 0).any(axis=2)
        for capacity, fitted in zip(some, placed, strict=True):
            sequences = lengths[sample[fitted]].reshape(-1, 2)
            wastes.append(Waste.of(sequences[sequences.any(axis=1)], capacity, rows, flops))
    return wastes


def _waste_of_pairs(lengths, candidates, flops: Flops, pairs: int) -> list[Waste]:
    """Packs batches of the sample with each candidate; all have the rows of the fullest."""
    wastes = []
    for capacity in candidates:
        units = fill_pairs(lengths, capacity, pairs, wrap=True)
        rows = rows_for(units)
        used = lengths[np.concatenate([u.pairs for u in units])].reshape(-1, 2)
        used = used[used.any(axis=1)]
        wastes.append(Waste.of(used, capacity, rows * len(units), flops))
    return wastes


def rows_for(units: list[Unit], multiple: int = 1) -> int:
    """Rows of batches that hold these units, a multiple of `multiple`.

    In steps of a sixteenth, so that epochs of slightly different need mostly share one program.
    """
    needed = max(int(unit.rows.max()) + 1 for unit in units)
    step = -(-max(1, needed // 16) // multiple) * multiple
    return -(-needed // step) * step
