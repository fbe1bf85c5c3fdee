r"""Converts a checkpoint between Hugging Face, T5X and this project.

    python scripts/convert_checkpoint.py google/flan-t5-small /tmp/flan_t5_small
    python scripts/convert_checkpoint.py /tmp/svamp_student /tmp/svamp_student_hf
    python scripts/convert_checkpoint.py --to=t5x /tmp/svamp_student /tmp/svamp_student_t5x

FROM is a MODEL_DIR or one checkpoint of this project or of T5X (of several the newest is taken), a
folder in Hugging Face's format, or a model's id on its hub. What it is, is found out. TO is a
folder that does not exist yet. Training takes any FROM as INITIAL_CHECKPOINT_PATH directly.

The result is read back before it gets its name: every array bit by bit, and the logits.
"""

import shlex

from absl import app, flags

from distill import configure, convert, export, t5, vocabulary

_TO = flags.DEFINE_enum(
    "to", None, ["hugging_face", "t5x", "ours"],
    "Format to write; by default hugging_face from a checkpoint of this project, else ours.",
)  # fmt: skip
_VOCABULARY = flags.DEFINE_string(
    "vocabulary", None, "'bytes' or a SentencePiece model; by default what FROM says."
)
_READ_BIN = flags.DEFINE_bool(
    "read_bin", False, "Read pytorch_model.bin, where there is nothing better; needs torch."
)


def run(argv):
    if len(argv) != 3:
        raise ValueError(f"give FROM and TO, two arguments, not {len(argv) - 1}; see --help")
    _, source, destination = argv
    # Adafactor's second moments: T5X goes on with them.
    weights = convert.open_weights(source, slots=_TO.value == "t5x", read_bin=_READ_BIN.value)
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
        print(f"Start from it: --gin.INITIAL_CHECKPOINT_PATH={written}")
        print("Its model: " + _model_flags(weights.model, name))
        return
    if kind == "t5x":
        written = export.save_t5x(destination, weights, weights.model, weights.step, weights.slots)
        moments = "with" if weights.slots else "without"
        print(f"{written}: read back and equal; {moments} Adafactor's second moments")
        return
    found = None
    if spec is None:
        print("note: no tokenizer is known, so none is written; see --vocabulary")
    else:
        try:
            found = vocabulary.load(spec)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}. Give it with --vocabulary.") from error
    export.save_hugging_face(destination, weights, weights.model, found)
    print(f"{destination}: read back and equal, logits too")
    print(f"transformers.T5ForConditionalGeneration.from_pretrained({destination!r})")


def _model_flags(model: t5.T5Config, name: str | None) -> str:
    """What scripts/train.py needs to build this model."""
    if name:
        return f"--gin_file={name}.gin"
    sizes = ("vocab_size", "emb_dim", "num_heads", "num_encoder_layers", "num_decoder_layers",
             "head_dim", "mlp_dim", "mlp_activations", "logits_via_embedding")  # fmt: skip
    return " ".join(
        ["--gin_file=t5_1_1/small.gin"]
        + [f"--gin.T5Config.{field}={shlex.quote(repr(getattr(model, field)))}" for field in sizes]
    )


def main(argv):
    configure.run_main(run, argv)


if __name__ == "__main__":
    app.run(main)
