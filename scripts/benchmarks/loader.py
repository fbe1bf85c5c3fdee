r"""How fast batches come from a warm row cache: plan, resume, tokens per second.

    python scripts/benchmarks/loader.py --examples=550000

Writes a cache of made-up pairs with the lengths of e-SNLI (input and target tokens of a predict and
an explain sequence, drawn evenly around the means of its validation split), keeps it for the next
call, and prints

  plan     seconds to plan a whole epoch
  resume   seconds from opening the cache to the batch after step 100,000
  tokens/s that are not padding, from the loader alone: threads on one core, and 1 and 2 loader
           processes on as many cores (Linux only), medians of interleaved rounds
"""

import os
import pathlib
import time

import numpy as np
import record
from absl import app, flags

from distill import cache, data

_EXAMPLES = flags.DEFINE_integer("examples", 550_000, "Pairs of the corpus.", lower_bound=100)
_FOLDER = flags.DEFINE_string("folder", "/tmp/loader_benchmark", "Where the corpus is kept.")
_SECONDS = flags.DEFINE_float("seconds", 5.0, "How long each measurement runs.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds of measurements.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Rows of a batch.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File for every measurement.")

LENGTHS = {"inputs": 352, "targets": 120}  # proposed for e-SNLI and T5 base


def corpus(examples: int, folder: pathlib.Path) -> cache.Corpus:
    """A corpus of pairs of random tokens."""
    folder = folder / str(examples)
    found = list(folder.glob("*/manifest.json"))
    if found:
        return cache.open_generation(found[0].parent)
    print(f"writing {examples:,} pairs to {folder} ...", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    ids = [f"made_up/train/{i}" for i in range(examples)]

    def rows(group: int):
        rng = np.random.default_rng(group)
        inputs = rng.integers(12, 54, examples)
        targets = rng.integers(*((2, 5), (6, 28))[group], examples)
        for i in range(examples):
            yield {
                "inputs": rng.integers(3, 8000, inputs[i]),
                "targets": rng.integers(3, 8000, targets[i]),
                "example_id": ids[i], "label": "neutral", "inputs_pretokenized": "x" * 120,
                "loss_group": group, "choice": 0, "loss_weight": 1000,
            }  # fmt: skip

    members = [
        (dict(name=name, rate=1.0, metrics=[], dataset="made_up", answer_form="label"), ids,
         rows(group))
        for group, name in enumerate(("made_up_predict", "made_up_explain"))
    ]  # fmt: skip
    return cache.open_generation(
        folder / cache.write_generation(folder, "made_up_step_by_step", "train", members)
    )


def batches_of(folder: pathlib.Path, processes: int = 0) -> data.TrainBatches:
    config = data.DataConfig(
        "made_up_step_by_step", batch_size=_BATCH_SIZE.value, feature_lengths=LENGTHS,
        loader_processes=processes,
    )  # fmt: skip
    return data.TrainBatches(cache.open_generation(folder), config)


def tokens_per_second(folder: pathlib.Path, processes: int, cores: int) -> float:
    """Real tokens per second after the first batches, on so many cores."""
    everything = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(everything)[:cores])
    try:
        feed = batches_of(folder, processes).iterate(data.Position())
        for _ in range(16):  # past the start of processes and the first plan
            next(feed)
        started, tokens = time.monotonic(), 0
        while time.monotonic() - started < _SECONDS.value:
            tokens += next(feed).tokens
        return tokens / (time.monotonic() - started)
    finally:
        os.sched_setaffinity(0, everything)


def main(argv):
    del argv
    import grain  # noqa: F401 - once, before anything is timed

    folder = corpus(_EXAMPLES.value, pathlib.Path(_FOLDER.value)).folder
    batches = batches_of(folder)

    started = time.monotonic()
    plans = [batches.plan(0, shard) for shard in range(batches.num_shards)]
    result = record.about(("grain", "array_record")) | {
        "examples": batches.num_pairs, "batches": sum(map(len, plans)),
        "shards": batches.num_shards, "plan_seconds": time.monotonic() - started,
    }  # fmt: skip

    # Where step 100,000 lies: the checkpoint knows; here it is found from the plans.
    epoch, rest = divmod(100_000, sum(map(len, plans)))
    shard = 0
    while rest >= len(plans[shard]):
        rest, shard = rest - len(plans[shard]), shard + 1
    started = time.monotonic()
    next(batches_of(folder).iterate(data.Position(epoch, rest, shard)))
    result["resume_seconds"] = time.monotonic() - started
    rows = [
        (f"plan of {result['examples']:,} examples, s", result["plan_seconds"]),
        ("from opening to the batch after step 100,000, s", result["resume_seconds"]),
    ]

    ways = [("threads, 1 core", 0, 1), ("1 process, 1 core", 1, 1), ("2 processes, 2 cores", 2, 2)]
    if not hasattr(os, "sched_setaffinity"):
        print("tokens/s: left out, it needs sched_setaffinity (Linux)")
        ways = []
    ways = [way for way in ways if way[2] <= len(os.sched_getaffinity(0))]
    rounds = [[tokens_per_second(folder, *way[1:]) for way in ways] for _ in range(_ROUNDS.value)]
    result["tokens_per_second"] = {
        way[0]: list(speeds) for way, speeds in zip(ways, zip(*rounds, strict=True), strict=False)
    }
    for name, speeds in result["tokens_per_second"].items():
        rows.append((f"{name}, tokens/s", record.median(speeds)))
    if len(ways) == 3:
        rows.append(("from 1 to 2 cores, x", record.median([b / a for _, a, b in rounds])))
    print(record.table(("", "median"), rows))
    record.save(_JSON.value, result)


if __name__ == "__main__":
    app.run(main)
