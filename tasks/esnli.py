"""e-SNLI (Camburu et al. 2018, arXiv 1812.01193): premise and hypothesis -> their relation.

Files: esnli_{train,valid,test}.json with the fields `premise`, `hypothesis` and `label` (0, 1, 2).
The input is `{premise}</s>{hypothesis}`, where `</s>` becomes the EOS id. Correct means equal text.

The teacher's completions look like

    The to go packages are not necessarily from lunch.
    Answer: neutral
    <blank line>
    Premise: [the teacher goes on with a premise of its own]

A split without these files is read from TFDS's `esnli`. Its rationales are the explanations that
people wrote for the gold label, one in train and three elsewhere; there are no teacher labels then.
"""

import re

from distill import metrics, sources, task

LABELS = ("entailment", "neutral", "contradiction")


def example(fields):
    """Returns (input, label) of a row. ANLI uses it too."""
    label = fields["label"]
    # SNLI marks pairs without agreement by -1, which would index the last label.
    if label not in range(len(LABELS)):
        raise ValueError(f"label is {label!r}, must be 0, 1 or 2 ({', '.join(LABELS)})")
    return f"{fields['premise']}{sources.EOS_TEXT}{fields['hypothesis']}", LABELS[label]


def parse(completion):
    """Returns (rationale, label) of a completion by the published rules.

    The rationale ends at `Answer:`, the label runs from there to the next `Premise`.
    """
    parts = completion.split("Answer: ")
    if len(parts) < 2:
        return None, None
    return completion.split("Answer:")[0].rstrip(), parts[1].split("Premise")[0].rstrip()


def label_word(completion, fields, rationale, label):
    """Repair: the label is the word after the announcement, whatever follows or is cut off.

    `entailment\\n\\nPre` is entailment, and a final `contradi` can only be one label. Any other
    word is no label. ANLI uses it too.
    """
    said = completion.split("Premise")[0].rstrip()
    word = re.search(r"(?:Answer:|So the answer is)\s*(\w+)", said)
    if word is None:
        return rationale, None
    start = word[1].lower()
    cut = word.end() == len(said) and len(start) > 2
    found = [known for known in LABELS if known == start or (cut and known.startswith(start))]
    return rationale or said[: word.start()].rstrip(), found[0] if found else None


RELEASED = sources.ReleasedLayout(
    "esnli",
    fields=("premise", "hypothesis", "label"),
    example=example,
    parse=parse,
    repairs=(label_word,),
)
HUMAN = sources.Tfds(
    "esnli",
    builder="esnli",
    from_splits={"train": "train", "validation": "validation", "test": "test"},
    input=lambda fields: example(fields)[0],
    label=lambda fields: example(fields)[1],
    rationale=lambda fields: [e for n in "123" if (e := fields[f"explanation_{n}"])],
)

task.register(
    "esnli",
    source=sources.FirstOf((RELEASED, HUMAN)),
    metric_fns=[metrics.label_accuracy],
    options=LABELS,
)
