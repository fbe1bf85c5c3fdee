"""Prints what was read from each dataset: rows, parsed completions, the teacher's accuracy.

    python -m tasks svamp cqa --data_dir=/data
    python -m tasks cqa --data_dir=/data --parsing=repaired      # and what each repair brings

Without names, all datasets. `gold` counts the rows with a gold label; `parsed` and `unparsed` count
the teacher's labels; `teacher` is their accuracy, over the rows with a gold label that the teacher
was asked.
"""

import sys

from absl import app, flags

from distill import sources, task

_SETTINGS = {
    "data_dir": flags.DEFINE_string("data_dir", None, "Folder of the datasets."),
    "parsing": flags.DEFINE_enum(
        "parsing", None, ["reference", "repaired"], "How the teacher's completions are read."
    ),
    "teacher_filter": flags.DEFINE_enum(
        "teacher_filter",
        None,
        ["keep", "drop", "label_only", "keep_gold"],
        "What becomes of training rows whose teacher label is wrong.",
    ),
    "rationale_store": flags.DEFINE_string(
        "rationale_store", None, "Takes the place of the teacher's answers."
    ),
    "max_bad_rows": flags.DEFINE_integer(
        "max_bad_rows", None, "Unusable lines of a file that are left out.", lower_bound=0
    ),
}
_LINE = "{:<24} {:>8} {:>8} {:>8} {:>8} {:>10} {:>8}".format


def main(argv):
    try:
        task.bind(**{name: flag.value for name, flag in _SETTINGS.items()})
        task.import_module("tasks")
        names = argv[1:] or task.datasets()
        for name in names:
            task.dataset(name)  # All names are right before the first is read.
    except (ValueError, FileNotFoundError) as e:
        sys.exit(f"error: {e}")
    failed = False
    print(_LINE("dataset split", "rows", "gold", "parsed", "unparsed", "rationales", "teacher"))
    for name in names:
        absent = {}
        for split in task.dataset(name).splits:
            try:
                _print_split(name, split)
            except FileNotFoundError as e:
                absent[split] = str(e)
            except ValueError as e:
                failed = True
                print(f"{name} {split}: error: {e}")
        if absent:  # Said once, not for every split.
            print(f"{name} {', '.join(absent)}: not there")
            for reason in next(iter(absent.values())).split(sources.OR):
                print(f"    {reason}")
    if failed:
        sys.exit(1)


def _print_split(name, split):
    r = task.report(name, split)
    print(
        _LINE(
            f"{name} {split}",
            r.rows,
            r.rows - r.unlabeled,
            r.parsed,
            r.unparsed,
            r.rationales,
            _accuracy(r.teacher_accuracy),
        )
    )
    for note in r.notes:
        print(f"    {note}")
    if sources.settings().parsing == "repaired":
        for step, unparsed, accuracy in sources.repair_gains(task.dataset(name), split):
            print(_LINE(f"    {step}", "", "", "", unparsed, "", _accuracy(accuracy)))


def _accuracy(value):
    return "-" if value is None else f"{value:.6f}"


if __name__ == "__main__":
    app.run(main)
