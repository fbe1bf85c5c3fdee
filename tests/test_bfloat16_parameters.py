"""Parameters kept in bfloat16: stochastic rounding, the optimizer around it, and whole runs."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging
from test_objectives import batch_of, examples
from test_t5 import TINY, numpy_params
from test_train import MODEL, assert_same_state, run, state_of

from distill import (
    checkpoints,
    convert,
    evaluate,
    export,
    objectives,
    optim,
    partitioning,
    scoring,
    students,
    t5,
    train,
)

BF16 = jnp.dtype(jnp.bfloat16)
HALF = dataclasses.replace(MODEL, param_dtype="bfloat16")


def rounded(tree):
    """To nearest."""
    return jax.tree.map(lambda x: jnp.asarray(x, BF16), tree)


def float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


# --- Rounding -------------------------------------------------------------------------------------


def test_rounding_is_unbiased_and_to_a_neighbour():
    rng = np.random.default_rng(0)
    x = rng.normal(size=64).astype(np.float32) * np.logspace(-30, 30, 64).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4096)
    draws = np.asarray(jax.jit(jax.vmap(optim.stochastic_round, (None, 0)))(x, keys), np.float32)
    below = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # towards zero
    above = (below.view(np.uint32) + np.uint32(1 << 16)).view(np.float32)
    assert ((draws == below) | (draws == above)).all()
    share = (draws == above).mean(0)
    want = (x.astype(np.float64) - below) / (above.astype(np.float64) - below)
    assert np.abs(share - want).max() < 5 * 0.5 / np.sqrt(len(keys))
    error = (draws.astype(np.float64).mean(0) - x) / np.abs(above.astype(np.float64) - below)
    assert abs(error.mean()) < 5 * 0.5 / np.sqrt(draws.size)


def test_what_bfloat16_holds_is_unchanged_and_nothing_finite_becomes_infinite():
    every = np.arange(1 << 16, dtype=np.uint16)  # the bits of all there are
    exact = (every.astype(np.uint32) << 16).view(np.float32)
    got = np.asarray(optim.stochastic_round(jnp.asarray(exact), jax.random.key(0)))
    nan = np.isnan(exact)
    np.testing.assert_array_equal(got.view(np.uint16)[~nan], every[~nan])
    assert (got.view(np.uint16)[nan] & 0x7FFF > 0x7F80).all()
    largest = np.finfo(np.float32).max
    hidden = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)  # NaN in the lower half
    for seed in range(8):
        key = jax.random.key(seed)
        top = optim.stochastic_round(jnp.array([largest, -largest]), key).astype(np.float32)
        np.testing.assert_array_equal(top, np.array([1, -1]) * float(jnp.finfo(BF16).max))
        assert jnp.isnan(optim.stochastic_round(jnp.asarray(hidden), key)).all()


def test_small_updates_move_parameters_where_rounding_to_nearest_stalls():
    params, update = jnp.full(4096, -1.0, BF16), jnp.full(4096, 1e-4)

    @jax.jit
    def steps(params):
        def step(params, key):
            return optim.apply_updates(params, update, key), None

        return jax.lax.scan(step, params, jax.random.split(jax.random.key(0), 100))[0]

    assert (rounded(float32(params) + update) == params).all()
    assert float(steps(params).astype(jnp.float32).mean()) == pytest.approx(-0.99, abs=1e-3)


def test_every_array_and_every_step_has_its_own_draws_on_any_mesh():
    params = {name: jnp.ones((8, 64), BF16) for name in "ab"}
    updates = jax.tree.map(lambda x: jnp.full(x.shape, 3e-3), params)
    keys = jax.random.split(jax.random.key(0), 2)
    one, other = (optim.apply_updates(params, updates, key) for key in keys)
    assert (one["a"] != one["b"]).any() and (one["a"] != other["a"]).any()
    assert 0.1 < (one["a"] > 1).mean() < 0.9
    mesh = partitioning.make_mesh(partitioning.MeshConfig(fsdp=8))
    sliced = partitioning.batch_sharding(mesh)
    placed = jax.device_put((params, updates), sliced)
    on_mesh = jax.jit(optim.apply_updates, out_shardings=sliced)(*placed, keys[0])
    for name in params:
        np.testing.assert_array_equal(on_mesh[name], one[name])


# --- Optimizer and step ---------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [optim.Adafactor(), optim.AdamW(weight_decay=0.1)])
def test_the_optimizer_computes_in_float32(optimizer):
    params, tx = rounded(numpy_params(TINY)), optimizer.build(10)
    grads = rounded(numpy_params(TINY, seed=1))
    step = jax.jit(tx.update)
    got = step(grads, tx.init(params), params)
    want = step(float32(grads), tx.init(float32(params)), float32(params))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype != BF16
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-12)  # compiled twice


def step_of(net, tx, **settings):
    settings = dict(objective=objectives.StepByStep()) | settings
    return jax.jit(functools.partial(train.train_step, net=net, tx=tx, **settings))


def test_micro_batches_add_up_in_float32():
    """512 gradients of 1: in bfloat16 their sum would stop at 256."""

    class Ones(objectives.Standard):
        def __call__(self, forward, batch, counts):
            logits = forward.unembed(jnp.ones((1, 1, TINY.emb_dim)))
            return jnp.sum(logits), dict.fromkeys(("cross_ent", "z", "correct"), jnp.zeros(2))

    keep = optax.GradientTransformation(  # the gradients as the state, no update
        lambda params: float32(params),
        lambda grads, state, params: (jax.tree.map(jnp.zeros_like, grads), grads),
    )
    net, params = t5.T5(TINY), rounded(numpy_params(TINY))
    zeros = np.zeros((512, 1), np.int32)
    names = ("encoder_input_tokens", "decoder_loss_weights", "decoder_loss_groups")
    step = step_of(net, keep, objective=Ones(), num_microbatches=512)
    state = train.TrainState(jnp.int32(0), params, keep.init(params))
    state, scalars = step(state, dict.fromkeys(names, zeros), jax.random.key(0))
    kernel = state.opt_state["decoder"]["logits_dense"]["kernel"]
    assert kernel.dtype == jnp.float32 and (kernel == 512).all()
    assert scalars["grad_norm"] == pytest.approx(512 * np.sqrt(kernel.size))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {BF16}


def test_training_follows_the_float32_run():
    """With updates so small that rounded to nearest they would move few parameters."""
    net, tx = t5.T5(TINY), optim.AdamW(learning_rate=1e-4, schedule="constant").build(100)
    batch = batch_of(examples(8, seed=3), (16, 16), row_multiple=8)

    def losses(params):
        step, state = step_of(net, tx), train.TrainState(jnp.int32(0), params, tx.init(params))
        result = []
        for _ in range(60):
            state, scalars = step(state, batch, jax.random.key(0))
            result.append(float(scalars["loss"]))
        return np.array(result)

    params = rounded(numpy_params(TINY, scale=0.2))
    exact, drawn = losses(float32(params)), losses(params)
    assert exact[-1] < exact[0] - 0.1
    np.testing.assert_allclose(drawn, exact, atol=0.01)  # to nearest: 0.14 at the end


# --- Whole runs -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Token caches, built once for all tests of this file."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("whole")
    run(folder, cache, model=HALF)
    return folder


def test_a_run_keeps_bfloat16_and_goes_on_bitwise(uninterrupted, tmp_path, cache, capsys):
    state = state_of(uninterrupted, 6)
    types = {name: x.dtype for name, x in state.items()}
    assert {t for n, t in types.items() if "'params'" in n} == {BF16}
    assert BF16 not in {t for n, t in types.items() if "'params'" not in n}
    rows = [
        json.loads(line) for line in (uninterrupted / "train/metrics.jsonl").read_text().split("\n")
        if "loss" in line
    ]  # fmt: skip
    assert rows[-1]["loss"] < rows[0]["loss"]
    shutil.copytree(uninterrupted / "checkpoint_3", tmp_path / "checkpoint_3")
    run(tmp_path, cache, model=HALF)
    assert "kept in bfloat16" in capsys.readouterr().out
    assert_same_state(state_of(tmp_path, 6), state)


def test_another_type_is_no_way_to_resume(uninterrupted, cache):
    message = "keeps its parameters in bfloat16, this one in float32.*PARAM_DTYPE=bfloat16"
    with pytest.raises(ValueError, match=message):
        run(uninterrupted, cache, steps=7)


def test_its_checkpoints_evaluate_and_export(uninterrupted, tmp_path, cache):
    config = evaluate.EvaluateConfig(
        str(uninterrupted), cache_dir=cache, eval_output_dir=str(tmp_path / "scores"),
        answering=scoring.Answering(num_examples=4),
    )  # fmt: skip
    assert evaluate.evaluate(config)[0][1].n == 4
    weights = convert.open_weights(str(uninterrupted))
    params = convert.read_params(weights)
    raw, _ = checkpoints.restore(
        uninterrupted / "checkpoint_6", t5.param_shapes(HALF), subtree="params"
    )
    export.save_hugging_face(tmp_path / "hf", weights, weights.model)
    export.save_t5x(tmp_path / "t5x", weights, weights.model, weights.step)
    export.save_ours(tmp_path / "ours", weights)
    for kind in ("hf", "t5x", "ours"):
        back = convert.open_weights(str(tmp_path / kind))
        assert {x.dtype.name for x in back.tensors.values()} == {"float32"}
        assert back.model.param_dtype == "float32"
        for tree in (params, raw):
            for a, b in zip(
                jax.tree.leaves(tree), jax.tree.leaves(convert.read_params(back)), strict=True
            ):
                np.testing.assert_array_equal(np.asarray(a, np.float32), b)


def test_initial_weights_of_the_other_type(tmp_path, caplog):
    """float32 into bfloat16 is rounded to nearest, with a line; bfloat16 into float32 is exact."""
    absl_logging.use_absl_handler()
    mesh = partitioning.make_mesh(partitioning.MeshConfig())
    params = numpy_params(MODEL)
    assert {x.dtype for x in jax.tree.leaves(t5.param_shapes(HALF))} == {BF16}

    def through_a_checkpoint(folder, params, model, into):
        with checkpoints.Checkpointer(folder) as saver:
            saver.save(1, {"params": params}, {"model": dataclasses.asdict(model), "step": 1})
        abstract = students.abstract_params(t5.T5(into), mesh)
        return convert.load(convert.open_weights(str(folder)), into, abstract)

    with caplog.at_level("INFO"):
        loaded = through_a_checkpoint(tmp_path / "a", params, MODEL, HALF)
    assert "holds float32, rounded to nearest bfloat16" in caplog.text
    back = through_a_checkpoint(tmp_path / "b", loaded, HALF, MODEL)
    trees = (loaded, rounded(params), back)
    for got, want, wide in zip(*map(jax.tree.leaves, trees), strict=True):
        assert got.dtype == BF16 and wide.dtype == jnp.float32
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(wide, want.astype(jnp.float32))


def test_a_type_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="PARAM_DTYPE"):
        t5.T5Config(384, param_dtype="float16")
