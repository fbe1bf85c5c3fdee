"""ANLI, rounds 1 to 3 (Nie et al. 2020, arXiv 1910.14599): two texts -> their relation.

`anli1` has the files anli1_{train,valid,test}.json with the fields `uid`, `premise`, `hypothesis`,
`label` (0, 1, 2) and `reason` (a human's, not used); anli2 and anli3 may have the same. The input
is `{premise}</s>{hypothesis}`, as in e-SNLI. Correct means equal text.

The teacher's completions look like

    The Parma trolleybus system has been in operation since 1953, [..]. So the answer is entailment.
    <blank line>
    Premise: [the teacher goes on with a premise of its own]

A split without these files is read from TFDS's `anli/r1`, `r2` or `r3`, which has labels and no
rationales: `explain` needs a rationale store then.
"""

import dataclasses

from distill import metrics, sources, task
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


def _example(fields):
    return esnli.example({**fields, "premise": fields["context"]})  # TFDS's name


RELEASED = sources.ReleasedLayout(
    "anli1",
    fields=("premise", "hypothesis", "label"),
    example=esnli.example,
    parse=parse,
    repairs=(esnli.label_word,),
)

for n in (1, 2, 3):
    prepared = sources.Tfds(
        f"anli{n}",
        builder=f"anli/r{n}",
        from_splits={"train": "train", "validation": "validation", "test": "test"},
        input=lambda fields: _example(fields)[0],
        label=lambda fields: _example(fields)[1],
        id="uid",
    )
    task.register(
        f"anli{n}",
        source=sources.FirstOf((dataclasses.replace(RELEASED, name=f"anli{n}"), prepared)),
        metric_fns=[metrics.label_accuracy],
        options=esnli.LABELS,
    )
