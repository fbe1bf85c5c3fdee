"""Metrics in SeqIO's form, `fn(targets, predictions) -> {name: value}`, and how sure they are.

`targets` and `predictions` are lists, aligned by position. All values but the support of a class
are fractions or scores in [0, 1].

| module       | what                                                                           |
|--------------|--------------------------------------------------------------------------------|
| `answers`    | the forms of a target; `answer` finds the label in a longer text               |
| `equations`  | the value of an equation, without `eval`                                       |
| `labels`     | accuracy, macro-F1, per class, agreement with the teacher, parse failures      |
| `texts`      | token F1, ROUGE-L, chrF                                                        |
| `rationales` | what a rationale concludes, and whether that is the label                      |
| `statistics` | standard errors, bootstrap intervals, McNemar's test                           |

A new metric is a function in one of them and a line in `METRICS`. Nothing here imports jax or
TensorFlow; docs/metrics.md is the guide.
"""

from distill.metrics.answers import ANSWER_FORMS, answer, answer_target, rationale
from distill.metrics.equations import equation_value, plain_arithmetic
from distill.metrics.labels import (
    allowed_labels,
    equation_accuracy,
    label_accuracy,
    listed_choices,
    macro_f1,
    parse_failure,
    per_class,
    same_label,
    teacher_agreement,
)
from distill.metrics.rationales import (
    CONCLUSIONS,
    Conclusion,
    announced_answer,
    conclusion_for,
    last_number,
    named_choice,
    nli_relation,
    rationale_consistency,
    worked_equation,
)
from distill.metrics.statistics import (
    Estimate,
    McNemar,
    MetricFn,
    estimates,
    example_values,
    mcnemar,
    mean_per_example,
    over_examples,
    standard_error,
)
from distill.metrics.texts import chrf, rouge_l, token_f1, words

# By name, so that an evaluation without TensorFlow finds a task's metrics from the cache: those
# that compare with the gold label, or a rationale with a rationale.
METRICS: dict[str, MetricFn] = {
    fn.__name__: fn
    for fn in (label_accuracy, equation_accuracy, macro_f1, per_class, token_f1, rouge_l, chrf)
}
# A task's metrics are kept as `module.function`, in caches that outlive a move between files.
for _fn in METRICS.values():
    _fn.__module__ = __name__

__all__ = [
    "ANSWER_FORMS",
    "CONCLUSIONS",
    "METRICS",
    "Conclusion",
    "Estimate",
    "McNemar",
    "MetricFn",
    "allowed_labels",
    "announced_answer",
    "answer",
    "answer_target",
    "rationale",
    "chrf",
    "conclusion_for",
    "equation_accuracy",
    "equation_value",
    "estimates",
    "example_values",
    "label_accuracy",
    "last_number",
    "listed_choices",
    "macro_f1",
    "mcnemar",
    "mean_per_example",
    "named_choice",
    "nli_relation",
    "over_examples",
    "parse_failure",
    "per_class",
    "plain_arithmetic",
    "rationale_consistency",
    "rouge_l",
    "same_label",
    "standard_error",
    "teacher_agreement",
    "token_f1",
    "words",
    "worked_equation",
]
