"""Evaluation in batch: which checkpoints, which tasks, nothing twice, and what is kept."""

import collections
import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from distill import (
    cache,
    checkpoints,
    convert,
    data,
    decode,
    evaluate,
    export,
    metrics,
    partitioning,
    results,
    scoring,
    students,
    t5,
)
from distill import vocabulary as vocabulary_lib

MODEL = t5.T5Config(
    vocab_size=384, dtype="float32", emb_dim=16, num_heads=2, num_encoder_layers=1,
    num_decoder_layers=1, head_dim=8, mlp_dim=32,
)  # fmt: skip
TASKS = "arithmetic_predict,arithmetic_noisy_predict,arithmetic_equation_predict"
STEPS = (10, 20, 30, 40, 50)
SCRIPT = pathlib.Path(__file__).resolve().parents[1] / "scripts" / "evaluate.py"


def save(folder, step, seed, accuracy=None, mixture="arithmetic_step_by_step", last_step=50):
    """Writes a checkpoint as training does, with parameters that no training made."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda x: np.asarray(0.3 * rng.standard_normal(x.shape), np.float32),
        t5.param_shapes(MODEL),
    )
    noted = {} if accuracy is None else {"t/validation": {"accuracy": accuracy}}
    facts = {
        "step": step, "last_step": last_step, "tokens": 1000 * step, "mixture": mixture,
        "module": "tasks", "vocabulary": "bytes", "data_dir": None, "parsing": None,
        "rationale_store": None, "allow_missing": [], "model": dataclasses.asdict(MODEL),
        "data": {
            "vocabulary": vocabulary_lib.load("bytes").fingerprint,
            "lengths": {"inputs": 64, "targets": 48},
        },
        "metrics": {"t/test": {"accuracy": 1 - (accuracy or 0)}} | noted,
    }  # fmt: skip
    with checkpoints.Checkpointer(folder, keep=None) as saver:
        saver.save(step, {"params": params}, facts)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The row caches of all tests of this file."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with five checkpoints, the third best on validation."""
    folder = tmp_path_factory.mktemp("run")
    for step, accuracy in zip(STEPS, (0.1, 0.2, 0.4, 0.3, 0.2), strict=True):
        save(folder, step, step, accuracy)
    return folder


def config(path, rows, output=None, number=8, answering=None, **settings):
    how = answering or scoring.Answering(num_examples=number)
    return evaluate.EvaluateConfig(
        str(path), cache_dir=rows, eval_output_dir=output and str(output), answering=how, **settings
    )


def computed(capsys) -> int:
    """How many results the last evaluation computed, as it says."""
    return int(re.findall(r"(\d+) computed", capsys.readouterr().out)[-1])


def predictions(folder, name):
    (file,) = pathlib.Path(folder).glob(f"**/{name}")
    return [json.loads(line) for line in file.read_text().splitlines()]


# --- Which checkpoints ----------------------------------------------------------------------------


def test_checkpoints_are_found_by_every_rule(run, tmp_path):
    def steps(which, path=run):
        return [c.step for c in students.find(str(path), which)]

    assert steps("all") == list(STEPS)
    assert steps("latest") == [50]
    assert steps("best") == [30]  # on validation; on test it would be the first
    assert steps("every-20") == [20, 40]
    assert steps("specific", run / "checkpoint_20") == [20]
    assert steps("latest", f"{run}/checkpoint_10,{run}/checkpoint_20") == [10, 20]
    for name in ("a1", "a2", "b1"):
        save(tmp_path / name, 7, 0)
    (tmp_path / "a3").mkdir()  # a folder that is no run
    found = students.find(str(tmp_path / "a*"))
    assert [c.run.name for c in found] == ["a1", "a2"] and found[0].form == "predict"


@pytest.mark.parametrize(
    "path, which, message",
    [
        ("", "newest", "RESTORE_MODE must be one of latest, all, best.*not 'newest'"),
        ("", "specific", "RESTORE_MODE=specific needs one checkpoint folder.*has 5"),
        ("x", "all", "no such folder"),
        ("x*", "all", r"No folder that matches .*x\* holds a checkpoint"),
        ("..", "all", r"No checkpoint in .*give a run's MODEL_DIR"),
    ],
)
def test_what_is_no_checkpoint_is_said(run, path, which, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        students.find(str(run / path) if path else str(run), which)


def test_best_needs_a_validation_result(tmp_path):
    save(tmp_path, 1, 0)  # has one on test only
    with pytest.raises(ValueError, match="RESTORE_MODE=best: no checkpoint of .*EVAL_PERIOD"):
        students.find(str(tmp_path), "best")


# --- Which tasks ----------------------------------------------------------------------------------


def test_a_dataset_stands_for_its_task_in_the_students_form(run, rows, tmp_path):
    found = evaluate.evaluate(
        config(run, rows, tmp_path, mixture_or_task_name="arithmetic,arithmetic_noisy")
    )
    assert [s.task for _, s in found] == ["arithmetic_predict", "arithmetic_noisy_predict"]
    assert {s.split for _, s in found} == {"validation"}  # test has to be asked for


def test_another_form_is_refused_unless_forced(run, rows, tmp_path):
    label = dict(mixture_or_task_name="arithmetic_label")
    with pytest.raises(ValueError, match="form 'predict'.*arithmetic_predict, or set --gin.FORCE"):
        evaluate.evaluate(config(run, rows, tmp_path, **label))
    ((_, score),) = evaluate.evaluate(config(run, rows, tmp_path, force=True, **label))
    assert score.task == "arithmetic_label"


def test_the_tasks_of_a_mixture_of_ones_own_tell_the_form(tmp_path):
    save(tmp_path, 1, 0, mixture="my_mixture")
    (checkpoint,) = students.find(str(tmp_path))
    assert checkpoint.form is None
    for tasks, form, explains in (
        (["a_explain", "a_predict", "b_predict_llm"], "predict", True),
        (["a_predict"], "predict", False),
        (["a_label", "a_predict"], None, False),
        (["mine"], None, None),
    ):
        told = dataclasses.replace(checkpoint, metadata={**checkpoint.metadata, "tasks": tasks})
        assert (told.form, told.explains) == (form, explains)
    for mixture, explains in (("all_step_by_step_llm", True), ("a_label", False), ("mine", None)):
        told = dataclasses.replace(checkpoint, metadata={"mixture": mixture})
        assert told.explains == explains


def test_who_cannot_explain_is_not_asked_to_and_it_is_said_once(tmp_path, rows, caplog, capsys):
    save(tmp_path / "run", 1, 0, mixture="arithmetic_label")
    save(tmp_path / "run", 2, 0, mixture="arithmetic_label")
    path = tmp_path / "run"
    evaluate.evaluate(config(path, rows, restore_mode="all"))
    asked = scoring.Answering(explain=True, num_examples=8)
    evaluate.evaluate(config(path, rows, restore_mode="all", answering=asked))
    assert computed(capsys) == 0  # it changes nothing
    (said,) = [message for message in caplog.messages if "EXPLAIN" in message]
    assert f"no effect on {path}, arithmetic_label" in said
    assert "trained on 'arithmetic_label'" in said
    # A target that holds both is explained in any case.
    (single,) = toy(tmp_path, "rationale_label", {}).tasks
    evaluate._answering(config(path, rows, answering=asked), students.find(str(path))[0], single)
    assert [message for message in caplog.messages if "EXPLAIN" in message] == [said]


def test_the_table_alone_is_on_standard_output(run, rows, tmp_path, capsys):
    found = evaluate.evaluate(config(run, rows, tmp_path, mixture_or_task_name="arithmetic"))
    said = capsys.readouterr()
    table, last = said.out[:-1].rsplit("\n", 1)
    assert table == scoring.table(found) and last.startswith(
        "1 results of 1 checkpoint: 1 computed"
    )
    assert "checkpoint_50, arithmetic_predict, validation: accuracy" in said.err


def test_the_train_split_is_evaluated_where_it_is_asked_for(run, rows, tmp_path):
    settings = dict(mixture_or_task_name="arithmetic", split="train")
    ((_, score),) = evaluate.evaluate(config(run, rows, tmp_path, **settings))
    assert (score.split, score.n) == ("train", 8)
    (row, *_) = predictions(tmp_path, "arithmetic_predict-000050.jsonl")
    assert row["example_id"].startswith("arithmetic/train/") and row["label"]


def test_unknown_tasks_are_named(run, rows):
    with pytest.raises(ValueError, match="no task or mixture named 'arithmetik'.*Did you mean"):
        evaluate.evaluate(config(run, rows, mixture_or_task_name="arithmetik"))


def test_settings_are_checked():
    for settings, message in (
        (dict(split="dev"), "SPLIT must be 'validation', 'test' or 'train', not 'dev'"),
        (dict(wait_minutes=0), "WAIT_MINUTES must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.EvaluateConfig("x", **settings)
    for settings, message in (
        (dict(by="vote"), "ANSWER_BY must be"),
        (dict(num_examples=0), "EVALUATOR_NUM_EXAMPLES must be"),
        (dict(batch_size=1.5), "BATCH_SIZE must be"),
        (dict(by="likelihood", decoding=decode.Decoding("beam")), "DECODER has no effect"),
    ):
        with pytest.raises(ValueError, match=message):
            scoring.Answering(**settings)


# --- Nothing twice --------------------------------------------------------------------------------


def test_a_killed_evaluation_goes_on_where_it_was(run, rows, tmp_path, capsys):
    """5 checkpoints x 3 tasks; the killed one computes the rest, and gives the same table."""
    everything = dict(restore_mode="all", mixture_or_task_name=TASKS)
    whole = evaluate.evaluate(config(run, rows, tmp_path / "whole", **everything))
    assert computed(capsys) == 15 == len(whole)

    output = tmp_path / "killed"
    macros = {
        "CHECKPOINT_PATH": run, "RESTORE_MODE": "all", "MIXTURE_OR_TASK_NAME": TASKS,
        "CACHE_DIR": rows, "EVAL_OUTPUT_DIR": output, "EVALUATOR_NUM_EXAMPLES": 8,
    }  # fmt: skip
    command = [sys.executable, str(SCRIPT), "--gin_file=eval.gin"]
    command += [f"--gin.{name}={value}" for name, value in macros.items()]
    store = results.Store(output)

    def students_keys():
        return [k for k, lines in store.complete().items() if lines[0]["run"] != "teacher"]

    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as child:
        while len(students_keys()) < 7 and child.poll() is None:
            time.sleep(0.01)
        os.kill(child.pid, signal.SIGKILL)
    there = len(students_keys())
    assert 7 <= there < 15
    with open(output / "results.jsonl", "a") as f:
        f.write('{"key": "torn, "met')

    again = evaluate.evaluate(config(run, rows, output, **everything))
    assert computed(capsys) == 15 - there
    assert scoring.table(again) == scoring.table(whole)
    assert again == whole
    evaluate.evaluate(config(run, rows, output, **everything))
    assert computed(capsys) == 0


def test_what_changed_is_computed_anew(run, rows, tmp_path, capsys):
    folder = tmp_path / "run"
    save(folder, 1, 0)
    evaluate.evaluate(config(folder, rows))
    assert computed(capsys) == 1
    for change in (
        dict(number=9),
        dict(split="test"),
        dict(answering=scoring.Answering(decode.Decoding("beam", beam_size=2), num_examples=8)),
        dict(answering=scoring.Answering(explain=True, num_examples=8)),
    ):
        evaluate.evaluate(config(folder, rows, **change))
        assert computed(capsys) == 1, change
    evaluate.evaluate(config(folder, rows, answering=scoring.Answering(
        explain=True, num_examples=8, batch_size=3)))  # fmt: skip
    assert computed(capsys) == 0  # the batch size changes no result
    save(other := tmp_path / "other", 1, 1)
    (folder / "checkpoint_1").rename(tmp_path / "old")
    (other / "checkpoint_1").rename(folder / "checkpoint_1")
    evaluate.evaluate(config(folder, rows, answering=scoring.Answering(
        explain=True, num_examples=8)))  # fmt: skip
    assert computed(capsys) == 1
    (file,) = folder.glob("inference_eval/validation/arithmetic_predict-000001.jsonl")
    file.unlink()
    evaluate.evaluate(config(folder, rows, answering=scoring.Answering(
        explain=True, num_examples=8)))  # fmt: skip
    assert computed(capsys) == 1 and file.exists()


def test_predictions_of_another_evaluation_are_not_taken_for_a_results_own(
    run, rows, tmp_path, monkeypatch, capsys
):
    """One that dies between its predictions and its result leaves another's result without."""
    evaluate.evaluate(config(run, rows, tmp_path, number=8))

    def killed(store, lines):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(results.Store, "add", killed)
        evaluate.evaluate(config(run, rows, tmp_path, number=4))
    assert len(predictions(tmp_path, "arithmetic_predict-000050.jsonl")) == 4
    capsys.readouterr()
    evaluate.evaluate(config(run, rows, tmp_path, number=8))
    assert computed(capsys) == 1
    assert len(predictions(tmp_path, "arithmetic_predict-000050.jsonl")) == 8


KEEP = """
import sys
from etils import epath
from distill import metrics, scoring, students
folder = epath.Path(sys.argv[1])
found = scoring.Score("t", "d", "test", "greedy", 1, {
    f"metric_{i}": metrics.Estimate(0.5, 1, 0.1, 0.4, 0.6) for i in range(100)
})
for step in range(int(sys.argv[2]), 100, 2):
    checkpoint = students.Checkpoint(folder / f"checkpoint_{step}", folder, step, "")
    scoring.keep(folder, f"test/t-{step:06}.jsonl", f"key {step}", found, checkpoint, None)
"""


def test_two_evaluations_beside_each_other_lose_no_line(tmp_path):
    started = [
        subprocess.Popen([sys.executable, "-c", KEEP, str(tmp_path), first]) for first in "01"
    ]
    assert [process.wait() for process in started] == [0, 0]
    metrics_of = (tmp_path / "test/t-metrics.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["step"] for line in metrics_of) == list(range(100))
    complete = results.Store(tmp_path).complete()
    assert {lines[0]["step"] for lines in complete.values()} == set(range(100))


def test_the_model_compiles_once_for_all_checkpoints(run, rows, tmp_path):
    settings = dict(mixture_or_task_name="arithmetic", number=8)
    programs = []
    for number, which in enumerate(("latest", "all")):
        jax.clear_caches()
        with jax.log_compiles(), counted() as names:
            evaluate.evaluate(
                config(run, rows, tmp_path / str(number), restore_mode=which, **settings)
            )
        programs.append(sum("_search" in name for name in names))
    assert programs[0] == programs[1] > 0


class counted:
    """Collects what jax says it compiles."""

    def __enter__(self):
        import logging

        self.names: list[str] = []
        self.handler = logging.Handler()
        self.handler.emit = lambda record: self.names.append(record.getMessage())
        self.logger = logging.getLogger("jax._src.interpreters.pxla")
        self.logger.addHandler(self.handler)
        return self.names

    def __exit__(self, *_):
        self.logger.removeHandler(self.handler)


# --- A run that goes on ---------------------------------------------------------------------------


def test_evaluation_follows_a_run_until_it_ends(tmp_path, rows, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "POLL_SECONDS", 0.05)
    folder = tmp_path / "run"
    evaluate.cache.prepare(  # tokenised before, so that the thread below is not waited for
        data.DataConfig("arithmetic_step_by_step", cache_dir=rows), ("validation",)
    )

    def later():
        for step in (10, 20):
            time.sleep(1)
            save(folder, step, step, last_step=20)

    writer = threading.Thread(target=later)
    writer.start()
    found = evaluate.evaluate(config(folder, rows, restore_mode="all", wait_minutes=2))
    writer.join()
    assert [name.split("/")[-1] for name, _ in found] == ["checkpoint_10", "checkpoint_20"]
    assert computed(capsys) == 2


@pytest.mark.parametrize("path", ["{0}/a,{0}/b", "{0}/*"])
def test_what_is_there_is_evaluated_while_another_run_is_waited_for(
    tmp_path, rows, capsys, monkeypatch, path
):
    monkeypatch.setattr(evaluate, "POLL_SECONDS", 0.05)
    save(tmp_path / "runs" / "a", 50, 0)  # has ended
    (tmp_path / "runs" / "b").mkdir()
    (tmp_path / "runs" / "b" / "config.gin").touch()  # has begun
    store, when = results.Store(tmp_path / "out"), []

    def later():
        while not store.complete():
            time.sleep(0.1)
        when.append(len(store.complete()))
        save(tmp_path / "runs" / "b", 50, 1)

    writer = threading.Thread(target=later, daemon=True)
    writer.start()
    settings = dict(mixture_or_task_name="arithmetic", wait_minutes=2)
    path = path.format(tmp_path / "runs")
    found = evaluate.evaluate(config(path, rows, tmp_path / "out", **settings))
    assert [name for name, _ in found] == ["a/checkpoint_50", "b/checkpoint_50"]
    assert computed(capsys) == 2 and when


def test_a_path_that_was_waited_for_in_vain_is_named(tmp_path, rows, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "POLL_SECONDS", 0.05)
    save(tmp_path / "a", 50, 0)
    settings = config(f"{tmp_path}/a,{tmp_path}/typo", rows, wait_minutes=0.01)
    with pytest.raises(
        ValueError, match=r"could not be evaluated:\n.*/typo: no checkpoint in 0.01"
    ):
        evaluate.evaluate(settings)
    assert "a/checkpoint_50" in capsys.readouterr().out


def test_waiting_ends_when_nothing_comes(tmp_path, rows, monkeypatch):
    monkeypatch.setattr(evaluate, "POLL_SECONDS", 0.05)
    save(tmp_path / "run", 10, 10)  # of 50
    found = evaluate.evaluate(config(tmp_path / "run", rows, wait_minutes=0.01))
    assert len(found) == 1
    with pytest.raises(FileNotFoundError, match="after 0.01 minutes"):
        evaluate.evaluate(config(tmp_path / "nothing", rows, wait_minutes=0.01))


def test_one_damaged_checkpoint_does_not_hide_the_others(tmp_path, rows, capsys):
    for step in (1, 2):
        save(tmp_path, step, step)
    largest = max((tmp_path / "checkpoint_1").glob("**/*"), key=lambda f: f.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(ValueError, match="1 checkpoints could not be evaluated:\n.*checkpoint_1: "):
        evaluate.evaluate(config(tmp_path, rows, restore_mode="all"))
    assert "checkpoint_2" in capsys.readouterr().out


# --- What is kept ---------------------------------------------------------------------------------


def test_results_tell_all_about_an_evaluation(run, rows, tmp_path):
    how = scoring.Answering(num_examples=12, explain=True)
    ((name, score),) = evaluate.evaluate(
        config(run, rows, tmp_path, mixture_or_task_name="arithmetic_noisy", answering=how)
    )
    assert name == f"{run.name}/checkpoint_50" and score.n == 12
    kept = results.Store(tmp_path).lines()
    mine = {line["metric"]: line for line in kept if line["run"] == str(run)}
    assert set(mine) == {
        "accuracy", "parse_failure", "teacher_agreement", "rouge_l", "chrf",
        "rationale_consistency", "no_conclusion",
    } & set(mine) and {"accuracy", "rouge_l", "teacher_agreement"} <= set(mine)  # fmt: skip
    line = mine["accuracy"]
    assert (line["step"], line["tokens"], line["parameters"], line["mixture"]) == (
        50, 50_000, t5.param_count(MODEL), "arithmetic_step_by_step",
    )  # fmt: skip
    rows_of = predictions(tmp_path, "arithmetic_noisy_predict-000050.jsonl")
    right = [p["label"].strip() == p["prediction"].strip() for p in rows_of]
    assert [p["correct"] for p in rows_of] == right and line["value"] == np.mean(right)
    assert all(p["rationale"] is not None and 0 <= p["probability"] <= 1 for p in rows_of)
    # The teacher errs in a quarter of these rows, and has its own line.
    (teacher,) = [line for line in kept if line["run"] == "teacher"]
    assert teacher["value"] == np.mean([p["teacher"] == p["label"] for p in rows_of])
    assert teacher["step"] is None and teacher["dataset"] == "arithmetic_noisy"
    (board,) = tmp_path.glob("*/arithmetic_noisy_predict/validation/events.out.tfevents.*")
    assert board.stat().st_size


def test_choosing_by_likelihood(run, rows, tmp_path):
    how = scoring.Answering(by="likelihood", num_examples=6)
    evaluate.evaluate(config(run, rows, tmp_path, mixture_or_task_name="arithmetic", answering=how))
    found = predictions(tmp_path, "arithmetic_predict-likelihood-000050.jsonl")
    student = students.load(*students.find(str(run)))
    apply = jax.jit(lambda batch: student.net.apply({"params": student.params}, batch))
    for p in found:
        inputs = np.array([student.vocabulary.encode_input(p["input"])], np.int32)
        scores = []
        for digit in "0123456789":
            targets = np.array([[*student.vocabulary.encode(digit), 1]], np.int32)
            log_p = jax.nn.log_softmax(apply({
                "encoder_input_tokens": inputs, "decoder_target_tokens": targets,
                "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
            }))  # fmt: skip
            scores.append(float(sum(log_p[0, i, t] for i, t in enumerate(targets[0]))))
        shares = np.exp(scores - np.max(scores))
        assert p["prediction"] == str(int(np.argmax(scores)))
        assert p["probability"] == pytest.approx(np.max(shares) / shares.sum(), rel=1e-4)
    with pytest.raises(ValueError, match="does not say which labels it allows"):
        evaluate.evaluate(
            config(run, rows, mixture_or_task_name="arithmetic_equation", answering=how)
        )


@pytest.mark.parametrize(
    "answers, expected",
    [
        (["4", "5", "5"], (1, 2 / 3)),
        (["( 2 + 3 )", "6", "5", "(10 / 2)"], (0, 3 / 4)),  # equations agree by value
        (["a", "b"], (0, 1 / 2)),  # the first of two with as many votes
        (["", " ", "b", ""], (2, 1 / 4)),  # no answer, no vote
        (["", ""], (0, 0.0)),
    ],
)
def test_votes(answers, expected):
    assert scoring.vote(answers) == expected


def test_samples_vote(run, rows, tmp_path):
    decoding = decode.Decoding("sample", num_samples=5, temperature=0.5, seed=3)
    how = scoring.Answering(decoding, num_examples=4)
    settings = dict(mixture_or_task_name="arithmetic", answering=how)
    evaluate.evaluate(config(run, rows, tmp_path, **settings))
    found = predictions(tmp_path, f"arithmetic_predict-{decoding.name}-000050.jsonl")
    student = students.load(*students.find(str(run)))
    inputs = [student.vocabulary.encode_input(p["input"]) for p in found]
    texts = student.texts(student.answer(inputs, decoding, max_length=64))
    for p, answers in zip(found, texts, strict=True):
        votes = collections.Counter(a.strip() for a in answers if a.strip())
        assert p["probability"] == max(votes.values(), default=0) / 5
        assert votes[p["prediction"].strip()] == max(votes.values(), default=0)


# --- Other formats --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hugging_face", "t5x"])
def test_other_formats_give_the_same_answers(run, rows, tmp_path, kind):
    weights = convert.open_weights(str(run))
    if kind == "t5x":
        export.save_t5x(tmp_path / "theirs", weights, weights.model, weights.step)
    else:
        export.save_hugging_face(tmp_path / "theirs", weights, weights.model)
    ours = evaluate.evaluate(config(run, rows, tmp_path / "a", mixture_or_task_name="arithmetic"))
    settings = dict(mixture_or_task_name="arithmetic_predict", vocabulary="bytes")
    theirs = evaluate.evaluate(config(tmp_path / "theirs", rows, tmp_path / "b", **settings))
    assert theirs[0][1] == ours[0][1]
    with pytest.raises(ValueError, match="MIXTURE_OR_TASK_NAME|VOCABULARY"):
        evaluate.evaluate(config(tmp_path / "theirs", rows, tmp_path / "b"))


# --- One task -------------------------------------------------------------------------------------


def toy(folder, form, row, made=None, split="test"):
    facts = {
        "name": "toy", "rate": 1.0, "metrics": ["distill.metrics.label_accuracy"],
        "dataset": "toy", "answer_form": form,
    }  # fmt: skip
    rows = [
        {
            "inputs": np.array([5, 1]), "targets": np.array([6, 1]), "inputs_pretokenized": "x",
            "loss_group": 0, "choice": 0, "loss_weight": 1000, **own, **row,
        }
        for own in made or [
            {"example_id": f"toy/{i}", "label": label} for i, label in enumerate(["yes", "no"])
        ]
    ]  # fmt: skip
    generation = cache.write_generation(folder, "toy", split, [(facts, None, rows)])
    return cache.open_generation(folder / generation)


def fixed_student(monkeypatch, texts, lengths=None):
    """A student that says what it is told to, and notes what it was asked."""
    vocabulary, asked = vocabulary_lib.load("bytes"), []

    def generate(params, net, inputs, mesh, decoding, *, max_length, **_):
        asked.append((inputs, max_length))
        tokens = [[np.array(vocabulary.encode(text), np.int32)] for text in texts]
        return decode.Generated(tokens, [[-1.0] for _ in texts])

    monkeypatch.setattr(decode, "generate", generate)
    lengths = {"inputs": 64, "targets": 48} if lengths is None else lengths
    return students.Student(None, None, None, vocabulary, lengths), asked


@pytest.mark.parametrize(
    "form, accuracy, length, rationales",
    [("label", 0.0, 64, [None, None]),
     ("rationale_label", 0.5, 256, ["It rains.", "It rains and so on and no"])],
)  # fmt: skip
def test_the_answer_in_the_text_is_scored(
    monkeypatch, tmp_path, form, accuracy, length, rationales
):
    generated = ["It rains. So the answer is yes", "It rains and so on and no"]
    student, asked = fixed_student(monkeypatch, generated)
    (score,) = scoring.score_tasks(student, toy(tmp_path, form, {}))
    assert (score.values["accuracy"], asked[0][1]) == (accuracy, length)
    assert [p["generated"] for p in score.predictions] == generated
    assert [p["rationale"] for p in score.predictions] == rationales
    assert [p["prediction"] for p in score.predictions] == (
        generated if form == "label" else ["yes", ""]
    )


def test_an_example_of_the_train_split_is_asked_once_and_needs_a_gold_label(monkeypatch, tmp_path):
    """There it has a row for each rationale, and inputs of a pool have no label."""
    student, asked = fixed_student(monkeypatch, ["yes", "no"])
    labels = {"a": "yes", "b": "", "c": "yes"}
    made = [
        {"example_id": name, "label": labels[name], "choice": choice}
        for name, choice in (("a", 0), ("a", 1), ("b", 0), ("c", 0), ("c", 1))
    ]
    (score,) = scoring.score_tasks(student, toy(tmp_path, "label", {}, made, "train"))
    assert len(asked[0][0]) == 2 and (score.n, score.values["accuracy"]) == (2, 0.5)
    assert [p["example_id"] for p in score.predictions] == ["a", "c"]
    with pytest.raises(ValueError, match="No example of toy, train, has a gold label"):
        scoring.score_tasks(student, toy(tmp_path, "label", {}, [made[2]], "train"))


def test_a_rationale_of_people_is_a_reference_and_no_teachers(monkeypatch, tmp_path):
    student, _ = fixed_student(monkeypatch, ["It rains. So the answer is yes", "no"])
    row = {"human_rationale": "It rains."}
    (score,) = scoring.score_tasks(student, toy(tmp_path, "rationale_label", row))
    for prediction in score.predictions:
        assert prediction["human_rationale"] == "It rains."
        assert prediction["teacher"] is prediction["teacher_rationale"] is None
    assert score.values["rouge_l"] == 0.5 and "teacher_agreement" not in score.values


@pytest.mark.parametrize("trained, kept", [(64, 1024), (1500, 1500)])
def test_inputs_are_cut_where_the_student_was_trained(monkeypatch, tmp_path, trained, kept):
    student, asked = fixed_student(monkeypatch, ["yes", "no"], {"inputs": trained, "targets": 32})
    corpus = toy(tmp_path, "label", {"inputs": np.append(np.full(1999, 5), 1)})
    assert scoring.score_tasks(student, corpus)[0].values["accuracy"] == 1
    assert [len(x) for x in asked[0][0]] == [kept] * 2 and asked[0][0][0][-1] == 1


def test_a_host_encodes_inputs_as_the_tasks_do(run, rows):
    student = students.load(*students.find(str(run)))
    corpus = cache.load(data.DataConfig("arithmetic_predict", cache_dir=rows), "validation")
    for record in corpus.tasks[0].read(range(20)):
        assert student.vocabulary.encode_input(record.text) == record.inputs.tolist()
    with_eos = student.vocabulary.encode_input("a</s>b")
    assert with_eos == [*student.vocabulary.encode("a"), 1, *student.vocabulary.encode("b"), 1]


def test_the_table_has_a_column_a_dataset():
    def score(dataset, value):
        estimate = metrics.Estimate(value, 10, 0.1, value - 0.1, value + 0.1)
        return scoring.Score("t", dataset, "test", "greedy", 10, {"accuracy": estimate})

    text = scoring.table([("a", score("x", 0.5)), ("a", score("y", 0.25)), ("b", score("x", 0.75))])
    header, first, second = text.splitlines()
    assert header.split("  ")[0] == "checkpoint" and "x test, accuracy (n = 10)" in header
    assert "0.5000 [0.4000, 0.6000]" in first and "0.2500 [0.1500, 0.3500]" in first
    assert second.startswith("b ") and "0.2500" not in second


def test_students_are_sharded_over_all_devices(run):
    """A student's answers do not depend on the devices."""
    student = students.load(*students.find(str(run)))
    inputs = [student.vocabulary.encode_input(f"predict: Ann has {n} nuts.") for n in range(5)]
    here = student.answer(inputs, max_length=8)
    one = partitioning.make_mesh(partitioning.MeshConfig(data=1), jax.devices()[:1])
    alone = dataclasses.replace(
        student, mesh=one, net=t5.T5(MODEL, partitioning.activation_constraint(one)),
        params=jax.device_put(jax.device_get(student.params), partitioning.replicated(one)),
    )  # fmt: skip
    assert student.mesh.size == 8
    for a, b in zip(here.tokens, alone.answer(inputs, max_length=8).tokens, strict=True):
        np.testing.assert_array_equal(a[0], b[0])


def test_two_tasks_of_a_dataset_have_two_columns():
    def score(task, value):
        estimate = metrics.Estimate(value, 10, 0.1, value, value)
        return scoring.Score(task, "x", "test", "greedy", 10, {"accuracy": estimate})

    text = scoring.table([("a", score("x_predict", 0.5)), ("a", score("x_label", 0.25))])
    assert "x_predict test" in text and "x_label test" in text
    assert "0.5000" in text and "0.2500" in text


def test_a_result_computed_anew_replaces_all_of_the_earlier_one(tmp_path):
    store, about = results.Store(tmp_path), {"key": "k", "run": "r", "value": float("nan")}
    store.add([about | {"metric": m, "of": 3} for m in ("accuracy", "chrf", "rouge_l")])
    store.add([about | {"metric": m, "of": 2} for m in ("accuracy", "chrf")])
    assert [line["metric"] for line in store.complete()["k"]] == ["accuracy", "chrf"]


def test_predictions_are_json_whatever_they_hold(tmp_path):
    results.write_lines(tmp_path / "x", [{"probability": float("nan"), "said": "é \ud83d"}])
    (line,) = (tmp_path / "x").read_bytes().decode().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["probability"] is None


def test_steps_that_are_not_there_are_said(run):
    with pytest.raises(FileNotFoundError, match="RESTORE_MODE=every-7: no checkpoint of"):
        students.find(str(run), "every-7")


def test_a_run_goes_on_until_its_newest_checkpoint_is_the_last(tmp_path, rows, capsys):
    save(tmp_path, 10, 0, last_step=10)  # ended, and was then made longer
    save(tmp_path, 15, 1, last_step=20)
    assert students.unfinished(str(tmp_path)) == {str(tmp_path): "at step 15 of 20"}
    save(tmp_path, 20, 2, last_step=20)
    started = time.monotonic()  # the last one is none of those that are evaluated
    settings = config(tmp_path, rows, restore_mode="every-15", wait_minutes=1)
    evaluate.evaluate(settings)
    assert computed(capsys) == 1 and time.monotonic() - started < 50


def test_what_is_still_to_come(tmp_path):
    save(tmp_path / "a", 50, 0)
    save(tmp_path / "b", 40, 0)
    for name in ("c", "d"):
        (tmp_path / name).mkdir()
    (tmp_path / "c" / "config.gin").touch()  # a run that has begun; d is something else

    def left(*names):
        found = students.unfinished(",".join(str(tmp_path / name) for name in names))
        return {pathlib.Path(run).name: why for run, why in found.items()}

    assert left("a") == {} == left("a", "b/checkpoint_40")
    expected = {"b": "at step 40 of 50", "c": "without a checkpoint"}
    assert left("*") == left("a", "b", "c") == expected
    assert left("b/checkpoint_*") == {"b": "at step 40 of 50"}
    assert left("a", "d", "e*") == dict.fromkeys(("d", "e*"), "without a checkpoint")


def test_a_checkpoint_that_is_being_deleted_is_passed_over(tmp_path, rows, monkeypatch, capsys):
    for step in (1, 2):
        save(tmp_path, step, step)
    load = students.load

    def slow(checkpoint, vocabulary=None):
        if checkpoint.step == 1:  # the manifest goes first
            (manifest,) = (f for f in checkpoint.path.iterdir() if "manifest" in f.name.lower())
            manifest.unlink()
        return load(checkpoint, vocabulary)

    monkeypatch.setattr(students, "load", slow)
    evaluate.evaluate(config(tmp_path, rows, restore_mode="all"))
    assert computed(capsys) == 1
