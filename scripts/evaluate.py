"""Evaluates checkpoints of a run on a task: predictions and metrics, one table.

Give eval.gin and macros (upper case):

  CHECKPOINT_PATH       a run's MODEL_DIR, or one checkpoint with RESTORE_MODE=specific (needed)
  RESTORE_MODE          latest, all or specific
  MIXTURE_OR_TASK_NAME  what to evaluate on; what the run was trained on otherwise
  SPLIT                 test by default
  EVAL_OUTPUT_DIR       where results go; below CHECKPOINT_PATH otherwise
  BATCH_SIZE            examples at a time; does not change the result

All macros are in gin_configs/runs/eval.gin. Results are kept per task, split and step.

The latest checkpoint:

  python scripts/evaluate.py --gin_file=eval.gin --gin.CHECKPOINT_PATH=/tmp/svamp

All checkpoints, on another task, 100 examples each:

  python scripts/evaluate.py --gin_file=eval.gin --gin.CHECKPOINT_PATH=/tmp/svamp \\
    --gin.RESTORE_MODE=all --gin.MIXTURE_OR_TASK_NAME=svamp_label \\
    --gin.EVALUATOR_NUM_EXAMPLES=100
"""

from distill import configure, evaluate

if __name__ == "__main__":
    configure.run(evaluate.evaluate)
