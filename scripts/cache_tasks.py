r"""Tokenises tasks and mixtures into the row cache, before a run needs them.

    python scripts/cache_tasks.py --mixture=cqa_step_by_step,svamp_step_by_step \
        --data_dir=/data --vocabulary=/data/spiece.model

A run does the same at its start, for what is not cached or not fresh. Do it beforehand where many
processes start at once, or where the machine that trains should not import TensorFlow. The settings
must be those of the run: a cache belongs to its data folder, vocabulary, parsing and filter.
"""

from absl import app, flags

from distill import cache, configure

_MIXTURE = flags.DEFINE_list("mixture", None, "Tasks or mixtures, comma separated.", required=True)
_SPLITS = flags.DEFINE_list("splits", ["train", "validation", "test"], "Splits, comma separated.")
_MODULE = flags.DEFINE_string("module", "tasks", "Module that registers the tasks.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of the datasets [DISTILL_DATA_DIR].")
_VOCABULARY = flags.DEFINE_string(
    "vocabulary", None, "'bytes' or a SentencePiece model [DISTILL_VOCABULARY]."
)
_PARSING = flags.DEFINE_string("parsing", None, "'reference' or 'repaired'.")
_TEACHER_FILTER = flags.DEFINE_string(
    "teacher_filter", None, "'keep', 'drop', 'label_only' or 'keep_gold'."
)
_STORE = flags.DEFINE_string("rationale_store", None, "Answers of a teacher of your own.")
_MAX_BAD_ROWS = flags.DEFINE_integer("max_bad_rows", None, "Unusable lines to leave out.")
_ALLOW_MISSING = flags.DEFINE_list("allow_missing", [], "Datasets that may be absent.")
_CACHE_DIR = flags.DEFINE_string("cache_dir", None, "Where to keep them [DISTILL_CACHE_DIR].")
_REBUILD = flags.DEFINE_bool("rebuild", False, "Build also what is fresh.")


def run(argv):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {argv[1:]}; names go to --mixture=a,b")
    for name in _MIXTURE.value:
        config = cache.RowsConfig(
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
        )
        built = cache.prepare(config, _SPLITS.value, rebuild=_REBUILD.value)
        for split in _SPLITS.value:
            try:
                corpus = cache.load(config, split, prepared=True)
            except cache.NoSplitError as e:
                print(f"{name} {split}: {e}")
                continue
            rows = sum(map(len, corpus.tasks))
            tokens = sum(int(task.lengths.sum()) for task in corpus.tasks)
            state = "built" if split in built else "fresh"
            print(f"{name} {split}: {rows:,} rows, {tokens:,} tokens, {state}: {corpus.folder}")


def main(argv):
    configure.run_main(run, argv)


if __name__ == "__main__":
    app.run(main)
