"""SVAMP (Patel et al. 2021, arXiv 2103.07191): arithmetic word problems -> an equation.

Files: svamp_{train,test}.json with the fields `input` (body and question, on two lines) and
`label`, an equation such as `( 84.0 / 2.0 )`. There is no validation file; 10 % of the train file
are held out. Correct means the same value: the teacher writes `(84 / 2)`.

The teacher's completions look like

    Luke scored 84 points after 2 rounds. [..] 84 / 2 = 42. The answer is (84 / 2).
    <blank line>
    Q: [the teacher goes on with a problem of its own]
"""

import re

from distill import metrics, task


def example(fields):
    """Returns (input, label) of a row."""
    return fields["input"], fields["label"]


def parse(completion):
    """Returns (rationale, label) of a completion by the published rules.

    Cut at the next problem, split at `The answer is`; the label runs from the first `(` to the last
    `)`. With no or several `The answer is` there is neither a rationale nor a label.
    """
    parts = completion.split("Q:")[0].split("The answer is")
    if len(parts) != 2:
        return None, None
    rationale, answer = parts
    label = re.search(r"\(.*\)", answer)
    return rationale.rstrip(), label and label.group(0)


def reference_accuracy(targets, predictions):
    """Returns the teacher's accuracy as published, where Python's `eval` gave the values.

    To `eval`, `a and b` is b, so that two of the 800 train answers, such as
    `((29/2) and (30/2))`, count as right: 0.7350. By `equation_accuracy`, which scores the student,
    they do not parse: 0.7325. The test split has 0.7400 both ways.
    """
    values = []
    for text in predictions:
        last = text.rpartition(" and ")[2]
        unopened = max(0, last.count(")") - last.count("("))
        values.append(last[: len(last) - unopened])
    return metrics.equation_accuracy(targets, values)


task.register(
    "svamp",
    source=task.ReleasedLayout(
        "svamp",
        fields=("input", "label"),
        example=example,
        parse=parse,
        holdout=True,
        teacher_metric=reference_accuracy,
    ),
    metric_fns=[metrics.equation_accuracy],
)
