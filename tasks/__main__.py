"""Prints what was read from each dataset: rows, parsed completions, the teacher's accuracy.

    python -m tasks svamp cqa --data_dir=/data

Without names, all datasets. `parsed` and `unparsed` count the teacher's labels; `teacher` is their
accuracy over all rows.
"""

from absl import app, flags

from distill import task

_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of the datasets [DISTILL_DATA_DIR].")


def main(argv):
    task.bind(data_dir=_DATA_DIR.value)
    task.import_module("tasks")
    line = "{:<24} {:>8} {:>8} {:>8} {:>10} {:>8}".format
    print(line("dataset split", "rows", "parsed", "unparsed", "rationales", "teacher"))
    for name in argv[1:] or task.datasets():
        for split in task.dataset(name).splits:
            try:
                r = task.report(name, split)
            except FileNotFoundError as e:
                print(f"{name} {split}: {e}")
                continue
            accuracy = "-" if r.teacher_accuracy is None else f"{r.teacher_accuracy:.6f}"
            print(line(f"{name} {split}", r.rows, r.parsed, r.unparsed, r.rationales, accuracy))


if __name__ == "__main__":
    app.run(main)
