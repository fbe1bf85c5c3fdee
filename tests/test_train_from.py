"""Runs that start from weights of others: T5X, Hugging Face, and what was converted."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import MODEL, run, state_of

from distill import (
    checkpoints,
    convert,
    evaluate,
    export,
    optim,
    partitioning,
    scoring,
    t5,
    vocabulary,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Token caches, built once for all tests of this file."""
    return str(tmp_path_factory.mktemp("cache"))


def test_starts_from_a_t5x_checkpoint(shared, tmp_path, cache):
    sizes = json.loads((shared / "fixtures/t5x_tiny/config.json").read_text())
    del sizes["parameters"]
    folder = shared / "fixtures/t5x_tiny/checkpoint_dir/checkpoint_1000"
    model = t5.T5Config(**sizes, dtype="float32")
    result = run(
        tmp_path, cache, steps=None, train_steps_relative=1, initial_checkpoint_path=str(folder),
        model=model, checkpoint_period=1,
    )  # fmt: skip
    assert result.step == 1001
    before = convert.read_params(convert.open_weights(folder))
    after = state_of(tmp_path, 1001)
    embedding = after["['params']['token_embedder']['embedding']"]
    change = np.abs(embedding - before["token_embedder"]["embedding"]).max()
    assert 0 < change < 0.1


def test_starts_from_t5x_with_its_second_moments_and_from_hugging_face_without(tmp_path, cache):
    """The update from T5X's state is the one from that state, not from a fresh one."""
    model = dataclasses.replace(MODEL, emb_dim=128, mlp_dim=192, dropout_rate=0.0)
    params = t5.init_params(model, jax.random.key(1))
    tx = optim.Adafactor().build(3)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for seed in range(3):
        grads = jax.tree.map(lambda x, s=seed: 1e-3 * jnp.cos(x * (s + 1) * 1e3), params)
        _, state = update(grads, state, params)
    with checkpoints.Checkpointer(tmp_path / "ours") as saver:
        metadata = {"model": dataclasses.asdict(model), "step": 3}
        saver.save(3, {"params": params, "opt_state": state}, metadata)
    ours = convert.open_weights(str(tmp_path / "ours"), slots=True)
    starts = {3: export.save_t5x(tmp_path / "t5x", ours, model, 3, ours.slots), 0: tmp_path / "hf"}
    export.save_hugging_face(tmp_path / "hf", ours, model)
    ends = []
    for step, start in starts.items():
        folder = tmp_path / f"run_{step}"
        run(folder, cache, steps=None, train_steps_relative=1, model=model,
            initial_checkpoint_path=str(start))  # fmt: skip
        ends.append(state_of(folder, step + 1))
    with_slots, fresh = ends
    counts = [x for name, x in with_slots.items() if name.endswith("['0']['count']")]
    assert counts and all((x == 4).all() for x in counts)
    name = next(n for n in with_slots if re.search("v_row.*encoder.*layers.*mlp.*wo'", n))
    before = next(
        x for path, x in jax.tree_util.tree_leaves_with_path(state)
        if "v_row/encoder/layers/mlp/wo" in partitioning.path_name(path)
    )  # fmt: skip
    decay = 1 - 4.0**-0.8  # of the fourth update
    squares = (with_slots[name] - decay * before) / (1 - decay)
    # A fresh state forgets everything in its first update: it is the gradient's squares.
    np.testing.assert_allclose(squares, fresh[name], rtol=1e-3)
    assert np.abs(with_slots[name] / fresh[name] - 1).max() > 0.1


def test_a_converted_checkpoint_is_no_run_but_can_be_evaluated(tmp_path, cache):
    params = jax.tree.map(np.asarray, t5.init_params(MODEL, jax.random.key(0)))
    export.save_hugging_face(tmp_path / "hf", params, MODEL, vocabulary.load("bytes"))
    export.save_ours(tmp_path / "ours", convert.open_weights(str(tmp_path / "hf")))
    with pytest.raises(FileExistsError, match="holds a converted checkpoint, not a run"):
        run(tmp_path / "ours", cache)
    config = evaluate.EvaluateConfig(
        str(tmp_path / "ours"), answering=scoring.Answering(num_examples=2), cache_dir=cache
    )
    with pytest.raises(ValueError, match="MIXTURE_OR_TASK_NAME"):
        evaluate.evaluate(config)
    config = dataclasses.replace(config, mixture_or_task_name="arithmetic_predict")
    assert evaluate.evaluate(config)[0][1].n == 2
