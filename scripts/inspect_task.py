r"""Shows what a task or mixture holds, before a run is paid for.

    python scripts/inspect_task.py cqa_step_by_step --data_dir=/data \
        --vocabulary=/data/spiece.model --html=cqa.html

For every member task: rows, examples, loss group, token counts and histograms, how much is cut; the
row lengths that waste least on the student (--model), and what an epoch is then; a few examples as
tokens, `|` between them, from the shortest to the longest; what the teacher said, as the run would
read it (after --parsing and --teacher_filter). --html writes the same with plots, as one file.

Rows come from the row cache, which is built first if it is not there (as scripts/cache_tasks.py
does), so that a second call is quick and a run with the same settings finds it. Only what the
teacher said is not in it: the datasets' files are read again, in a second process that imports
TensorFlow (seconds). It is printed last; --noteacher leaves it out.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import shutil
import sys

from absl import app, flags
from etils import epath

from distill import cache, configure, data, inspection, packing, t5
from distill import vocabulary as vocabulary_lib

_SPLIT = flags.DEFINE_enum("split", "train", ["train", "validation", "test"], "Which rows.")
_MODULE = flags.DEFINE_string("module", "tasks", "Module that registers the tasks.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of the datasets [DISTILL_DATA_DIR].")
_VOCABULARY = flags.DEFINE_string(
    "vocabulary", None, "'bytes' or a SentencePiece model [DISTILL_VOCABULARY]."
)
_PARSING = flags.DEFINE_enum(
    "parsing", None, ["reference", "repaired"], "How the teacher's completions are read."
)
_TEACHER_FILTER = flags.DEFINE_enum(
    "teacher_filter", None, ["keep", "drop", "label_only", "keep_gold"],
    "What becomes of training rows whose teacher label is wrong.",
)  # fmt: skip
_STORE = flags.DEFINE_string("rationale_store", None, "Answers of a teacher of your own.")
_MAX_BAD_ROWS = flags.DEFINE_integer(
    "max_bad_rows", None, "Unusable lines of a file that are left out.", lower_bound=0
)
_ALLOW_MISSING = flags.DEFINE_list("allow_missing", [], "Datasets that may be absent.")
_CACHE_DIR = flags.DEFINE_string("cache_dir", None, "Of tokenised rows [DISTILL_CACHE_DIR].")
_MODEL = flags.DEFINE_string(
    "model", "t5_1_1/base.gin", "The student's gin file; row lengths are chosen for its FLOPs."
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Rows per step [128].", lower_bound=1)
_PAIRS = flags.DEFINE_integer("pairs_per_step", None, "Or: examples per step.", lower_bound=1)
_LENGTHS = flags.DEFINE_list(
    "feature_lengths", None, "Row lengths, INPUTS,TARGETS tokens; else those that waste least."
)
_EXAMPLES = flags.DEFINE_integer("examples", 3, "Examples to show.", lower_bound=0)
_TEACHER = flags.DEFINE_bool("teacher", True, "Show what the teacher said.")
_HTML = flags.DEFINE_string("html", None, "Write the report as one HTML page into this file.")


def student(model: t5.T5Config) -> t5.T5Config:
    """What the model file configures."""
    return model


def load_student(file: str, vocabulary: vocabulary_lib.Vocabulary) -> tuple[t5.T5Config, str]:
    """Returns the student of a model file, and its name for the report."""
    try:
        resolved = configure.resolve(student, [file], ["student.model=%MODEL"])
        model = resolved.arguments()["model"]
    except configure.ConfigError as e:
        raise configure.ConfigError(str(e).replace("--gin_file", "--model")) from e
    name = file.removesuffix(".gin")
    if vocabulary.size > model.vocab_size:
        # Training refuses this; for a report it is enough to say so.
        size = -(-vocabulary.size // 128) * 128
        model = dataclasses.replace(model, vocab_size=size)
        name += f", with --gin.T5Config.vocab_size={size}, which this vocabulary needs"
    return model, f"{name} ({t5.param_count(model):,} parameters)"


def settings(name: str) -> data.DataConfig:
    """Returns what the flags say."""
    if _BATCH_SIZE.value is not None and _PAIRS.value is not None:
        raise configure.ConfigError(
            "Give --batch_size (rows) or --pairs_per_step (examples), not both."
        )
    lengths = None
    if _LENGTHS.value:
        if len(_LENGTHS.value) != 2 or not all(n.strip().isdecimal() for n in _LENGTHS.value):
            raise configure.ConfigError(
                "--feature_lengths takes INPUTS,TARGETS in tokens, for example 512,128, not "
                f"{','.join(_LENGTHS.value)!r}."
            )
        lengths = dict(zip(("inputs", "targets"), map(int, _LENGTHS.value), strict=True))
    return data.DataConfig(
        name,
        _MODULE.value,
        data_dir=_DATA_DIR.value,
        vocabulary=_VOCABULARY.value,
        parsing=_PARSING.value,
        teacher_filter=_TEACHER_FILTER.value,
        rationale_store=_STORE.value,
        max_bad_rows=_MAX_BAD_ROWS.value,
        allow_missing=_ALLOW_MISSING.value,
        cache_dir=_CACHE_DIR.value,
        batch_size=None if _PAIRS.value else _BATCH_SIZE.value or 128,
        pairs_per_step=_PAIRS.value,
        feature_lengths=lengths,
    )


def show(text: str) -> None:
    """Prints a part of the report; a reader that has seen enough (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(argv):
    if len(argv) != 2:
        given = " ".join(argv[1:]) or "nothing"
        raise configure.ConfigError(
            f"Give one task or mixture, for example cqa_step_by_step, not {given}."
        )
    config, split = settings(argv[1]), _SPLIT.value
    if _HTML.value and epath.Path(_HTML.value).is_dir():
        raise configure.ConfigError(f"--html={_HTML.value} is a folder; name the file to write.")
    try:
        vocabulary = vocabulary_lib.load(config.vocabulary)
        model, model_name = load_student(_MODEL.value, vocabulary)
        corpus = cache.load(config, split)
    except ModuleNotFoundError as e:
        raise ValueError(str(e)) from e

    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        # It imports TensorFlow while the rest is computed and printed.
        wanted = config.rows(), split
        teacher = pool.submit(inspection.teacher_reports, *wanted) if _TEACHER.value else None
        found = inspection.inspect(
            corpus, config, vocabulary, packing.Flops.of(model),
            model=model_name, num_examples=_EXAMPLES.value,
        )  # fmt: skip
        tty = sys.stdout.isatty()
        # A terminal that is not UTF-8 gets escapes, not an error.
        sys.stdout.reconfigure(errors="backslashreplace")
        colour = tty and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        width = shutil.get_terminal_size().columns if tty else 100
        show(inspection.text_report(found, colour=colour, width=width))
        if teacher:
            found = dataclasses.replace(found, teacher=teacher.result())
            show(f"\n{inspection.teacher_text(found.teacher)}")
    if _HTML.value:
        path = epath.Path(_HTML.value)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(inspection.html_report(found).encode("utf-8"))
        except OSError as e:
            raise configure.ConfigError(
                f"--html={path} cannot be written: {e.strerror or e}"
            ) from e
        show(f"\n{path}")


def main(argv):
    configure.run_main(run, argv)


if __name__ == "__main__":
    app.run(main)
