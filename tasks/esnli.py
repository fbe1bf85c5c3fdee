"""e-SNLI (Camburu et al. 2018, arXiv 1812.01193): premise and hypothesis -> their relation.

Files: esnli_{train,valid,test}.json with the fields `premise`, `hypothesis` and `label` (0, 1, 2).
The input is `{premise}</s>{hypothesis}`, where `</s>` becomes the EOS id. Correct means equal text.

The teacher's completions look like

    The to go packages are not necessarily from lunch.
    Answer: neutral
    <blank line>
    Premise: [the teacher goes on with a premise of its own]
"""

from distill import metrics, task

LABELS = ("entailment", "neutral", "contradiction")


def example(fields):
    """Returns (input, label) of a row. ANLI uses it too."""
    label = fields["label"]
    # SNLI marks pairs without agreement by -1, which would index the last label.
    if label not in range(len(LABELS)):
        raise ValueError(f"label is {label!r}, must be 0, 1 or 2 ({', '.join(LABELS)})")
    return f"{fields['premise']}{task.EOS_TEXT}{fields['hypothesis']}", LABELS[label]


def parse(completion):
    """Returns (rationale, label) of a completion by the published rules.

    The rationale ends at `Answer:`, the label runs from there to the next `Premise`.
    """
    parts = completion.split("Answer: ")
    if len(parts) < 2:
        return None, None
    return completion.split("Answer:")[0].rstrip(), parts[1].split("Premise")[0].rstrip()


task.register(
    "esnli",
    source=task.ReleasedLayout(
        "esnli", fields=("premise", "hypothesis", "label"), example=example, parse=parse
    ),
    metric_fns=[metrics.label_accuracy],
)
