"""The datasets: their published numbers on the released data, and the parsers case by case."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from distill import metrics, sources, task

ROOT = pathlib.Path(__file__).parents[1]


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


# After the repairs, in the same order: the least accuracy that they must reach, completions without
# a label. In SVAMP 16 + 4 labels turn out to have no value, such as `(25 + x)`.
REPAIRED = {
    ("cqa", "train"): (0.7682, 0),
    ("cqa", "test"): (0.7928, 0),
    ("svamp", "train"): (0.7375, 27),
    ("svamp", "test"): (0.7400, 6),
    ("esnli", "validation"): (0.731660, 4),
    ("esnli", "test"): (0.729947, 0),
}


def whole(tasks, name):
    """The released files before a hold-out."""
    return dataclasses.replace(getattr(tasks, name).RELEASED, holdout=False)


@pytest.mark.parametrize("name, split", TEACHER)
def test_teacher_accuracy_is_the_published_parsers(released, name, split):
    report = sources.source_report(whole(released, name), split)
    rows, accuracy, unparsed = TEACHER[name, split]
    assert (report.rows, report.parsed, report.unparsed) == (rows, rows - unparsed, unparsed)
    assert f"{report.teacher_accuracy:.6f}" == accuracy


@pytest.mark.parametrize("name, split", REPAIRED)
def test_repairs_reach_what_was_measured_and_never_lose(released, name, split):
    (first, unparsed, accuracy), *gains = sources.repair_gains(whole(released, name), split)
    rows, published, published_unparsed = TEACHER[name, split]
    assert (first, f"{accuracy:.6f}", unparsed) == ("reference", published, published_unparsed)
    assert [name for name, _, _ in gains] == [
        f.__name__ for f in getattr(released, name).RELEASED.repairs
    ]
    accuracies = [accuracy, *(a for _, _, a in gains)]
    assert accuracies == sorted(accuracies)
    least, unparsed = REPAIRED[name, split]
    assert gains[-1][1] == unparsed
    assert round(gains[-1][2], 6) >= least


def test_svamp_json_that_is_something_else_is_named(tasks, tmp_path):
    (tmp_path / "svamp").mkdir()
    path = tmp_path / "svamp" / "SVAMP.json"
    task.bind(data_dir=str(tmp_path))
    for content, reason in (
        ("[]", "the 1,000 problems"),
        ("[", "not valid JSON"),
        (json.dumps([{"Body": "b"}] * 1000), "row 0 of train: KeyError"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"SVAMP\.json.*{reason}"):
            task.dataset("svamp").rows("train")


@pytest.mark.parametrize("name, split", REPAIRED)
def test_completions_are_with_their_rows_by_a_wide_margin(released, name, split):
    rows = whole(released, name).rows(split)  # This would refuse what is misaligned.
    inputs = [r.input for r in rows]
    said = [r.answers[0].rationale or "" for r in rows]
    for at in (0, len(rows) // 2, len(rows) - 60):
        shifted = [*said[:at], *said[at + 1 :], "x"]
        assert abs(sources.first_misaligned(inputs, shifted) - at) <= 3
    order = np.random.default_rng(0).permutation(len(rows))
    assert sources.first_misaligned(inputs, [said[i] for i in order]) is not None


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_original_svamp_gives_the_released_rows(released, split):
    svamp = released.svamp
    assert svamp.ORIGINAL.rows(split) == svamp.RELEASED.rows(split)
    assert svamp.ORIGINAL.files(split)[0].endswith("svamp/SVAMP.json")
    assert task.dataset("svamp").files(split) == svamp.RELEASED.files(split)


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
    assert first["cqa/train/0"].label == first["cqa/train/0"].teacher.label == "math problem"
    row = task.dataset("svamp").rows("test")[0]
    assert row.input.endswith("If there are 45 flowerbeds\nHow many seeds did they plant?")
    assert row.label == "( 10.0 * 45.0 )"
    row = task.dataset("esnli").rows("validation")[0]
    assert row.input.startswith("Two women are embracing while holding to go packages.</s>The sis")
    assert (row.label, row.teacher.label) == ("neutral", "neutral")
    assert row.answers[0].rationale == "The to go packages are not necessarily from lunch."


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
    svamp = whole(released, "svamp")
    safe = dataclasses.replace(svamp, teacher_metric=metrics.equation_accuracy)
    published, safe = (sources.source_report(s, "train").teacher_accuracy for s in (svamp, safe))
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


def repaired(layout, completion, **fields):
    """(rationale, label) after all repairs."""
    rationale, label = layout.parse(completion)
    for repair in layout.repairs:
        rationale, label = repair(completion, fields, rationale, label)
    return rationale, label


@pytest.mark.parametrize(
    "answer, label",
    [
        ("So the answer is (b) sea.", "sea"),
        ("So the answer is (b) Sea.", "sea"),
        ("So the answer is (e) the internet.", "internet."),
        ("So the answer is (a) aquarium or (b) sea.", "aquarium"),
        ("So the answer is either (a) aquarium, (b) sea, or (c) pond.", "aquarium"),
        ("So the answer is (d) sea.", "sea"),  # The text of a choice beats the letter.
        ("So the answer is (d) a backyard.", "back yard"),  # A spelling; the letter says.
        ("So the answer is (b) sea.\n\nQ: So the answer is (c) pond.", "sea"),
        (
            "Of the above choices, only ponds and the sea fit. So the answer is one of these.",
            "pond",
        ),
        ("So the answer is one of these.", None),
        ("So the answer is (g) gone.", None),
        ("Why.", None),
    ],
)
def test_cqa_repairs(tasks, answer, label):
    choices = ["aquarium", "sea", "pond", "back yard", "internet."]
    assert repaired(tasks.cqa.RELEASED, f"Why. {answer}", choices=choices)[1] == label


def test_repairs_do_not_see_the_gold_label(released):
    """Other gold labels, the same repaired answers."""
    for module, field in ((released.cqa, "answer"), (released.svamp, "label")):
        for completion in (
            "Why. So the answer is (a) Aquarium or",
            "Why. The answer is (1) and (2).",
        ):
            fields = {"choices": ["aquarium", "sea", "pond", "yard", "net"], "input": "i"}
            answers = {
                repaired(module.RELEASED, completion, **fields, **{field: gold})
                for gold in ("aquarium", "sea", "( 1.0 )", "( 2.0 )")
            }
            assert len(answers) == 1


@pytest.mark.parametrize(
    "completion, rationale, label",
    [
        ("So. The answer is (6 / 2).", "So.", "(6 / 2)"),
        ("So. The answer is ((29/2) and (30/2)).", "So.", "(30/2)"),
        ("So. The answer is (8 / 4) and (6 / 4).", "So.", "(6 / 4)"),
        ("So. The answer is ((8 action figures + 10 shelves) * 4).", "So.", "((8 + 10) * 4)"),
        ("So. The answer is (1 * 11,210).", "So.", "(1 * 11210)"),
        ("So. The answer is (14, 21).", "So.", None),
        ("So. The answer is (25 + x).", "So.", None),
        ("So. The answer is (some - 8).", "So.", None),
        ("So. The answer is ((415 - 309) - (41", "So.", None),
        ("It was. So Jake has 16 - 7 = 9 peaches.", "It was. So Jake has 16 - 7 = 9 peaches.",
         "(16 - 7)"),
        ("So Jake has 16 - 7 = 8 peaches.", None, None),  # A wrong sum is no answer.
        ("So Jake has 16 - 7 = 9 peaches. So he", None, None),  # Cut off.
        ("So Jake has 9 peaches.", None, None),
    ],
)  # fmt: skip
def test_svamp_repairs(tasks, completion, rationale, label):
    assert repaired(tasks.svamp.RELEASED, f"{completion}\n\nQ: 1 = 1.") == (rationale, label)


@pytest.mark.parametrize(
    "said, label",
    [
        ("neutral", "neutral"),
        ("Neutral.", "neutral"),
        ("entailment\n\nPre", "entailment"),
        ("entailment\n\nPremise: next. Answer: neutral", "entailment"),
        ("contradi", "contradiction"),
        ("contradi\n\nPremise: next", "contradiction"),
        ("contradi and more", None),
        ("en", None),
        ("maybe", None),
        ("", None),
    ],
)
def test_nli_repairs(tasks, said, label):
    esnli = repaired(tasks.esnli.RELEASED, f"Why.\nAnswer: {said}")
    anli = repaired(tasks.anli.RELEASED, f"Why. So the answer is {said}")
    assert esnli[1] == anli[1] == label
    if label:
        assert esnli[0] == anli[0] == "Why."
    assert repaired(tasks.esnli.RELEASED, "Why, without an end") == (None, None)


def test_nli_parsers(tasks):
    parse = tasks.esnli.parse
    assert parse("Why.\nAnswer: neutral\n\nPremise: next") == ("Why.", "neutral")
    assert parse("Why.\nAnswer: entailment\n\nPre") == ("Why.", "entailment\n\nPre")
    assert parse("Why, without an end") == (None, None)
    parse = tasks.anli.parse
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


@pytest.mark.parametrize(
    "name", ["svamp", "svamp_asdiv", "cqa", "esnli", "anli1", "anli3", "gsm8k", "arithmetic"]
)
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


def run_module(*arguments):
    command = [sys.executable, "-m", "tasks", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_module_prints_what_was_read(shared):
    done = run_module("svamp", "anli1", f"--data_dir={shared / 'datasets'}", "--parsing=repaired")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[1:7] == [
        ["svamp", "train", "720", "720", "695", "25", "711", "0.731944"],
        ["reference", "12", "0.729167"],
        ["last_of_several", "12", "0.729167"],
        ["plain_numbers", "12", "0.730556"],
        ["unannounced", "11", "0.731944"],
        ["equations_only", "25", "0.731944"],
    ]
    assert lines[13] == ["svamp", "test", "200", "200", "194", "6", "198", "0.740000"]
    assert "anli1 train, validation, test: not there" in done.stdout
    assert "tfds build anli --config=r1" in done.stdout


def test_the_module_refuses_names_that_do_not_exist(tmp_path):
    done = run_module("arithmetic", "svmp", f"--data_dir={tmp_path}")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "no dataset named 'svmp'. Did you mean 'svamp'?" in done.stderr
    assert not done.stdout  # Nothing is read before.


# --- Where the released files are absent ------------------------------------------------------


def test_svamp_asdiv_adds_inputs_without_labels(tasks, tmp_path, shared):
    (tmp_path / "svamp").symlink_to(shared / "datasets" / "svamp")
    (tmp_path / "asdiv" / "llm").mkdir(parents=True)
    rows = [{"input": f"Ann has {i} nuts.", "label": f"( {i}.0 + 1.0 )"} for i in range(3)]
    (tmp_path / "asdiv" / "asdiv_train.json").write_text("\n".join(map(json.dumps, rows)))
    completions = [f"So it is. The answer is ({i} + 1)." for i in range(2)] + ["Cut o"]
    (tmp_path / "asdiv" / "llm" / "train_CoT_0.json").write_text(json.dumps(completions))
    task.bind(data_dir=str(tmp_path))
    got, svamp = task.dataset("svamp_asdiv"), task.dataset("svamp")
    *known, first, second, third = got.rows("train")
    assert known == svamp.rows("train")
    assert first == sources.Row(
        "asdiv/train/0", "Ann has 0 nuts.", None, (sources.Answer("So it is.", "(0 + 1)"),)
    )
    assert (second.teacher.label, third.teacher) == ("(1 + 1)", None)
    for split in ("validation", "test"):
        assert got.rows(split) == svamp.rows(split)
        assert got.files(split) == svamp.files(split)
    assert any("asdiv_train.json" in f for f in got.files("train"))


def test_gsm8k_from_json_lines(tasks, tmp_path):
    (tmp_path / "gsm8k").mkdir()
    solution = "He sold 48/2 = <<48/2=24>>24.\nSo -1,224.\n#### -1,224"
    row = {"question": "How many?", "answer": solution}
    path = tmp_path / "gsm8k" / "test.jsonl"
    path.write_text(json.dumps(row))
    task.bind(data_dir=str(tmp_path))
    (got,) = task.dataset("gsm8k").rows("test")
    assert got == sources.Row(
        "gsm8k/test/0",
        "How many?",
        "-1224",
        (sources.Answer("He sold 48/2 = 24.\nSo -1,224."),),
    )
    assert metrics.equation_accuracy([got.label], ["-1224.0"])["accuracy"] == 1
    path.write_text(json.dumps({"question": "q", "answer": "so it is 4"}))
    with pytest.raises(ValueError, match=r"test\.jsonl:1: the answer must end in `#### `"):
        task.dataset("gsm8k").rows("test")


def prepare(folder, name, config, features, rows):
    """Prepares a TensorFlow dataset whose every split has the same rows."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text()
    kinds = {
        str: text,
        list: tfds.features.Sequence(text),
        int: tfds.features.ClassLabel(num_classes=3),
    }

    class Like(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Like the one of that name."""

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({k: kinds[v] for k, v in features.items()}),
            )

        def _split_generators(self, download):
            return {s: self._generate_examples() for s in ("train", "validation", "test")}

        def _generate_examples(self):
            yield from enumerate(dict(zip(features, row, strict=True)) for row in rows)

    Like.name = name
    Like(data_dir=folder, config=config).download_and_prepare()


@pytest.mark.filterwarnings("default")  # TFDS's own.
def test_tensorflow_datasets_stand_in(tasks, tmp_path):
    prepare(
        tmp_path, "cos_e", None,
        dict(id=str, question=str, choices=list, answer=str, abstractive_explanation=str),
        [(f"i{i}", f"q{i}", list("vwxyz"), "x", f"because {i}") for i in range(20)],
    )  # fmt: skip
    prepare(
        tmp_path, "esnli", None,
        dict(premise=str, hypothesis=str, label=int) | {f"explanation_{n}": str for n in (1, 2, 3)},
        [("p", "h", 2, "one", "", "three")],
    )  # fmt: skip
    prepare(
        tmp_path, "anli", "r2", dict(uid=str, context=str, hypothesis=str, label=int),
        [("u", "p", "h", 1)],
    )  # fmt: skip
    prepare(
        tmp_path, "gsm8k", None, dict(question=str, answer=str),
        [(f"q{i}", f"w\n#### {i}") for i in range(20)],
    )  # fmt: skip
    task.bind(data_dir=str(tmp_path))
    answer = sources.Answer

    cqa = task.dataset("cqa")
    assert [len(cqa.rows(s)) for s in ("train", "validation", "test")] == [18, 2, 20]
    by_id = {r.id: r for r in cqa.rows("train") + cqa.rows("validation")}
    assert len(by_id) == 20
    assert by_id["cqa/i7"] == sources.Row(
        "cqa/i7",
        "q7\nAnswer Choices:\n(a) v\n(b) w\n(c) x\n(d) y\n(e) z",
        "x",
        (answer("because 7"),),
    )
    assert task.dataset("esnli").rows("train") == [
        sources.Row("esnli/train/0", "p</s>h", "contradiction", (answer("one"), answer("three")))
    ]
    assert task.dataset("anli2").rows("validation") == [sources.Row("anli2/u", "p</s>h", "neutral")]
    with pytest.raises(FileNotFoundError, match="anli3_train.json.*; or .*anli/r3"):
        task.dataset("anli3").rows("train")
    gsm8k = task.dataset("gsm8k")
    assert {(r.input, r.label) for r in gsm8k.rows("test")} == {
        (f"q{i}", f"{i}") for i in range(20)
    }
    report = task.report("gsm8k", "train")
    assert (report.rows, report.rationales, report.unparsed, report.parsed) == (18, 18, 0, 0)
