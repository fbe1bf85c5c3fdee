r"""Answers a file of JSON lines with a student: labels, their probabilities, and its reasons.

    python scripts/infer.py --checkpoint_path=/tmp/svamp --input=problems.jsonl \
        --output=answers.jsonl --explain

A line of the input is an object that has the text under "input" (--field names another), without a
prompt: the student gets the one that it was trained with. A line of the output is that object with
`label`, `probability`, `rationale` (with --explain), `line` and `student`, in the order of the
input. An object that has one of these already is an error; --prefix=student_ names ours
`student_label` and so on. A line that cannot be used is reported and skipped. The output grows
while it works, and the same command goes on where it was interrupted.

    ... | python scripts/infer.py --checkpoint_path=/tmp/esnli --input=- --output=- \
        --options=entailment,neutral,contradiction

chooses one of the given labels by their likelihood. Where a pipe pauses, what has come is answered:

    tail -f questions.jsonl | python scripts/infer.py ... --input=- --output=-
"""

import sys

from absl import app, flags

from distill import cache, compilation, configure, predictor, prompts

_CHECKPOINT_PATH = flags.DEFINE_string(
    "checkpoint_path", None, "A run, one checkpoint (T5X's too), or a Hugging Face folder."
)
_INPUT = flags.DEFINE_string("input", None, "JSON lines; - = standard input.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON lines; - = standard output.")
_FIELD = flags.DEFINE_string("field", "input", "Name of the text in an object.")
_PREFIX = flags.DEFINE_string("prefix", "", "Of the names of what is added to an object.")
_EXPLAIN = flags.DEFINE_bool("explain", False, "Also give the reasons.")
_OPTIONS = flags.DEFINE_list("options", [], "Labels to choose from, with commas.")
_VOCABULARY = flags.DEFINE_string("vocabulary", None, "Of the student, where it does not say it.")
_FORM = flags.DEFINE_enum(
    "form", None, [f for f, form in prompts.FORMS.items() if not form.explains],
    "How the student answers, where its checkpoint does not say it.",
)  # fmt: skip
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Inputs answered together.", lower_bound=1)


def run(argv):
    if argv[1:]:
        raise ValueError(f"infer takes flags only, not {' '.join(argv[1:])}; see --help.")
    for flag in (_CHECKPOINT_PATH, _INPUT, _OUTPUT):
        if not flag.value:
            raise ValueError(f"--{flag.name} is missing; see --help.")
    compilation.keep_programs(cache.default_dir())
    student = predictor.Predictor(
        _CHECKPOINT_PATH.value, vocabulary=_VOCABULARY.value, form=_FORM.value,
        batch_size=_BATCH_SIZE.value,
    )  # fmt: skip
    answered, unusable = predictor.infer(
        student, _INPUT.value, _OUTPUT.value, field=_FIELD.value, explain=_EXPLAIN.value,
        options=_OPTIONS.value or None, prefix=_PREFIX.value,
    )  # fmt: skip
    print(f"{answered} lines answered, {unusable} skipped.", file=sys.stderr)


def main(argv):
    configure.run_main(run, argv)


if __name__ == "__main__":
    app.run(main)
