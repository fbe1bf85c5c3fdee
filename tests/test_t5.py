"""The network against T5X's own logits, its published sizes, and laws of masking and decoding."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill import configure, convert, t5, train

TINY = t5.T5Config(
    vocab_size=96, dtype="float32", emb_dim=32, num_heads=4, num_encoder_layers=2,
    num_decoder_layers=3, head_dim=8, mlp_dim=48, dropout_rate=0.0,
)  # fmt: skip


def numpy_params(config, seed=0, scale=0.3):
    """Parameters from numpy, which no change of JAX's random numbers can move."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, scale, x.shape), jnp.float32), t5.param_shapes(config)
    )


def batch_of(rng, rows, input_lengths, target_lengths, width=12, vocab=96):
    batch = {
        "encoder_input_tokens": np.zeros((rows, width), np.int32),
        "decoder_input_tokens": np.zeros((rows, width), np.int32),
        "decoder_target_tokens": np.zeros((rows, width), np.int32),
    }
    for r in range(rows):
        n, m = input_lengths[r], target_lengths[r]
        batch["encoder_input_tokens"][r, :n] = rng.integers(3, vocab, n)
        batch["decoder_target_tokens"][r, :m] = rng.integers(3, vocab, m)
        batch["decoder_input_tokens"][r, 1:m] = batch["decoder_target_tokens"][r, : m - 1]
    return batch


def pack_two(batch):
    """The first two rows of a batch as two segments of one row."""
    width = batch["encoder_input_tokens"].shape[1]
    out = {k: np.zeros((1, 2 * width), np.int32) for k in batch}
    for k in ("encoder_segment_ids", "decoder_segment_ids"):
        out[k] = np.zeros((1, 2 * width), np.int32)
    i = t = 0
    for r in range(2):
        n = int((batch["encoder_input_tokens"][r] > 0).sum())
        m = int((batch["decoder_target_tokens"][r] > 0).sum())
        out["encoder_input_tokens"][0, i : i + n] = batch["encoder_input_tokens"][r, :n]
        out["encoder_segment_ids"][0, i : i + n] = r + 1
        for k in ("decoder_input_tokens", "decoder_target_tokens"):
            out[k][0, t : t + m] = batch[k][r, :m]
        out["decoder_segment_ids"][0, t : t + m] = r + 1
        i, t = i + n, t + m
    return out


@pytest.mark.parametrize("name", ["expected", "expected_packed"])
def test_logits_equal_those_of_t5x(shared, name):
    folder = shared / "fixtures/t5x_tiny"
    sizes = json.loads((folder / "config.json").read_text())
    del sizes["parameters"]
    config = t5.T5Config(**sizes, dtype="float32")
    weights = convert.open_weights(folder / "checkpoint_dir/checkpoint_1000")
    assert weights.step == 1000
    with np.load(folder / f"{name}.npz") as recorded:
        batch = {k: jnp.asarray(v) for k, v in recorded.items() if k != "logits"}
        want = recorded["logits"]
    got = t5.T5(config).apply({"params": convert.load(weights, config)}, batch)
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("small", 76_961_152),
        ("base", 247_577_856),
        ("large", 783_150_080),
        ("xl", 2_849_757_184),
        ("xxl", 11_135_332_352),
    ],
)
def test_gin_file_of_each_size_has_the_published_parameter_count(name, count):
    arguments = configure.resolve(
        train.train,
        [f"t5_1_1/{name}.gin", "finetune.gin"],
        ["MODEL_DIR=unused", "MIXTURE_OR_TASK_NAME=unused"],
    ).arguments()
    assert t5.param_count(arguments["model"]) == count


def test_padding_changes_nothing():
    rng = np.random.default_rng(1)
    params = numpy_params(TINY)
    batch = batch_of(rng, 2, [5, 9], [3, 7])
    wide = {k: np.pad(v, ((0, 0), (0, 6))) for k, v in batch.items()}
    net = t5.T5(TINY)
    narrow, padded = (net.apply({"params": params}, b) for b in (batch, wide))
    real = batch["decoder_target_tokens"] > 0
    np.testing.assert_allclose(padded[:, :12][real], narrow[real], rtol=1e-5, atol=1e-5)


def test_packed_sequences_do_not_see_each_other():
    rng = np.random.default_rng(2)
    params = numpy_params(TINY)
    batch = batch_of(rng, 2, [5, 9], [3, 7])
    net = t5.T5(TINY)
    apart = net.apply({"params": params}, batch)
    together = net.apply({"params": params}, pack_two(batch))[0]
    np.testing.assert_allclose(together[:3], apart[0, :3], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(together[3:10], apart[1, :7], rtol=1e-4, atol=1e-4)


def test_a_token_depends_on_no_later_target():
    rng = np.random.default_rng(3)
    params = numpy_params(TINY)
    batch = batch_of(rng, 1, [6], [8])
    net = t5.T5(TINY)
    before = net.apply({"params": params}, batch)
    batch["decoder_input_tokens"][0, 5] += 1
    after = net.apply({"params": params}, batch)
    np.testing.assert_array_equal(before[0, :5], after[0, :5])
    assert np.abs(before[0, 5:8] - after[0, 5:8]).max() > 1e-3


@pytest.mark.parametrize("policy", ["minimal", "full"])
def test_remat_changes_memory_not_gradients(policy):
    rng = np.random.default_rng(4)
    batch = batch_of(rng, 2, [5, 9], [3, 7])
    params = numpy_params(TINY)

    def grads(config):
        def loss(p):
            return jnp.sum(jnp.square(t5.T5(config).apply({"params": p}, batch))) * 1e-3

        return jax.jit(jax.grad(loss)).lower(params).compile()

    plain = grads(TINY)
    remat = grads(dataclasses.replace(TINY, remat_policy=policy))
    for a, b in zip(jax.tree.leaves(plain(params)), jax.tree.leaves(remat(params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4)
    # Something is really recomputed: more exponentials (softmax) than without.
    count = [c.cost_analysis()["flops"] for c in (plain, remat)]
    assert count[1] > count[0]


def test_dropout_is_on_only_with_an_rng_and_spans_the_length():
    config = dataclasses.replace(TINY, dropout_rate=0.5)
    batch = batch_of(np.random.default_rng(5), 2, [5, 9], [3, 7])
    params = numpy_params(config)
    net = t5.T5(config)
    off = net.apply({"params": params}, batch)
    np.testing.assert_array_equal(off, t5.T5(TINY).apply({"params": params}, batch))
    on = net.apply({"params": params}, batch, rngs={"dropout": jax.random.key(0)})
    assert np.abs(on - off).max() > 1e-2
    drop = t5.Dropout(0.5)
    ones = drop.apply({}, jnp.ones((2, 7, 64)), rngs={"dropout": jax.random.key(1)})
    assert set(np.unique(ones)) == {0.0, 2.0}
    np.testing.assert_array_equal(ones, jnp.broadcast_to(ones[:, :1], ones.shape))


def test_t5_1_0_ties_logits_and_has_one_branch():
    config = dataclasses.replace(TINY, mlp_activations=("relu",), logits_via_embedding=True)
    names = {"/".join(k.key for k in p) for p, _ in
             jax.tree_util.tree_leaves_with_path(t5.param_shapes(config))}  # fmt: skip
    assert "encoder/layers/mlp/wi/kernel" in names
    assert "decoder/logits_dense/kernel" not in names
    params = numpy_params(config)
    batch = batch_of(np.random.default_rng(6), 1, [5], [4])
    states = t5.T5(config).apply({"params": params}, batch, method="states")
    logits = t5.T5(config).apply({"params": params}, batch)
    want = np.asarray(states) @ np.asarray(params["token_embedder"]["embedding"]).T / np.sqrt(32)
    np.testing.assert_allclose(logits, want, rtol=1e-4, atol=1e-4)


def test_relative_position_buckets():
    offsets = jnp.array([0, -1, 1, -7, 7, -8, -127, -128, -1000, 1000])
    both = t5.relative_position_buckets(offsets, bidirectional=True)
    np.testing.assert_array_equal(both, [0, 1, 17, 7, 23, 8, 15, 15, 15, 31])
    past = t5.relative_position_buckets(offsets, bidirectional=False)
    np.testing.assert_array_equal(past, [0, 1, 0, 7, 0, 8, 31, 31, 31, 0])


def test_initial_values_follow_t5x():
    config = t5.T5Config(vocab_size=512, emb_dim=256, num_heads=4, num_encoder_layers=3,
                         num_decoder_layers=2, head_dim=64, mlp_dim=512)  # fmt: skip
    p = t5.init_params(config, jax.random.key(0))
    attention = p["encoder"]["layers"]["attention"]
    fan_in = 1 / np.sqrt(256)
    assert np.std(p["token_embedder"]["embedding"]) == pytest.approx(1.0, rel=0.05)
    assert np.std(attention["key"]["kernel"]) == pytest.approx(fan_in, rel=0.05)
    assert np.std(attention["query"]["kernel"]) == pytest.approx(fan_in / 8, rel=0.05)
    assert np.std(p["decoder"]["logits_dense"]["kernel"]) == pytest.approx(fan_in, rel=0.05)
    # Layers of a stack differ: each has its own random numbers.
    assert np.abs(attention["key"]["kernel"][0] - attention["key"]["kernel"][1]).max() > 0.01


@pytest.mark.parametrize(
    "field,value",
    [("emb_dim", 0), ("dropout_rate", 1.0), ("mlp_activations", ("tanh",)), ("dtype", "float16"),
     ("remat_policy", "some"), ("attention", "flash")],
)  # fmt: skip
def test_bad_sizes_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        t5.T5Config(**{"vocab_size": 8, field: value})
