"""Vocabularies: text to token ids and back, without TensorFlow.

Ids 0, 1 and 2 are padding, end of sequence and unknown in every vocabulary, as in T5 and ByT5.
Reading the same text through SeqIO (`Vocabulary.as_seqio`) gives the same ids.
"""

import abc
import hashlib
from collections.abc import Iterable, Sequence

EOS_TEXT = "</s>"  # in an input it stands for the EOS id
BYTES = "bytes"
SPIECE = "spiece.model"


class Vocabulary(abc.ABC):
    """Text to token ids and back.

    Attributes:
      spec: what `load` was given.
      size: number of ids that mean something; a model's embedding may have more rows.
      pad_id: 0, also the decoder's start token.
      eos_id: 1, end of sequence.
      unk_id: 2, unknown.
      fingerprint: sha256 (hex) of what decides the ids; two vocabularies with the same
        fingerprint tokenise alike, wherever their files are.
    """

    spec: str
    size: int
    fingerprint: str
    pad_id = 0
    eos_id = 1
    unk_id = 2

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without an EOS."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, without an EOS."""
        return [self.encode(text) for text in texts]

    def encode_input(self, text: str) -> list[int]:
        """Returns the ids of an input with its EOS, as a task's rows have them.

        A literal `</s>` inside it becomes the EOS id, see `task.tokenize`.
        """
        pieces = self.encode_batch(text.split(EOS_TEXT))
        return [i for piece in pieces for i in (*piece, self.eos_id)]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids` up to the first EOS.

        Padding, unknowns and ids that the vocabulary does not have are dropped: a model's
        embedding is often padded to a round number of rows, and an untrained model emits those.

        Args:
          ids: token ids, a list or an integer array [length].
        """
        kept = []
        for i in map(int, ids):
            if i == self.eos_id:
                break
            if self.unk_id < i < self.size:
                kept.append(i)
        return self._decode(kept)

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Returns the text of ids that are all in 3 .. size - 1."""

    @abc.abstractmethod
    def as_seqio(self):
        """Returns the `seqio.Vocabulary` that gives the same ids (imports TensorFlow)."""


class ByteVocabulary(Vocabulary):
    """UTF-8 bytes, id = byte + 3, as in ByT5 (Xue et al. 2022, arXiv 2105.13626)."""

    spec = BYTES
    size = 256 + 3
    fingerprint = hashlib.sha256(b"utf-8 bytes, id = byte + 3, pad 0, eos 1, unk 2").hexdigest()

    def encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode("utf-8")]

    def _decode(self, ids: list[int]) -> str:
        # A prediction may stop in the middle of a character; SeqIO drops the torn bytes too.
        return bytes(i - 3 for i in ids).decode("utf-8", errors="ignore")

    def as_seqio(self):
        import seqio

        return seqio.ByteVocabulary(extra_ids=0)


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model with pad 0, eos 1 and unk 2.

    Args:
      spec: what the user gave, kept for messages.
      path: the model file, local or gs://.

    Raises:
      ValueError: the file is not a SentencePiece model, or its special ids are not 0, 1 and 2.
    """

    def __init__(self, spec: str, path: str):
        import sentencepiece
        from etils import epath

        serialized = epath.Path(path).read_bytes()
        self.spec = spec
        self.path = path
        self.fingerprint = hashlib.sha256(serialized).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(serialized)
        except RuntimeError as e:
            raise ValueError(
                f"{path} ({len(serialized)} bytes) is not a SentencePiece model: {e}"
                ". Copy it again, or train one: scripts/train_vocabulary.py"
            ) from e
        found = self._processor.pad_id(), self._processor.eos_id(), self._processor.unk_id()
        if found != (self.pad_id, self.eos_id, self.unk_id):
            raise ValueError(
                f"{path} has pad, eos, unk = {found}; T5 needs (0, 1, 2). Train one with "
                "scripts/train_vocabulary.py, or with spm_train --pad_id=0 --eos_id=1 --unk_id=2 "
                "--bos_id=-1"
            )
        self.size = self._processor.GetPieceSize()

    def encode(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.Encode(list(texts))

    def _decode(self, ids: list[int]) -> str:
        return self._processor.DecodeIds(ids)

    def as_seqio(self):
        import seqio

        return seqio.SentencePieceVocabulary(self.path, extra_ids=0)


def load(spec: str) -> Vocabulary:
    """Returns the vocabulary that `spec` names.

    Args:
      spec: "bytes"; a SentencePiece `.model` file; or a folder that holds `spiece.model`, such as
        a T5 model saved by Hugging Face. Paths may be local or gs://.

    Raises:
      FileNotFoundError: there is no such file, or the folder has no `spiece.model`.
      ValueError: the file is not a SentencePiece model with pad 0, eos 1 and unk 2.
    """
    if spec == BYTES:
        return ByteVocabulary()
    from etils import epath

    allowed = (
        f"VOCABULARY is {BYTES!r}, a SentencePiece .model file, or a folder with {SPIECE}; "
        "scripts/train_vocabulary.py trains one"
    )
    path = epath.Path(spec)
    if path.is_dir():
        path = path / SPIECE
        if not path.exists():
            raise FileNotFoundError(f"the folder {spec} holds no {SPIECE}. {allowed}")
    elif not path.exists():
        raise FileNotFoundError(f"no vocabulary at {spec!r}. {allowed}")
    return SentencePieceVocabulary(spec, str(path))
