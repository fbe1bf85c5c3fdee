r"""One GPU or TPU: training steps of T5 1.1 base to XXL, and the published method beside them.

    python scripts/benchmarks/accelerator.py --prepare=batches.npz --data_dir=/data \
        --vocabulary=/data/spiece.model                            # where the whole project is
    python scripts/benchmarks/accelerator.py --batches=batches.npz --out=accelerator.jsonl

The second command needs jax, flax, optax and what they bring, and torch and transformers for the
peer; neither SeqIO nor Grain, gin or TensorFlow. Without --batches the batches are made up: lengths
drawn from a seeded generator with the means and spread of CommonsenseQA's, which the table says.

Every row of the table is a process of its own with a time limit, so that one that runs out of
memory costs only itself; its error's first line is kept. A row is written to --out as soon as it is
there. Rows that --out has are not measured again, so a second call goes on where --minutes ended
the first. What matters most comes first.

  product   a large bfloat16 matrix product, whose rate MFU is of
  ours      the step that training runs: seconds (transfer of the batch included), tokens that are
            not padding a second, peak memory of the device, seconds to compile. MFU: the products
            of real tokens (a token attends within its own sequence, three times the forward pass,
            nothing recomputed) over the time and the rate of `product`
  torch     the published method (`published_step`), bfloat16 by autocast, eager or torch.compile,
            on the same examples
  equality  the loss of both from the same weights, float32, no dropout: relative difference

Times are medians of rounds of a few steps, waited for at the end of each; warm-up is left out.
--dry_run takes a tiny model through the same code on a CPU, and lists what needs a GPU as such.
"""

import dataclasses
import datetime
import importlib.util
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

# Where nothing can be installed.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import published_step
import record
from absl import app, flags

from distill import convert, export, objectives, optim, packing, t5, train

_OUT = flags.DEFINE_string("out", "accelerator.jsonl", "JSON lines, one a row; added to.")
_BATCHES = flags.DEFINE_string("batches", None, "File that --prepare wrote.")
_MINUTES = flags.DEFINE_float("minutes", 8, "To end after, about.", lower_bound=0)
_ONLY = flags.DEFINE_list("only", None, "Names of rows; all otherwise.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "A tiny model on the CPU.")
_LIST = flags.DEFINE_bool("list", False, "Print the names of the rows and end.")
_PREPARE = flags.DEFINE_string("prepare", None, "Write real batches to this file and end.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "With --prepare: folder of the datasets.")
_VOCABULARY = flags.DEFINE_string("vocabulary", None, "With --prepare: 'bytes' or a model.")
_MIXTURE = flags.DEFINE_string("mixture", "cqa_step_by_step", "With --prepare: the data.")
_CACHE_DIR = flags.DEFINE_string("cache_dir", None, "With --prepare: of tokenised rows.")
_CASE = flags.DEFINE_string("case", None, "Used by this script itself: the row to measure.")
_RATE = flags.DEFINE_float("rate", None, "Used by this script itself: of `product`.")

ROOT = pathlib.Path(__file__).resolve().parents[2]
BATCHES = 4  # distinct ones of a row; a round takes each once
ROUNDS = 7  # at most
SECONDS = 12.0  # of measured rounds, after which no other begins
PRODUCT = 8192  # rows and columns of the matrix product
TIE = 1e-4  # relative difference of the losses that is rounding
# Least time for which starting another process makes sense.
LEAST_SECONDS = 30
# Of a dry run, whose times mean nothing.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
      name: unique.
      kind: `product`, `ours`, `torch` or `equality`.
      model: a name of `convert.RELEASED`, or `tiny`.
      pairs: of a step.
      dtype: to compute with.
      optimizer: of ours; torch's is AdamW.
      param_dtype: see `T5Config`; so are the next two.
      remat_policy: what the backward pass recomputes.
      attention: `plain` or `fused`.
      num_microbatches: of a step.
      compiled: torch.compile.
      limit: seconds.
    """

    name: str
    kind: str
    model: str = "t5_1_1/large"
    pairs: int = 64
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    param_dtype: str = "float32"
    remat_policy: str = "none"
    attention: str = "plain"
    num_microbatches: int = 1
    compiled: bool = False
    limit: float = 150

    @property
    def needs_gpu(self) -> bool:
        return self.attention == "fused" or self.compiled


def _ours(name: str, model: str, **settings) -> Case:
    return Case(f"ours {name}", "ours", f"t5_1_1/{model}", **settings)


def _torch(name: str, model: str, **settings) -> Case:
    return Case(f"torch {name}", "torch", f"t5_1_1/{model}", **settings)


# What matters most comes first.
CASES = (
    Case("product", "product", limit=90),
    _ours("xl", "xl"),
    _ours("large", "large"),
    _torch("large", "large"),
    _ours("xxl adafactor bf16-params remat=full", "xxl", optimizer="adafactor",
          param_dtype="bfloat16", remat_policy="full", limit=240),
    Case("equality", "equality", "t5_1_1/small", dtype="float32"),
    _torch("large compiled", "large", compiled=True, limit=240),
    _ours("base", "base"),
    _torch("base", "base"),
    _ours("large fused", "large", attention="fused"),
    _ours("xl 256 pairs remat=minimal", "xl", pairs=256, remat_policy="minimal"),
    _ours("large 256 pairs remat=minimal", "large", pairs=256, remat_policy="minimal"),
    _ours("large remat=minimal", "large", remat_policy="minimal"),
    _ours("large remat=full", "large", remat_policy="full"),
    _ours("large 4 micro-batches", "large", num_microbatches=4),
    _ours("xl fused", "xl", attention="fused"),
    _torch("xl", "xl"),
    _ours("xl adafactor", "xl", optimizer="adafactor"),
    _ours("xxl adafactor bf16-params remat=full 256 pairs", "xxl", pairs=256, limit=240,
          optimizer="adafactor", param_dtype="bfloat16", remat_policy="full"),
    _torch("base compiled", "base", compiled=True, limit=240),
)  # fmt: skip
_TINY = dict(model="tiny", pairs=4, dtype="float32")
DRY_CASES = (
    Case("product", "product", dtype="float32"),
    Case("ours tiny", "ours", **_TINY),
    Case("torch tiny", "torch", **_TINY),
    Case("equality", "equality", **_TINY),
    Case("ours tiny adafactor bf16-params remat=full", "ours", optimizer="adafactor",
         remat_policy="full", param_dtype="bfloat16", **_TINY),
    Case("ours tiny 2 micro-batches", "ours", num_microbatches=2, **_TINY),
    Case("ours tiny fused", "ours", attention="fused", **_TINY),
    Case("torch tiny compiled", "torch", compiled=True, **_TINY),
)  # fmt: skip


def model_of(case: Case) -> t5.T5Config:
    """The student of a row."""
    if case.model == "tiny":
        model = t5.T5Config(384, emb_dim=64, num_heads=4, num_encoder_layers=3,
                            num_decoder_layers=2, head_dim=16, mlp_dim=128)  # fmt: skip
    else:
        model = convert.released_config(case.model)
    return dataclasses.replace(
        model, dtype=case.dtype, param_dtype=case.param_dtype, remat_policy=case.remat_policy,
        attention=case.attention,
    )  # fmt: skip


# --- Batches --------------------------------------------------------------------------------------

Arrays = dict[str, np.ndarray]


def key_of(case: Case, number: int, name: str) -> str:
    """Where an array of a batch is in the file."""
    return f"{case.model}:{case.pairs}:{number}:{name}"


def padded(examples: published_step.Batch) -> Arrays:
    """The peer's arrays, `<stream>:<inputs|targets>`, int32 [pairs, longest], 0 = padding."""
    found = {}
    for stream, sequences in examples.items():
        for side, rows in zip(("inputs", "targets"), zip(*sequences, strict=True), strict=True):
            array = np.zeros((len(rows), max(map(len, rows))), np.int32)
            for place, row in zip(array, rows, strict=True):
                place[: len(row)] = row
            found[f"{stream}:{side}"] = array
    return found


def examples_in(arrays: Arrays) -> published_step.Batch:
    """The peer's batch from its arrays."""

    def rows(name: str) -> list[list[int]]:
        return [row[row > 0].tolist() for row in arrays[name]]

    return {
        stream: list(zip(rows(f"{stream}:inputs"), rows(f"{stream}:targets"), strict=True))
        for stream in published_step.STREAMS
    }


def made_up(case: Case) -> Iterator[tuple[Arrays, published_step.Batch]]:
    """Batches of random tokens with the lengths of CommonsenseQA, packed as training packs them.

    Of its 8,766 training examples with 8,000 pieces: inputs 47.0 +- 7.7 tokens, at least 30; labels
    2.6; rationales 31.4 +- 5.1, at least 20.
    """
    model, draw = model_of(case), np.random.default_rng(0)
    n = max(512, BATCHES * case.pairs)
    inputs = 30 + np.rint(draw.gamma(4.87, 3.49, n))
    labels, rationales = 2 + draw.poisson(0.6, n), 20 + np.rint(draw.gamma(4.9, 2.33, n))
    lengths = np.stack([[inputs, labels], [inputs, rationales]]).transpose(2, 0, 1).astype(int)
    best = packing.propose_lengths(lengths, packing.Flops.of(model), pairs=case.pairs)[0]
    capacity = np.array([best.inputs, best.targets])
    units = packing.fill_pairs(lengths, capacity, case.pairs, wrap=True)
    rows = packing.rows_for(units)
    for unit in units[:BATCHES]:
        shape = {"encoder": (rows, best.inputs), "decoder": (rows, best.targets)}
        names = {
            "encoder": ("input_tokens", "segment_ids"),
            "decoder": (
                "input_tokens",
                "target_tokens",
                "segment_ids",
                "loss_weights",
                "loss_groups",
            ),
        }
        arrays = {
            f"{side}_{name}": np.zeros(shape[side], np.int32)
            for side in shape for name in names[side]
        }  # fmt: skip
        examples: published_step.Batch = {stream: [] for stream in published_step.STREAMS}
        free, segments = np.zeros((rows, 2), int), np.zeros(rows, int)
        for (pair, group), row in np.ndenumerate(unit.rows):
            sides = []
            segments[row] += 1
            for at, side in enumerate(shape):
                size = lengths[unit.pairs[pair], group, at]
                tokens = np.append(draw.integers(3, model.vocab_size, size - 1), 1)
                place = slice(free[row, at], free[row, at] + size)
                free[row, at] += size
                arrays[f"{side}_segment_ids"][row, place] = segments[row]
                sides.append(tokens.tolist())
                if side == "encoder":
                    arrays["encoder_input_tokens"][row, place] = tokens
                    continue
                arrays["decoder_target_tokens"][row, place] = tokens
                arrays["decoder_input_tokens"][row, place] = np.append(0, tokens[:-1])
                arrays["decoder_loss_weights"][row, place] = 1
                arrays["decoder_loss_groups"][row, place] = group
            examples[published_step.STREAMS[group]].append(tuple(sides))
        yield arrays, examples


def real(case: Case) -> Iterator[tuple[Arrays, published_step.Batch]]:
    """The first batches of an epoch of real data; needs the whole project."""
    from distill import cache, data  # not where this measures

    config = data.DataConfig(
        _MIXTURE.value, data_dir=_DATA_DIR.value, vocabulary=_VOCABULARY.value,
        cache_dir=_CACHE_DIR.value, batch_size=None, pairs_per_step=case.pairs,
    )  # fmt: skip
    flops = packing.Flops.of(model_of(case))
    batches = data.TrainBatches(cache.load(config, "train"), config, flops)
    feed = batches.iterate(data.Position())
    for _ in range(BATCHES):
        batch = next(feed)
        yield batch.arrays, published_step.examples_of(batches, batch)


def write_batches(path: str | os.PathLike, cases: list[Case], source: str, make) -> None:
    """Writes the batches of all rows, once for each model and number of pairs; no pickle."""
    arrays: Arrays = {"source": np.array(source)}
    for case in cases:
        if case.kind == "product" or key_of(case, 0, "predict:inputs") in arrays:
            continue
        for number, (ours, examples) in enumerate(make(case)):
            for name, array in {**ours, **padded(examples)}.items():
                arrays[key_of(case, number, name)] = array
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def read_batches(case: Case) -> list[Arrays]:
    """The arrays of a row's batches: ours under T5X's keys, the peer's as `padded` names them.

    Raises:
      ValueError: the file has none for this row.
    """
    with np.load(_BATCHES.value, allow_pickle=False) as file:
        found: list[Arrays] = [{} for _ in range(BATCHES)]
        for number, arrays in enumerate(found):
            start = key_of(case, number, "")
            arrays |= {n.removeprefix(start): file[n] for n in file.files if n.startswith(start)}
    if not all(found):
        raise ValueError(
            f"--batches={_BATCHES.value} has no batches of {case.pairs} pairs for {case.model}: "
            "write it again with --prepare."
        )
    return found


def ours_in(arrays: Arrays) -> Arrays:
    """The packed batch, without the peer's arrays."""
    return {name: array for name, array in arrays.items() if ":" not in name}


def sequence_lengths(batch: Arrays) -> np.ndarray:
    """Of the sequences of a packed batch, int [n, 2]: input and target tokens."""
    sides, most = [], 1 + batch["encoder_segment_ids"].max()
    for side in ("encoder", "decoder"):
        segments = batch[f"{side}_segment_ids"].astype(int)
        place = segments + most * np.arange(len(segments))[:, None]
        sides.append(np.bincount(place.ravel(), (segments > 0).ravel(), most * len(segments)))
    lengths = np.stack(sides, axis=1).astype(int)
    return lengths[lengths.any(axis=1)]


# --- Measuring: each in a process of its own ------------------------------------------------------


def rounds(case: Case, one_round) -> list[float]:
    """Seconds of a step in each round; the first two rounds are warm-up."""
    enough = 0 if case.model == "tiny" else SECONDS
    one_round(), one_round()
    found, start = [], time.monotonic()
    while len(found) < 3 or (len(found) < ROUNDS and time.monotonic() - start < enough):
        found.append(one_round() / BATCHES)
    return found


def figures(case: Case, batches: list[Arrays], turns: list[float], positions: float) -> dict:
    """Rates of a step; `positions` are those that it computed, padding included."""
    flops = packing.Flops.of(model_of(case))
    lengths = [sequence_lengths(ours_in(arrays)) for arrays in batches]
    tokens = float(np.mean([each.sum() for each in lengths]))
    needed = 3 * float(np.mean([flops.row(*each.T).sum() for each in lengths]))
    seconds = record.median(turns)
    return {
        "seconds_per_step": seconds, "turns": turns, "pairs_per_second": case.pairs / seconds,
        "tokens_per_step": tokens, "tokens_per_second": tokens / seconds,
        "padding": 1 - tokens / positions, "model_flops_per_step": needed,
        "model_flops_per_second": needed / seconds,
        "mfu": _RATE.value and needed / seconds / _RATE.value,
    }  # fmt: skip


def measure_product(case: Case) -> dict:
    """FLOPs a second of a large matrix product of random numbers."""
    size, times = (512, 4) if case.dtype == "float32" else (PRODUCT, 10)
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), case.dtype) for key in keys)
    multiply = jax.jit(jnp.matmul)

    def one_round() -> float:
        start = time.monotonic()
        for _ in range(times):
            result = multiply(a, b)
        jax.block_until_ready(result)
        return time.monotonic() - start

    one_round(), one_round()
    turns = [times * 2 * size**3 / one_round() for _ in range(15)]
    return {"size": size, "flops_per_second": record.median(turns), "turns": turns}


def measure_ours(case: Case) -> dict:
    """The step that training runs, on one device."""
    model, device = model_of(case), jax.devices()[0]
    batches = read_batches(case)
    packed = [_whole_parts(ours_in(arrays), case.num_microbatches) for arrays in batches]
    rows, inputs = packed[0]["encoder_input_tokens"].shape
    targets = packed[0]["decoder_input_tokens"].shape[1]
    objective = train.in_slices(
        objectives.StepByStep(z_loss=0.0), rows / case.num_microbatches, targets, model.vocab_size
    )
    optimizer = optim.AdamW() if case.optimizer == "adamw" else optim.Adafactor()
    net, tx = t5.T5(model), optimizer.build(10_000)
    params = jax.jit(lambda key: t5.init_params(model, key))(jax.random.key(0))
    state = train.TrainState(jnp.int32(0), params, jax.jit(tx.init)(params))
    del params  # the state donates them
    rng = jax.random.key(1)
    start = time.monotonic()
    step = train.jit_step(net, objective, tx, case.num_microbatches)
    step = step.lower(state, jax.device_put(packed[0], device), rng).compile()
    compile_seconds = time.monotonic() - start

    losses = []

    def one_round() -> float:
        nonlocal state
        start, scalars = time.monotonic(), []
        for batch in packed:
            state, found = step(state, jax.device_put(batch, device), rng)
            scalars.append(found)
        jax.block_until_ready((state, scalars))
        seconds = time.monotonic() - start
        losses.append(float(np.mean([found["loss"] for found in jax.device_get(scalars)])))
        if any(found["skipped"] for found in jax.device_get(scalars)):
            raise FloatingPointError("an update was skipped: loss or gradient is not finite")
        return seconds

    turns = rounds(case, one_round)
    stats = device.memory_stats() or {}
    memory = step.memory_analysis()
    return {
        **figures(case, batches, turns, rows * (inputs + targets)),
        "rows": rows, "inputs": inputs, "targets": targets, "compile_seconds": compile_seconds,
        "peak_bytes": stats.get("peak_bytes_in_use"), "peak_rss_bytes": record.peak_rss(),
        "temporaries_bytes": memory.temp_size_in_bytes,
        "parameters": t5.param_count(model), "loss": [losses[0], losses[-1]],
    }  # fmt: skip


def _whole_parts(batch: Arrays, parts: int) -> Arrays:
    """With empty rows, so that the parts are equal."""
    more = -len(batch["encoder_input_tokens"]) % parts
    return {name: np.pad(array, ((0, more), (0, 0))) for name, array in batch.items()}


def measure_torch(case: Case) -> dict:
    """The published method's step on the same examples."""
    batches = read_batches(case)
    examples = [examples_in(arrays) for arrays in batches]
    settings = published_step.Settings(
        sizes=published_step.sizes_of(model_of(case)), dtype=case.dtype, compiled=case.compiled
    )
    with published_step.Published(settings) as theirs:
        last = {}

        def one_round() -> float:
            last.update(theirs.ask("steps", batches=examples))
            return last["wall"]

        turns = rounds(case, one_round)
        memory = theirs.ask("memory")
    return {
        **figures(case, batches, turns, last["positions"] / BATCHES),
        "peak_bytes": memory["device"], "peak_rss_bytes": memory["rss"],
        "torch": theirs.facts, "parameters": theirs.facts["parameters"], "loss": last["loss"],
    }  # fmt: skip


def measure_equality(case: Case) -> dict:
    """The loss of the first batch from the same weights, in both.

    Raises:
      ValueError: they differ.
    """
    jax.config.update("jax_default_matmul_precision", "highest")  # as torch multiplies float32
    model, (arrays, *_) = model_of(case), read_batches(case)
    params = jax.jit(lambda key: t5.init_params(model, key))(jax.random.key(0))
    objective = objectives.StepByStep(z_loss=0.0)
    step = jax.jit(
        lambda params, batch: train.eval_step(params, batch, net=t5.T5(model), objective=objective)
    )
    ours = float(objectives.summarize(objective, *step(params, ours_in(arrays)))["loss"])
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "weights"
        export.save_hugging_face(folder, jax.device_get(params), model)
        with published_step.Published(published_step.Settings(weights=str(folder))) as theirs:
            other = theirs.ask("loss", batch=examples_in(arrays))["loss"]
    difference = abs(ours - other) / abs(other)
    if not difference <= TIE:
        raise ValueError(f"the losses differ: ours {ours}, torch {other}")
    return {"ours": ours, "torch": other, "relative_difference": difference}


def work(case: Case) -> None:
    """Measures one row and prints it, as the process of that row."""
    measure = {
        "product": measure_product, "ours": measure_ours, "torch": measure_torch,
        "equality": measure_equality,
    }[case.kind]  # fmt: skip
    found = measure(case)
    if case.kind != "torch":  # which has the device to itself
        device = jax.devices()[0]
        found |= {"platform": device.platform, "device": device.device_kind}
    print(json.dumps(found), flush=True)


# --- All rows -------------------------------------------------------------------------------------


def first_error(text: str, code: int) -> str:
    """The line that names the first error in a process's output."""
    lines = [line for line in text.splitlines() if line.strip()]
    named = (line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line))
    last = lines[-1] if lines else "no output"
    return next(named, f"ended with {code}: {last}")[:400]


def run_case(case: Case, batches: str, rate: float | None, limit: float) -> dict:
    """Measures a row in a process of its own; never raises for what happens in there."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    if _DRY_RUN.value:
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": QUICK}
    if case.kind == "equality":  # two on one device
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    elif not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & set(environment):
        environment["XLA_CLIENT_MEM_FRACTION"] = "0.95"  # of JAX's 0.75; the device is ours
    command = [sys.executable, __file__, f"--case={json.dumps(dataclasses.asdict(case))}",
               f"--batches={batches}", *([f"--rate={rate}"] if rate else [])]  # fmt: skip
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            cut = limit < case.limit
            reason = "--minutes were over" if cut else f"took more than {limit:.0f} s"
            return {"status": "cut" if cut else "failed", "error": reason}
        finally:
            if process.poll() is None:  # with torch's process, its child
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        errors.seek(0)
        text = errors.read()
    seconds = {"process_seconds": time.monotonic() - start}
    if process.returncode:
        return {"status": "failed", "error": first_error(text, process.returncode), **seconds}
    return {"status": "measured", **json.loads(output.splitlines()[-1]), **seconds}


def reason_not_to(case: Case, platform: str | None) -> str | None:
    """Why a row cannot be measured here."""
    if case.needs_gpu and platform not in ("gpu", None):
        return "needs a GPU"
    if case.kind == "torch" and platform == "tpu":
        return "needs a GPU"
    if case.kind in ("torch", "equality"):
        missing = [n for n in ("torch", "transformers") if importlib.util.find_spec(n) is None]
        if missing:
            return f"needs {' and '.join(missing)}"
    return None


def table(lines: list[dict]) -> str:
    """The rows as text."""
    head = ("", "s/step", "pairs/s", "tokens/s", "MFU", "padding", "peak GB", "compile s", "")
    rows = []
    for line in lines:
        note = f"{line['status']}: {line['error']}" if "error" in line else ""
        if line["kind"] == "product" and not note:
            note = f"{line['flops_per_second'] / 1e12:.4g} TFLOP/s"
        if line["kind"] == "equality" and not note:
            note = f"relative difference {line['relative_difference']:.1e}"
        peak = line.get("peak_bytes")
        rows.append((
            line["name"], line.get("seconds_per_step"), line.get("pairs_per_second"),
            line.get("tokens_per_second"), line.get("mfu"), line.get("padding"),
            peak and peak / 1e9, line.get("compile_seconds"), note,
        ))  # fmt: skip
    return record.table(head, rows)


def read_rows(path: pathlib.Path, where: dict) -> list[dict]:
    """Rows that were measured before, on this machine with these versions and batches.

    Args:
      path: of --out; the last line of a process that was killed may be torn.
      where: machine, versions and batches; rows behind another one are somebody else's.
    """
    found, ours = [], False
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row.get("kind") == "about":
            ours = all(row.get(name) == value for name, value in where.items())
        elif ours and row["status"] == "measured":  # what failed is tried again
            found.append(row)
    return found


def measure_all(cases: list[Case], batches: str) -> None:
    """Measures what is not in --out yet, as long as there is time."""
    deadline = time.monotonic() + 60 * _MINUTES.value
    path = pathlib.Path(_OUT.value)
    with np.load(batches, allow_pickle=False) as file:
        source = str(file["source"])
    about = {"kind": "about", **record.about(("torch", "transformers")), "batches": source}
    where = {name: about[name] for name in ("machine", "versions", "batches")}
    done = {row["name"]: row for row in read_rows(path, where)}
    with path.open("a") as out:

        def write(row: dict) -> None:
            out.write(json.dumps(row) + "\n")
            out.flush()
            os.fsync(out.fileno())

        write(about)
        print(f"batches: {source}", flush=True)
        for number, case in enumerate(cases):
            if case.name in done:
                continue
            left = deadline - time.monotonic()
            if left < min(LEAST_SECONDS, case.limit):
                names = ", ".join(c.name for c in cases[number:] if c.name not in done)
                print(f"--minutes={_MINUTES.value:g} are over; call again for: {names}")
                break
            product = done.get("product", {})
            platform = "cpu" if _DRY_RUN.value else product.get("platform")
            if reason := reason_not_to(case, platform):
                found = {"status": "not measured", "error": reason}
            else:
                rate, limit = product.get("flops_per_second"), min(case.limit, left)
                found = run_case(case, batches, rate, limit)
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            row = {"name": case.name, "kind": case.kind, "case": dataclasses.asdict(case),
                   "date": now, **found}  # fmt: skip
            done[case.name] = row
            write(row)
            print(f"{case.name}: {found['status']} {found.get('error', '')}".rstrip(), flush=True)
    print(table([done[case.name] for case in cases if case.name in done]))


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    if _CASE.value:
        return work(Case(**json.loads(_CASE.value)))
    cases = list(DRY_CASES if _DRY_RUN.value else CASES)
    if _ONLY.value:
        known = {case.name for case in cases}
        if unknown := set(_ONLY.value) - known:
            raise app.UsageError(f"--only: no rows {sorted(unknown)}; there are {sorted(known)}")
        cases = [case for case in cases if case.name in _ONLY.value]
    if _LIST.value:
        return print("\n".join(case.name for case in cases))
    if _PREPARE.value:
        source = f"{_MIXTURE.value}, train, vocabulary {_VOCABULARY.value or 'bytes'}"
        return write_batches(_PREPARE.value, cases, source, real)
    if _BATCHES.value:
        return measure_all(cases, _BATCHES.value)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "batches.npz")
        text = "made up: random tokens with lengths drawn like CommonsenseQA's, seed 0"
        write_batches(path, cases, text, made_up)
        measure_all(cases, path)


if __name__ == "__main__":
    app.run(main)
