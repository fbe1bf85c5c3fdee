"""The stated loss: equal to the published formula, whatever the packing, accumulation or mesh."""

import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_t5 import TINY, numpy_params

from distill import cache, data, estimate, objectives, optim, partitioning, t5, train

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
    """alpha * mean CE over label tokens + (1 - alpha) * mean CE over rationale tokens.

    The means are by weight, where pairs have `weights` (thousandths, by group).
    """
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
            example_weight = pair.get("weights", {}).get(name, 1000) / 1000
            sums += example_weight * (ce + objective.z_loss * log_z**2).sum()
            count += example_weight * len(target)
        total += weight * sums / count
    return total


def batch_of(pairs, lengths, row_multiple=1, with_pair_ids=False):
    """One batch with all pairs, packed into rows of these lengths."""
    members = []
    for group, name in enumerate(objectives.LOSS_GROUPS):
        facts = dict(name=name, rate=1.0, metrics=[], dataset="toy", answer_form="label")
        rows = [
            dict(
                inputs=pair[name][0], targets=pair[name][1], inputs_pretokenized="", label="",
                example_id=f"toy/{i}", loss_group=group, choice=0,
                loss_weight=pair.get("weights", {}).get(name, 1000),
            )
            for i, pair in enumerate(pairs)
            if name in pair
        ]  # fmt: skip
        members.append((facts, None, rows))
    config = data.DataConfig(
        "toy", batch_size=None, pairs_per_step=len(pairs),
        feature_lengths=dict(inputs=lengths[0], targets=lengths[1]),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        generation = cache.write_generation(folder, "toy", "train", members)
        corpus = cache.open_generation(folder / generation)
        batches = data.TrainBatches(
            corpus, config, row_multiple=row_multiple, with_pair_ids=with_pair_ids
        )
        arrays = next(batches.iterate(data.Position())).arrays
    if "decoder_example_weights" in arrays:  # what padding weighs must not matter
        real = arrays["decoder_loss_weights"] > 0
        arrays["decoder_example_weights"] = np.where(
            real, arrays["decoder_example_weights"], 777
        ).astype(np.int32)
    return arrays


def weighted_examples(n=6, seed=0):
    """`examples` with weights of all sizes, among them 0 and 1000."""
    rng = np.random.default_rng([seed, 1])
    drawn = rng.permutation([0, 1000, *rng.integers(1, 999, 2 * n - 2)])
    return [
        {**pair, "weights": {"label": int(a), "rationale": int(b)}}
        for pair, (a, b) in zip(examples(n, seed), drawn.reshape(n, 2), strict=True)
    ]


@functools.partial(jax.jit, static_argnames="objective")
def loss_and_grads(params, batch, objective):
    counts = objectives.group_counts(batch)

    def loss(p):
        return objective(train.make_forward(t5.T5(TINY), p), batch, counts)[0]

    return jax.value_and_grad(loss)(params)


@functools.partial(jax.jit, static_argnames="objective")
def loss_only(params, batch, objective):
    """Compiles faster than `loss_and_grads`."""
    counts = objectives.group_counts(batch)
    return objective(train.make_forward(t5.T5(TINY), params), batch, counts)[0]


def assert_close(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def params():
    return numpy_params(TINY, scale=0.2)


@pytest.mark.parametrize(
    "objective, make",
    [(OBJECTIVES[0], examples), (OBJECTIVES[1], examples), (OBJECTIVES[1], weighted_examples)],
    ids=["plain", "z-loss and smoothing", "weighted"],
)
def test_loss_is_the_published_formula_packed_or_not(params, objective, make):
    pairs = make()
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
def updated(objective, microbatches, devices, make=examples):
    """Parameters and scalars after one step of plain gradient descent."""
    mesh = partitioning.make_mesh(partitioning.MeshConfig(), jax.devices()[:devices])
    pairs = make(8, seed=3)
    batch = partitioning.shard_batch(mesh, batch_of(pairs, (16, 16), row_multiple=8))
    tx = optax.sgd(1.0)
    params = jax.device_put(numpy_params(TINY, scale=0.2), partitioning.replicated(mesh))
    state = train.TrainState(jnp.int32(0), params, tx.init(params))
    step = jax.jit(
        functools.partial(
            train.train_step, net=t5.T5(TINY, partitioning.activation_constraint(mesh)),
            objective=objective, tx=tx, num_microbatches=microbatches,
        )
    )  # fmt: skip
    state, scalars = step(state, batch, jax.random.key(0))
    return jax.device_get((scalars, state.params))


@pytest.mark.parametrize(
    "microbatches,devices,make",
    [
        *((m, d, examples) for m, d in [(2, 1), (4, 1), (1, 2), (1, 8), (2, 4)]),
        (2, 4, weighted_examples),
    ],
)
def test_accumulation_and_mesh_change_neither_loss_nor_gradients(microbatches, devices, make):
    """The last rows of the batch are empty, so the micro-batches are as uneven as can be."""
    want = updated(OBJECTIVES[1], 1, 1, make)
    got = updated(OBJECTIVES[1], microbatches, devices, make)
    for name in want[0]:
        np.testing.assert_allclose(got[0][name], want[0][name], rtol=1e-5, err_msg=name)
    assert_close((0.0, got[1]), (0.0, want[1]))


def test_dividing_by_each_micro_batchs_own_count_would_be_noticed(params):
    """The law above has teeth: the wrong way gives another number on the same data."""
    pairs = examples(8, seed=3)
    batch = batch_of(pairs, (16, 16), row_multiple=8)
    objective = OBJECTIVES[0]
    right = loss_only(params, batch, objective)
    half = len(batch["encoder_input_tokens"]) // 2
    parts = [{k: v[s] for k, v in batch.items()} for s in (slice(0, half), slice(half, None))]
    wrong = np.mean([loss_only(params, part, objective) for part in parts])
    assert abs(wrong - right) > 1e-3


@pytest.mark.parametrize("weight", [1000, 3])
def test_equal_weights_are_no_weights(params, weight):
    """Weights of 3 thousandths also show that the divisor may be below one token."""
    pairs = examples(4)
    batch = batch_of(pairs, (40, 30))
    key = {"decoder_example_weights": np.full_like(batch["decoder_loss_weights"], weight)}
    np.testing.assert_allclose(
        loss_only(params, batch | key, OBJECTIVES[1]),
        loss_only(params, batch, OBJECTIVES[1]),
        rtol=1e-6,
    )


def test_an_example_of_weight_zero_is_absent(params):
    pairs = examples(5)
    weights = {"label": 1000, "rationale": 1000}
    kept = [{**pair, "weights": weights} for pair in pairs[:4]]
    dropped = {**pairs[4], "weights": {"label": 0, "rationale": 0}}
    assert_close(
        loss_and_grads(params, batch_of([*kept, dropped], (40, 30)), OBJECTIVES[1]),
        loss_and_grads(params, batch_of(pairs[:4], (40, 30)), OBJECTIVES[1]),
    )
    nothing = batch_of([{**p, "weights": {"label": 0, "rationale": 0}} for p in pairs], (40, 30))
    loss, grads = loss_and_grads(params, nothing, OBJECTIVES[1])
    assert loss == 0 and all((g == 0).all() for g in jax.tree.leaves(grads))


def test_reported_means_are_by_weight(params):
    """Weights 1000 and 500 report what 2 copies of the first and 1 of the second report."""
    first, second = examples(2)
    weighted = batch_of(
        [
            {**first, "weights": {"label": 1000, "rationale": 1000}},
            {**second, "weights": {"label": 500, "rationale": 500}},
        ],
        (40, 30),
    )
    copied = batch_of([first, first, second], (40, 30))
    forward = train.make_forward(t5.T5(TINY), params)
    reports = []
    for batch in (weighted, copied):
        counts = objectives.group_counts(batch)
        _, sums = OBJECTIVES[1](forward, batch, counts)
        reports.append(objectives.summarize(OBJECTIVES[1], sums, counts))
    assert reports[0].keys() == reports[1].keys()
    for name in reports[0]:
        np.testing.assert_allclose(reports[0][name], reports[1][name], rtol=1e-5, err_msg=name)


def test_alpha_weighs_the_groups_and_an_absent_group_adds_nothing(params):
    pairs = examples(4)
    batch = batch_of(pairs, (40, 30))
    by_alpha = {
        alpha: loss_only(params, batch, objectives.StepByStep(alpha=alpha, z_loss=0.0))
        for alpha in (0.0, 0.25, 1.0)
    }
    np.testing.assert_allclose(
        by_alpha[0.25], 0.25 * by_alpha[1.0] + 0.75 * by_alpha[0.0], rtol=1e-5
    )
    labels_only = dict(batch)
    labels_only["decoder_loss_weights"] = batch["decoder_loss_weights"] * (
        batch["decoder_loss_groups"] == 0
    )
    half = loss_only(params, labels_only, objectives.StepByStep(alpha=0.5, z_loss=0.0))
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


@pytest.mark.parametrize("kind", [objectives.StepByStep, objectives.Standard])
def test_large_logits_are_sliced_unless_told_otherwise(kind, monkeypatch):
    monkeypatch.setattr(estimate, "LOGITS_BYTES", 4 * 30 * 10)  # one row of 30 tokens, 10 ids
    objective, given = kind(), kind(logits_chunk=7)
    assert train.in_slices(objective, 1, 30, 10) is objective
    assert train.in_slices(objective, 2, 30, 10).logits_chunk == 15
    assert train.in_slices(objective, 1.1, 30, 10).logits_chunk == 15
    assert train.in_slices(objective, 4, 30, 10).logits_chunk == 8  # four slices
    assert train.in_slices(given, 4, 30, 10) is given
    assert train.in_slices(objective, 1000, 30, 10).logits_chunk == 1
