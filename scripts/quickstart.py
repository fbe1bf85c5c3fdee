"""The main job on a laptop's CPU: distilling step-by-step against training on labels alone.

Trains the tiny student (288 thousand parameters) on `arithmetic`, the embedded task, twice: once
step-by-step, on labels and rationales, and once on labels alone, with the same labelled examples
and as many steps as make up the same number of training tokens. Both are evaluated on the test
split. The result is one table, and the learning curves in OUTPUT_DIR/quickstart.png.

  python scripts/quickstart.py --output_dir=/tmp/quickstart --gin.RANDOM_SEED=1

Both runs are ordinary ones, whose commands are printed. Settings pass through to both (see
scripts/train.py --help), and a run that was interrupted goes on.
"""

import collections
import os
import shlex
import time
from collections.abc import Sequence

from absl import flags

from distill import cache, configure, data, report, train

OUTPUT_DIR = flags.DEFINE_string("output_dir", "quickstart", "Folder of both runs and the plot.")
STEPS = flags.DEFINE_integer("steps", 1000, "Updates of the step-by-step run.", lower_bound=1)

STEP_BY_STEP = "step-by-step"
LABEL_ONLY = "label-only"


def command(name: str, user_settings: Sequence[str], steps: int) -> list[str]:
    """The command line of one arm's run."""
    files = ["t5_1_1/tiny.gin", "quickstart.gin"]
    task, settings = "arithmetic_step_by_step", []
    if name == LABEL_ONLY:
        files.append("standard.gin")
        task = "arithmetic_label"
        # Shorter inputs (no prefix) and targets, so shorter rows.
        settings = ["--gin.TASK_FEATURE_LENGTHS={'inputs': 44, 'targets': 4}"]
    settings += [f"--gin.TRAIN_STEPS={steps}", f"--gin.EVAL_PERIOD={-(-steps // 10)}"]
    argv = ["scripts/train.py", *(f"--gin_file={file}" for file in files)]
    argv += [f"--gin.MIXTURE_OR_TASK_NAME={task}"]
    argv += [f"--gin.MODEL_DIR={os.path.join(OUTPUT_DIR.value, name)}"]
    return [*argv, *settings, *(f"--gin.{setting}" for setting in user_settings)]


def run(name: str, argv: list[str]) -> report.Arm:
    """Trains and evaluates one arm."""
    print(f"\n$ python {shlex.join(argv)}", flush=True)
    result = configure.execute(train.train, argv)
    settings = configure.resolved_arguments(train.train, argv)
    score = next(s for s in result.scores if s.split == "test")
    corpus = cache.load(settings["data"], "train")
    return report.Arm(
        name=name,
        examples=data.TrainBatches(corpus, settings["data"]).num_pairs,
        tokens=result.tokens,
        steps=result.step,
        accuracy=score.values["accuracy"],
        n=score.n,
        model_dir=settings["config"].model_dir,
        task=score.task,
    )


def main(argv: Sequence[str]) -> None:
    started = time.monotonic()
    values = configure.parse_argv(argv)
    if values.gin_file or values.dry_run:
        raise ValueError(
            "quickstart takes --gin.NAME=value settings only; its two commands are printed when it "
            "starts, and scripts/train.py takes everything."
        )
    distilled = run(STEP_BY_STEP, command(STEP_BY_STEP, values.gin_bindings, STEPS.value))

    # As many steps on labels alone as make up the same number of training tokens.
    settings = configure.resolved_arguments(
        train.train, command(LABEL_ONLY, values.gin_bindings, STEPS.value)
    )["data"]
    batches = data.TrainBatches(cache.load(settings, "train"), settings)
    steps = round(distilled.tokens / batches.plan(0).tokens.mean())
    label_only = run(LABEL_ONLY, command(LABEL_ONLY, values.gin_bindings, steps))

    tested = cache.load(settings, "test").tasks[0]
    labels = collections.Counter(row.label for row in tested.read(range(len(tested))))
    chance = max(labels.values()) / labels.total()
    plot = os.path.join(OUTPUT_DIR.value, "quickstart.png")
    report.learning_curves(plot, [label_only, distilled], "arithmetic, tiny student", chance)
    print(f"\n{report.comparison(label_only, distilled)}")
    print(f"Always giving the most frequent label: {chance:.4f}.")
    print(f"Learning curves: {plot}. Took {(time.monotonic() - started) / 60:.1f} minutes.")


if __name__ == "__main__":
    configure.run_main(main)
