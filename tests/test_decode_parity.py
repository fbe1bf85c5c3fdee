"""Greedy decoding and beams beside transformers' `generate`, on the same weights.

scripts/benchmarks/decode.py compares a trained student on real inputs.
"""

import jax
import numpy as np
import pytest
from hugging_face_t5 import EOS, V1_1, ask, random_batch, require_torch

from distill import convert, decode, partitioning, t5

pytestmark = pytest.mark.parity

# EOS is likelier than with random weights alone, so that most answers end, and some do not.
SIZES = dict(
    vocab_size=256, d_model=48, d_kv=16, d_ff=96, num_layers=3, num_decoder_layers=3, num_heads=4,
    seed=41, eos=(EOS, 2.0), **V1_1,
)  # fmt: skip
LENGTH, BEAMS = 24, 4
# What decided between two answers may be this small: other sums of the same numbers.
TIE = 1e-4
CANONICAL = {"length_penalty": 0.0, "early_stopping": "never"}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(decode(inputs, how), prompts, what transformers answered)."""
    require_torch()
    folder = tmp_path_factory.mktemp("search")
    lengths = [(n, 1) for n in [*range(1, 41), *range(2, 82, 4)]]
    prompts = random_batch(42, SIZES["vocab_size"], lengths)["encoder_input_tokens"]
    searches = [
        {"max_new_tokens": LENGTH, "num_beams": 1},
        {"max_new_tokens": LENGTH, "num_beams": BEAMS, "num_return_sequences": BEAMS, **CANONICAL},
    ]
    request = {"task": "search", "sizes": SIZES, "searches": searches}
    theirs, _ = ask(folder, request, {"prompts": prompts})
    weights = convert.open_weights(folder / "model")
    params, net = convert.read_params(weights), t5.T5(weights.model)
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=1), jax.devices()[:1])
    inputs = [row[row > 0] for row in prompts]

    def run(how):
        # Batches of 16 sorted by length, where theirs is one in order.
        return decode.generate(params, net, inputs, mesh, how, max_length=LENGTH, batch_size=16)

    def score(answers):
        return decode.score_choices(params, net, inputs, answers, mesh)

    return run, score, theirs


def without_eos(row):
    ended = np.flatnonzero(row == EOS)
    return row[: ended[0]] if len(ended) else np.pad(row, (0, LENGTH - len(row)))


def test_greedy_tokens_equal_transformers(case):
    run, _, theirs = case
    ours, tied = [answers[0] for answers in run(decode.Decoding()).tokens], 0
    ended = sum(len(answer) < LENGTH for answer in ours)
    assert 10 <= ended <= len(ours) - 5  # else stopping, or not stopping, is not tested
    for row, answer in enumerate(ours):
        want = without_eos(theirs["tokens_0"][row])
        both = np.append(answer, EOS)[:LENGTH], np.append(want, EOS)[:LENGTH]
        if not np.array_equal(*both):
            first = next(i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b)
            assert theirs["margins_0"][row, first] <= TIE, f"row {row}: {answer} {want}"
            tied += 1
    print(f"{len(ours)} answers, {ended} ended by EOS, {tied} differ at a tie")
    assert tied <= len(ours) / 20


def test_beams_equal_transformers(case):
    """All four of each input, in order; the length penalty is T5X's, which is 1 at alpha = 0."""
    run, score, theirs = case
    ours, tied = run(decode.Decoding("beam", beam_size=BEAMS)), 0
    want = [
        [without_eos(answer) for answer in row]
        for row in theirs["tokens_1"].reshape(len(ours.tokens), BEAMS, -1)
    ]
    ended = sum(len(answer) < LENGTH for row in want for answer in row)
    assert 40 <= ended <= BEAMS * len(want) - 20
    greedy = run(decode.Decoding()).tokens
    assert sum(len(a[0]) != len(b[0]) for a, b in zip(greedy, ours.tokens, strict=True)) > 5
    for row, (mine, other) in enumerate(zip(ours.tokens, want, strict=True)):
        if all(map(np.array_equal, mine, other)):
            continue
        gaps = -np.diff(ours.log_probs[row])
        assert gaps.min() <= TIE, f"row {row}: {mine} {other}"
        tied += 1
    print(f"{len(want)} inputs, {ended} of {BEAMS * len(want)} beams ended, {tied} differ at a tie")
    assert tied <= len(want) / 20


def test_log_probs_are_those_of_scored_choices(case):
    """Search over a cache and one teacher-forced pass are two ways to the same number."""
    run, score, _ = case
    found = run(decode.Decoding("beam", beam_size=BEAMS))
    # Tokens 0 and 1 cannot be given as a choice; a cut answer has no EOS to score.
    plain = [
        [i for i, a in enumerate(answers) if len(a) < LENGTH and (a > 1).all()]
        for answers in found.tokens
    ]
    assert sum(map(len, plain)) > 50
    some = [ids or [0] for ids in plain]
    choices = [
        [np.where(answers[i] > 1, answers[i], 5) for i in ids]
        for answers, ids in zip(found.tokens, some, strict=True)
    ]
    for row, scores in enumerate(score(choices)):
        want = [found.log_probs[row][i] for i in plain[row]]
        if want:
            np.testing.assert_allclose(scores, want, atol=1e-4)
