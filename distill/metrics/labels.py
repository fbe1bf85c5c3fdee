"""Metrics of labels: right or wrong, by class, by value, and against the teacher."""

import collections
import math
import re
from collections.abc import Collection, Sequence

import numpy as np

from distill.metrics.equations import equation_value, same_value
from distill.metrics.statistics import Examples, Resampled, mean_per_example, over_examples

_MAX_CLASSES = 100
# `(a) park` on a line of its own, as in an input of CommonsenseQA.
_CHOICE = re.compile(r"^\(\w\) (.+)$", re.MULTILINE)


@mean_per_example
def label_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> Examples:
    """The fraction of predictions equal to their target, but for outer whitespace.

    Raises:
      ValueError: the lists differ in length or are empty.
    """
    return {"accuracy": [t.strip() == p.strip() for t, p in zip(targets, predictions, strict=True)]}


@mean_per_example
def equation_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> Examples:
    """The fraction of predicted equations that have the target's value.

    `( 84.0 / 2.0 )` and `(84 / 2)` never match as text, hence by value. What does not parse is
    wrong.

    - `accuracy`: values equal within 1e-6 relative, or 1e-9 absolute so that rounding does not
      decide a target of 0.
    - `reference_accuracy`: values exactly equal, as published (`compute_equation_acc` of Hsieh et
      al. 2023, which gives the text to `eval`; of what `eval` takes beyond arithmetic, `and` and
      `or` are taken too, because the released completions have them).
    - `unparsed`: predictions that have no value.

    Raises:
      ValueError: the lists differ in length or are empty.
    """
    right, exactly, unparsed = [], [], []
    for target, prediction in zip(targets, predictions, strict=True):
        want, got = equation_value(target), equation_value(prediction)
        right.append(same_value(want, got))
        unparsed.append(got is None)
        # The two readings differ only where the first finds nothing.
        want, got = (
            equation_value(text, reference=True) if value is None else value
            for text, value in ((target, want), (prediction, got))
        )
        exactly.append(want is not None and want == got)
    return {"accuracy": right, "reference_accuracy": exactly, "unparsed": unparsed}


@over_examples
def macro_f1(targets: Sequence[str], predictions: Sequence[str]) -> Resampled:
    """The mean of the classes' F1, each class with the same weight whatever its size.

    The classes are the labels that occur in `targets`. A prediction outside of them is wrong for
    its target's class and opens no class of its own; a class that is only predicted has no F1.
    Labels are compared without outer whitespace.

    Raises:
      ValueError: the lists differ in length or are empty.
    """
    _, counts = _class_counts(targets, predictions)

    def resampled(index):
        right, wanted, predicted = counts(index)
        present = wanted > 0
        f1 = 2 * right[present] / (wanted + predicted)[present]
        return {"macro_f1": float(f1.mean())}

    return resampled


@over_examples
def per_class(targets: Sequence[str], predictions: Sequence[str]) -> Resampled:
    """Precision, recall, F1 and support of each class, as `f1/entailment`.

    The classes are those of `macro_f1`, in the order of their names. The support is the number of
    targets of the class. The precision of a class that is never predicted is 0.

    Raises:
      ValueError: the lists differ in length or are empty, or there are more than 100 classes.
    """
    classes, counts = _class_counts(targets, predictions)
    if len(classes) > _MAX_CLASSES:
        raise ValueError(
            f"the targets have {len(classes)} different labels; per_class is for at most "
            f"{_MAX_CLASSES} classes. Use macro_f1, or label_accuracy"
        )

    def resampled(index):
        values = {}
        for name, right, wanted, predicted in zip(
            classes, *(count.tolist() for count in counts(index)), strict=True
        ):
            if wanted:
                values[f"precision/{name}"] = right / predicted if predicted else 0.0
                values[f"recall/{name}"] = right / wanted
                values[f"f1/{name}"] = 2 * right / (wanted + predicted)
                values[f"support/{name}"] = float(wanted)
        return values

    return resampled


def _class_counts(targets, predictions):
    """Returns the classes and a function: indices -> (right, wanted, predicted), each [classes]."""
    targets, predictions = [t.strip() for t in targets], [p.strip() for p in predictions]
    classes = sorted(set(targets))
    number = {name: i for i, name in enumerate(classes)}
    wanted = np.array([number[t] for t in targets])
    # Predictions outside of the classes are counted behind them, and the count is dropped.
    predicted = np.array([number.get(p, len(classes)) for p in predictions])
    hit = wanted == predicted

    def counts(index):
        def count(numbers):
            return np.bincount(numbers, minlength=len(classes) + 1)[: len(classes)]

        want = wanted[index]
        return count(want[hit[index]]), count(want), count(predicted[index])

    return classes, counts


def same_label(a: str, b: str) -> bool:
    """Returns whether two labels mean the same: equal text, or equations of the same value."""
    return a.strip() == b.strip() or same_value(equation_value(a), equation_value(b))


@mean_per_example
def teacher_agreement(targets: Sequence[str | None], predictions: Sequence[str]) -> Examples:
    """The fraction of predictions that say what the teacher said (`same_label`).

    Args:
      targets: the teacher's labels; rows with None or "", where it said nothing, do not count.
      predictions: the student's labels.

    Raises:
      ValueError: the lists differ in length or are empty.
    """
    return {
        "teacher_agreement": [
            same_label(t, p) if t else math.nan for t, p in zip(targets, predictions, strict=True)
        ]
    }


@mean_per_example
def parse_failure(
    targets: Sequence[Collection[str] | None], predictions: Sequence[str]
) -> Examples:
    """The fraction of predictions that are no answer, right or wrong.

    Args:
      targets: the labels that each row allows, from `allowed_labels`; None = any equation.
      predictions: the student's labels; outer whitespace does not matter.

    Raises:
      ValueError: the lists differ in length or are empty.
    """
    return {
        "parse_failure": [
            equation_value(p) is None if allowed is None else p.strip() not in allowed
            for allowed, p in zip(targets, predictions, strict=True)
        ]
    }


def allowed_labels(labels: Sequence[str], inputs: Sequence[str]) -> list[frozenset[str] | None]:
    """Returns what each row allows as an answer, as far as rows show it.

    - the choices, where the input lists them (`(a) park`, one a line) and the label is among them;
    - None, which is any equation, where all labels of the other rows are equations;
    - else the labels of all those rows. That is right for classes, not for free text.

    Args:
      labels: the gold labels of a dataset's split.
      inputs: of the same rows.
    """
    choices = [frozenset(listed_choices(x)) for x in inputs]
    listed = [label.strip() in among for label, among in zip(labels, choices, strict=True)]
    rest = collections.Counter(
        label.strip() for label, found in zip(labels, listed, strict=True) if not found
    )
    others = None if all(equation_value(label) is not None for label in rest) else frozenset(rest)
    return [among if found else others for among, found in zip(choices, listed, strict=True)]


def listed_choices(text: str) -> list[str]:
    """Returns the choices that an input lists, `(a) park` on a line of its own; [] if none."""
    return [choice.strip() for choice in _CHOICE.findall(text)]
