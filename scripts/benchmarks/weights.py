r"""What importing a checkpoint costs: host memory beyond the parameters, and time.

    python scripts/benchmarks/weights.py --model=t5_1_1/xl --dtype=bfloat16

The checkpoint is a Hugging Face folder of the model's size whose arrays are holes in a sparse file:
zeros that take no space on the disk. Linux only: memory is what /proc says is the process's own, so
without the pages of the mapped file, which the system takes back when it wants.
"""

import json
import os
import struct
import tempfile
import threading
import time

import jax
import numpy as np
from absl import app, flags

from distill import configure, convert, partitioning, students, t5
from distill.formats import t5x, tensors

_MODEL = flags.DEFINE_enum("model", "t5_1_1/large", sorted(convert.RELEASED), "Model file.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the file.")


def write(folder: str, model: t5.T5Config, dtype: str) -> None:
    """A Hugging Face folder of zeros."""
    shapes = t5x.flatten(t5.param_shapes(model))
    ours = {
        name: tensors.Tensor(x.shape, np.dtype(np.float32), lambda _: None)
        for name, x in shapes.items()
    }
    header, end = {}, 0
    for name, tensor in convert.from_ours(ours, "torch").items():
        start, end = end, end + tensor.nbytes // (2 if dtype == "bfloat16" else 1)
        header[name] = {
            "dtype": {"float32": "F32", "bfloat16": "BF16"}[dtype],
            "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(folder, "model.safetensors"), "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    proj = "gated-gelu" if len(model.mlp_activations) == 2 else "relu"
    config = {"model_type": "t5", "feed_forward_proj": proj}
    config["tie_word_embeddings"] = model.logits_via_embedding
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(config, file)


def own_memory() -> float:
    """Anonymous memory of this process, GB."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1e6


def run(argv):
    del argv
    model = convert.released_config(_MODEL.value)
    with tempfile.TemporaryDirectory() as folder:
        write(folder, model, _DTYPE.value)
        weights = convert.open_weights(folder)
        mesh = partitioning.make_mesh(partitioning.MeshConfig())
        abstract = students.abstract_params(t5.T5(model), mesh)
        before, peak, done = own_memory(), [0.0], threading.Event()

        def watch():
            while not done.wait(0.005):
                peak[0] = max(peak[0], own_memory())

        watcher = threading.Thread(target=watch)
        watcher.start()
        start = time.monotonic()
        params = jax.block_until_ready(convert.load(weights, model, abstract))
        seconds = time.monotonic() - start
        done.set()
        watcher.join()
    sizes = [x.nbytes / 1e9 for x in jax.tree.leaves(params)]
    print(
        f"{_MODEL.value} from {_DTYPE.value}: parameters {sum(sizes):.2f} GB, largest array "
        f"{max(sizes):.2f}; peak beyond the parameters {peak[0] - before - sum(sizes):.2f} GB, "
        f"{seconds:.1f} s"
    )


def main(argv):
    configure.run_main(run, argv)


if __name__ == "__main__":
    app.run(main)
