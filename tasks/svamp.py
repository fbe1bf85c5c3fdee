"""SVAMP (Patel et al. 2021, arXiv 2103.07191): arithmetic word problems -> an equation.

Files: svamp_{train,test}.json with the fields `input` (body and question, on two lines) and
`label`, an equation such as `( 84.0 / 2.0 )`; or SVAMP.json, the 1,000 problems as their authors
give them, which is cut into the same rows. There is no validation file; 10 % of the train rows are
held out. Correct means the same value: the teacher writes `(84 / 2)`.

The teacher's completions look like

    Luke scored 84 points after 2 rounds. [..] 84 / 2 = 42. The answer is (84 / 2).
    <blank line>
    Q: [the teacher goes on with a problem of its own]

`svamp_asdiv` adds the problems of ASDiv (Miao et al. 2020, arXiv 2106.15772) to the training rows,
as inputs without gold labels: asdiv/asdiv_train.json and its completions, in the same form.
"""

import dataclasses
import re

import numpy as np

from distill import metrics, sources, task

_NUMBER = r"\d+(?:\.\d+)?"


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


def last_of_several(completion, fields, rationale, label):
    """Repair: of `((29/2) and (30/2))` the last, as the published scoring took it."""
    if label is None or " and " not in label:
        return rationale, label
    last = label.rpartition(" and ")[2]
    return rationale, last.removesuffix(")" * max(0, last.count(")") - last.count("(")))


def plain_numbers(completion, fields, rationale, label):
    """Repair: `((8 action figures + 1,210 shelves) * 4)` without units and thousands commas."""
    if label is None or metrics.equation_value(label) is not None:
        return rationale, label
    # One comma and three digits: `(14, 21)` is two numbers.
    without = re.sub(r"(?<=\d),(?=\d{3}\b)", "", label)
    without = re.sub(rf"({_NUMBER})(?: [A-Za-z]+)+", r"\1", without)
    return rationale, without if metrics.equation_value(without) is not None else label


def unannounced(completion, fields, rationale, label):
    """Repair: without `The answer is`, the equation that the last sentence works out rightly.

    `So Jake has 16 - 7 = 9 peaches.` is `(16 - 7)`. The sentence must be complete: a completion
    that was cut off has not come to its answer.
    """
    said = completion.split("Q:")[0].rstrip()
    if label is not None or "The answer is" in said or not said.endswith("."):
        return rationale, label
    sentence = re.split(r"(?<=[.!?])\s+", said)[-1]
    found = re.findall(rf"({_NUMBER}(?: [-+*/] {_NUMBER})+) = ({_NUMBER})", sentence)
    if not found or metrics.equation_accuracy([found[-1][1]], [found[-1][0]])["accuracy"] != 1:
        return rationale, label
    return said, f"({found[-1][0]})"


def equations_only(completion, fields, rationale, label):
    """Repair: what has no value, such as `(25 + x)` or a cut `((415 - 309)`, is no label."""
    return rationale, label if label and metrics.equation_value(label) is not None else None


def reference_accuracy(targets, predictions):
    """Returns the teacher's accuracy as published, where Python's `eval` gave the values.

    To `eval`, `a and b` is b, so that two of the 800 train answers, such as
    `((29/2) and (30/2))`, count as right: 0.7350. By the `accuracy` that scores the student they do
    not parse: 0.7325. The test split has 0.7400 both ways.
    """
    return {"accuracy": metrics.equation_accuracy(targets, predictions)["reference_accuracy"]}


def original_example(fields):
    """Returns (input, label) of a problem in SVAMP.json."""
    return f"{fields['Body']}\n{fields['Question']}", fields["Equation"]


def read_original(path, stem):
    """Returns the problems of SVAMP.json in the order of the train or test rows of the paper."""
    problems = sources.read_json(path)
    if not isinstance(problems, list) or len(problems) != 1000:
        raise ValueError(f"{path}: must be the JSON list of the 1,000 problems of SVAMP")
    order = np.random.RandomState(0).permutation(1000)
    return [problems[i] for i in (order[:800] if stem == "train" else order[800:])]


RELEASED = sources.ReleasedLayout(
    "svamp",
    fields=("input", "label"),
    example=example,
    parse=parse,
    repairs=(last_of_several, plain_numbers, unannounced, equations_only),
    holdout=True,
    teacher_metric=reference_accuracy,
)
ORIGINAL = dataclasses.replace(
    RELEASED, file="SVAMP.json", read=read_original, example=original_example
)
SVAMP = sources.FirstOf((RELEASED, ORIGINAL))
ASDIV = dataclasses.replace(RELEASED, name="asdiv", holdout=False, splits=("train",))

task.register("svamp", source=SVAMP, metric_fns=[metrics.equation_accuracy])
task.register(
    "svamp_asdiv",
    source=sources.WithPool(SVAMP, ASDIV),
    metric_fns=[metrics.equation_accuracy],
)
