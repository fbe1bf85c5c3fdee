"""The datasets. Importing this module registers their SeqIO tasks and mixtures.

To add one: copy `svamp.py`, and import it here. `python -m tasks <name>` shows what was read.
Your own module works too, without a change here: --gin.MIXTURE_OR_TASK_MODULE=my_package.my_tasks
"""

from tasks import anli1, arithmetic, cqa, esnli, svamp

__all__ = ["anli1", "arithmetic", "cqa", "esnli", "svamp"]
