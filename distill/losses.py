"""Losses as pure functions of arrays; every one returns per-token values, none averages."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def cross_entropy(
    logits: Array, targets: Array, *, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[Array, Array]:
    """Cross entropy of each token, and its z-loss.

        ce = logsumexp(logits) - sum_v q_v logits_v  - H(q)
        z  = z_loss * logsumexp(logits)^2

    q puts 1 - label_smoothing on the target and spreads the rest evenly over the other ids; its
    entropy H(q) is subtracted as in T5X, so that a perfect prediction has loss 0.

    Args:
      logits: [..., vocab]; computed in float32 whatever their type.
      targets: integer ids, [...].
      z_loss: weight of the squared log-partition, which keeps logits near 0 (T5X: 1e-4).
      label_smoothing: probability moved off the target, in [0, 1).

    Returns:
      (ce, z), both float32 [...], in nats. The loss of T5X is their sum.
    """
    logits = logits.astype(jnp.float32)
    vocab = logits.shape[-1]
    log_z = jax.nn.logsumexp(logits, axis=-1)
    # Compare and reduce instead of a gather, whose gradient would be a scatter into [..., vocab].
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    target_logit = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
    ce = log_z - target_logit
    if label_smoothing:
        others = label_smoothing / (vocab - 1)
        confidence = 1.0 - label_smoothing
        expected_logit = (confidence - others) * target_logit + others * jnp.sum(logits, axis=-1)
        entropy = -(
            confidence * jnp.log(confidence) + (vocab - 1) * others * jnp.log(others + 1e-20)
        )
        ce = log_z - expected_logit - entropy
    return ce, z_loss * jnp.square(log_z)


def sum_by_group(values: Array, groups: Array, weights: Array, num_groups: int) -> Array:
    """Weighted sums of per-token values within each loss group.

    Args:
      values: [batch, length].
      groups: int32 [batch, length], the loss group of each token, in [0, num_groups).
      weights: [batch, length], >= 0; what has weight 0, such as padding, may hold anything.
      num_groups: G.

    Returns:
      float32 [G].
    """
    weights = weights.astype(jnp.float32)
    kept = jnp.where(weights > 0, values.astype(jnp.float32) * weights, 0.0)
    return jnp.stack([jnp.sum(jnp.where(groups == g, kept, 0.0)) for g in range(num_groups)])


def sum_in_chunks(
    fn: Callable[..., tuple[Array, Any]], states: Array, rest: tuple[Array, ...], chunk: int
) -> tuple[Array, Any]:
    """Sums `fn` over slices of the length, holding what it makes of one slice at a time.

    With logits of [batch, length, vocab] that is most of the memory of a small model. Under
    differentiation the gradient of a slice is taken as soon as the slice is computed, so nothing
    is computed twice, as recomputation would; what is kept is the gradient of `states` and one
    sum for each parameter that `fn` uses.

    Args:
      fn: (states, *rest) of a slice -> (scalar, tree of sums), both sums over tokens. It may close
        over parameters. A token for which all of `rest` is 0 must add nothing: such fill the last
        slice.
      states: float [batch, length, embed]; the scalar is differentiated with respect to it.
      rest: arrays [batch, length], not differentiated.
      chunk: tokens of the length in a slice.

    Returns:
      What fn gives for all of it. The tree has no gradient.
    """
    parts = _slices((states, *rest), chunk)
    first = jax.tree.map(lambda x: x[0], parts)
    fn, params = jax.closure_convert(fn, *first)  # what it closes over becomes an argument

    def add(total: Any, value: Any) -> Any:
        return jax.tree.map(jnp.add, total, value)

    def zeros(tree: Any) -> Any:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tree)

    @jax.custom_vjp
    def total(params, states, rest):
        def step(value, part):
            return add(value, fn(*part, *params)), None

        shapes = jax.eval_shape(fn, *first, *params)
        return jax.lax.scan(step, zeros(shapes), (states, *rest))[0]

    def forward(params, states, rest):
        def value_and_grad(part):
            scalar, pullback, sums = jax.vjp(
                lambda params, states: fn(states, *part[1:], *params), params, part[0], has_aux=True
            )
            d_params, d_states = pullback(jnp.ones_like(scalar))
            # To be summed in float32, whatever type the parameters have.
            d_params = jax.tree.map(lambda g: g.astype(jnp.float32), d_params)
            return ((scalar, sums), d_params), d_states

        def step(value, part):
            sums, d_states = value_and_grad(part)
            return add(value, sums), d_states

        shapes = jax.eval_shape(value_and_grad, first)[0]
        (value, d_params), d_states = jax.lax.scan(step, zeros(shapes), (states, *rest))
        d_params = jax.tree.map(lambda g, p: g.astype(p.dtype), d_params, params)
        return value, (d_params, d_states)

    def backward(grads, cotangent):
        scale = cotangent[0]
        d_params, d_states = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
        return d_params, d_states, None

    total.defvjp(forward, backward)
    value, sums = total(params, parts[0], parts[1:])
    return value, jax.lax.stop_gradient(sums)


def _slices(arrays: tuple[Array, ...], chunk: int) -> tuple[Array, ...]:
    """[batch, length, ...] each -> [count, batch, chunk, ...], the last padded with zeros."""
    length = arrays[0].shape[1]
    count = -(-length // chunk)

    def one(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, count * chunk - length), *[(0, 0)] * (x.ndim - 2)])
        return padded.reshape(x.shape[0], count, chunk, *x.shape[2:]).swapaxes(0, 1)

    return tuple(map(one, arrays))


def max_by_segment(
    fn: Callable[[Array], Array], states: Array, segments: Array, num_segments: int, chunk: int
) -> tuple[Array, Array]:
    """Largest values over the tokens of each segment, column by column, and whose they are.

    Like `sum_in_chunks` it holds what `fn` makes of one slice of the length at a time. It has no
    gradient: the second result says through which token it would go, so that whoever computes the
    values again can send it there. To compare values for that would need equal bits from two
    programs.

    Args:
      fn: states of a slice -> float32 values >= 0, [batch, chunk, columns].
      states: [batch, length, embed].
      segments: int32 [batch, length], from 1 to num_segments; tokens of 0 belong to none.
      num_segments: S.
      chunk: tokens of the length in a slice.

    Returns:
      (largest, source): float32 and int32 [S + 1, columns]; row 0 means nothing. `source` is the
      number of the token, row * length + place in the row, of several the first. A segment without
      tokens has 0, and a number beyond all tokens.
    """
    batch, length = segments.shape
    numbers = jnp.arange(batch * length, dtype=jnp.int32).reshape(batch, length)
    parts = _slices((states, segments, numbers), chunk)
    fn, closed_over = jax.closure_convert(fn, parts[0][0])
    parts, closed_over = jax.lax.stop_gradient((parts, closed_over))
    columns = jax.eval_shape(fn, parts[0][0], *closed_over).shape[-1]
    none = jnp.iinfo(jnp.int32).max

    def step(found, part):
        largest, source = found
        states, segments, numbers = part
        # Computed once: the comparison below needs the very bits of the maximum.
        values = jax.lax.optimization_barrier(fn(states, *closed_over)).reshape(-1, columns)
        segments, numbers = segments.reshape(-1), numbers.reshape(-1)
        now = largest.at[segments].max(values)
        here = jnp.where(values == now[segments], numbers[:, None], none)
        first = jnp.full_like(source, none).at[segments].min(here)
        return (now, jnp.where(now > largest, first, source)), None

    shape = (num_segments + 1, columns)
    start = jnp.zeros(shape, jnp.float32), jnp.full(shape, none, jnp.int32)
    return jax.lax.scan(step, start, parts)[0]


def pooled_cross_entropy(rationale: Array, label: Array) -> Array:
    """Cross entropy between what two sequences say, as Chen et al. 2024 compute it.

        sum_v label_v * (logsumexp(rationale) - rationale_v)

    Both are probabilities of ids, each the largest over the positions of its sequence. They are
    used as they are: `label` adds up to more than 1, `rationale` takes the place of logits.

    Args:
      rationale: float32 [..., vocab], in [0, 1].
      label: float32 [..., vocab], in [0, 1].

    Returns:
      float32 [...], in nats.
    """
    log_z = jax.nn.logsumexp(rationale, axis=-1)
    return jnp.sum(label, axis=-1) * log_z - jnp.sum(label * rationale, axis=-1)
