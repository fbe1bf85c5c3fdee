"""Decisions on the teacher's answers: every column in every corner, and a vote by brute force."""

import collections
import dataclasses
import itertools
import random

import pytest
from teacher_answers import asked, bought, rationalised

from distill import metrics, sources, task
from distill.teacher import store
from distill.teacher.decisions import KEPT, REASONS, Decision, Policy, contains_label, decide

EQUATION = metrics.equation_accuracy


def columns(decisions, *names):
    """The named columns of each decision, bare where it is one."""
    rows = [tuple(getattr(d, name) for name in names) for d in decisions]
    return [row[0] for row in rows] if len(names) == 1 else rows


# --- Columns --------------------------------------------------------------------------------------


def test_one_answer_and_everything_about_it():
    (d,) = decide(
        [asked(gold="park")], [bought(label="park", rationale="Only the Park has it.")],
        Policy(), options=["park", "sea"],
    )  # fmt: skip
    assert d == Decision(
        id="toy/train/q", key="q.0", parsed=True, in_options=True, right=True, vote="park",
        confidence=1.0, agrees=True, words=5, leaks=True, duplicate_of=None, kept=True,
        reason="kept",
    )  # fmt: skip


def test_an_answer_without_a_label_has_no_opinion():
    for label in (None, "", " \n"):
        (d,) = decide(
            [asked(gold="park")], [bought(label=label, rationale="a b c")], Policy(),
            options=["park"],
        )  # fmt: skip
        assert d == Decision(
            id="toy/train/q", key="q.0", parsed=False, in_options=None, right=None, vote=None,
            confidence=None, agrees=None, words=3, leaks=False, duplicate_of=None, kept=False,
            reason="unparsed",
        )  # fmt: skip


@pytest.mark.parametrize("cls", store.CLASSES[1:])
def test_an_answer_of_another_class_never_votes_even_with_a_label(cls):
    answers = [bought(sample=0, label="a", cls=cls), bought(sample=1, label="a", cls=cls),
               bought(sample=2, label="b")]  # fmt: skip
    made = decide([asked(gold="a")], answers, Policy())
    assert columns(made, "parsed", "right", "vote", "confidence", "agrees", "reason") == [
        (False, None, "b", None, None, cls),
        (False, None, "b", None, None, cls),
        (True, False, "b", 1.0, True, KEPT),
    ]


def test_without_gold_nothing_is_right_or_wrong():
    answers = [bought(sample=i, label=label) for i, label in enumerate("aab")]
    made = decide([asked()], answers, Policy())
    assert columns(made, "right", "vote", "confidence", "agrees") == [
        (None, "a", 2 / 3, True), (None, "a", 2 / 3, True), (None, "a", 1 / 3, False),
    ]  # fmt: skip
    # The vote stands in for gold.
    matched = decide([asked()], answers, Policy(answer_match=True))
    assert columns(matched, "reason") == [KEPT, KEPT, "wrong"]
    # Gold is gold, also where it is outvoted.
    matched = decide([asked(gold="b")], answers, Policy(answer_match=True))
    assert columns(matched, "reason") == ["wrong", "wrong", KEPT]


def test_a_tie_goes_to_the_label_said_first():
    for said in ("ab", "ba", "abab", "cabab"):
        answers = [bought(sample=i, label=label) for i, label in enumerate(said)]
        random.Random(0).shuffle(answers)  # the samples count, not the order in the list
        made = decide([asked()], answers, Policy())
        assert set(columns(made, "vote")) == {"a" if said == "cabab" else said[0]}
        assert columns(made, "key") == [f"q.{i}" for i in range(len(said))]


def test_no_vote():
    answers = [bought(sample=0), bought(sample=1, cls="refused"), rationalised(label="a")]
    made = decide([asked(gold="a")], answers, Policy())
    assert columns(made, "vote") == [None] * 3
    assert columns(made, "reason") == ["unparsed", "refused", KEPT]


def test_rationalised_answers_never_vote():
    answers = [bought(sample=0, label="a"), *(rationalised(sample=i, label="b") for i in (1, 2))]
    made = decide([asked(gold="b")], answers, Policy())
    assert columns(made, "right", "vote", "confidence", "agrees") == [
        (False, "a", 1.0, True), (True, "a", None, None), (True, "a", None, None),
    ]  # fmt: skip
    # Plain ones come first, whatever their sample.
    answers = [rationalised(sample=0, label="b"), bought(sample=5, label="a")]
    assert columns(decide([asked()], answers, Policy()), "key") == ["q.5", "q.0"]


@pytest.mark.parametrize(
    "gold, label, plain, policy, reason",
    [
        ("b", "b", ["a"], {}, KEPT),
        ("b", "b", [], {}, KEPT),
        ("b", "b", [None], {}, KEPT),
        ("b", "b", ["a", "b"], {}, "not needed"),
        ("b", "b", ["a"], dict(rationalised=False), "rationalised"),
        ("b", "a", ["c"], {}, "wrong"),  # it was told b
        (None, "b", ["a"], {}, "wrong"),  # told to another row with the same input
        ("b", None, ["a"], {}, "unparsed"),
        ("b", "b", ["a"], dict(min_confidence=1.0, answer_match=True), KEPT),  # nobody voted
        ("b", "b", ["a"], dict(min_words=3), "short"),
    ],
)
def test_when_a_rationalised_answer_is_kept(gold, label, plain, policy, reason):
    answers = [bought(sample=i, label=x) for i, x in enumerate(plain)] + [rationalised(label=label)]
    assert decide([asked(gold=gold)], answers, Policy(**policy))[-1].reason == reason


def test_two_rows_with_one_input_share_the_answers():
    rows = [asked(gold="a", id="1"), asked(gold="b", id="2"), asked(id="3")]
    answers = [bought(sample=0, label="a"), rationalised(label="b")]
    made = decide(rows, answers, Policy(answer_match=True))
    assert columns(made, "id", "key", "right", "reason") == [
        ("1", "q.0", True, KEPT), ("1", "q.9", False, "wrong"),
        ("2", "q.0", False, "wrong"), ("2", "q.9", True, KEPT),
        ("3", "q.0", None, KEPT), ("3", "q.9", None, "wrong"),
    ]  # fmt: skip


def test_rows_without_answers_and_answers_without_rows():
    rows = [asked("x"), asked("y", gold="a")]
    made = decide(rows, [bought("y", label="a"), bought("z", label="a")], Policy())
    assert columns(made, "id", "key") == [("toy/train/y", "y.0")]
    assert decide([], [bought()], Policy()) == decide(rows, [], Policy()) == []


def test_a_row_of_several_mixtures_is_decided_once():
    row = asked(gold="a")
    again = dataclasses.replace(row, dataset="toy_and_more")
    assert len(decide([row, again], [bought(label="a")], Policy())) == 1
    with pytest.raises(ValueError, match="two rows have the id 'toy/train/q'"):
        decide([row, asked(gold="b")], [], Policy())
    with pytest.raises(ValueError, match="two rows have the id"):
        decide([row, asked("other", gold="a", id=row.id)], [], Policy())
    with pytest.raises(ValueError, match="two answers have the key 'q.0'"):
        decide([row], [bought(), bought()], Policy())


def test_equations_vote_by_value_and_are_right_by_value():
    said = ["(84 / 2)", "6 * 7", "( 84.0 / 2.0 )", "41", "(x + 1)", " (x + 1) "]
    answers = [bought(sample=i, label=label) for i, label in enumerate(said)]
    made = decide([asked(gold="( 84.0 / 2.0 )")], answers, Policy(), EQUATION)
    assert columns(made, "right", "vote", "confidence", "agrees") == [
        (True, "(84 / 2)", 0.5, True), (True, "(84 / 2)", 0.5, True),
        (True, "(84 / 2)", 0.5, True), (False, "(84 / 2)", 1 / 6, False),
        (False, "(84 / 2)", 1 / 3, False), (False, "(84 / 2)", 1 / 3, False),
    ]  # fmt: skip
    # As text they are five labels.
    made = decide([asked()], answers, Policy())
    assert columns(made, "confidence") == [*[1 / 6] * 4, 1 / 3, 1 / 3]
    # A gold label without a value is nobody's, by this metric.
    made = decide([asked(gold="(x + 1)")], answers, Policy(), EQUATION)
    assert not any(columns(made, "right"))


def test_options():
    answers = [bought(sample=i, label=x) for i, x in enumerate(["a", " a ", "(a) a", None])]
    for options in (["a ", "b"], lambda text: ["a", text]):
        made = decide([asked("q")], answers, Policy(), options=options)
        assert columns(made, "in_options") == [True, True, False, None]
    for options in (None, [], lambda text: []):
        assert set(
            columns(decide([asked()], answers, Policy(), options=options), "in_options")
        ) == {None}
    made = decide([asked()], [bought(label="2 * 3")], Policy(), EQUATION, options=["5", "6.0"])
    assert columns(made, "in_options") == [True]
    seen = []
    decide([asked("one", id="1"), asked("one", id="2"), asked("two")], [bought("one")], Policy(),
           options=lambda text: seen.append(text) or ["a"])  # fmt: skip
    assert seen == ["one", "two"]


def test_duplicates_are_of_the_first_with_a_label():
    texts = [
        ("since it IS so", None),  # no label: nothing to be a duplicate of
        ("since it is so", "a"),
        (" Since\n it is\tso ", "b"),
        ("since it is not so", "a"),
        ("since it is so", "a"),
        ("", "a"),
        (" ", "a"),
        (None, "a"),
    ]
    answers = [bought(sample=i, rationale=r, label=x) for i, (r, x) in enumerate(texts)]
    answers.append(rationalised(rationale="since it is so", label="c"))
    made = decide([asked(gold="c")], answers, Policy())
    assert columns(made, "duplicate_of") == [
        None, None, "q.1", None, "q.1", None, None, None, "q.1",
    ]  # fmt: skip
    assert all(columns(made, "kept")[1:])
    dropped = decide([asked(gold="c")], answers, Policy(duplicates="drop"))
    assert [d.key for d in dropped if d.reason == "duplicate"] == ["q.2", "q.4", "q.9"]
    # Of several with one rationale the first stays that may: not all are lost.
    for gold, kept in (("b", ["q.2"]), ("c", ["q.9"])):
        made = decide([asked(gold=gold)], answers, Policy(answer_match=True, duplicates="drop"))
        assert [d.key for d in made if d.kept] == kept
    # The same text to another input is none.
    made = decide([asked("x"), asked("y")], [bought("x", label="a"), bought("y", label="a")],
                  Policy(duplicates="drop"))  # fmt: skip
    assert columns(made, "duplicate_of", "kept") == [(None, True)] * 2


def test_words_in_any_script():
    texts = {None: 0, "": 0, "  ": 0, "Only a park, I think.": 5, "猫在屋里": 4, "84 / 2 = 42": 3}
    for text, n in texts.items():
        (d,) = decide([asked()], [bought(label="x", rationale=text)], Policy())
        assert d.words == n
        for policy, reason in (
            (dict(min_words=n, max_words=n), KEPT),
            (dict(min_words=n + 1), "short"),
            *([(dict(max_words=n - 1), "long")] if n else []),
        ):
            (d,) = decide([asked()], [bought(label="x", rationale=text)], Policy(**policy))
            assert d.reason == reason


def test_the_first_reason_counts():
    """An answer with every fault; they are mended one by one, in the order of `REASONS`."""
    policy = Policy(
        answer_match=True, min_words=3, max_words=6, leaks="drop", duplicates="drop",
        min_confidence=0.5,
    )  # fmt: skip
    others = [bought(sample=i, label="b", rationale=f"because number {i}") for i in range(3)]
    reasons = []

    def expect(reason, gold="b", policy=policy, **fields):
        answer = bought(**{"key": "last", "sample": 5} | fields)
        made = decide([asked(gold=gold)], [*others, answer], policy)
        assert [d.kept for d in made] == [d.reason == KEPT for d in made]
        assert made[-1].reason == reason
        reasons.append(reason)

    expect("refused", cls="refused", rationale="no a")
    expect("unparsed", rationale="no a")
    expect("wrong", label="a", rationale="no a")
    expect("short", gold="a", label="a", rationale="no a")
    expect("long", gold="a", label="a", rationale="no a and some more words beside")
    expect("leaks", gold="a", label="a", rationale="no a and some more words")
    any_label = dataclasses.replace(policy, answer_match=False)
    expect("duplicate", policy=any_label, label="a", rationale="Because  number 1")
    expect("low confidence", gold="a", label="a", rationale="it may be right")
    told = dict(kind="rationalised", label="b", rationale="as it was told")
    expect("rationalised", policy=dataclasses.replace(policy, rationalised=False), **told)
    expect("not needed", **told)
    assert tuple(reasons) == ("refused", *REASONS[len(store.CLASSES) - 1 :])
    assert REASONS[: len(store.CLASSES) - 1] == store.CLASSES[1:]
    expect(KEPT, label="b", rationale="it may be right")


def test_confidence_is_that_of_the_answers_own_label():
    answers = [bought(sample=i, label=x) for i, x in enumerate("aaabc")]
    for least, kept in ((0.0, 5), (0.2, 5), (0.21, 3), (0.6, 3), (0.61, 0)):
        made = decide([asked()], answers, Policy(min_confidence=least))
        assert sum(columns(made, "kept")) == kept


def test_leaks_are_kept_unless_the_policy_says_otherwise():
    answers = [bought(sample=0, label="a", rationale="so a"), bought(sample=1, label="a")]
    for leaks, kept in (("keep", [True, True]), ("drop", [False, True])):
        made = decide([asked()], answers, Policy(leaks=leaks))
        assert columns(made, "leaks") == [True, False] and columns(made, "kept") == kept


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(min_words=-1), "Policy.min_words must be a number of words from 0, .* not -1"),
        (dict(max_words=True), "Policy.max_words"),
        (dict(min_words=2.0), "not 2.0"),
        (dict(min_words=5, max_words=4), "min_words=5 is above Policy.max_words=4"),
        (dict(leaks="yes"), "Policy.leaks must be keep or drop, not 'yes'"),
        (dict(duplicates=None), "Policy.duplicates must be keep or drop, not None"),
        (dict(min_confidence=1.5), r"Policy.min_confidence must be a number in \[0, 1\], not 1.5"),
        (dict(min_confidence=float("nan")), "not nan"),
        (dict(min_confidence=True), "not True"),
        (dict(answer_match="yes"), "Policy.answer_match must be True or False, not yes"),
        (dict(rationalised=1), "Policy.rationalised"),
    ],
)
def test_a_policy_is_checked(fields, said):
    with pytest.raises(ValueError, match=said):
        Policy(**fields)


# --- The vote by brute force ----------------------------------------------------------------------


@pytest.mark.parametrize("metric_fn", [metrics.label_accuracy, EQUATION], ids=lambda f: f.__name__)
def test_vote_and_confidence_against_brute_force(metric_fn):
    rng = random.Random(1)
    labels = [None, "", "1 + 2", "3", "( 3.0 )", "4", " 4", "x", "2 * 2"]

    def same(a, b):
        return a.strip() == b.strip() or metric_fn([a], [b])["accuracy"] == 1

    for _ in range(300):
        said = [rng.choice(labels) for _ in range(rng.randrange(8))]
        answers = [
            bought(sample=i, label=x, cls=rng.choice(["ok"] * 4 + ["refused"]))
            for i, x in enumerate(said)
        ]
        answers += [rationalised(sample=8 + i, label="4") for i in range(rng.randrange(3))]
        gold = rng.choice([None, "3", "4"])
        made = decide([asked(gold=gold)], answers, Policy(), metric_fn)
        voters = [a.label for a in answers if a.kind == "answer" and a.cls == "ok" and a.label]
        votes = [sum(same(a, b) for b in voters) for a in voters]
        vote = voters[votes.index(max(votes))] if voters else None
        for a, d in zip(answers, made, strict=True):
            parsed = a.cls == "ok" and bool(a.label)
            plain = parsed and a.kind == "answer"
            assert d.vote == vote
            assert d.confidence == (
                sum(same(a.label, b) for b in voters) / len(voters) if plain else None
            )
            assert d.agrees == (same(a.label, vote) if plain else None)
            assert d.right == (
                metric_fn([gold], [a.label])["accuracy"] == 1 if parsed and gold else None
            )
        if metric_fn is metrics.label_accuracy and " 4" not in voters:
            row = sources.Row("r", "q", answers=tuple(sources.Answer("r", x) for x in voters))
            assert vote == (row.teacher.label if row.teacher else None)


def test_labels_are_compared_once_and_not_each_with_each():
    asked_for = collections.Counter()

    def counting(targets, predictions):
        asked_for[targets[0], predictions[0]] += 1
        return metrics.label_accuracy(targets, predictions)

    inputs = [str(i) for i in range(20)]
    answers = [bought(x, s, label="abc"[s % 3]) for x in inputs for s in range(30)]
    decide([asked(x, gold="a") for x in inputs], answers, Policy(), counting, options="abcd")
    assert max(asked_for.values()) == 1
    # Gold with each, and each with those before it.
    assert set(asked_for) == {("a", "a"), ("a", "b"), ("a", "c"), ("b", "c")}


# --- Does a rationale contain its label? ----------------------------------------------------------


@pytest.mark.parametrize(
    "label, inside, outside",
    [
        ("no", ["No.", "ＮＯ", "so: no", "(no)", "no", "'no'"], ["know", "nobody", "casino"]),
        (
            "math problem",
            ["a Math  problem.", "math\nproblem"],
            ["math, problem", "problem", "maths problem"],
        ),
        ("rug", ["the rug's edge"], ["rugs", "drug"]),
        ("t", ["t.", "either T or f"], ["don't", "don’t", "it"]),
        ("C++", ["in C++."], ["c", "vitamin C"]),
        ("dog's", ["my dog's"], ["my dog", "dogs"]),
        ("l'eau", ["de l'eau"], ["leau"]),
        ("eau", ["de l'eau"], ["beau"]),
        ("straße", ["die STRASSE"], ["straßen"]),
        ("猫", ["我的猫在屋里"], ["狗"]),
        ("क", ["क है"], ["की"]),
        ("ﬁve", ["five"], ["fivefold"]),
        ("?", ["what?"], ["what"]),
        ("50%", ["50% of it"], ["50 of it", "150% of it"]),
        # Numbers, as whole numbers.
        (
            "8",
            ["8", "８", "it is 8.", "8.0 g", "$8", "8kg", "7 + 1 = 8"],
            ["84", "18", "8.5", "1,800", "0.8", "x8"],
        ),
        ("1234", ["1,234", "1234.00"], ["1,2345", "12 34"]),
        ("0.5", [".5", "0.50"], ["5", "10.5"]),
        ("-3", ["is -3", "−3"], ["5-3", "3", "(2)-3"]),
        ("3", ["5-3", "(2) - 3"], ["-3"]),
        # Equations, whatever the spacing and outer brackets.
        (
            "( 84.0 / 2.0 )",
            ["so 84 / 2 = 42", "84/2", "(84.0 ÷ 2)", "84 /\n2"],
            ["84 / 21", "184 / 2", "84 * 2", "84 or 2", "42", "2 / 84"],
        ),
        ("((2 + 3) * 4)", ["(2+3) × 4 is 20"], ["2 + 3 = 5. 5 * 4 = 20", "2 + 3 * 4"]),
        ("(2 + 3) * (4 + 1)", ["(2 + 3) * (4 + 1)"], ["2 + 3) * (4 + 1"]),
        ("84.", ["84 it is"], ["840"]),
        ("(1210 * 4)", ["$1,210 * 4"], ["210 * 4"]),
    ],
)  # fmt: skip
def test_labels_are_found_as_whole_words_and_numbers(label, inside, outside):
    for text in inside:
        assert contains_label(text, label), (text, label)
        assert contains_label(f"Well. {text} Then", f" {label} "), (text, label)
    for text in outside:
        assert not contains_label(text, label), (text, label)
        assert not contains_label(f"Well. {text} Then", label), (text, label)


def test_nothing_is_in_nothing():
    for text, label in itertools.product(("", " ", "a", "1"), ("", " ")):
        assert not contains_label(text, label) and not contains_label(label, text)


def test_any_text_is_taken():
    strange = ["\ud800", "\0", "\u202eabc", "(" * 300, "(" * 90 + "1" + ")" * 90, "-", ".", "\\1",
               "1e5", "½", "٣", "2²", "a" * 10**4]  # fmt: skip
    for text, label in itertools.product(strange, strange):
        contains_label(text, label)
        assert contains_label(f"so {label} then", label) == bool(label.strip())
    made = decide([asked(x, gold=x) for x in strange],
                  [bought(x, label=x, rationale=x) for x in strange], Policy())  # fmt: skip
    assert all(columns(made, "right")) and all(columns(made, "leaks"))


# Rows with a label, and those whose rationale contains it, of the released completions of PaLM-540B
# (Hsieh et al. 2023) by the published parsing.
RELEASED = {
    ("cqa", "train"): (8763, 6401),
    ("cqa", "test"): (1221, 891),
    ("svamp", "train"): (708, 583),
    ("svamp", "test"): (198, 161),
    ("esnli", "test"): (9824, 0),
}


@pytest.mark.parametrize("name, split", RELEASED)
def test_how_often_the_released_rationales_contain_their_label(shared, name, split):
    task.reset()
    task.import_module("tasks")
    try:
        task.bind(data_dir=str(shared / "datasets"), vocabulary="bytes")
        rows = task.dataset(name).rows(split)
    finally:
        task.reset()
    given = [asked(r.input, gold=r.label, id=r.id) for r in rows]
    answers = [
        bought(r.input, label=a.label, rationale=a.rationale, key=r.id)
        for r in rows for a in r.answers
    ]  # fmt: skip
    metric_fn = EQUATION if name == "svamp" else metrics.label_accuracy
    parsed = [d for d in decide(given, answers, Policy(), metric_fn) if d.parsed]
    assert (len(parsed), sum(columns(parsed, "leaks"))) == RELEASED[name, split]
