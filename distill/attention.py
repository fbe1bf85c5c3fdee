"""Attention of T5 as fused kernels for GPUs: no array of scores in memory, forward or backward.

The general kernels do not serve T5 when it trains: its scores get a learned bias that every row of
the batch shares, whose gradient is a sum over the batch, and packed rows need a mask of each row's
own. Here the bias [h, q, k] and the segments [b, q], [b, k] go into the kernels as they are, and
the scores that both touch live in one block of queries times one block of keys at a time.

Written in Pallas for its Triton backend. Block letters: i counts blocks of queries, j blocks of
keys; everything else is as in `t5`: b batch, q query length, k key length, h heads, d head_dim.

Source: Dao 2023 (arXiv 2307.08691): the softmax is kept as a running maximum and sum, and the
backward pass recomputes the weights from the logarithm of the sum. The gradient of the bias is the
gradient of the scores, summed over b.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

Array = jax.Array

# Queries and keys of a block, at most: 64 x 64 scores and what goes with them fill the registers of
# 4 warps. And the bytes of a block of queries (of keys, of values), at most: several of them are in
# shared memory, of which small GPUs have 99 KiB.
BLOCK = 64
BLOCK_BYTES = 8192
# True makes `t5` run the kernels as JAX operations, on any device and slowly. For tests.
INTERPRET = False

# A score that may not be seen, and the least maximum a row can have. The second is larger, so that
# exp(score - maximum) is 0 even where a row sees no key at all.
MASKED = -1e30
LEAST = -1e20


def fused_attention(
    query: Array,
    keys: Array,
    values: Array,
    bias: Array | None,
    query_segments: Array,
    key_segments: Array,
    *,
    causal: bool = False,
    interpret: bool = False,
) -> Array:
    """softmax(query keys^T + bias) values, over the keys of each query's own segment.

    Scores are not scaled. They, the softmax and every gradient's sum are float32; products take
    their operands in the type of the values, at the precision that JAX uses for all products (TF32
    for float32 by default; see `jax_default_matmul_precision`). Nothing is added atomically, so
    equal inputs give equal bits.

    Padding (segment 0) is neither seen nor does it see: a query of padding, or one whose segment
    has no key, gives zeros, and passes no gradient. (`t5`'s other attention gives such a query the
    mean of all values. No loss depends on either.)

    Args:
      query: [b, q, h, d], float32 or bfloat16.
      keys: [b, k, h, d], of the same type.
      values: [b, k, h, d], of the same type.
      bias: [h, q, k], added to the scores of every row; None = nothing is added.
      query_segments: int32 [b, q], which packed sequence a query belongs to, from 1; 0 = padding.
      key_segments: int32 [b, k], likewise.
      causal: True hides the keys behind a query's own position; q and k count from the same start.
      interpret: True runs the kernels as JAX operations, on any device and slowly, for tests.

    Returns:
      [b, q, h, d] in the type of the values.
    """
    (q, k), d = (query.shape[1], keys.shape[1]), query.shape[3]
    # Triton's blocks are powers of 2, from 16 up. What is added is padding by its segment.
    width = max(16, pl.next_power_of_2(d))
    most = max(16, min(BLOCK, BLOCK_BYTES // (width * query.dtype.itemsize)))
    blocks = tuple(min(most, max(16, pl.next_power_of_2(n))) for n in (q, k))
    more_q, more_k, more_d = -q % blocks[0], -k % blocks[1], width - d
    out = _attention(
        _padded(query, 0, more_q, 0, more_d), _padded(keys, 0, more_k, 0, more_d),
        _padded(values, 0, more_k, 0, more_d),
        None if bias is None else _padded(bias.astype(jnp.float32), 0, more_q, more_k),
        _padded(query_segments, 0, more_q), _padded(key_segments, 0, more_k),
        blocks, causal, interpret,
    )  # fmt: skip
    return out[:, :q, :, :d]


def _padded(x: Array, *more: int) -> Array:
    """x with so many zeros behind the end of each axis; x itself where there are none to add."""
    return jnp.pad(x, [(0, n) for n in more]) if any(more) else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attention(query, keys, values, bias, query_segments, key_segments, blocks, causal, interpret):
    """`fused_attention` of whole blocks."""
    operands = (query, keys, values, bias, query_segments, key_segments)
    return _forward(*operands, blocks, causal, interpret)[0]


def _forward(query, keys, values, bias, query_segments, key_segments, blocks, causal, interpret):
    """The output, and what the backward pass needs."""
    operands = (query, keys, values, bias, query_segments, key_segments)
    visible = _visible_blocks(query_segments, key_segments, blocks, causal)
    out, log_sums = _call(
        _forward_kernel, "bqh", operands, [("bqhd", values.dtype), ("bhq", jnp.float32)],
        visible, blocks, causal, interpret,
    )  # fmt: skip
    return out, (operands, visible, out, log_sums)


def _backward(blocks, causal, interpret, residuals, d_out):
    operands, visible, out, log_sums = residuals
    query, keys, values, bias, *_ = operands
    # The sum over k of weight times its gradient, without either.
    mean = jnp.einsum("bqhd,bqhd->bhq", out, d_out, preferred_element_type=jnp.float32)
    operands = (*operands, d_out, log_sums, mean)
    rest = visible, blocks, causal, interpret
    (d_query,) = _call(_query_kernel, "bqh", operands, [("bqhd", query.dtype)], *rest)
    d_keys, d_values = _call(
        _keys_kernel, "bkh", operands, [("bkhd", keys.dtype), ("bkhd", values.dtype)], *rest
    )
    d_bias = None
    if bias is not None:
        (d_bias,) = _call(_bias_kernel, "qkh", operands, [("hqk", jnp.float32)], *rest)
    return d_query, d_keys, d_values, d_bias, None, None


_attention.defvjp(_forward, _backward)

# Axes of the operands, in order; the last three are the backward pass's.
AXES = ("bqhd", "bkhd", "bkhd", "hqk", "bq", "bk", "bqhd", "bhq", "bhq")


def _call(kernel, grid: str, operands, results, visible: Array, blocks, causal, interpret):
    """Runs a kernel once for every point of a grid.

    The grid has three of the axes b, q, k, h: a program works on one b, one block of q, one block
    of k, one h. It gets the whole of the axes that are not in the grid, and loops over one of them,
    from the first to the last step at which it sees anything.

    Args:
      kernel: takes references to the operands, to the span of its loop [2] and to the results.
      grid: letters of three axes; the first varies fastest from program to program.
      operands: the arrays of AXES, or the first of them; the bias may be None.
      results: (axes, dtype) of each array that is written.
      visible: from `_visible_blocks`.
      blocks: queries and keys of a block.
      causal: as in `fused_attention`.
      interpret: as in `fused_attention`.

    Returns:
      The results, a list of arrays.
    """
    sizes = dict(zip("bqhd", operands[0].shape, strict=True)) | {"k": operands[1].shape[1]}
    block_sizes = {"b": None, "h": None, "q": blocks[0], "k": blocks[1]}  # None: the axis goes
    counts = {axis: sizes[axis] // (block_sizes[axis] or 1) for axis in grid}

    def spec(axes: str) -> pl.BlockSpec:
        return pl.BlockSpec(
            tuple(block_sizes[a] if a in grid else sizes[a] for a in axes),
            lambda *program: tuple(program[grid.index(a)] if a in grid else 0 for a in axes),
        )

    (looped,) = (i for i, axis in enumerate("bqk") if axis not in grid)
    return pl.pallas_call(
        functools.partial(kernel, blocks=blocks, causal=causal),
        grid=tuple(counts[axis] for axis in grid),
        in_specs=[
            *(None if x is None else spec(axes) for axes, x in zip(AXES, operands, strict=False)),
            pl.BlockSpec((None, None, 2), lambda first, second, _: (first, second, 0)),
        ],
        out_specs=[spec(axes) for axes, _ in results],
        out_shape=[
            jax.ShapeDtypeStruct(tuple(sizes[a] for a in axes), dtype) for axes, dtype in results
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(*operands, _span(visible, looped))


def _visible_blocks(query_segments: Array, key_segments: Array, blocks, causal: bool) -> Array:
    """bool [b, i, j]: False where no query of block i sees a key of block j.

    By the smallest and largest segment of a block, so exact where segments stand in order, as
    packing leaves them; elsewhere some blocks are computed in vain.
    """

    def ranges(segments, block):
        segments = segments.reshape(segments.shape[0], -1, block)
        least = jnp.where(segments > 0, segments, jnp.iinfo(jnp.int32).max).min(axis=2)
        return least, segments.max(axis=2)

    (q_least, q_most), (k_least, k_most) = map(ranges, (query_segments, key_segments), blocks)
    visible = (q_least[:, :, None] <= k_most[:, None]) & (k_least[:, None] <= q_most[:, :, None])
    if causal:
        last_query = (jnp.arange(visible.shape[1]) + 1) * blocks[0] - 1
        first_key = jnp.arange(visible.shape[2]) * blocks[1]
        visible &= (last_query[:, None] >= first_key[None])[None]
    return visible


def _span(visible: Array, axis: int) -> Array:
    """First and one past the last True along an axis, int32 [.., .., 2]; (0, 0) where none is."""
    steps = visible.shape[axis]
    first = jnp.argmax(visible, axis=axis)
    end = steps - jnp.argmax(jnp.flip(visible, axis), axis=axis)
    seen = visible.any(axis=axis)
    return (jnp.stack([first, end], axis=-1) * seen[..., None]).astype(jnp.int32)


# --- Kernels --------------------------------------------------------------------------------------
# Every product of two blocks has one axis less than its operands have together; `axes` names it in
# both. Loops carry values, not references: they stay in registers.


def _dot(x: Array, y: Array, axes: tuple[int, int]) -> Array:
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _scores(query, keys, bias, query_segments, key_segments, i, j, causal) -> Array:
    """float32 scores of query block i and key block j; MASKED what may not be seen."""
    scores = _dot(query, keys, (1, 1))
    if bias is not None:
        scores += bias
    visible = (query_segments[:, None] == key_segments[None, :]) & (query_segments > 0)[:, None]
    if causal:
        rows, columns = scores.shape
        positions = i * rows + jnp.arange(rows), j * columns + jnp.arange(columns)
        visible &= positions[0][:, None] >= positions[1][None, :]
    return jnp.where(visible, scores, MASKED)


def _gradients(operands, i, j, causal) -> tuple[Array, Array]:
    """Weights and gradient of the scores of one block, float32 [q, k] each."""
    query, keys, values, bias, query_segments, key_segments, d_out, log_sums, mean = operands
    scores = _scores(query, keys, bias, query_segments, key_segments, i, j, causal)
    weights = jnp.exp(scores - log_sums[:, None])
    return weights, weights * (_dot(d_out, values, (1, 1)) - mean[:, None])


def _forward_kernel(
    q_ref, k_ref, v_ref, bias_ref, qs_ref, ks_ref, span_ref, out_ref, sums_ref, *, blocks, causal
):
    """One block of queries: loops over the blocks of keys."""
    i = pl.program_id(1)
    query, query_segments = q_ref[...], qs_ref[...]

    def step(j, carry):
        most, total, mixed = carry
        at = pl.ds(j * blocks[1], blocks[1])
        bias = None if bias_ref is None else bias_ref[:, at]
        scores = _scores(query, k_ref[at, :], bias, query_segments, ks_ref[at], i, j, causal)
        new_most = jnp.maximum(most, scores.max(axis=1))
        weights = jnp.exp(scores - new_most[:, None])
        shrink = jnp.exp(most - new_most)  # of what was summed under a smaller maximum
        values = v_ref[at, :]
        mixed = mixed * shrink[:, None] + _dot(weights.astype(values.dtype), values, (1, 0))
        return new_most, total * shrink + weights.sum(axis=1), mixed

    start = (
        jnp.full(query.shape[:1], LEAST, jnp.float32),
        jnp.zeros(query.shape[:1], jnp.float32),
        jnp.zeros(query.shape, jnp.float32),
    )
    most, total, mixed = jax.lax.fori_loop(span_ref[0], span_ref[1], step, start)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    out_ref[...] = (mixed / total[:, None]).astype(out_ref.dtype)
    # 0 where nothing was seen, so that the backward pass finds weights exp(MASKED - 0) = 0.
    sums_ref[...] = jnp.where(seen, most + jnp.log(total), 0.0)


def _query_kernel(*refs, blocks, causal):
    """The gradient of one block of queries: loops over the blocks of keys."""
    q_ref, k_ref, v_ref, bias_ref, qs_ref, ks_ref, d_out_ref, sums_ref, mean_ref, *rest = refs
    span_ref, d_query_ref = rest
    i = pl.program_id(1)
    query, query_segments = q_ref[...], qs_ref[...]
    of_queries = d_out_ref[...], sums_ref[...], mean_ref[...]

    def step(j, d_query):
        at = pl.ds(j * blocks[1], blocks[1])
        keys, values = k_ref[at, :], v_ref[at, :]
        bias = None if bias_ref is None else bias_ref[:, at]
        operands = (query, keys, values, bias, query_segments, ks_ref[at], *of_queries)
        _, d_scores = _gradients(operands, i, j, causal)
        return d_query + _dot(d_scores.astype(keys.dtype), keys, (1, 0))

    zeros = jnp.zeros(query.shape, jnp.float32)
    d_query = jax.lax.fori_loop(span_ref[0], span_ref[1], step, zeros)
    d_query_ref[...] = d_query.astype(d_query_ref.dtype)


def _keys_kernel(*refs, blocks, causal):
    """The gradients of one block of keys and of its values: loops over the blocks of queries."""
    q_ref, k_ref, v_ref, bias_ref, qs_ref, ks_ref, d_out_ref, sums_ref, mean_ref, *rest = refs
    span_ref, d_keys_ref, d_values_ref = rest
    j = pl.program_id(1)
    keys, values, key_segments = k_ref[...], v_ref[...], ks_ref[...]

    def step(i, carry):
        d_keys, d_values = carry
        at = pl.ds(i * blocks[0], blocks[0])
        query, d_out = q_ref[at, :], d_out_ref[at, :]
        bias = None if bias_ref is None else bias_ref[at, :]
        operands = (query, keys, values, bias, qs_ref[at], key_segments, d_out, sums_ref[at],
                    mean_ref[at])  # fmt: skip
        weights, d_scores = _gradients(operands, i, j, causal)
        d_keys += _dot(d_scores.astype(query.dtype), query, (0, 0))
        d_values += _dot(weights.astype(d_out.dtype), d_out, (0, 0))
        return d_keys, d_values

    zeros = jnp.zeros(keys.shape, jnp.float32)
    d_keys, d_values = jax.lax.fori_loop(span_ref[0], span_ref[1], step, (zeros, zeros))
    d_keys_ref[...] = d_keys.astype(d_keys_ref.dtype)
    d_values_ref[...] = d_values.astype(d_values_ref.dtype)


def _bias_kernel(*refs, blocks, causal):
    """The gradient of one block of the bias: loops over the rows of the batch, so the sum needs no
    atomic addition and is the same every time."""
    q_ref, k_ref, v_ref, bias_ref, qs_ref, ks_ref, d_out_ref, sums_ref, mean_ref, *rest = refs
    span_ref, d_bias_ref = rest
    i, j = pl.program_id(0), pl.program_id(1)
    bias = bias_ref[...]

    def step(b, d_bias):
        operands = (q_ref[b], k_ref[b], v_ref[b], bias, qs_ref[b], ks_ref[b], d_out_ref[b],
                    sums_ref[b], mean_ref[b])  # fmt: skip
        return d_bias + _gradients(operands, i, j, causal)[1]

    zeros = jnp.zeros(blocks, jnp.float32)
    d_bias_ref[...] = jax.lax.fori_loop(span_ref[0], span_ref[1], step, zeros)
