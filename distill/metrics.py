"""Text metrics, in SeqIO's form: `metric_fn(targets, predictions) -> {name: value}`.

`targets` and `predictions` are lists of str, aligned by position. Accuracies are fractions in
[0, 1]. A new metric is a function here and a line in `METRICS`. Where a student writes more than
its label, `answer` finds the label in the text before a metric sees it.
"""

import ast
import math
import operator
from collections.abc import Callable, Sequence

MetricFn = Callable[[Sequence[str], Sequence[str]], dict[str, float]]

# What an equation may be made of. The text comes from a model, so it is never given to `eval`;
# the limits bound the parser's time and memory, whatever the text.
_CHARACTERS = frozenset("0123456789.+-*/() ")
_MAX_CHARACTERS = 200
_MAX_NODES = 100
_MAX_VALUE = 1e15
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}

# How a target holds its label: alone, after a rationale (as the teacher's completions end), or
# before one. No separator has a newline: SentencePiece makes a space of it.
ANSWER_FORMS = ("label", "rationale_label", "label_rationale")
_ANSWER = "So the answer is"
_EXPLANATION = "Explanation:"


def answer_target(form: str, label: str, rationale: str | None = None) -> str:
    """Returns the target text of a form; `answer` gives the label back.

    | form              | target                                 | without a rationale        |
    |-------------------|----------------------------------------|----------------------------|
    | `label`           | `{label}`                              | `{label}`                  |
    | `rationale_label` | `{rationale} So the answer is {label}` | `So the answer is {label}` |
    | `label_rationale` | `{label} Explanation: {rationale}`     | `{label}`                  |

    Raises:
      ValueError: there is no such form.
    """
    _check_form(form)
    if form == "rationale_label":
        return f"{rationale} {_ANSWER} {label}" if rationale else f"{_ANSWER} {label}"
    if form == "label_rationale" and rationale:
        return f"{label} {_EXPLANATION} {rationale}"
    return label


def answer(text: str, form: str) -> str:
    """Returns the label that a generated text holds, without outer whitespace but for `label`.

    `rationale_label`: what follows the *last* `So the answer is`, because a rationale may use the
    words too; "" where there is none: a student that was cut off has not answered, and its
    reasoning is no label. `label_rationale`: what stands before the *first* `Explanation:`, the
    whole text where there is none, since the label comes first. `label`: the text as it is.

    Raises:
      ValueError: there is no such form.
    """
    _check_form(form)
    if form == "rationale_label":
        _, found, label = text.rpartition(_ANSWER)
        return label.strip() if found else ""
    if form == "label_rationale":
        return text.partition(_EXPLANATION)[0].strip()
    return text


def _check_form(form: str) -> None:
    if form not in ANSWER_FORMS:
        raise ValueError(f"an answer's form must be one of {', '.join(ANSWER_FORMS)}, not {form!r}")


def equation_value(text: str) -> float | None:
    """Returns the value of an arithmetic expression, or None where it is not one.

    Allowed: decimal numbers, + - * /, unary minus, parentheses and spaces; at most 200 characters
    and 100 syntax nodes; every number and intermediate value below 1e15 in size.

    Args:
      text: for example `( 84.0 / 2.0 )`; surrounding whitespace does not matter.
    """
    text = text.strip()
    if not text or len(text) > _MAX_CHARACTERS or not _CHARACTERS.issuperset(text):
        return None
    try:
        tree = ast.parse(text, mode="eval")
        if sum(1 for _ in ast.walk(tree)) > _MAX_NODES:
            return None
        return float(_value(tree.body))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> float:
    """Returns the value of a syntax node; ValueError for anything that is not arithmetic."""
    # type(), not isinstance: `...` is a Constant too, and True would be an int.
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = node.value
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -_value(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    else:
        raise ValueError(type(node).__name__)
    if not abs(value) < _MAX_VALUE:
        raise ValueError("too large")
    return value


def label_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the fraction of predictions equal to their target, but for outer whitespace.

    Raises:
      ValueError: the lists differ in length or are empty.
    """
    _check_aligned(targets, predictions)
    right = sum(t.strip() == p.strip() for t, p in zip(targets, predictions, strict=True))
    return {"accuracy": right / len(targets)}


def equation_accuracy(targets: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
    """Returns the fraction of predicted equations that have the target's value.

    `( 84.0 / 2.0 )` and `(84 / 2)` never match as text, hence by value: within 1e-6 relative, or
    1e-9 absolute so that rounding does not decide a target of 0. What does not parse is wrong, and
    `unparsed` is the fraction of predictions that did not.

    Raises:
      ValueError: the lists differ in length or are empty.
    """
    _check_aligned(targets, predictions)
    right = unparsed = 0
    for target, prediction in zip(targets, predictions, strict=True):
        want, got = equation_value(target), equation_value(prediction)
        unparsed += got is None
        if want is not None and got is not None:
            right += math.isclose(want, got, rel_tol=1e-6, abs_tol=1e-9)
    return {"accuracy": right / len(targets), "unparsed": unparsed / len(targets)}


def standard_error(p: float, n: int) -> float:
    """Returns the standard error of a fraction `p` measured on `n` independent examples.

    Raises:
      ValueError: p is outside [0, 1], or n is not positive.
    """
    if not 0 <= p <= 1 or n < 1:
        raise ValueError(f"standard_error needs a fraction in [0, 1] and n >= 1; got {p=}, {n=}")
    return math.sqrt(p * (1 - p) / n)


def _check_aligned(targets: Sequence[str], predictions: Sequence[str]) -> None:
    if len(targets) != len(predictions) or not targets:
        raise ValueError(
            f"{len(targets)} targets and {len(predictions)} predictions: a metric "
            "needs one prediction for each target, and at least one"
        )


# By name, so that an evaluation without TensorFlow finds a task's metrics from the cache.
METRICS: dict[str, MetricFn] = {fn.__name__: fn for fn in (label_accuracy, equation_accuracy)}
