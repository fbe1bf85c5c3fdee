"""Trains a student: one run, from gin files and flags to checkpoints in MODEL_DIR.

Give a model file (what size), a run file (what to do) and macros (upper case):

  MODEL_DIR                where checkpoints, metrics and config.gin go (must be given)
  MIXTURE_OR_TASK_NAME     what to train on, such as svamp_step_by_step (must be given)
  TRAIN_STEPS              steps in all; TRAIN_STEPS_RELATIVE counts from the initial checkpoint
  INITIAL_CHECKPOINT_PATH  weights to start from; a checkpoint in MODEL_DIR beats it
  BATCH_SIZE               rows per step; or PAIRS_PER_STEP examples, in as many rows as they need
  ALPHA                    weight of the label's loss in step-by-step; the rationale's is 1 - ALPHA
  MI_WEIGHT                weight of the mutual-information term, 0 (Chen et al. 2024: 0.1)
  VOCABULARY               'bytes' or the path of a sentencepiece model; else $DISTILL_VOCABULARY,
                           else bytes
  DATA_DIR                 where the datasets are; $DISTILL_DATA_DIR otherwise

All macros, with their defaults, are in gin_configs/runs/_train.gin; --dry_run prints what a command
line comes to and where each value was set.

A small run on a CPU:

  python scripts/train.py --gin_file=t5_1_1/tiny.gin --gin_file=step_by_step.gin \\
    --gin.MIXTURE_OR_TASK_NAME=svamp_step_by_step --gin.MODEL_DIR=/tmp/svamp --gin.TRAIN_STEPS=200

The setting of the paper:

  python scripts/train.py --gin_file=t5_1_1/base.gin --gin_file=published.gin \\
    --gin.MIXTURE_OR_TASK_NAME=esnli_step_by_step --gin.MODEL_DIR=gs://bucket/esnli \\
    --gin.VOCABULARY=gs://bucket/spiece.model --gin.INITIAL_CHECKPOINT_PATH=gs://bucket/t5_base
"""

from distill import configure, train

if __name__ == "__main__":
    configure.run(train.train)
