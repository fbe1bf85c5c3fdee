"""Training: the state, one step, and the loop.

A step takes four hops: `train` -> the jitted `train_step` -> the objective -> the model. Data comes
from `data.TrainBatches`, checkpoints go to `checkpoints.Checkpointer`, and a run that is started
again in the same MODEL_DIR goes on where its newest checkpoint ends.
"""

import ctypes
import dataclasses
import datetime
import functools
import itertools
import math
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath
from tqdm import tqdm

from distill import (
    cache,
    checkpoints,
    cluster,
    convert,
    estimate,
    objectives,
    optim,
    packing,
    partitioning,
    results,
    scoring,
    students,
    t5,
)  # fmt: skip
from distill import data as data_lib
from distill import vocabulary as vocabulary_lib

# More padded tokens than this at once are slower on a CPU, whose caches they leave (measured for
# the tiny model), and cost memory.
CPU_TOKENS_PER_MICROBATCH = 4096
# After this many updates in a row that were skipped as not finite the run stops.
MAX_SKIPPED = 10
# The supervisor's sign for "preempted, start me again" (EX_TEMPFAIL of sysexits.h).
EXIT_PREEMPTED = 75


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, and what to write when.

    Attributes:
      model_dir: for checkpoints, metrics and the configuration; local or gs://.
      train_steps: the global step to stop at, T5X's meaning: it counts from the initial checkpoint.
      train_steps_relative: updates to make in this run instead.
      initial_checkpoint_path: what to start from: a MODEL_DIR or checkpoint of ours, a T5X
        checkpoint, a folder in Hugging Face's format or a model's id on its hub. A checkpoint in
        model_dir goes before it.
      eval_period: updates between evaluations on the validation split.
      eval_steps: batches of the teacher-forced validation loss.
      evaluator_num_examples: examples decoded per task and evaluation; None = all.
      checkpoint_period: updates between checkpoints; the last step always has one.
      checkpoints_to_keep: newest ones kept, beside the best on validation; None = all.
      stats_period: updates between two lines of training metrics; None = a hundred in a run, at
        most every 50.
      num_microbatches: parts whose gradients are added up, exact whatever their sizes; None = 1,
        on a CPU as many as keep a part at 4,096 tokens.
      random_seed: of initialisation and dropout.
      json_write_n_results: predictions written per task and evaluation; None = all.
      test_at_end: also evaluate the last step on the test split.
      allow_changed_data: go on although the data is not what the checkpoint was trained on.
    """

    model_dir: str
    train_steps: int | None = 10_000
    train_steps_relative: int | None = None
    initial_checkpoint_path: str | None = None
    eval_period: int = 1000
    eval_steps: int = 20
    evaluator_num_examples: int | None = None
    checkpoint_period: int = 1000
    checkpoints_to_keep: int | None = 3
    stats_period: int | None = None
    num_microbatches: int | None = None
    random_seed: int = 0
    json_write_n_results: int | None = None
    test_at_end: bool = True
    allow_changed_data: bool = False

    def __post_init__(self):
        if not self.model_dir:
            raise ValueError("MODEL_DIR is empty: name the folder for checkpoints and metrics.")
        if self.train_steps is None and self.train_steps_relative is None:
            raise ValueError("Set TRAIN_STEPS (global step to stop at) or TRAIN_STEPS_RELATIVE.")
        for field in (
            "train_steps", "train_steps_relative", "eval_period", "eval_steps",
            "evaluator_num_examples", "checkpoint_period", "checkpoints_to_keep", "stats_period",
            "num_microbatches",
        ):  # fmt: skip
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"TrainConfig.{field} must be a positive integer, not {value!r}.")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run ended with.

    Attributes:
      step: global step.
      examples: pairs trained on, repeats counted.
      tokens: real tokens trained on, inputs and targets together, repeats counted.
      scores: of the last evaluation: the validation split, and the test split where there is one.
    """

    step: int
    examples: int
    tokens: int
    scores: list[scoring.Score]


# --- One step -------------------------------------------------------------------------------------


@functools.partial(jax.tree_util.register_dataclass,
                   data_fields=["step", "params", "opt_state"], meta_fields=[])  # fmt: skip
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training changes.

    Attributes:
      step: global step, int32 scalar.
      params: the model's parameters, in `T5Config.param_dtype`.
      opt_state: the optimizer's.
    """

    step: jax.Array
    params: Any
    opt_state: Any


def make_forward(net: t5.T5, params: Any, rng: jax.Array | None = None) -> objectives.Forward:
    """Closes over parameters and, where dropout is wanted, an rng."""
    variables = {"params": params}
    rngs = None if rng is None else {"dropout": rng}
    return objectives.Forward(
        states=lambda batch: net.apply(variables, batch, rngs=rngs, method="states"),
        unembed=lambda states: net.apply(variables, states, method="unembed"),
    )


# What rounding folds into a step's key, where micro-batches fold their number.
_ROUNDING = 2**31 - 1


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    rng: jax.Array,
    *,
    net: t5.T5,
    objective: objectives.Objective,
    tx: optax.GradientTransformation,
    num_microbatches: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update.

    The tokens of each loss group are counted over the whole batch first, so the losses and the
    gradients of micro-batches add up to those of the batch, however uneven they are. An update
    whose loss or gradient is not finite leaves the state as it is, but for the step.

    Args:
      state: before the update.
      batch: int32 [rows, length] arrays under T5X's batch keys and `decoder_loss_groups`, and
        `decoder_pair_ids` where the objective needs them.
      rng: the run's key; dropout and the rounding of bfloat16 parameters fold the step into it.
      net: the network.
      objective: what to minimise.
      tx: the optimizer.
      num_microbatches: parts to compute one after the other; each takes rows of all devices.

    Returns:
      The new state, and the scalars of `objectives.summarize` with `grad_norm` and `skipped`
      (1.0 where the update was not finite).

    Raises:
      ValueError: micro-batches with an objective that needs whole pairs.
    """
    objectives.require_whole_pairs(objective, num_microbatches)
    counts = objectives.group_counts(batch)
    rng = jax.random.fold_in(rng, state.step)

    def loss_and_sums(params, part, key):
        dropout = key if net.config.dropout_rate else None
        return objective(make_forward(net, params, dropout), part, counts)

    def grad_fn(params, part, key):
        value, grads = jax.value_and_grad(loss_and_sums, has_aux=True)(params, part, key)
        # They come in the parameters' type; what is made of them is float32.
        return value, jax.tree.map(lambda g: g.astype(jnp.float32), grads)

    if num_microbatches == 1:
        (loss, sums), grads = grad_fn(state.params, batch, rng)
    else:
        parts = jax.tree.map(lambda x: _split_rows(x, num_microbatches), batch)
        shapes = jax.eval_shape(grad_fn, state.params, jax.tree.map(lambda x: x[0], parts), rng)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def accumulate(total, number_and_part):
            number, part = number_and_part
            value = grad_fn(state.params, part, jax.random.fold_in(rng, number))
            return jax.tree.map(jnp.add, total, value), None

        numbers = jnp.arange(num_microbatches)
        ((loss, sums), grads), _ = jax.lax.scan(accumulate, zeros, (numbers, parts))

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    # The key waits for the gradients, else XLA may draw all bits first and hold them meanwhile.
    rounding = jax.random.fold_in(rng, jnp.where(finite, _ROUNDING, 0))
    params = optim.apply_updates(state.params, updates, rounding)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state), (state.params, state.opt_state),
    )  # fmt: skip
    scalars = objectives.summarize(objective, sums, counts)
    scalars |= {"grad_norm": grad_norm, "skipped": 1.0 - finite}
    return TrainState(state.step + 1, params, opt_state), scalars


def _split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[rows, ...] -> [parts, rows / parts, ...]; part p takes every row number parts * i + p.

    So each part has rows of every device without moving any, and the same rows in the same order on
    every mesh: dropout draws the same masks for them.
    """
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


def jit_step(
    net: t5.T5,
    objective: objectives.Objective,
    tx: optax.GradientTransformation,
    num_microbatches: int,
):
    """`train_step` as training runs it: (state, batch, rng) -> (state, scalars), state donated."""
    step = functools.partial(
        train_step, net=net, objective=objective, tx=tx, num_microbatches=num_microbatches
    )
    return jax.jit(step, donate_argnums=0)


def abstract_state(net: t5.T5, tx: optax.GradientTransformation, mesh) -> TrainState:
    """Shapes and shardings of the state on a mesh; allocates nothing."""
    params = students.abstract_params(net, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    slots = jax.eval_shape(tx.init, params)
    places = partitioning.optimizer_shardings(mesh, slots, params, shardings)
    opt_state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), slots, places
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=partitioning.replicated(mesh))
    return TrainState(step, params, opt_state)


def eval_step(params, batch, *, net: t5.T5, objective: objectives.Objective):
    """Sums and counts of a batch without dropout, to be added up over batches."""
    counts = objectives.group_counts(batch)
    _, sums = objective(make_forward(net, params), batch, counts)
    return sums, counts


# --- The run --------------------------------------------------------------------------------------


def train(
    *,
    config: TrainConfig,
    model: t5.T5Config,
    objective: objectives.Objective,
    optimizer: optim.Optimizer,
    data: data_lib.DataConfig,
    mesh: partitioning.MeshConfig | None = None,
) -> TrainResult:
    """Trains a student; goes on from the newest checkpoint in `config.model_dir`.

    Args:
      config: how long, and what to write when.
      model: the student's size.
      objective: what to minimise.
      optimizer: Adafactor or AdamW.
      data: what to train on.
      mesh: how to use the devices; None = chosen for them and the model.

    Raises:
      ValueError: a setting does not fit the data, the vocabulary, the mesh or the checkpoint.
      FileNotFoundError: data or a checkpoint is missing.
      FloatingPointError: the updates of 10 steps in a row were not finite.
    """
    started = time.monotonic()
    objectives.require_whole_pairs(objective, config.num_microbatches or 1)
    found = jax.devices()
    if found[0].platform == "cpu":
        keep_freed_memory()
    mesh = estimate.choose_mesh(
        mesh or partitioning.MeshConfig(), model, optimizer,
        None if data.pairs_per_step else data.batch_size // (config.num_microbatches or 1),
        estimate.chip_of(found[0]), len(found),
    )  # fmt: skip
    devices = partitioning.make_mesh(mesh)
    shards = partitioning.batch_shards(devices)

    # 1. Data, all splits, so that what is missing is known before anything is computed.
    cache.prepare(data, ("train", "validation", "test"))
    corpus = cache.load(data, "train", prepared=True)
    objective.check_groups(corpus.loss_groups, corpus.name)
    vocabulary = vocabulary_lib.load(data.vocabulary)
    if vocabulary.size > model.vocab_size:
        raise ValueError(
            f"The vocabulary {data.vocabulary!r} has {vocabulary.size} ids, the model only "
            f"{model.vocab_size}: set --gin.T5Config.vocab_size={-(-vocabulary.size // 128) * 128}."
        )
    flops, with_pair_ids = packing.Flops.of(model), objective.needs_pairs
    batches = data_lib.TrainBatches(corpus, data, flops, shards, with_pair_ids)
    partitioning.check_lengths(devices, batches.capacity)
    num_microbatches = config.num_microbatches or auto_microbatches(batches)
    batches = batches.with_row_multiple(shards * num_microbatches)
    fingerprint = batches.fingerprint()
    # In the rows of training: no second search for lengths, and no second shape.
    held_out = dataclasses.replace(
        data, feature_lengths=batches.capacity, num_train_examples=None, train_fraction=None,
        loader_processes=0,
    )  # fmt: skip
    validation, test = (
        _held_out(held_out, split, shards, with_pair_ids) for split in ("validation", "test")
    )
    objective = _with_max_pairs(objective, batches, validation, test)
    rows, length = batches.plan(0).rows / devices.size, batches.capacity["targets"]
    eval_objective = in_slices(objective, rows, length, model.vocab_size)
    objective = in_slices(objective, rows / num_microbatches, length, model.vocab_size)

    # 2. The state: a checkpoint of this run, else the initial checkpoint, else random.
    is_writer = jax.process_index() == 0
    folder = epath.Path(config.model_dir).expanduser()
    if is_writer:
        _write_model_info(folder, model)
    cluster.wait_for_all("data")  # a host may have tokenised for an hour
    _require_shared(folder)
    net = t5.T5(model, partitioning.activation_constraint(devices))
    saver = checkpoints.Checkpointer(folder, keep=config.checkpoints_to_keep)
    slots = isinstance(optimizer, optim.Adafactor)
    initial, base_step, weights = _initial_params(config, saver, net, devices, slots)
    last_step = config.train_steps
    if config.train_steps_relative is not None:
        last_step = base_step + config.train_steps_relative
    updates = last_step - base_step
    if updates < 1:
        raise ValueError(
            f"TRAIN_STEPS={config.train_steps}, but the run starts from step {base_step} "
            f"(INITIAL_CHECKPOINT_PATH={config.initial_checkpoint_path}). Set "
            "TRAIN_STEPS_RELATIVE to the number of updates to make."
        )
    tx = optimizer.build(updates)
    learning_rate = optimizer.learning_rate_at(updates)
    state, start_step, progress = _initial_state(
        config, saver, net, tx, devices, initial, base_step, weights
    )
    del initial, weights  # the state holds the parameters now, and will donate them
    if progress.data:
        _check_same_data(progress.data, fingerprint, config)
    if start_step > last_step:
        raise ValueError(
            f"{config.model_dir} has a checkpoint of step {start_step}, beyond TRAIN_STEPS="
            f"{last_step}. Raise TRAIN_STEPS, or choose another MODEL_DIR."
        )

    # 3. Programs.
    step_fn = jit_step(net, objective, tx, num_microbatches)
    eval_fn = jax.jit(functools.partial(eval_step, net=net, objective=eval_objective))
    replicated = partitioning.replicated(devices)
    # jit, since device_put reaches the devices of this process only.
    dropout_rng = jax.jit(jax.random.key, out_shardings=replicated)(config.random_seed)
    facts = {  # of the run, in every checkpoint
        "base_step": base_step,
        "last_step": last_step,
        "data": fingerprint,
        "mixture": data.mixture_or_task_name,
        "tasks": [task.name for task in corpus.tasks],
        "module": data.mixture_or_task_module,
        "vocabulary": data.vocabulary,
        "data_dir": data.data_dir,
        "parsing": data.parsing,
        "rationale_store": data.rationale_store,
        "allow_missing": list(data.allow_missing),
        # "fused" is a wish of this machine, not of the model: who reads may have no GPU.
        "model": dataclasses.asdict(dataclasses.replace(model, attention="plain")),
        "objective": repr(objective),
    }
    examine = functools.partial(
        _evaluate, config=config, net=net, objective=objective, eval_fn=eval_fn,
        vocabulary=vocabulary, mesh=devices, row_lengths=batches.capacity, facts=facts,
    )  # fmt: skip

    period = config.stats_period or max(1, min(50, updates // 100))
    writer = results.MetricWriter(folder if is_writer else None)
    if is_writer:
        print(_summary(
            corpus, batches, net, config, devices, (start_step, last_step), num_microbatches,
            objective,
        ))  # fmt: skip

    # 4. The loop. The metrics of a step are fetched after the next one is under way.
    def save(step: int, scores: list[scoring.Score]) -> None:
        accuracy = [s.values["accuracy"] for s in scores if "accuracy" in s.values]
        metadata = {
            "step": step, **dataclasses.asdict(progress), **facts,
            "metrics": {f"{s.task}/{s.split}": s.values for s in scores},
        }  # fmt: skip
        tree = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
        metric = float(np.mean(accuracy)) if accuracy else None
        saver.save(step, tree, metadata, metric)

    scores: list[scoring.Score] = []
    share, shares = partitioning.batch_share(devices)
    window = _Window(period, learning_rate, base_step)
    pending: tuple[int, dict[str, jax.Array]] | None = None
    feed = batches.iterate(
        data_lib.Position(**progress.position), process_index=share, process_count=shares
    )
    bar = tqdm(
        total=last_step, initial=start_step, unit="step", dynamic_ncols=True,
        disable=not (is_writer and sys.stderr.isatty()),
    )  # fmt: skip
    with bar, writer, saver, cluster.preemption() as preempted:
        for step in range(start_step + 1, last_step + 1):
            batch = next(feed)
            arrays = partitioning.shard_batch(devices, batch.arrays)
            with jax.transfer_guard("disallow"):  # nothing may slip to or from the device here
                state, scalars = step_fn(state, arrays, dropout_rng)
            progress.advance(batch)
            if step == start_step + 1:
                jax.block_until_ready(scalars)
                compiled = time.monotonic() - started
                writer.write("train", step, {"timing/seconds_to_first_step": compiled})
                window.restart()
            if pending:
                window.add(*pending)
            pending = step, scalars
            window.count(batch, timed=step > start_step + 1)  # the first step compiles
            bar.update()

            is_last = step == last_step
            stop = preempted(step)
            if window.is_full or is_last or stop:
                window.add(*pending)
                pending = None
                report = window.close(step, last_step)
                writer.write("train", step, report)
                _show(bar, step, last_step, report)
            due = (step % config.eval_period == 0 or is_last) and validation is not None
            evaluated = due and not stop  # who stops us may not wait for an evaluation
            if evaluated:
                scores = examine(validation, state.params, step, progress, writer, bar)
                window.restart()
            if step % config.checkpoint_period == 0 or is_last or stop:
                save(step, scores if evaluated else [])
                window.restart()
            if stop:
                saver.wait()
                if is_writer:
                    logging.warning("Preempted: step %d is saved; start again to go on.", step)
                sys.exit(EXIT_PREEMPTED)

        # 5. The result.
        saver.wait()
        if not scores and validation is not None:  # a run that was complete when it was started
            scores = examine(validation, state.params, last_step, progress, writer, bar)
        if test is not None and config.test_at_end:
            scores = scores + examine(test, state.params, last_step, progress, writer, bar)
    if scores and is_writer:
        print(scoring.table([(f"checkpoint_{last_step}", s) for s in scores]), flush=True)
    return TrainResult(last_step, progress.examples, progress.tokens, scores)


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory.

    XLA:CPU frees its temporaries after every step; given back to the system they have to be mapped
    and zeroed again in the next one. Measured on 2 cores: 1.5 times as fast for the tiny model.
    XLA's compilers allocate much, too: 7 % less time for a TPU's program.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return  # musl
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # M_* of malloc.h
    libc.mallopt(trim_threshold, -1)  # never trim
    libc.mallopt(top_pad, 256 << 20)
    libc.mallopt(mmap_max, 0)  # large blocks from the heap, which stays


@dataclasses.dataclass
class _Progress:
    """How far the run is in its data; kept in every checkpoint.

    Attributes:
      position: `data.Position` of the next batch, as a dict.
      examples: pairs seen.
      tokens: real tokens seen.
      data: fingerprint of the data that the checkpoint was trained on; empty at a fresh start.
    """

    position: dict[str, int]
    examples: int = 0
    tokens: int = 0
    data: dict[str, Any] = dataclasses.field(default_factory=dict)

    def advance(self, batch: data_lib.Batch) -> None:
        self.position = dataclasses.asdict(batch.next)
        self.examples += batch.examples
        self.tokens += batch.tokens


@dataclasses.dataclass(frozen=True)
class _HeldOut:
    """A split to evaluate on.

    Attributes:
      corpus: its rows, to decode.
      batches: the same packed, for the teacher-forced loss.
    """

    corpus: cache.Corpus
    batches: data_lib.TrainBatches


def _held_out(
    config: data_lib.DataConfig, split: str, shards: int, with_pair_ids: bool
) -> _HeldOut | None:
    try:
        corpus = cache.load(config, split, prepared=True)
    except cache.NoSplitError as e:
        logging.warning("Not evaluating on %s: %s", split, e)
        return None
    if not any(map(len, corpus.tasks)):
        logging.warning("Not evaluating on %s: %s has no rows there.", split, corpus.name)
        return None
    for task in corpus.tasks:
        for name in task.metrics:
            scoring.metric_function(name)  # one that cannot be imported is an error now
    batches = data_lib.TrainBatches(
        corpus, config, row_multiple=shards, with_pair_ids=with_pair_ids
    )
    return _HeldOut(corpus, batches)


def _with_max_pairs(
    objective: objectives.Objective, batches: data_lib.TrainBatches, *held_out: _HeldOut | None
) -> objectives.Objective:
    """The objective with room for the pairs of every batch, where it needs that."""
    if not objective.needs_pairs:
        return objective
    most = max(b.max_pairs for b in (batches, *(h.batches for h in held_out if h is not None)))
    if objective.max_pairs is None:
        return dataclasses.replace(objective, max_pairs=most)
    if objective.max_pairs < most:
        raise ValueError(
            f"--gin.StepByStep.max_pairs={objective.max_pairs}, but a batch may have {most} pairs: "
            "set that, or leave it out."
        )
    return objective


def auto_microbatches(batches: data_lib.TrainBatches) -> int:
    """What NUM_MICROBATCHES is where it is not given.

    1 on accelerators; on a CPU as many as keep a part at CPU_TOKENS_PER_MICROBATCH.

    Args:
      batches: whose `row_multiple` is the number of the mesh's batch shards.
    """
    if jax.default_backend() != "cpu" or batches.with_pair_ids:  # pairs must be whole
        return 1
    rows = batches.plan(0).rows
    shards = batches.row_multiple
    wanted = math.ceil(rows * sum(batches.capacity.values()) / CPU_TOKENS_PER_MICROBATCH / shards)
    if batches.config.pairs_per_step is not None:  # rows can be rounded up
        return wanted
    parts = (n for n in range(wanted, rows + 1) if rows % (n * shards) == 0)
    return next(parts, rows // shards)  # at most one row of each shard at a time


def in_slices(
    objective: objectives.Objective, rows: float, length: int, vocab_size: int
) -> objectives.Objective:
    """The objective with a `logits_chunk` that keeps slices below LOGITS_BYTES, if it has none.

    Args:
      objective: as configured.
      rows: of a micro-batch, on one device of those that share rows and vocabulary.
      length: of the targets, in tokens.
      vocab_size: of the model.
    """
    slices = math.ceil(4 * rows * length * vocab_size / estimate.LOGITS_BYTES)
    if objective.logits_chunk is not None or slices <= 1:
        return objective
    return dataclasses.replace(objective, logits_chunk=-(-length // slices))


def _initial_params(
    config: TrainConfig, saver: checkpoints.Checkpointer, net: t5.T5, mesh, slots: bool
) -> tuple[Any, int, convert.Weights | None]:
    """Parameters to start from, sharded, the global step they stand for, and where they are from.

    A checkpoint in MODEL_DIR goes before INITIAL_CHECKPOINT_PATH, and that before random values.
    With the first there is nothing to load yet: (None, step at which the run once began, None).
    """
    path = config.initial_checkpoint_path
    if (newest := saver.latest()) is not None:
        if path:
            logging.warning(
                "INITIAL_CHECKPOINT_PATH=%s is not used: %s has a checkpoint of this run, step %d.",
                path, saver.folder, newest,
            )  # fmt: skip
        for step in reversed(saver.steps()):
            try:
                metadata = checkpoints.read_metadata(saver.folder / f"checkpoint_{step}")
            except ValueError:  # damaged: restoring quarantines it
                continue
            if "converted_from" in metadata:
                raise FileExistsError(
                    f"MODEL_DIR={saver.folder} holds a converted checkpoint, not a run. Give "
                    "it as INITIAL_CHECKPOINT_PATH, and choose another MODEL_DIR."
                )
            was = metadata["model"].get("param_dtype", "float32")  # absent before there was one
            if was != net.config.param_dtype:
                raise ValueError(
                    f"The run in MODEL_DIR={saver.folder} keeps its parameters in {was}, this one "
                    f"in {net.config.param_dtype}. Set --gin.PARAM_DTYPE={was}, or start another "
                    "run from it: its folder as INITIAL_CHECKPOINT_PATH, and another MODEL_DIR."
                )
            return None, metadata["base_step"], None
        raise FileNotFoundError(f"No intact checkpoint in {saver.folder}.")

    abstract = students.abstract_params(net, mesh)
    if path is None:
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        init = jax.jit(lambda key: t5.init_params(net.config, key), out_shardings=shardings)
        return init(jax.random.key(config.random_seed)), 0, None
    weights = convert.open_weights(path, slots=slots)  # a thousand files of T5X's
    logging.info("Starting from %s (%s), step %d", weights.path, weights.kind, weights.step)
    return convert.load(weights, net.config, abstract), weights.step, weights


def _initial_state(
    config: TrainConfig,
    saver: checkpoints.Checkpointer,
    net: t5.T5,
    tx: optax.GradientTransformation,
    mesh,
    initial: Any,
    base_step: int,
    weights: convert.Weights | None,
) -> tuple[TrainState, int, _Progress]:
    """The state to go on from, sharded, its step, and where its data goes on.

    The step also as a number: to ask the device for it is to wait for the parameters, which are
    still being drawn while the first step is traced.
    """
    abstract = abstract_state(net, tx, mesh)
    if initial is not None:
        opt_state = None
        if weights is not None and weights.kind == convert.T5X:  # which goes on with them, too
            opt_state = convert.load_slots(weights, abstract.opt_state)
        if opt_state is None:
            places = jax.tree.map(lambda x: x.sharding, abstract.opt_state)
            opt_state = jax.jit(tx.init, out_shardings=places)(initial)
        step = jax.jit(jnp.int32, out_shardings=abstract.step.sharding)(base_step)
        return TrainState(step, initial, opt_state), base_step, _Progress({"epoch": 0, "batch": 0})

    target = {field.name: getattr(abstract, field.name) for field in dataclasses.fields(TrainState)}
    tree, metadata = saver.restore(target)
    logging.info("Going on from %s/checkpoint_%d", saver.folder, metadata["step"])
    kept = {field.name: metadata[field.name] for field in dataclasses.fields(_Progress)}
    return TrainState(**tree), metadata["step"], _Progress(**kept)


def _check_same_data(before: dict, now: dict, config: TrainConfig) -> None:
    """Refuses to resume on other data, which would otherwise go unnoticed."""
    changed = [
        f"  {key}: was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if not changed:
        return
    message = (
        f"The checkpoint in {config.model_dir} was trained on other data or batches:\n"
        + "\n".join(changed)
    )
    if not config.allow_changed_data:
        raise ValueError(
            f"{message}\nSet it back, choose another MODEL_DIR, or go on all the same with "
            "--gin.TrainConfig.allow_changed_data=True (the position in the data is kept)."
        )
    logging.warning(message)


def _require_shared(folder: epath.Path) -> None:
    """Raises ValueError where MODEL_DIR is not the folder that process 0 writes to.

    Every process writes its part of a checkpoint; on disks of their own these parts would never
    come together, which nobody would notice before the first restore.
    """
    deadline = time.monotonic() + 30  # a network file system may show new files late
    while not (folder / "model-info.txt").exists():
        if time.monotonic() > deadline:
            raise ValueError(
                f"MODEL_DIR={folder} on process {jax.process_index()} is not the folder that "
                "process 0 sees: what that wrote there is missing. Choose one that all hosts "
                "share: gs:// or a network file system."
            )
        time.sleep(0.5)


# --- What a run tells -----------------------------------------------------------------------------


class _Window:
    """Means over the steps since the last report, and the speed over them."""

    def __init__(self, period: int, learning_rate, base_step: int):
        self._period, self._learning_rate, self._base_step = period, learning_rate, base_step
        self._skipped_in_a_row = 0
        self._scalars: list[dict[str, float]] = []
        self._seconds = self._tokens = self._examples = self._rows = self._steps = 0
        self.restart()

    @property
    def is_full(self) -> bool:
        return len(self._scalars) + 1 >= self._period  # one is pending

    def restart(self) -> None:
        """Starts the clock again after something that is not training."""
        self._clock = time.monotonic()

    def count(self, batch: data_lib.Batch, timed: bool) -> None:
        now = time.monotonic()
        seconds, self._clock = now - self._clock, now
        if not timed:
            return
        self._seconds += seconds
        self._steps += 1
        self._tokens += batch.tokens
        self._examples += batch.examples
        self._rows += len(batch.arrays["encoder_input_tokens"])

    def add(self, step: int, scalars: dict[str, jax.Array]) -> None:
        """Takes in the metrics of a step; raises FloatingPointError after MAX_SKIPPED bad ones."""
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        self._scalars.append(values)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if values["skipped"] else 0
        if values["skipped"]:
            logging.warning("Step %d skipped: loss or gradient is not finite.", step)
        if self._skipped_in_a_row >= MAX_SKIPPED:
            raise FloatingPointError(
                f"The updates of {MAX_SKIPPED} steps in a row, up to step {step}, were not finite "
                "and were skipped. Lower the learning rate, or look at the data of these steps; "
                "the newest checkpoint is good."
            )

    def close(self, step: int, last_step: int) -> dict[str, float]:
        names = self._scalars[0]
        report = {}
        for name in names:  # a loss group may be absent from some batches: NaN there
            values = [s[name] for s in self._scalars if math.isfinite(s[name])]
            report[name] = float(np.mean(values)) if values else math.nan
        report["learning_rate"] = float(self._learning_rate(step - 1 - self._base_step))
        if self._steps:
            seconds, devices = max(self._seconds, 1e-9), jax.local_device_count()
            report["timing/tokens_per_second"] = self._tokens / seconds
            report["timing/seqs_per_second_per_core"] = self._rows / seconds / devices
            report["timing/eta_seconds"] = (last_step - step) * seconds / self._steps
            report["batch/examples"] = self._examples / self._steps
            report["batch/rows"] = self._rows / self._steps
            report["batch/tokens"] = self._tokens / self._steps
        self._scalars = []
        self._seconds = self._tokens = self._examples = self._rows = self._steps = 0
        return report


def _show(bar: tqdm, step: int, last_step: int, report: dict[str, float]) -> None:
    """The progress bar on a terminal; a line now and then in a log."""
    groups = " ".join(
        f"{name.removeprefix('cross_ent_loss/')} {value:.3f}"
        for name, value in report.items()
        if name.startswith("cross_ent_loss/") and math.isfinite(value)
    )
    speed = f"{report.get('timing/tokens_per_second', math.nan):,.0f} tokens/s"
    if not bar.disable:
        bar.set_postfix_str(f"loss {report['loss']:.3f} ({groups}), {speed}")
    elif jax.process_index() == 0:
        eta = datetime.timedelta(seconds=int(report.get("timing/eta_seconds", 0)))
        print(
            f"step {step}/{last_step}  loss {report['loss']:.4f} ({groups})  {speed}  ETA {eta}",
            flush=True,
        )


def _evaluate(
    held_out: _HeldOut, params, step: int, progress: _Progress, writer: results.MetricWriter,
    bar: tqdm, *, config: TrainConfig, net: t5.T5, objective, eval_fn, vocabulary, mesh,
    row_lengths, facts,
) -> list[scoring.Score]:  # fmt: skip
    """Loss under teacher forcing, and greedy accuracy, on a split; both written and shown."""
    corpus, total = held_out.corpus, None
    share, shares = partitioning.batch_share(mesh)
    feed = held_out.batches.iterate(
        data_lib.Position(), shuffle=False, epochs=1, process_index=share, process_count=shares
    )
    for batch in itertools.islice(feed, config.eval_steps):
        sums = eval_fn(params, partitioning.shard_batch(mesh, batch.arrays))
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    summary = objectives.summarize(objective, *total)
    scalars = {name: float(value) for name, value in summary.items()}
    writer.write(f"training_eval/{corpus.name}/{corpus.split}", step, scalars)
    student = students.Student(params, net, mesh, vocabulary, row_lengths)
    how = scoring.Answering(num_examples=config.evaluator_num_examples)
    folder = students.absolute(config.model_dir)
    about = {**dataclasses.asdict(progress), **facts}
    now = students.Checkpoint(folder / f"checkpoint_{step}", folder, step, "", about)
    scores = []
    for task in scoring.scored(corpus):
        score = scoring.score(student, task, corpus.split, how)
        scores.append(score)
        seen = {"tokens": progress.tokens, "examples": progress.examples}
        writer.write(
            f"{students.RESULTS}/{score.task}/{score.split}", step, {**score.scalars, **seen}
        )
        if jax.process_index() == 0:
            scoring.keep(
                folder / students.RESULTS, f"{score.split}/{score.task}-{step:06}.jsonl",
                f"training/{step}/{score.task}/{score.split}", score, now, task,
                most=config.json_write_n_results,
            )  # fmt: skip
            name, e = score.main
            bar.write(
                f"step {step}  {score.task}, {score.split}: {name} {e.value:.4f} "
                f"+- {e.standard_error:.4f} (n = {score.n}), "
                f"loss {scalars.get('loss', math.nan):.4f}"
            )
    return scores


def _summary(corpus, batches, net, config, mesh, steps, num_microbatches, objective) -> str:
    """What is about to run, in a few lines."""
    kept = net.config.param_dtype
    chunk = objective.logits_chunk
    plan = batches.plan(0)
    waste = batches.waste(plan, packing.Flops.of(net.config))
    cut = {name: n for name, n in batches.truncated.items() if n}
    return "\n".join(
        [
            f"{corpus.name}: {batches.num_pairs:,} examples, {batches.num_sequences:,} sequences"
            + (f", cut to fit: {cut}" if cut else ""),
            f"student: {t5.param_count(net.config):,} parameters, {net.config.compute_dtype}"
            + (f", kept in {kept}" if kept != "float32" else ""),
            f"a step: {plan.examples.mean():.1f} examples in {plan.rows} rows of "
            f"{batches.capacity['inputs']} + {batches.capacity['targets']} tokens, "
            f"{plan.tokens.mean():,.0f} real (padding: {waste.inputs:.0%} of inputs, "
            f"{waste.targets:.0%} of targets, {waste.flops:.2f} x the FLOPs needed), "
            f"{num_microbatches} micro-batch{'es' if num_microbatches > 1 else ''}"
            + (f", logits of {chunk} positions at a time" if chunk else "")
            + (f", at most {objective.max_pairs} pairs" if objective.needs_pairs else ""),
            f"steps {steps[0]} to {steps[1]} in {config.model_dir} on {mesh.size} "
            f"{jax.devices()[0].platform} device{'s' if mesh.size > 1 else ''}"
            + (f", {partitioning.describe(mesh.shape)}" if mesh.size > 1 else ""),
        ]
    )


def _write_model_info(folder: epath.Path, model: t5.T5Config) -> None:
    """`model-info.txt`: every parameter's shape and logical axes, and their number."""
    shapes = jax.tree_util.tree_leaves_with_path(t5.param_shapes(model))
    axes = jax.tree.leaves(t5.param_axes(model), is_leaf=lambda x: isinstance(x, tuple))
    lines = [
        f"{partitioning.path_name(path):70s} {str(x.shape):24s} {names}"
        for (path, x), names in zip(shapes, axes, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    lines.append(f"Total: {t5.param_count(model):,} parameters")
    (folder / "model-info.txt").write_text("\n".join(lines) + "\n")
