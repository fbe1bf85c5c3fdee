r"""Converts a checkpoint between Hugging Face, T5X and this project.

    python scripts/convert_checkpoint.py google/flan-t5-small /tmp/flan_t5_small
    python scripts/convert_checkpoint.py /tmp/svamp_student /tmp/svamp_student_hf
    python scripts/convert_checkpoint.py --to=t5x /tmp/svamp_student /tmp/svamp_student_t5x

FROM is a MODEL_DIR or one checkpoint of this project or of T5X (of several the newest is taken), a
folder in Hugging Face's format, or a model's id on its hub. What it is, is found out. TO is a
folder that does not exist yet. Training takes any FROM as INITIAL_CHECKPOINT_PATH directly.

The result is read back: every array bit by bit, and the logits.
"""

import dataclasses
import shlex
import signal
import sys

from absl import app, flags

from distill import configure, convert, export, t5, vocabulary

_TO = flags.DEFINE_enum(
    "to", None, ["hugging_face", "t5x", "ours"],
    "Format to write; by default hugging_face from a checkpoint of this project, else ours.",
)  # fmt: skip
_VOCABULARY = flags.DEFINE_string(
    "vocabulary", None, "'bytes' or a SentencePiece model; by default what FROM says."
)
_ACTIVATIONS = flags.DEFINE_list(
    "mlp_activations", None, "Of a T5X checkpoint, which does not tell: gelu,linear for example."
)
_READ_BIN = flags.DEFINE_bool(
    "read_bin", False, "Read pytorch_model.bin, where there is nothing better; needs torch."
)


def run(argv):
    if len(argv) != 3:
        raise ValueError(f"give FROM and TO, two arguments, not {len(argv) - 1}; see --help")
    try:
        convert_checkpoint(*argv[1:])
    except OSError as error:  # a full disk, no permission
        raise ValueError(str(error)) from error


def convert_checkpoint(source: str, destination: str) -> None:
    """Converts FROM into TO, as the flags say."""
    # Adafactor's second moments: T5X goes on with them.
    weights = convert.open_weights(source, slots=_TO.value == "t5x", read_bin=_READ_BIN.value)
    if _ACTIVATIONS.value:
        if weights.kind != convert.T5X:
            raise ValueError(f"--mlp_activations is for T5X; {weights.path} says what it has")
        model = dataclasses.replace(weights.model, mlp_activations=tuple(_ACTIVATIONS.value))
        weights = dataclasses.replace(weights, model=model, notes=())
    name = convert.released(weights.model)
    print(
        f"{weights.path}: {weights.kind}, step {weights.step:,}, "
        f"{t5.param_count(weights.model):,} parameters" + (f", {name}" if name else "")
    )
    for note in weights.notes:
        print(f"note: {note}")
    kind = _TO.value or ("hugging_face" if weights.kind == convert.OURS else "ours")
    spec = _VOCABULARY.value or weights.vocabulary
    if kind == "ours":
        written = export.save_ours(destination, weights, spec)
        if weights.kind == convert.T5X:
            print("note: without Adafactor's second moments; training takes them from FROM itself")
        print(f"Start from it: --gin.INITIAL_CHECKPOINT_PATH={written}")
        print("Its model: " + _model_flags(weights.model, name))
        return
    if kind == "t5x":
        written = export.save_t5x(destination, weights, weights.model, weights.step, weights.slots)
        moments = "with" if weights.slots else "without"
        print(f"{written}: read back and equal; {moments} Adafactor's second moments")
        return
    found, tokenizer = None, None
    if weights.kind == convert.HUGGING_FACE and not _VOCABULARY.value:
        tokenizer = weights.path
    elif spec is None:
        print("note: no tokenizer is known, so none is written; see --vocabulary")
    else:
        try:
            found = vocabulary.load(spec)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}. Give it with --vocabulary.") from error
    export.save_hugging_face(destination, weights, weights.model, found, tokenizer=tokenizer)
    print(f"{destination}: read back and equal, logits too")
    print(f"transformers.T5ForConditionalGeneration.from_pretrained({destination!r})")


def _model_flags(model: t5.T5Config, name: str | None) -> str:
    """What scripts/train.py needs to build this model."""
    if name:
        return f"--gin_file={name}.gin"
    return " ".join(
        ["--gin_file=t5_1_1/small.gin"]
        + [
            f"--gin.T5Config.{field}={shlex.quote(repr(getattr(model, field)))}"
            for field in convert.ARCHITECTURE
        ]
    )


def main(argv):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written goes
    configure.run_main(run, argv)


if __name__ == "__main__":
    app.run(main)
