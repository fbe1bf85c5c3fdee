"""What a student is given and what it is to write: the forms of an example.

A *form* is what `task.register` makes a task of a dataset for: `svamp` in the form `predict` is the
task `svamp_predict`. The two streams of step-by-step distillation, `predict: ` + input -> label and
`explain: ` + input -> rationale, follow Hsieh et al. 2023 (arXiv 2305.02301).
"""

import dataclasses

PREDICT = "predict: "
EXPLAIN = "explain: "
RATIONALE = " Rationale: "  # between the input and a rationale that is part of it


class UnknownNameError(ValueError):
    """There is no task, mixture or dataset of that name."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How the tasks of one form are made.

    Attributes:
      prefix: of the input.
      explains: the target is a rationale, in its own loss group.
      reads_rationale: the rationale is part of the input.
      answer_form: how the target holds the label, one of `metrics.ANSWER_FORMS`.
    """

    prefix: str = ""
    explains: bool = False
    reads_rationale: bool = False
    answer_form: str = "label"

    @property
    def single_task(self) -> bool:
        """Whether one example holds the rationale and the label."""
        return self.reads_rationale or self.answer_form != "label"


FORMS = {
    "label": Form(),
    "predict": Form(prefix=PREDICT),
    "explain": Form(prefix=EXPLAIN, explains=True),
    "rationale_label": Form(answer_form="rationale_label"),
    "label_rationale": Form(answer_form="label_rationale"),
    "with_rationale": Form(reads_rationale=True),
}
MIXTURES = {"step_by_step": ("predict", "explain")}
LABELERS = ("", "_llm")  # gold, teacher: suffixes of the names


def split_name(name: str) -> tuple[str, str | None]:
    """Cuts the name of a task or mixture of ours into its dataset and its form or mixture.

    `svamp_step_by_step_llm` -> (`svamp`, `step_by_step`); another name -> (name, None).
    """
    short = name.removesuffix("_llm")
    # `svamp_rationale_label` ends with `_label` too.
    for known in sorted((*FORMS, *MIXTURES), key=len, reverse=True):
        if short.endswith(f"_{known}"):
            return short.removesuffix(f"_{known}"), known
    return name, None


def answering_form(name: str) -> str | None:
    """The form in which a student of a task or mixture answers; None where the name has none.

    `svamp_step_by_step` -> `predict`, `all_label_llm` -> `label`.
    """
    form = split_name(name)[1]
    return MIXTURES[form][0] if form in MIXTURES else form
