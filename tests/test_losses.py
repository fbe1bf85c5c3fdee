"""The losses against plain numpy, and their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distill import losses


def numpy_cross_entropy(logits, targets, smoothing):
    """-sum_v q_v log p_v minus the entropy of q, written out."""
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    vocab = logits.shape[-1]
    q = np.full(logits.shape, smoothing / (vocab - 1))
    np.put_along_axis(q, targets[..., None], 1 - smoothing, axis=-1)
    return -(q * log_p).sum(-1) + (q * np.log(np.maximum(q, 1e-20))).sum(-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_numpy(smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, 5, 11)).astype(np.float32)
    targets = rng.integers(0, 11, (2, 5)).astype(np.int32)
    ce, z = losses.cross_entropy(logits, targets, z_loss=1e-2, label_smoothing=smoothing)
    np.testing.assert_allclose(ce, numpy_cross_entropy(logits, targets, smoothing), atol=1e-5)
    np.testing.assert_allclose(z, 1e-2 * np.log(np.exp(logits).sum(-1)) ** 2, rtol=1e-5)


def test_a_certain_and_right_prediction_has_no_loss():
    logits = jnp.array([[0.0, 100.0, 0.0]])
    ce, _ = losses.cross_entropy(logits, jnp.array([1]))
    np.testing.assert_allclose(ce, 0.0, atol=1e-6)


def test_cross_entropy_is_stable_and_float32():
    logits = jnp.array([[1e4, -1e4, 0.0]], jnp.bfloat16)
    ce, _ = losses.cross_entropy(logits, jnp.array([1]))
    assert ce.dtype == jnp.float32
    np.testing.assert_allclose(ce, 2e4, rtol=1e-2)


def test_gradient_is_softmax_minus_target():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (7,)).astype(np.float32)
    grad = jax.grad(lambda x: losses.cross_entropy(x, jnp.array(3))[0])(logits)
    want = np.exp(logits) / np.exp(logits).sum() - np.eye(7)[3]
    np.testing.assert_allclose(grad, want, atol=1e-6)


def test_sum_by_group_counts_real_tokens_once():
    values = jnp.array([[1.0, 2.0, 4.0], [8.0, jnp.nan, jnp.inf]])
    groups = jnp.array([[0, 1, 1], [0, 0, 1]])
    weights = jnp.array([[1, 1, 1], [1, 0, 0]])  # padding may hold anything
    np.testing.assert_array_equal(losses.sum_by_group(values, groups, weights, 2), [9.0, 6.0])


@pytest.mark.parametrize("chunk", [1, 3, 5, 8, 20])
def test_sum_in_chunks_is_the_sum_and_its_gradient(chunk):
    """Against the same without slices: values, and the gradients of states and of a closed-over."""
    rng = np.random.default_rng(0)
    states = jnp.asarray(rng.normal(size=(3, 8, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(4, 11)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 11, (3, 8)))
    weights = jnp.asarray(rng.integers(0, 3, (3, 8)), jnp.float32)

    def total(kernel, states, chunk=None):
        def part(states, targets, weights):
            ce, _ = losses.cross_entropy(states @ kernel, targets)
            return 0.3 * jnp.sum(ce * weights), {"weights": jnp.sum(weights)}

        rest = (targets, weights)
        if chunk is None:
            return part(states, *rest)
        return losses.sum_in_chunks(part, states, rest, chunk)

    def with_gradient(chunk):
        fn = jax.value_and_grad(lambda *x: total(*x, chunk), argnums=(0, 1), has_aux=True)
        return jax.jit(fn)(kernel, states)

    (want, sums), want_grads = with_gradient(None)
    (got, got_sums), got_grads = with_gradient(chunk)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(got_sums["weights"], sums["weights"])
    for got, want in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(total(kernel, states, chunk)[0], total(kernel, states)[0], rtol=1e-6)


def test_sum_in_chunks_holds_one_slice_of_the_logits():
    states, kernel = jnp.ones((2, 64, 4)), jnp.ones((4, 1000))
    rest = (jnp.zeros((2, 64), jnp.int32), jnp.ones((2, 64)))

    def loss(kernel, states):
        def part(states, targets, weights):
            ce, _ = losses.cross_entropy(states @ kernel, targets)
            return jnp.sum(ce * weights), ()

        return losses.sum_in_chunks(part, states, rest, 8)[0]

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(kernel, states).compile()
    one_slice, all_slices = 2 * 8 * 1000 * 4, 2 * 64 * 1000 * 4  # bytes
    assert one_slice < compiled.memory_analysis().temp_size_in_bytes < all_slices


def test_sum_in_chunks_adds_gradients_in_float32():
    """512 slices with a gradient of 1 each: in the kernel's own type the sum would stop at 256."""
    states, kernel = jnp.ones((1, 512, 2)), jnp.ones((2, 3), jnp.bfloat16)

    def loss(kernel):
        def part(states, weights):
            return jnp.sum(states @ kernel.astype(jnp.float32)), ()

        return losses.sum_in_chunks(part, states, (jnp.ones((1, 512)),), 1)[0]

    grad = jax.grad(loss)(kernel)
    assert grad.dtype == jnp.bfloat16 and (grad == 512).all()


@pytest.mark.parametrize("chunk", [1, 3, 5, 8, 20])
def test_max_by_segment_equals_numpy(chunk):
    rng = np.random.default_rng(0)
    values = rng.random((3, 8, 4)).astype(np.float32)
    values[0, 1] = values[0, 6]  # of equal ones the first counts
    segments = rng.integers(0, 5, (3, 8)).astype(np.int32)
    segments[0, [1, 6]] = 2
    largest, source = losses.max_by_segment(
        lambda x: x, jnp.asarray(values), jnp.asarray(segments), 6, chunk
    )
    for s in range(1, 7):
        numbers = np.flatnonzero(segments.reshape(-1) == s)
        if not len(numbers):
            assert (largest[s] == 0).all() and (source[s] > segments.size).all()
            continue
        of_segment = values.reshape(-1, 4)[numbers]
        np.testing.assert_array_equal(largest[s], of_segment.max(axis=0))
        np.testing.assert_array_equal(source[s], numbers[of_segment.argmax(axis=0)])
    assert not np.isin([5, 6], segments).any()  # two without tokens


def test_pooled_cross_entropy_equals_numpy_and_is_least_where_both_agree():
    rng = np.random.default_rng(0)
    rationale, label = rng.random((2, 3, 7)).astype(np.float32)
    log_q = rationale - np.log(np.exp(rationale).sum(-1, keepdims=True))
    got = losses.pooled_cross_entropy(rationale, label)
    np.testing.assert_allclose(got, -(label * log_q).sum(-1), rtol=1e-5)
    said, elsewhere = np.eye(7, dtype=np.float32)[[2, 3]]
    agree = losses.pooled_cross_entropy(said, said)
    assert agree < losses.pooled_cross_entropy(elsewhere, said)
