"""Decoding over an explicit cache of keys and values.

The loop holds the whole state: tokens so far, cache, which rows are finished. A step writes one
position of the cache and the loop ends as soon as every row has produced EOS.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from distill import t5

EOS = 1


@functools.partial(jax.jit, static_argnames=("model", "max_length"))
def greedy(params, encoder_input_tokens: jax.Array, *, model: t5.T5, max_length: int) -> jax.Array:
    """The most probable token at each step, until EOS.

    Args:
      params: the model's parameters.
      encoder_input_tokens: int32 [batch, length], one sequence a row, 0 = padding.
      model: the network.
      max_length: tokens to produce at most, EOS included.

    Returns:
      int32 [batch, max_length]; after a row's EOS all 0. A row that never ended has no EOS.
    """
    cfg, batch = model.config, encoder_input_tokens.shape[0]
    variables = {"params": params}
    cross, cross_bias = model.apply(variables, encoder_input_tokens, method="start_decoding")
    shape = (cfg.num_decoder_layers, batch, max_length, cfg.num_heads, cfg.head_dim)
    cache = (jnp.zeros(shape, cfg.compute_dtype), jnp.zeros(shape, cfg.compute_dtype))

    def not_done(state):
        position, _, _, finished, _ = state
        return (position < max_length) & ~jnp.all(finished)

    def step(state):
        position, last, output, finished, cache = state
        logits, new = model.apply(
            variables, last, position, cache, cross, cross_bias, method="decode_step"
        )
        cache = jax.tree.map(
            lambda old, one: jax.lax.dynamic_update_slice_in_dim(old, one, position, axis=2),
            cache, new,
        )  # fmt: skip
        token = jnp.where(finished, 0, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        output = jax.lax.dynamic_update_slice_in_dim(output, token[:, None], position, axis=1)
        return position + 1, token, output, finished | (token == EOS), cache

    # A row of padding only (the filler of a last batch) is finished before it starts.
    finished = ~jnp.any(encoder_input_tokens > 0, axis=1)
    start = jnp.zeros((batch,), jnp.int32)
    output = jnp.zeros((batch, max_length), jnp.int32)
    return jax.lax.while_loop(not_done, step, (jnp.int32(0), start, output, finished, cache))[2]


def length_buckets(lengths: np.ndarray, batch_size: int, multiple: int = 32):
    """Groups rows of like length, so that short ones are not padded to the longest.

    Args:
      lengths: tokens of each input, [n].
      batch_size: rows per batch.
      multiple: a batch's length is rounded up to a power of two times this, so that few programs
        are compiled.

    Yields:
      (indices of at most batch_size rows, padded length).
    """
    order = np.argsort(-lengths, kind="stable")  # the longest first: memory is known at once
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        padded = multiple
        while padded < lengths[rows[0]]:
            padded *= 2
        yield rows, padded
