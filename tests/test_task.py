"""One dataset to its SeqIO tasks: what is read, what is registered, what comes out of SeqIO."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import seqio
import tensorflow as tf
from test_sources import ROWS, TEST_ROWS, completion, layout, write

from distill import metrics, sources, task, vocabulary

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Every test binds for itself."""
    for variable in [name for name in os.environ if name.startswith("DISTILL_")]:
        monkeypatch.delenv(variable)
    task.reset()
    yield
    task.reset()


@pytest.fixture
def data(tmp_path):
    """The dataset of test_sources: row i is about "in<i></s>put", "g<i>" and "t<i>"."""
    write(tmp_path, "train", ROWS, [completion(i) for i in range(ROWS)])
    write(tmp_path, "test", TEST_ROWS, [completion(i) for i in range(TEST_ROWS)])
    return tmp_path


@pytest.fixture
def toy(data):
    """Registers the dataset on bytes, with a hold-out."""
    task.bind(data_dir=str(data))
    task.register("toy", source=layout(holdout=True))
    return data


def rows_of(name, split):
    return list(task.tokenized_rows(name, split))


# --- What a task gives ------------------------------------------------------------------------


def test_without_completions_gold_labels_still_work(tmp_path):
    write(tmp_path, "train", ROWS, [])
    task.bind(data_dir=str(tmp_path))
    task.register("toy", source=layout(holdout=True))
    assert len(rows_of("toy_label", "train")) == ROWS - 3
    for name, needed in (("toy_explain", "a rationale"), ("toy_label_llm", "a teacher label")):
        with pytest.raises(ValueError, match=rf"no training example.*{needed}.*train_CoT_0\.json"):
            rows_of(name, "train")
    assert rows_of("toy_explain", "validation") == []


def test_streams(toy):
    encode = vocabulary.load("bytes").encode
    row = task.dataset("toy").rows("train")[0]
    before, after = row.input.split("</s>")
    for name, prefix, target, group in (
        ("toy_label", "", row.label, 0),
        ("toy_predict", "predict: ", row.label, 0),
        ("toy_explain", "explain: ", row.answers[0].rationale, 1),
        ("toy_label_llm", "", row.teacher.label, 0),
        ("toy_predict_llm", "predict: ", row.teacher.label, 0),
        ("toy_explain_llm", "explain: ", row.answers[0].rationale, 1),
    ):
        got = rows_of(name, "train")[0]
        assert got["inputs"].tolist() == [*encode(prefix + before), 1, *encode(after), 1], name
        assert got["targets"].tolist() == [*encode(target), 1], name
        assert got["inputs"].dtype == got["targets"].dtype == np.int32
        assert got["inputs_pretokenized"] == prefix + row.input
        assert got["targets_pretokenized"] == target
        assert (got["example_id"], got["label"]) == (row.id, row.label)
        assert got["loss_group"] == group


def test_unusable_rows_give_no_example(toy):
    def ids(name):
        return {r["example_id"] for r in rows_of(name, "train")}

    everything = {r.id for r in task.dataset("toy").rows("train")}
    assert {"toy/train/12", "toy/train/7"} <= everything  # neither is held out
    assert ids("toy_predict") == ids("toy_label") == everything
    assert ids("toy_explain") == everything - {"toy/train/7"}
    assert (
        ids("toy_predict_llm")
        == ids("toy_label_llm")
        == everything - {"toy/train/12", "toy/train/7"}
    )


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize("stream", ["label", "predict"])
def test_evaluation_targets_are_gold_in_every_variant(toy, stream, split):
    gold, teacher = (rows_of(f"toy_{stream}{suffix}", split) for suffix in ("", "_llm"))
    assert [r["targets_pretokenized"] for r in teacher] == [r["label"] for r in gold]
    assert len(teacher) == len(task.dataset("toy").rows(split))


class Given:
    """A source of given rows, by split; `files` may name some that do not exist."""

    def __init__(self, files=(), **rows):
        self.given, self.paths, self.splits = rows, list(files), tuple(rows)

    def rows(self, split):
        return list(self.given[split])

    def files(self, split):
        return self.paths


def test_rationales_of_people_are_not_the_teachers():
    """Where no answer of a split has a label; of a teacher's some may fail to parse."""
    answers = (sources.Answer("because", None), sources.Answer("so", "a"))
    splits = {"validation": answers[:1] * 2, "test": answers}
    task.register("who", source=Given(**{
        split: [sources.Row(f"{split}/{i}", "x", "a", (said,)) for i, said in enumerate(given)]
        for split, given in {"train": answers[:1], **splits}.items()
    }))  # fmt: skip
    said = {
        split: [
            (r["teacher"], r["teacher_rationale"], r["human_rationale"])
            for r in rows_of("who_predict", split)
        ]
        for split in splits
    }
    assert said["validation"] == [("", "", "because")] * 2
    assert said["test"] == [("", "because", ""), ("a", "so", "")]


def answered(row_id, label, *answers):
    return sources.Row(row_id, f"in {row_id}", label, tuple(sources.Answer(*a) for a in answers))


# Votes: "yes" for a (750 is the mean of 1000 and 500), "no" for c, "yes" for e; none for b and d.
FAMILY_ROWS = {
    "train": (
        answered(
            "a", "yes", ("w1", "yes", 1000), ("w2", "no", 400), (), ("w3", "yes", 500), ("w4", None)
        ),
        answered("b", "no"),
        answered("c", None, ("w</s>c", "no", 300)),
        answered("d", "yes", ("wd", None, 600)),
        answered("e", "no", (None, "yes", 200)),
    ),
    "test": (
        answered("s", "yes"),
        answered("t", "no", ("w1", "yes", 100), ("w2", "no")),
        answered("u", None, ("wu", "no")),
    ),
}
# Task -> (example_id, choice, input, target, loss_weight) of its train examples.
FAMILY_TRAIN = {
    "label": [
        ("a", 0, "in a", "yes", 1000),
        ("b", 0, "in b", "no", 1000),
        ("d", 0, "in d", "yes", 1000),
        ("e", 0, "in e", "no", 1000),
    ],
    "label_llm": [
        ("a", 0, "in a", "yes", 750),
        ("c", 0, "in c", "no", 300),
        ("e", 0, "in e", "yes", 200),
    ],
    "explain": [
        ("a", 0, "explain: in a", "w1", 1000),
        ("a", 1, "explain: in a", "w2", 400),
        ("a", 2, "explain: in a", "w3", 500),
        ("a", 3, "explain: in a", "w4", 1000),
        ("d", 0, "explain: in d", "wd", 600),
    ],
    "explain_llm": [
        ("a", 0, "explain: in a", "w1", 1000),
        ("a", 1, "explain: in a", "w2", 400),
        ("a", 2, "explain: in a", "w3", 500),
        ("a", 3, "explain: in a", "w4", 1000),
        ("c", 0, "explain: in c", "w</s>c", 300),
        ("d", 0, "explain: in d", "wd", 600),
    ],
    "rationale_label": [
        ("a", 0, "in a", "w1 So the answer is yes", 1000),
        ("a", 1, "in a", "w2 So the answer is yes", 400),
        ("a", 2, "in a", "w3 So the answer is yes", 500),
        ("a", 3, "in a", "w4 So the answer is yes", 1000),
        ("d", 0, "in d", "wd So the answer is yes", 600),
    ],
    # Only rationales that lead to the label of the vote.
    "rationale_label_llm": [
        ("a", 0, "in a", "w1 So the answer is yes", 1000),
        ("a", 1, "in a", "w3 So the answer is yes", 500),
        ("c", 0, "in c", "w</s>c So the answer is no", 300),
    ],
    "label_rationale": [
        ("a", 0, "in a", "yes Explanation: w1", 1000),
        ("a", 1, "in a", "yes Explanation: w2", 400),
        ("a", 2, "in a", "yes Explanation: w3", 500),
        ("a", 3, "in a", "yes Explanation: w4", 1000),
        ("d", 0, "in d", "yes Explanation: wd", 600),
    ],
    "label_rationale_llm": [
        ("a", 0, "in a", "yes Explanation: w1", 1000),
        ("a", 1, "in a", "yes Explanation: w3", 500),
        ("c", 0, "in c", "no Explanation: w</s>c", 300),
    ],
    "with_rationale": [
        ("a", 0, "in a Rationale: w1", "yes", 1000),
        ("a", 1, "in a Rationale: w2", "yes", 1000),
        ("a", 2, "in a Rationale: w3", "yes", 1000),
        ("a", 3, "in a Rationale: w4", "yes", 1000),
        ("d", 0, "in d Rationale: wd", "yes", 1000),
    ],
    # Its `</s>` is text of the teacher, and must not become the EOS id of an input.
    "with_rationale_llm": [
        ("a", 0, "in a Rationale: w1", "yes", 1000),
        ("a", 1, "in a Rationale: w3", "yes", 500),
        ("c", 0, "in c Rationale: w c", "no", 300),
    ],
}
for labeler in ("", "_llm"):
    FAMILY_TRAIN[f"predict{labeler}"] = [
        (i, choice, f"predict: {text}", *rest)
        for i, choice, text, *rest in FAMILY_TRAIN[f"label{labeler}"]
    ]
# In test, the same with and without `_llm`: (example_id, input, target).
FAMILY_TEST = {
    "label": [("s", "in s", "yes"), ("t", "in t", "no")],
    "predict": [("s", "predict: in s", "yes"), ("t", "predict: in t", "no")],
    "explain": [("t", "explain: in t", "w1")],
    "rationale_label": [
        ("s", "in s", "So the answer is yes"),
        ("t", "in t", "w1 So the answer is no"),
    ],
    "label_rationale": [("s", "in s", "yes"), ("t", "in t", "no Explanation: w1")],
    "with_rationale": [("s", "in s", "yes"), ("t", "in t Rationale: w1", "no")],
}


@pytest.fixture
def family():
    task.register("fam", source=Given(**FAMILY_ROWS))


def pretokenized(row):
    return row["inputs_pretokenized"], row["targets_pretokenized"]


@pytest.mark.parametrize("name", FAMILY_TRAIN)
def test_every_example_of_the_family(family, name):
    encode = vocabulary.load("bytes").encode
    gold = {row.id: row.label or "" for row in FAMILY_ROWS["train"]}
    got = rows_of(f"fam_{name}", "train")
    assert [
        (r["example_id"], r["choice"], *pretokenized(r), r["loss_weight"]) for r in got
    ] == FAMILY_TRAIN[name]
    for row in got:
        assert row["label"] == gold[row["example_id"]]
        assert row["loss_group"] == (1 if name.startswith("explain") else 0)
        assert row["inputs"].tolist() == [*encode(row["inputs_pretokenized"]), 1]
        assert row["targets"].tolist() == [*encode(row["targets_pretokenized"]), 1]


@pytest.mark.parametrize("name", FAMILY_TRAIN)
def test_evaluation_has_each_labeled_row_once_and_gold(family, name):
    got = rows_of(f"fam_{name}", "test")
    want = FAMILY_TEST[name.removesuffix("_llm")]
    assert [(r["example_id"], *pretokenized(r)) for r in got] == want
    assert all(r["choice"] == 0 for r in got)
    if task.lookup(f"fam_{name}").metric_fns:  # then every row that can be scored is there
        assert [r["label"] for r in got] == ["yes", "no"]


def test_every_task_of_a_dataset_has_the_same_population(family, foreign):
    for name in FAMILY_TRAIN:
        assert task.population(f"fam_{name}", "train") == ["a", "b", "c", "d", "e"]
        assert task.population(f"fam_{name}", "test") == ["s", "t", "u"]
    assert task.population("foreign", "train") is None


def test_a_stream_without_examples_says_what_it_needs():
    unlabeled = [answered("a", None, ("w", None)), answered("b", None)]
    task.register("pool", source=Given(train=unlabeled))
    for name, needed in (
        ("label", "a gold label"),
        ("predict_llm", "a teacher label that parses"),
        ("explain", "a rationale and a gold label"),
        ("rationale_label", "a rationale and a gold label"),
        ("with_rationale_llm", "a rationale and a teacher label that parses"),
    ):
        with pytest.raises(ValueError, match=f"pool_{name} has no .*the 2 train rows has {needed}"):
            rows_of(f"pool_{name}", "train")
    assert [r["targets_pretokenized"] for r in rows_of("pool_explain_llm", "train")] == ["w"]


def test_rows_come_in_the_same_order_every_time(toy):
    assert [r["example_id"] for r in rows_of("toy_predict", "train")] == [
        r.id for r in task.dataset("toy").rows("train")
    ]


@pytest.fixture
def sentencepiece_model(tmp_path):
    import sentencepiece

    with open(tmp_path / "sp.model", "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([f"a premise {i} and a hypothesis" for i in range(200)]),
            model_writer=model,
            vocab_size=350,
            hard_vocab_limit=False,
            byte_fallback=True,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    return str(tmp_path / "sp.model")


class Fixed:
    """A source of the given inputs, as generated data would have it."""

    splits = ("train", "test")

    def __init__(self, *inputs):
        self.inputs = inputs

    def rows(self, split):
        return [
            sources.Row(
                f"fixed/{split}/{i}", text, "yes", (sources.Answer("</s> stays text here"),)
            )
            for i, text in enumerate(self.inputs)
        ]

    def files(self, split):
        return []


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_eos_text_in_an_input_is_the_eos_id(kind, request):
    spec = kind if kind == "bytes" else request.getfixturevalue("sentencepiece_model")
    task.bind(vocabulary=spec)
    inputs = [
        "a premise</s>a hypothesis",
        "no splice",
        "</s>at the start",
        "at the end</s>",
        "a</s>b</s>c",
        "two\nlines</s>and\nmore",
    ]
    task.register("fixed", source=Fixed(*inputs))
    encode = task.vocabulary().encode
    for text, row in zip(inputs, rows_of("fixed_label", "train"), strict=True):
        want = []
        for piece in text.split("</s>"):
            want += [*encode(piece), 1]
        assert row["inputs"].tolist() == want, text
    for row in rows_of("fixed_explain", "train"):
        assert row["targets"].tolist() == [*encode("</s> stays text here"), 1]


# --- SeqIO's own tools on our tasks -------------------------------------------------------------


def assert_works_in_seqio(name, pack):
    """SeqIO's own converter gives a T5X model the examples of every member, and nothing else."""
    dataset = seqio.get_dataset(
        mixture_or_task_name=name,
        task_feature_lengths={"inputs": 64, "targets": 64},
        dataset_split="train",
        feature_converter=seqio.EncDecFeatureConverter(pack=pack),
        shuffle=True,
        seed=1,
        num_epochs=None,
    )
    batch = next(dataset.batch(60).as_numpy_iterator())
    assert batch["encoder_input_tokens"].shape == batch["decoder_target_tokens"].shape == (60, 64)
    assert ("decoder_segment_ids" in batch) == pack
    got = set()
    for row, targets in enumerate(batch["decoder_target_tokens"]):
        segments = batch["decoder_segment_ids"][row] if pack else targets > 0
        for segment in set(segments[segments > 0].tolist()):
            got.add(tuple(targets[segments == segment].tolist()))
    members = [member.name for member in task.describe(name).members]
    assert got == {tuple(r["targets"].tolist()) for m in members for r in rows_of(m, "train")}


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("name", [*FAMILY_TRAIN, "step_by_step", "step_by_step_llm"])
def test_seqio_converts_the_whole_family(family, name, pack):
    assert_works_in_seqio(f"fam_{name}", pack)


def test_the_whole_family_has_one_element_spec(family):
    specs = {
        name: task.lookup(f"fam_{name}").get_dataset(split="train", shuffle=False).element_spec
        for name in FAMILY_TRAIN
    }
    for name, spec in specs.items():
        assert spec == specs["label"], name
    assert {"loss_group", "choice", "loss_weight", "example_id", "label"} < set(specs["label"])


def test_seqio_keeps_the_eos_when_it_trims(toy):
    dataset = task.lookup("toy_explain").get_dataset(
        sequence_length={"inputs": 6, "targets": 4}, split="train", shuffle=False
    )
    for example in dataset.as_numpy_iterator():
        assert len(example["inputs"]) == 6 and example["inputs"][-1] == 1
        assert len(example["targets"]) == 4 and example["targets"][-1] == 1


def test_mixture_draws_both_streams(toy):
    info = task.describe("toy_step_by_step")
    assert [(m.name, m.rate, m.loss_group) for m in info.members] == [
        ("toy_explain", 1.0, 1),
        ("toy_predict", 1.0, 0),
    ]
    dataset = task.lookup("toy_step_by_step").get_dataset(
        split="train", seed=0, passthrough_features=["loss_group"]
    )
    groups = [int(e["loss_group"]) for e in dataset.take(100).as_numpy_iterator()]
    assert 30 < groups.count(0) < 70 and groups.count(0) + groups.count(1) == 100


def test_seqio_evaluator_scores_against_gold(toy):
    """The train split of `_llm` has the teacher's targets, and is scored against gold."""
    gold = [r["label"] for r in rows_of("toy_predict_llm", "train")]
    assert seqio_score("toy_predict_llm", "train", gold) == {"accuracy": 1.0}


@pytest.mark.parametrize(
    "name, said",
    [
        ("fam_rationale_label", ["Because. So the answer is yes", "It is no, I think"]),
        ("fam_label_rationale_llm", ["yes Explanation: because", "So the answer is no"]),
    ],
)
def test_seqio_evaluator_finds_the_answer_in_the_text(family, name, said):
    """The first prediction holds the right answer, the second holds none."""
    assert seqio_score(name, "test", said) == {"accuracy": 0.5}


def seqio_score(name, split, predictions):
    evaluator = seqio.Evaluator(
        name,
        seqio.EncDecFeatureConverter(pack=False),
        eval_split=split,
        sequence_length={"inputs": 64, "targets": 64},
        logger_cls=[],
    )
    encode = vocabulary.load("bytes").encode
    ids = [encode(text) + [1] for text in predictions]
    width = max(map(len, ids))

    def predict(dataset, model_feature_shapes=None):
        return [(i, t + [0] * (width - len(t))) for i, t in enumerate(ids)]

    computed, _ = evaluator.evaluate(
        compute_metrics=True, step=0, predict_fn=predict, score_fn=None
    )
    return computed.result()[name]


# --- Describing and looking up ------------------------------------------------------------------


def test_describe_one_task(toy):
    info = task.describe("toy_predict")
    assert info.members == (
        task.MemberInfo("toy_predict", 1.0, ("distill.metrics.label_accuracy",), 0, "toy"),
    )
    forms = {
        stream: task.describe(f"toy_{stream}_llm").members[0].answer_form
        for stream in ("label", "with_rationale", "rationale_label", "label_rationale")
    }
    assert forms == {
        "label": "label",
        "with_rationale": "label",
        "rationale_label": "rationale_label",
        "label_rationale": "label_rationale",
    }
    assert task.describe("toy_explain").members[0].metrics == ()
    assert info.files("train") == sorted(task.dataset("toy").files("train"))


@pytest.fixture
def foreign():
    """A SeqIO task and a nested mixture that `register` did not make."""
    features = {k: seqio.Feature(seqio.ByteVocabulary(extra_ids=0)) for k in ("inputs", "targets")}
    seqio.TaskRegistry.add(
        "foreign",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
                # Its `choice` is not ours.
                {"inputs": ["ab", "c"], "targets": ["yes", "no"], "choice": ["x", "y"]}
            ),
            splits=["train"],
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features=features,
        metric_fns=[metrics.label_accuracy],
    )
    yield
    seqio.TaskRegistry.remove("foreign")
    for name in ("nested", "outer"):
        seqio.MixtureRegistry.remove(name)


def test_foreign_tasks_get_defaults(toy, foreign):
    first = rows_of("foreign", "train")[0]
    assert first["inputs"].tolist() == [97 + 3, 98 + 3, 1]
    assert first["targets_pretokenized"] == first["label"] == "yes"
    assert (first["example_id"], first["loss_group"]) == ("foreign/train/0", 0)
    assert (first["choice"], first["loss_weight"]) == (0, 1000)
    member = task.describe("foreign").members[0]
    assert (member.loss_group, member.dataset, member.answer_form) == (None, None, "label")


def test_nested_mixtures_are_flattened(toy, foreign):
    seqio.MixtureRegistry.add("outer", [("toy_step_by_step", 1.0), ("toy_label", 2.0)])
    info = task.describe("outer")
    assert {m.name: m.rate for m in info.members} == {
        "toy_explain": 0.5,
        "toy_predict": 0.5,
        "toy_label": 2.0,
    }
    assert info.files("test") == sorted(task.dataset("toy").files("test"))
    seqio.MixtureRegistry.add("nested", [("outer", 1.0), ("foreign", 1.0)])
    assert task.describe("nested").files("train") is None


# --- All datasets in one mixture ----------------------------------------------------------------


def numbered(n):
    return [answered(str(i), "yes", ("why", "no")) for i in range(n)]


@pytest.fixture
def several(tmp_path):
    """Three datasets of sizes 1, 3 and 2; `gone` is counted in `rows` but its file is missing."""
    (tmp_path / "here").touch()
    for name, n, file in (("one", 1, "here"), ("three", 3, "here"), ("gone", 2, "missing")):
        source = Given([str(tmp_path / file)], train=numbered(n), test=numbered(n))
        task.register(name, source=source)
    return tmp_path


@pytest.mark.parametrize("labeler", ["", "_llm"])
def test_all_mixes_datasets_by_size(several, labeler):
    task.register_all(["one", "three"])
    for mixture, streams in (("label", ["label"]), ("step_by_step", ["predict", "explain"])):
        name = f"all_{mixture}{labeler}"
        assert {m.name: m.rate for m in task.describe(name).members} == {
            f"{dataset}_{stream}{labeler}": n
            for dataset, n in (("one", 1.0), ("three", 3.0))
            for stream in streams
        }
        for pack in (False, True):
            assert_works_in_seqio(name, pack)


def test_all_takes_every_registered_dataset_unless_told(several):
    with pytest.raises(ValueError, match=r"no dataset named 'tree'\. Did you mean 'three'"):
        task.register_all(["one", "tree"])
    assert "all_label" not in seqio.MixtureRegistry.names()
    task.register_all()
    assert {m.dataset for m in task.describe("all_label").members} == {"one", "three", "gone"}
    with pytest.raises(ValueError, match="all_label, all_label_llm, .* are taken"):
        task.register_all()


def test_registering_and_describing_read_no_data_but_for_sizes(several):
    class Unread(Given):
        def rows(self, split):
            raise FileNotFoundError(f"no unread_{split}.json")

    task.register("unread", source=Unread(train=(), test=()))
    task.register_all(["one", "unread"])
    assert len(task.describe("unread_step_by_step", split="train").members) == 2
    assert len(task.describe("all_label", split="test").members) == 2
    with pytest.raises(FileNotFoundError, match=r"no unread_train\.json"):
        task.describe("all_label", split="train")


def test_missing_datasets_are_named_or_skipped_by_name(several):
    task.register_all()
    with pytest.raises(
        FileNotFoundError,
        match=r"(?s)all_step_by_step: no train data of gone\. Add it, or leave .*"
        r"ALLOW_MISSING=gone\..*gone: no file .*/missing: add it.*DATA_DIR",
    ):
        task.describe("all_step_by_step", split="train")
    info = task.describe("all_step_by_step", split="train", allow_missing=("gone",))
    assert info.skipped == ("gone",)
    assert {m.dataset: m.rate for m in info.members} == {"one": 1.0, "three": 3.0}
    assert info.files("train") == [str(several / "here")]
    # What is there is not skipped, allowed or not.
    info = task.describe("all_step_by_step", split="train", allow_missing=("gone", "three"))
    assert info.skipped == ("gone",)


def test_allow_missing_has_limits(several):
    task.register_all()
    with pytest.raises(ValueError, match=r"ALLOW_MISSING names 'tree', .* Did you mean 'three'"):
        task.describe("all_label", split="train", allow_missing=("tree",))
    with pytest.raises(ValueError, match=r"'one', which is no dataset of 'three_label'.*has three"):
        task.describe("three_label", split="train", allow_missing=("one",))
    (several / "here").unlink()
    everything = ("one", "three", "gone")
    with pytest.raises(FileNotFoundError, match="gone, one, three.*Nothing is left"):
        task.describe("all_label", split="train", allow_missing=everything)
    with pytest.raises(FileNotFoundError, match=r"^one: no file .*DATA_DIR"):
        task.describe("one_label", split="train")


def test_the_projects_own_mixture_has_the_published_datasets_only():
    task.import_module("tasks")
    members = {t.name for t in task.lookup("all_step_by_step").tasks}
    assert {f"{d}_predict" for d in ("anli1", "cqa", "esnli", "svamp")} <= members
    assert not any(m.startswith(("arithmetic", "svamp_asdiv", "asdiv")) for m in members)


# --- The run's settings -------------------------------------------------------------------------


def test_the_teacher_filter_reaches_the_tasks_but_not_the_population():
    task.bind(teacher_filter="drop")
    rows = [
        answered("right", "yes", ("w", "yes")),
        answered("wrong", "yes", ("w", "no")),
        answered("unasked", "no"),
    ]
    task.register("toy", source=Given(train=rows, test=rows))
    task.register_all(["toy"])
    assert [r["example_id"] for r in rows_of("toy_predict", "train")] == ["right", "unasked"]
    assert task.report("toy", "train").rows == 2
    assert task.describe("all_label").members[0].rate == 2.0  # each example is drawn once
    assert task.population("toy_predict", "train") == ["right", "wrong", "unasked"]
    assert len(rows_of("toy_predict", "test")) == 3


def test_the_teacher_filter_follows_the_first_metric():
    task.bind(teacher_filter="drop")
    rows = [
        answered("right", "( 4.0 / 2.0 )", ("w", "(4 / 2)")),
        answered("wrong", "2", ("w", "3")),
    ]
    for name, metric_fns in (
        ("text", [metrics.label_accuracy]),
        ("value", [metrics.equation_accuracy, metrics.label_accuracy]),
    ):
        task.register(name, source=Given(train=rows), metric_fns=metric_fns)
    assert [r["example_id"] for r in rows_of("value_label", "train")] == ["right"]
    with pytest.raises(ValueError, match="text_label has no training example.*TEACHER_FILTER"):
        rows_of("text_label", "train")


def test_a_rationale_store_takes_the_place_of_the_answers(tmp_path):
    rows = [answered("a", "yes", ("old", "no")), answered("b", "no", ("old", "no"))]
    sources.write_store(
        tmp_path / "store.jsonl",
        [
            sources.StoreRecord("a", sources.input_sha256("in a"), n, why, "yes", confidence)
            for n, (why, confidence) in enumerate([("new", 0.25), ("newer", None)])
        ],
    )
    task.bind(rationale_store=str(tmp_path / "store.jsonl"))
    task.register("toy", source=Given(train=rows))
    got = rows_of("toy_explain", "train")
    assert [(r["example_id"], r["choice"], r["targets_pretokenized"]) for r in got] == [
        ("a", 0, "new"),
        ("a", 1, "newer"),
    ]
    assert [r["loss_weight"] for r in got] == [250, 1000]
    assert task.describe("toy_label").files("train") == [str(tmp_path / "store.jsonl")]


def test_a_missing_store_is_no_missing_dataset(several):
    task.bind(rationale_store=str(several / "no_store.jsonl"))
    task.register_all(["one", "gone"])
    info = task.describe("all_label", split="test", allow_missing=("one", "gone"))
    assert (info.skipped, [m.dataset for m in info.members]) == (("gone",), ["one"])
    with pytest.raises(FileNotFoundError, match=r"no_store\.jsonl"):
        info.files("test")


# --- A dataset is one file ----------------------------------------------------------------------


def test_the_guides_dataset_of_one_file(tmp_path, monkeypatch):
    """docs/tasks.md: a file of at most 40 lines gives every task and mixture."""
    guide = (ROOT / "docs" / "tasks.md").read_text("utf-8")
    module = re.search(r"```python\n(# my_tasks\.py\n.*?)```", guide, re.DOTALL)[1]
    line = re.search(r"```json\n(.*?)```", guide, re.DOTALL)[1]
    assert len(module.splitlines()) <= 40
    (tmp_path / "my_tasks.py").write_text(module)
    (tmp_path / "reviews").mkdir()
    for split, n in (("train", 20), ("test", 3)):
        rows = [{**json.loads(line), "id": f"r{i}", "text": f"Review {i}"} for i in range(n)]
        (tmp_path / "reviews" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.syspath_prepend(tmp_path)
    task.bind(data_dir=str(tmp_path))
    task.import_module("my_tasks")
    assert task.datasets() == ["reviews"]
    for name in FAMILY_TRAIN:
        rationales = 1 if name.split("_llm")[0] in ("label", "predict") else 2
        assert len(rows_of(f"reviews_{name}", "train")) == 18 * rationales
        assert len(rows_of(f"reviews_{name}", "validation")) == 2
        assert len(rows_of(f"reviews_{name}", "test")) == 3
        assert (f"| `reviews_{name}`" in guide) == (not name.endswith("_llm"))
    for name in ("rationale_label_llm", "step_by_step", "step_by_step_llm"):
        assert_works_in_seqio(f"reviews_{name}", pack=True)


# --- Unknown names ------------------------------------------------------------------------------


def test_unknown_names_list_what_there_is(toy):
    with pytest.raises(
        ValueError,
        match=r"'toy_predit'\. Did you mean 'toy_predict'.*datasets: toy; their tasks: "
        r"<dataset>_label, .*<dataset>_step_by_step, and each with _llm",
    ):
        task.lookup("toy_predit")
    with pytest.raises(ValueError, match="No task module was imported"):
        task.lookup("zzz")
    with pytest.raises(ValueError, match=r"no dataset named 'tyo'\. Did you mean 'toy'"):
        task.report("tyo", "train")


def test_unknown_names_say_which_module_was_imported(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(
        "from distill import sources, task\n"
        "class S:\n"
        "    splits = ('train',)\n"
        "    def rows(self, split): return [sources.Row('a/0', 'x', 'y')]\n"
        "    def files(self, split): return []\n"
        "task.register('mine', source=S())\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    task.import_module("my_tasks")
    assert [r["label"] for r in rows_of("mine_label", "train")] == ["y"]
    with pytest.raises(
        ValueError,
        match=r"'mine_labels'\. Did you mean 'mine_label'.*"
        r"MIXTURE_OR_TASK_MODULE=my_tasks was imported",
    ):
        task.lookup("mine_labels")


def test_missing_module_names_the_flag_and_a_broken_one_its_own_error(tmp_path, monkeypatch):
    with pytest.raises(ModuleNotFoundError, match=r"no_such_tasks.*MIXTURE_OR_TASK_MODULE"):
        task.import_module("no_such_tasks")
    (tmp_path / "broken_tasks.py").write_text("import not_installed_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="^No module named 'not_installed_at_all'"):
        task.import_module("broken_tasks")


def test_mixtures_and_missing_splits_are_refused(toy):
    with pytest.raises(ValueError, match="is a mixture.*toy_explain, toy_predict"):
        rows_of("toy_step_by_step", "train")
    with pytest.raises(ValueError, match=r"no split 'dev'; it has train, validation, test"):
        rows_of("toy_label", "dev")


def test_a_dataset_registers_once(toy):
    with pytest.raises(ValueError, match="'toy' is already registered.*one import name"):
        task.register("toy", source=layout())
    # `odd_rationale` would have the task `odd_rationale_label` too, and nothing is half registered.
    task.register("odd", source=layout())
    with pytest.raises(ValueError, match="odd_rationale_label, odd_rationale_label_llm are taken"):
        task.register("odd_rationale", source=layout())
    assert "odd_rationale_predict" not in seqio.TaskRegistry.names()


def test_pretokenized_texts_have_no_control_text(toy):
    texts = list(task.pretokenized_texts("toy_step_by_step", "test"))
    assert "predict: in0" in texts and "put" in texts and "why0" in texts and "g0" in texts
    assert not any("</s>" in t for t in texts)


# --- Binding ------------------------------------------------------------------------------------


def test_binding_prefers_arguments_then_environment(monkeypatch, sentencepiece_model):
    assert sources.settings().data_dir is None and task.vocabulary().spec == "bytes"
    task.reset()
    monkeypatch.setenv("DISTILL_DATA_DIR", "/from/environment")
    monkeypatch.setenv("DISTILL_VOCABULARY", sentencepiece_model)
    assert sources.settings().data_dir == "/from/environment"
    assert task.vocabulary().spec == sentencepiece_model
    task.reset()
    task.bind(data_dir="/given", vocabulary="bytes")
    assert sources.settings().data_dir == "/given" and task.vocabulary().spec == "bytes"


def test_binding_again(sentencepiece_model):
    task.bind(data_dir="/a", vocabulary="bytes")
    task.bind(data_dir="/a/", vocabulary="bytes")
    task.bind()
    with pytest.raises(
        ValueError,
        match=r"data_dir is already '/a' and cannot become '/b'.*"
        r"--gin\.DATA_DIR",
    ):
        task.bind(data_dir="/b")
    with pytest.raises(ValueError, match=r"vocabulary is already 'bytes'.*--gin\.VOCABULARY"):
        task.bind(vocabulary=sentencepiece_model)
    assert sources.settings().data_dir == "/a" and task.vocabulary().spec == "bytes"


def test_registering_fixes_the_vocabulary_but_not_the_data_folder(data, sentencepiece_model):
    task.register("toy", source=layout())
    with pytest.raises(ValueError, match="already 'bytes'"):
        task.bind(vocabulary=sentencepiece_model)
    task.bind(data_dir=str(data))
    assert len(rows_of("toy_label", "test")) == TEST_ROWS


def test_a_failed_binding_binds_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        task.bind(data_dir="/a", vocabulary=str(tmp_path / "none.model"))
    assert sources.settings().data_dir is None
    task.bind(data_dir="/b", vocabulary="bytes")


# --- Training a vocabulary ----------------------------------------------------------------------


def test_train_vocabulary_script(data, tmp_path):
    (tmp_path / "voc_tasks.py").write_text(
        "from distill import sources, task\n"
        "task.register('toy', source=sources.ReleasedLayout('toy', fields=('text', 'gold'),\n"
        "    example=lambda f: (f['text'], f['gold']),\n"
        "    parse=lambda c: tuple(c.split(' =>')) if '=>' in c else (None, None)))\n"
    )
    output = tmp_path / "new" / "spiece.model"
    command = [
        sys.executable,
        str(ROOT / "scripts" / "train_vocabulary.py"),
        "--mixture=toy_label,toy_step_by_step",
        f"--data_dir={data}",
        "--vocab_size=350",
        f"--output={output}",
        "--module=voc_tasks",
    ]
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path, "DISTILL_VOCABULARY": "/ignored"},
    )
    assert done.returncode == 0, done.stderr
    vocab = vocabulary.load(str(output))
    assert f"{vocab.size} pieces" in done.stdout and f"--gin.VOCABULARY={output}" in done.stdout
    assert vocab.decode(vocab.encode("predict: in3")) == "predict: in3"
    assert [p.name for p in output.parent.iterdir()] == ["spiece.model"]


def test_seqio_offline_caches_are_read(toy, tmp_path, monkeypatch):
    """What seqio_cache_tasks writes (it needs Apache Beam, so the files are written here)."""
    offline = tmp_path / "offline" / "toy_predict"
    offline.mkdir(parents=True)
    example = next(rows for rows in task.tokenized_rows("toy_predict", "train"))
    strings = dict(inputs_pretokenized="from the cache", targets_pretokenized="t", label="g",
                   example_id="toy/train/0")  # fmt: skip
    numbers = dict(inputs=example["inputs"][:3], targets=example["targets"][:-1], loss_group=[0],
                   choice=[0], loss_weight=[1000])  # fmt: skip
    features = {k: tf.train.Feature(bytes_list=tf.train.BytesList(value=[v.encode()]))
                for k, v in strings.items()}  # fmt: skip
    features |= {k: tf.train.Feature(int64_list=tf.train.Int64List(value=v))
                 for k, v in numbers.items()}  # fmt: skip
    record = tf.train.Example(features=tf.train.Features(feature=features))
    with tf.io.TFRecordWriter(str(offline / "train.tfrecord-00000-of-00001")) as writer:
        writer.write(record.SerializeToString())
    shapes = {k: {"shape": [], "dtype": "string"} for k in strings}
    shapes |= {k: {"shape": [None] if k in ("inputs", "targets") else [], "dtype": "int32"}
               for k in numbers}  # fmt: skip
    info = {"num_shards": 1, "features": shapes, "seqio_version": "1.0.0"}
    (offline / "info.train.json").write_text(json.dumps(info))
    (offline / "stats.train.json").write_text(json.dumps({"examples": 1}))
    (offline / "COMPLETED").write_text("")

    (tmp_path / "nothing_to_register.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    before = list(seqio.utils.get_global_cache_dirs())
    monkeypatch.setenv("DISTILL_SEQIO_CACHE_DIRS", str(offline.parent))
    try:
        task.import_module("nothing_to_register")
        (row,) = rows_of("toy_predict", "train")
    finally:
        seqio.set_global_cache_dirs(before)
    assert row["inputs_pretokenized"] == "from the cache"
    # EOS is put behind what was cached.
    assert row["inputs"].tolist() == [*example["inputs"][:3], 1]
    assert row["targets"].tolist() == example["targets"].tolist()
    assert len(rows_of("toy_explain", "train")) > 1  # not cached there: preprocessed
