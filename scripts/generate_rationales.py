"""Asks a teacher for a rationale and a label for every input of a dataset.

Give teacher.gin and macros (upper case):

  MIXTURE_OR_TASK_NAME  a dataset, or a SeqIO task or mixture: whose inputs are asked (needed)
  STORE                 SQLite file of the answers (needed); a run goes on with what is there, and
                        nothing is bought twice
  TEACHER               scripted (no network: the arithmetic task), openai (any OpenAI-compatible
                        endpoint), checkpoint (a student of this project), replay (what was
                        released with a dataset)
  MODEL, BASE_URL       of the endpoint; the key is in $OPENAI_API_KEY (API_KEY_ENV, API_KEY_FILE)
  NUM_SAMPLES, TEMPERATURE, RATIONALISE           several answers, a vote, reasons for gold labels
  MAX_COST, PRICE_PROMPT, PRICE_COMPLETION        ceiling, and prices for a million tokens
  ANSWER_MATCH, MIN_WORDS, MAX_WORDS, LEAKS, ...  which answers train a student

All macros are in gin_configs/runs/teacher.gin. Beside the store are written its name with .jsonl,
for RATIONALE_STORE of a training, and with .html, the report.

Without network:

  python scripts/generate_rationales.py --gin_file=teacher.gin \\
    --gin.MIXTURE_OR_TASK_NAME=arithmetic --gin.STORE=/tmp/arithmetic.sqlite

A hosted model, at most 5 dollars of it (--yes: do not ask before spending):

  python scripts/generate_rationales.py --gin_file=teacher.gin --yes \\
    --gin.MIXTURE_OR_TASK_NAME=svamp --gin.STORE=/data/svamp.sqlite --gin.TEACHER=openai \\
    --gin.MODEL=... --gin.PRICE_PROMPT=0.15 --gin.PRICE_COMPLETION=0.6 --gin.MAX_COST=5

A whole store as JSON lines, and back:

  python scripts/generate_rationales.py --store=/data/svamp.sqlite --export_to=svamp_store.jsonl
  python scripts/generate_rationales.py --store=/tmp/copy.sqlite --import_from=svamp_store.jsonl
"""

from absl import flags

from distill import configure
from distill.teacher import generate, store

_STORE = flags.DEFINE_string("store", None, "Of --export_to and --import_from.")
_EXPORT_TO = flags.DEFINE_string("export_to", None, "Write the store as JSON lines; asks nothing.")
_IMPORT_FROM = flags.DEFINE_string("import_from", None, "Put such JSON lines into the store.")


def run(argv):
    if not any(arg.startswith(("--export_to", "--import_from")) for arg in argv):
        # A flag, as people expect one; gin has no flags.
        configure.execute(
            generate.generate, ["--gin.YES=True" if arg == "--yes" else arg for arg in argv]
        )
        return
    configure.parse_argv(argv)
    if _STORE.value is None or bool(_EXPORT_TO.value) == bool(_IMPORT_FROM.value):
        raise ValueError("give --store, and --export_to or --import_from")
    with store.Store(_STORE.value, write=bool(_IMPORT_FROM.value)) as opened:
        if _IMPORT_FROM.value:
            lines = store.read_export(_IMPORT_FROM.value, opened)
        else:
            lines = store.export(opened, _EXPORT_TO.value)
    print(f"{lines} lines")


if __name__ == "__main__":
    configure.run_main(run)
