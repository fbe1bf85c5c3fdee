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


# Flags of scripts/train.py that every run gets as well.
PASSED = (
    "gin_search_paths", "gin_allow_import", "tfds_data_dir", "seqio_additional_cache_dirs",
    "coordinator_address", "process_count", "process_index", "initialization_timeout",
    "heartbeat_timeout",
)  # fmt: skip


def passed(values: flags.FlagValues) -> list[str]:
    """Those of them that were given."""
    found = []
    for name in PASSED:
        if values[name].present:
            value = values[name].value
            text = ",".join(value) if isinstance(value, list) else value
            found.append(f"--{name}={text}")
    return found


def command(manifest: str, job: study.Job, name: str) -> list[str]:
    """The process of one run; it can be started from anywhere."""
    path = os.path.abspath(manifest) if os.path.isfile(manifest) else manifest
    local = "://" not in job.output_dir
    return [
        sys.executable, os.path.abspath(__file__), path,
        f"--output_dir={os.path.abspath(job.output_dir) if local else job.output_dir}",
        f"--cell={name}", *job.flags, *(f"--gin.{setting}" for setting in job.settings),
    ]  # fmt: skip


def shard(cells: Sequence[study.Cell]) -> Sequence[study.Cell]:
    """The part of the runs that --shard names."""
    found = re.fullmatch(r"(\d+)/([1-9]\d*)", _SHARD.value)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"--shard={_SHARD.value}: write i/n with i from 0 to n - 1, such as 0/4.")
    return cells[int(found[1]) :: int(found[2])]


def main(argv: Sequence[str]) -> None:
    if len(argv) < 2 or argv[1].startswith("-"):
        raise ValueError("Name a manifest first: python scripts/study.py arithmetic.toml ...")
    manifest = argv[1]
    values = configure.parse_argv([argv[0], *argv[2:]])
    if values.gin_file:
        raise ValueError("The gin files are in the manifest, under files; --gin.NAME=value passes.")
    plan = study.read(manifest)
    cells = plan.cells()
    plan.check_settings(values.gin_bindings)
    if not _OUTPUT_DIR.value:
        raise ValueError("Say where the study goes: --output_dir=...")
    if re.search(r"[,*?\[]", _OUTPUT_DIR.value):
        raise ValueError(f"--output_dir={_OUTPUT_DIR.value}: a path without , * ? and [")
    output_dir = os.path.expanduser(_OUTPUT_DIR.value)
    job = study.Job(plan, output_dir, list(values.gin_bindings), passed(values))

    if _CELL.value is not None:
        cell = next((cell for cell in cells if cell.name == _CELL.value), None)
        if cell is None:
            raise ValueError(f"--cell={_CELL.value}: {manifest} has no such run; see --list.")
        study.take_place()
        study.run_cell(job, cell)
        return
    todo = [c for c in shard(cells) if not _REPORT.value and study.read_result(job, c) is None]
    if _LIST.value or values.dry_run:
        for cell in todo:
            print(shlex.join(command(manifest, job, cell.name)))
        return
    outcome = study.Outcome()
    if todo:
        print(f"{plan.title}: {len(cells)} runs, {len(todo)} to do here.", flush=True)
        logs = os.path.join(output_dir if "://" not in output_dir else "study_logs", "logs")
        outcome = study.run_cells(
            todo, lambda cell: command(manifest, job, cell.name), logs, _WORKERS.value
        )  # fmt: skip
    kept = [study.read_result(job, cell) for cell in cells]
    left = kept.count(None)
    if left < len(cells):
        summary = study.summarize(plan, [line for lines in kept for line in lines or ()], left)
        study.write(summary, output_dir)
        print(study.markdown(summary))
    print(f"{len(cells) - left} of {len(cells)} runs are done. In {output_dir}.")
    if outcome.failed:
        reasons = "".join(f"\n  {name}: {why}" for name, why in outcome.failed.items())
        raise ValueError(f"{len(outcome.failed)} runs failed:{reasons}")
    if outcome.busy:
        print(f"Other processes have {len(outcome.busy)} of them in hand.")
    if outcome.signalled or outcome.busy:
        sys.exit(study.EXIT_PREEMPTED)  # the same command goes on


if __name__ == "__main__":
    configure.run_main(main)
