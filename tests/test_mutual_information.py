"""The mutual-information term: equal to the released formula, whatever the packing or the mesh."""

import dataclasses
import functools
import json
import subprocess
import sys

import hugging_face_t5
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_objectives import assert_close, batch_of, examples
from test_t5 import TINY, numpy_params

from distill import configure, estimate, objectives, optim, partitioning, plan, t5, train

BETA = 2.0  # so that the term is a good part of the loss and of its gradient
WITH = objectives.StepByStep(alpha=0.3, z_loss=1e-3, mutual_information=BETA)
WITHOUT = objectives.StepByStep(alpha=0.3, z_loss=1e-3)


@pytest.fixture(scope="module")
def params():
    """A model that compiles in no time: logits of the token before alone."""
    rng = np.random.default_rng(0)
    shapes = {"embedding": (96, 8), "kernel": (8, 96)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def forward_of(params):
    return objectives.Forward(
        states=lambda batch: jnp.tanh(params["embedding"][batch["decoder_input_tokens"]]),
        unembed=lambda states: states @ params["kernel"],
    )


def paired(pairs, lengths=(40, 30), **settings):
    return batch_of(pairs, lengths, with_pair_ids=True, **settings)


def numpy_term(params, pairs):
    """Mean over pairs of - sum_v label_v log softmax(rationale)_v, each a maximum."""
    values, weights = [], []
    for pair in pairs:
        pools = {}
        for name in ("label", "rationale"):
            shifted = np.append(0, pair[name][1][:-1])
            logits = np.float64(np.tanh(params["embedding"][shifted]) @ params["kernel"])
            pools[name] = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).max(axis=0)
        log_q = pools["rationale"] - np.log(np.exp(pools["rationale"]).sum())
        values.append(-(pools["label"] * log_q).sum())
        weights.append(min(pair.get("weights", {"": 1000}).values()))
    return np.average(values, weights=weights)


@functools.partial(jax.jit, static_argnames="objective")
def report(params, batch, objective):
    """((loss, its metrics), gradients)."""

    def loss(params):
        counts = objectives.group_counts(batch)
        loss, sums = objective(forward_of(params), batch, counts)
        return loss, objectives.summarize(objective, sums, counts)

    return jax.value_and_grad(loss, has_aux=True)(params)


def term_of(params, batch, objective=WITH):
    """(value, gradients) of the weighted term alone."""
    (loss, _), grads = report(params, batch, objective)
    (plain, _), without = report(params, batch, WITHOUT)
    return loss - plain, jax.tree.map(jnp.subtract, grads, without)


def test_value_is_the_formula_packed_or_not(params):
    pairs = examples()
    want, before = numpy_term(params, pairs), None
    for lengths in [(13, 15), (40, 30), (120, 90)]:
        batch = paired(pairs, lengths)
        (loss, scalars), grads = report(params, batch, WITH)
        (plain, parts), _ = report(params, batch, WITHOUT)
        np.testing.assert_allclose(scalars["mutual_information"], want, rtol=1e-5)
        np.testing.assert_allclose(loss, plain + BETA * want, rtol=1e-5)
        np.testing.assert_allclose(scalars["loss"], loss, rtol=1e-5)
        for name in parts.keys() - {"loss"}:
            np.testing.assert_allclose(scalars[name], parts[name], rtol=1e-5, err_msg=name)
        assert_close((loss, grads), before or (loss, grads))
        before = loss, grads


def test_gradient_is_that_of_the_plain_formula(params):
    pairs = examples(4)

    def pool(params, target):
        logits = jnp.tanh(params["embedding"][np.append(0, target[:-1])]) @ params["kernel"]
        return jax.nn.softmax(logits).max(axis=0)

    def term(params):
        total = 0.0
        for pair in pairs:
            label = jax.lax.stop_gradient(pool(params, pair["label"][1]))
            total -= jnp.sum(label * jax.nn.log_softmax(pool(params, pair["rationale"][1])))
        return BETA * total / len(pairs)

    want = jax.value_and_grad(term)(params)
    assert_close(term_of(params, paired(pairs)), want)
    assert all(float(jnp.abs(g).max()) > 1e-2 for g in want[1].values())


PUBLISHED = """
import sys, numpy as np, torch
given = np.load(sys.argv[1])
label, rationale = (torch.tensor(given[n], requires_grad=True) for n in ("label", "rationale"))
pools = [x.softmax(-1).amax(-2) for x in (rationale, label.detach())]
loss = torch.nn.functional.cross_entropy(*pools)
loss.backward()
np.savez(sys.argv[2], loss=loss.detach(), gradient=rationale.grad, none=label.grad is None)
"""


def test_value_and_gradient_are_torchs(tmp_path):
    """As released, on logits without padding: `CrossEntropyLoss` of maxima over positions."""
    hugging_face_t5.require_torch()
    rng = np.random.default_rng(0)
    label, rationale = (rng.normal(0, 2, (5, n, 11)).astype(np.float32) for n in (2, 6))
    np.savez(tmp_path / "in.npz", label=label, rationale=rationale)
    command = [sys.executable, "-c", PUBLISHED, tmp_path / "in.npz", tmp_path / "out.npz"]
    subprocess.run(command, check=True)
    want = np.load(tmp_path / "out.npz")
    logits = jnp.concatenate([label, rationale], axis=1)
    ones = np.ones((5, 8), np.int32)
    batch = {
        "decoder_target_tokens": ones,
        "decoder_loss_weights": ones,
        "decoder_loss_groups": ones * (np.arange(8) >= 2),
        "decoder_pair_ids": ones * np.arange(1, 6)[:, None],
    }
    counts = objectives.group_counts(batch)

    def term(logits, beta):
        forward = objectives.Forward(lambda _: logits, lambda states: states)
        return objectives.StepByStep(mutual_information=beta)(forward, batch, counts)[0]

    (loss, grads), (plain, without) = (
        jax.jit(jax.value_and_grad(functools.partial(term, beta=beta)))(logits) for beta in (1.0, 0)
    )
    assert want["none"]
    np.testing.assert_allclose(loss - plain, want["loss"], rtol=1e-5)
    np.testing.assert_allclose((grads - without)[:, 2:], want["gradient"], atol=1e-7)
    np.testing.assert_allclose((grads - without)[:, :2], 0, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 7, 30])
def test_slices_of_the_logits_change_nothing(params, chunk):
    batch = paired(examples())
    (want, metrics), grads = report(params, batch, WITH)
    objective = dataclasses.replace(WITH, logits_chunk=chunk)
    (got, sliced), sliced_grads = report(params, batch, objective)
    assert_close((got, sliced_grads), (want, grads))
    for name in metrics:
        np.testing.assert_allclose(sliced[name], metrics[name], rtol=1e-5, err_msg=name)


def test_slices_hold_no_more_than_one_of_the_logits():
    """The pools of two pairs are small here; all logits of 64 positions are not."""
    states, kernel = jnp.ones((2, 64, 4)), jnp.ones((4, 1000))
    ids = np.repeat([[1], [2]], 64, axis=1).astype(np.int32)
    batch = {
        "decoder_target_tokens": ids,
        "decoder_loss_weights": np.ones_like(ids),
        "decoder_loss_groups": (np.arange(64) % 64 > 9).astype(np.int32) * np.ones_like(ids),
        "decoder_pair_ids": ids,
    }
    counts = objectives.group_counts(batch)
    objective = objectives.StepByStep(mutual_information=0.1, max_pairs=2, logits_chunk=8)

    def loss(kernel, states):
        forward = objectives.Forward(lambda _: states, lambda x: x @ kernel)
        return objective(forward, batch, counts)[0]

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(kernel, states).compile()
    all_logits = 2 * 64 * 1000 * 4  # bytes
    assert compiled.memory_analysis().temp_size_in_bytes < all_logits


def test_a_pair_without_one_of_its_streams_adds_nothing(params):
    whole, other = examples(4), examples(2, seed=9)
    halves = [{"label": other[0]["label"]}, {"rationale": other[1]["rationale"]}]
    (_, scalars), _ = report(params, paired([halves[0], *whole, halves[1]]), WITH)
    want = numpy_term(params, whole)
    np.testing.assert_allclose(scalars["mutual_information"], want, rtol=1e-5)
    value, grads = term_of(params, paired(halves))
    assert value == 0 and all((g == 0).all() for g in grads.values())


@pytest.mark.parametrize("max_pairs", [None, 4, 9])
def test_a_pair_weighs_as_its_lighter_sequence(params, max_pairs):
    """With room for just so many pairs, or for more."""
    weights = [(1000, 500), (1000, 1000), (0, 1000), (300, 700)]
    pairs = [
        {**pair, "weights": {"label": a, "rationale": b}}
        for pair, (a, b) in zip(examples(4), weights, strict=True)
    ]
    objective = dataclasses.replace(WITH, max_pairs=max_pairs)
    (_, scalars), _ = report(params, paired(pairs), objective)
    want = numpy_term(params, pairs)
    np.testing.assert_allclose(scalars["mutual_information"], want, rtol=1e-5)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_devices_that_share_the_pairs_change_nothing(params, devices):
    arrays = paired(examples(8, seed=3), (16, 16), row_multiple=8)
    want = report(params, arrays, WITH)
    mesh = partitioning.make_mesh(partitioning.MeshConfig(), jax.devices()[:devices])
    everywhere = jax.device_put(params, partitioning.replicated(mesh))
    got = report(everywhere, partitioning.shard_batch(mesh, arrays), WITH)
    assert_close((got[0][0], got[1]), (want[0][0], want[1]))
    for name in want[0][1]:
        np.testing.assert_allclose(got[0][1][name], want[0][1][name], rtol=1e-5, err_msg=name)


@functools.cache
def updated(data, fsdp, tensor):
    """Scalars and parameters of a T5 after one step of plain gradient descent on a mesh."""
    devices = jax.devices()[: data * fsdp * tensor]
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data, fsdp, tensor), devices)
    arrays = paired(examples(8, seed=3), (16, 16), row_multiple=8)
    tx = optax.sgd(1.0)
    places = train.abstract_state(t5.T5(TINY), tx, mesh).params
    params = jax.tree.map(
        lambda x, place: jax.device_put(x, place.sharding), numpy_params(TINY, scale=0.2), places
    )
    state = train.TrainState(jnp.int32(0), params, tx.init(params))
    net = t5.T5(TINY, partitioning.activation_constraint(mesh))
    objective = dataclasses.replace(WITH, mutual_information=100.0, logits_chunk=6)
    step = train.jit_step(net, objective, tx, 1)
    state, scalars = step(state, partitioning.shard_batch(mesh, arrays), jax.random.key(0))
    return jax.device_get((scalars, state.params))


def test_nor_does_a_mesh_that_cuts_the_vocabulary():
    want, got = updated(1, 1, 1), updated(2, 2, 2)
    for name in want[0]:
        np.testing.assert_allclose(got[0][name], want[0][name], rtol=1e-5, err_msg=name)
    assert_close((0.0, got[1]), (0.0, want[1]))


def test_without_weight_it_costs_nothing(params):
    """Then neither the program nor the metrics know of it."""
    plain = batch_of(examples(4), (40, 30))
    zero = dataclasses.replace(WITHOUT, mutual_information=0.0, max_pairs=7)
    programs = [report.lower(params, plain, o).as_text() for o in (WITHOUT, zero)]
    assert programs[0] == programs[1]
    assert "decoder_pair_ids" not in plain
    assert "mutual_information" not in report(params, plain, WITHOUT)[0][1]


def test_what_does_not_fit_is_an_error_that_names_the_fix(params):
    batch = paired(examples(4), (16, 16), row_multiple=2)
    state = train.TrainState(jnp.int32(0), params, ())
    with pytest.raises(ValueError, match="NUM_MICROBATCHES=1"):
        train.train_step(
            state, batch, jax.random.key(0), net=t5.T5(TINY), objective=WITH,
            tx=optax.identity(), num_microbatches=2,
        )  # fmt: skip
    del batch["decoder_pair_ids"]
    with pytest.raises(ValueError, match="with_pair_ids=True"):
        report(params, batch, WITH)
    for wrong in (dict(mutual_information=-0.1), dict(max_pairs=0)):
        with pytest.raises(ValueError, match="MI_WEIGHT|max_pairs"):
            objectives.StepByStep(**wrong)


def test_a_plan_needs_the_number_of_pairs():
    work = estimate.Work(8, 16, 16)
    setup = plan.Setup(TINY, optim.Adafactor(), WITH, partitioning.MeshConfig(1, 1, 1), work)
    device = jax.devices()[:1]
    with pytest.raises(ValueError, match="max_pairs"):
        plan.lower_train(setup, device)
    given = objectives.StepByStep(mutual_information=0.1, max_pairs=5)
    lowered = plan.lower_train(dataclasses.replace(setup, objective=given), device)
    assert "11x96xf32" in lowered.as_text()  # 2 x 5 + 1 pools


def test_a_run_trains_with_it(tmp_path, capsys, monkeypatch):
    """In one part, also on a CPU that would take several."""
    monkeypatch.setattr(train, "CPU_TOKENS_PER_MICROBATCH", 128)
    flags = [
        "--gin_file=t5_1_1/tiny.gin", "--gin_file=quickstart.gin",
        "--gin.MIXTURE_OR_TASK_NAME=arithmetic_step_by_step", "--gin.MI_WEIGHT=0.1",
        f"--gin.MODEL_DIR={tmp_path / 'run'}", f"--gin.CACHE_DIR={tmp_path / 'cache'}",
        "--gin.PAIRS_PER_STEP=8", "--gin.TRAIN_STEPS=4", "--gin.EVAL_STEPS=1",
        "--gin.EVALUATOR_NUM_EXAMPLES=2", "--gin.NUM_TRAIN_EXAMPLES=40",
        "--gin.TrainConfig.stats_period=1",
    ]  # fmt: skip
    configure.execute(train.train, ["train.py", *flags])
    printed = capsys.readouterr().out
    assert "1 micro-batch, at most 8 pairs" in printed
    for kind in ("train", "training_eval/arithmetic_step_by_step/validation"):
        lines = (tmp_path / "run" / kind / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines if "mutual_information" in line]
        assert found, kind
        for of_step in found:
            want = of_step["cross_ent_loss"] + 0.1 * of_step["mutual_information"]
            np.testing.assert_allclose(of_step["loss"], want, rtol=1e-5)
