r"""What packing wastes: padding to the longest, SeqIO's packing, and this project's, side by side.

    python scripts/benchmarks/packing.py --data_dir=/data --vocabulary=/data/spiece.model \
        --tasks=cqa_step_by_step/train,svamp_step_by_step/train,esnli_step_by_step/validation

Prints, for each task and model size, FLOPs computed over FLOPs needed (a forward pass; training
takes three times both), where a real token needs its projections and attention inside its own
sequence, and a packed or padded row computes attention over all of its positions. SeqIO packs with
its own code (`seqio.utils.trim_and_pack_dataset`). Padding to the longest is per batch and stream,
as in the published code. "Epoch" has the last batch of an epoch filled up with repeated examples.
"""

import dataclasses

import numpy as np
from absl import app, flags

from distill import cache, data, packing, t5

_TASKS = flags.DEFINE_list(
    "tasks", ["arithmetic_step_by_step/train"], "NAME/SPLIT of step-by-step mixtures."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of the datasets [DISTILL_DATA_DIR].")
_VOCABULARY = flags.DEFINE_string("vocabulary", None, "'bytes' or a SentencePiece model.")
_CACHE_DIR = flags.DEFINE_string("cache_dir", None, "Of tokenised rows [DISTILL_CACHE_DIR].")
_ROWS = flags.DEFINE_integer("batch_size", 128, "Rows of a packed batch.", lower_bound=1)
_PAIRS = flags.DEFINE_integer("pairs", 64, "Examples of a padded batch.", lower_bound=1)
_SEQIO = flags.DEFINE_list("seqio_lengths", ["512/256", "256/128"], "INPUTS/TARGETS for SeqIO.")

# gin_configs/models/t5_1_1, with a vocabulary of 8,064 (8,000 ids, padded).
SIZES = {
    "small": dict(emb_dim=512, num_heads=6, head_dim=64, mlp_dim=1024, layers=8),
    "base": dict(emb_dim=768, num_heads=12, head_dim=64, mlp_dim=2048, layers=12),
    "xl": dict(emb_dim=2048, num_heads=32, head_dim=64, mlp_dim=5120, layers=24),
}


def flops_of(layers: int, **sizes) -> packing.Flops:
    config = t5.T5Config(
        8064, num_encoder_layers=layers, num_decoder_layers=layers, dropout_rate=0.0, **sizes
    )
    return packing.Flops.of(config)


def padded(lengths: np.ndarray, pairs: int, flops: packing.Flops) -> float:
    """FLOPs of batches that are padded to their longest, one pass for each stream."""
    total = 0.0
    for start in range(0, len(lengths), pairs):
        for member in np.moveaxis(lengths[start : start + pairs], 1, 0):
            present = member[member.any(axis=1)]
            if len(present):
                total += len(present) * float(flops.row(*present.max(axis=0)))
    return total


def seqio_rows(lengths: np.ndarray, capacity: tuple[int, int]) -> int:
    """Rows that SeqIO packs the sequences into, in their order."""
    import seqio
    import tensorflow as tf

    def examples():
        for inputs, targets in lengths:
            yield {"inputs": np.ones(inputs, np.int32), "targets": np.ones(targets, np.int32)}

    spec = tf.TensorSpec([None], tf.int32)
    dataset = tf.data.Dataset.from_generator(
        examples, output_signature={"inputs": spec, "targets": spec}
    )
    lengths_of = dict(zip(("inputs", "targets"), capacity, strict=True))
    packed = seqio.utils.trim_and_pack_dataset(dataset, lengths_of)
    return sum(1 for _ in packed.as_numpy_iterator())


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; names go to --tasks=a/train,b/test")
    line = "{:<30} {:<6} {:<26} {:>7} {:>7} {:>7}".format
    print(line("task", "model", "layout", "inputs", "targets", "FLOPs"))
    for name, _, split in (task.partition("/") for task in _TASKS.value):
        config = data.DataConfig(
            name, data_dir=_DATA_DIR.value, vocabulary=_VOCABULARY.value,
            cache_dir=_CACHE_DIR.value, batch_size=_ROWS.value,
        )  # fmt: skip
        corpus = cache.load(config, split or "train")
        batches = data.TrainBatches(corpus, config)
        lengths = batches.pair_lengths(np.random.default_rng(0).permutation(batches.num_pairs))
        sequences = lengths.reshape(-1, 2)
        sequences = sequences[sequences.any(axis=1)]
        by_seqio = {
            (inputs, targets): seqio_rows(sequences, (inputs, targets))
            for inputs, targets in (map(int, pair.split("/")) for pair in _SEQIO.value)
        }
        for size, dimensions in SIZES.items():
            flops = flops_of(**dimensions)
            needed = flops.row(sequences[:, 0], sequences[:, 1]).sum()

            def show(layout, waste, what=f"{name}/{split}", size=size):
                print(line(what, size, layout, f"{waste.inputs:.1%}", f"{waste.targets:.1%}",
                           f"{waste.flops:.3f}"), flush=True)  # fmt: skip

            ratio = padded(lengths, _PAIRS.value, flops) / needed
            print(line(f"{name}/{split}", size, f"padded, {_PAIRS.value} pairs", "", "",
                       f"{ratio:.3f}"))  # fmt: skip
            for capacity, rows in by_seqio.items():
                show(f"SeqIO {capacity[0]}/{capacity[1]}",
                     packing.Waste.of(sequences, capacity, rows, flops))  # fmt: skip
            chosen = data.TrainBatches(corpus, dataclasses.replace(config), flops)
            own = f"{chosen.capacity['inputs']}/{chosen.capacity['targets']}"
            show(f"proposed {own}, epoch", chosen.waste(chosen.plan(0), flops))


if __name__ == "__main__":
    app.run(main)
