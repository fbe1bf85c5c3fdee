"""The fused attention, interpreted on the CPU, against the formula in float64 and the plain one."""

import contextlib
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_t5 import TINY, batch_of, numpy_params, pack_two

from distill import attention, objectives, partitioning, t5, train


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels on a CPU, with blocks so small that rows of a test have several."""
    monkeypatch.setattr(attention, "INTERPRET", True)
    monkeypatch.setattr(attention, "BLOCK", 16)


def packed(rng, rows: int, length: int) -> np.ndarray:
    """Segments [rows, length]: two to four a row, then padding."""
    result = np.zeros((rows, length), np.int32)
    for row in result:
        ends = np.sort(rng.choice(np.arange(1, length), rng.integers(2, 5), replace=False))
        row[: ends[-1]] = 1 + np.searchsorted(ends[:-1], np.arange(ends[-1]), side="right")
    return result


def formula(query, keys, values, bias, query_segments, key_segments, d_out, causal):
    """Output and gradients of (query, keys, values, bias) by the formula, float64 numpy."""
    query, keys, values, d_out = (
        np.asarray(x.astype(np.float32), np.float64) for x in (query, keys, values, d_out)
    )
    visible = query_segments[:, None, :, None] == key_segments[:, None, None, :]
    visible &= query_segments[:, None, :, None] > 0
    if causal:
        visible &= np.tri(*visible.shape[2:], dtype=bool)
    scores = np.einsum("bqhd,bkhd->bhqk", query, keys) + (0 if bias is None else bias)
    weights = np.where(visible, np.exp(scores - scores.max(axis=3, keepdims=True)), 0)
    weights /= np.maximum(weights.sum(axis=3, keepdims=True), 1e-300)
    d_weights = np.einsum("bqhd,bkhd->bhqk", d_out, values)
    mean = (weights * d_weights).sum(axis=3, keepdims=True)
    d_scores = weights * (d_weights - mean)
    return (
        np.einsum("bhqk,bkhd->bqhd", weights, values),
        np.einsum("bhqk,bkhd->bqhd", d_scores, keys),
        np.einsum("bhqk,bqhd->bkhd", d_scores, query),
        np.einsum("bhqk,bqhd->bkhd", weights, d_out),
        None if bias is None else d_scores.sum(axis=0),
    )


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        ("encoder", "float32", 1e-5),
        ("decoder", "float32", 1e-5),
        ("cross", "float32", 1e-5),
        ("decoder", "bfloat16", 3e-2),
    ],
)
def test_output_and_gradients_are_those_of_the_formula(interpreted, kind, dtype, tolerance):
    rng = np.random.default_rng(0)
    rows, q, h, d = 3, 37, 2, 8
    k = 53 if kind == "cross" else q
    query, keys, values, d_out = (
        jnp.asarray(rng.normal(size=(rows, n, h, d)), dtype) for n in (q, k, k, q)
    )
    bias = None if kind == "cross" else rng.normal(size=(h, q, k)).astype(np.float32)
    query_segments = packed(rng, rows, q)
    key_segments = packed(rng, rows, k) if kind == "cross" else query_segments
    if kind == "cross":
        query_segments[0, 5:9] = 7  # a segment without keys
    causal = kind == "decoder"

    @jax.jit
    def fused(query, keys, values, bias, d_out):
        def forward(*operands):
            return attention.fused_attention(
                *operands, query_segments, key_segments, causal=causal, interpret=True
            )

        out, back = jax.vjp(forward, query, keys, values, bias)
        return out, *back(d_out)

    got = fused(query, keys, values, bias, d_out)
    want = formula(query, keys, values, bias, query_segments, key_segments, d_out, causal)
    for x, y in zip(got, want, strict=True):
        if y is not None:
            assert x.dtype == (np.float32 if y.ndim == 3 else dtype)
            np.testing.assert_allclose(np.asarray(x, np.float64), y, atol=tolerance * abs(y).max())
    assert not np.asarray(got[0], np.float32)[query_segments == 0].any()


def test_blocks_that_see_nothing_are_left_out():
    segments = np.array([[1] * 16 + [2] * 20 + [0] * 12], np.int32)
    seen = attention._visible_blocks(segments, segments, (16, 16), causal=True)
    np.testing.assert_array_equal(seen, [[[1, 0, 0], [0, 1, 0], [0, 1, 1]]])
    np.testing.assert_array_equal(attention._span(seen, 2), [[[0, 1], [1, 2], [1, 3]]])
    np.testing.assert_array_equal(attention._span(seen, 1), [[[0, 1], [1, 3], [2, 3]]])
    nothing = attention._visible_blocks(segments, 0 * segments, (16, 16), causal=False)
    assert not attention._span(nothing, 2).any()


def test_dropout_of_values_is_dropout_of_weights(interpreted):
    """With the same rng the same keys are dropped."""
    config = dataclasses.replace(TINY, dropout_rate=0.5)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(2, 12, config.emb_dim)), jnp.float32)
    segments = packed(rng, 2, 12)

    class SelfAttention(nn.Module):
        config: t5.T5Config

        @nn.compact
        def __call__(self, x):
            bias = t5._attention_bias(self.config, None, segments, segments)
            attend = t5.Attention(self.config, None)
            return attend(x, attend.keys_values(x), bias)

    params = SelfAttention(config).init(jax.random.key(0), x)
    fused = dataclasses.replace(config, attention="fused")
    key = {"dropout": jax.random.key(1)}
    off, want, got = (
        np.asarray(SelfAttention(c).apply(params, x, rngs=rngs))[segments > 0]
        for c, rngs in ((config, None), (config, key), (fused, key))
    )
    assert np.abs(want - off).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-5)


def loss_and_gradients(config, params, batch, constrain=None, dropout=False):
    """Under jit, of the objective that training uses."""
    net = t5.T5(config, constrain)
    rng = jax.random.key(3) if dropout else None

    def loss(params, batch):
        counts = objectives.group_counts(batch)
        forward = train.make_forward(net, params, rng)
        return objectives.StepByStep(alpha=0.5)(forward, batch, counts)[0]

    lowered = jax.jit(jax.value_and_grad(loss)).lower(params, batch)
    # Interpreted kernels are much code that runs once: compiling it well would take longest.
    return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})(params, batch)


def packed_batch(rows: int):
    """`rows` packed rows of two sequences, one of each loss group."""
    rng = np.random.default_rng(2)
    drawn = [pack_two(batch_of(rng, 2, [5, 9], [3, 7])) for _ in range(rows)]
    batch = {key: np.concatenate([row[key] for row in drawn]) for key in drawn[0]}
    segments = batch["decoder_segment_ids"]
    batch["decoder_loss_groups"] = np.maximum(segments - 1, 0)
    batch["decoder_loss_weights"] = (segments > 0).astype(np.int32)
    return batch


def test_training_is_that_of_plain_attention(interpreted):
    """Also where the backward pass computes it anew, with dropout."""
    config = dataclasses.replace(TINY, remat_policy="minimal", dropout_rate=0.3)
    params, batch = numpy_params(config, scale=0.2), packed_batch(2)
    fused = dataclasses.replace(config, attention="fused")
    want, got = (loss_and_gradients(c, params, batch, dropout=True) for c in (config, fused))
    assert_close(got, want)


def test_training_on_a_mesh(interpreted):
    """Rows over data and fsdp, heads over tensor; the bias' gradient is summed over the rows."""
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=2, fsdp=2, tensor=2))
    params, batch = numpy_params(TINY, scale=0.2), packed_batch(4)
    want = loss_and_gradients(TINY, params, batch)
    shardings = partitioning.param_shardings(mesh, params, t5.param_axes(TINY))
    config = dataclasses.replace(TINY, attention="fused")
    got = loss_and_gradients(
        config, jax.device_put(params, shardings), partitioning.shard_batch(mesh, batch),
        partitioning.activation_constraint(mesh),
    )  # fmt: skip
    assert_close(got, want)


def assert_close(got, want):
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    leaves = zip(jax.tree.leaves(got[1]), jax.tree.leaves(want[1]), strict=True)
    for x, y in leaves:
        np.testing.assert_allclose(x, y, atol=1e-4 * float(jnp.abs(y).max()))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_become_triton_programs(dtype):
    """At real sizes, without a GPU. What they compute is not tested here."""
    rows, length, h, d = 8, 1024, 16, 64
    x = jax.ShapeDtypeStruct((rows, length, h, d), dtype)
    bias = jax.ShapeDtypeStruct((h, length, length), jnp.float32)
    segments = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def gradients(query, keys, values, bias, segments, d_out):
        fused = functools.partial(attention.fused_attention, causal=True)
        out, back = jax.vjp(
            lambda *operands: fused(*operands, segments, segments), query, keys, values, bias
        )
        return out, back(d_out)

    # jax 0.12 wants to know which GPU; 0.10 takes one if there is none.
    device = contextlib.nullcontext()
    if hasattr(jax.sharding, "AbstractDevice") and hasattr(jax.sharding, "use_abstract_mesh"):
        gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
        device = jax.sharding.use_abstract_mesh(
            jax.sharding.AbstractMesh((), (), abstract_device=gpu)
        )
    with device:
        traced = jax.jit(gradients).trace(x, x, x, bias, segments, x)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("forward", "query", "keys", "bias"):
        assert f'name = "{kernel}_kernel"' in text
    assert text.count("__gpu$xla.gpu.triton") == 4


def test_fused_without_a_gpu_is_an_error():
    config = dataclasses.replace(TINY, attention="fused")
    batch = batch_of(np.random.default_rng(0), 1, [5], [4])
    assert t5.param_count(config) == t5.param_count(TINY)
    with pytest.raises(ValueError, match="attention='fused' is for GPUs.*attention=plain"):
        t5.T5(config).apply({"params": numpy_params(config)}, batch)
