"""Plans and batches: every token once, pairs together, resume by index, the cache's freshness."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from distill import data


def corpus_of(pairs, name="toy"):
    """A corpus with a label task and, where pairs have rationales, a rationale task."""
    tasks = []
    for group, stream in enumerate(("label", "rationale")):
        rows = [(i, pair[stream]) for i, pair in enumerate(pairs) if stream in pair]
        if rows:
            tasks.append(
                data.TaskRows(
                    name=f"{name}_{stream}", rate=1.0, metrics=(),
                    inputs=data.Ragged.of([x for _, (x, _) in rows]),
                    targets=data.Ragged.of([y for _, (_, y) in rows]),
                    loss_groups=np.full(len(rows), group, np.int32),
                    example_ids=[f"{name}/{i}" for i, _ in rows],
                    labels=[""] * len(rows), texts=[""] * len(rows),
                )
            )  # fmt: skip
    return data.Corpus(name, "train", tasks, "fingerprint")


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
def test_an_epoch_holds_every_sequence_and_both_of_a_pair_in_one_batch(config):
    pairs = random_pairs(33, without_rationale=0.2)
    batches = data.TrainBatches(corpus_of(pairs), config)
    seen = {}
    for number, batch in enumerate(batches.iterate(data.Position(0, 0), epochs=1)):
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


def test_pairs_per_step_is_exact_and_counts_add_up():
    pairs = random_pairs(33)
    batches = data.TrainBatches(corpus_of(pairs), pairs_config(5))
    for batch in batches.iterate(data.Position(0, 0), epochs=1):
        found = segments(batch.arrays)
        assert batch.examples == 5 and len(found) == 10
        real = sum(int((batch.arrays[k] > 0).sum())
                   for k in ("encoder_input_tokens", "decoder_target_tokens"))  # fmt: skip
        assert batch.tokens == real
        np.testing.assert_array_equal(
            batch.arrays["decoder_loss_weights"], batch.arrays["decoder_target_tokens"] > 0
        )


def test_without_shuffling_every_example_comes_exactly_once():
    pairs = random_pairs(33)
    for config in (pairs_config(5), rows_config(6)):
        batches = data.TrainBatches(corpus_of(pairs), config)
        examples = [
            int(inputs[0]) - 2
            for batch in batches.iterate(data.Position(0, 0), shuffle=False, epochs=1)
            for inputs, *_ in segments(batch.arrays)
        ]
        assert sorted(examples) == sorted(list(range(33)) * 2)


def test_fewer_examples_than_a_step_needs_are_repeated():
    batches = data.TrainBatches(corpus_of(random_pairs(3)), pairs_config(8))
    batch = next(batches.iterate(data.Position(0, 0)))
    assert batch.examples == 8 and len(segments(batch.arrays)) == 16


@pytest.mark.parametrize("config", [pairs_config(5), rows_config(6)], ids=["pairs", "rows"])
def test_resuming_at_a_position_gives_the_same_batches(config):
    corpus = corpus_of(random_pairs(33))
    feed = data.TrainBatches(corpus, config).iterate(data.Position(0, 0))
    whole = [next(feed) for _ in range(14)]  # two epochs
    assert whole[-1].next.epoch >= 1
    for stop in (1, 6, 7, 8):
        feed = data.TrainBatches(corpus, config).iterate(whole[stop - 1].next)
        for batch in whole[stop:]:
            again = next(feed)
            assert again.next == batch.next
            for key, value in batch.arrays.items():
                np.testing.assert_array_equal(again.arrays[key], value)


def test_epochs_and_seeds_differ_in_order():
    corpus = corpus_of(random_pairs(40))
    batches = data.TrainBatches(corpus, pairs_config(5))
    other = data.TrainBatches(corpus, pairs_config(5, seed=1))
    assert batches.plan(0).batches != batches.plan(1).batches
    assert batches.plan(0).batches != other.plan(0).batches


def test_hosts_share_the_rows_of_one_batch():
    corpus = corpus_of(random_pairs(33))
    batches = data.TrainBatches(corpus, rows_config(6), row_multiple=2)
    whole = next(batches.iterate(data.Position(0, 0)))
    shares = [
        next(batches.iterate(data.Position(0, 0), process_index=i, process_count=2))
        for i in range(2)
    ]
    for key, value in whole.arrays.items():
        np.testing.assert_array_equal(np.concatenate([s.arrays[key] for s in shares]), value)


def test_cutting_keeps_eos_and_is_counted():
    pairs = [{"label": (np.array([5, 6, 7, 8, 9, 1], np.int32), np.array([4, 1], np.int32))}]
    config = pairs_config(1, feature_lengths=dict(inputs=4, targets=8))
    batches = data.TrainBatches(corpus_of(pairs), config)
    inputs, *_ = segments(next(batches.iterate(data.Position(0, 0))).arrays)[0]
    np.testing.assert_array_equal(inputs, [5, 6, 7, 1])
    assert batches.truncated == {"inputs": 1, "targets": 0}


def test_subset_is_drawn_by_the_seed():
    corpus = corpus_of(random_pairs(40))

    def chosen(seed):
        batches = data.TrainBatches(corpus, pairs_config(8, num_train_examples=8, seed=seed))
        assert batches.num_pairs == 8
        batch = next(batches.iterate(data.Position(0, 0)))
        return {int(inputs[0]) for inputs, *_ in segments(batch.arrays)}

    assert chosen(0) == chosen(0) != chosen(1)
    with pytest.raises(ValueError, match="NUM_TRAIN_EXAMPLES=41.*40 examples"):
        data.TrainBatches(corpus, pairs_config(8, num_train_examples=41))


def test_packing_is_dense():
    pairs = random_pairs(400)
    config = pairs_config(64)
    batches = data.TrainBatches(corpus_of(pairs), config)
    plan = batches.plan(0)
    tokens = sum(batches.tokens(rows) for rows in plan.batches)
    room = plan.rows * len(plan.batches) * sum(batches.capacity.values())
    assert tokens / room > 0.75
    longest = {"inputs": 20, "targets": 12}
    assert all(batches.capacity[k] >= v for k, v in longest.items())


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


def test_batch_size_must_divide_by_the_devices():
    with pytest.raises(ValueError, match="BATCH_SIZE=6.*4"):
        data.TrainBatches(corpus_of(random_pairs(5)), rows_config(6), row_multiple=4)


# --- The cache ------------------------------------------------------------------------------------

TOY_TASKS = """
import dataclasses, pathlib
from distill import metrics, task

@dataclasses.dataclass(frozen=True)
class Lines:
    splits = ("train", "validation")
    def files(self, split):
        return [str(pathlib.Path(task.data_dir()) / f"{split}.txt")]
    def rows(self, split):
        lines = pathlib.Path(self.files(split)[0]).read_text().splitlines()
        return [task.Row(f"toy/{split}/{i}", line, line[::-1], rationale=line.upper())
                for i, line in enumerate(lines)]

task.register("toy", source=Lines(), metric_fns=[metrics.label_accuracy])
"""

PROBE = """
import json, sys
from distill import data
config = data.DataConfig("toy_step_by_step", "toy_tasks", data_dir=sys.argv[1],
                         cache_dir=sys.argv[2])
corpus = data.load(config, sys.argv[3])
print(json.dumps({"tensorflow": "tensorflow" in sys.modules, "rows": [len(t) for t in corpus.tasks],
                  "fingerprint": corpus.fingerprint, "labels": corpus.tasks[0].labels[:1]}))
"""


def probe(folder, split="train"):
    result = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder / "data"), str(folder / "cache"), split],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip
    if result.returncode:
        return result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_fresh_cache_needs_no_tensorflow_and_a_stale_one_is_rebuilt(tmp_path):
    (tmp_path / "toy_tasks.py").write_text(TOY_TASKS)
    (tmp_path / "data").mkdir()
    rows = tmp_path / "data" / "train.txt"
    rows.write_text("abc\ndef\n")
    cold = probe(tmp_path)
    assert cold["rows"] == [2, 2] and cold["labels"] == ["cba"]
    assert not cold["tensorflow"]  # tokenising has a process of its own
    built = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("manifest.json")}
    assert probe(tmp_path) == cold
    assert built == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("manifest.json")}
    # A comment in the task module: read again, the same rows.
    (tmp_path / "toy_tasks.py").write_text(TOY_TASKS + "\n# a comment\n")
    assert probe(tmp_path) == cold
    # Other rows: read again, another fingerprint.
    rows.write_text("abc\ndef\nghi\n")
    changed = probe(tmp_path)
    assert changed["rows"] == [3, 3] and changed["fingerprint"] != cold["fingerprint"]
    assert "no split 'test'" in probe(tmp_path, "test")
    rows.unlink()
    assert "train.txt" in probe(tmp_path)


def test_fingerprint_names_what_decides_the_batches():
    corpus = corpus_of(random_pairs(9))
    base = pairs_config(4)
    batches = data.TrainBatches(corpus, base)
    before = batches.fingerprint(corpus)
    for change, key in [
        (dict(seed=1), "seed"),
        (dict(pairs_per_step=8), "pairs_per_step"),
        (dict(num_train_examples=5), "num_train_examples"),
        (dict(feature_lengths=dict(inputs=96, targets=64)), "lengths"),
    ]:
        config = dataclasses.replace(base, **change)
        after = data.TrainBatches(corpus, config).fingerprint(corpus)
        assert {k for k in after if after[k] != before.get(k)} == {key}
