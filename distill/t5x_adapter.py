"""The loss and the loss groups of this project inside T5X, for who runs T5X itself (docs/t5x.md).

The only module that imports T5X and CLU; nothing else here imports it.

    gin_configs/t5x/*.gin -> mixture() -> DistillFeatureConverter -> DistillTrainer -> DistillModel

T5X adds up the gradients of micro-batches, each of them normalised by its own tokens, which is
wrong wherever micro-batches are uneven. `DistillTrainer` counts the tokens of each loss group over
the whole batch first and hands the counts to every micro-batch, as `train.train_step` does.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import seqio
import tensorflow as tf
from clu import metrics as clu_metrics
from t5x import decoding, models, trainer
from t5x import metrics as t5x_metrics

from distill import objectives, sources, task

Array = jax.Array

# The batch's counts of each loss group, float32 [batch, G]: the same in every row, so that each
# micro-batch has them, however T5X cuts the batch.
COUNTS = "loss_group_counts"
# What `task.register` writes beside inputs and targets, int32 scalars.
PASSED_ON = ("loss_group", "loss_weight")
# Of T5X's own metrics those that mean the same under this loss.
_KEPT = ("timing/", "effective_batch_size/", "non_padding_fraction/")


# --- Data -----------------------------------------------------------------------------------------


def vocabulary(spec: str | None = None) -> seqio.Vocabulary:
    """Returns the run's vocabulary for SeqIO; binds it.

    Args:
      spec: as in `task.bind`.
    """
    task.bind(vocabulary=spec)
    return task.vocabulary().as_seqio()


def mixture(
    name: str,
    *,
    module: str = task.DEFAULT_MODULE,
    objective: objectives.Objective | None = None,
    vocabulary: str | None = None,
    **settings: Any,
) -> seqio.Task | seqio.Mixture:
    """Returns a task or mixture whose examples keep their loss group, for T5X's `DatasetConfig`.

    Args:
      name: of the task or mixture.
      module: that registers it.
      objective: refuses data without the loss groups it needs; None = not checked.
      vocabulary: see `task.bind`.
      **settings: fields of `sources.Settings`, such as data_dir.

    Raises:
      ValueError: the name is unknown, its vocabulary is not the run's, or the objective does not
        fit its loss groups.
    """
    task.bind(vocabulary=vocabulary, **settings)
    task.import_module(module)
    found = task.lookup(name)
    # T5X's own check takes a provider for one of AirIO's and fails.
    if any(f.vocabulary != task.vocabulary().as_seqio() for f in found.output_features.values()):
        raise ValueError(
            f"{name!r} has another vocabulary than VOCABULARY={task.vocabulary().spec!r}."
        )
    if objective is not None:
        groups = {member.loss_group for member in task.describe(name).members}
        objective.check_groups(groups - {None}, name)
    return _GroupedMixture(found) if isinstance(found, seqio.Mixture) else found


class _GroupedMixture(seqio.Mixture):
    """A mixture that keeps the loss groups of its examples; SeqIO's own drops them."""

    def __init__(self, plain: seqio.Mixture):
        super().__init__(plain.name, [(member, plain.get_rate) for member in plain.tasks])

    def get_dataset(self, *args, **kwargs) -> tf.data.Dataset:
        return super().get_dataset(*args, **kwargs, passthrough_features=PASSED_ON)


class DistillFeatureConverter(seqio.EncDecFeatureConverter):
    """T5X's batch keys, `decoder_loss_groups` and `decoder_example_weights`, packed or not.

    TASK_FEATURE_LENGTHS stays `{"inputs": n, "targets": m}`.
    """

    MODEL_FEATURES = {
        **seqio.EncDecFeatureConverter.MODEL_FEATURES,
        "decoder_loss_groups": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
        "decoder_example_weights": seqio.FeatureConverter.FeatureSpec(dtype=tf.int32),
    }

    def _convert_features(
        self, ds: tf.data.Dataset, task_feature_lengths: Mapping[str, int]
    ) -> tf.data.Dataset:
        if "loss_group" not in ds.element_spec:
            raise ValueError(
                "The examples have no `loss_group`. SeqIO's mixtures drop it: give T5X "
                "DatasetConfig.mixture_or_task_name = @t5x_adapter.mixture(), as in "
                "gin_configs/t5x/_step_by_step.gin. A task that was not made by "
                "distill.task.register needs the feature itself: an int32 scalar, 0 (label) or 1 "
                "(rationale)."
            )
        target_length = task_feature_lengths["targets"]
        lengths = {
            **task_feature_lengths, "loss_groups": target_length, "example_weights": target_length
        }  # fmt: skip
        return super()._convert_features(ds.map(_per_token), lengths)

    def _convert_example(self, features: Mapping[str, tf.Tensor]) -> Mapping[str, tf.Tensor]:
        return {
            **super()._convert_example(features),
            "decoder_loss_groups": tf.maximum(features["loss_groups"] - 1, 0),
            "decoder_example_weights": tf.maximum(features["example_weights"] - 1, 0),
        }

    def get_model_feature_lengths(
        self, task_feature_lengths: Mapping[str, int]
    ) -> Mapping[str, int]:
        target_length = task_feature_lengths["targets"]
        return {
            **super().get_model_feature_lengths(task_feature_lengths),
            "decoder_loss_groups": target_length,
            "decoder_example_weights": target_length,
        }


def _per_token(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Repeats an example's loss group and weight for each target token, both plus 1.

    Plus 1 because SeqIO's packing takes a sequence to end where its zeros begin.
    """
    weight = example.get("loss_weight", tf.constant(sources.FULL_WEIGHT, tf.int32))
    ones = tf.ones_like(example["targets"])
    return {
        **example,
        "loss_groups": ones * (tf.cast(example["loss_group"], tf.int32) + 1),
        "example_weights": ones * (tf.cast(weight, tf.int32) + 1),
    }


# --- Model ----------------------------------------------------------------------------------------


class DistillModel(models.EncoderDecoderModel):
    """T5X's encoder-decoder with one of this project's objectives."""

    FEATURE_CONVERTER_CLS = DistillFeatureConverter

    def __init__(
        self,
        module: Any,
        input_vocabulary: seqio.Vocabulary,
        output_vocabulary: seqio.Vocabulary,
        optimizer_def: Any,
        objective: objectives.Objective,
        decode_fn: models.DecodeFnCallable = decoding.beam_search,
        default_decoder_params: models.DecoderParams | None = None,
        loss_normalizing_factor: Any = None,
    ):
        """Builds the model.

        Args:
          module: T5X's network, such as `t5x.examples.t5.network.Transformer`.
          input_vocabulary: of the inputs.
          output_vocabulary: of the targets.
          optimizer_def: T5X's optimizer.
          objective: what to minimise; it has the z-loss and the label smoothing.
          decode_fn: as in T5X.
          default_decoder_params: as in T5X.
          loss_normalizing_factor: must be None; an argument so that a file that sets it is told.

        Raises:
          ValueError: loss_normalizing_factor is set, or the objective needs pairs.
        """
        if objective.needs_pairs:
            raise ValueError(
                f"mutual_information={objective.mutual_information} does not work under T5X: its "
                "packing does not say which sequences are a pair. Set it to 0, or train with "
                "scripts/train.py."
            )
        if loss_normalizing_factor is not None:
            raise ValueError(
                f"LOSS_NORMALIZING_FACTOR is {loss_normalizing_factor!r}, but this loss is always "
                "the mean over the batch's tokens of each loss group: remove the setting, or set "
                "it to None. Compare the learning rate, not the scale of the loss."
            )
        super().__init__(
            module, input_vocabulary, output_vocabulary, optimizer_def, decode_fn,
            label_smoothing=objective.label_smoothing, z_loss=objective.z_loss,
            default_decoder_params=default_decoder_params,
        )  # fmt: skip
        self.objective = objective

    def loss_fn(
        self, params: Any, batch: Mapping[str, Array], dropout_rng: Array | None
    ) -> tuple[Array, dict[str, clu_metrics.Metric]]:
        """The objective's loss of a batch, or of a micro-batch of it.

        Args:
          params: the network's parameters.
          batch: what `DistillFeatureConverter` gives, int32 [batch, length]; in training with
            `COUNTS`.
          dropout_rng: None = evaluation.

        Returns:
          (loss, metrics); the losses of micro-batches add up to the loss of the batch, and their
          metrics merge to its metrics.

        Raises:
          ValueError: training without `COUNTS`.
        """
        batch = dict(batch)
        counts = batch.pop(COUNTS, None)
        own_counts = objectives.group_counts(batch)
        if counts is not None:
            counts = counts[0]
        elif dropout_rng is None:
            counts = own_counts
        else:
            # T5X does not say here whether this is a micro-batch, of which the own counts would
            # give wrong gradients without a word.
            raise ValueError(
                f"Training needs {COUNTS!r}, the token counts of the whole batch, to be exact with "
                "micro-batches: set train.trainer_cls = @t5x_adapter.DistillTrainer (as in "
                "gin_configs/t5x/_step_by_step.gin), or call t5x_adapter.with_counts(batch) in a "
                "trainer of your own."
            )
        logits = self._compute_logits(params, batch, dropout_rng)
        forward = objectives.Forward(states=lambda _: logits, unembed=lambda states: states)
        loss, sums = self.objective(forward, batch, counts)
        return loss, self._metrics(logits, batch, loss, sums, counts, own_counts)

    def _metrics(self, logits, batch, loss, sums, counts, own_counts):
        """T5X's timing and padding metrics, and those of `objectives.summarize`.

        Losses are means over steps; accuracies and the losses of the groups are means over all
        tokens since the last report, by weight (NaN where a group had none).
        """
        targets = batch["decoder_target_tokens"]
        tokens = {"encoder": batch["encoder_input_tokens"], "decoder": targets}
        theirs = models.compute_base_metrics(
            logits=logits, targets=targets, mask=batch["decoder_loss_weights"], loss=loss,
            segment_ids={k: batch.get(f"{k}_segment_ids", v > 0) for k, v in tokens.items()},
        )  # fmt: skip
        metrics = {name: m for name, m in theirs.items() if name.startswith(_KEPT)}
        step = objectives.summarize(self.objective, sums, counts)
        for name in ("loss", "cross_ent_loss", "z_loss"):
            metrics[name] = t5x_metrics.AveragePerStep(total=step[name])
        metrics["accuracy"] = clu_metrics.Average(
            total=jnp.sum(sums["correct"]), count=jnp.sum(own_counts)
        )
        for g, group in enumerate(objectives.LOSS_GROUPS):
            for name, key in (("cross_ent_loss", "cross_ent"), ("accuracy", "correct")):
                metrics[f"{name}/{group}"] = clu_metrics.Average(
                    total=sums[key][g], count=own_counts[g]
                )
        return metrics


# --- Trainer --------------------------------------------------------------------------------------


def with_counts(batch: Mapping[str, Array]) -> dict[str, Array]:
    """The batch with `COUNTS`; call it on the whole batch of a step, inside jit."""
    counts = objectives.group_counts(dict(batch))
    rows = batch["decoder_target_tokens"].shape[0]
    return {**batch, COUNTS: jnp.broadcast_to(counts, (rows, len(objectives.LOSS_GROUPS)))}


class DistillTrainer(trainer.Trainer):
    """T5X's trainer, exact for every `num_microbatches`."""

    @functools.cached_property
    def _partitioned_train_step(self):
        def step(state, batch):
            return trainer.train_with_lr(
                state,
                with_counts(batch),
                learning_rate=self._learning_rate_fn(state.step),
                dropout_rng=self._get_step_rng(state.step),
                model=self._model,
                num_microbatches=self._num_microbatches,
                weight_metrics_computer=self._weight_metrics_computer,
                data_partition_spec=rows,
            )

        rows = self._partitioner.data_partition_spec
        return self._partitioner.partition(
            step,
            in_axis_resources=(self._train_state_axes, rows),
            out_axis_resources=(self._train_state_axes, None),
            donate_argnums=(0,),
        )
