"""Packing: capacities hold, pairs stay whole, nothing is lost; and what rows cost."""

import types

import numpy as np
import pytest

from distill import packing

BASE = packing.T5_BASE


def random_pairs(n, members=2, seed=0, high=(40, 16), missing=0.1):
    """Lengths [n, members, 2]; some pairs lack their last member."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers([3, 1], high, size=(n, members, 2))
    if members > 1:
        lengths[rng.random(n) < missing, -1] = 0
    return lengths


def check(lengths, units, capacity, rows=None):
    """Every row holds no more than its capacity; a pair's sequences are placed all or none."""
    for unit in units:
        used = np.zeros((unit.rows.max() + 1, 2), int)
        there = lengths[unit.pairs].any(axis=2)
        assert ((unit.rows >= 0) == there).all()
        np.add.at(used, unit.rows[there], lengths[unit.pairs][there])
        assert (used <= capacity).all()
        assert rows is None or len(used) <= rows


def plain_best_fit(pairs, capacity, rows):
    """The same rule, one sequence after the other."""
    free = [list(capacity) for _ in range(rows)]
    placed = []
    for pair in pairs:
        before, taken = [list(f) for f in free], []
        for need in pair:
            if not any(need):
                taken.append(-1)
                continue
            fits = [r for r in range(rows) if free[r][0] >= need[0] and free[r][1] >= need[1]]
            if not fits:
                free, taken = before, [-1] * len(pair)
                break
            row = min(fits, key=lambda r: free[r][0] / capacity[0] + free[r][1] / capacity[1])
            free[row] = [free[row][0] - need[0], free[row][1] - need[1]]
            taken.append(row)
        placed.append(taken)
    return placed


@pytest.mark.parametrize("seed", range(3))
def test_lockstep_is_plain_best_fit_in_every_lane(seed):
    capacity = np.array([64, 32])  # powers of two, so that the plain fractions are exact
    lanes = np.stack([random_pairs(60, seed=10 * seed + k) for k in range(4)])
    got = packing.best_fit(lanes, capacity, 12)
    assert (got < 0).all(axis=2).any()  # some did not fit, and were given back
    for lane, placed in zip(lanes, got, strict=True):
        assert placed.tolist() == plain_best_fit(lane.tolist(), capacity, 12)


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 7, 700, 9000])
def test_fill_rows_places_every_pair_once(n, members):
    lengths, capacity = random_pairs(n, members), np.array([64, 40])
    units = packing.fill_rows(lengths, capacity, 8, wrap=False)
    check(lengths, units, capacity, rows=8)
    assert sorted(np.concatenate([u.pairs for u in units])) == list(range(n))


def test_wrapping_fills_the_last_unit_with_the_first_pairs():
    lengths, capacity = random_pairs(50, missing=0), np.array([64, 40])
    plain = packing.fill_rows(lengths, capacity, 16, wrap=False)
    units = packing.fill_rows(lengths, capacity, 16, wrap=True, multiple=4)
    check(lengths, units, capacity, rows=16)
    assert len(units) % 4 == 0 and len(units) >= len(plain)
    assert set(np.concatenate([u.pairs for u in units])) == set(range(50))
    sizes = [len(u.pairs) for u in units]
    assert min(sizes) > 0.7 * max(sizes) > len(plain[-1].pairs)  # none is nearly empty


@pytest.mark.parametrize("wrap", [True, False])
def test_fill_pairs_takes_exactly_so_many(wrap):
    lengths, capacity = random_pairs(45), np.array([48, 24])
    units = packing.fill_pairs(lengths, capacity, 10, wrap=wrap)
    check(lengths, units, capacity)
    counts = [len(u.pairs) for u in units]
    assert counts == ([10] * 5 if wrap else [10, 10, 10, 10, 5])
    assert sorted(np.concatenate([u.pairs for u in units])[:45]) == list(range(45))


def test_order_is_kept():
    """In one lane what does not fit leads the next unit, so nobody waits for long."""
    lengths = random_pairs(120, missing=0)
    units = packing.fill_rows(lengths, np.array([64, 40]), 16, wrap=False)
    assert len(units) > 4
    for earlier, later in zip(units, units[2:], strict=False):
        assert earlier.pairs.max() < later.pairs.max() and earlier.pairs.min() < later.pairs.min()


def test_dense():
    lengths = random_pairs(4000, high=(100, 40), missing=0)
    capacity = np.array([256, 104])
    units = packing.fill_rows(lengths, capacity, 64, wrap=True)
    waste = packing.Waste.of(
        lengths[np.concatenate([u.pairs for u in units])].reshape(-1, 2), capacity,
        64 * len(units), BASE,
    )  # fmt: skip
    assert waste.inputs < 0.1 and waste.targets < 0.1 and waste.flops < 1.15


def test_flops_of_a_small_model_by_hand():
    model = types.SimpleNamespace(
        emb_dim=4, num_heads=3, head_dim=2, mlp_dim=5, mlp_activations=("gelu", "linear"),
        num_encoder_layers=1, num_decoder_layers=2, vocab_size=7,
    )  # fmt: skip
    inputs, targets, attention = 10, 6, 3 * 2
    # einsum by einsum: 2 x the product of all dimensions.
    project = 2 * 4 * attention
    encoder = inputs * (4 * project + 3 * 2 * 4 * 5) + 2 * 2 * inputs * inputs * attention
    decoder = (
        targets * (4 * project + 3 * 2 * 4 * 5) + 2 * 2 * targets * targets * attention
        + targets * 2 * project + inputs * 2 * project + 2 * 2 * targets * inputs * attention
    )  # fmt: skip
    logits = targets * 2 * 4 * 7
    expected = encoder + 2 * decoder + logits
    assert packing.Flops.of(model).row(inputs, targets) == expected


def test_waste_is_none_where_every_row_is_one_full_sequence():
    lengths = np.full((5, 2), 16)
    waste = packing.Waste.of(lengths, (16, 16), 5, BASE)
    assert (waste.inputs, waste.targets, waste.flops) == (0, 0, 1)
    assert packing.Waste.of(lengths, (16, 16), 10, BASE) == packing.Waste(0.5, 0.5, 2)


def test_proposed_lengths_waste_least_and_follow_the_data():
    few = random_pairs(3000, high=(60, 10), missing=0)
    many = random_pairs(3000, high=(60, 60), missing=0)
    for lengths in (few, many):
        best, *others = packing.propose_lengths(lengths, BASE, rows=64)
        longest = lengths.reshape(-1, 2).max(axis=0)
        assert best.inputs >= longest[0] and best.targets >= longest[1]
        assert best.inputs + best.targets <= 1024
        assert best.waste.flops <= 1.005 * min(p.waste.flops for p in others)
    shares = [
        p.targets / p.inputs
        for p in (packing.propose_lengths(x, BASE, rows=64)[0] for x in (few, many))
    ]
    assert shares[0] < 0.35 < 0.8 < shares[1]
    # Attention over strangers costs a narrow model more, so its rows are shorter.
    narrow = packing.Flops(1, 1, 1, 1, 1)
    assert packing.propose_lengths(few, narrow, rows=64)[0].inputs < best.inputs
    assert packing.propose_lengths(few, BASE, rows=64, row_budget=128)[0].inputs <= 120


def test_proposal_holds_for_batches_of_pairs():
    lengths = random_pairs(640, missing=0)
    best = packing.propose_lengths(lengths, BASE, pairs=16)[0]
    units = packing.fill_pairs(lengths, np.array([best.inputs, best.targets]), 16, wrap=True)
    rows = max(u.rows.max() + 1 for u in units)  # of the fullest batch, and all have as many
    sequences = lengths.reshape(-1, 2)
    assert packing.rows_for(units) - rows in (0, 1)
    expected = packing.Waste.of(
        sequences, (best.inputs, best.targets), 40 * packing.rows_for(units), BASE
    )
    assert best.waste == expected


def test_a_sequence_longer_than_the_budget_still_gets_a_row():
    lengths = np.array([[[900, 300], [10, 20]]] * 10)
    best = packing.propose_lengths(lengths, BASE, rows=8)[0]
    assert best.inputs >= 900 and best.targets >= 300
