"""One dataset to its SeqIO tasks: what is read, what is registered, what comes out of SeqIO."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import seqio
import tensorflow as tf

from distill import metrics, task, vocabulary

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Every test binds for itself."""
    for variable in ("DISTILL_DATA_DIR", "DISTILL_VOCABULARY"):
        monkeypatch.delenv(variable, raising=False)
    task.reset()
    yield
    task.reset()


# --- A dataset in the released layout ---------------------------------------------------------

# Row i has the input "in<i></s>put", the gold label "g<i>", the teacher's label "t<i>".
ROWS, TEST_ROWS = 25, 3


def write(root, split, rows, completions, shard=10):
    folder = root / "toy" / "llm"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": f"in{i}</s>put", "gold": f"g{i}"}) for i in range(rows)]
    (root / "toy" / f"toy_{split}.json").write_text("\n".join(lines) + "\n")
    for i, start in enumerate(range(0, len(completions), shard)):
        part = completions[start : start + shard]
        (folder / f"{split}_CoT_{i}.json").write_text(json.dumps(part))


def completion(i):
    # Row 12 has a rationale without a label, row 7 nothing that parses.
    return {12: "why12 =>", 7: ""}.get(i, f"why{i} => t{i}")


def parse(text):
    rationale, _, label = text.partition("=>")
    return rationale.strip(), label.strip()


def layout(**kwargs):
    return task.ReleasedLayout(
        "toy",
        fields=("text", "gold"),
        parse=parse,
        example=lambda f: (f["text"], f["gold"]),
        **kwargs,
    )


@pytest.fixture
def data(tmp_path):
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


# --- Reading ----------------------------------------------------------------------------------


def test_shards_join_by_position_in_numeric_order(tmp_path):
    # Twelve shards: sorted by name, 10 would come before 2.
    write(tmp_path, "train", 12, [f"why{i} => t{i}" for i in range(12)], shard=1)
    task.bind(data_dir=str(tmp_path))
    rows = layout().rows("train")
    assert [r.teacher_label for r in rows] == [f"t{i}" for i in range(12)]
    assert [r.rationale for r in rows] == [f"why{i}" for i in range(12)]
    assert [r.id for r in rows] == [f"toy/train/{i}" for i in range(12)]


def test_hold_out_splits_the_train_file(toy):
    source = task.dataset("toy")
    order = np.random.default_rng(0).permutation(ROWS)
    assert [r.id for r in source.rows("validation")] == [f"toy/train/{i}" for i in order[:3]]
    assert [r.id for r in source.rows("train")] == [f"toy/train/{i}" for i in order[3:]]
    assert [r.id for r in source.rows("test")] == [f"toy/test/{i}" for i in range(TEST_ROWS)]


def test_valid_file_is_used_without_a_hold_out(data):
    write(data, "valid", 2, [])
    task.bind(data_dir=str(data))
    assert [r.id for r in layout().rows("validation")] == ["toy/valid/0", "toy/valid/1"]
    assert len(layout().rows("train")) == ROWS


def test_files_are_those_that_decide_the_rows(toy):
    files = task.dataset("toy").files("train")
    names = [pathlib.Path(f).relative_to(toy).as_posix() for f in files]
    assert names == ["toy/toy_train.json", *(f"toy/llm/train_CoT_{i}.json" for i in range(3))]


def test_report_counts_what_did_not_parse(data):
    task.bind(data_dir=str(data))
    report = task.source_report(layout(), "train")
    assert report == task.SourceReport(
        rows=ROWS, parsed=ROWS - 2, unparsed=2, rationales=ROWS - 1, teacher_accuracy=0.0
    )
    right = task.source_report(
        layout(),
        "train",
        lambda targets, predictions: {
            "accuracy": sum(t[1:] == p[1:] for t, p in zip(targets, predictions, strict=True))
            / ROWS
        },
    )
    assert right.teacher_accuracy == (ROWS - 2) / ROWS


def test_no_data_folder_names_the_flag():
    with pytest.raises(
        FileNotFoundError,
        match=r"toy_train\.json.*no data folder is set.*"
        r"--gin\.DATA_DIR.*DISTILL_DATA_DIR",
    ):
        layout().rows("train")


def test_wrong_data_folder_names_the_path(tmp_path):
    task.bind(data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"nowhere/toy/toy_train\.json.*--gin\.DATA_DIR"):
        layout().rows("train")


def test_row_without_a_field_is_named_with_its_line(data):
    path = data / "toy" / "toy_train.json"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:6], '{"text": "x", "label": 1}', *lines[7:]]))
    task.bind(data_dir=str(data))
    with pytest.raises(ValueError, match=r"toy_train\.json:7: the row lacks gold; it has text, "):
        layout().rows("train")


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"text": "x", ', "not valid JSON: .*double quotes"),
        ("[1, 2]", "a row must be a JSON object, not list"),
        ('{"text": "x", "gold": null}', "input and label must be text, got 'x', None"),
    ],
)
def test_bad_line_is_named_with_its_reason(data, line, reason):
    with open(data / "toy" / "toy_train.json", "a") as f:
        f.write(line + "\n")
    task.bind(data_dir=str(data))
    with pytest.raises(ValueError, match=rf"toy_train\.json:{ROWS + 1}: {reason}"):
        layout().rows("train")


def test_completions_that_do_not_line_up_are_refused(data):
    os.remove(data / "toy" / "llm" / "train_CoT_1.json")  # 0 and 2 stay
    task.bind(data_dir=str(data))
    with pytest.raises(ValueError, match=r"10 completions for 25 rows.*train_CoT_0\.json \(10\)"):
        layout().rows("train")


def test_completions_must_be_a_list_of_text(data):
    path = data / "toy" / "llm" / "test_CoT_0.json"
    task.bind(data_dir=str(data))
    for content, reason in (('["a", "b", 3]', "JSON list of strings"), ("[", "not valid JSON")):
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"test_CoT_0\.json.*{reason}"):
            layout().rows("test")


def test_without_completions_gold_labels_still_work(tmp_path):
    write(tmp_path, "train", ROWS, [])
    task.bind(data_dir=str(tmp_path))
    task.register("toy", source=layout(holdout=True))
    assert len(rows_of("toy_label", "train")) == ROWS - 3
    for name, needed in (("toy_explain", "a rationale"), ("toy_label_llm", "a teacher label")):
        with pytest.raises(ValueError, match=rf"no training example.*{needed}.*train_CoT_0\.json"):
            rows_of(name, "train")
    assert rows_of("toy_explain", "validation") == []


# --- What a task gives ------------------------------------------------------------------------


def test_streams(toy):
    encode = vocabulary.load("bytes").encode
    row = task.dataset("toy").rows("train")[0]
    before, after = row.input.split("</s>")
    for name, prefix, target, group in (
        ("toy_label", "", row.label, 0),
        ("toy_predict", "predict: ", row.label, 0),
        ("toy_explain", "explain: ", row.rationale, 1),
        ("toy_label_llm", "", row.teacher_label, 0),
        ("toy_predict_llm", "predict: ", row.teacher_label, 0),
        ("toy_explain_llm", "explain: ", row.rationale, 1),
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
            task.Row(f"fixed/{split}/{i}", text, "yes", rationale="</s> stays text here")
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

LENGTHS = {"inputs": 16, "targets": 8}


@pytest.mark.parametrize(
    "name, pack",
    [("toy_label", False), ("toy_step_by_step", False), ("toy_step_by_step_llm", True)],
)
def test_seqio_feature_converter(toy, name, pack):
    dataset = seqio.get_dataset(
        mixture_or_task_name=name,
        task_feature_lengths=LENGTHS,
        dataset_split="train",
        feature_converter=seqio.EncDecFeatureConverter(pack=pack),
        shuffle=True,
        seed=1,
        num_epochs=1,
    )
    batch = next(dataset.batch(4).as_numpy_iterator())
    assert batch["encoder_input_tokens"].shape == (4, 16)
    assert batch["decoder_target_tokens"].shape == (4, 8)
    assert (batch["decoder_target_tokens"] != 0).any()


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
    evaluator = seqio.Evaluator(
        "toy_predict_llm",
        seqio.EncDecFeatureConverter(pack=False),
        eval_split="train",
        sequence_length={"inputs": 64, "targets": 16},
        logger_cls=[],
    )
    encode = vocabulary.load("bytes").encode

    def predict(dataset, model_feature_shapes=None):
        gold = [encode(r["label"]) + [1] for r in rows_of("toy_predict_llm", "train")]
        width = max(map(len, gold))
        return [(i, g + [0] * (width - len(g))) for i, g in enumerate(gold)]

    computed, _ = evaluator.evaluate(
        compute_metrics=True, step=0, predict_fn=predict, score_fn=None
    )
    assert computed.result()["toy_predict_llm"] == {"accuracy": 1.0}


# --- Describing and looking up ------------------------------------------------------------------


def test_describe_one_task(toy):
    info = task.describe("toy_predict")
    assert info.members == (
        task.MemberInfo("toy_predict", 1.0, ("distill.metrics.label_accuracy",), 0),
    )
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
                {"inputs": ["ab", "c"], "targets": ["yes", "no"]}
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
    assert task.describe("foreign").members[0].loss_group is None


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


def test_unknown_names_list_what_there_is(toy):
    with pytest.raises(
        ValueError,
        match=r"'toy_predit'\. Did you mean 'toy_predict'.*known: .*"
        r"toy_step_by_step_llm|No task module",
    ):
        task.lookup("toy_predit")
    with pytest.raises(ValueError, match="No task module was imported"):
        task.lookup("zzz")
    with pytest.raises(ValueError, match=r"no dataset named 'tyo'\. Did you mean 'toy'"):
        task.report("tyo", "train")


def test_unknown_names_say_which_module_was_imported(tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(
        "from distill import task\n"
        "class S:\n"
        "    splits = ('train',)\n"
        "    def rows(self, split): return [task.Row('a/0', 'x', 'y')]\n"
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


def test_pretokenized_texts_have_no_control_text(toy):
    texts = list(task.pretokenized_texts("toy_step_by_step", "test"))
    assert "predict: in0" in texts and "put" in texts and "why0" in texts and "g0" in texts
    assert not any("</s>" in t for t in texts)


# --- Binding ------------------------------------------------------------------------------------


def test_binding_prefers_arguments_then_environment(monkeypatch, sentencepiece_model):
    assert task.data_dir() is None and task.vocabulary().spec == "bytes"
    task.reset()
    monkeypatch.setenv("DISTILL_DATA_DIR", "/from/environment")
    monkeypatch.setenv("DISTILL_VOCABULARY", sentencepiece_model)
    assert task.data_dir() == "/from/environment"
    assert task.vocabulary().spec == sentencepiece_model
    task.reset()
    task.bind(data_dir="/given", vocabulary="bytes")
    assert task.data_dir() == "/given" and task.vocabulary().spec == "bytes"


def test_binding_again(sentencepiece_model):
    task.bind(data_dir="/a", vocabulary="bytes")
    task.bind(data_dir="/a/", vocabulary="bytes")
    task.bind()
    with pytest.raises(
        ValueError,
        match=r"data folder is already '/a' and cannot become '/b'.*"
        r"--gin\.DATA_DIR",
    ):
        task.bind(data_dir="/b")
    with pytest.raises(ValueError, match=r"vocabulary is already 'bytes'.*--gin\.VOCABULARY"):
        task.bind(vocabulary=sentencepiece_model)
    assert task.data_dir() == "/a" and task.vocabulary().spec == "bytes"


def test_registering_fixes_the_vocabulary_but_not_the_data_folder(data, sentencepiece_model):
    task.register("toy", source=layout())
    with pytest.raises(ValueError, match="already 'bytes'"):
        task.bind(vocabulary=sentencepiece_model)
    task.bind(data_dir=str(data))
    assert len(rows_of("toy_label", "test")) == TEST_ROWS


def test_a_failed_binding_binds_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        task.bind(data_dir="/a", vocabulary=str(tmp_path / "none.model"))
    assert task.data_dir() is None
    task.bind(data_dir="/b", vocabulary="bytes")


# --- Training a vocabulary ----------------------------------------------------------------------


def test_train_vocabulary_script(data, tmp_path):
    (tmp_path / "voc_tasks.py").write_text(
        "from distill import task\n"
        "task.register('toy', source=task.ReleasedLayout('toy', fields=('text', 'gold'),\n"
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
