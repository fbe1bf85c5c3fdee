r"""What a checkpoint costs: how long training stands still, and how long until it is safe.

    python scripts/benchmarks/checkpoint.py --model=t5_1_1/base --optimizer=adamw

  blocking   seconds that the call of `save` takes: training goes on afterwards
  committed  seconds from the call until the manifest is there, which makes it a checkpoint
  restore    seconds to verify and read it back onto the device
  verify     seconds of the sha256 of every file, which is part of the restore, and GB/s

The state is that of training (parameters, slots, step) on one device, with random values in all of
it: zeros, as fresh slots have, would compress. Medians of rounds, each with a new checkpoint; the
first is left out. Files that were just written are read from the system's cache: a restore on
another machine waits for its disk or network besides. --folder says where to write.
"""

import pathlib
import tempfile
import time

import jax
import numpy as np
import record
from absl import app, flags

from distill import checkpoints, configure, optim, partitioning, t5, train

_MODEL = flags.DEFINE_string("model", "t5_1_1/small", "Model file, without .gin.")
_OPTIMIZER = flags.DEFINE_enum("optimizer", "adamw", ["adamw", "adafactor"], "Whose slots to save.")
_FOLDER = flags.DEFINE_string("folder", None, "Where to write; a temporary folder otherwise.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Checkpoints.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File for every measurement.")

NAMES = ("blocking", "committed", "restore", "verify")


def random_state(abstract: train.TrainState, seed: int) -> dict:
    """Random values in the shapes and places of a state."""
    draw = np.random.default_rng(seed)

    def leaf(x):
        if not np.issubdtype(x.dtype, np.floating):
            value = np.full(x.shape, seed, x.dtype)
        else:
            value = draw.standard_normal(x.shape, np.float32).astype(x.dtype)
        return jax.device_put(value, x.sharding)

    tree = {"step": abstract.step, "params": abstract.params, "opt_state": abstract.opt_state}
    return jax.block_until_ready(jax.tree.map(leaf, tree))


def turn(saver: checkpoints.Checkpointer, step: int, state: dict) -> dict[str, float]:
    """One checkpoint, from the call of `save` to a state that was read back."""
    found, start = {}, time.monotonic()
    saver.save(step, state, {"step": step})
    found["blocking"] = time.monotonic() - start
    saver.wait()
    found["committed"] = time.monotonic() - start
    folder = saver.folder / f"checkpoint_{step}"
    files = [path for path in pathlib.Path(folder).rglob("*") if path.is_file()]
    found["bytes"] = sum(path.stat().st_size for path in files)

    start = time.monotonic()
    if problems := checkpoints.verify(folder):
        raise ValueError(f"{folder} is damaged: {problems}")
    found["verify"] = time.monotonic() - start
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    start = time.monotonic()
    restored, _ = checkpoints.restore(folder, target)
    jax.block_until_ready(restored)
    found["restore"] = time.monotonic() - start
    same = jax.tree.map(np.array_equal, jax.device_get(restored), jax.device_get(state))
    if not all(jax.tree.leaves(same)):
        raise ValueError(f"{folder}: what was restored is not what was saved")
    return found


def run(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    settings = ["MODEL_DIR=unused", "MIXTURE_OR_TASK_NAME=arithmetic_step_by_step"]
    model = configure.resolve(
        train.train, [f"{_MODEL.value}.gin", "published.gin"], settings
    ).arguments()["model"]  # fmt: skip
    optimizer = optim.AdamW() if _OPTIMIZER.value == "adamw" else optim.Adafactor()
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=1), jax.devices()[:1])
    abstract = train.abstract_state(t5.T5(model), optimizer.build(10), mesh)
    turns = []
    with (
        tempfile.TemporaryDirectory(dir=_FOLDER.value) as folder,
        checkpoints.Checkpointer(folder, keep=1, keep_best=0) as saver,
    ):
        for number in range(_ROUNDS.value + 1):
            found = turn(saver, number, random_state(abstract, number))
            if number:  # the first makes threads and touches memory
                turns.append(found)
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
    size = record.median([found["bytes"] for found in turns])
    medians = {f"{name}_seconds": record.median([t[name] for t in turns]) for name in NAMES}
    result = {
        "about": record.about(("orbax-checkpoint",), jax.devices()[0].device_kind),
        "setting": {
            "model": _MODEL.value, "optimizer": _OPTIMIZER.value, "rounds": _ROUNDS.value,
            "parameters": t5.param_count(model),
        },
        "state_bytes": state_bytes,
        "bytes": size,
        **medians,
        "verify_gb_per_second": record.median([t["bytes"] / t["verify"] / 1e9 for t in turns]),
        "turns": {name: [t[name] for t in turns] for name in NAMES},
    }  # fmt: skip
    head = ("", "state MB", "on disk MB", "blocking s", "committed s", "restore s", "verify s",
            "verify GB/s")  # fmt: skip
    row = (f"{_MODEL.value}, {_OPTIMIZER.value}", state_bytes / 1e6, size / 1e6, *medians.values(),
           result["verify_gb_per_second"])  # fmt: skip
    print(record.table(head, [row]))
    record.save(_JSON.value, result)


def main(argv):
    configure.run_main(run, argv)


if __name__ == "__main__":
    app.run(main)
