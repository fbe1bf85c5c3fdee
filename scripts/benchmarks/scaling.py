r"""What a training step costs as the model, the sequences, the rows and the devices grow.

    python scripts/benchmarks/scaling.py

Compiles the step that training runs, on 8 CPU devices that XLA makes up, and reads the program's
text (`distill.hlo`, what is in a loop counted as often as it runs): FLOPs of matrix products, bytes
between memory and a device, bytes that a device sends, by kind of collective. Beside them stands
the formula of `distill.estimate`. Each axis changes one thing:

  model     a family of models, all sizes of which grow together; the exponent is of parameters
  length    tokens of a row, inputs and targets together, in the same proportion
  rows      of a step
  fsdp, data, tensor
            devices, each with its share of the same step; FLOPs and bytes are a device's

An exponent is the slope of a straight line through the logarithms: 1 = in proportion, 2 = squared,
-1 = shared out. For every mesh the script also runs two steps from the same state and compares
losses and the gradient's norm with those of one device: that is a check of the sharding, which ends
the script with an error where it fails. --formula names models that are too large to compile here,
by formula only. No time is measured: CPU devices that share cores say nothing about it.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence

# Before jax, which makes its devices once; what the user set comes last and wins.
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count=8 {os.environ.get('XLA_FLAGS', '')}"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
import record
from absl import app, flags

from distill import (
    configure,
    convert,
    estimate,
    hlo,
    objectives,
    optim,
    partitioning,
    plan,
    t5,
    train,
)  # fmt: skip

_AXES = flags.DEFINE_list(
    "axes", ["model", "length", "rows", "data", "fsdp", "tensor"], "What grows."
)
# The widest has the layers and the width of T5 1.1 small.
_WIDTHS = flags.DEFINE_list("widths", ["64", "128", "256", "512"], "Of the family of models.")
_WIDTH = flags.DEFINE_integer("width", 64, "Of the model on the other axes.", lower_bound=64)
_LENGTHS = flags.DEFINE_list("lengths", ["64", "128", "256", "512"], "Input tokens of a row.")
_ROWS = flags.DEFINE_list("rows", ["8", "16", "32", "64"], "Rows of a step.")
_DEVICES = flags.DEFINE_list("devices", ["1", "2", "4", "8"], "Of the meshes.")
_FORMULA = flags.DEFINE_list(
    "formula", ["t5_1_1/base", "t5_1_1/large", "t5_1_1/xl", "t5_1_1/xxl"], "By formula only."
)
_REMAT = flags.DEFINE_string("remat_policy", "none", "Of all models.")
_JSON = flags.DEFINE_string("json", None, "File for every figure.")

MESHES = ("data", "fsdp", "tensor")
BASE = estimate.Work(rows=16, inputs=128, targets=64)
TIE = 1e-5  # relative difference of losses that is another order of the same sums
# What a program computes and moves counts here, not its speed.
QUICK = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}


def model_of(width: int) -> t5.T5Config:
    """Of a family with T5 1.1's proportions: layers and heads grow with the width.

    The vocabulary grows, too, or the logits would be nearly all of a small model.
    """
    return t5.T5Config(
        vocab_size=8 * width, emb_dim=width, num_heads=max(8, width // 64),
        head_dim=max(8, width // max(8, width // 64)), mlp_dim=2 * width,
        num_encoder_layers=max(2, width // 64), num_decoder_layers=max(2, width // 64),
        dtype="float32", dropout_rate=0.0, remat_policy=_REMAT.value,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting of an axis."""

    axis: str
    value: int
    width: int
    work: estimate.Work = BASE
    mesh: partitioning.MeshConfig = partitioning.MeshConfig(data=1)
    devices: int = 1


def points() -> list[Point]:
    """All settings, axis by axis."""
    found, width = [], _WIDTH.value
    for axis in _AXES.value:
        if axis == "model":
            found += [Point(axis, int(n), int(n)) for n in _WIDTHS.value]
        elif axis == "length":
            for n in map(int, _LENGTHS.value):
                work = dataclasses.replace(BASE, inputs=n, targets=n // 2)
                found.append(Point(axis, n + n // 2, width, work))
        elif axis == "rows":
            for n in map(int, _ROWS.value):
                found.append(Point(axis, n, width, dataclasses.replace(BASE, rows=n)))
        elif axis in MESHES:
            for n in map(int, _DEVICES.value):
                mesh = partitioning.MeshConfig(**{"data": 1, **({axis: n} if n > 1 else {})})
                found.append(Point(axis, n, width, mesh=mesh, devices=n))
        else:
            raise app.UsageError(f"--axes={axis}: there are model, length, rows, {MESHES}")
    return found


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that is compiled, and what it takes."""

    compiled: jax.stages.Compiled
    mesh: jax.sharding.Mesh
    abstract: train.TrainState


def compile_step(point: Point) -> Step:
    """Compiles the step that training runs; axes have settings in common."""
    return _compiled(dataclasses.replace(point, axis="", value=0))


@functools.cache
def _compiled(point: Point) -> Step:
    devices = jax.devices()[: point.devices]
    optimizer, model = optim.AdamW(), model_of(point.width)
    setup = plan.Setup(model, optimizer, objectives.StepByStep(), point.mesh, point.work)
    compiled = plan.lower_train(setup, devices).compile(compiler_options=QUICK)
    mesh = partitioning.make_mesh(point.mesh, devices)
    net = t5.T5(model, partitioning.activation_constraint(mesh))
    return Step(compiled, mesh, train.abstract_state(net, optimizer.build(10), mesh))


def costs(point: Point, step: Step) -> dict:
    """By the program's text, and by formula; of one device."""
    found, model = hlo.cost(step.compiled.as_text()), model_of(point.width)
    if found.unknown_loops:
        raise ValueError(f"{point}: the program has loops whose rounds its text does not tell")
    made, _ = estimate.flops(model, point.work)
    memory = step.compiled.memory_analysis()
    return {
        "axis": point.axis, "value": point.value, "parameters": t5.param_count(model),
        "flops": found.flops, "formula_flops": made / point.devices,
        "bytes": found.bytes, "sent_bytes": found.sent,
        "collectives": {kind: dataclasses.asdict(c) for kind, c in found.collectives.items()},
        "arguments_bytes": memory.argument_size_in_bytes,
        "temporaries_bytes": memory.temp_size_in_bytes,
        "xla_flops": (step.compiled.cost_analysis() or {}).get("flops"),
    }  # fmt: skip


def random_batch(vocab_size: int, work: estimate.Work) -> dict[str, np.ndarray]:
    """Rows of two sequences each, one of either loss group, with padding at their ends."""
    draw, batch = np.random.default_rng(0), {}
    for side, length in (("encoder", work.inputs), ("decoder", work.targets)):
        shape, place = (work.rows, length), np.arange(length)
        real = place < length - draw.integers(0, length // 4, (work.rows, 1))
        batch[f"{side}_input_tokens"] = draw.integers(3, vocab_size, shape) * real
        batch[f"{side}_segment_ids"] = (1 + (place >= length // 2)) * real
    batch["decoder_target_tokens"] = np.roll(batch["decoder_input_tokens"], -1, axis=1)
    batch["decoder_loss_weights"] = 1 * (batch["decoder_segment_ids"] > 0)
    batch["decoder_loss_groups"] = np.maximum(batch["decoder_segment_ids"] - 1, 0)
    return {name: array.astype(np.int32) for name, array in batch.items()}


def two_steps(point: Point, step: Step) -> dict[str, list[float]]:
    """Losses and gradient norms of two steps from the same state, whatever the mesh."""
    model, draw = model_of(point.width), np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: jax.device_put(0.05 * draw.standard_normal(x.shape, np.float32), x.sharding),
        step.abstract.params,
    )
    zeros = jax.tree.map(
        lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding),
        (step.abstract.step, step.abstract.opt_state),
    )
    state = train.TrainState(zeros[0], params, zeros[1])
    batch = partitioning.shard_batch(step.mesh, random_batch(model.vocab_size, point.work))
    key = jax.device_put(jax.random.key(0), partitioning.replicated(step.mesh))
    found: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    for _ in range(2):
        state, scalars = step.compiled(state, batch, key)
        for name, values in found.items():
            values.append(float(scalars[name]))
    return found


def exponent(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Slope of the line through the logarithms of what is not 0; None for less than two."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if b > 0]
    return float(np.polyfit(*np.log(pairs).T, 1)[0]) if len(pairs) > 1 else None


def by_formula() -> list[dict]:
    """Models that are only counted: 64 rows of 288 + 104 tokens on one device, AdamW, bfloat16."""
    work, found = estimate.Work(64, 288, 104), []
    for name in _FORMULA.value:
        model = dataclasses.replace(
            convert.released_config(name), dtype="bfloat16", remat_policy=_REMAT.value
        )
        setup = plan.Setup(
            model, optim.AdamW(), objectives.StepByStep(), partitioning.MeshConfig(), work
        )
        guess = plan.estimated(setup, plan.topology("h200-141gb:1"))
        found.append({
            "model": name, "parameters": t5.param_count(model), "rows": work.rows,
            "inputs": work.inputs, "targets": work.targets, "flops": guess.flops,
            "peak_bytes": guess.peak, "state_bytes": (
                guess.memory["parameters"] + guess.memory["optimizer"]),
        })  # fmt: skip
    return found


def check(point: Point, values: dict, alone: dict) -> float:
    """Largest relative difference from one device's; raises ValueError where it is no rounding."""
    difference = max(
        abs(a - b) / abs(b)
        for name in alone
        for a, b in zip(values[name], alone[name], strict=True)
    )
    if not difference <= TIE:
        raise ValueError(
            f"{point.devices} devices along {point.axis} compute something else: {values}, one "
            f"device {alone}"
        )
    return difference


def run(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    train.keep_freed_memory()
    rows, fits, alone = [], [], None
    for point in points():
        step = compile_step(point)
        row = costs(point, step)
        if point.axis in MESHES:
            if alone is None:
                one = dataclasses.replace(point, mesh=partitioning.MeshConfig(data=1), devices=1)
                alone = two_steps(one, step if point.devices == 1 else compile_step(one))
            row["losses"] = two_steps(point, step)
            row["relative_difference"] = check(point, row["losses"], alone)
        rows.append(row)
        print(f"{point.axis} {point.value}", flush=True)
    for axis in _AXES.value:
        mine = [row for row in rows if row["axis"] == axis]
        x = [row["parameters" if axis == "model" else "value"] for row in mine]
        names = ("flops", "formula_flops", "bytes", "sent_bytes", "temporaries_bytes")
        fits.append({"axis": axis} | {n: exponent(x, [row[n] for row in mine]) for n in names})
    result = {
        "about": record.about(),
        "setting": {
            "width": _WIDTH.value, "remat_policy": _REMAT.value, **dataclasses.asdict(BASE),
        },
        "points": rows, "exponents": fits, "formula": by_formula(),
    }  # fmt: skip
    head = ("", "parameters", "GFLOP", "formula", "ratio", "GB moved", "MB sent", "temporaries MB",
            "difference")  # fmt: skip
    print(record.table(head, [(
        f"{row['axis']} {row['value']}", row["parameters"], row["flops"] / 1e9,
        row["formula_flops"] / 1e9, row["flops"] / row["formula_flops"], row["bytes"] / 1e9,
        row["sent_bytes"] / 1e6, row["temporaries_bytes"] / 1e6, row.get("relative_difference"),
    ) for row in rows]))  # fmt: skip
    print()
    head = ("exponent of", "FLOPs", "formula", "bytes moved", "bytes sent", "temporaries")
    print(record.table(head, [tuple(fit.values()) for fit in fits]))
    if result["formula"]:
        print("\nby formula only")
        head = ("", "parameters", "TFLOP", "state GB", "peak GB")
        print(record.table(head, [(
            row["model"], row["parameters"], row["flops"] / 1e12, row["state_bytes"] / 1e9,
            row["peak_bytes"] / 1e9,
        ) for row in result["formula"]]))  # fmt: skip
    record.save(_JSON.value, result)


def main(argv):
    configure.run_main(run, argv)


if __name__ == "__main__":
    app.run(main)
