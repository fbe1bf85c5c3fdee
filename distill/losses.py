"""Losses as pure functions of arrays; every one returns per-token values, none averages."""

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
