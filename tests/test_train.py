"""Whole runs: resume, initial checkpoints, what a run writes, and the errors a user meets."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from distill import cache as cache_lib
from distill import (
    checkpoints,
    data,
    evaluate,
    objectives,
    optim,
    packing,
    results,
    scoring,
    students,
    t5,
    train,
)

MODEL = t5.T5Config(
    vocab_size=384, dtype="float32", emb_dim=32, num_heads=4, num_encoder_layers=2,
    num_decoder_layers=2, head_dim=8, mlp_dim=48, dropout_rate=0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Token caches, built once for all tests of this file."""
    return str(tmp_path_factory.mktemp("cache"))


def arithmetic(cache, name="arithmetic_step_by_step", **settings):
    settings = dict(pairs_per_step=8, num_train_examples=48) | settings
    return data.DataConfig(name, batch_size=None, cache_dir=cache, **settings)


def run(folder, cache, steps=6, objective=None, model=MODEL, data_config=None, **settings):
    settings = dict(eval_period=100, eval_steps=1, evaluator_num_examples=4, checkpoint_period=3,
                    stats_period=1) | settings  # fmt: skip
    return train.train(
        config=train.TrainConfig(str(folder), train_steps=steps, **settings),
        model=model,
        objective=objective or objectives.StepByStep(),
        optimizer=optim.Adafactor(),
        data=data_config or arithmetic(cache),
    )


def state_of(folder, step):
    """Every array of a checkpoint, by path."""
    path = pathlib.Path(folder) / f"checkpoint_{step}"
    manifest = json.loads((path / "manifest.json").read_text())
    target = {}
    for name, (shape, dtype) in manifest["leaves"].items():
        node = target
        *parents, last = name.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.ShapeDtypeStruct(tuple(shape), dtype)
    return {
        jax.tree_util.keystr(k): v
        for k, v in jax.tree_util.tree_leaves_with_path(checkpoints.restore(path, target)[0])
    }


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def metrics_of(folder, kind="train"):
    return [json.loads(x) for x in (folder / kind / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("whole")
    result = run(folder, cache)
    return folder, result


def test_a_run_leaves_what_it_promises(uninterrupted):
    folder, result = uninterrupted
    assert result.step == 6 and result.examples == 48
    assert {s.split for s in result.scores} == {"validation", "test"}
    assert [c.name for c in checkpoints.list_checkpoints(folder)] == [
        "checkpoint_3", "checkpoint_6",
    ]  # fmt: skip
    metadata = checkpoints.read_metadata(folder / "checkpoint_6")
    assert metadata["tokens"] == result.tokens and metadata["mixture"] == "arithmetic_step_by_step"
    assert "Total: " in (folder / "model-info.txt").read_text()
    assert list((folder / "train").glob("events.out.tfevents.*"))
    rows = [row for row in metrics_of(folder) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["cross_ent_loss/label"] < rows[0]["cross_ent_loss/label"]
    assert rows[-1]["cross_ent_loss/rationale"] < rows[0]["cross_ent_loss/rationale"]
    assert rows[1]["batch/examples"] == 8 and rows[0]["learning_rate"] == pytest.approx(1e-3)
    predictions = folder / "inference_eval" / "test" / "arithmetic_predict-000006.jsonl"
    assert len(predictions.read_text().splitlines()) == 4


def test_resuming_is_bitwise_equal_to_never_stopping(uninterrupted, tmp_path, cache):
    """Dropout, data order and optimizer all go on where they were."""
    run(tmp_path, cache, steps=3)
    result = run(tmp_path, cache, steps=6)
    assert result.examples == 48
    assert_same_state(state_of(tmp_path, 6), state_of(uninterrupted[0], 6))


CHILD = """
import sys
sys.path.insert(0, {tests!r})
import test_train
from distill import train
if {slow}:
    real = train.partitioning.shard_batch
    def slowly(*args):
        import time
        time.sleep(0.25)
        return real(*args)
    train.partitioning.shard_batch = slowly
test_train.run({folder!r}, {cache!r}, checkpoint_period=2)
"""


@pytest.mark.parametrize("signum,code", [(signal.SIGKILL, -9), (signal.SIGTERM, 75)])
def test_a_killed_run_goes_on_at_the_right_step(uninterrupted, tmp_path, cache, signum, code):
    tests = str(pathlib.Path(__file__).parent)
    script = CHILD.format(tests=tests, folder=str(tmp_path), cache=cache, slow=True)
    child = subprocess.Popen([sys.executable, "-c", script], env={**os.environ})
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint_2" / "manifest.json").exists():
        assert child.poll() is None and time.monotonic() < deadline, "the child did not get there"
        time.sleep(0.02)
    child.send_signal(signum)
    assert child.wait(60) == code
    saved = [int(c.name.split("_")[1]) for c in checkpoints.list_checkpoints(tmp_path)]
    assert saved and max(saved) < 6, "the run was over before it was killed"
    run(tmp_path, cache, checkpoint_period=2)
    went_on = [row["step"] for row in metrics_of(tmp_path) if "loss" in row]
    assert went_on[went_on.index(max(saved)) + 1 :][-1] == 6
    assert_same_state(state_of(tmp_path, 6), state_of(uninterrupted[0], 6))


def test_other_data_is_refused_by_name_and_can_be_allowed(tmp_path, cache):
    run(tmp_path, cache, steps=3)
    other = arithmetic(cache, seed=1)
    with pytest.raises(ValueError, match=r"seed: was 0, is 1[\s\S]*allow_changed_data"):
        run(tmp_path, cache, data_config=other)
    assert run(tmp_path, cache, data_config=other, allow_changed_data=True).step == 6


def test_a_finished_run_only_evaluates(uninterrupted, cache):
    folder, before = uninterrupted
    state = state_of(folder, 6)
    after = run(folder, cache)
    assert after.step == 6 and [s.values for s in after.scores] == [s.values for s in before.scores]
    assert_same_state(state_of(folder, 6), state)


def test_initial_checkpoint_continues_the_step_counter(uninterrupted, tmp_path, cache):
    start = str(uninterrupted[0])
    with pytest.raises(ValueError, match="TRAIN_STEPS_RELATIVE"):
        run(tmp_path / "a", cache, steps=6, initial_checkpoint_path=start)
    result = run(
        tmp_path / "b", cache, steps=None, train_steps_relative=2, initial_checkpoint_path=start
    )
    assert result.step == 8 and result.examples == 16
    with pytest.raises(ValueError, match="want"):
        bigger = dataclasses.replace(MODEL, mlp_dim=64)
        run(tmp_path / "c", cache, initial_checkpoint_path=start, model=bigger)


def test_evaluate_reads_what_train_wrote(uninterrupted, tmp_path, cache, capsys):
    folder, result = uninterrupted
    config = evaluate.EvaluateConfig(
        str(folder), cache_dir=cache, restore_mode="all", eval_output_dir=str(tmp_path),
        answering=scoring.Answering(num_examples=4),
    )  # fmt: skip
    rows = evaluate.evaluate(config)
    assert [name.split("/")[1] for name, _ in rows] == ["checkpoint_3", "checkpoint_6"]
    last = next(s for s in result.scores if s.split == "validation")
    assert rows[-1][1].values == last.values
    assert "checkpoint_6" in capsys.readouterr().out
    (file,) = tmp_path.glob("*/validation/arithmetic_predict-000006.jsonl")
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    (key,) = {line.pop("key") for line in kept}
    assert kept == last.predictions and key in results.Store(tmp_path).complete()
    written = (file.parent / "arithmetic_predict-metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in written] == [3, 6]
    # Training keeps its own evaluations in the same form.
    kept = results.Store(folder / "inference_eval").complete().values()
    assert {(lines[0]["split"], lines[0]["step"]) for lines in kept if lines[0]["step"]} == {
        ("validation", 6), ("test", 6),
    }  # fmt: skip


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,objective,message",
    [
        ("arithmetic_step_by_step", objectives.Standard(), "step_by_step.gin"),
        ("arithmetic_label", objectives.StepByStep(), "finetune.gin"),
        ("arithmetik_label", objectives.Standard(), "Did you mean 'arithmetic_label'"),
    ],
)
def test_mixture_and_objective_must_fit(tmp_path, cache, name, objective, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, cache, objective=objective, data_config=arithmetic(cache, name))


def test_a_vocabulary_larger_than_the_model_is_an_error(tmp_path, cache):
    small = dataclasses.replace(MODEL, vocab_size=128)
    with pytest.raises(ValueError, match="259 ids.*128.*T5Config.vocab_size=384"):
        run(tmp_path, cache, model=small)


def test_missing_data_names_the_folder_and_the_setting(tmp_path, cache):
    config = arithmetic(cache, "svamp_label", data_dir=str(tmp_path), num_train_examples=None)
    with pytest.raises(FileNotFoundError, match=r"svamp_train.json[\s\S]*DATA_DIR"):
        run(tmp_path / "m", cache, objective=objectives.Standard(), data_config=config)


def test_ten_bad_steps_in_a_row_stop_the_run(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(train, "MAX_SKIPPED", 3)
    model = dataclasses.replace(MODEL, dropout_rate=0.0)
    bad = optim.AdamW(learning_rate=1e38, schedule="constant", clip_norm=None)
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        train.train(
            config=train.TrainConfig(str(tmp_path), train_steps=9, eval_period=100, eval_steps=1,
                                     evaluator_num_examples=2, stats_period=1),
            model=model, objective=objectives.StepByStep(), optimizer=bad,
            data=arithmetic(cache),
        )  # fmt: skip


@pytest.mark.slow
def test_overfits_32_svamp_examples(shared, tmp_path):
    """A student that cannot learn 32 problems by heart has a bug, however good its tests look."""
    vocabulary = tmp_path / "spiece.model"
    root = pathlib.Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "scripts/train_vocabulary.py", "--mixture=svamp_step_by_step",
         f"--data_dir={shared / 'datasets'}", "--vocab_size=1000", f"--output={vocabulary}"],
        check=True, cwd=root,
    )  # fmt: skip
    config = data.DataConfig(
        "svamp_step_by_step", batch_size=None, pairs_per_step=32, num_train_examples=32,
        data_dir=str(shared / "datasets"), vocabulary=str(vocabulary),
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    sizes = dict(emb_dim=128, num_heads=4, num_encoder_layers=2, num_decoder_layers=2)
    model = t5.T5Config(1024, **sizes, head_dim=32, mlp_dim=256, dropout_rate=0.0)
    folder = tmp_path / "run"
    train.train(
        config=train.TrainConfig(str(folder), train_steps=300, eval_period=300,
                                 evaluator_num_examples=8, eval_steps=1, checkpoint_period=300),
        model=model, objective=objectives.StepByStep(z_loss=0.0), data=config,
        optimizer=optim.AdamW(learning_rate=2e-3, warmup_steps=30),
    )  # fmt: skip
    # Score the student on the very examples it was trained on.
    corpus = cache_lib.load(config, "train")
    batches = data.TrainBatches(corpus, config, packing.Flops.of(model))
    trained = set(batches.example_ids(batches.plan(0).sequences))
    label_task = next(t for t in corpus.tasks if t.metrics)
    records = [r for r in label_task.read(range(len(label_task))) if r.example_id in trained]
    assert len(records) == 32
    facts = {f: getattr(label_task, f) for f in ("name", "rate", "dataset", "answer_form")}
    rows = [
        dict(inputs=r.inputs, targets=r.targets, example_id=r.example_id, label=r.label,
             inputs_pretokenized=r.text, loss_group=0, choice=0, loss_weight=1000)
        for r in records
    ]  # fmt: skip
    kept = cache_lib.write_generation(
        tmp_path, "kept", "train", [(facts | {"metrics": list(label_task.metrics)}, None, rows)]
    )
    student = students.load(*students.find(str(folder / "checkpoint_300")), str(vocabulary))
    (score,) = scoring.score_tasks(student, cache_lib.open_generation(tmp_path / kept))
    assert score.n == 32 and score.values["accuracy"] == 1.0
