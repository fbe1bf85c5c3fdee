"""Evaluates checkpoints on tasks: every one once, results kept, one table.

Give eval.gin and macros (upper case):

  CHECKPOINT_PATH       a run's MODEL_DIR, one checkpoint, a pattern such as /runs/*, a T5X
                        checkpoint, a folder in Hugging Face's format; several with commas (needed)
  RESTORE_MODE          of each run: latest, all, best, every-<k> (steps that are multiples of k)
  MIXTURE_OR_TASK_NAME  tasks, mixtures or datasets, with commas; what the run was trained on
                        otherwise
  SPLIT                 validation; test, or train, only when you say so
  DECODER               greedy, beam (BEAM_SIZE) or sample (NUM_SAMPLES, TEMPERATURE, ...)
  ANSWER_BY             generation, or likelihood: the most probable of the labels of a task
  EXPLAIN               also write rationales
  WAIT_MINUTES          also evaluates what a run still writes, until it ends
  EVAL_OUTPUT_DIR       one folder for all results; inference_eval in each run otherwise

All macros are in gin_configs/runs/eval.gin. What was computed before is not computed again.

The latest checkpoint on the test split:

  python scripts/evaluate.py --gin_file=eval.gin --gin.CHECKPOINT_PATH=/tmp/svamp --gin.SPLIT=test

All checkpoints of several runs on two datasets, each in the form that the student was trained on:

  python scripts/evaluate.py --gin_file=eval.gin "--gin.CHECKPOINT_PATH=/tmp/runs/*" \\
    --gin.RESTORE_MODE=all --gin.MIXTURE_OR_TASK_NAME=svamp,cqa

Beside a run that goes on:

  python scripts/evaluate.py --gin_file=eval.gin --gin.CHECKPOINT_PATH=/tmp/svamp \\
    --gin.RESTORE_MODE=all --gin.WAIT_MINUTES=60
"""

from distill import configure, evaluate

if __name__ == "__main__":
    configure.run(evaluate.evaluate)
