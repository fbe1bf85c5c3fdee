"""The proof before the bill: compiles a run for devices that are not there.

`compile_train` lowers the very step that training runs, for a TPU slice of any size, through
libtpu's compiler on this machine. What it reports are bytes of a device, and from the program's
text products, memory traffic and talk between devices (`hlo`). Where there is no such compiler
(GPUs, or libtpu is not installed) `estimate` stands in, and the result says so.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging

from distill import (
    decode,
    estimate,
    hlo,
    objectives,
    optim,
    partitioning,
    students,
    t5,
    train,
)  # fmt: skip
from distill.estimate import GIB

# The published limits: what a run has whose data is not known.
DEFAULT_LENGTHS = {"inputs": 1024, "targets": 256}
# What training must be given, for who only wants its settings.
NO_RUN = ("--gin.MODEL_DIR=unused", "--gin.MIXTURE_OR_TASK_NAME=arithmetic_step_by_step")
# There is no TPU here to share, nor one to ask which it is, which takes minutes.
NO_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setup:
    """A training step, but for the devices.

    Attributes:
      model: with its remat policy.
      optimizer: Adafactor or AdamW.
      objective: what to minimise.
      mesh: how the devices are used.
      work: rows, lengths and micro-batches.
    """

    model: t5.T5Config
    optimizer: optim.Optimizer
    objective: objectives.Objective
    mesh: partitioning.MeshConfig
    work: estimate.Work


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a setup needs on a topology, for one device where nothing else is said.

    Attributes:
      topology: as given, such as `v5e:16x16`.
      chip: what each device is.
      mesh: devices along each axis.
      remat_policy: of the model.
      num_microbatches: of a step.
      verified: True where a compiler said it, False where a formula did.
      memory: bytes by kind.
      peak: largest number of bytes in use at once.
      flops: of matrix products in a step.
      recomputed: share of them that the backward pass makes a second time.
      traffic: bytes between memory and chip in a step; 0 = not known.
      sent: bytes to other devices in a step, by kind.
      seconds: lower bounds of a step by what it waits for: `compute`, `memory`, `network`.
      model_flops: of a step without recomputation.
      tokens: positions of a step, all devices together.
      devices: how many.
      compile_seconds: None where nothing was compiled.
      error: the compiler's message where the program does not fit; products and times are then
        those of the formula.
    """

    topology: str
    chip: estimate.Chip
    mesh: dict[str, int]
    remat_policy: str
    num_microbatches: int
    verified: bool
    memory: dict[str, float]
    peak: float
    flops: float
    recomputed: float
    traffic: float
    sent: dict[str, float]
    seconds: dict[str, float]
    model_flops: float
    tokens: int
    devices: int
    compile_seconds: float | None = None
    error: str | None = None

    @property
    def fits(self) -> bool:
        return self.error is None and self.peak <= self.chip.hbm

    @property
    def step_seconds(self) -> float:
        """No step can be faster: as if computing, memory and network overlapped wholly."""
        return max(self.seconds.values())

    @property
    def mfu(self) -> float:
        """Bound of the model FLOPs utilisation: useful products of the fastest possible step."""
        return self.model_flops / (self.devices * self.chip.flops * self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        """Bound, all devices together, padding included."""
        return self.tokens / self.step_seconds

    def chip_hours(self, steps: int) -> float:
        """Least hours of all devices together for so many steps."""
        return self.devices * self.step_seconds * steps / 3600


# --- Topologies -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that need not be there.

    Attributes:
      name: `v5e:4x4` (a TPU slice by its shape) or `h100-80gb:8` (GPUs by their number).
      chip: what each of them is.
      devices: to compile for; None where there is no compiler for them here.
      size: how many.
    """

    name: str
    chip: estimate.Chip
    devices: list | None
    size: int


def topology(name: str) -> Topology:
    """Finds the devices of a name.

    Raises:
      ValueError: there is no such chip or shape; the message names those that there are.
    """
    kind, _, shape = name.partition(":")
    chip = estimate.CHIPS.get(kind)
    if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(
            f"--topology={name}: give a chip and its shape or number, such as v5e:4x4, v4:4x4x4 or "
            f"h100-80gb:8. Chips: {', '.join(estimate.CHIPS)}."
        )
    size = math.prod(map(int, shape.split("x")))
    if not kind.startswith("v"):
        return Topology(name, chip, None, size)
    if "x" not in shape:
        raise ValueError(
            f"--topology={name}: a TPU slice is given by its shape, {kind}:2x4 or, v4 and v5p, "
            f"{kind}:2x2x2."
        )
    from jax.experimental import topologies

    for variable, value in NO_TPU.items():
        os.environ.setdefault(variable, value)
    # v4: two cores work as one device, as they do when JAX finds them.
    extra = {"chip_config_name": "megacore"} if kind == "v4" else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **extra)
    except Exception as e:  # JaxRuntimeError, or what a missing libtpu gives
        message = str(e)
        if importlib.util.find_spec("libtpu") is None:
            logging.warning(
                "By formula only: compiling for TPUs needs pip install 'distill[tpu-aot]'"
            )
            return Topology(name, chip, None, size)
        raise ValueError(f"--topology={name}: {message.splitlines()[0]}") from e
    return Topology(name, chip, list(found.devices), len(found.devices))


# --- Compiling ------------------------------------------------------------------------------------


def abstract_inputs(
    net: t5.T5,
    tx: optax.GradientTransformation,
    mesh: Any,
    work: estimate.Work,
    with_pair_ids: bool = False,
) -> tuple[train.TrainState, dict[str, jax.ShapeDtypeStruct], jax.ShapeDtypeStruct]:
    """State, packed batch and key as training gives them to its step; allocates nothing."""

    def array(length: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (work.rows, length), jnp.int32, sharding=partitioning.batch_sharding(mesh)
        )

    batch = {
        "encoder_input_tokens": array(work.inputs),
        "encoder_segment_ids": array(work.inputs),
        "decoder_input_tokens": array(work.targets),
        "decoder_target_tokens": array(work.targets),
        "decoder_segment_ids": array(work.targets),
        "decoder_loss_weights": array(work.targets),
        "decoder_loss_groups": array(work.targets),
    }
    if with_pair_ids:
        batch["decoder_pair_ids"] = array(work.targets)
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=partitioning.replicated(mesh))
    return train.abstract_state(net, tx, mesh), batch, key


def _require_division(mesh: Any, work: estimate.Work) -> None:
    """Raises ValueError where training would refuse the rows or their lengths."""
    parts = partitioning.batch_shards(mesh) * work.num_microbatches
    if work.rows % parts:
        more = -(-work.rows // parts) * parts
        raise ValueError(
            f"BATCH_SIZE={work.rows} rows do not divide by data x fsdp x NUM_MICROBATCHES = "
            f"{parts}: {more} would do."
        )
    partitioning.check_lengths(mesh, {"inputs": work.inputs, "targets": work.targets})


def _require_pairs(objective: objectives.Objective) -> None:
    """Raises ValueError where memory depends on a number of pairs that is not given."""
    if objective.needs_pairs and objective.max_pairs is None:
        raise ValueError(
            f"MI_WEIGHT={objective.mutual_information} needs memory for every pair of a batch, "
            "which depends on the data: plan with the number that a run prints, "
            "--gin.StepByStep.max_pairs=N."
        )


def lower_train(setup: Setup, devices: list) -> jax.stages.Lowered:
    """Traces the step that training runs, for devices that need not be there.

    Raises:
      ValueError: an axis of the model or the rows do not divide by the mesh; the objective needs
        pairs, and their number is not given or micro-batches would part them.
    """
    _require_pairs(setup.objective)
    mesh = partitioning.make_mesh(setup.mesh, devices)
    work = setup.work
    _require_division(mesh, work)
    net = t5.T5(setup.model, partitioning.activation_constraint(mesh))
    tx = setup.optimizer.build(10)
    rows = work.rows / len(devices) / work.num_microbatches
    objective = train.in_slices(setup.objective, rows, work.targets, setup.model.vocab_size)
    step = train.jit_step(net, objective, tx, work.num_microbatches)
    return step.lower(*abstract_inputs(net, tx, mesh, work, objective.needs_pairs))


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """Compiles, and reads the program's text."""
    if jax.__version_info__ >= (0, 12):
        compiled = lowered.compile()
        return compiled, compiled.as_text()
    # Older ones cannot read all that a newer libtpu makes (jax 0.10.2 with libtpu 0.0.51:
    # "async-update instruction should have 1 operands"), so the compiler has to write the text
    # itself, and then it uses one core only.
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        texts = pathlib.Path(folder).glob("*after_optimizations.txt")
        return compiled, max(texts, key=lambda file: file.stat().st_size).read_text()


def compile_train(setup: Setup, where: Topology) -> Plan:
    """Compiles the step that training runs.

    Raises:
      ValueError: an axis of the model or the rows do not divide by the mesh.
    """
    started = time.monotonic()
    guess = estimated(setup, where)
    held = {name: guess.memory[name] for name in ("parameters", "optimizer", "batch")}
    try:
        compiled, text = _compile(lower_train(setup, where.devices))
    except jax.errors.JaxRuntimeError as e:
        peak = needed(str(e), sum(held.values()))
        if peak is None:
            raise
        return dataclasses.replace(
            guess, verified=True, memory=held, peak=peak, error=str(e).splitlines()[0],
            compile_seconds=time.monotonic() - started,
        )  # fmt: skip
    seconds = time.monotonic() - started
    cost = hlo.cost(text)
    memory = compiled.memory_analysis()
    held["temporaries"] = memory.temp_size_in_bytes
    held["code"] = memory.generated_code_size_in_bytes
    return dataclasses.replace(
        guess,
        verified=True,
        memory=held,
        peak=_peak(compiled),
        flops=cost.flops,
        recomputed=max(0.0, 1 - guess.model_flops / (cost.flops * where.size)),
        traffic=cost.bytes,
        sent={kind: c.bytes for kind, c in cost.collectives.items()},
        seconds=_seconds(cost, where.chip),
        compile_seconds=seconds,
    )


def _peak(compiled: jax.stages.Compiled) -> float:
    """Bytes of a device that a program needs at once, its code included."""
    memory = compiled.memory_analysis()
    return memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes


def _seconds(cost: hlo.Cost, chip: estimate.Chip) -> dict[str, float]:
    """Lower bounds of a program's time by what it waits for."""
    return {
        "compute": cost.flops / chip.flops,
        "memory": cost.bytes / chip.bandwidth,
        "network": cost.sent / chip.network,
    }


def compile_decode(setup: Setup, where: Topology, rows: int, max_length: int) -> dict[str, float]:
    """Compiles greedy decoding of a batch, as evaluation runs it.

    Args:
      setup: its model, mesh and input length are used.
      where: devices to compile for.
      rows: decoded together.
      max_length: tokens of an answer at most.

    Returns:
      `rows`, rounded up to what the mesh shares; `peak`: bytes of a device; `seconds`: least time
      of a batch whose rows are all that long.
    """
    mesh = partitioning.make_mesh(setup.mesh, where.devices)
    shards = partitioning.batch_shards(mesh)
    rows = -(-rows // shards) * shards  # as evaluation does
    net = t5.T5(setup.model, partitioning.activation_constraint(mesh))
    tokens = jax.ShapeDtypeStruct(
        (rows, setup.work.inputs), jnp.int32, sharding=partitioning.batch_sharding(mesh)
    )
    params = students.abstract_params(net, mesh)
    lowered = decode.greedy.lower(params, tokens, model=net, max_length=max_length)
    compiled, text = _compile(lowered)
    # Loops end when all rows have; their text has no number of rounds, so they are put in here.
    # There is one loop for each length of the cache; all of them together run `max_length` rounds.
    cost = hlo.cost(text, unknown_rounds=max_length / len(decode.stages(max_length)))
    return {
        "rows": rows,
        "peak": _peak(compiled),
        "seconds": max(_seconds(cost, where.chip).values()),
    }


def needed(message: str, held: float) -> float | None:
    """Bytes that a program needs which the compiler says does not fit; None if it says otherwise.

    Args:
      message: of the compiler. It speaks of temporaries, or of all that the program uses.
      held: bytes of arguments.
    """
    units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    if match := re.search(r"temporaries \(([\d.]+)([KMGT])\) exceeds", message):
        return held + float(match[1]) * units[match[2]]
    if match := re.search(r"memory space hbm\. Used ([\d.]+)([KMGT]) of", message):
        return float(match[1]) * units[match[2]]
    return None


# --- By formula -----------------------------------------------------------------------------------


def estimated(setup: Setup, where: Topology) -> Plan:
    """The same by formula (`estimate`): at once, for any device, unverified.

    Raises:
      ValueError: the mesh does not divide the devices, or the model; micro-batches would part the
        pairs that the objective needs.
    """
    chip, work, model = where.chip, setup.work, setup.model
    objectives.require_whole_pairs(setup.objective, work.num_microbatches)
    devices = partitioning.abstract_mesh(setup.mesh, where.size)
    _require_division(devices, work)
    mesh = dict(devices.shape)
    memory = estimate.memory(model, work, mesh, *_held(setup, where.size))
    made, useful = estimate.flops(model, work)
    return Plan(
        topology=where.name,
        chip=chip,
        mesh=mesh,
        remat_policy=model.remat_policy,
        num_microbatches=work.num_microbatches,
        verified=False,
        memory=dataclasses.asdict(memory),
        peak=memory.total,
        flops=made / where.size,
        recomputed=1 - useful / made,
        traffic=0.0,
        sent={},
        seconds=estimate.seconds(model, work, mesh, chip, t5.param_count(model)),
        model_flops=useful,
        tokens=work.tokens,
        devices=where.size,
    )


def _held(setup: Setup, size: int) -> tuple[float, float]:
    """Bytes of parameters and of slots on a device."""
    # The policy changes nothing of it, and a search asks for all of them.
    model = dataclasses.replace(setup.model, remat_policy="none")
    return _held_without_policy(model, setup.optimizer, setup.mesh, size)


@functools.lru_cache(maxsize=1024)
def _held_without_policy(model, optimizer, mesh, size: int) -> tuple[float, float]:
    devices = partitioning.abstract_mesh(mesh, size)
    state = train.abstract_state(t5.T5(model), optimizer.build(10), devices)
    return estimate.bytes_on_device(state.params), estimate.bytes_on_device(state.opt_state)


# --- Searching ------------------------------------------------------------------------------------


def candidates(setup: Setup, where: Topology) -> list[tuple[Setup, Plan]]:
    """Every mesh, remat policy and number of micro-batches, by formula, the best first.

    First come those that fit with a tenth of the memory to spare, the fastest first; then the
    others, the smallest first.
    """
    found = []
    for mesh in _meshes(where.size):
        for policy in t5.REMAT_POLICIES:
            for parts in (1, 2, 4, 8, 16, 32):
                one = dataclasses.replace(
                    setup, mesh=mesh, work=dataclasses.replace(setup.work, num_microbatches=parts),
                    model=dataclasses.replace(setup.model, remat_policy=policy),
                )  # fmt: skip
                with contextlib.suppress(ValueError):  # rows, lengths or an axis do not divide
                    found.append((one, estimated(one, where)))

    def order(item: tuple[Setup, Plan]):
        one, plan = item
        fits = plan.peak <= 0.9 * plan.chip.hbm
        # What waits for the network does not overlap wholly, so it breaks ties, with simplicity.
        slow = plan.step_seconds + 0.1 * plan.seconds["network"]
        return (not fits, slow if fits else plan.peak, one.work.num_microbatches, one.mesh.tensor)

    return sorted(found, key=order)


def _meshes(devices: int) -> Iterator[partitioning.MeshConfig]:
    """All but for a `tensor` beyond a host's usual 8; the rest of the devices copies the model."""
    for tensor in (1, 2, 4, 8):
        if devices % tensor == 0:
            for fsdp in partitioning.divisors(devices // tensor):
                yield partitioning.MeshConfig(devices // tensor // fsdp, fsdp, tensor)


def search(setup: Setup, where: Topology, most: int = 3) -> Iterator[tuple[Setup, Plan]]:
    """Tries the most promising settings until `most` of them fit; compiled where that is possible.

    Yields:
      Each setting that was tried, with its plan, as soon as it is known.

    Raises:
      ValueError: there is no mesh and number of micro-batches that BATCH_SIZE divides by.
    """
    ordered = candidates(setup, where)
    if not ordered:
        raise ValueError(
            f"BATCH_SIZE={setup.work.rows} rows cannot be divided among {where.size} devices, of "
            f"which at most 8 can share rows (tensor): choose a multiple of {where.size}."
        )
    fit = 0
    for one, guess in ordered[: 4 * most]:
        plan = compile_train(one, where) if where.devices else guess
        yield one, plan
        fit += plan.fits
        if fit == most:
            return


# --- Telling --------------------------------------------------------------------------------------


def describe(plan: Plan, steps: int | None = None) -> str:
    """The plan as text for a terminal."""
    said = "compiled" if plan.verified else "by formula, unverified"
    gib = {name: value / GIB for name, value in plan.memory.items()}
    rows = [
        ("topology", f"{plan.topology}, {plan.devices} devices, {said}"),
        ("mesh", " ".join(f"{axis}={n}" for axis, n in plan.mesh.items())),
        ("remat / micro-batches", f"{plan.remat_policy} / {plan.num_microbatches}"),
        ("memory of a device", ", ".join(f"{name} {n:.2f}" for name, n in gib.items()) + " GiB"),
        (
            "peak",
            f"{plan.peak / GIB:.2f} of {plan.chip.hbm / GIB:.2f} GiB: "
            + ("fits" if plan.fits else "DOES NOT FIT"),
        ),
        (
            "products of a device",
            f"{plan.flops:.3g} FLOPs a step, {plan.recomputed:.1%} of them recomputed",
        ),
    ]
    if plan.traffic:
        rows.append(("memory traffic", f"{plan.traffic / 1e9:,.0f} GB a step"))
    if plan.sent:
        kinds = ", ".join(f"{kind} {n / 1e9:.2f}" for kind, n in sorted(plan.sent.items()))
        rows.append(("sent to others", f"{kinds} GB a step"))
    waits = ", ".join(f"{name} {n * 1e3:.1f}" for name, n in plan.seconds.items())
    rows += [
        ("least time of a step", f"{plan.step_seconds * 1e3:.1f} ms (by {waits})"),
        ("MFU at most", f"{plan.mfu:.0%}"),
        ("tokens per second", f"{plan.tokens_per_second:,.0f} at most, padding included"),
    ]
    if steps:
        rows.append((f"chip-hours, {steps:,} steps", f"{plan.chip_hours(steps):,.1f} at least"))
    if plan.compile_seconds is not None:
        rows.append(("compiled in", f"{plan.compile_seconds:.0f} s"))
    if plan.error:
        rows.append(("the compiler says", plan.error))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def table(plans: list[Plan]) -> str:
    """Plans side by side, one a line."""
    head = ("mesh", "remat", "micro-batches", "peak GiB", "fits", "ms a step", "MFU", "recomputed")
    lines = [head] + [
        (
            partitioning.describe(p.mesh),
            p.remat_policy, str(p.num_microbatches), f"{p.peak / GIB:.2f}",
            "yes" if p.fits else "no", f"{p.step_seconds * 1e3:.1f}", f"{p.mfu:.0%}",
            f"{p.recomputed:.1%}",
        )
        for p in plans
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def to_json(plan: Plan, decoding: dict[str, float] | None = None) -> str:
    """All of a plan, for a file."""
    derived = {
        name: getattr(plan, name) for name in ("fits", "step_seconds", "mfu", "tokens_per_second")
    }
    return json.dumps(dataclasses.asdict(plan) | derived | {"decoding": decoding}, indent=1)


def recommendation(setup: Setup) -> str:
    """The flags that set what a search has chosen."""
    mesh = setup.mesh.sizes
    axes = " ".join(f"--gin.MeshConfig.{axis}={n}" for axis, n in mesh.items())
    return (
        f"{axes} --gin.T5Config.remat_policy={setup.model.remat_policy} "
        f"--gin.NUM_MICROBATCHES={setup.work.num_microbatches}"
    )
