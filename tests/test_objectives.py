"""The stated loss: equal to the published formula, whatever the packing, accumulation or mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_data import corpus_of, pairs_config
from test_t5 import TINY, numpy_params

from distill import data, objectives, optim, partitioning, t5, train

OBJECTIVES = [
    objectives.StepByStep(alpha=0.5, z_loss=0.0),
    objectives.StepByStep(alpha=0.3, z_loss=1e-3, label_smoothing=0.1),
]


def examples(n=6, seed=0):
    """Pairs of (label, rationale) sequences whose lengths are far from even."""
    rng = np.random.default_rng(seed)

    def sequence(low, high):
        return np.append(rng.integers(3, 90, rng.integers(low, high)), 1).astype(np.int32)

    return [
        {
            "label": (sequence(3, 12), sequence(1, 3)),
            "rationale": (sequence(3, 12), sequence(2, 14)),
        }
        for _ in range(n)
    ]


def padded(tokens):
    return np.pad(tokens, (0, 16 - len(tokens)))[None].astype(np.int32)


@jax.jit
def tiny_logits(params, batch):
    return t5.T5(TINY).apply({"params": params}, batch)


def numpy_loss(params, pairs, objective):
    """alpha * mean CE over label tokens + (1 - alpha) * mean CE over rationale tokens."""
    total = 0.0
    for name, weight in zip(objectives.LOSS_GROUPS, objective.group_weights, strict=True):
        sums, count = 0.0, 0
        for pair in pairs:
            source, target = pair[name]
            batch = {
                "encoder_input_tokens": padded(source),
                "decoder_input_tokens": padded(np.append(0, target[:-1])),
                "decoder_target_tokens": padded(target),
            }
            logits = np.asarray(tiny_logits(params, batch), np.float64)[0, : len(target)]
            log_z = np.log(np.exp(logits).sum(-1))
            s, v = objective.label_smoothing, logits.shape[-1]
            q = np.full(logits.shape, s / (v - 1))
            q[np.arange(len(target)), target] = 1 - s
            entropy = -(q * np.log(np.maximum(q, 1e-20))).sum(-1)
            ce = log_z - (q * logits).sum(-1) - entropy
            sums += (ce + objective.z_loss * log_z**2).sum()
            count += len(target)
        total += weight * sums / count
    return total


def batch_of(pairs, lengths, row_multiple=1):
    """One batch with all pairs, packed into rows of these lengths."""
    config = dataclasses.replace(
        pairs_config(len(pairs)), feature_lengths=dict(inputs=lengths[0], targets=lengths[1])
    )
    batches = data.TrainBatches(corpus_of(pairs), config, row_multiple)
    return next(batches.iterate(data.Position(0, 0))).arrays


@functools.partial(jax.jit, static_argnames="objective")
def loss_and_grads(params, batch, objective):
    counts = objectives.group_counts(batch)

    def loss(p):
        return objective(train.make_forward(t5.T5(TINY), p), batch, counts)[0]

    return jax.value_and_grad(loss)(params)


def assert_close(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def params():
    return numpy_params(TINY, scale=0.2)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["plain", "z-loss and smoothing"])
def test_loss_is_the_published_formula_packed_or_not(params, objective):
    pairs = examples()
    want = numpy_loss(params, pairs, objective)
    rows = {}
    losses = {}
    for lengths in [(13, 15), (40, 30), (120, 90)]:
        batch = batch_of(pairs, lengths)
        rows[lengths] = len(batch["encoder_input_tokens"])
        losses[lengths] = loss_and_grads(params, batch, objective)
        np.testing.assert_allclose(losses[lengths][0], want, rtol=1e-5)
    assert rows[13, 15] > rows[40, 30] > rows[120, 90]  # they really are packed differently
    assert_close(losses[40, 30], losses[13, 15])
    assert_close(losses[120, 90], losses[13, 15])


@functools.cache
def updated(objective, microbatches, devices):
    """Parameters and scalars after one step of plain gradient descent."""
    mesh = partitioning.make_mesh(partitioning.MeshConfig(), jax.devices()[:devices])
    pairs = examples(8, seed=3)
    batch = partitioning.shard_batch(mesh, batch_of(pairs, (16, 16), row_multiple=8))
    tx = optax.sgd(1.0)
    params = jax.device_put(numpy_params(TINY, scale=0.2), partitioning.replicated(mesh))
    state = train.TrainState(jnp.int32(0), params, tx.init(params))
    step = jax.jit(
        functools.partial(
            train.train_step, net=t5.T5(TINY, partitioning.activation_constraint(mesh)),
            objective=objective, tx=tx, num_microbatches=microbatches,
            batch_shards=partitioning.batch_shards(mesh),
        )
    )  # fmt: skip
    state, scalars = step(state, batch, jax.random.key(0))
    return jax.device_get((scalars, state.params))


@pytest.mark.parametrize("microbatches,devices", [(2, 1), (4, 1), (1, 2), (1, 8), (2, 4)])
def test_accumulation_and_mesh_change_neither_loss_nor_gradients(microbatches, devices):
    """The last rows of the batch are empty, so the micro-batches are as uneven as can be."""
    want, got = updated(OBJECTIVES[1], 1, 1), updated(OBJECTIVES[1], microbatches, devices)
    for name in want[0]:
        np.testing.assert_allclose(got[0][name], want[0][name], rtol=1e-5, err_msg=name)
    assert_close((0.0, got[1]), (0.0, want[1]))


def test_dividing_by_each_micro_batchs_own_count_would_be_noticed(params):
    """The law above has teeth: the wrong way gives another number on the same data."""
    pairs = examples(8, seed=3)
    batch = batch_of(pairs, (16, 16), row_multiple=8)
    objective = OBJECTIVES[0]
    right = loss_and_grads(params, batch, objective)[0]
    half = len(batch["encoder_input_tokens"]) // 2
    parts = [{k: v[s] for k, v in batch.items()} for s in (slice(0, half), slice(half, None))]
    wrong = np.mean([loss_and_grads(params, part, objective)[0] for part in parts])
    assert abs(wrong - right) > 1e-3


def test_alpha_weighs_the_groups_and_an_absent_group_adds_nothing(params):
    pairs = examples(4)
    batch = batch_of(pairs, (40, 30))
    by_alpha = {
        alpha: loss_and_grads(params, batch, objectives.StepByStep(alpha=alpha, z_loss=0.0))[0]
        for alpha in (0.0, 0.25, 1.0)
    }
    np.testing.assert_allclose(
        by_alpha[0.25], 0.25 * by_alpha[1.0] + 0.75 * by_alpha[0.0], rtol=1e-5
    )
    labels_only = dict(batch)
    labels_only["decoder_loss_weights"] = batch["decoder_loss_weights"] * (
        batch["decoder_loss_groups"] == 0
    )
    half = loss_and_grads(params, labels_only, objectives.StepByStep(alpha=0.5, z_loss=0.0))[0]
    np.testing.assert_allclose(half, 0.5 * by_alpha[1.0], rtol=1e-5)


def test_reported_group_losses_exclude_the_z_loss(params):
    batch = batch_of(examples(4), (40, 30))
    counts = objectives.group_counts(batch)
    forward = train.make_forward(t5.T5(TINY), params)
    report = {}
    for z in (0.0, 1.0):
        objective = objectives.StepByStep(z_loss=z)
        _, sums = objective(forward, batch, counts)
        report[z] = objectives.summarize(objective, sums, counts)
    for name in ("cross_ent_loss", "cross_ent_loss/label", "cross_ent_loss/rationale"):
        np.testing.assert_allclose(report[0.0][name], report[1.0][name], rtol=1e-6)
    assert report[0.0]["z_loss"] == 0 < report[1.0]["z_loss"]
    np.testing.assert_allclose(
        report[1.0]["loss"], report[1.0]["cross_ent_loss"] + report[1.0]["z_loss"], rtol=1e-6
    )


def test_standard_refuses_two_groups_and_step_by_step_one():
    with pytest.raises(ValueError, match="step_by_step.gin"):
        objectives.Standard().check_groups({0, 1}, "svamp_step_by_step")
    with pytest.raises(ValueError, match="finetune.gin"):
        objectives.StepByStep().check_groups({0}, "svamp_label")
    objectives.Standard().check_groups({1}, "svamp_explain")
    objectives.StepByStep().check_groups({0, 1}, "svamp_step_by_step")


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_out_of_range_is_an_error(alpha):
    with pytest.raises(ValueError, match="ALPHA"):
        objectives.StepByStep(alpha=alpha)


def test_an_update_that_is_not_finite_is_skipped_and_counted():
    mesh = partitioning.make_mesh(partitioning.MeshConfig(), jax.devices()[:1])
    tx = optim.AdamW(learning_rate=1e-2).build(10)
    params = numpy_params(TINY)
    params["decoder"]["decoder_norm"]["scale"] += jnp.nan
    state = train.TrainState(jnp.int32(4), params, tx.init(params))
    batch = partitioning.shard_batch(mesh, batch_of(examples(4), (40, 30)))
    new, scalars = jax.jit(
        functools.partial(train.train_step, net=t5.T5(TINY), objective=OBJECTIVES[0], tx=tx)
    )(state, batch, jax.random.key(0))
    assert scalars["skipped"] == 1 and new.step == 5
    for a, b in zip(
        jax.tree.leaves((new.params, new.opt_state)),
        jax.tree.leaves((state.params, state.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
