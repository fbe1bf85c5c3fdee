r"""What a knob does to the train step: time and memory of variants of one run, side by side.

    python scripts/benchmarks/knobs.py --gin_file=t5_1_1/small.gin --variant= \
        --variant=LOGITS_CHUNK=32 --variant="LOGITS_CHUNK=32 T5Config.remat_policy=full"

A variant is settings as behind `--gin.`, separated by spaces; an empty one is the defaults, but
what a run chooses by its batch (NUM_MICROBATCHES, LOGITS_CHUNK) is 1, and whole, here. All take the
same batch of random tokens, full rows, from random parameters, on one device. Steps are
interleaved, one of each variant in every round; the ratio is to the first variant's step of the
same round. Memory is what the compiled program asks for (`memory_analysis`): arguments (parameters,
optimizer's slots, batch), and temporaries beside them. `--topology=v5e:2x2` compiles for one chip
of a TPU that is not there (needs libtpu) and gives memory only.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import record
from absl import flags

from distill import configure, estimate, partitioning, plan, t5, train

_VARIANTS = flags.DEFINE_multi_string("variant", [""], "Settings, NAME=VALUE separated by spaces.")
_ROWS = flags.DEFINE_integer("rows", 16, "Rows of a batch.", lower_bound=1)
_INPUTS = flags.DEFINE_integer("inputs", 160, "Input tokens of a row.", lower_bound=1)
_TARGETS = flags.DEFINE_integer("targets", 96, "Target tokens of a row.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Steps of each variant; 0: memory only.", lower_bound=0)
_TOPOLOGY = flags.DEFINE_string("topology", None, "A TPU's, such as v5e:2x2: memory only.")
_JSON = flags.DEFINE_string("json", None, "File to write the figures to.")


def random_batch(vocab_size: int) -> dict[str, np.ndarray]:
    """Full rows of two sequences each, one of either loss group."""
    rng = np.random.default_rng(0)
    batch = {}
    for side, length in (("encoder", _INPUTS.value), ("decoder", _TARGETS.value)):
        shape = (_ROWS.value, length)
        batch[f"{side}_input_tokens"] = rng.integers(3, vocab_size, shape).astype(np.int32)
        second = np.broadcast_to(np.arange(length) >= length // 2, shape)
        batch[f"{side}_segment_ids"] = 1 + second.astype(np.int32)
    batch["decoder_target_tokens"] = np.roll(batch["decoder_input_tokens"], -1, axis=1)
    batch["decoder_loss_weights"] = np.ones_like(batch["decoder_target_tokens"])
    batch["decoder_loss_groups"] = batch["decoder_segment_ids"] - 1
    return batch


@dataclasses.dataclass
class Variant:
    """A compiled step and what it was measured at."""

    name: str
    step: jax.stages.Compiled
    state: train.TrainState | None
    batch: dict[str, jax.Array]
    rng: jax.Array
    seconds: list[float] = dataclasses.field(default_factory=list)

    def run(self) -> None:
        start = time.monotonic()
        self.state, scalars = self.step(self.state, self.batch, self.rng)
        jax.block_until_ready((self.state, scalars))
        self.seconds.append(time.monotonic() - start)


def compiled(name: str, arguments: list[str], device: jax.Device, measured: bool) -> Variant:
    """One variant's step for the device, with a state to run it on where it is measured."""
    argv = ["knobs", *arguments, *(f"--gin.{setting}" for setting in name.split())]
    given = configure.resolved_arguments(train.train, argv)
    model: t5.T5Config = given["model"]
    if device.platform == "tpu" and model.dtype == "auto":  # `auto` goes by what is here
        model = dataclasses.replace(model, dtype="bfloat16")
    net, tx = t5.T5(model), given["optimizer"].build(1000)
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=1), [device])
    step = train.jit_step(net, given["objective"], tx, given["config"].num_microbatches or 1)

    start, shapes = time.monotonic(), t5.param_shapes(model)
    key, batch = jax.random.key(0), random_batch(model.vocab_size)
    work = estimate.Work(_ROWS.value, _INPUTS.value, _TARGETS.value)
    program, state = step.lower(*plan.abstract_inputs(net, tx, mesh, work)).compile(), None
    print(f"{name or '(defaults)'}: compiled in {time.monotonic() - start:.0f} s", flush=True)
    if measured:
        draw = np.random.default_rng(0)  # quicker than compiling the initialisation
        params = jax.tree.map(
            lambda x: jnp.asarray(0.05 * draw.standard_normal(x.shape, np.float32), x.dtype), shapes
        )
        state = train.TrainState(jnp.int32(0), params, jax.jit(tx.init)(params))
        state, batch = jax.device_put((state, batch), partitioning.replicated(mesh))
    return Variant(name, program, state, batch, key)


def main(argv):
    # resolved_arguments takes gin's flags; the rest are ours.
    known = [f"--{name}" for name in flags.FLAGS]
    passed = [a for a in argv[1:] if not any(a.split("=")[0] == name for name in known)]
    passed += ["--gin_file=step_by_step.gin", *plan.NO_RUN]
    configure.parse_argv(argv)
    device, rounds = jax.devices()[0], _ROUNDS.value
    if _TOPOLOGY.value:
        found = plan.topology(_TOPOLOGY.value)
        if not found.devices:
            raise ValueError("--topology compiles: give a TPU's, with libtpu installed")
        device, rounds = found.devices[0], 0
    else:
        train.keep_freed_memory()
    variants = [compiled(name, passed, device, rounds > 0) for name in _VARIANTS.value]
    for number in range(rounds + 1 if rounds else 0):
        for variant in variants:
            variant.run()
            if number == 0:  # the first touch of its memory
                variant.seconds.clear()
    figures = []
    for variant in variants:
        memory = variant.step.memory_analysis()
        figures.append({
            "variant": variant.name,
            "arguments_mb": memory.argument_size_in_bytes / 1e6,
            "temporaries_mb": memory.temp_size_in_bytes / 1e6,
            "seconds": variant.seconds,
        })  # fmt: skip
    rows = []
    for figure in figures:
        times = figure["seconds"]
        ratios = [a / b for a, b in zip(times, figures[0]["seconds"], strict=True)]
        rows.append((
            figure["variant"] or "(defaults)", record.median(times),
            max(times) - min(times) if times else None, record.median(ratios),
            figure["arguments_mb"], figure["temporaries_mb"],
        ))  # fmt: skip
    head = ("variant", "median s", "range", "ratio", "arguments MB", "temporaries MB")
    print(record.table(head, rows))
    shape = {"rows": _ROWS.value, "inputs": _INPUTS.value, "targets": _TARGETS.value}
    about = record.about(("libtpu",), device.device_kind)
    record.save(_JSON.value, about | {"arguments": passed, "batch": shape, "variants": figures})


if __name__ == "__main__":
    configure.run_main(main)
