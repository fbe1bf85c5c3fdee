"""Overlap of texts: the reference implementations where they apply, and other scripts."""

import random
import subprocess
import sys
import time

import pytest

from distill import metrics


def rouge(target, prediction):
    return metrics.rouge_l([target], [prediction])["rouge_l"]


def f1(target, prediction):
    return metrics.token_f1([target], [prediction])["token_f1"]


def chrf(target, prediction):
    return metrics.chrf([target], [prediction])["chrf"]


# rouge_score 0.1.2, `RougeScorer(["rougeL"], use_stemmer=False)`; SQuAD 2.0's evaluate script.
@pytest.mark.parametrize(
    "target, prediction, rouge_l, token_f1",
    [
        ("The cat sat on the mat.", "On the mat sat the cat", 0.5, 1.0),
        ("( 84.0 / 2.0 )", "84 / 2 = 42", 0.5714285714285715, 0.0),
        (
            "A well-known U.S. dog's 3.5 legs", "a well known us dogs 35 legs",
            0.47058823529411764, 0.7272727272727272,
        ),
        ("police killed the gunman", "the gunman kill police", 0.5, 0.6666666666666666),
        ("sat_on it", "sat on it", 1.0, 0.4),
        ("", "", 0.0, 1.0),
        ("...", "x", 0.0, 0.0),
        ("x y", "", 0.0, 0.0),
    ],
)  # fmt: skip
def test_ascii_text_scores_as_the_reference_implementations(target, prediction, rouge_l, token_f1):
    assert rouge(target, prediction) == pytest.approx(rouge_l)
    assert f1(target, prediction) == pytest.approx(token_f1)


def test_rouge_l_by_the_table_of_the_textbook():
    """The longest common subsequence as dynamic programming writes it, O(n m)."""
    rng = random.Random(0)
    parts = [
        "the",
        "cat",
        "Dogs",
        "dog's",
        "3.5",
        "$7",
        "(x)",
        "--",
        "sat_on",
        "AND",
        "and",
        "猫坐",
    ]
    for _ in range(500):
        target, prediction = (" ".join(rng.choices(parts, k=rng.randrange(40))) for _ in range(2))
        a, b = metrics.words(target), metrics.words(prediction)
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                longer = max(table[i][j + 1], table[i + 1][j])
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else longer
        want = 2 * table[-1][-1] / (len(a) + len(b)) if a and b else 0
        assert rouge(target, prediction) == pytest.approx(want)


@pytest.mark.parametrize(
    "text, words",
    [
        ("Straße, ÉCOLE; naïve", ["strasse", "école", "naïve"]),
        ("e\u0301cole", ["école"]),
        ("кошка на ковре.", ["кошка", "на", "ковре"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("مرحبا بالعالم ٣", ["مرحبا", "بالعالم", "٣"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("猫坐在mat上。", ["猫", "坐", "在", "mat", "上"]),
        ("ねこ ﾈｺ", ["ね", "こ", "ネ", "コ"]),
        ("１２ ＡＢ", ["12", "ab"]),
        ("\U00020000\U0001f600x\ud800", ["\U00020000", "x"]),
        ("แมว", ["แ", "ม", "ว"]),
    ],
)
def test_words_of_any_script(text, words):
    assert metrics.words(text) == words


@pytest.mark.parametrize(
    "target, prediction, rouge_l, token_f1",
    [
        ("猫坐在垫子上", "猫在垫子上", 2 * 5 / 11, 2 * 5 / 11),
        ("кошка на ковре", "кошка, ковре", 4 / 5, 4 / 5),
        ("«Да», сказал он", "да сказал", 4 / 5, 4 / 5),
        ("ÉCOLE", "école", 1.0, 1.0),
        ("नमस्ते", "नमस्त", 0.0, 0.0),
    ],
)
def test_overlap_in_other_scripts(target, prediction, rouge_l, token_f1):
    assert rouge(target, prediction) == pytest.approx(rouge_l)
    assert f1(target, prediction) == pytest.approx(token_f1)


# sacrebleu 2.6.0, chrF2|nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no.
@pytest.mark.parametrize(
    "prediction, target, score",
    [
        ("the cat sat on a mat", "the cat sat on the mat", 0.6597965990995549),
        ("猫在垫子上", "猫坐在垫子上", 0.474481658692185),
        ("кот на ковре", "кошка на ковре", 0.5201609556069937),
        ("x", "x", 1.0),
        ("", "x", 0.0),
    ],
)
def test_chrf_is_sacrebleus(prediction, target, score):
    assert chrf(target, prediction) == pytest.approx(score)


def test_scores_are_means_over_examples():
    targets, predictions = ["a b", "c d", "e"], ["a b", "c x", ""]
    assert metrics.rouge_l(targets, predictions) == {"rouge_l": pytest.approx(0.5)}
    mean = (1 + chrf("c d", "c x") + 0) / 3
    assert metrics.chrf(targets, predictions) == {"chrf": pytest.approx(mean)}
    estimate = metrics.estimates(metrics.rouge_l, targets, predictions)["rouge_l"]
    assert (estimate.value, estimate.n, estimate.low, estimate.high) == (0.5, 3, 0, 1)


def test_importing_metrics_is_light():
    code = "import sys, distill.metrics; print(*(m.split('.')[0] for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"sacrebleu", "jax", "tensorflow", "scipy"} & set(done.stdout.split())


def test_speed():
    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(300)}" for _ in range(60)) for _ in range(1001)]
    start = time.perf_counter()
    metrics.rouge_l(texts[1:], texts[:-1])
    assert time.perf_counter() - start < 2  # about 0.15 s


HOSTILE = [
    "", "\x00", "\u202egnp.exe\u202c", "\ud800", "\ufffd", "a\u0301" * 10**6, "ﷺ" * 10**6,
    "a" * 20_000_000, "1 " * 10**7, "中" * 10**6, " " * 10**7, "\n" * 10**6, "(" * 10**6,
    "-" * 10**6, "=" * 10**6, "1=" * 10**6, "-" * 1999 + " " * 999, "Answer:" * 10**6,
    "So the answer is (", "__import__('os').system('true')", "<script>alert(1)</script>",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:12]))
def test_hostile_text_takes_little_time_in_every_metric(text):
    others = (metrics.teacher_agreement, metrics.rationale_consistency)
    start = time.perf_counter()
    for fn in (*metrics.METRICS.values(), *others):
        for target in (text, "a b (1 + 2)"):
            assert all(0 <= v <= 1 for v in fn([target], [text]).values())
    for conclusion in metrics.CONCLUSIONS.values():
        conclusion(text, "(a) 1\n(b) x")
    metrics.parse_failure(metrics.allowed_labels([text], [text]), [text])
    assert time.perf_counter() - start < 5
