r"""Trains a SentencePiece vocabulary on the training texts of one or several mixtures.

    python scripts/train_vocabulary.py --mixture=svamp_step_by_step,cqa_step_by_step \
        --data_dir=/data --vocab_size=8000 --output=/data/spiece.model

The model is a unigram model as T5 has it: pad 0, eos 1, unk 2, no bos; characters that it has not
seen become bytes. The input and target texts of the train split are used, each distinct text once.
The same texts give the same file. Small data gives fewer pieces than asked for.
"""

import io

import sentencepiece
from absl import app, flags
from etils import epath

from distill import configure, task

_MIXTURE = flags.DEFINE_list(
    "mixture", None, "Tasks or mixtures whose train split is read, comma separated."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of the datasets [DISTILL_DATA_DIR].")
_VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 8000, "Pieces at most, 3 special ids and 256 bytes included.", lower_bound=300
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "The model file to write, <folder>/spiece.model, local or gs://."
)
_MODULE = flags.DEFINE_string("module", "tasks", "Module that registers the tasks.")
flags.mark_flags_as_required(["mixture", "output"])


def train(texts: list[str], vocab_size: int) -> bytes:
    """Returns a serialized SentencePiece model trained on `texts`.

    Args:
      texts: one sentence each; line breaks in them count as spaces, as in T5's vocabulary.
      vocab_size: pieces at most.

    Raises:
      ValueError: the texts are too few, or `vocab_size` is too small for them.
    """
    if not texts:
        raise ValueError("no text to train a vocabulary on: is the train split empty?")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            # Longer sentences than this are dropped without an error; the default is 4192 bytes.
            max_sentence_length=max(len(t.encode("utf-8")) for t in texts) + 1,
            # Sums over threads depend on their number, and the file would too.
            num_threads=4,
            minloglevel=1,
        )
    except RuntimeError as e:
        raise ValueError(
            f"SentencePiece could not train {vocab_size} pieces on {len(texts)} "
            f"texts: {e}. Use more text or another --vocab_size"
        ) from e
    return model.getvalue()


def run(argv):
    if len(argv) > 1:
        raise ValueError(f"unexpected arguments {argv[1:]}; names go to --mixture=a,b")
    output = epath.Path(_OUTPUT.value)
    if output.is_dir():
        output = output / "spiece.model"
    # Reading tokenises; bytes need no vocabulary file, and the texts come along untouched.
    task.bind(data_dir=_DATA_DIR.value, vocabulary="bytes")
    task.import_module(_MODULE.value)
    for name in _MIXTURE.value:
        task.lookup(name)  # All names are checked before minutes are spent on the first.
    # Predict and explain have the same inputs but for the prefix; a dict keeps the order.
    texts = list(
        dict.fromkeys(
            text for name in _MIXTURE.value for text in task.pretokenized_texts(name, "train")
        )
    )
    model = train(texts, _VOCAB_SIZE.value)

    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.partial"
    partial.write_bytes(model)
    partial.replace(output)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model).GetPieceSize()
    print(f"{len(texts)} sentences, {pieces} pieces (at most {_VOCAB_SIZE.value}) -> {output}")
    print(
        f"next: python scripts/train.py --gin.VOCABULARY={output} "
        f"--gin.MIXTURE_OR_TASK_NAME={_MIXTURE.value[0]} ..."
    )


def main(argv):
    configure.run_main(run, argv)


if __name__ == "__main__":
    app.run(main)
