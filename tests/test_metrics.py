"""Metrics of labels, and the label in what a student wrote."""

import inspect

import pytest

from distill import metrics, scoring


def test_label_accuracy_ignores_outer_whitespace_only():
    got = metrics.label_accuracy(["math", "a b", "A", "x"], [" math\n", "ab", "a", "x"])
    assert got == {"accuracy": 0.5}


@pytest.mark.parametrize("fn", metrics.METRICS.values(), ids=metrics.METRICS)
def test_lists_that_do_not_line_up_are_errors(fn):
    with pytest.raises(ValueError, match="2 targets and 1 predictions"):
        fn(["1", "2"], ["1"])
    with pytest.raises(ValueError, match="0 targets"):
        fn([], [])


@pytest.mark.parametrize("fn", metrics.METRICS.values(), ids=metrics.METRICS)
def test_metrics_have_the_form_that_seqio_asks_for(fn):
    required = [p.name for p in inspect.signature(fn).parameters.values() if p.default is p.empty]
    assert required == ["targets", "predictions"]
    for targets, predictions in (["1", "yes"], ["1", "no"]), (["x"], ["x"]):
        assert all(type(value) is float for value in fn(targets, predictions).values())


def test_metrics_are_found_by_the_name_that_a_task_keeps():
    for name, fn in metrics.METRICS.items():
        assert scoring.metric_function(f"{fn.__module__}.{fn.__name__}") is fn
        assert f"{fn.__module__}.{name}" == f"distill.metrics.{name}"
    assert metrics.METRICS["equation_accuracy"] is metrics.equation_accuracy


# --- By class -------------------------------------------------------------------------------------

TARGETS = "e e e n n c c c c n".split()
PREDICTIONS = "e n e n c c maybe c e n".split()


def test_macro_f1_and_per_class_are_those_of_scikit_learn():
    """By `precision_recall_fscore_support(..., labels=sorted(set(targets)), zero_division=0)`."""
    assert metrics.macro_f1(TARGETS, PREDICTIONS)["macro_f1"] == pytest.approx(0.6349206349206349)
    got = metrics.per_class(TARGETS, [f" {p}\n" for p in PREDICTIONS])
    want = {
        "c": (2 / 3, 1 / 2, 4 / 7, 4),
        "e": (2 / 3, 2 / 3, 2 / 3, 3),
        "n": (2 / 3, 2 / 3, 2 / 3, 3),
    }
    names = ("precision", "recall", "f1", "support")
    assert got == pytest.approx(
        {f"{name}/{c}": values[i] for c, values in want.items() for i, name in enumerate(names)}
    )


def test_classes_are_those_of_the_targets():
    """What is only predicted is wrong for its target, and no class with an F1 of 0."""
    assert metrics.macro_f1(["a", "a"], ["a", "z"]) == {"macro_f1": pytest.approx(2 / 3)}
    assert metrics.per_class(["a", "b"], ["a", "z"]) == {
        "precision/a": 1, "recall/a": 1, "f1/a": 1, "support/a": 1,
        "precision/b": 0, "recall/b": 0, "f1/b": 0, "support/b": 1,
    }  # fmt: skip


def test_macro_f1_weighs_classes_alike():
    targets = ["often"] * 98 + ["rare"] * 2
    assert metrics.label_accuracy(targets, ["often"] * 100)["accuracy"] == 0.98
    assert metrics.macro_f1(targets, ["often"] * 100)["macro_f1"] == pytest.approx(98 / 198)


def test_per_class_is_not_for_free_text():
    labels = [str(i) for i in range(101)]
    assert metrics.macro_f1(labels, labels) == {"macro_f1": 1}
    with pytest.raises(
        ValueError, match="101 different labels; per_class .* at most 100.*macro_f1"
    ):
        metrics.per_class(labels, labels)


# --- Against the teacher, and answers that are none -----------------------------------------------


def test_same_label_is_equal_text_or_equal_value():
    for a, b in (("park", " park\n"), ("( 84.0 / 2.0 )", "(84 / 2)"), ("(25 + x)", "(25 + x)")):
        assert metrics.same_label(a, b) and metrics.same_label(b, a)
    for a, b in (("park", "Park"), ("(84 / 2)", "(84 / 3)"), ("(25 + x)", "(x + 25)"), ("", "0")):
        assert not metrics.same_label(a, b)


def test_teacher_agreement_counts_where_the_teacher_spoke():
    teacher = ["(84 / 2)", None, "park", "", "yes"]
    student = ["42", "park", "sea", "x", "yes"]
    assert metrics.teacher_agreement(teacher, student) == {"teacher_agreement": 2 / 3}
    estimate = metrics.estimates(metrics.teacher_agreement, teacher, student)["teacher_agreement"]
    assert (estimate.n, estimate.value) == (3, 2 / 3)
    assert metrics.teacher_agreement([None, ""], ["a", "b"]) == {}
    assert metrics.estimates(metrics.teacher_agreement, [None], ["a"]) == {}


def test_parse_failure_is_what_no_row_allows():
    park, sea = "Where?\nAnswer Choices:\n(a) park\n(b) sea ", "Where?\n(a) sea\n(b) sand"
    allowed = metrics.allowed_labels(["park", "sea"], [park, sea])
    assert allowed == [{"park", "sea"}, {"sea", "sand"}]
    assert metrics.parse_failure(allowed, [" sea", "park"]) == {"parse_failure": 0.5}

    allowed = metrics.allowed_labels(["( 1.0 + 2.0 )", "7"], ["Ann has one.", "Ben has two."])
    assert allowed == [None, None]
    assert metrics.parse_failure(allowed, ["(25 + x)", "3"]) == {"parse_failure": 0.5}

    allowed = metrics.allowed_labels(["yes", "no", "yes"], ["p", "q", "r"])
    assert allowed == [{"yes", "no"}] * 3
    got = metrics.parse_failure(allowed, ["no", "", "yes and no"])
    assert got == {"parse_failure": pytest.approx(2 / 3)}


# --- The label in a generated text ----------------------------------------------------------------


@pytest.mark.parametrize("form", metrics.ANSWER_FORMS)
@pytest.mark.parametrize("rationale", [None, "It rains.", "He asks: So the answer is no? It is."])
def test_answer_gives_back_the_label_of_every_target(form, rationale):
    target = metrics.answer_target(form, "( 84.0 / 2.0 )", rationale)
    assert metrics.answer(target, form) == "( 84.0 / 2.0 )"
    assert "\n" not in target


def test_targets_of_the_forms():
    assert metrics.answer_target("rationale_label", "yes", "It rains.") == (
        "It rains. So the answer is yes"
    )
    assert metrics.answer_target("rationale_label", "yes") == "So the answer is yes"
    assert metrics.answer_target("label_rationale", "yes", "It rains.") == (
        "yes Explanation: It rains."
    )
    assert metrics.answer_target("label_rationale", "yes") == "yes"
    assert metrics.answer_target("label", "yes", "It rains.") == "yes"


@pytest.mark.parametrize(
    "text, form, label",
    [
        ("So the answer is no, or so. So the answer is  yes ", "rationale_label", "yes"),
        ("A rationale that was cut off, yes", "rationale_label", ""),
        ("It rains. So the answer is", "rationale_label", ""),
        ("", "rationale_label", ""),
        (" yes Explanation: no Explanation: maybe", "label_rationale", "yes"),
        ("yes", "label_rationale", "yes"),
        ("Explanation: it rains", "label_rationale", ""),
        (" It rains. So the answer is yes ", "label", " It rains. So the answer is yes "),
    ],
)
def test_answer_from_what_a_student_may_write(text, form, label):
    assert metrics.answer(text, form) == label


def test_unknown_forms_are_named():
    for call in (lambda: metrics.answer("x", "cot"), lambda: metrics.answer_target("cot", "x")):
        with pytest.raises(ValueError, match="one of label, rationale_label, .*not 'cot'"):
            call()
