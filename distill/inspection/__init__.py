"""What a task holds, before a run is paid for: counts, lengths, packing, and examples as tokens.

    corpus = cache.load(config, "train")
    found = inspect(corpus, config, vocabulary.load(config.vocabulary), packing.Flops.of(model))
    print(text_report(found))

All of it comes from the row cache and needs no TensorFlow, but for `teacher_reports`, which reads
the dataset's own files again. `html_report` gives one page without scripts or external resources.

Nothing that comes from data is trusted: characters that a terminal or browser would act upon, or
not show, are replaced by visible ones (`display.visible`), and HTML is escaped.
"""

from distill.inspection.facts import (
    Inspection,
    TeacherReport,
    describe_task,
    inspect,
    pieces_of,
    teacher_reports,
    tokens_of,
)
from distill.inspection.page import html_report
from distill.inspection.text import (
    batch_facts,
    length_table,
    proposal_table,
    task_table,
    teacher_table,
    teacher_text,
    text_report,
)

__all__ = [
    "Inspection",
    "TeacherReport",
    "batch_facts",
    "describe_task",
    "html_report",
    "inspect",
    "length_table",
    "pieces_of",
    "proposal_table",
    "task_table",
    "teacher_reports",
    "teacher_table",
    "teacher_text",
    "text_report",
    "tokens_of",
]
