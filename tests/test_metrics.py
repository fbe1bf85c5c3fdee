"""Text metrics: the equation parser agrees with Python where it is safe, and refuses the rest."""

import math
import random
import time

import numpy as np
import pytest

from distill import cache, evaluate, metrics


def expression(rng, depth):
    """Returns a random arithmetic expression."""
    if depth == 0 or rng.random() < 0.2:
        return rng.choice([str(rng.randrange(100)), f"{rng.uniform(0, 50):.2f}", f"{rng.random()}"])
    if rng.random() < 0.15:
        return f"-{expression(rng, depth - 1)}"
    left, right = expression(rng, depth - 1), expression(rng, depth - 1)
    text = f"{left} {rng.choice('+-*/')} {right}"
    return f"( {text} )" if rng.random() < 0.7 else text


def test_equals_python_on_generated_expressions():
    rng = random.Random(0)
    compared = 0
    for _ in range(4000):
        text = expression(rng, rng.randrange(1, 5))
        try:
            want = eval(text)  # our own text, from the generator above
        except ZeroDivisionError:
            want = None
        got = metrics.equation_value(text)
        # Beyond the limits None is right; within them, the value itself.
        if want is None or len(text) > 200 or abs(want) >= 1e15:
            assert got is None, text
        elif got is None:
            assert text.count("*") > 5 or len(text) > 150 or "/" in text, text
        else:
            compared += 1
            assert got == want, text
    assert compared > 3000


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "9**9**9",
        "9**2",
        "7 // 2",
        "7 % 2",
        "1 if 1 else 2",
        "(14, 21)",
        "(25 + x)",
        "(some - 8)",
        "(7x = 14)",
        "",
        "   ",
        "()",
        "...",
        "+5",
        "1/0",
        "1/(2-2)",
        "2 3",
        "(3",
        "3)",
        "5(3)",
        "1e5",
        "0x10",
        "1_000",
        "1,000",
        "1.2.3",
        "\x00",
        "٣ + ١",
        "(" * 90 + "1" + ")" * 90 + "0",
        "(" * 5000 + "1" + ")" * 5000,
        "-" * 150 + "1",
        "9" * 16,
        "9" * 199,
        "999999999 * 999999999",
        "1+" * 99 + "1" + "+1" * 30,
        "3\n+4",
        "*3",
        "3 4 +",
        "1" + " " * 250 + "+ 1",
        "\ud800",
    ],
)
def test_refuses(text):
    start = time.perf_counter()
    assert metrics.equation_value(text) is None
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    "text, value",
    [
        ("( 84.0 / 2.0 )", 42),
        ("(84 / 2)", 42),
        (" 7 ", 7),
        ("-(3 - 5)", 2),
        ("--3", 3),
        (".5", 0.5),
        ("((17.0 + 15.0) + 2.0)\n", 34),
        ("1/3", 1 / 3),
        ("2 + 3 * 4", 14),
    ],
)
def test_accepts(text, value):
    assert metrics.equation_value(text) == value


def test_equation_accuracy_scores_by_value():
    targets = ["( 84.0 / 2.0 )", "( 10.0 - ( 6.0 + 3.0 ) )", "( 7.0 * 30.0 )", "1/3", "0"]
    predictions = ["(84 / 2)", "(10 - 6)", "(some)", "0.33333333", "0.0"]
    got = metrics.equation_accuracy(targets, predictions)
    assert got == {"accuracy": 3 / 5, "unparsed": 1 / 5}


def test_two_unparsable_texts_are_not_equal():
    assert metrics.equation_accuracy(["x"], ["x"]) == {"accuracy": 0.0, "unparsed": 1.0}


def test_label_accuracy_ignores_outer_whitespace_only():
    got = metrics.label_accuracy(["math", "a b", "A", "x"], [" math\n", "ab", "a", "x"])
    assert got == {"accuracy": 0.5}


@pytest.mark.parametrize("fn", metrics.METRICS.values(), ids=metrics.METRICS)
def test_lists_that_do_not_line_up_are_errors(fn):
    with pytest.raises(ValueError, match="2 targets and 1 predictions"):
        fn(["1", "2"], ["1"])
    with pytest.raises(ValueError, match="0 targets"):
        fn([], [])


def test_metrics_are_found_by_name():
    assert all(metrics.METRICS[name].__name__ == name for name in metrics.METRICS)
    assert metrics.METRICS["equation_accuracy"] is metrics.equation_accuracy


def test_standard_error_is_that_of_repeated_draws():
    assert metrics.standard_error(0.5, 100) == pytest.approx(0.05)
    assert metrics.standard_error(1.0, 5) == 0
    rng = random.Random(0)
    means = [sum(rng.random() < 0.3 for _ in range(200)) / 200 for _ in range(2000)]
    spread = math.sqrt(sum((m - 0.3) ** 2 for m in means) / len(means))
    assert metrics.standard_error(0.3, 200) == pytest.approx(spread, rel=0.1)
    for p, n in ((1.5, 10), (0.5, 0)):
        with pytest.raises(ValueError, match=r"fraction in \[0, 1\]"):
            metrics.standard_error(p, n)


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


@pytest.mark.parametrize(
    "form, accuracy, length", [("label", 0.0, 64), ("rationale_label", 0.5, 256)]
)
def test_evaluation_scores_the_answer_in_the_text(monkeypatch, tmp_path, form, accuracy, length):
    facts = {
        "name": "toy", "rate": 1.0, "metrics": ["distill.metrics.label_accuracy"],
        "dataset": "toy", "answer_form": form,
    }  # fmt: skip
    rows = [
        {
            "inputs": np.array([5, 1], np.int32), "targets": np.array([6, 1], np.int32),
            "inputs_pretokenized": "x", "example_id": f"toy/{i}", "label": label,
            "loss_group": 0, "choice": 0, "loss_weight": 1000,
        }
        for i, label in enumerate(["yes", "no"])
    ]  # fmt: skip
    generation = cache.write_generation(tmp_path, "toy", "test", [(facts, None, rows)])
    corpus = cache.open_generation(tmp_path / generation)
    generated = ["It rains. So the answer is yes", "It rains and so on and no"]
    asked = []

    def predict(*args, max_length, **kwargs):
        asked.append(max_length)
        return generated

    monkeypatch.setattr(evaluate, "predict", predict)
    (score,) = evaluate.score_tasks(None, None, corpus, None, None)
    assert (score.metrics["accuracy"], asked) == (accuracy, [length])
    assert [p["generated"] for p in score.predictions] == generated
    assert [p["prediction"] for p in score.predictions] == (
        generated if form == "label" else ["yes", ""]
    )


@pytest.mark.parametrize("trained, kept", [(64, 1024), (1500, 1500)])
def test_inputs_are_cut_where_the_student_was_trained(monkeypatch, tmp_path, trained, kept):
    facts = dict(name="toy", rate=1.0, metrics=["distill.metrics.label_accuracy"], dataset="toy",
                 answer_form="label")  # fmt: skip
    row = {
        "inputs": np.append(np.full(1999, 5), 1), "targets": np.array([6, 1]),
        "inputs_pretokenized": "x", "example_id": "toy/0", "label": "yes", "loss_group": 0,
        "choice": 0, "loss_weight": 1000,
    }  # fmt: skip
    generation = cache.write_generation(tmp_path, "toy", "test", [(facts, None, [row])])
    seen = []

    def predict(params, net, inputs, *args, **kwargs):
        seen.extend(inputs)
        return ["yes"]

    monkeypatch.setattr(evaluate, "predict", predict)
    evaluate.score_tasks(
        None, None, cache.open_generation(tmp_path / generation), None, None,
        row_lengths={"inputs": trained, "targets": 32},
    )  # fmt: skip
    assert len(seen[0]) == kept and seen[0][-1] == 1
