"""CommonsenseQA (Talmor et al. 2019, arXiv 1811.00937; CoS-E v1.11): question -> the answer's text.

Files: cqa_{train,test}.json with the fields `question`, `choices` (a list of five) and `answer`
(the text of the choice, not its letter). There is no validation file; 10 % of the train file are
held out. Correct means equal text.

The teacher's completions look like

    The answer must be [..] Of the above choices, only [..]. So the answer is (d) math problem.
    <blank line>
    Q: [the teacher goes on with a question of its own]

Without these files, TFDS's `cos_e` is read: the same questions in another order, and as rationales
the explanations that people wrote for the gold answer (Rajani et al. 2019, arXiv 1906.02361). There
are no teacher labels then.
"""

import re

from distill import metrics, sources, task

LETTERS = "abcde"


def example(fields):
    """Returns (input, label) of a row."""
    choices = fields["choices"]
    if len(choices) != 5:
        raise ValueError(f"{len(choices)} choices, must be 5: {choices}")
    listed = "\n".join(f"({letter}) {text}" for letter, text in zip(LETTERS, choices, strict=True))
    return f"{fields['question']}\nAnswer Choices:\n{listed}", fields["answer"]


def options(text):
    """Returns the choices in an input."""
    listed = text.partition("\nAnswer Choices:\n")[2]
    return [choice.strip() for choice in re.findall(rf"^\([{LETTERS}]\) (.*)$", listed, re.M)]


def parse(completion):
    """Returns (rationale, label) of a completion by the published rules.

    Cut at the next question, split at `So the answer is`; the label is the text after `(x)`, up to
    another `(x)`, without the final period. A rationale may come without a label.
    """
    parts = completion.split("Q:")[0].split("So the answer is")
    if len(parts) != 2:
        return None, None
    rationale, answer = parts
    after_letter = re.split(r"\(.\)", answer)
    label = after_letter[1].strip().removesuffix(".") if len(after_letter) > 1 else None
    return rationale.rstrip(), label


def _plain(text):
    """Lower case, without a final period, an article, and what leads on to a second answer."""
    text = re.sub(r"[,;]?\s+(or|and)$", "", text.strip().lower().rstrip(".").rstrip())
    return re.sub(r"^(a|an|the)\s+", "", text.rstrip(","))


def choice_by_text(completion, fields, rationale, label):
    """Repair: a label that is the text of one choice but for case, article or ` or` is that."""
    if label is None or label in fields["choices"]:
        return rationale, label
    same = [c for c in fields["choices"] if _plain(c) == _plain(label)]
    return rationale, same[0] if len(set(same)) == 1 else label


def choice_by_letter(completion, fields, rationale, label):
    """Repair: where the text is no choice, the letter is; of several, the one named first."""
    if label in fields["choices"]:
        return rationale, label
    answer = completion.split("Q:")[0].partition("So the answer is")[2]
    letter = re.search(rf"\(([{LETTERS}])\)", answer)
    return rationale, fields["choices"][LETTERS.index(letter[1])] if letter else label


def choice_by_reasoning(completion, fields, rationale, label):
    """Repair: `one of these` is the choice that the reasoning names first, in its conclusion.

    That is the rule for several answers again: the teacher stands by the first.
    """
    if rationale is None or label in fields["choices"]:
        return rationale, label
    conclusion = rationale.rpartition("Of the above choices")[2].lower()
    # Of "sea" and "sea shore", which begin at the same place, the longer.
    named = [(conclusion.index(c.lower()), -len(c), c) for c in fields["choices"]
             if c.lower() in conclusion]  # fmt: skip
    return rationale, min(named)[2] if named else label


def choices_only(completion, fields, rationale, label):
    """Repair: what is still no choice is no label."""
    return rationale, label if label in fields["choices"] else None


RELEASED = sources.ReleasedLayout(
    "cqa",
    fields=("question", "choices", "answer"),
    example=example,
    parse=parse,
    repairs=(choice_by_text, choice_by_letter, choice_by_reasoning, choices_only),
    holdout=True,
)
HUMAN = sources.Tfds(
    "cqa",
    builder="cos_e",
    from_splits={"train": "train", "test": "validation"},
    input=lambda fields: example(fields)[0],
    label="answer",
    rationale="abstractive_explanation",
    id="id",
    holdout=True,
)

task.register(
    "cqa",
    source=sources.FirstOf((RELEASED, HUMAN)),
    metric_fns=[metrics.label_accuracy],
    options=options,
)
