"""T5X itself, with our loss: equal losses step by step, exact accumulation, loss groups, gin files.

T5X is on no package index; docs/t5x.md says how to install it.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import warnings

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from distill import objectives, optim, t5, train

ROOT = pathlib.Path(__file__).resolve().parents[1]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # T5X and what it imports are from 2020 to 2024
    pytest.importorskip("t5x", reason="T5X is not installed (docs/t5x.md)")
    import seqio
    import tensorflow as tf
    from t5x import adafactor, optimizers, partitioning, trainer, utils
    from t5x.examples.t5 import network

    from distill import t5x_adapter, task

# T5X's network promotes ranks, and an absent loss group is 0 / 0 in CLU.
pytestmark = pytest.mark.filterwarnings("ignore")

LENGTHS = {"inputs": 128, "targets": 64}
ROWS, STEPS, RATE = 8, 10, 1e-2
SIZE = {
    "vocab_size": 384, "emb_dim": 32, "num_heads": 4, "num_encoder_layers": 2,
    "num_decoder_layers": 1, "head_dim": 8, "mlp_dim": 64, "mlp_activations": ("gelu", "linear"),
    "dropout_rate": 0.0, "logits_via_embedding": False, "dtype": "float32",
}  # fmt: skip


@pytest.fixture(autouse=True)
def allow_rank_promotion():
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(autouse=True, scope="module")
def bound():
    task.reset()
    task.bind(vocabulary="bytes")
    yield
    task.reset()


def batches_of(name: str, pack: bool, count: int = 1, rows: int = ROWS, lengths=LENGTHS):
    """`count` batches of a registered mixture, through the adapter's feature converter."""
    data = seqio.get_dataset(
        mixture_or_task_name=t5x_adapter.mixture(name, vocabulary="bytes"),
        task_feature_lengths=lengths,
        feature_converter=t5x_adapter.DistillFeatureConverter(pack=pack),
        dataset_split="train",
        shuffle=True,
        seed=0,
        batch_size=rows,
    )
    return list(data.take(count).as_numpy_iterator())


def unstacked(params):
    """Our tree -> T5X's: the layers on axis 0 become `layers_<i>`."""
    flat = {}
    for name, array in traverse_util.flatten_dict(params, sep="/").items():
        if "/layers/" not in name:
            flat[name] = array
            continue
        for i, layer in enumerate(array):
            flat[name.replace("/layers/", f"/layers_{i}/")] = layer
    return traverse_util.unflatten_dict(flat, sep="/")


@functools.cache
def initial_params():
    """Ours, as numpy arrays, since T5X's trainer donates its own."""
    init = jax.jit(lambda: t5.init_params(t5.T5Config(**SIZE), jax.random.key(1)))
    return jax.device_get(init())


def make_model(objective, optimizer, **settings):
    vocabulary = t5x_adapter.vocabulary("bytes")
    net = network.Transformer(network.T5Config(**SIZE))
    return t5x_adapter.DistillModel(
        net, vocabulary, vocabulary, optimizer, objective=objective, **settings
    )


class TwoDevices(partitioning.PjitPartitioner):
    """Shares the rows of a batch; T5X's own mesh for CPUs is model-parallel over all devices."""

    @functools.cached_property
    def mesh(self):
        return jax.sharding.Mesh(np.array(jax.devices()[:2]).reshape(2, 1), ("data", "model"))


def make_trainer(
    model, params, batch, folder=None, num_microbatches=None, cls=t5x_adapter.DistillTrainer
):
    """T5X's trainer with our parameters."""
    partitioner = TwoDevices(num_partitions=1)
    initializer = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={k: v.shape for k, v in batch.items()},
        partitioner=partitioner,
    )
    state = initializer.from_scratch(jax.random.PRNGKey(0))
    ours = flax.core.freeze(unstacked(params))
    state = state.replace_params(
        jax.tree.map(lambda like, x: jax.device_put(x, like.sharding), state.params, ours)
    )
    return cls(
        model=model,
        train_state=state,
        partitioner=partitioner,
        eval_names=[],
        summary_dir=folder,
        train_state_axes=initializer.train_state_axes,
        rng=jax.random.PRNGKey(0),
        learning_rate_fn=lambda step: RATE,
        num_microbatches=num_microbatches,
    )


def run_t5x(trainer_, batches):
    """One step a batch; returns the metrics of each step and the final parameters."""
    reports = []
    with trainer_:
        for batch in batches:
            report = trainer_.train(iter([batch]), num_steps=1).result()
            reports.append({k: float(v.value) for k, v in report.items() if hasattr(v, "value")})
        params = flax.core.unfreeze(jax.device_get(trainer_.train_state.params))
    return reports, params


def run_ours(objective, optimizer, params, batches):
    net, tx = t5.T5(t5.T5Config(**SIZE)), optimizer.build(len(batches))
    state = train.TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    reports = []
    step = jax.jit(lambda s, b, r: train.train_step(s, b, r, net=net, objective=objective, tx=tx))
    for batch in batches:
        state, scalars = step(state, batch, jax.random.key(0))
        reports.append({k: float(v) for k, v in scalars.items()})
    return reports, state.params


OPTIMIZERS = {
    "adafactor": (
        lambda: adafactor.Adafactor(
            decay_rate=0.8, step_offset=0,
            logical_factor_rules=adafactor.standard_logical_factor_rules(),
        ),
        lambda: optim.Adafactor(learning_rate=RATE),
    ),
    "adamw": (
        lambda: optimizers.adamw(RATE, weight_decay=0.0),
        lambda: optim.AdamW(learning_rate=RATE, schedule="constant", clip_norm=None),
    ),
}  # fmt: skip
SAME = ("loss", "cross_ent_loss", "z_loss", "accuracy", "cross_ent_loss/label",
        "cross_ent_loss/rationale", "accuracy/label", "accuracy/rationale")  # fmt: skip


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_ten_steps_equal_ours(optimizer, pack, tmp_path):
    objective = objectives.StepByStep(alpha=0.3, z_loss=1e-3)
    theirs, ours = (make() for make in OPTIMIZERS[optimizer])
    batches = batches_of("arithmetic_step_by_step", pack, count=STEPS)
    assert len(batches) == STEPS
    params = initial_params()
    trainer_ = make_trainer(make_model(objective, theirs), params, batches[0], str(tmp_path))
    got, got_params = run_t5x(trainer_, batches)
    want, want_params = run_ours(objective, ours, params, batches)
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        for name in SAME:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-7), (step, name)
    assert want[-1]["loss"] < want[0]["loss"] - 0.5, "it learned"
    want_params = unstacked(jax.device_get(want_params))
    for a, b in zip(jax.tree.leaves(got_params), jax.tree.leaves(want_params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-3)


def test_standard_equals_ours():
    objective = objectives.Standard(z_loss=0.0, label_smoothing=0.1)
    theirs, ours = (make() for make in OPTIMIZERS["adafactor"])
    batches = batches_of("arithmetic_label", True, count=2)
    params = initial_params()
    got, _ = run_t5x(make_trainer(make_model(objective, theirs), params, batches[0]), batches)
    want, _ = run_ours(objective, ours, params, batches)
    assert [r["loss"] for r in got] == pytest.approx([r["loss"] for r in want], rel=1e-4)


def test_microbatches_are_exact():
    """One row is all labels and one all rationales: the worst case for T5X's own accumulation."""
    objective = objectives.StepByStep(alpha=0.3)
    (batch,) = batches_of("arithmetic_step_by_step", False)
    groups = batch["decoder_loss_groups"].max(axis=1)
    order = np.argsort(groups, kind="stable")
    batch = {k: v[order] for k, v in batch.items()}
    assert len(set(groups)) == 2
    params = initial_params()
    results = []
    for parts in (None, 2, 8):
        model = make_model(objective, optimizers.sgd(RATE))
        results.append(run_t5x(make_trainer(model, params, batch, None, parts), [batch]))
    (want,), want_params = results[0]
    for (got,), got_params in results[1:]:
        for name in SAME:
            assert got[name] == pytest.approx(want[name], rel=1e-5), name
        for a, b in zip(jax.tree.leaves(got_params), jax.tree.leaves(want_params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_t5xs_own_trainer_is_refused():
    model = make_model(objectives.StepByStep(), OPTIMIZERS["adafactor"][0]())
    (batch,) = batches_of("arithmetic_step_by_step", True)
    params = initial_params()
    plain = make_trainer(model, params, batch, num_microbatches=2, cls=trainer.Trainer)
    with plain, pytest.raises(ValueError, match="trainer_cls = @t5x_adapter.DistillTrainer"):
        plain.train(iter([batch]), num_steps=1)
    # Evaluation needs no counts, whichever trainer runs it.
    loss, _ = jax.jit(model.eval_fn)(plain.train_state.params, batch)
    assert np.isfinite(loss)


@pytest.mark.parametrize("factor", [1.0, 233472, "NUM_REAL_TARGET_TOKENS"])
def test_loss_normalizing_factor_is_refused(factor):
    with pytest.raises(ValueError, match="LOSS_NORMALIZING_FACTOR.*remove the setting"):
        make_model(objectives.StepByStep(), None, loss_normalizing_factor=factor)


def test_a_term_over_pairs_is_refused():
    with pytest.raises(ValueError, match="mutual_information=0.1 does not work under T5X"):
        make_model(objectives.StepByStep(mutual_information=0.1), None)


def test_dropout_is_used_in_training_only():
    net = network.Transformer(network.T5Config(**{**SIZE, "dropout_rate": 0.5}))
    vocabulary = t5x_adapter.vocabulary("bytes")
    model = t5x_adapter.DistillModel(net, vocabulary, vocabulary, None, objectives.StepByStep())
    (batch,) = batches_of("arithmetic_step_by_step", True)
    shapes = {k: v.shape for k, v in batch.items()}
    init = jax.jit(lambda: model.get_initial_variables(jax.random.key(0), shapes)["params"])
    params = init()
    loss = jax.jit(lambda key: model.loss_fn(params, t5x_adapter.with_counts(batch), key)[0])
    losses = {float(loss(jax.random.key(k))) for k in range(2)}
    assert len(losses) == 2 and float(loss(None)) not in losses


# --- Data


def decoded(row: np.ndarray, segments: np.ndarray | None, groups: np.ndarray):
    """(text, loss groups) of each target of a row."""
    segments = (row > 0).astype(int) if segments is None else segments
    vocabulary = task.vocabulary()
    for segment in range(1, segments.max() + 1):
        here = segments == segment
        yield vocabulary.decode(row[here]), set(groups[here].tolist())


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "unpacked"])
def test_loss_groups_of_a_mixture(pack):
    (batch,) = batches_of("arithmetic_step_by_step", pack, rows=16)
    assert {v.dtype for v in batch.values()} == {np.dtype(np.int32)}
    real = batch["decoder_loss_weights"] == 1
    assert (batch["decoder_example_weights"] == 1000 * real).all()
    assert not batch["decoder_loss_groups"][~real].any()
    rows = zip(
        batch["decoder_target_tokens"],
        batch["decoder_segment_ids"] if pack else [None] * 16,
        batch["decoder_loss_groups"],
        strict=True,
    )
    found = [pair for row in rows for pair in decoded(*row)]
    # A rationale of this task is a sentence, its label a digit.
    assert all(groups == {int(" then " in text)} for text, groups in found)
    assert {len(text) for text, groups in found if groups == {0}} == {1}
    kinds = [groups == {1} for _, groups in found]
    assert any(kinds) and not all(kinds)
    if pack:
        assert len(found) > 16 and batch["decoder_segment_ids"].max() >= 2


def examples(weights=(None, None)):
    """Two examples of other lengths and groups, as `task.register` gives them."""
    rows = [
        {"inputs": [5, 6, 1], "targets": [7, 1], "loss_group": 0},
        {"inputs": [8, 1], "targets": [9, 10, 11, 1], "loss_group": 1},
    ]
    for row, weight in zip(rows, weights, strict=True):
        if weight is not None:
            row["loss_weight"] = weight
    spec = {
        k: tf.TensorSpec([None] if isinstance(v, list) else [], tf.int32)
        for k, v in rows[0].items()
    }
    return tf.data.Dataset.from_generator(lambda: iter(rows), output_signature=spec)


@pytest.mark.parametrize("custom", [(None, None), (1000, 250), (0, 1500)])
def test_weights_and_groups_survive_packing(custom):
    """Zeros too, where SeqIO's packing would end a sequence."""
    converter = t5x_adapter.DistillFeatureConverter(pack=True)
    (row,) = converter(examples(custom), {"inputs": 8, "targets": 8}).as_numpy_iterator()
    first, second = (1000 if w is None else w for w in custom)
    assert row["decoder_target_tokens"].tolist() == [7, 1, 9, 10, 11, 1, 0, 0]
    assert row["decoder_loss_groups"].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert row["decoder_example_weights"].tolist() == [first] * 2 + [second] * 4 + [0] * 2


def test_long_targets_are_cut_with_their_groups():
    converter = t5x_adapter.DistillFeatureConverter(pack=False, apply_length_check=False)
    rows = list(converter(examples(), {"inputs": 8, "targets": 3}).as_numpy_iterator())
    assert [r["decoder_loss_groups"].tolist() for r in rows] == [[0, 0, 0], [1, 1, 1]]


def test_a_plain_seqio_mixture_is_refused():
    with pytest.raises(ValueError, match="@t5x_adapter.mixture()"):
        seqio.get_dataset(
            mixture_or_task_name="arithmetic_step_by_step",
            task_feature_lengths=LENGTHS,
            feature_converter=t5x_adapter.DistillFeatureConverter(pack=True),
        )


def test_mixture_checks():
    with pytest.raises(ValueError, match="2 loss groups"):
        t5x_adapter.mixture("arithmetic_step_by_step", objective=objectives.Standard())
    with pytest.raises(ValueError, match="has no rationale targets"):
        t5x_adapter.mixture("arithmetic_label", objective=objectives.StepByStep())
    with pytest.raises(ValueError, match="Did you mean 'arithmetic_label'"):
        t5x_adapter.mixture("arithmetic_labl")
    plain = seqio.get_mixture_or_task("arithmetic_step_by_step")
    grouped = t5x_adapter.mixture("arithmetic_step_by_step", objective=objectives.StepByStep())
    assert grouped.name == plain.name and grouped.tasks == plain.tasks
    assert [grouped.get_rate(t) for t in plain.tasks] == [plain.get_rate(t) for t in plain.tasks]


# --- Gin files


def python(*arguments: str, timeout: float) -> str:
    """Runs Python in the repository with one device; fails with its last lines."""
    paths = [str(ROOT), *filter(None, sys.path)]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_gin_files():
    """T5X's parser takes them, and the model is what the name says."""
    required = [
        "MODEL_DIR='x'", "MIXTURE_OR_TASK_NAME='arithmetic_step_by_step'", "TRAIN_STEPS=1",
        "TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}", "INITIAL_CHECKPOINT_PATH=[]",
        "VOCABULARY='bytes'",
    ]  # fmt: skip
    files = [[f"step_by_step_{s}.gin"] for s in ("small", "base", "large", "xl")]
    files.append(["step_by_step_base.gin", "labels_only.gin"])
    found = python(
        "-c",
        textwrap.dedent(f"""
            import json, os, gin, t5x
            from t5x.train import train  # the files name it __main__.train
            gin.add_config_file_search_path(os.path.dirname(os.path.dirname(t5x.__file__)))
            for files in {files!r}:
                gin.clear_config()
                gin.parse_config_files_and_bindings(
                    ["gin_configs/t5x/" + name for name in files], {required!r})
                model = gin.query_parameter("%MODEL").scoped_configurable_fn()
                assert model.FEATURE_CONVERTER_CLS.__module__ == "distill.t5x_adapter"
                c = model.module.config
                size = [c.emb_dim, c.num_heads, c.num_encoder_layers, c.num_decoder_layers,
                        c.head_dim, c.mlp_dim]
                print("FOUND", json.dumps([size, repr(model.objective), c.dropout_rate]))
        """),
        timeout=300,
    )
    found = [json.loads(line[6:]) for line in found.splitlines() if line.startswith("FOUND ")]
    sizes = [size for size, _, _ in found]
    assert sizes[:4] == [
        [512, 6, 8, 8, 64, 1024], [768, 12, 12, 12, 64, 2048], [1024, 16, 24, 24, 64, 2816],
        [2048, 32, 24, 24, 64, 5120],
    ]  # fmt: skip
    assert all(o == repr(objectives.StepByStep()) for _, o, _ in found[:4])
    assert found[4][:2] == [sizes[1], repr(objectives.Standard())]
    assert {dropout for *_, dropout in found} == {0.1}


@pytest.mark.slow
def test_python_m_t5x_train(tmp_path):
    """A real run: train, teacher-forced and inference evaluation, checkpoint."""
    size = {k: v for k, v in SIZE.items() if k not in ("dropout_rate", "mlp_activations")}
    python(
        "-m", "t5x.train", "--gin_file=gin_configs/t5x/step_by_step_small.gin",
        f"--gin.MODEL_DIR='{tmp_path}'",
        "--gin.MIXTURE_OR_TASK_NAME='arithmetic_step_by_step'",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 128, 'targets': 64}",
        "--gin.VOCABULARY='bytes'", "--gin.INITIAL_CHECKPOINT_PATH=[]",
        "--gin.TRAIN_STEPS=4", "--gin.EVAL_PERIOD=2", "--gin.EVAL_STEPS=1",
        "--gin.EVALUATOR_NUM_EXAMPLES=4", "--gin.BATCH_SIZE=8", "--gin.DROPOUT_RATE=0.0",
        "--gin.RANDOM_SEED=0", "--gin.NUM_MICROBATCHES=2",
        "--gin.utils.SaveCheckpointConfig.period=4",
        *(f"--gin.network.T5Config.{k}={v!r}" for k, v in size.items()),
        timeout=900,
    )  # fmt: skip
    assert (tmp_path / "checkpoint_4").is_dir()
    metrics = (tmp_path / "inference_eval" / "arithmetic_predict-metrics.jsonl").read_text()
    assert json.loads(metrics.splitlines()[-1])["step"] == 4
    events = sorted((tmp_path / "train").glob("events.out.tfevents.*"))
    tags = {
        value.tag
        for path in events
        for event in tf.compat.v1.train.summary_iterator(str(path))
        for value in event.summary.value
    }
    assert set(SAME) <= tags
