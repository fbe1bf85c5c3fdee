"""Whether a run fits devices that you do not have yet, how fast it can be, and what it costs.

  python scripts/plan.py --topology=v5e:16x16 \\
    --gin_file=t5_1_1/xxl.gin --gin_file=step_by_step.gin --gin.BATCH_SIZE=256 \\
    --gin.MeshConfig.fsdp=32 --gin.MeshConfig.tensor=8 --gin.T5Config.remat_policy=minimal

Give what scripts/train.py gets, and a topology: a TPU slice by its shape (v4:4x4x4, v5e:2x4,
v5p:2x2x2, v6e:8x8) or GPUs by their number (h100-80gb:8, a100-80gb:8, h200-141gb:1). Neither data
nor checkpoint is read; rows are 1,024 + 256 tokens unless TASK_FEATURE_LENGTHS says otherwise.

TPUs: the step is compiled for that slice on this machine, which needs the libtpu wheel
(pip install -e '.[tpu-aot]') and minutes. GPUs: a formula, marked as unverified. --estimate_only
gives the formula for TPUs, too, at once.

--search tries mesh shapes, remat policies and numbers of micro-batches, and prints the flags of the
fastest that fits.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu is for its compiler only

import dataclasses
import pathlib

from absl import flags

from distill import configure, estimate, plan, train

_TOPOLOGY = flags.DEFINE_string("topology", None, "Devices to plan for, such as v5e:4x4.")
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes, remat policies and micro-batches.")
_TRIES = flags.DEFINE_integer("tries", 3, "Settings that fit to look at with --search.", 1)
_ESTIMATE_ONLY = flags.DEFINE_bool("estimate_only", False, "By formula, without compiling.")
_DECODE_ROWS = flags.DEFINE_integer(
    "decode_rows", None, "Compile greedy decoding of so many rows, too.", 1
)
_OUTPUT = flags.DEFINE_string("output", None, "A JSON file for the plan.")


def run(argv):
    arguments = configure.resolved_arguments(train.train, [argv[0], *plan.NO_RUN, *argv[1:]])
    if not _TOPOLOGY.value:
        raise ValueError("--topology is missing: what to plan for, such as --topology=v5e:4x4")
    config, data, model = (arguments[name] for name in ("config", "data", "model"))
    if data.pairs_per_step is not None:
        raise ValueError(
            "PAIRS_PER_STEP depends on the data; plan with the rows that it comes to, which a run "
            "prints: --gin.PAIRS_PER_STEP=None --gin.BATCH_SIZE=ROWS"
        )
    lengths = data.feature_lengths or plan.DEFAULT_LENGTHS
    if model.dtype == "auto":
        model = dataclasses.replace(model, dtype="bfloat16")  # what it is on an accelerator
    work = estimate.Work(
        data.batch_size, lengths["inputs"], lengths["targets"], config.num_microbatches or 1
    )
    where = plan.topology(_TOPOLOGY.value)
    optimizer = arguments["optimizer"]
    mesh = estimate.choose_mesh(
        arguments["mesh"], model, optimizer, work.rows // work.num_microbatches, where.chip,
        where.size,
    )  # fmt: skip
    setup = plan.Setup(model, optimizer, arguments["objective"], mesh, work)
    if _ESTIMATE_ONLY.value:
        where = dataclasses.replace(where, devices=None)
    if _DECODE_ROWS.value and not where.devices:
        raise ValueError("--decode_rows compiles, which is possible for TPUs, with libtpu, only.")
    output = _OUTPUT.value and pathlib.Path(_OUTPUT.value)
    if output and not output.parent.is_dir():
        raise ValueError(f"--output={output}: there is no folder {output.parent}")
    train.keep_freed_memory()
    print(f"{work.rows} rows of {work.inputs} + {work.targets} tokens a step", flush=True)
    if _SEARCH.value:
        setup, chosen = _search(setup, where)
    else:
        chosen = plan.compile_train(setup, where) if where.devices else plan.estimated(setup, where)
    print(plan.describe(chosen, config.train_steps_relative or config.train_steps), flush=True)
    if output:
        output.write_text(plan.to_json(chosen) + "\n")
    if _DECODE_ROWS.value:
        decoding = plan.compile_decode(setup, where, _DECODE_ROWS.value, work.targets)
        print(
            f"decoding {decoding['rows']} rows, {work.targets} tokens each: "
            f"peak {decoding['peak'] / estimate.GIB:.2f} GiB, "
            f"at least {decoding['seconds'] * 1e3:.1f} ms"
        )
        if output:
            output.write_text(plan.to_json(chosen, decoding) + "\n")


def _search(setup: plan.Setup, where: plan.Topology) -> tuple[plan.Setup, plan.Plan]:
    tried = []
    for one, result in plan.search(setup, where, _TRIES.value):
        tried.append((one, result))
        print(plan.table([result]).splitlines()[1], flush=True)
    print(f"\n{plan.table([result for _, result in tried])}\n")
    fitting = [item for item in tried if item[1].fits]
    if not fitting:
        raise ValueError(
            f"Nothing fits {where.name}. Take more devices, a smaller BATCH_SIZE or shorter rows."
        )
    best = min(fitting, key=lambda item: item[1].step_seconds)
    print(f"fastest that fits: {plan.recommendation(best[0])}\n")
    return best


if __name__ == "__main__":
    configure.run_main(run)
