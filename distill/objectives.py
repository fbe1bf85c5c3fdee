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

`StepByStep(mutual_information=beta)` adds a term that ties the two sequences of a pair together,
that of Chen et al. 2024 (arXiv 2403.03348). With p_t the model's distribution at target position t,

    label_v = max_t p_t(v) over the label's tokens         (a constant: no gradient)
    rationale_v = max_t p_t(v) over the rationale's tokens
    L += beta * mean over pairs of  - sum_v label_v * log softmax(rationale)_v

What the rationale's sequence says somewhere is drawn towards what the label's says. This is what
the released code of the paper computes (`TaskPrefixTrainer` in `model_utils.py` of
github.com/xinchen9/cot_distillation_ACL2024, 59ca033), and the beta of 0.1 that it recommends
belongs to it. It is not quite a cross entropy of distributions: the maxima are not scaled to add up
to 1, and the softmax is taken of probabilities. So the term is about log(vocab) times the sum of
`label`: watch how it changes, not its size. Two things are ours: padding takes no part in a maximum
(theirs includes it), and the mean is over the pairs of the *global* batch that have both sequences.
A pair weighs as much as the lighter of its two sequences.

The term needs `decoder_pair_ids`, int32 [batch, length]: the same number, from 1 on, for all target
tokens of a pair, 0 for padding. Pairs must be whole, so micro-batches are refused.
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

    @property
    def needs_pairs(self) -> bool:
        """Whether batches must have `decoder_pair_ids`."""
        return False

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
    The optional term: Chen et al. 2024 (arXiv 2403.03348), see the module's docstring.

    Attributes:
      alpha: weight of the labels, in [0, 1]; the paper uses 0.5.
      mutual_information: weight (beta) of the term that ties a rationale to its label; 0 = without,
        Chen et al. use 0.1.
      z_loss: see `losses.cross_entropy`; weighted by group like the cross entropy.
      label_smoothing: see `losses.cross_entropy`.
      logits_chunk: tokens of the length whose logits are held at a time; None = all, but `train`
        then chooses by their size.
      max_pairs: of a batch, where `mutual_information` is not 0; the pools have so many rows. None
        = half the target positions, but `train` then takes what the data allows.
    """

    alpha: float = 0.5
    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    logits_chunk: int | None = None
    mutual_information: float = 0.0
    max_pairs: int | None = None

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"StepByStep.alpha must be in [0, 1], not {self.alpha!r} (ALPHA).")
        if not self.mutual_information >= 0:
            raise ValueError(
                "StepByStep.mutual_information (MI_WEIGHT) must be >= 0, not "
                f"{self.mutual_information!r}."
            )
        if self.max_pairs is not None and (
            not isinstance(self.max_pairs, int) or self.max_pairs < 1
        ):
            raise ValueError(
                f"StepByStep.max_pairs must be a positive integer or None, not {self.max_pairs!r}."
            )
        _check(self)

    @property
    def group_weights(self) -> tuple[float, ...]:
        return (self.alpha, 1.0 - self.alpha)

    @property
    def needs_pairs(self) -> bool:
        """Whether batches must have `decoder_pair_ids`."""
        return self.mutual_information > 0

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


def require_whole_pairs(objective: Objective, num_microbatches: int) -> None:
    """Raises ValueError where micro-batches would part the sequences of a pair."""
    if objective.needs_pairs and num_microbatches > 1:
        raise ValueError(
            f"NUM_MICROBATCHES={num_microbatches} with MI_WEIGHT={objective.mutual_information}: "
            "the term compares the two sequences of a pair, which may be in different "
            "micro-batches. Set NUM_MICROBATCHES=1 (a smaller BATCH_SIZE, LOGITS_CHUNK or remat "
            "save memory instead), or MI_WEIGHT=0."
        )


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
      weighted sums over the tokens of each group, [G] each, for `summarize`. With the term of
      mutual information also its sum over the pairs, and their number, scalars.
    """
    targets = batch["decoder_target_tokens"]
    groups, weights = batch["decoder_loss_groups"], token_weights(batch)
    scale = jnp.asarray(objective.group_weights) / _or_one(counts)

    states, rest = forward.states(batch), (targets, groups, weights)
    term = None
    if objective.needs_pairs:
        term = _PairTerm.of(objective, forward, states, batch)
        rest += (term.numbers, term.sequences)

    def part(states: Array, targets: Array, groups: Array, weights: Array, *places: Array):
        logits = forward.unembed(states)
        ce, z = losses.cross_entropy(
            logits, targets, z_loss=objective.z_loss, label_smoothing=objective.label_smoothing
        )
        correct = jnp.argmax(logits, axis=-1) == targets
        sums = {
            name: losses.sum_by_group(values, groups, weights, len(LOSS_GROUPS))
            for name, values in (("cross_ent", ce), ("z", z), ("correct", correct))
        }
        loss = jnp.sum(scale * (sums["cross_ent"] + sums["z"]))
        if term is not None:
            loss += term.gradient_only(logits, *places)
        return loss, sums

    chunk = objective.logits_chunk
    if chunk is None or chunk >= targets.shape[1]:
        loss, sums = part(states, *rest)
    else:
        loss, sums = losses.sum_in_chunks(part, states, rest, chunk)
    if term is not None:
        loss += term.loss
        sums |= term.sums
    return loss, sums


class _PairTerm(NamedTuple):
    """The term of mutual information, which is a sum over pairs and not over tokens.

    Logits are made twice: once for the maxima over each sequence, of which the loss and its
    gradient are taken; then, where the cross entropy needs them anyway, to send that gradient to
    the tokens that hold the maxima. So it needs no more than one slice of the logits at a time, and
    [2 P + 1, vocab] for the pools of P pairs.

    Attributes:
      loss: of the batch, a scalar; has no gradient.
      sums: of pairs by weight: `mutual_information` of them, and how many (`pairs`), scalars.
      numbers: of the tokens, int32 [batch, length].
      sequences: int32 [batch, length]: i for the label of pair i, P + i for its rationale, else 0.
      source: the token that holds each maximum, int32 [2 P + 1, vocab].
      slope: of the loss by each maximum, float32 [2 P + 1, vocab].
    """

    loss: Array
    sums: dict[str, Array]
    numbers: Array
    sequences: Array
    source: Array
    slope: Array

    @classmethod
    def of(cls, objective: "StepByStep", forward: Forward, states: Array, batch: Batch):
        if "decoder_pair_ids" not in batch:
            raise ValueError(
                f"MI_WEIGHT={objective.mutual_information} needs the batch key 'decoder_pair_ids', "
                f"which is not among {sorted(batch)}: make the batches with "
                "data.TrainBatches(..., with_pair_ids=True), or set MI_WEIGHT=0."
            )
        ids, groups = batch["decoder_pair_ids"], batch["decoder_loss_groups"]
        most = objective.max_pairs or ids.size // 2  # a whole pair has two tokens at least
        weights = token_weights(batch)
        sequences = jnp.where((weights > 0) & (ids > 0), ids + most * groups, 0)
        largest, source = losses.max_by_segment(
            lambda states: jax.nn.softmax(forward.unembed(states), axis=-1),
            states, sequences, 2 * most, objective.logits_chunk or ids.shape[1],
        )  # fmt: skip
        weight = jnp.zeros(2 * most + 1).at[sequences].max(weights)  # 0: there is no such sequence
        weight = jnp.minimum(weight[1 : most + 1], weight[most + 1 :])
        label, rationale = largest[1 : most + 1], largest[most + 1 :]

        def total(rationale: Array) -> Array:
            return jnp.sum(weight * losses.pooled_cross_entropy(rationale, label))

        value, slope = jax.value_and_grad(total)(rationale)
        pairs = jnp.sum(weight)
        scale = objective.mutual_information / _or_one(pairs)
        return cls(
            loss=scale * value,
            sums={"mutual_information": value, "pairs": pairs},
            numbers=jnp.arange(ids.size, dtype=jnp.int32).reshape(ids.shape),
            sequences=sequences,
            source=source,
            slope=scale * jnp.pad(slope, ((most + 1, 0), (0, 0))),
        )

    def gradient_only(self, logits: Array, numbers: Array, sequences: Array) -> Array:
        """A scalar that is 0 and has the gradient of `loss` by the logits of these tokens."""
        probabilities = jax.nn.softmax(logits, axis=-1)
        holds = self.source[sequences] == numbers[..., None]
        slope = jax.lax.stop_gradient(jnp.where(holds, self.slope[sequences], 0.0))
        return jnp.sum(slope * (probabilities - jax.lax.stop_gradient(probabilities)))


def _or_one(counts: Array) -> Array:
    """Divisors: a group that is absent from the batch contributes 0, not 0 / 0."""
    return jnp.where(counts > 0, counts, 1.0)


def summarize(objective: Objective, sums: dict[str, Array], counts: Array) -> dict[str, Array]:
    """Metrics of a step from its sums; group losses never include the z-loss.

    Args:
      objective: gives the weights of the groups.
      sums: as the objective gives them, added up over micro-batches or batches.
      counts: `group_counts` of the step, [G].

    Returns:
      Scalars: `loss` (what is minimised), `cross_ent_loss`, `z_loss`, `accuracy` (tokens), and
      `cross_ent_loss/<group>`, `accuracy/<group>` for each group (NaN where it is absent). All are
      means over tokens by weight. With the term of mutual information also `mutual_information`,
      its mean over pairs; `loss` is then `cross_ent_loss` + `z_loss` + beta times that.
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
    if objective.needs_pairs:
        metrics["mutual_information"] = sums["mutual_information"] / _or_one(sums["pairs"])
        metrics["loss"] += objective.mutual_information * metrics["mutual_information"]
    return metrics
