"""Plans and batches: every token once, pairs together, resume by index."""

import dataclasses
import itertools
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from distill import cache, data, packing


@pytest.fixture
def corpus_of(tmp_path):
    """Makes a corpus of pairs: a label task and, where pairs have them, a rationale task.

    A pair maps `label` and `rationale` to (inputs, targets); a rationale may be a list of them.
    """
    number = itertools.count()

    def make(pairs, name="toy", rate=1.0, weights=None):
        members = []
        ids = [f"{name}/{i}" for i in range(len(pairs))]
        for group, stream in enumerate(("label", "rationale")):
            rows = []
            for i, pair in enumerate(pairs):
                answers = pair.get(stream, [])
                for choice, (inputs, targets) in enumerate(
                    answers if isinstance(answers, list) else [answers]
                ):
                    rows.append(
                        {
                            "inputs": inputs, "targets": targets, "example_id": ids[i],
                            "label": "", "inputs_pretokenized": "", "loss_group": group,
                            "choice": choice, "loss_weight": weights[i] if weights else 1000,
                        }
                    )  # fmt: skip
            if rows:
                facts = dict(name=f"{name}_{stream}", rate=rate, metrics=[], dataset=name,
                             answer_form="label")  # fmt: skip
                members.append((facts, ids, rows))
        folder = tmp_path / f"corpus{next(number)}"
        folder.mkdir()
        return cache.open_generation(
            folder / cache.write_generation(folder, name, "train", members)
        )

    return make


def joined(corpora, tmp_path):
    """One corpus of the tasks of several."""
    tasks = [task for corpus in corpora for task in corpus.tasks]
    pairs = cache.number_pairs([task.keys for task in tasks])
    return cache.Corpus("mixture", "train", tasks, pairs, "fingerprint", tmp_path)


def pairs_config(pairs_per_step, **settings):
    return data.DataConfig("toy", batch_size=None, pairs_per_step=pairs_per_step, **settings)


def rows_config(batch_size, lengths=None, **settings):
    return data.DataConfig(
        "toy", batch_size=batch_size, feature_lengths=lengths or dict(inputs=40, targets=24),
        **settings,
    )  # fmt: skip


def random_pairs(n, seed=0, without_rationale=0.0):
    """Pairs whose tokens name their example: 2 + its number, so that rows can be read back."""
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(n):
        pair = {
            stream: tuple(
                np.append(np.full(rng.integers(low, high), 2 + i), 1).astype(np.int32)
                for low, high in ((3, 20), lengths)
            )
            for stream, lengths in (("label", (1, 3)), ("rationale", (4, 12)))
        }
        if rng.random() < without_rationale:
            del pair["rationale"]
        pairs.append(pair)
    return pairs


def segments(batch):
    """(input tokens, target tokens, loss groups) of each packed sequence of a batch."""
    found = []
    for r in range(len(batch["encoder_input_tokens"])):
        for s in range(1, batch["encoder_segment_ids"][r].max() + 1):
            encoder = batch["encoder_segment_ids"][r] == s
            decoder = batch["decoder_segment_ids"][r] == s
            found.append(
                (
                    batch["encoder_input_tokens"][r][encoder],
                    batch["decoder_target_tokens"][r][decoder],
                    batch["decoder_loss_groups"][r][decoder],
                    batch["decoder_input_tokens"][r][decoder],
                )
            )
    return found


@pytest.mark.parametrize("config", [pairs_config(5), rows_config(6)], ids=["pairs", "rows"])
def test_an_epoch_holds_every_sequence_and_both_of_a_pair_in_one_batch(corpus_of, config):
    pairs = random_pairs(33, without_rationale=0.2)
    batches = data.TrainBatches(corpus_of(pairs), config)
    seen = {}
    for number, batch in enumerate(batches.iterate(data.Position(), epochs=1)):
        for inputs, targets, groups, shifted in segments(batch.arrays):
            example, group = int(inputs[0]) - 2, int(groups[0])
            source, target = pairs[example][("label", "rationale")[group]]
            np.testing.assert_array_equal(inputs, source)
            np.testing.assert_array_equal(targets, target)
            np.testing.assert_array_equal(shifted, np.append(0, target[:-1]))
            assert (groups == group).all()
            seen.setdefault((number, example), set()).add(group)
    for (_, example), groups in seen.items():
        assert groups == ({0, 1} if "rationale" in pairs[example] else {0})
    assert {example for _, example in seen} == set(range(33))


def test_pairs_per_step_is_exact_and_counts_add_up(corpus_of):
    pairs = random_pairs(33)
    batches = data.TrainBatches(corpus_of(pairs), pairs_config(5))
    for batch in batches.iterate(data.Position(), epochs=1):
        found = segments(batch.arrays)
        assert batch.examples == 5 and len(found) == 10
        real = sum(int((batch.arrays[k] > 0).sum())
                   for k in ("encoder_input_tokens", "decoder_target_tokens"))  # fmt: skip
        assert batch.tokens == real
        np.testing.assert_array_equal(
            batch.arrays["decoder_loss_weights"], batch.arrays["decoder_target_tokens"] > 0
        )


def test_without_shuffling_every_example_comes_exactly_once(corpus_of):
    pairs = random_pairs(33)
    for config in (pairs_config(5), rows_config(6)):
        batches = data.TrainBatches(corpus_of(pairs), config)
        examples = [
            int(inputs[0]) - 2
            for batch in batches.iterate(data.Position(), shuffle=False, epochs=1)
            for inputs, *_ in segments(batch.arrays)
        ]
        assert sorted(examples) == sorted(list(range(33)) * 2)


def test_fewer_examples_than_a_step_needs_are_repeated(corpus_of):
    batches = data.TrainBatches(corpus_of(random_pairs(3)), pairs_config(8))
    batch = next(batches.iterate(data.Position()))
    assert batch.examples == 8 and len(segments(batch.arrays)) == 16


@pytest.mark.parametrize("config", [pairs_config(5), rows_config(6)], ids=["pairs", "rows"])
def test_resuming_at_a_position_gives_the_same_batches(corpus_of, config):
    corpus = corpus_of(random_pairs(33))
    feed = data.TrainBatches(corpus, config).iterate(data.Position())
    whole = [next(feed) for _ in range(14)]  # two epochs
    assert whole[-1].next.epoch >= 1
    for stop in (1, 6, 7, 8):
        feed = data.TrainBatches(corpus, config).iterate(whole[stop - 1].next)
        for batch in whole[stop:]:
            again = next(feed)
            assert again.next == batch.next
            for key, value in batch.arrays.items():
                np.testing.assert_array_equal(again.arrays[key], value)


def test_epochs_and_seeds_differ_in_order(corpus_of):
    corpus = corpus_of(random_pairs(40))
    batches = data.TrainBatches(corpus, pairs_config(5))
    other = data.TrainBatches(corpus, pairs_config(5, seed=1))

    def order(batches, epoch):
        return batches.plan(epoch).sequences.tolist()

    assert order(batches, 0) != order(batches, 1)
    assert order(batches, 0) != order(other, 0)


def test_hosts_share_the_rows_of_one_batch(corpus_of):
    corpus = corpus_of(random_pairs(33))
    batches = data.TrainBatches(corpus, rows_config(6), row_multiple=2)
    whole = next(batches.iterate(data.Position()))
    shares = [
        next(batches.iterate(data.Position(), process_index=i, process_count=2)) for i in range(2)
    ]
    for key, value in whole.arrays.items():
        np.testing.assert_array_equal(np.concatenate([s.arrays[key] for s in shares]), value)


@pytest.mark.parametrize("n", [3, 33])
@pytest.mark.parametrize(
    "config", [pairs_config(9), rows_config(6), rows_config(192)], ids=["pairs", "rows", "units"]
)
def test_pair_ids_tell_pairs_apart_and_stay_below_their_bound(corpus_of, config, n):
    """Also where a pair comes several times: each copy is a pair of its own."""
    pairs = random_pairs(n, without_rationale=0.2)
    batches = data.TrainBatches(corpus_of(pairs), config, with_pair_ids=True)
    largest = 0
    for batch in itertools.islice(batches.iterate(data.Position()), 8):
        ids, found = batch.arrays["decoder_pair_ids"], {}
        np.testing.assert_array_equal(ids > 0, batch.arrays["decoder_loss_weights"] > 0)
        rows = zip(ids, batch.arrays["decoder_segment_ids"], strict=True)
        places = [np.unique(i[s == k]) for i, s in rows for k in range(1, s.max() + 1)]
        for place, (inputs, _, groups, _) in zip(places, segments(batch.arrays), strict=True):
            (pair,) = place.tolist()
            found.setdefault(pair, []).append((int(inputs[0]) - 2, int(groups[0])))
        assert set(found) == set(range(1, batch.examples + 1))
        for members in found.values():
            example = members[0][0]
            streams = [0, 1] if "rationale" in pairs[example] else [0]
            assert sorted(members) == [(example, group) for group in streams]
        largest = max(largest, batch.examples)
    assert largest <= batches.max_pairs <= 3 * largest


def test_no_batch_has_more_pairs_than_there_is_room_for_at_any_rates(corpus_of, tmp_path):
    """A few short pairs that are drawn again and again may come many times in one batch."""

    def pairs(n, inputs, targets):
        stream = np.full(inputs, 5, np.int32), np.full(targets, 5, np.int32)
        return [{"label": stream, "rationale": stream}] * n

    long, short = pairs(400, 36, 22), pairs(4, 3, 2)
    corpus = joined([corpus_of(long, "long"), corpus_of(short, "short", rate=20.0)], tmp_path)
    batches = data.TrainBatches(corpus, rows_config(8), with_pair_ids=True)
    for epoch in range(3):
        assert batches.plan(epoch).examples.max() <= batches.max_pairs


def test_pair_ids_are_there_on_demand_only_and_change_nothing_else(corpus_of):
    corpus = corpus_of(random_pairs(33))
    plain = next(data.TrainBatches(corpus, rows_config(6)).iterate(data.Position())).arrays
    wanted = data.TrainBatches(corpus, rows_config(6), with_pair_ids=True)
    arrays = dict(next(wanted.iterate(data.Position())).arrays)
    del arrays["decoder_pair_ids"]
    assert arrays.keys() == plain.keys()
    for key, value in plain.items():
        np.testing.assert_array_equal(arrays[key], value)


def test_hosts_number_the_pairs_alike(corpus_of):
    batches = data.TrainBatches(
        corpus_of(random_pairs(33)), rows_config(6), row_multiple=2, with_pair_ids=True
    )
    whole = next(batches.iterate(data.Position())).arrays["decoder_pair_ids"]
    shares = [
        next(batches.iterate(data.Position(), process_index=i, process_count=2)) for i in range(2)
    ]
    parts = [share.arrays["decoder_pair_ids"] for share in shares]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert set(parts[0].flat) & set(parts[1].flat) - {0}  # a pair that the hosts share


def test_cutting_keeps_eos_and_is_counted(corpus_of):
    pairs = [{"label": (np.array([5, 6, 7, 8, 9, 1], np.int32), np.array([4, 1], np.int32))}]
    config = pairs_config(1, feature_lengths=dict(inputs=4, targets=8))
    batches = data.TrainBatches(corpus_of(pairs), config)
    inputs, *_ = segments(next(batches.iterate(data.Position())).arrays)[0]
    np.testing.assert_array_equal(inputs, [5, 6, 7, 1])
    assert batches.truncated == {"inputs": 1, "targets": 0}


def test_subset_is_drawn_by_the_seed(corpus_of):
    corpus = corpus_of(random_pairs(40))

    def chosen(seed):
        batches = data.TrainBatches(corpus, pairs_config(8, num_train_examples=8, seed=seed))
        assert batches.num_pairs == 8
        batch = next(batches.iterate(data.Position()))
        return {int(inputs[0]) for inputs, *_ in segments(batch.arrays)}

    assert chosen(0) == chosen(0) != chosen(1)
    with pytest.raises(ValueError, match="NUM_TRAIN_EXAMPLES=41.*40 examples"):
        data.TrainBatches(corpus, pairs_config(8, num_train_examples=41))


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(batch_size=None), "PAIRS_PER_STEP"),
        (dict(pairs_per_step=0), "pairs_per_step"),
        (dict(feature_lengths={"inputs": 8}), "TASK_FEATURE_LENGTHS"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        data.DataConfig("toy", **settings)


def test_batch_size_must_divide_by_the_devices(corpus_of):
    with pytest.raises(ValueError, match="BATCH_SIZE=6.*4.*4 or 8 would do"):
        data.TrainBatches(corpus_of(random_pairs(5)), rows_config(6), row_multiple=4)


def ids(batches, batch):
    return batches.example_ids(batch.sequences)


@pytest.mark.parametrize("seed", range(6))
def test_resuming_anywhere_on_any_number_of_hosts_gives_the_same_stream(
    corpus_of, monkeypatch, seed
):
    """Stops at random steps, goes on with another number of hosts: the same ids and arrays."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(data, "SHARD_PAIRS", int(rng.integers(8, 40)))  # several shards an epoch
    corpus = corpus_of(random_pairs(50, seed=seed, without_rationale=0.2))
    config = rows_config(8, seed=seed) if seed % 2 else pairs_config(7, seed=seed)
    batches = data.TrainBatches(corpus, config, row_multiple=4)
    assert batches.num_shards > 1
    whole = list(itertools.islice(batches.iterate(data.Position()), 30))
    position, step = data.Position(), 0
    while step < 30:
        hosts = int(rng.choice([1, 2, 4]))
        again = data.TrainBatches(corpus, config, row_multiple=4)  # a new process knows no plan
        feeds = [again.iterate(position, process_index=i, process_count=hosts)
                 for i in range(hosts)]  # fmt: skip
        for _ in range(min(int(rng.integers(1, 9)), 30 - step)):
            shares = [next(feed) for feed in feeds]
            assert ids(again, shares[0]) == ids(batches, whole[step])
            for key, value in whole[step].arrays.items():
                np.testing.assert_array_equal(
                    np.concatenate([share.arrays[key] for share in shares]), value
                )
            position, step = shares[0].next, step + 1
            assert {share.next for share in shares} == {position}


@pytest.mark.parametrize("batch_size", [130, 256, 512, 131])
def test_large_batches_of_few_examples(corpus_of, batch_size):
    """More rows than one packing unit has, and not enough examples to fill them."""
    corpus = corpus_of(random_pairs(30))
    batches = data.TrainBatches(corpus, rows_config(batch_size))
    held_out = list(batches.iterate(data.Position(), shuffle=False, epochs=1))
    once = [i for batch in held_out for i in ids(batches, batch)]
    assert sorted(once) == sorted([f"toy/{i}" for i in range(30)] * 2)
    batch = next(batches.iterate(data.Position()))
    assert batch.arrays["encoder_input_tokens"].shape[0] == batch_size
    assert set(ids(batches, batch)) == {f"toy/{i}" for i in range(30)}


def test_a_position_beyond_the_data_goes_on_with_the_next_epoch(corpus_of):
    """Data that has shrunk (allow_changed_data)."""
    batches = data.TrainBatches(corpus_of(random_pairs(20)), pairs_config(5))
    assert next(batches.iterate(data.Position(2, 3, shard=7))).next == data.Position(3, 1)
    assert next(batches.iterate(data.Position(2, 99))).next == data.Position(3, 1)


def test_an_epoch_of_several_shards_has_every_example(corpus_of, monkeypatch):
    monkeypatch.setattr(data, "SHARD_PAIRS", 16)
    batches = data.TrainBatches(corpus_of(random_pairs(50)), rows_config(4))
    epochs = {0: [], 1: []}
    for batch in itertools.takewhile(lambda b: b.next.epoch < 2, batches.iterate(data.Position())):
        epochs[batch.next.epoch if batch.next.batch or batch.next.shard else 0] += ids(
            batches, batch
        )
    assert batches.num_shards == 4
    assert set(epochs[0]) == {f"toy/{i}" for i in range(50)}
    held_out = list(batches.iterate(data.Position(), shuffle=False, epochs=1))
    once = [i for batch in held_out for i in ids(batches, batch)]
    assert sorted(once) == sorted([f"toy/{i}" for i in range(50)] * 2)


PROCESSES = """
import sys
import numpy as np
from distill import cache, data

def main():
    corpus = cache.open_generation(__import__("pathlib").Path(sys.argv[1]))
    feeds = []
    for workers in (0, 2):
        config = data.DataConfig("toy", batch_size=4, feature_lengths=dict(inputs=40, targets=24),
                                 loader_processes=workers)
        feeds.append(data.TrainBatches(corpus, config).iterate(data.Position(0, 2)))
    for _ in range(12):
        a, b = map(next, feeds)
        assert a.next == b.next and a.arrays.keys() == b.arrays.keys()
        for key in a.arrays:
            np.testing.assert_array_equal(a.arrays[key], b.arrays[key])
    print("same")

if __name__ == "__main__":
    main()
"""


def test_loader_processes_give_the_same_stream(corpus_of, tmp_path):
    corpus = corpus_of(random_pairs(50))
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    done = subprocess.run(
        [sys.executable, script, corpus.folder], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout == "same\n", done.stderr


def test_of_several_rationales_one_is_drawn_per_epoch(corpus_of):
    pairs = random_pairs(20)
    for i, pair in enumerate(pairs):
        inputs, targets = pair["rationale"]
        pair["rationale"] = [(inputs, np.append(targets[:-1], [100 + k, 1])) for k in range(i % 4)]
    batches = data.TrainBatches(corpus_of(pairs), pairs_config(20))
    assert batches.num_sequences == 20 + 15
    drawn = []
    for epoch in range(30):
        batch = next(batches.iterate(data.Position(epoch)))
        found = {int(x[0]) - 2: int(y[-2]) - 100 for x, y, g, _ in segments(batch.arrays) if g[0]}
        assert set(found) == {i for i in range(20) if i % 4}
        drawn.append(found)
    for i in range(20):
        assert {found[i] for found in drawn if i in found} == set(range(i % 4))
    again = next(data.TrainBatches(corpus_of(pairs), pairs_config(20)).iterate(data.Position(7)))
    first = next(batches.iterate(data.Position(7)))
    np.testing.assert_array_equal(
        again.arrays["decoder_target_tokens"], first.arrays["decoder_target_tokens"]
    )


def test_rates_are_shares_and_a_repeated_part_is_seen_evenly(corpus_of, tmp_path):
    """As in SeqIO: 30 examples at rate 3 and 10 at rate 1 come once each; at equal rates the small
    part is drawn twice, every example as often as the others."""
    large, small = random_pairs(30), random_pairs(10, seed=1)

    def counts(rate, epochs):
        corpus = joined([corpus_of(large, "large", rate=rate), corpus_of(small, "small")], tmp_path)
        batches = data.TrainBatches(corpus, pairs_config(5))
        assert batches.pairs_per_epoch == 40
        seen = dict.fromkeys(
            [f"large/{i}" for i in range(30)] + [f"small/{i}" for i in range(10)], 0
        )
        for epoch in range(epochs):
            plan = batches.plan(epoch)
            for example in set(batches.example_ids(plan.sequences)):
                seen[example] += 1 if rate == 3 else 0
            for example in batches.example_ids(plan.sequences):
                seen[example] += 0 if rate == 3 else 1
        return seen

    assert set(counts(3.0, 4).values()) == {4}
    with pytest.raises(ValueError, match="mixing rate 0"):
        data.TrainBatches(corpus_of(small, rate=0.0), pairs_config(5))
    only_small = joined([corpus_of(large, "large", rate=0.0), corpus_of(small, "small")], tmp_path)
    batches = data.TrainBatches(only_small, pairs_config(5))
    drawn = set(batches.example_ids(batches.plan(0).sequences))
    assert drawn == {f"small/{i}" for i in range(10)}
    # 20 of each an epoch: in three epochs two passes of the large part, six of the small one; two
    # sequences an example.
    equal = counts(1.0, 3)
    assert {equal[f"large/{i}"] for i in range(30)} == {2 * 2}
    assert {equal[f"small/{i}"] for i in range(10)} == {6 * 2}


def test_one_rate_for_the_tasks_of_an_example(corpus_of):
    corpus = corpus_of(random_pairs(5))
    tasks = [dataclasses.replace(t, rate=r) for t, r in zip(corpus.tasks, (1, 2), strict=True)]
    with pytest.raises(ValueError, match="toy_label, toy_rationale.*ALPHA"):
        data.TrainBatches(dataclasses.replace(corpus, tasks=tasks), pairs_config(5))


def only(corpus, tasks):
    """The corpus of some of its tasks."""
    pairs = cache.number_pairs([task.keys for task in tasks])
    return dataclasses.replace(corpus, tasks=tasks, pairs=pairs)


def test_fractions_are_nested_and_the_same_for_every_method(corpus_of):
    pairs = random_pairs(200, without_rationale=0.3)
    both = corpus_of(pairs)
    labels = only(both, both.tasks[:1])
    rationales = only(both, both.tasks[1:])

    def chosen(corpus, **subset):
        batches = data.TrainBatches(corpus, pairs_config(10, **subset))
        return set(batches.example_ids(batches.plan(0).sequences))

    last = set()
    for fraction in (0.125, 0.25, 0.5, 1.0):
        kept = chosen(labels, train_fraction=fraction)
        assert len(kept) == math.ceil(200 * fraction) and last < kept
        assert chosen(both, train_fraction=fraction) == kept
        has_one = {f"toy/{i}" for i, pair in enumerate(pairs) if "rationale" in pair}
        assert chosen(rationales, train_fraction=fraction) == kept & has_one
        assert chosen(labels, num_train_examples=len(kept)) == kept
        last = kept
    assert len(chosen(labels, train_fraction=0.07)) == 14  # 0.07 x 200 is 14.000000000000002
    assert chosen(labels, train_fraction=0.5, seed=1) != chosen(labels, train_fraction=0.5)
    with pytest.raises(ValueError, match="TRAIN_FRACTION must be in"):
        pairs_config(5, train_fraction=1.5)
    with pytest.raises(ValueError, match="not both"):
        pairs_config(5, train_fraction=0.5, num_train_examples=5)


def test_weights_reach_every_target_token(corpus_of):
    pairs = random_pairs(6)
    plain = next(data.TrainBatches(corpus_of(pairs), pairs_config(6)).iterate(data.Position()))
    assert "decoder_example_weights" not in plain.arrays
    weights = [1000, 250, 0, 1000, 333, 1]
    batches = data.TrainBatches(corpus_of(pairs, weights=weights), pairs_config(6))
    arrays = next(batches.iterate(data.Position())).arrays
    for key in plain.arrays:
        np.testing.assert_array_equal(arrays[key], plain.arrays[key])
    for r, row in enumerate(arrays["decoder_segment_ids"]):
        for segment in range(1, row.max() + 1):
            first = arrays["encoder_input_tokens"][r][arrays["encoder_segment_ids"][r] == segment]
            found = arrays["decoder_example_weights"][r][row == segment]
            assert set(found) == {weights[first[0] - 2]}
    assert (arrays["decoder_example_weights"][arrays["decoder_segment_ids"] == 0] == 0).all()


def test_lengths_come_from_the_data_and_the_model(corpus_of):
    corpus = corpus_of(random_pairs(300))
    config = data.DataConfig("toy", batch_size=16)
    batches = data.TrainBatches(corpus, config)
    proposals = batches.proposals(packing.T5_BASE)
    assert batches.capacity == {"inputs": proposals[0].inputs, "targets": proposals[0].targets}
    narrow = data.TrainBatches(corpus, config, packing.Flops(1, 1, 1, 1, 1))
    assert narrow.capacity != batches.capacity
    waste = batches.waste(batches.plan(0), packing.T5_BASE)
    assert waste.flops < 1.2 and max(waste.inputs, waste.targets) < 0.2


def test_fingerprint_names_what_decides_the_batches(corpus_of):
    corpus = corpus_of(random_pairs(9))
    base = pairs_config(4, feature_lengths=dict(inputs=64, targets=48))
    batches = data.TrainBatches(corpus, base)
    before = batches.fingerprint()
    for change, key in [
        (dict(seed=1), "seed"),
        (dict(pairs_per_step=8), "pairs_per_step"),
        (dict(num_train_examples=5), "num_train_examples"),
        (dict(train_fraction=0.5), "train_fraction"),
        (dict(feature_lengths=dict(inputs=96, targets=64)), "lengths"),
    ]:
        config = dataclasses.replace(base, **change)
        after = data.TrainBatches(corpus, config).fingerprint()
        assert {k for k in after if after[k] != before.get(k)} == {key}


def test_subsets_are_nested_and_drawn_by_the_seed():
    keys = np.random.default_rng(0).integers(2**63, size=1000, dtype=np.uint64)
    ranks = data.subsets(keys, seed=3)
    assert sorted(ranks) == list(range(1000))
    shuffled = np.random.default_rng(1).permutation(1000)
    np.testing.assert_array_equal(data.subsets(keys[shuffled], seed=3), ranks[shuffled])
    assert (data.subsets(keys, seed=4) != ranks).mean() > 0.9
    # A random order: the first tenth comes from everywhere.
    assert 20 < (np.flatnonzero(ranks < 100) < 500).sum() < 80
