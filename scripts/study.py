r"""Runs a study: a grid of methods, examples, sizes and seeds, as a manifest says; then the curves.

    python scripts/study.py arithmetic.toml --output_dir=/tmp/arithmetic --workers=2
    python scripts/study.py my_study.toml --output_dir=gs://bucket/mine --gin.DATA_DIR=/data

A manifest is a TOML file of yours, or one of gin_configs/studies; docs/studies.md says what is in
it. Each run is trained, the step that is best on validation is evaluated on test, once, and its
result is kept: the same command goes on where it ended. Into --output_dir go

    results.jsonl       one line a run and dataset
    results.md          the table, and what it takes to match the baseline and to pass the teacher
    *.png, *.svg        accuracy against examples, size, and every other axis with several values
    runs/, cells/, logs/  each run's MODEL_DIR, result and output

Settings pass through to all runs (--gin.NAME=value, see scripts/train.py --help), but for those
that are axes. --list prints the command of every run that is not done, for a scheduler; hosts that
share the output folder take a part each with --shard=0/4, 1/4, ...
"""

import os
import re
import shlex
import sys
from collections.abc import Sequence

from absl import flags

from distill import configure, study

_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder of the study; local or gs://.")
_WORKERS = flags.DEFINE_integer(
    "workers", None, "Runs at a time, which share out GPUs or cores. [one a GPU, else one]", 1
)
_SHARD = flags.DEFINE_string("shard", "0/1", "Run only these: i/n, every n-th one from the i-th.")
_LIST = flags.DEFINE_bool("list", False, "Print the commands of the runs that are not done.")
_CELL = flags.DEFINE_string("cell", None, "Run this one alone, in this process.")
_REPORT = flags.DEFINE_bool("report", False, "Only make the table and the plots anew.")


def command(manifest: str, output_dir: str, bindings: Sequence[str], name: str) -> list[str]:
    """The process of one run."""
    return [
        sys.executable, os.path.abspath(__file__), manifest, f"--output_dir={output_dir}",
        f"--cell={name}", *(f"--gin.{binding}" for binding in bindings),
    ]  # fmt: skip


def shard(cells: Sequence[study.Cell]) -> Sequence[study.Cell]:
    """The part of the runs that --shard names."""
    found = re.fullmatch(r"(\d+)/([1-9]\d*)", _SHARD.value)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"--shard={_SHARD.value}: write i/n with i from 0 to n - 1, such as 0/4.")
    return cells[int(found[1]) :: int(found[2])]


def main(argv: Sequence[str]) -> int | None:
    if len(argv) < 2 or argv[1].startswith("-"):
        raise ValueError("Name a manifest first: python scripts/study.py arithmetic.toml ...")
    manifest = argv[1]
    values = configure.parse_argv([argv[0], *argv[2:]])
    if values.gin_file:
        raise ValueError("The gin files are in the manifest, under files; --gin.NAME=value passes.")
    bindings = list(values.gin_bindings)
    plan = study.read(manifest)
    cells = plan.cells()
    axes = {axis for cell in cells for axis in cell.point}
    for binding in bindings:
        if (name := binding.partition("=")[0]) in axes:
            raise ValueError(f"--gin.{name}: it is an axis of {manifest}; change it there.")
    if not _OUTPUT_DIR.value:
        raise ValueError("Say where the study goes: --output_dir=...")
    output_dir = os.path.expanduser(_OUTPUT_DIR.value)

    if _CELL.value is not None:
        cell = next((cell for cell in cells if cell.name == _CELL.value), None)
        if cell is None:
            raise ValueError(f"--cell={_CELL.value}: {manifest} has no such run; see --list.")
        study.take_place()
        return study.run_cell(plan, cell, output_dir, bindings)

    def missing(of: Sequence[study.Cell]) -> list[study.Cell]:
        return [c for c in of if study.read_result(output_dir, c, plan, bindings) is None]

    todo = [] if _REPORT.value else missing(shard(cells))
    if _LIST.value or values.dry_run:
        for cell in todo:
            print(shlex.join(command(manifest, output_dir, bindings, cell.name)))
        return None
    if todo:
        print(f"{plan.title}: {len(cells)} runs, {len(todo)} to do here.", flush=True)
        logs = os.path.join(output_dir if "://" not in output_dir else "study_logs", "logs")
        outcome = study.run_cells(
            todo, lambda cell: command(manifest, output_dir, bindings, cell.name), logs,
            _WORKERS.value,
        )  # fmt: skip
    lines = [
        line for cell in cells
        for line in study.read_result(output_dir, cell, plan, bindings) or ()
    ]  # fmt: skip
    if lines:
        summary = study.summarize(plan, lines)
        study.write(summary, output_dir)
        print(study.markdown(summary))
    left = missing(cells)
    print(f"{len(cells) - len(left)} of {len(cells)} runs are done. In {output_dir}.")
    if todo and outcome.stopped:
        sys.exit(study.EXIT_PREEMPTED)
    if todo and outcome.failed:
        reasons = "".join(f"\n  {name}: {why}" for name, why in outcome.failed.items())
        raise ValueError(f"{len(outcome.failed)} runs failed:{reasons}")
    return None


if __name__ == "__main__":
    configure.run_main(main)
