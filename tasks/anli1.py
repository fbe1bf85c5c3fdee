"""ANLI, round 1 (Nie et al. 2020, arXiv 1910.14599): premise and hypothesis -> their relation.

Files: anli1_{train,valid,test}.json with the fields `uid`, `premise`, `hypothesis`, `label`
(0, 1, 2) and `reason` (a human's, not used). The input is `{premise}</s>{hypothesis}`, as in
e-SNLI. Correct means equal text.

The teacher's completions look like

    The Parma trolleybus system has been in operation since 1953, [..]. So the answer is entailment.
    <blank line>
    Premise: [the teacher goes on with a premise of its own]
"""

from distill import metrics, task
from tasks import esnli


def parse(completion):
    """Returns (rationale, label) of a completion by the published rules.

    Cut at the next `Premise`, split at `So the answer is`; the label is the rest without its last
    character, the period.
    """
    parts = completion.split("Premise")[0].rstrip().split("So the answer is")
    if len(parts) != 2:
        return None, None
    rationale, answer = parts
    return rationale.rstrip(), answer.strip()[:-1]


task.register(
    "anli1",
    source=task.ReleasedLayout(
        "anli1", fields=("premise", "hypothesis", "label"), example=esnli.example, parse=parse
    ),
    metric_fns=[metrics.label_accuracy],
)
