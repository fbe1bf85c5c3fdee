"""The datasets: their published numbers on the released data, and the parsers case by case."""

import dataclasses
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from distill import metrics, task

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def tasks(monkeypatch):
    """Registers the project's tasks, on bytes and without a data folder."""
    monkeypatch.delenv("DISTILL_DATA_DIR", raising=False)
    monkeypatch.delenv("DISTILL_VOCABULARY", raising=False)
    task.reset()
    task.import_module("tasks")
    yield sys.modules["tasks"]
    task.reset()


@pytest.fixture
def released(tasks, shared):
    task.bind(data_dir=str(shared / "datasets"))
    return tasks


# Hsieh et al. 2023's parsing rules on their released PaLM-540B completions, over the whole files
# (before a hold-out): rows, rows right, completions without a label.
TEACHER = {
    ("cqa", "train"): (9741, "0.742634", 3),
    ("cqa", "test"): (1221, "0.772318", 0),
    ("svamp", "train"): (800, "0.735000", 13),
    ("svamp", "test"): (200, "0.740000", 2),
    ("esnli", "validation"): (9842, "0.731660", 4),
    ("esnli", "test"): (9824, "0.729947", 0),
}


@pytest.mark.parametrize("name, split", TEACHER)
def test_teacher_accuracy_is_the_published_parsers(released, name, split):
    whole = dataclasses.replace(task.dataset(name), holdout=False)
    report = task.source_report(whole, split)
    rows, accuracy, unparsed = TEACHER[name, split]
    assert (report.rows, report.parsed, report.unparsed) == (rows, rows - unparsed, unparsed)
    assert f"{report.teacher_accuracy:.6f}" == accuracy


@pytest.mark.parametrize("name, train, validation", [("cqa", 8766, 975), ("svamp", 720, 80)])
def test_hold_out_is_the_published_one(released, name, train, validation):
    source = task.dataset(name)
    kept, held = ([r.id for r in source.rows(s)] for s in ("train", "validation"))
    assert (len(kept), len(held)) == (train, validation)
    order = np.random.default_rng(0).permutation(train + validation)
    assert held + kept == [f"{name}/train/{i}" for i in order]
    assert source.files("train") == source.files("validation") != source.files("test")


def test_inputs_of_the_released_data(released):
    first = {r.id: r for r in task.dataset("cqa").rows("train") + task.dataset("cqa").rows("test")}
    assert first["cqa/train/0"].input.endswith(
        "What is this an example of?\nAnswer Choices:\n(a) park\n(b) coloring book\n"
        "(c) garden center\n(d) math problem\n(e) gravity"
    )
    assert first["cqa/train/0"].label == first["cqa/train/0"].teacher_label == "math problem"
    row = task.dataset("svamp").rows("test")[0]
    assert row.input.endswith("If there are 45 flowerbeds\nHow many seeds did they plant?")
    assert row.label == "( 10.0 * 45.0 )"
    row = task.dataset("esnli").rows("validation")[0]
    assert row.input.startswith("Two women are embracing while holding to go packages.</s>The sis")
    assert (row.label, row.teacher_label) == ("neutral", "neutral")
    assert row.rationale == "The to go packages are not necessarily from lunch."


def test_absent_train_file_is_named(released):
    with pytest.raises(FileNotFoundError, match=r"esnli_train\.json.*--gin\.DATA_DIR"):
        task.report("esnli", "train")


def test_svamp_parse(tasks):
    parse = tasks.svamp.parse
    assert parse("So 6 / 2 = 3. The answer is (6 / 2).\n\nQ: x The answer is (1).") == (
        "So 6 / 2 = 3.",
        "(6 / 2)",
    )
    assert parse("The answer is (1) + (2).") == ("", "(1) + (2)")
    assert parse("I think. The answer is 4.") == ("I think.", None)
    assert parse("Cut off in the mid") == (None, None)
    assert parse("The answer is (1). The answer is (2).") == (None, None)


def test_svamp_published_count_differs_from_the_students_by_two_rows(released):
    """`eval` takes `a and b` for b; the safe parser takes it for nothing."""
    whole = dataclasses.replace(task.dataset("svamp"), holdout=False)
    safe = dataclasses.replace(whole, teacher_metric=metrics.equation_accuracy)
    published, safe = (task.source_report(s, "train").teacher_accuracy for s in (whole, safe))
    assert (published * 800, safe * 800) == (588, 586)
    right = released.svamp.reference_accuracy(
        ["15"] * 3, ["((29/2) and (30/2))", "(1) and (15)", "(15) and (1)"]
    )
    assert right["accuracy"] == 2 / 3


def test_cqa_parse(tasks):
    parse = tasks.cqa.parse
    assert parse("Why. So the answer is (d) math problem.\n\nQ: next") == ("Why.", "math problem")
    assert parse("Why. So the answer is (a) aquarium or (b) sea.") == ("Why.", "aquarium or")
    assert parse("Why. So the answer is one of these.") == ("Why.", None)
    assert parse("Why.") == (None, None)


def test_nli_parsers(tasks):
    parse = tasks.esnli.parse
    assert parse("Why.\nAnswer: neutral\n\nPremise: next") == ("Why.", "neutral")
    assert parse("Why.\nAnswer: entailment\n\nPre") == ("Why.", "entailment\n\nPre")
    assert parse("Why, without an end") == (None, None)
    parse = tasks.anli1.parse
    assert parse("Why. So the answer is entailment.\n\nPremise: n") == ("Why.", "entailment")
    assert parse("Why, without an end") == (None, None)


def test_nli_labels_outside_the_three_are_refused(tasks):
    row = {"premise": "p", "hypothesis": "h"}
    assert tasks.esnli.example(row | {"label": 2}) == ("p</s>h", "contradiction")
    for label in (-1, 3, "1", None):
        with pytest.raises(ValueError, match="must be 0, 1 or 2"):
            tasks.esnli.example(row | {"label": label})


def test_cqa_needs_five_choices(tasks):
    with pytest.raises(ValueError, match="2 choices, must be 5"):
        tasks.cqa.example({"question": "q", "choices": ["a", "b"], "answer": "a"})


@pytest.mark.parametrize("name", ["svamp", "cqa", "esnli", "anli1", "arithmetic"])
def test_registers_eight_names(tasks, name):
    assert name in task.datasets()
    for suffix in ("", "_llm"):
        for stream in ("label", "predict", "explain", "step_by_step"):
            task.describe(f"{name}_{stream}{suffix}")


def test_metrics(tasks):
    assert task.describe("svamp_predict").members[0].metrics == (
        "distill.metrics.equation_accuracy",
    )
    for name in ("cqa", "esnli", "anli1"):
        assert task.describe(f"{name}_label_llm").members[0].metrics == (
            "distill.metrics.label_accuracy",
        )


def test_the_module_prints_what_was_read(shared):
    command = [sys.executable, "-m", "tasks", "svamp", f"--data_dir={shared / 'datasets'}"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["svamp", "train", "720", "708", "12", "710", "0.729167"],
        ["svamp", "validation", "80", "79", "1", "79", "0.787500"],
        ["svamp", "test", "200", "198", "2", "198", "0.740000"],
    ]
