"""Optimizers as checked dataclasses that build optax chains: T5's Adafactor, and AdamW.

They compute in float32 and keep float32 slots, whatever the type of parameters and gradients.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

SCHEDULES = ("constant", "linear", "rsqrt")


def schedule(kind: str, learning_rate: float, warmup_steps: int, total_steps: int):
    """Learning rate as a function of the number of updates made so far.

    `constant`: learning_rate. `linear`: falls to 0 at total_steps. `rsqrt`: learning_rate /
    sqrt(max(n, warmup_steps, 1)), T5's pre-training schedule, which has its warm-up built in. The
    first two rise linearly over `warmup_steps`.

    Args:
      kind: one of SCHEDULES.
      learning_rate: peak, or the factor of `rsqrt`.
      warmup_steps: in updates.
      total_steps: updates of the run; only `linear` uses it.

    Returns:
      An optax schedule.
    """
    if kind == "rsqrt":
        return lambda n: (
            learning_rate * jax.lax.rsqrt(jax.numpy.maximum(1.0 * n, max(warmup_steps, 1.0)))
        )
    if kind == "linear":
        decay = optax.linear_schedule(learning_rate, 0.0, max(total_steps - warmup_steps, 1))
    else:
        decay = optax.constant_schedule(learning_rate)
    if not warmup_steps:
        return decay
    warmup = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def _check(optimizer) -> None:
    name = type(optimizer).__name__
    if optimizer.schedule not in SCHEDULES:
        raise ValueError(f"{name}.schedule must be one of {SCHEDULES}, not {optimizer.schedule!r}.")
    for field in ("learning_rate", "warmup_steps", "weight_decay"):
        if getattr(optimizer, field) < 0:
            raise ValueError(f"{name}.{field} must be >= 0, not {getattr(optimizer, field)!r}.")
    if optimizer.clip_norm is not None and optimizer.clip_norm <= 0:
        raise ValueError(f"{name}.clip_norm must be > 0 or None, not {optimizer.clip_norm!r}.")


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay; the defaults are the published step-by-step setting.

    Attributes:
      learning_rate: peak.
      schedule: `constant`, `linear` or `rsqrt`.
      warmup_steps: updates over which the rate rises.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: per update, times the learning rate; norm scales are not decayed.
      clip_norm: largest global gradient norm, None = no clipping.
    """

    learning_rate: float = 5e-5
    schedule: str = "linear"
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0

    def __post_init__(self):
        _check(self)

    def learning_rate_at(self, total_steps: int):
        return schedule(self.schedule, self.learning_rate, self.warmup_steps, total_steps)

    def build(self, total_steps: int) -> optax.GradientTransformation:
        """The optax chain for a run of `total_steps` updates."""
        adamw = optax.adamw(
            self.learning_rate_at(total_steps), self.b1, self.b2, self.eps,
            weight_decay=self.weight_decay, mask=_is_kernel,
        )  # fmt: skip
        return _in_float32(_clipped(self.clip_norm, adamw))


@dataclasses.dataclass(frozen=True)
class Adafactor:
    """Adafactor as T5 uses it: no momentum, updates scaled by the size of the parameter.

    Every layer of a stack is treated as the separate array that it is in an unscanned model: the
    clipping and the scale by parameter size are per layer, not per stack.

    Source: Shazeer and Stern 2018 (arXiv 1804.04235), settings of Raffel et al. 2020.

    Attributes:
      learning_rate: relative to the size of each parameter.
      schedule: `constant`, `linear` or `rsqrt`.
      warmup_steps: updates over which the rate rises.
      decay_rate: the second moment decays by 1 - n^-decay_rate.
      clipping_threshold: largest root mean square of one array's update.
      min_dim_size_to_factor: smaller arrays keep the full second moment.
      weight_decay: per update; 0 in T5.
      clip_norm: largest global gradient norm, None = no clipping, as in T5.
    """

    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    decay_rate: float = 0.8
    clipping_threshold: float = 1.0
    min_dim_size_to_factor: int = 128
    weight_decay: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self):
        _check(self)

    def learning_rate_at(self, total_steps: int):
        return schedule(self.schedule, self.learning_rate, self.warmup_steps, total_steps)

    def build(self, total_steps: int) -> optax.GradientTransformation:
        """The optax chain for a run of `total_steps` updates."""
        one = optax.adafactor(
            self.learning_rate_at(total_steps),
            min_dim_size_to_factor=self.min_dim_size_to_factor,
            decay_rate=self.decay_rate,
            clipping_threshold=self.clipping_threshold,
            weight_decay_rate=self.weight_decay or None,
        )
        stacked = _over_layers(one)
        return _in_float32(_clipped(self.clip_norm, optax.partition(
            {"encoder": stacked, "decoder": stacked, "unstacked": one}, _stack_of
        )))  # fmt: skip


Optimizer = AdamW | Adafactor


def apply_updates(params: Any, updates: Any, key: jax.Array) -> Any:
    """Adds float32 updates to parameters; bfloat16 ones are rounded stochastically.

    To nearest, every update below half a unit in the last place (2^-9 of a parameter) would be
    lost, which is most of them at T5's learning rate of 1e-3.

    Args:
      params: tree of float32 or bfloat16 arrays.
      updates: the same tree in float32.
      key: of this step; each array draws from a key of its own. Not used for float32.

    Returns:
      The new parameters, each in its own type.
    """

    def add(number: int, param: jax.Array, update: jax.Array) -> jax.Array:
        if param.dtype != jnp.bfloat16:
            return optax.apply_updates(param, update)
        exact = param.astype(jnp.float32) + update
        return stochastic_round(exact, jax.random.fold_in(key, number))

    leaves, treedef = jax.tree.flatten(params)
    pairs = zip(leaves, treedef.flatten_up_to(updates), strict=True)
    return treedef.unflatten(add(i, *pair) for i, pair in enumerate(pairs))


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> one of the two bfloat16 around it, so that the expected value is x.

    bfloat16 is the upper half of float32: a random number is added to the lower half, which is then
    cut off. What bfloat16 holds exactly, zero, infinity and NaN stay what they are; a finite number
    stays finite (beyond the largest bfloat16 it becomes that).

    Args:
      x: float32, any shape.
      key: the same key gives the same rounding, however x is sliced over devices.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign, magnitude = bits & jnp.uint32(1 << 31), bits & jnp.uint32((1 << 31) - 1)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    largest = jnp.uint32(0x7F7FFFFF)  # finite float32, and its upper half finite bfloat16
    upper = (sign | jnp.minimum(magnitude + noise, largest)) >> 16
    rounded = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` as if parameters and gradients were float32, which its slots then are as well."""

    def cast(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    return optax.GradientTransformation(
        lambda params: tx.init(cast(params)),
        lambda grads, state, params: tx.update(cast(grads), state, cast(params)),
    )


def _clipped(clip_norm: float | None, tx: optax.GradientTransformation):
    return tx if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), tx)


def _over_layers(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies `tx` to each layer of stacked parameters (axis 0) on its own."""
    return optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))


def _names(path) -> list[str]:
    return [str(getattr(key, "key", key)) for key in path]


def _stack_of(params):
    """For each parameter the stack it belongs to: `encoder`, `decoder`, or `unstacked`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _names(path)[0] if "layers" in _names(path) else "unstacked", params
    )


def _is_kernel(params):
    """True for matrices, False for the scales of the norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _names(path)[-1] != "scale", params)
