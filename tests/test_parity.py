"""The same weights in Hugging Face's T5: equal logits, gradients and tokens, both ways.

Into ours: torch saves a model as a user would have it, `convert` reads it. Out of ours: `export`
writes a folder, transformers loads it. Every answer of torch comes from hugging_face_t5.py.
"""

import dataclasses
import io
import pathlib
import shutil

import jax
import numpy as np
import pytest
from hugging_face_t5 import EOS, MAX_NEW_TOKENS, V1_0, V1_1, ask, random_batch, require_torch
from test_goldens import logits_of, loss_and_gradients
from test_vocabulary import CORPUS

from distill import convert, decode, export, t5, vocabulary

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", autouse=True)
def torch_there():
    """Before the other fixtures, which take seconds."""
    require_torch()


# Of the largest logit, or of a tensor's largest gradient. Float32 differs by 1e-6 to 1e-5.
TOLERANCE = 1e-4
# Two logits so close may be ordered otherwise by other sums of the same numbers.
TIE = 1e-4

MODELS = {
    "small-1.1": dict(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_decoder_layers=8,
        num_heads=6, seed=21, eos=(1, 2.5), **V1_1,
    ),
    "tiny-1.0": dict(
        vocab_size=384, d_model=64, d_kv=16, d_ff=160, num_layers=2, num_decoder_layers=3,
        num_heads=4, seed=22, eos=(353, 1.25), **V1_0,
    ),
}  # fmt: skip
# Beyond 128 tokens all offsets share a position bucket, in the encoder and in the decoder.
LENGTHS = [(5, 3), (150, 9), (12, 1), (31, 140)]


def inputs_of(sizes):
    """The batch to compare on, and 50 inputs of 1 to 50 tokens to continue."""
    batch = random_batch(sizes["seed"], sizes["vocab_size"], LENGTHS)
    prompts = random_batch(sizes["seed"] + 1, sizes["vocab_size"], [(n, 1) for n in range(1, 51)])
    return batch, prompts["encoder_input_tokens"]


def assert_close(name, ours, theirs):
    difference = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert difference <= TOLERANCE, f"{name}: differs by {difference:.1e} of its scale"
    return difference


def assert_same_tokens(params, model, prompts, theirs):
    """Greedy continuations are equal, but where the two best logits tie; prints how many did."""
    ours = np.asarray(decode.greedy(params, prompts, model=t5.T5(model), max_length=MAX_NEW_TOKENS))
    tied = []
    for row in np.flatnonzero((ours != theirs["tokens"]).any(axis=1)):
        first = np.flatnonzero(ours[row] != theirs["tokens"][row])[0]
        margin = theirs["margins"][row, first]
        assert margin <= TIE, f"row {row}, token {first}: {ours[row]} {theirs['tokens'][row]}"
        tied.append(row)
    print(f"{len(ours)} continuations, {len(tied)} differ at a tie: {tied}")
    assert len(tied) < len(ours) / 10


@dataclasses.dataclass
class Case:
    """A model that torch made and saved: ours, read from its folder, and what torch computed."""

    sizes: dict
    params: dict
    model: t5.T5Config
    gradients: dict
    batch: dict
    prompts: np.ndarray
    theirs: dict


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    sizes = MODELS[request.param]
    batch, prompts = inputs_of(sizes)
    folder = tmp_path_factory.mktemp("made")
    theirs, _ = ask(folder, {"task": "make", "sizes": sizes}, batch | {"prompts": prompts})
    weights = convert.open_weights(folder / "model")
    yield Case(
        sizes, convert.read_params(weights), weights.model,
        convert.read_params(convert.open_weights(folder / "gradients")), batch, prompts, theirs,
    )  # fmt: skip
    shutil.rmtree(folder)  # 600 MB


def test_the_imported_size_is_the_one_that_was_saved(case):
    sizes, tied = case.sizes, case.sizes["tied"]
    want = t5.T5Config(
        vocab_size=sizes["vocab_size"], emb_dim=sizes["d_model"], num_heads=sizes["num_heads"],
        num_encoder_layers=sizes["num_layers"], num_decoder_layers=sizes["num_decoder_layers"],
        head_dim=sizes["d_kv"], mlp_dim=sizes["d_ff"], dropout_rate=case.model.dropout_rate,
        mlp_activations=("relu",) if tied else ("gelu", "linear"), logits_via_embedding=tied,
        dtype=case.model.dtype,
    )  # fmt: skip
    assert case.model == want
    if not tied:
        assert t5.param_count(case.model) == 76_961_152  # T5 1.1 small, as released


def test_logits_equal_hugging_faces(case):
    ours = logits_of(case.params, case.model, case.batch)
    real = case.batch["decoder_target_tokens"] > 0
    difference = assert_close("logits", ours[real], case.theirs["logits"][real])
    print(f"logits within {difference:.1e} of their scale")


def test_loss_and_gradients_equal_hugging_faces(case):
    loss, ours = loss_and_gradients(case.params, case.model, case.batch)
    assert loss == pytest.approx(float(case.theirs["loss"]), rel=1e-5)
    named = jax.tree_util.tree_leaves_with_path(ours)
    theirs = jax.tree.leaves(case.gradients)
    assert jax.tree.structure(ours) == jax.tree.structure(case.gradients)
    differences = []
    for (path, array), want in zip(named, theirs, strict=True):
        name = jax.tree_util.keystr(path)
        # Stacked: each layer against its own scale.
        for i, (one, other) in enumerate(
            zip(array, want, strict=True) if "'layers'" in name else [(array, want)]
        ):
            differences.append(assert_close(f"{name}[{i}]", one, other))
    print(f"{len(differences)} gradients within {max(differences):.1e} of their scale")


def test_greedy_tokens_equal_hugging_faces(case):
    ended = (case.theirs["tokens"] == EOS).any(axis=1)
    print(f"{ended.sum()} of {len(ended)} end by EOS")
    assert 5 <= ended.sum() <= 45  # else stopping, or not stopping, is not tested
    assert_same_tokens(case.params, case.model, case.prompts, case.theirs)


# --- Out of ours ----------------------------------------------------------------------------------

TINY_1_1 = t5.T5Config(
    vocab_size=512, dtype="float32", emb_dim=48, num_heads=3, num_encoder_layers=2,
    num_decoder_layers=2, head_dim=8, mlp_dim=80, dropout_rate=0.0,
)  # fmt: skip
EXPORTS = {
    "1.1": TINY_1_1,
    "1.0": dataclasses.replace(
        TINY_1_1, mlp_activations=("relu",), logits_via_embedding=True, num_decoder_layers=3
    ),
}

PLAIN = [
    "", "points", "Luke scored 7 points after playing 3 rounds", "predict: a game",
    "explain: How many apples are there? ( 84.0 / 2.0 )", "UPPER and lower", "12345 67,890.5%",
    "3 + 4 = 7; (3 + 4) * 5", "a", "A.", "...", "(a) math problem", "don't, won't & can't", "q",
    "x_1 = -y^2", '"quoted" [brackets] {braces} <angles>', "semi;colon:comma,stop.",
    "one two three four five six seven eight nine ten",
]  # fmt: skip
ACCENTED = ["naïve café", "Über Ähre", "smörgåsbord", "e\u0301 composed", "— dash", "ﬁne ½ ①"]
SPACES = [
    "two  spaces", " leading", "trailing ", "a\nnew line", "a\n\nparagraph\n", "tab\tbed",
    "What is it?\nAnswer Choices:\n(a) points\n(b) a game", " ", "wide\u3000and\u00a0hard",
]  # fmt: skip
# The pieces of the test's SentencePiece model lack these characters.
UNSEEN = ["ж", "Luke scored ж points", "数学 🍎"]
# What spells a special token is one in transformers, and text in ours.
SPECIAL = ["</s>", "a</s>b", "<pad> <unk>"]


def sentencepiece_vocabulary(folder):
    """A vocabulary as scripts/train_vocabulary.py makes it, on the texts of this file."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS + 3 * (PLAIN + ACCENTED + SPACES)), model_writer=written,
        vocab_size=450, hard_vocab_limit=False, byte_fallback=True, character_coverage=1.0,
        minloglevel=2, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(written.getvalue())
    return vocabulary.load(str(folder))


@dataclasses.dataclass
class Export:
    """A model and a vocabulary of ours, their export, and what transformers makes of that."""

    model: t5.T5Config
    params: dict
    vocab: vocabulary.Vocabulary
    texts: list
    folder: pathlib.Path
    batch: dict
    prompts: np.ndarray
    theirs: dict
    facts: dict


@pytest.fixture(scope="module", params=EXPORTS)
def exported(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    model = EXPORTS[request.param]
    rng = np.random.default_rng(3)

    def draw(shape):
        scale = 1.0 if len(shape) < 2 else 1 / np.sqrt(shape[-2])
        return (rng.normal(0, scale, shape)).astype(np.float32)

    params = jax.tree.map(lambda x: draw(x.shape), t5.param_shapes(model))
    if model.logits_via_embedding:  # a part of the rows shall end
        params["token_embedder"]["embedding"][EOS] *= 3
    else:
        params["decoder"]["logits_dense"]["kernel"][:, EOS] *= 3
    vocab = sentencepiece_vocabulary(folder) if request.param == "1.0" else vocabulary.load("bytes")
    export.save_hugging_face(folder / "model", params, model, vocab)
    texts = PLAIN + ACCENTED + SPACES + UNSEEN + SPECIAL
    batch = random_batch(5, model.vocab_size, [(5, 3), (40, 9), (12, 1)])
    prompts = random_batch(6, model.vocab_size, [(n, 1) for n in range(1, 21)])
    prompts = prompts["encoder_input_tokens"]
    theirs, facts = ask(folder, {"task": "load", "texts": texts}, batch | {"prompts": prompts})
    return Export(model, params, vocab, texts, folder / "model", batch, prompts, theirs, facts)


def test_transformers_loads_all_that_we_export_and_nothing_else(exported):
    loading = exported.facts["loading"]
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= loading.keys()
    assert not any(loading.values()), loading
    assert exported.facts["tied"] == exported.model.logits_via_embedding
    # And we read it back, bit for bit.
    weights = convert.open_weights(exported.folder)
    assert dataclasses.replace(weights.model, dtype="float32") == exported.model
    jax.tree.map(np.testing.assert_array_equal, convert.read_params(weights), exported.params)


def test_an_export_has_our_logits_and_greedy_tokens(exported):
    params, model, theirs = exported.params, exported.model, exported.theirs
    real = exported.batch["decoder_target_tokens"] > 0
    ours = logits_of(params, model, exported.batch)
    assert_close("logits", ours[real], theirs["logits"][real])
    ended = (theirs["tokens"] == EOS).any(axis=1)
    assert 3 <= ended.sum() <= len(ended) - 3
    assert_same_tokens(params, model, exported.prompts, theirs)


def test_an_exported_tokenizer_gives_our_ids(exported):
    """transformers 5 agrees but for two kinds of text.

    Its T5Tokenizer has no byte fallback: a character without a piece is `<unk>` there, and its
    bytes here. And the name of a special token in a text is that token there, and text here.
    """
    vocab, facts = exported.vocab, exported.facts
    of_bytes = vocab.spec == "bytes"
    assert facts["tokenizer"] == ("ByT5Tokenizer" if of_bytes else "T5Tokenizer")
    assert facts["special"] == [vocab.pad_id, vocab.eos_id, vocab.unk_id]
    theirs = dict(zip(exported.texts, facts["ids"], strict=True))
    ours = {text: [*vocab.encode(text), vocab.eos_id] for text in exported.texts}
    print(f"{facts['tokenizer']}: differs on {[t for t in ours if ours[t] != theirs[t]]}")
    same = PLAIN + ACCENTED + SPACES + (UNSEEN if of_bytes else [])
    assert {text: theirs[text] for text in same} == {text: ours[text] for text in same}
    if not of_bytes:  # unknown, not some other piece
        assert all(vocab.unk_id in theirs[text] for text in UNSEEN)
        assert not any(vocab.unk_id in ours[text] for text in UNSEEN)
