"""Decoding: the cache against the plain network, searches against enumeration, draws against laws.

tests/test_decode_parity.py has the same tokens from transformers.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_t5 import TINY, batch_of, numpy_params

from distill import decode, partitioning, t5

Decoding = decode.Decoding
INPUT_LENGTHS = (5, 12, 40, 8, 1, 17, 33)


def one_device():
    return partitioning.make_mesh(partitioning.MeshConfig(data=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def tiny():
    """Parameters, and inputs of several lengths."""
    rng = np.random.default_rng(7)
    params = numpy_params(TINY, seed=7)
    # EOS is likely enough for a part of the answers to end.
    params["decoder"]["logits_dense"]["kernel"] *= jnp.ones((96,)).at[1].set(1.6)[None]
    return params, [rng.integers(3, 96, n).astype(np.int32) for n in INPUT_LENGTHS]


@functools.partial(jax.jit, static_argnames="config")
def uncached(params, batch, config):
    return jax.nn.log_softmax(t5.T5(config).apply({"params": params}, batch))


def teacher_forced(params, config, inputs, answers):
    """For each pair log-probabilities [len(answer), v] of each token to come, without a cache."""
    batch = {
        "encoder_input_tokens": np.zeros((len(inputs), 48), np.int32),
        "decoder_input_tokens": np.zeros((len(inputs), 72), np.int32),
        # Mask by position, not by target: everything is real, and what comes later is not seen.
        "decoder_target_tokens": np.ones((len(inputs), 72), np.int32),
    }
    for row, (given, answer) in enumerate(zip(inputs, answers, strict=True)):
        batch["encoder_input_tokens"][row, : len(given)] = given
        batch["decoder_input_tokens"][row, 1 : len(answer)] = answer[:-1]
    log_probs = np.asarray(uncached(params, batch, config))
    return [rows[: len(answer)] for rows, answer in zip(log_probs, answers, strict=True)]


def total(log_probs, answer):
    """Of an answer, by what `teacher_forced` gives for it."""
    return log_probs[np.arange(len(answer)), answer].sum()


# --- Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(method="beams"), "one of greedy, beam, sample, not 'beams'"),
        (dict(beam_size=4), "beam_size=4 has no effect on method='greedy'.*method='beam'"),
        (dict(temperature=1.0), "temperature=1.0 has no effect on method='greedy'.*'sample'"),
        (dict(method="beam", top_k=5), "top_k=5 has no effect on method='beam'"),
        (dict(method="sample", length_penalty=0.6), "length_penalty=0.6 has no effect"),
        (dict(method="beam", seed=0), "seed=0 has no effect"),
        (dict(method="beam", beam_size=0), "beam_size must be an integer of at least 1, not 0"),
        (dict(method="beam", beam_size=2.0), "beam_size must be an integer"),
        (dict(method="beam", length_penalty=-0.1), "length_penalty must not be negative"),
        (dict(method="sample", temperature=0), "temperature must be positive.*'greedy'"),
        (dict(method="sample", temperature=float("nan")), "temperature must be a finite number"),
        (dict(method="sample", top_k=-1), "top_k must be an integer of at least 0"),
        (dict(method="sample", top_p=0.0), r"top_p must be in \(0, 1\], not 0.0"),
        (dict(method="sample", top_p=1.5), "top_p must be in"),
        (dict(method="sample", top_p="0.9"), "top_p must be a finite number, not '0.9'"),
        (dict(method="sample", num_samples=True), "num_samples must be an integer"),
        (dict(method="sample", seed=-1), "seed must be an integer of at least 0"),
        (dict(method="sample", seed=2**32), r"seed must be below 2\*\*32"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"Decoding.*{message}"):
        Decoding(**settings)


def test_names_are_of_the_settings():
    names = {
        "greedy": Decoding(),
        "beam4": Decoding("beam"),
        "beam4-a0.6": Decoding("beam", length_penalty=0.6),
        "sample1": Decoding("sample"),
        "sample8-t0.7-k40": Decoding("sample", num_samples=8, temperature=0.7, top_k=40),
        "sample2-p0.95-s3": Decoding("sample", num_samples=2, top_p=0.95, seed=3),
        "sample1-t1e-07": Decoding("sample", temperature=1e-7),
    }
    assert {name: how.name for name, how in names.items()} == {name: name for name in names}
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)
    assert Decoding("beam", beam_size=4, length_penalty=0) == Decoding("beam")
    assert Decoding("beam", length_penalty=1).name == Decoding("beam", length_penalty=1.0).name


# --- The cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [10, 70])
def test_cached_decoding_equals_teacher_forcing(max_length):
    """Each greedy token is the argmax of the uncached model on the tokens before it.

    With 70 tokens the cache grows in between.
    """
    assert decode.stages(10) == [10] and decode.stages(70) == [32, 70]
    assert decode.stages(200) == [32, 128, 200]
    params = numpy_params(TINY, seed=7)
    inputs = batch_of(np.random.default_rng(7), 3, [5, 12, 8], [1, 1, 1])["encoder_input_tokens"]
    output = decode.greedy(params, jnp.asarray(inputs), model=t5.T5(TINY), max_length=max_length)
    output = np.asarray(output)
    for answer, log_probs in zip(output, teacher_forced(params, TINY, inputs, output), strict=True):
        ended = np.flatnonzero(answer == decode.EOS)
        length = ended[0] + 1 if len(ended) else max_length
        np.testing.assert_array_equal(answer[:length], log_probs.argmax(axis=-1)[:length])
        assert not answer[length:].any()


def test_greedy_ends_when_all_rows_have():
    """A model that always says EOS stops after one token; padding-only rows stay empty."""
    params = jax.tree.map(jnp.zeros_like, numpy_params(TINY))
    params["decoder"]["decoder_norm"]["scale"] += 1.0
    params["token_embedder"]["embedding"] += 1.0
    params["decoder"]["logits_dense"]["kernel"] = (
        params["decoder"]["logits_dense"]["kernel"].at[:, decode.EOS].set(1.0)
    )
    inputs = np.array([[5, 6, 1], [0, 0, 0]], np.int32)
    output = decode.greedy(params, jnp.asarray(inputs), model=t5.T5(TINY), max_length=6)
    np.testing.assert_array_equal(output, [[1, 0, 0, 0, 0, 0], [0] * 6])


@pytest.mark.parametrize(
    "how",
    [Decoding(), Decoding("beam", beam_size=3), Decoding("sample", num_samples=3, top_k=20)],
    ids=lambda how: how.name,
)
def test_log_probs_are_those_of_the_model(tiny, how):
    """Reordered caches too: those of a beam belong to its own tokens."""
    params, inputs = tiny
    found = decode.generate(params, t5.T5(TINY), inputs, one_device(), how, max_length=9)
    n = how.num_answers
    assert [len(answers) for answers in found.tokens] == [n] * len(inputs)
    whole = [np.append(answer, decode.EOS)[:9] for answers in found.tokens for answer in answers]
    ended = sum(answer[-1] == decode.EOS for answer in whole)
    assert 0 < ended < len(whole)
    want = teacher_forced(params, TINY, [given for given in inputs for _ in range(n)], whole)
    want = [total(*pair) for pair in zip(want, whole, strict=True)]
    np.testing.assert_allclose(np.ravel(found.log_probs), want, atol=1e-4)
    assert how.method != "beam" or all(s == sorted(s, reverse=True) for s in found.log_probs)


@pytest.mark.parametrize(
    "sizes,how",
    [
        ((8, 1, 1), Decoding()),
        ((2, 2, 2), Decoding()),
        ((2, 2, 2), Decoding("beam", beam_size=3)),
        ((1, 2, 4), Decoding("sample", num_samples=2, top_p=0.9)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_mesh_of_8_gives_the_same_answers(tiny, sizes, how):
    params, inputs = tiny
    want = decode.generate(params, t5.T5(TINY), inputs, one_device(), how, max_length=8)
    mesh = partitioning.make_mesh(partitioning.MeshConfig(*sizes))
    net = t5.T5(TINY, partitioning.activation_constraint(mesh))
    placed = jax.device_put(params, partitioning.param_shardings(mesh, params, t5.param_axes(TINY)))
    found = decode.generate(placed, net, inputs, mesh, how, max_length=8)
    for mine, other in zip(found.tokens, want.tokens, strict=True):
        assert [a.tolist() for a in mine] == [a.tolist() for a in other]
    np.testing.assert_allclose(found.log_probs, want.log_probs, atol=1e-4)


@pytest.mark.parametrize(
    "param_dtype,how", [("float32", Decoding("beam", beam_size=2)), ("bfloat16", Decoding())]
)
def test_bfloat16_students(tiny, param_dtype, how):
    """They compute in bfloat16; logits are float32, and near those of float32."""
    params, inputs = tiny
    net = t5.T5(dataclasses.replace(TINY, dtype="bfloat16", param_dtype=param_dtype))
    params = jax.tree.map(lambda x: x.astype(param_dtype), params)
    found = decode.generate(params, net, inputs, one_device(), how, max_length=8)
    whole = [np.append(answers[0], decode.EOS)[:8] for answers in found.tokens]
    each = teacher_forced(params, TINY, inputs, whole)
    for sums, log_probs, answer in zip(found.log_probs, each, whole, strict=True):
        assert sums[0] == pytest.approx(total(log_probs, answer), abs=0.1 * len(answer))

    def step(params, tokens):
        variables = {"params": params}
        first, context = net.apply(variables, tokens, method="start_decoding")
        states, cache = net.apply(
            variables, first[:, None, None], jnp.int32(0), net.empty_cache(1, 1, 4), context,
            method="decode_step",
        )  # fmt: skip
        return (states, cache, context["layers"]), net.apply(variables, states, method="unembed")

    inside, logits = jax.eval_shape(step, params, jnp.asarray(inputs[0])[None])
    assert {x.dtype for x in jax.tree.leaves(inside)} == {jnp.dtype("bfloat16")}
    assert logits.dtype == jnp.float32


# --- Batches --------------------------------------------------------------------------------------


def test_length_buckets_cover_every_row_once_in_few_shapes():
    lengths = np.random.default_rng(0).integers(1, 300, 1000)
    seen, shapes, work = [], set(), 0
    for rows, (size, padded) in decode.length_buckets(lengths, 64, 4):
        assert lengths[rows].max() <= padded and len(rows) <= size <= 64 and size % 4 == 0
        seen += rows.tolist()
        shapes.add((size, padded))
        work += size * padded
    assert sorted(seen) == list(range(1000))
    buckets = {int(length - 1).bit_length() for length in lengths}
    assert len(shapes) <= len(buckets) and len({size for size, _ in shapes}) == 1
    assert work < 1.15 * lengths.sum()


@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_padded_lengths_waste_least(most):
    longest = 8 * np.random.default_rng(most).integers(1, 12, 20)
    values = np.unique(longest)
    want = min(
        sum(min((c for c in chosen if c >= length), default=1e9) for length in longest)
        for chosen in itertools.combinations(values, min(most, len(values)))
    )
    found = decode._few_lengths(longest, most)
    assert all(a >= b for a, b in zip(found, longest, strict=True))
    assert len(set(found)) <= most and sum(found) == want


def test_inputs_that_cannot_be_decoded(tiny):
    params, inputs = tiny
    net, mesh = t5.T5(TINY), one_device()
    with pytest.raises(ValueError, match="Input 1 has no tokens"):
        decode.generate(params, net, [inputs[0], np.array([], int)], mesh, max_length=3)
    with pytest.raises(ValueError, match="max_length must be positive, not 0"):
        decode.generate(params, net, inputs, mesh, max_length=0)
    with pytest.raises(ValueError, match="batch_size must be positive, not 0"):
        decode.generate(params, net, inputs, mesh, max_length=3, batch_size=0)
    assert decode.generate(params, net, [], mesh, max_length=3) == decode.Generated([], [])


# --- Searches, by a network that can be enumerated ------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chain:
    """A decoder without an encoder: what comes next depends on the input and all tokens so far.

    Attributes:
      v: size of the vocabulary.
      seed: of its numbers.
      ending: added to the logit of EOS.
      most: tokens of a sequence at most.
    """

    v: int
    seed: int = 0
    ending: float = 0.0
    most: int = 8
    steps = []  # positions that were computed

    def _weights(self):
        rng = np.random.default_rng(self.seed)
        weights = 1.5 * rng.standard_normal((self.most + 1, self.v, self.v)).astype(np.float32)
        weights[0, :, decode.EOS] += self.ending
        return weights

    def log_probs(self, tokens, given):
        """numpy's: log p(next | tokens, input), [v]."""
        weights = self._weights()
        logits = weights[0, given] + sum(weights[1 + i, t] for i, t in enumerate(tokens))
        return logits - np.log(np.exp(logits).sum())

    def apply(self, variables, *args, method):
        return getattr(self, method)(*args)

    def start_decoding(self, inputs):
        return inputs[:, 0], inputs[:, 0]

    def empty_cache(self, rows, n, length):
        return {"seen": jnp.zeros((rows * n, length), jnp.int32)}

    def decode_step(self, tokens, position, cache, context):
        jax.debug.callback(lambda at: self.steps.append(int(at)), position)
        # The first token stands for the input, and is not part of the sequence.
        rows, n, _ = tokens.shape
        seen = jax.lax.dynamic_update_slice_in_dim(
            cache["seen"], tokens.reshape(rows * n, 1), position, axis=1
        )
        weights = jnp.asarray(self._weights())
        logits = jnp.repeat(weights[0][context], n, axis=0)
        for i in range(1, min(self.most, seen.shape[1])):
            logits += jnp.where(i <= position, weights[i][seen[:, i]], 0.0)
        return logits.reshape(rows, n, 1, self.v), {"seen": seen}

    def unembed(self, states):
        return states


def generate(net, given, how, max_length, **settings):
    net.steps.clear()
    found = decode.generate(
        {}, net, [np.array([i]) for i in given], one_device(), how, max_length=max_length,
        **settings,
    )  # fmt: skip
    jax.effects_barrier()
    return found


def sequences(v, max_length):
    """All that end with EOS, or are cut."""
    for length in range(max_length):
        for tokens in itertools.product(range(v), repeat=length):
            if decode.EOS not in tokens:
                yield (*tokens, decode.EOS)
    for tokens in itertools.product(range(v), repeat=max_length):
        if decode.EOS not in tokens:
            yield tokens


def score(net, tokens, given):
    return sum(net.log_probs(tokens[:i], given)[t] for i, t in enumerate(tokens))


def plain(tokens):
    return tuple(t for t in tokens if t != decode.EOS)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_wide_beams_find_the_best_sequences(alpha):
    """As many beams as there are prefixes: nothing is cut, so all is found, in order."""
    net, max_length, beams = Chain(v=4, seed=5), 4, 64
    how = Decoding("beam", beam_size=beams, length_penalty=alpha)
    found = generate(net, [0, 2, 3], how, max_length)
    for row, given in enumerate([0, 2, 3]):
        scored = [
            (score(net, tokens, given) / ((5 + len(tokens)) / 6) ** alpha, tokens)
            for tokens in sequences(net.v, max_length)
        ]
        want = sorted(scored, reverse=True)[:beams]
        got = [tuple(answer.tolist()) for answer in found.tokens[row]]
        assert got[:20] == [plain(tokens) for _, tokens in want][:20]
        assert found.log_probs[row][0] == pytest.approx(score(net, want[0][1], given), abs=1e-5)


def numpy_beams(net, given, beams, alpha, max_length):
    """The published search, without an early end."""
    live, kept = [(0.0, ())], []
    for n in range(1, max_length + 1):
        step = [
            (total + log_prob, (*tokens, token))
            for total, tokens in live
            for token, log_prob in enumerate(net.log_probs(tokens, given))
        ]
        step = sorted(step, reverse=True)[: 2 * beams]
        ended = [n == max_length or tokens[-1] == decode.EOS for _, tokens in step]
        kept += [
            (total / ((5 + n) / 6) ** alpha, total, tokens)
            for (total, tokens), e in zip(step[:beams], ended[:beams], strict=True)
            if e
        ]
        live = [one for one, e in zip(step, ended, strict=True) if not e][:beams]
    return sorted(kept, reverse=True)[:beams]


@pytest.mark.parametrize(
    "beams,alpha,ending", [(1, 0.0, 0.5), (2, 0.6, 0.5), (4, 0.0, -1.0), (4, 1.5, 2.0)]
)
def test_beams_equal_a_search_that_never_ends_early(beams, alpha, ending):
    net, given, max_length = Chain(v=12, seed=3, ending=ending), list(range(12)), 7
    how = Decoding("beam", beam_size=beams, length_penalty=alpha)
    found = generate(net, given, how, max_length)
    for row in given:
        want = numpy_beams(net, row, beams, alpha, max_length)
        got = [tuple(answer.tolist()) for answer in found.tokens[row]]
        assert got == [plain(tokens) for _, _, tokens in want]
        np.testing.assert_allclose(found.log_probs[row], [total for _, total, _ in want], atol=1e-4)


def test_beams_end_as_soon_as_none_can_be_overtaken():
    """Likely ends: few steps. A reward for length puts the end off, and is not cut short."""
    net = Chain(v=12, seed=3, ending=5.0)
    generate(net, [2, 5], Decoding("beam", beam_size=2), 7)
    few = max(net.steps) + 1
    generate(net, [2, 5], Decoding("beam", beam_size=2, length_penalty=3.0), 7)
    assert few <= 4 < max(net.steps) + 1


def test_greedy_ends_with_its_longest_row():
    net = Chain(v=12, seed=3, ending=2.0)
    found = generate(net, [2, 3, 5, 11], Decoding(), 8)
    assert [len(answer) for (answer,) in found.tokens] == [3, 0, 0, 6]
    assert max(net.steps) == 6  # the seventh token is EOS


def test_few_programs_are_compiled():
    """At most one for each power of two."""
    net, rng = Chain(v=12), np.random.default_rng(3)
    inputs = [rng.integers(2, 12, n) for n in rng.integers(1, 65, 40)]
    before, progress = decode._search._cache_size(), []
    decode.generate(
        {}, net, inputs, one_device(), max_length=3, batch_size=5, progress=progress.append
    )
    buckets = {int(len(x) - 1).bit_length() for x in inputs}
    assert len(buckets) == 5
    assert 2 <= decode._search._cache_size() - before <= len(buckets)
    assert progress == list(range(5, 41, 5))


# --- Draws ----------------------------------------------------------------------------------------


def chi_square(counts, probabilities):
    """p-value of counts under probabilities; cells of less than 5 expected are put together."""
    from scipy import stats

    expected = probabilities.astype(np.float64)
    expected *= counts.sum() / expected.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    assert observed[-1] == 0 or expected[-1] > 0
    if expected[-1] < 5:
        observed, expected = observed[:-1], expected[:-1]
        expected *= observed.sum() / expected.sum()
    return stats.chisquare(observed, expected).pvalue


def truncated(log_probs, temperature=1.0, top_k=0, top_p=1.0):
    """The distribution that is drawn from, by sorting."""
    p = np.exp(log_probs.astype(np.float64) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    keep = np.arange(len(p)) < (top_k or len(p))
    kept = p[order] * keep
    kept /= kept.sum()
    keep &= np.cumsum(kept) - kept < top_p  # those before it are not enough yet
    p = np.where(np.isin(np.arange(len(p)), order[keep]), p, 0)
    return p / p.sum()


SAMPLES = 20_000


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_k": 3}, {"top_p": 0.8},
     {"temperature": 1.4, "top_k": 5, "top_p": 0.7}],
    ids=str,
)  # fmt: skip
def test_frequencies_are_the_probabilities(settings):
    """Of all pairs of tokens, jointly, so that the second follows from the first."""
    net = Chain(v=8, seed=1, ending=-0.5)
    found = generate(net, [4], Decoding("sample", num_samples=SAMPLES, **settings), 2)
    first = truncated(net.log_probs((), 4), **settings)
    want = np.zeros((8, 8))
    for token in range(8):
        if token == decode.EOS:
            want[token, 0] = first[token]
        else:
            want[token] = first[token] * truncated(net.log_probs((token,), 4), **settings)
    counts = np.zeros((8, 8))
    for answer in found.tokens[0]:
        pair = np.append(answer, [decode.EOS, 0])[:2]
        counts[tuple(pair)] += 1
    assert counts.sum() == SAMPLES and not counts[want == 0].any()
    assert chi_square(counts.ravel(), want.ravel()) > 1e-3
    # What is tested can be seen: other settings are refused.
    other = np.full((8, 8), 1 / 64) if not settings else None
    if other is None:
        other = np.stack([
            np.exp(net.log_probs((), 4)[i]) * np.exp(net.log_probs((i,), 4)) for i in range(8)
        ])  # fmt: skip
        other[decode.EOS] = 0
        other[decode.EOS, 0] = np.exp(net.log_probs((), 4)[decode.EOS])
    assert chi_square(counts.ravel(), other.ravel()) < 1e-6


def test_frequencies_of_a_student(tiny):
    """The first token of the real network, cut to 30 tokens and nine tenths."""
    params, inputs = tiny
    how = Decoding("sample", num_samples=8000, top_k=30, top_p=0.9, seed=5)
    found = decode.generate(params, t5.T5(TINY), inputs[:1], one_device(), how, max_length=1)
    tokens = [answer[0] if len(answer) else decode.EOS for answer in found.tokens[0]]
    counts = np.bincount(tokens, minlength=96)
    (log_probs,) = teacher_forced(params, TINY, inputs[:1], [np.array([1])])
    want = truncated(log_probs[0], top_k=30, top_p=0.9)
    assert 5 < (want > 0).sum() < 30 and not counts[want == 0].any()
    assert chi_square(counts, want) > 1e-3


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.5, 0.9, 0.99])
def test_the_nucleus_is_the_one_by_sorting(top_p):
    logits = np.random.default_rng(0).normal(0, 3, (50, 1000)).astype(np.float32)
    logits[0, :] = -50.0
    logits[0, 7] = 0.0
    found = np.asarray(decode.nucleus(jnp.asarray(logits), top_p))
    for row, kept in zip(logits, found, strict=True):
        order = np.argsort(-row)
        p = np.exp(row[order].astype(np.float64) - row.max())
        before = (np.cumsum(p) - p) / p.sum()
        assert kept.sum() == (before < top_p).sum()
        assert kept[order[: kept.sum()]].all()


def test_draws_do_not_depend_on_company():
    """Nor on the order, as each input keeps its place; other seeds, samples and rows differ."""
    net, rng = Chain(v=12, seed=2, ending=-9.0), np.random.default_rng(1)
    inputs = [rng.integers(2, 12, n) for n in (3, 20, 1, 40, 7, 12)]
    inputs.append(inputs[0])

    def run(inputs, batch_size=64, devices=1, **settings):
        how = Decoding("sample", **{"num_samples": 3, "temperature": 3.0} | settings)
        mesh = partitioning.make_mesh(
            partitioning.MeshConfig(data=devices), jax.devices()[:devices]
        )
        found = decode.generate({}, net, inputs, mesh, how, max_length=8, batch_size=batch_size)
        return [[tuple(answer.tolist()) for answer in answers] for answers in found.tokens]

    want = run(inputs)
    assert len({*want[0], *want[-1]}) == 6
    assert run(inputs, batch_size=2) == want
    assert run(inputs, devices=4) == want
    # The first samples of more are the same.
    assert [answers[:3] for answers in run(inputs, num_samples=5)] == want
    before = decode._search._cache_size()
    assert run(inputs, seed=1) != want
    assert decode._search._cache_size() == before  # one program for all seeds


# --- Scores of choices ----------------------------------------------------------------------------


def test_scores_are_sums_of_log_probabilities(tiny):
    params, inputs = tiny
    rng = np.random.default_rng(1)
    choices = [
        [rng.integers(2, 96, rng.integers(0, 12)) for _ in range(1 + i % 4)]
        for i in range(len(inputs))
    ]
    whole = [np.append(choice, decode.EOS) for given in choices for choice in given]
    paired = [x for x, given in zip(inputs, choices, strict=True) for _ in given]
    want = teacher_forced(params, TINY, paired, whole)
    want = [total(*pair) for pair in zip(want, whole, strict=True)]
    mesh = partitioning.make_mesh(partitioning.MeshConfig(2, 2, 2))
    net = t5.T5(TINY, partitioning.activation_constraint(mesh))
    placed = jax.device_put(params, partitioning.param_shardings(mesh, params, t5.param_axes(TINY)))
    for found in (
        decode.score_choices(params, t5.T5(TINY), inputs, choices, one_device()),
        decode.score_choices(params, t5.T5(TINY), inputs, choices, one_device(), batch_size=3),
        decode.score_choices(placed, net, inputs, choices, mesh),
    ):
        assert [len(scores) for scores in found] == [len(given) for given in choices]
        np.testing.assert_allclose(np.concatenate(found), want, atol=2e-4)


@pytest.mark.parametrize(
    "choices,message",
    [
        ([[[5]]], "2 inputs have 1 lists of choices"),
        ([[[5]], []], "Input 1 has no choice"),
        ([[[5]], [[6], [7, 1]]], r"choice of input 1 has padding \(0\) or EOS \(1\)"),
        ([[[0, 5]], [[6]]], "choice of input 0"),
    ],
)
def test_choices_that_cannot_be_scored(tiny, choices, message):
    params, inputs = tiny
    with pytest.raises(ValueError, match=message):
        decode.score_choices(params, t5.T5(TINY), inputs[:2], choices, one_device())
