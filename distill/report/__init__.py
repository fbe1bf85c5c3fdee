"""Tables, plots and a page of evaluations; the comparison that the quickstart prints.

    made = report.build(["/tmp/svamp", "gs://runs/*"])
    report.write(made, "report")

`build` reads the `results.jsonl` of evaluations and the predictions beside them, `write` makes
report.html, results.md, results.csv, curves.png and curves.svg.
"""

from etils import epath

from distill.report.arms import Arm, comparison, curve, learning_curves
from distill.report.files import csv_table, draw, markdown
from distill.report.page import MAX_EXAMPLES, html_report
from distill.report.results import Result, find, read, shortest_names
from distill.report.summary import Report, build

__all__ = [
    "MAX_EXAMPLES",
    "Arm",
    "Report",
    "Result",
    "build",
    "comparison",
    "csv_table",
    "curve",
    "draw",
    "find",
    "html_report",
    "learning_curves",
    "markdown",
    "read",
    "shortest_names",
    "write",
]


def write(
    report: Report, output_dir: str, *, max_examples: int = MAX_EXAMPLES, over: str = "step"
) -> epath.Path:
    """Writes the page, the tables and the plots into a folder, and returns the page's path.

    Args:
      report: from `build`.
      output_dir: local or gs://; made if it is not there.
      max_examples: of each file of predictions, the first so many go into the page.
      over: what the plots' curves run over, `step` or `tokens`; the page has both.
    """
    folder = epath.Path(output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("results.md", markdown(report)),
        ("results.csv", csv_table(report)),
        ("report.html", html_report(report, max_examples)),
    ):
        (folder / name).write_bytes(text.encode("utf-8"))
    for name in ("curves.png", "curves.svg"):
        draw(report, folder / name, over)
    return folder / "report.html"
