r"""Makes a report of evaluations: tables, learning curves, and a page with every example.

    python scripts/report.py /tmp/svamp /tmp/cqa --output_dir=report
    python scripts/report.py 'gs://bucket/runs/*' --output_dir=report

Give any number of results.jsonl files, folders that hold some at any depth (a run's MODEL_DIR, an
EVAL_OUTPUT_DIR), or quoted globs of both; scripts/evaluate.py writes them. Into --output_dir go

    report.html   one page, needs nothing else: tables, curves, a browser of the examples
    results.md    the main table: each run at its best step by validation, and pairs of runs
    results.csv   every value
    curves.png    learning curves; curves.svg the same

The Markdown table is printed. A run's step is chosen by its validation values, never by test.
"""

import sys

from absl import app, flags

from distill import configure, report

_OUTPUT_DIR = flags.DEFINE_string("output_dir", "report", "Folder of the report.")
_MAX_EXAMPLES = flags.DEFINE_integer(
    "max_examples", report.MAX_EXAMPLES, "Examples of each checkpoint and task in the page.", 0
)
_OVER = flags.DEFINE_enum("over", "step", ["step", "tokens"], "What the plots' curves run over.")


def run(argv):
    if len(argv) < 2:
        raise configure.ConfigError(
            "Give at least one results.jsonl, folder or glob, for example: "
            "python scripts/report.py /tmp/svamp"
        )
    made = report.build(argv[1:])
    page = report.write(made, _OUTPUT_DIR.value, max_examples=_MAX_EXAMPLES.value, over=_OVER.value)
    # A terminal that is not UTF-8 gets escapes, not an error.
    sys.stdout.reconfigure(errors="backslashreplace")
    print(f"{report.markdown(made)}\n{page}")


def main(argv):
    configure.run_main(run, argv)


if __name__ == "__main__":
    app.run(main)
