"""Vocabularies: equal to SeqIO's, inverse of each other, and clear when they cannot be had."""

import pickle
import shutil

import pytest

from distill import vocabulary

TEXTS = ["How many apples? ( 84.0 / 2.0 )", "", "naïve café — 数学 🍎", "a</s>b", "two\nlines"]
CORPUS = [f"Luke scored {i} points after playing {i % 7} rounds of a game" for i in range(300)]


def train_sentencepiece(path, **special):
    import sentencepiece

    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | special
    with open(path, "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=model,
            vocab_size=400,
            hard_vocab_limit=False,
            byte_fallback=True,
            minloglevel=2,
            **ids,
        )
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("sp") / "spiece.model")


@pytest.fixture(params=["bytes", "sentencepiece"])
def vocab(request):
    spec = "bytes" if request.param == "bytes" else request.getfixturevalue("model")
    return vocabulary.load(spec)


def test_decode_inverts_encode(vocab):
    for text in TEXTS:
        # SentencePiece's T5 normalisation makes a line break a space; bytes keep everything.
        expected = text if vocab.spec == "bytes" else text.replace("\n", " ")
        ids = vocab.encode(text)
        assert vocab.decode(ids) == expected
        assert all(vocab.unk_id < i < vocab.size for i in ids)


def test_batch_is_encode_of_each(vocab):
    assert vocab.encode_batch(TEXTS) == [vocab.encode(text) for text in TEXTS]


def test_decode_stops_at_eos_and_drops_what_is_not_text(vocab):
    ids = vocab.encode("points")
    noise = [vocab.pad_id, *ids[:1], vocab.unk_id, *ids[1:], vocab.size, vocab.size + 1000]
    assert vocab.decode([*noise, vocab.eos_id, *ids]) == "points"


def test_decode_survives_torn_characters():
    ids = vocabulary.load("bytes").encode("é")
    assert vocabulary.load("bytes").decode(ids[:1]) == ""


def test_equals_seqio(vocab):
    theirs = vocab.as_seqio()
    assert theirs == vocab.as_seqio()  # SeqIO compares the vocabularies of a mixture's members
    assert theirs.vocab_size == vocab.size
    assert (theirs.pad_id, theirs.eos_id, theirs.unk_id) == (0, 1, 2)
    for text in TEXTS:
        assert vocab.encode(text) == list(theirs.encode(text))
        assert vocab.encode(text) == theirs.encode_tf(text).numpy().tolist()
        assert vocab.decode(vocab.encode(text)) == theirs.decode(vocab.encode(text))


def test_bytes_are_byt5s_ids():
    assert vocabulary.load("bytes").encode("Aé") == [65 + 3, 0xC3 + 3, 0xA9 + 3]


def test_fingerprint_follows_the_content_not_the_path(model, tmp_path):
    copy = tmp_path / "copy.model"
    shutil.copy(model, copy)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "spiece.model").write_bytes(copy.read_bytes())
    one, two, folder = (vocabulary.load(str(p)) for p in (model, copy, tmp_path / "hf"))
    assert one.fingerprint == two.fingerprint == folder.fingerprint
    other = train_sentencepiece(tmp_path / "other.model", add_dummy_prefix=False)
    assert vocabulary.load(other).fingerprint != one.fingerprint
    assert vocabulary.load("bytes").fingerprint != one.fingerprint


def test_can_be_sent_to_a_worker_process(vocab):
    assert pickle.loads(pickle.dumps(vocab)).encode("points") == vocab.encode("points")


def test_missing_file_says_what_is_allowed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.model.*scripts/train_vocabulary\.py"):
        vocabulary.load(str(tmp_path / "nothing.model"))
    with pytest.raises(FileNotFoundError, match=r"holds no spiece\.model"):
        vocabulary.load(str(tmp_path))


def test_corrupt_model_is_named(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"bad\.model \(11 bytes\) is not a SentencePiece model"):
        vocabulary.load(str(tmp_path / "bad.model"))


def test_other_special_ids_are_refused(tmp_path):
    path = train_sentencepiece(tmp_path / "llama.model", pad_id=-1, unk_id=0, bos_id=1, eos_id=2)
    with pytest.raises(ValueError, match=r"\(-1, 2, 0\); T5 needs \(0, 1, 2\).*--pad_id=0"):
        vocabulary.load(path)
