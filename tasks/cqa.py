"""CommonsenseQA (Talmor et al. 2019, arXiv 1811.00937; CoS-E v1.11): question -> the answer's text.

Files: cqa_{train,test}.json with the fields `question`, `choices` (a list of five) and `answer`
(the text of the choice, not its letter). There is no validation file; 10 % of the train file are
held out. Correct means equal text.

The teacher's completions look like

    The answer must be [..] Of the above choices, only [..]. So the answer is (d) math problem.
    <blank line>
    Q: [the teacher goes on with a question of its own]
"""

import re

from distill import metrics, task


def example(fields):
    """Returns (input, label) of a row."""
    choices = fields["choices"]
    if len(choices) != 5:
        raise ValueError(f"{len(choices)} choices, must be 5: {choices}")
    listed = "\n".join(f"({letter}) {text}" for letter, text in zip("abcde", choices, strict=True))
    return f"{fields['question']}\nAnswer Choices:\n{listed}", fields["answer"]


def parse(completion):
    """Returns (rationale, label) of a completion by the published rules.

    Cut at the next question, split at `So the answer is`; the label is the text after `(x)`, up to
    another `(x)`, without the final period. A rationale may come without a label. Matching the
    choice by its letter would make about 2 points more of the labels correct; that is not what
    was published.
    """
    parts = completion.split("Q:")[0].split("So the answer is")
    if len(parts) != 2:
        return None, None
    rationale, answer = parts
    after_letter = re.split(r"\(.\)", answer)
    label = after_letter[1].strip().removesuffix(".") if len(after_letter) > 1 else None
    return rationale.rstrip(), label


task.register(
    "cqa",
    source=task.ReleasedLayout(
        "cqa", fields=("question", "choices", "answer"), example=example, parse=parse, holdout=True
    ),
    metric_fns=[metrics.label_accuracy],
)
