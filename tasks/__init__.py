"""The datasets. Importing this module registers their SeqIO tasks and mixtures.

To add one: copy `svamp.py`, and import it here. `python -m tasks <name>` shows what was read.
Your own module works too, without a change here: --gin.MIXTURE_OR_TASK_MODULE=my_package.my_tasks
"""

from distill import task
from tasks import anli, arithmetic, cqa, esnli, gsm8k, svamp

__all__ = ["anli", "arithmetic", "cqa", "esnli", "gsm8k", "svamp"]

# The mixtures `all_*`: published datasets only, none that is generated or made of another.
task.register_all(["anli1", "anli2", "anli3", "cqa", "esnli", "gsm8k", "svamp"])
