r"""This trainer's step beside the published method's, on the same examples.

    python scripts/benchmarks/train_step.py --data_dir=/data --vocabulary=/data/spiece.model \
        --model=t5_1_1/small --pairs=64

  ours     what `published.gin` runs: rows from the cache, packed, micro-batches as training chooses
           them, AdamW, the state donated
  torch    the published method with transformers (`published_step`): two padded forward passes,
           where torch and transformers are installed
  compute  ours on one batch that stays on the device: without the input pipeline
  loader   the input pipeline alone: batches a second
  product  a bare matrix product of T5 small's shapes in XLA and in torch, float32 and bfloat16

torch has the weights that ours start from, by way of our export, and runs in a process of its own;
on a CPU both have malloc told to keep freed memory. Contestants take turns, a step each; step k of
both takes the same examples. A time is from the batch (ours, which the loader reads ahead) or the
token ids (torch, padding included) to updated parameters; the row `loader` has what a batch costs.
Before the first update both compute the loss of the first step's pairs without dropout: "loss
equality" is their relative difference. Tokens are those that are not padding, inputs and targets
together. Memory is the process's high-water mark, on a GPU the device's peak. CPU seconds are those
of all cores together; on a machine that others use they vary less.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import tempfile

# Before jax: torch shall find memory on the same device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import published_step
import record
from absl import app, flags

from distill import (
    cache,
    configure,
    data,
    export,
    objectives,
    packing,
    partitioning,
    t5,
    train,
    vocabulary,
)  # fmt: skip

_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of the datasets [DISTILL_DATA_DIR].")
_VOCABULARY = flags.DEFINE_string("vocabulary", None, "'bytes' or a SentencePiece model.")
_CACHE_DIR = flags.DEFINE_string("cache_dir", None, "Of tokenised rows [DISTILL_CACHE_DIR].")
_MIXTURE = flags.DEFINE_string("mixture", "cqa_step_by_step", "What to train on.")
_MODEL = flags.DEFINE_string("model", "t5_1_1/small", "Model file, without .gin.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "To compute with.")
_PAIRS = flags.DEFINE_integer("pairs", 64, "Examples of a step.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each contestant.", lower_bound=1)
_PRODUCTS = flags.DEFINE_integer("products", 40, "Matrix products of a turn.", lower_bound=1)
_JSON = flags.DEFINE_string("json", None, "File for every measurement.")

# Tokens by width of the residual stream, by width of T5 1.1 small's feed-forward block.
SHAPE = (4096, 512, 1024)
LOADER_BATCHES = 16  # of a turn; more than the loader reads ahead


def given() -> dict:
    """What `published.gin` gives training."""
    settings = {
        "MODEL_DIR": "unused", "MIXTURE_OR_TASK_NAME": _MIXTURE.value, "DTYPE": _DTYPE.value,
        "PAIRS_PER_STEP": _PAIRS.value, "DATA_DIR": _DATA_DIR.value,
        "VOCABULARY": _VOCABULARY.value, "CACHE_DIR": _CACHE_DIR.value,
    }  # fmt: skip
    bindings = [f"{name}={value}" for name, value in settings.items() if value is not None]
    files = [f"{_MODEL.value}.gin", "published.gin"]
    return configure.resolve(train.train, files, bindings).arguments()


@dataclasses.dataclass
class Turns:
    """What a contestant took, a number for each turn."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    peak_bytes: int | None = None

    def add(self, seconds: float, cpu_seconds: float, tokens: int, positions: int) -> None:
        self.seconds.append(seconds)
        self.cpu_seconds.append(cpu_seconds)
        self.tokens.append(tokens)
        self.positions.append(positions)

    def row(self, name: str) -> dict:
        """Medians of the turns; rates are medians of those of the turns."""
        each = list(zip(self.seconds, self.tokens, self.positions, strict=True))
        return {
            "name": name,
            "seconds_per_step": record.median(self.seconds),
            "pairs_per_second": record.median([_PAIRS.value / s for s, _, _ in each]),
            "tokens_per_second": record.median([t / s for s, t, _ in each]),
            "padding": record.median([1 - t / p for _, t, p in each]),
            "peak_bytes": self.peak_bytes,
            "cpu_seconds_per_step": record.median(self.cpu_seconds),
            "turns": {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds},
        }


class Ours:
    """Training as `train` runs it on one device, a step at a time."""

    def __init__(self):
        arguments = given()
        self.model: t5.T5Config = arguments["model"]
        self.objective: objectives.StepByStep = arguments["objective"]
        self.optimizer = arguments["optimizer"]
        config = arguments["data"]
        known = vocabulary.load(config.vocabulary).size
        if known > self.model.vocab_size:
            raise ValueError(
                f"--vocabulary={config.vocabulary} has {known} ids, {_MODEL.value} only "
                f"{self.model.vocab_size}: choose a larger --model."
            )
        self.corpus = cache.load(config, "train")
        self.objective.check_groups(self.corpus.loss_groups, self.corpus.name)
        self.mesh = partitioning.make_mesh(partitioning.MeshConfig(data=1), jax.devices()[:1])
        batches = data.TrainBatches(self.corpus, config, packing.Flops.of(self.model))
        self.parts = train.auto_microbatches(batches)
        self.batches = batches.with_row_multiple(self.parts)
        self.rows, self.lengths = self.batches.plan(0).rows, self.batches.capacity
        objective = train.in_slices(
            self.objective, self.rows / self.parts, self.lengths["targets"], self.model.vocab_size
        )
        net, tx = t5.T5(self.model), self.optimizer.build(1000)
        self.step = train.jit_step(net, objective, tx, self.parts)
        self.params = jax.jit(lambda key: t5.init_params(self.model, key))(jax.random.key(0))
        self.state = train.TrainState(jnp.int32(0), self.params, jax.jit(tx.init)(self.params))
        self.rng = jax.random.key(0)
        self.feed = self.batches.iterate(data.Position())
        self.eval_step = jax.jit(functools.partial(train.eval_step, net=net, objective=objective))

    @property
    def positions(self) -> int:
        """Of a step, padding included."""
        return self.rows * sum(self.lengths.values())

    def loss(self, batch: data.Batch) -> dict:
        """Without dropout, of the parameters before any update."""
        arrays = partitioning.shard_batch(self.mesh, batch.arrays)
        sums, counts = self.eval_step(self.state.params, arrays)
        found = objectives.summarize(self.objective, sums, counts)
        parts = [float(found[f"cross_ent_loss/{name}"]) for name in objectives.LOSS_GROUPS]
        return {"loss": float(found["loss"]), "parts": parts}

    def update(self, arrays: dict) -> None:
        self.state, scalars = self.step(self.state, arrays, self.rng)
        jax.block_until_ready((self.state, scalars))

    def turn(self, turns: Turns) -> data.Batch:
        """One step from rows to parameters."""
        start = record.clock()
        batch = next(self.feed)
        self.update(partitioning.shard_batch(self.mesh, batch.arrays))
        end = record.clock()
        turns.add(end[0] - start[0], end[1] - start[1], batch.tokens, self.positions)
        return batch

    def compute_turn(self, turns: Turns, arrays: dict, tokens: int) -> None:
        """One step of a batch that is on the device."""
        start = record.clock()
        self.update(arrays)
        end = record.clock()
        turns.add(end[0] - start[0], end[1] - start[1], tokens, self.positions)

    def examples(self, batch: data.Batch) -> published_step.Batch:
        """The examples of a batch as token ids."""
        return published_step.examples_of(self.batches, batch)

    def peak(self) -> int:
        """Bytes: of the device where it tells, else of the process."""
        stats = jax.devices()[0].memory_stats() or {}
        return stats.get("peak_bytes_in_use") or record.peak_rss()


def batches_per_second(ours: Ours) -> dict:
    """The loader alone, medians over rounds: batches, and tokens that are not padding."""
    feed = ours.batches.iterate(data.Position())
    rates, tokens = [], []
    for number in range(_ROUNDS.value + 1):
        start, seen = record.clock(), 0
        for _ in range(LOADER_BATCHES):
            seen += next(feed).tokens
        seconds = record.clock()[0] - start[0]
        if number:  # the first plans the epoch
            rates.append(LOADER_BATCHES / seconds)
            tokens.append(seen / seconds)
    return {
        "name": "loader", "batches_per_second": record.median(rates),
        "tokens_per_second": record.median(tokens), "turns": {"batches_per_second": rates},
    }  # fmt: skip


class Product:
    """A matrix product in XLA, on the first device."""

    def __init__(self, dtype: str):
        m, k, n = SHAPE
        draw = np.random.default_rng(0)
        self.a, self.b = (jnp.asarray(draw.standard_normal(s), dtype) for s in ((m, k), (k, n)))
        self.multiply = jax.jit(jnp.matmul)

    def seconds(self) -> float:
        start = record.clock()
        for _ in range(_PRODUCTS.value):
            result = self.multiply(self.a, self.b)
        jax.block_until_ready(result)
        return record.clock()[0] - start[0]


def measure(ours: Ours, theirs: published_step.Published | None) -> dict:
    """All contestants' turns; returns the result as it is saved."""
    first = next(ours.feed)
    result: dict = {"loss": {"ours": ours.loss(first)}}
    if theirs:
        other = result["loss"]["torch"] = theirs.ask("loss", batch=ours.examples(first))
        mine = result["loss"]["ours"]["loss"]
        result["loss"]["relative_difference"] = abs(mine - other["loss"]) / abs(other["loss"])

    turns = {name: Turns() for name in ("ours", "torch", "compute")}
    fixed = partitioning.shard_batch(ours.mesh, first.arrays)
    products = {dtype: Product(dtype) for dtype in ("float32", "bfloat16")}
    rates: dict[str, list[float]] = {}
    flop = 2 * np.prod(SHAPE, dtype=float) * _PRODUCTS.value / 1e9
    for number in range(_ROUNDS.value + 1):
        if number == 1:  # the first round compiles and touches memory for the first time
            turns, rates = {name: Turns() for name in turns}, {}
        batch = ours.turn(turns["ours"])
        if theirs:
            took = theirs.ask("steps", batches=[ours.examples(batch)])
            turns["torch"].add(took["wall"], took["cpu"], batch.tokens, took["positions"])
        ours.compute_turn(turns["compute"], fixed, first.tokens)
        for dtype, product in products.items():
            rates.setdefault(f"XLA {dtype}", []).append(flop / product.seconds())
            if theirs:
                took = theirs.ask("products", shape=SHAPE, dtype=dtype, times=_PRODUCTS.value)
                rates.setdefault(f"torch {dtype}", []).append(flop / took["wall"])
    turns["ours"].peak_bytes = ours.peak()
    if theirs:
        memory = theirs.ask("memory")
        turns["torch"].peak_bytes = memory["device"] or memory["rss"]
        pairs = zip(turns["torch"].seconds, turns["ours"].seconds, strict=True)
        result["ratio"] = [torch / ours for torch, ours in pairs]
        result["median_ratio"] = record.median(result["ratio"])
    result["steps"] = [column.row(name) for name, column in turns.items() if column.seconds]
    result["loader"] = batches_per_second(ours)
    result["products"] = [
        {"name": name, "gflops_per_second": record.median(values), "turns": values}
        for name, values in rates.items()
    ]
    return result


def show(result: dict) -> None:
    """The result as text."""
    setting, loss = result["setting"], result["loss"]
    print(f"{_MODEL.value}, {_DTYPE.value}, {_PAIRS.value} pairs of {_MIXTURE.value}: "
          f"{setting['rows']} rows of {setting['inputs']} + {setting['targets']} tokens, "
          f"{setting['microbatches']} micro-batches; {_ROUNDS.value} rounds")  # fmt: skip
    if "torch" in loss:
        print(f"loss equality: ours {loss['ours']['loss']:.6f}, torch {loss['torch']['loss']:.6f}, "
              f"relative difference {loss['relative_difference']:.1e}")  # fmt: skip
    names = ("seconds_per_step", "pairs_per_second", "tokens_per_second", "padding", "peak_bytes",
             "cpu_seconds_per_step")  # fmt: skip
    head = ("", "s/step", "pairs/s", "tokens/s", "padding", "peak MB", "CPU s/step")
    rows = [[row["name"], *(row[name] for name in names)] for row in result["steps"]]
    for row in rows:
        row[5] = row[5] and row[5] / 1e6
    print(record.table(head, rows))
    if "ratio" in result:
        print(f"torch's time over ours {result['median_ratio']:.2f} (by round "
              f"{', '.join(f'{r:.2f}' for r in result['ratio'])})")  # fmt: skip
    loader = result["loader"]
    print(f"loader alone: {loader['batches_per_second']:.1f} batches/s, "
          f"{loader['tokens_per_second']:,.0f} tokens/s")  # fmt: skip
    rows = [(row["name"], row["gflops_per_second"]) for row in result["products"]]
    print(record.table((f"product {list(SHAPE)}", "GFLOP/s"), rows))


def run(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        train.keep_freed_memory()
    if _DTYPE.value == "float32":  # as torch multiplies float32; a GPU would take fewer bits
        jax.config.update("jax_default_matmul_precision", "highest")
    ours, theirs = Ours(), None
    with tempfile.TemporaryDirectory() as temporary:
        if all(map(importlib.util.find_spec, ("torch", "transformers"))):
            folder = pathlib.Path(temporary) / "weights"
            export.save_hugging_face(folder, jax.device_get(ours.params), ours.model)
            theirs = published_step.Published(
                published_step.Settings(
                    weights=str(folder), dtype=_DTYPE.value, keep_freed_memory=on_cpu,
                    learning_rate=ours.optimizer.learning_rate, alpha=ours.objective.alpha,
                )
            )  # fmt: skip
            print("torch:", theirs.facts, flush=True)
        else:
            print("torch: left out, since torch and transformers are not installed")
        ours.params = None  # the state has them, and donates them
        try:
            measured = measure(ours, theirs)
        finally:
            if theirs:
                theirs.close()
    setting = {
        "model": _MODEL.value, "dtype": _DTYPE.value, "mixture": _MIXTURE.value,
        "pairs": _PAIRS.value, "rounds": _ROUNDS.value, "rows": ours.rows, **ours.lengths,
        "microbatches": ours.parts, "torch": theirs and theirs.facts,
    }  # fmt: skip
    about = record.about(("torch", "transformers"), jax.devices()[0].device_kind)
    result = {"about": about, "setting": setting, **measured}
    show(result)
    record.save(_JSON.value, result)


def main(argv):
    configure.run_main(run, argv)


if __name__ == "__main__":
    app.run(main)
