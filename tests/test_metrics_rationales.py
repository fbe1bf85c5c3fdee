"""What rationales conclude, on made-up ones and on the teacher's own."""

import pytest

from distill import metrics, task

CHOICES = "What?\nAnswer Choices:\n(a) sea\n(b) sea shore\n(c) get lost\n(d) house\n(e) only"


@pytest.mark.parametrize(
    "rationale, choice",
    [
        ("It must be wet. Of the above choices, only sea shore is.", "sea shore"),
        ("It must be wet. Of the above choices, only the SEA is", "sea"),
        ("Of the above choices, only seas are wet.", "sea"),
        ("Of the above choices, only houses are built.", "house"),
        ("Of the above choices, only is right.", None),  # `only` leads on
        ("Of the above choices, it is only.", "only"),
        ("The house is by the sea.", "house"),  # the first
        ("It is the sea. That is all.", None),  # not in the last sentence
        ("Of the above choices, only getting lost makes sense.", None),
        ("Of the above choices, only season fits.", None),  # no part of a word
        ("It must be wet! It is the sea.\n", "sea"),
        ("It is the sea... ", "sea"),
        ("", None),
        ("...", None),
    ],
)
def test_named_choice(rationale, choice):
    assert metrics.named_choice(rationale, CHOICES) == choice


def test_named_choice_in_other_scripts():
    given = "Где?\n(а) море\n(б) лес\n(в) 海"
    assert metrics.named_choice("Там вода. Значит, это море.", given) == "море"
    assert metrics.named_choice("那里有水。所以是海。", given) == "海"
    assert metrics.named_choice("Это море.", "Где?") is None


@pytest.mark.parametrize(
    "rationale, equation",
    [
        ("He had 86 apps. So he deleted 86 - 14 = 72 apps.", "86 - 14"),
        ("So he gained 177 * 46 points. 177 * 46 is 8042.", "177 * 46"),
        ("First 3 + 4 = 7. Then (7 - 2) / 5 = 1.", "(7 - 2) / 5"),
        ("So he had -78 + 154 = 76 cakes.", "-78 + 154"),
        ("So he needs 1482 * 38 = 56,316 pieces.", "1482 * 38"),
        ("So he earns $1,357.5 - $7 = $1,350.5.", "1357.5 - 7"),
        ("3 × 4 equals 12.", "3 * 4"),
        ("In 2019. 5 + 3 = 8.", "5 + 3"),
        ("It is so (5 + 3 = 8).", "5 + 3"),
        ("186 / 19 = 9 rows.", "186 / 19"),  # what was computed, however wrongly
        ("12.8 * 660 = 8368 pages", "12.8 * 660"),
        ("So 7 * x = 35. x = 5.", None),
        ("So she had 25 + 66 caps.", None),  # not worked out
        ("9 / 0 = 1", None),
        ("She is 9. He has 5.", None),
        ("Frank is 9 - 5.", None),
        ("", None),
    ],
)
def test_worked_equation(rationale, equation):
    assert metrics.worked_equation(rationale) == equation


@pytest.mark.parametrize(
    "rationale, number",
    [
        ("9, then 4, then 8.", "8"),
        ("So he earns $21,794,323.", "21794323"),
        ("It was -3.5 degrees", "-3.5"),
        ("7-5 is 2", "2"),
        ("So 7-5.", "5"),
        ("x2", None),
        ("none", None),
    ],
)
def test_last_number(rationale, number):
    assert metrics.last_number(rationale) == number


@pytest.mark.parametrize(
    "rationale, relation",
    [
        ("The boy is not necessarily playing cops.", "neutral"),
        ("The dog could be tired, not bored.", "neutral"),
        ("That doesn’t mean that they cook.", "neutral"),
        ("A dog is not a cat.", "contradiction"),
        ("He can't stand and sit.", "contradiction"),
        ("A rose is a flower.", "entailment"),
        ("A note is knotted.", "entailment"),
        (" ", None),
    ],
)
def test_nli_relation(rationale, relation):
    assert metrics.nli_relation(rationale) == relation


@pytest.mark.parametrize(
    "rationale, answer",
    [
        ("Wet. So the answer is (d) math problem.\n\nQ: next", "math problem"),
        ("So the answer is no? So the answer is yes", "yes"),
        ("Why.\nAnswer: neutral\n\nPremise", "neutral"),
        ("The answer is (84 / 2).", "(84 / 2)"),
        ("The answer is: 3.5.", "3.5"),
        ("So the answer is", None),
        ("It is the sea.", None),
    ],
)
def test_announced_answer(rationale, answer):
    assert metrics.announced_answer(rationale) == answer


@pytest.mark.parametrize(
    "labels, inputs, name",
    [
        (["sea", "only", "pond"], [CHOICES] * 3, "named_choice"),
        (["7", "-2.5"], ["p", "q"], "last_number"),
        (["( 7.0 + 2.0 )", "7"], ["p", "q"], "worked_equation"),
        (["neutral", "entailment"], ["p", "q"], "nli_relation"),
        (["yes", "no"], ["p", "q"], "announced_answer"),
    ],
)
def test_conclusion_for_the_labels_of_a_dataset(labels, inputs, name):
    assert metrics.conclusion_for(labels, inputs) is metrics.CONCLUSIONS[name]


def test_consistency_counts_rows_with_a_conclusion():
    conclusions = ["86 - 14", "sea", None, "sea", ""]
    labels = ["(2 * 36)", "sea", "park", "park", ""]
    got = metrics.estimates(metrics.rationale_consistency, conclusions, labels)
    assert (got["rationale_consistency"].value, got["rationale_consistency"].n) == (2 / 3, 3)
    assert (got["no_conclusion"].value, got["no_conclusion"].n) == (2 / 5, 5)
    assert metrics.rationale_consistency([None], ["x"]) == {"no_conclusion": 1.0}


# The teacher's own, on the released completions by the published parsing (docs/metrics.md): rows
# with a label, conclusions, consistent ones.
TEACHER = {
    ("cqa", "test"): ("named_choice", 1221, 1095, 1055),
    ("svamp", "test"): ("worked_equation", 198, 186, 164),
    ("esnli", "test"): ("nli_relation", 9824, 9824, 8852),
}


@pytest.mark.parametrize("name, split", TEACHER)
def test_the_teachers_own_consistency(shared, name, split):
    task.reset()
    task.import_module("tasks")
    try:
        task.bind(data_dir=str(shared / "datasets"), vocabulary="bytes")
        rows = task.dataset(name).rows(split)
    finally:
        task.reset()
    conclusion = metrics.conclusion_for([r.label for r in rows], [r.input for r in rows])
    rows = [r for r in rows if r.teacher]
    conclusions = [conclusion(r.teacher.rationale or "", r.input) for r in rows]
    got = metrics.rationale_consistency(conclusions, [r.teacher.label for r in rows])
    want, n, counted, consistent = TEACHER[name, split]
    assert (conclusion.__name__, len(rows)) == (want, n)
    assert got == {
        "rationale_consistency": pytest.approx(consistent / counted),
        "no_conclusion": pytest.approx(1 - counted / n),
    }
    # Of shuffled rationales few agree: it is the rationale that decides.
    shifted = [*conclusions[1:], conclusions[0]]
    shifted = metrics.rationale_consistency(shifted, [r.teacher.label for r in rows])
    assert shifted["rationale_consistency"] < 0.5
