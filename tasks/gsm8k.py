"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): grade-school word problems -> a number.

Files: gsm8k/{train,test}.jsonl as their authors give them, with the fields `question` and `answer`,
a worked solution that ends in `#### 1,234`; else TFDS's `gsm8k`. There is no validation file; 10 %
of the train rows are held out. Correct means the same value.

The rationale is the solution, which a person wrote, without the calculator marks (`<<84/2=42>>`).
There are no teacher labels; a rationale store brings some.
"""

import re

from distill import metrics, sources, task


def rationale(fields):
    """Returns the worked solution of a row."""
    return re.sub(r"<<[^<>]*>>", "", fields["answer"].rpartition("####")[0]).strip()


def label(fields):
    """Returns the number after `####`, without thousands commas."""
    number = fields["answer"].rpartition("####")[2].strip().replace(",", "")
    if metrics.equation_value(number) is None:
        raise ValueError(f"the answer must end in `#### ` and a number, not {number[-60:]!r}")
    return number


FIELDS = dict(input="question", label=label, rationale=rationale, holdout=True)

task.register(
    "gsm8k",
    source=sources.FirstOf(
        (
            sources.JsonLines(
                "gsm8k", {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"}, **FIELDS
            ),
            sources.Tfds("gsm8k", "gsm8k", {"train": "train", "test": "test"}, **FIELDS),
        )
    ),
    metric_fns=[metrics.equation_accuracy],
)
