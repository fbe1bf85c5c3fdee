"""Studies: a grid of runs from one manifest, their results in one file, and the curves.

`manifest` says what the runs are, `cell` trains and tests one of them, `pool` runs those that are
not done, `summary` and `files` say what came out. `scripts/study.py` is the command.
"""

from distill.study.cell import EXIT_BUSY, Job, read_result, run_cell
from distill.study.files import markdown, write
from distill.study.manifest import Arm, Cell, Study, read
from distill.study.pool import EXIT_PREEMPTED, Outcome, run_cells, take_place
from distill.study.summary import Summary, summarize

__all__ = [
    "EXIT_BUSY",
    "EXIT_PREEMPTED",
    "Arm",
    "Cell",
    "Job",
    "Outcome",
    "Study",
    "Summary",
    "markdown",
    "read",
    "read_result",
    "run_cell",
    "run_cells",
    "summarize",
    "take_place",
    "write",
]
