"""What a run minimises: an objective maps (forward, batch) to a loss and its parts.

Every target token carries an integer loss group. With N_g the number of real tokens of group g in
the *global* batch,

    L = sum_g w_g * (sum of cross entropy over the tokens of g) / N_g

`Standard` has one group with weight 1. `StepByStep(alpha)` has w = (alpha, 1 - alpha) for labels
and rationales, the loss of Hsieh et al. 2023 (arXiv 2305.02301, eq. 3). Because the N_g are counted
before anything is divided, the value does not depend on packing, on the number of micro-batches or
on the shape of the mesh: losses of micro-batches *add up* to the loss of the batch.

Batch keys used here: `decoder_target_tokens`, `decoder_loss_weights` (1 = a real target token) and
`decoder_loss_groups`, each int32 [batch, length].

A batch may also weigh its examples: `decoder_example_weights`, int32 [batch, length], has the
weight v of a token's example in thousandths (integers, because packing keeps nothing else; 1000 =
full). Then

    L = sum_g w_g * (sum of v * cross entropy over the tokens of g) / (sum of v over them)

so N_g becomes the weighted count, in float32. Only the ratios of the weights within a group matter;
an example of weight 0 is as good as absent, and all weights 1000 are no weights at all.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from distill import losses

Array = jax.Array
Batch = dict[str, Array]

# The index of a name is the loss group that tasks write into their rows.
LOSS_GROUPS = ("label", "rationale")


class Forward(NamedTuple):
    """A model with its parameters and rng closed over.

    Attributes:
      states: batch -> decoder states [batch, length, embed].
      unembed: states (or a slice over length) -> float32 logits [..., vocab].
    """

    states: Callable[[Batch], Array]
    unembed: Callable[[Array], Array]


def token_weights(batch: Batch) -> Array:
    """What each target token counts, float32 [batch, length]: 1, or its example's weight."""
    weights = batch["decoder_loss_weights"].astype(jnp.float32)
    if "decoder_example_weights" in batch:
        weights *= batch["decoder_example_weights"].astype(jnp.float32) / 1000.0
    return weights


def group_counts(batch: Batch) -> Array:
    """Target tokens of each loss group by weight, float32 [G]; call it on a step's whole batch."""
    weights = token_weights(batch)
    return losses.sum_by_group(
        jnp.ones_like(weights), batch["decoder_loss_groups"], weights, len(LOSS_GROUPS)
    )


@dataclasses.dataclass(frozen=True)
class Standard:
    """Mean cross entropy over the real target tokens of one loss group.

    Standard fine-tuning (gold labels) and standard distillation (the teacher's labels).

    Attributes:
      z_loss: see `losses.cross_entropy`.
      label_smoothing: see `losses.cross_entropy`.
      logits_chunk: tokens of the length whose logits are held at a time; None = all, but `train`
        then chooses by their size.
    """

    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    logits_chunk: int | None = None

    def __post_init__(self):
        _check(self)

    @property
    def group_weights(self) -> tuple[float, ...]:
        return (1.0,) * len(LOSS_GROUPS)

    def check_groups(self, groups: set[int], mixture: str) -> None:
        """Raises ValueError where the data has more than one loss group."""
        if len(groups) > 1:
            raise ValueError(
                f"{mixture!r} has {len(groups)} loss groups "
                f"({', '.join(LOSS_GROUPS[g] for g in sorted(groups))}), but objective Standard "
                "averages over one: the long rationales would swamp the labels. Use "
                "--gin_file=step_by_step.gin (OBJECTIVE = @objectives.StepByStep()), or a task "
                "with one stream such as <name>_label or <name>_predict."
            )

    def __call__(self, forward: Forward, batch: Batch, counts: Array):
        return _weighted_cross_entropy(self, forward, batch, counts)


@dataclasses.dataclass(frozen=True)
class StepByStep:
    """alpha * label loss + (1 - alpha) * rationale loss, each the mean over its own tokens.

    Source: Hsieh et al. 2023 (arXiv 2305.02301), eq. 3, written with alpha as in the released code.

    Attributes:
      alpha: weight of the labels, in [0, 1]; the paper uses 0.5.
      z_loss: see `losses.cross_entropy`; weighted by group like the cross entropy.
      label_smoothing: see `losses.cross_entropy`.
      logits_chunk: tokens of the length whose logits are held at a time; None = all, but `train`
        then chooses by their size.
    """

    alpha: float = 0.5
    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    logits_chunk: int | None = None

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"StepByStep.alpha must be in [0, 1], not {self.alpha!r} (ALPHA).")
        _check(self)

    @property
    def group_weights(self) -> tuple[float, ...]:
        return (self.alpha, 1.0 - self.alpha)

    def check_groups(self, groups: set[int], mixture: str) -> None:
        """Raises ValueError where the data lacks one of the two loss groups."""
        missing = [name for g, name in enumerate(LOSS_GROUPS) if g not in groups]
        if missing:
            raise ValueError(
                f"{mixture!r} has no {' and no '.join(missing)} targets, which StepByStep needs. "
                " Use a <name>_step_by_step mixture, or --gin_file=finetune.gin "
                "(OBJECTIVE = @objectives.Standard()) for a task with one stream."
            )

    def __call__(self, forward: Forward, batch: Batch, counts: Array):
        return _weighted_cross_entropy(self, forward, batch, counts)


Objective = Standard | StepByStep


def _check(objective: Objective) -> None:
    if objective.z_loss < 0:
        raise ValueError(f"z_loss must be >= 0, not {objective.z_loss!r} (Z_LOSS).")
    if not 0 <= objective.label_smoothing < 1:
        raise ValueError(
            "label_smoothing (LABEL_SMOOTHING) must be in [0, 1), not "
            f"{objective.label_smoothing!r}."
        )
    chunk = objective.logits_chunk
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise ValueError(
            f"logits_chunk (LOGITS_CHUNK) must be a positive integer or None, not {chunk!r}."
        )


def _weighted_cross_entropy(objective: Objective, forward: Forward, batch: Batch, counts: Array):
    """The loss of a (micro-)batch, given the token counts of the whole batch.

    Args:
      objective: gives the weights of the groups.
      forward: the student.
      batch: T5X's batch keys, `decoder_loss_groups` and, if it has them,
        `decoder_example_weights`.
      counts: `group_counts` of the *whole* batch of the step, [G].

    Returns:
      (loss, sums): the loss, a scalar whose sum over micro-batches is the loss of the step; and
      weighted sums over the tokens of each group, [G] each, for `summarize`.
    """
    targets = batch["decoder_target_tokens"]
    groups, weights = batch["decoder_loss_groups"], token_weights(batch)
    scale = jnp.asarray(objective.group_weights) / _or_one(counts)

    def part(states: Array, targets: Array, groups: Array, weights: Array):
        logits = forward.unembed(states)
        ce, z = losses.cross_entropy(
            logits, targets, z_loss=objective.z_loss, label_smoothing=objective.label_smoothing
        )
        correct = jnp.argmax(logits, axis=-1) == targets
        sums = {
            name: losses.sum_by_group(values, groups, weights, len(LOSS_GROUPS))
            for name, values in (("cross_ent", ce), ("z", z), ("correct", correct))
        }
        return jnp.sum(scale * (sums["cross_ent"] + sums["z"])), sums

    states, rest = forward.states(batch), (targets, groups, weights)
    chunk = objective.logits_chunk
    if chunk is None or chunk >= targets.shape[1]:
        return part(states, *rest)
    return losses.sum_in_chunks(part, states, rest, chunk)


def _or_one(counts: Array) -> Array:
    """Divisors: a group that is absent from the batch contributes 0, not 0 / 0."""
    return jnp.where(counts > 0, counts, 1.0)


def summarize(objective: Objective, sums: dict[str, Array], counts: Array) -> dict[str, Array]:
    """Metrics of a step from its sums; group losses never include the z-loss.

    Args:
      objective: gives the weights of the groups.
      sums: [G] each, added up over micro-batches.
      counts: `group_counts` of the step, [G].

    Returns:
      Scalars: `loss` (what is minimised), `cross_ent_loss`, `z_loss`, `accuracy` (tokens), and
      `cross_ent_loss/<group>`, `accuracy/<group>` for each group (NaN where it is absent). All are
      means over tokens by weight.
    """
    weights = jnp.asarray(objective.group_weights)
    present = _or_one(counts)
    cross_ent = jnp.sum(weights * sums["cross_ent"] / present)
    z = jnp.sum(weights * sums["z"] / present)
    metrics = {
        "loss": cross_ent + z,
        "cross_ent_loss": cross_ent,
        "z_loss": z,
        "accuracy": jnp.sum(sums["correct"]) / _or_one(jnp.sum(counts)),
    }
    for g, name in enumerate(LOSS_GROUPS):
        metrics[f"cross_ent_loss/{name}"] = sums["cross_ent"][g] / counts[g]
        metrics[f"accuracy/{name}"] = sums["correct"][g] / counts[g]
    return metrics
