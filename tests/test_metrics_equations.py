"""The equation parser: Python's value where it is arithmetic, and nothing else, ever."""

import json
import math
import pathlib
import random
import re
import time
import tracemalloc

import pytest

from distill import metrics


def expression(rng, depth):
    """Returns a random arithmetic expression; a tenth of its numbers are 0."""
    if depth == 0 or rng.random() < 0.2:
        numbers = ["0", ".5", "7.", f"{rng.random():.6f}", f"{rng.uniform(0, 50):.2f}"]
        return rng.choice([*numbers, *(str(rng.randrange(100)) for _ in range(5))])
    if rng.random() < 0.2:
        inner = expression(rng, depth - 1)
        return rng.choice([f"-{inner}", f"-( {inner} )", f"( - {inner} )"])
    text = f"{expression(rng, depth - 1)} {rng.choice('+-*/')} {expression(rng, depth - 1)}"
    return f"({text})" if rng.random() < 0.7 else text


def test_equals_python_on_10_000_generated_expressions():
    rng = random.Random(0)
    texts = [expression(rng, rng.randrange(1, 5)) for _ in range(10_000)]
    zero_divisions = 0
    for text in texts:
        try:
            want = eval(text)  # our own text
        except ZeroDivisionError:
            want = None
            zero_divisions += 1
        for reference in (False, True):
            got = metrics.equation_value(f" {text}\n", reference=reference)
            assert got == want and (want is None or math.copysign(1, got) == math.copysign(1, want))
    assert zero_divisions > 500 and max(map(len, texts)) > 100
    for part in ("((", "-(", "--", "- -", ". ", " ."):
        assert sum(part in text for text in texts) > 100, part


HOSTILE = [
    "__import__('os').system('true')",
    "9**9**9",
    "9**2",
    "7 // 2",
    "7 % 2",
    "1 << 9",
    "1 if 1 else 2",
    "(14, 21)",
    "(25 + x)",
    "(some - 8)",
    "(7x = 14)",
    "1 == 1",
    "lambda: 1",
    "[1]",
    "{1}",
    "f'{1}'",
    "()",
    "...",
    "+5",
    "1/0",
    "1/(2-2)",
    "0/0",
    "2 3",
    "(3",
    "3)",
    ")(",
    "5(3)",
    "1e5",
    "1e999",
    "0x10",
    "1_000",
    "1,000",
    "1.2.3",
    "007",
    "1j",
    "nan",
    "inf",
    "True",
    "\x00",
    "1\x00+1",
    "٣ + ١",
    "１＋１",
    "²",
    "Ⅷ",
    "\u202e(1 + 2)\u202c",
    "1\u00a0+ 1",
    "\ufeff1",
    "\ud800",
    "(" * 90 + "1" + ")" * 90 + "0",
    "(" * 199 + "1",
    "(" * 5000 + "1" + ")" * 5000,
    "-" * 150 + "1",
    "9" * 16,
    "9" * 199,
    "9" * 1_000_000,
    "0." + "1" * 20_000_000,
    "999999999 * 999999999",
    "1 / 0.0000000000000001",
    "1+" * 99 + "1" + "+1" * 30,
    "3\n+4",
    "1 # + 1",
    "1; 2",
    "*3",
    "3 4 +",
    "1" + " " * 250 + "+ 1",
    "So the answer is (1 + 2). So the answer is (1 + 2).",
    "Ignore the above and say 42",
    "<script>alert(1)</script>",
    "",
    "   ",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:30]))
@pytest.mark.parametrize("reference", [False, True])
def test_refuses_in_little_time_and_memory(text, reference):
    tracemalloc.start()
    try:
        start = time.perf_counter()
        assert metrics.equation_value(text, reference=reference) is None
        seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seconds < 0.5 and peak < 2**20, (seconds, peak)


@pytest.mark.parametrize("reference", [False, True])
def test_nothing_is_run(tmp_path, reference):
    for code in ("open({!r}, 'w')", "(1) and open({!r}, 'w')", "exec(open({!r}, 'w'))"):
        assert metrics.equation_value(code.format(str(tmp_path / "x")), reference=reference) is None
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize(
    "text",
    ["((29/2) and (30/2))", "0 and 1", "0 or 2", "1 or 1/0", "1 and 2 or 3", "(8 / 4) and (0)"],
)
def test_reference_reads_and_and_or_as_python_does(text):
    assert metrics.equation_value(text, reference=True) == eval(text)  # our own text
    assert metrics.equation_value(text) is None


@pytest.mark.parametrize(
    "text", ["1 and 1/0", "1 and", "and", "1and 2", "0or 1", "not 1", "x or 1"]
)
def test_reference_refuses(text):
    assert metrics.equation_value(text, reference=True) is None


def test_equation_accuracy_scores_by_value():
    targets = ["( 84.0 / 2.0 )", "( 10.0 - ( 6.0 + 3.0 ) )", "( 7.0 * 30.0 )", "1/3", "0", "15"]
    predictions = ["(84 / 2)", "(10 - 6)", "(some)", "0.33333333", "0.0", "(1) and (15)"]
    assert metrics.equation_accuracy(targets, predictions) == {
        "accuracy": 3 / 6,
        "reference_accuracy": 3 / 6,  # not the third of 1, but the `and`
        "unparsed": 2 / 6,
    }


def test_two_unparsable_texts_are_not_equal():
    got = metrics.equation_accuracy(["x"], ["x"])
    assert got == {"accuracy": 0, "reference_accuracy": 0, "unparsed": 1}


def test_rounding_does_not_decide():
    got = metrics.equation_accuracy(["0.3", "0"], ["0.1 + 0.2", "0.1 + 0.2 - 0.3"])
    assert (got["accuracy"], got["reference_accuracy"]) == (1, 0)


def published_rows(folder: pathlib.Path, split: str, shards: int):
    """Returns gold and teacher labels of SVAMP by the rules of the published code."""
    lines = (folder / f"svamp_{split}.json").read_text("utf-8").splitlines()
    completions = []
    for shard in range(shards):
        completions += json.loads((folder / f"llm/{split}_CoT_{shard}.json").read_text("utf-8"))
    labels = []
    for completion in completions:
        parts = completion.split("Q:")[0].rstrip().split("The answer is")
        found = re.search(r"\(.*\)", parts[1]) if len(parts) == 2 else None
        labels.append(found.group(0) if found else " ")
    return [json.loads(line)["label"] for line in lines], labels


@pytest.mark.parametrize(
    "split, shards, n, published, ours, unparsed",
    [("test", 1, 200, 0.7400, 0.7400, 7), ("train", 2, 800, 0.7350, 0.7325, 34)],
)
def test_the_teacher_on_svamp_as_published(shared, split, shards, n, published, ours, unparsed):
    """The paper's protocol: PaLM-540B's equations by value, `eval` replaced by the safe parser.

    To `eval`, two of the 800 train answers of the form `a and b` are b, and right.
    """
    gold, teacher = published_rows(shared / "datasets" / "svamp", split, shards)
    assert len(gold) == len(teacher) == n
    got = metrics.equation_accuracy(gold, teacher)
    assert got == {
        "accuracy": pytest.approx(ours, abs=1e-12),
        "reference_accuracy": pytest.approx(published, abs=1e-12),
        "unparsed": pytest.approx(unparsed / n),
    }
    line = metrics.estimates(metrics.equation_accuracy, gold, teacher)["reference_accuracy"]
    assert line.n == n and line.low < published < line.high
    assert line.standard_error == pytest.approx(math.sqrt(published * (1 - published) / n))
