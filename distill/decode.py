"""Decoding over an explicit cache: greedy, beams and samples; scores of given choices.

The loop holds the whole state: tokens so far, cache, which rows are finished. A step writes one
position of the cache and the loop ends as soon as no row can change any more.

Of a network it knows four methods (`t5.T5` documents them): `start_decoding`, `empty_cache`,
`decode_step`, `unembed`. What a row's answers share is in the context from `start_decoding` (of an
encoder-decoder the keys and values of the encoder's states, by far the largest part), of which
there is one for each row however many beams or samples; what differs between them is in the cache,
whose arrays are [rows * answers, ...].

Letters of shapes: b rows, n answers to a row (beams or samples), v vocabulary, t positions.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill import partitioning, t5

EOS = 1

# Settings of each method and what they are where they are not given.
METHODS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beam": {"beam_size": 4, "length_penalty": 0.0},
    "sample": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_samples": 1, "seed": 0},
}


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How answers are made.

    A setting that the method does not use must stay None. One that it does use is, where it is
    None, the default given here.

    Attributes:
      method: `greedy`, the most probable token at each step; `beam`, the best sequences found by
        a beam search; `sample`, draws from the model's distribution.
      beam_size: of `beam`: sequences kept at each step, and returned; 4.
      length_penalty: of `beam`: alpha. A finished sequence of n tokens, EOS included, counts its
        log-probability over ((5 + n) / 6)^alpha, as in T5X (Wu et al. 2016, arXiv 1609.08144,
        equation 14); 0.0, which ranks by probability.
      temperature: of `sample`: divides the logits; 1.0.
      top_k: of `sample`: draws from the k most probable tokens only; 0 = all.
      top_p: of `sample`: draws from the fewest most probable tokens that together have at least
        this probability (Holtzman et al. 2020, arXiv 1904.09751), after temperature and top_k;
        1.0 = all.
      num_samples: of `sample`: draws for each input; 1.
      seed: of `sample`; 0.
    """

    method: str = "greedy"
    beam_size: int | None = None
    length_penalty: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    num_samples: int | None = None
    seed: int | None = None

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(
                f"Decoding.method must be one of {', '.join(METHODS)}, not {self.method!r}."
            )
        for field in dataclasses.fields(self)[1:]:
            value, name = getattr(self, field.name), field.name
            if name not in METHODS[self.method]:
                if value is not None:
                    (user,) = (method for method in METHODS if name in METHODS[method])
                    raise ValueError(
                        f"Decoding.{name}={value!r} has no effect on method={self.method!r}: "
                        f"leave it out, or set Decoding.method={user!r}."
                    )
            elif value is None:
                object.__setattr__(self, name, METHODS[self.method][name])
            else:
                self._check(name, value)

    def _check(self, name: str, value: Any) -> None:
        """Raises ValueError where a setting that the method uses is out of its range."""
        least = {"beam_size": 1, "num_samples": 1, "top_k": 0, "seed": 0}
        if name in least:
            if not isinstance(value, int) or isinstance(value, bool) or value < least[name]:
                raise ValueError(
                    f"Decoding.{name} must be an integer of at least {least[name]}, not {value!r}."
                )
            if name == "seed" and value >= 2**32:
                raise ValueError(f"Decoding.seed must be below 2**32, not {value!r}.")
            return
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise ValueError(f"Decoding.{name} must be a finite number, not {value!r}.")
        if name == "temperature" and value <= 0:
            raise ValueError(
                f"Decoding.temperature must be positive, not {value!r}; for the most probable "
                "token set Decoding.method='greedy'."
            )
        if name == "top_p" and not 0 < value <= 1:
            raise ValueError(f"Decoding.top_p must be in (0, 1], not {value!r}.")
        if name == "length_penalty" and value < 0:
            raise ValueError(f"Decoding.length_penalty must not be negative, not {value!r}.")

    @property
    def num_answers(self) -> int:
        """To each input."""
        return {"greedy": 1, "beam": self.beam_size, "sample": self.num_samples}[self.method]

    @property
    def name(self) -> str:
        """`greedy`, `beam4-a0.6`, `sample8-t0.7-k40`: safe in a file name, one for each setting."""
        if self.method == "greedy":
            return "greedy"
        count, *rest = {
            "beam": (("beam_size", ""), ("length_penalty", "a")),
            "sample": (("num_samples", ""), ("temperature", "t"), ("top_k", "k"), ("top_p", "p"),
                       ("seed", "s")),
        }[self.method]  # fmt: skip
        parts = [f"{self.method}{getattr(self, count[0])}"]
        for name, letter in rest:
            value, default = getattr(self, name), METHODS[self.method][name]
            if value != default:
                parts.append(f"{letter}{type(default)(value)}")
        return "-".join(parts)


@dataclasses.dataclass(frozen=True)
class Generated:
    """Answers of `generate`, in the order of its inputs.

    Attributes:
      tokens: for each input its answers, best first for beams and in order of the samples else:
        int32 [n] without padding and EOS. One of `max_length` tokens was cut, it had no EOS.
      log_probs: for each input those of its answers: the sum over the tokens, EOS included, of
        their log-probability in nats. That of the model, whatever temperature, top_k and top_p
        they were drawn with.
    """

    tokens: list[list[np.ndarray]]
    log_probs: list[list[float]]


def generate(
    params: Any,
    net: t5.T5,
    inputs: Sequence[np.ndarray],
    mesh: Any,
    decoding: Decoding = Decoding(),  # noqa: B008 (frozen)
    *,
    max_length: int,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Generated:
    """Answers to inputs of any lengths.

    Inputs of like length are decoded together, so that few positions are padding and short ones,
    whose answers tend to be short, do not wait for long ones. What is drawn for an input depends on
    the seed and its place in `inputs`, not on what it is decoded with or where.

    Args:
      params: the model's parameters, on the mesh.
      net: the network.
      inputs: token ids of each input, without padding.
      mesh: from `partitioning.make_mesh`.
      decoding: greedy, beams or samples, and their settings.
      max_length: tokens of an answer at most, EOS included.
      batch_size: inputs decoded together, at most; but a multiple of the batch shards.
      progress: called after each batch with the number of inputs that are done.

    Raises:
      ValueError: an input is empty, or `max_length` or `batch_size` is not positive.
    """
    if max_length < 1:
        raise ValueError(f"generate: max_length must be positive, not {max_length!r}.")
    seed = np.uint32(decoding.seed or 0)
    if decoding.seed:  # one program for all seeds
        decoding = dataclasses.replace(decoding, seed=0)
    tokens: list[list[np.ndarray]] = [[] for _ in inputs]
    log_probs: list[list[float]] = [[] for _ in inputs]
    done = 0
    for rows, batch, numbers in _batches(inputs, mesh, batch_size):
        found = _search(
            params, batch, numbers, seed, net=net, decoding=decoding, max_length=max_length
        )
        output, sums = map(partitioning.gather, found)
        for r, index in enumerate(rows):
            # A vocabulary of few tokens may have fewer sequences than there are beams.
            real = np.isfinite(sums[r])
            tokens[index] = [_until_eos(answer) for answer in output[r][real]]
            log_probs[index] = sums[r][real].tolist()
        done += len(rows)
        if progress is not None:
            progress(done)
    return Generated(tokens, log_probs)


def score_choices(
    params: Any,
    net: t5.T5,
    inputs: Sequence[np.ndarray],
    choices: Sequence[Sequence[np.ndarray]],
    mesh: Any,
    *,
    batch_size: int = 64,
) -> list[np.ndarray]:
    """Log-likelihood of given answers, such as the labels of a classification.

    Each input is encoded once, and all of its choices are run in one teacher-forced pass.

    Args:
      params: the model's parameters, on the mesh.
      net: the network.
      inputs: token ids of each input, without padding.
      choices: for each input its choices: token ids without EOS. Their number may differ.
      mesh: from `partitioning.make_mesh`.
      batch_size: inputs scored together, at most; but a multiple of the batch shards.

    Returns:
      For each input float32 [choices]: log p(choice, EOS | input) in nats. A sum over
      `len(choice) + 1` tokens; divide by that for the mean of a token.

    Raises:
      ValueError: an input is empty or has no choice, a choice has an EOS or padding in it, or there
        are not as many lists of choices as inputs.
    """
    if len(choices) != len(inputs):
        raise ValueError(f"{len(inputs)} inputs have {len(choices)} lists of choices.")
    for i, given in enumerate(choices):
        if not len(given):
            raise ValueError(f"Input {i} has no choice to score.")
        if any(np.isin([0, EOS], choice).any() for choice in given):
            raise ValueError(
                f"A choice of input {i} has padding (0) or EOS ({EOS}) in it: give its tokens "
                "without; EOS is scored behind them."
            )
    if not inputs:
        return []
    n = max(map(len, choices))
    longest = max(len(choice) for given in choices for choice in given) + 1
    found: list[np.ndarray] = [np.empty(0)] * len(inputs)
    for rows, batch, _ in _batches(inputs, mesh, batch_size):
        targets = np.zeros((batch.shape[0], n, -(-longest // 8) * 8), np.int32)
        for r, index in enumerate(rows):
            for c, choice in enumerate(choices[index]):
                targets[r, c, : len(choice)] = choice
                targets[r, c, len(choice)] = EOS
        targets = partitioning.shard_whole(mesh, targets)
        scores = partitioning.gather(_score(params, batch, targets, net=net))
        for r, index in enumerate(rows):
            found[index] = scores[r, : len(choices[index])]
    return found


def _until_eos(answer: np.ndarray) -> np.ndarray:
    ended = np.flatnonzero(answer == EOS)
    return answer[: ended[0]] if len(ended) else answer


def _batches(inputs: Sequence[np.ndarray], mesh: Any, batch_size: int) -> Iterator[tuple]:
    """Inputs of like length together, padded.

    Yields:
      (numbers of at most `batch_size` inputs; their tokens [rows, length] on the mesh, with rows
      of padding behind them; the numbers again, int32 [rows] on the mesh).
    """
    lengths = np.array([len(x) for x in inputs], int)
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, not {batch_size!r}.")
    if not lengths.all():
        raise ValueError(f"Input {int(np.argmin(lengths))} has no tokens.")
    shards = partitioning.batch_shards(mesh)
    for rows, (size, padded) in length_buckets(lengths, -(-batch_size // shards) * shards, shards):
        batch, numbers = np.zeros((size, padded), np.int32), np.zeros((size,), np.int32)
        numbers[: len(rows)] = rows
        for r, index in enumerate(rows):
            batch[r, : lengths[index]] = inputs[index]
        yield rows, partitioning.shard_whole(mesh, batch), partitioning.shard_whole(mesh, numbers)


def length_buckets(
    lengths: np.ndarray, batch_size: int, shards: int = 1
) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Groups rows of like length, so that short ones are not padded to the longest.

    Args:
      lengths: tokens of each input, [n].
      batch_size: rows of a batch at most, a multiple of `shards`.
      shards: what the rows of a batch have to divide by.

    Yields:
      (indices of the rows, (rows of the batch, padded length)), the longest first, so that the
      memory that it takes is known at once. All batches have one number of rows. There are no more
      padded lengths than powers of two (16 to 32, 32 to 64, ...) that the lengths lie between, so
      that few programs are compiled, but they are where they waste least.
    """
    order = np.argsort(-lengths, kind="stable")
    count = -(-len(order) // batch_size)
    # As many batches as there have to be, of equal size: a last one of few rows costs as much.
    size = -(-len(order) // max(count, 1))
    size = -(-size // shards) * shards
    starts = range(0, len(order), max(size, 1))
    longest = -(-lengths[order[starts]] // 8) * 8
    powers = len({(int(length) - 1).bit_length() for length in lengths})
    for start, length in zip(starts, _few_lengths(longest, powers), strict=True):
        yield order[start : start + size], (size, length)


def _few_lengths(longest: np.ndarray, most: int) -> list[int]:
    """Rounds lengths up to at most `most` different ones, so that their sum is least."""
    values, counts = np.unique(longest, return_counts=True)
    below = np.cumsum(counts)
    # Of the lengths up to each value: their least sum, if the value is the last to round up to, and
    # the value before it (-1: none), with one value, two, ...
    sums, before = values * below, [np.full(len(values), -1)]
    for _ in range(1, min(most, len(values))):
        steps = [
            np.append(sums[:i] + v * (n - below[:i]), v * n)
            for i, (v, n) in enumerate(zip(values, below, strict=True))
        ]
        sums = np.array([step.min() for step in steps])
        before.append(np.array([(s.argmin() + 1) % len(s) - 1 for s in steps]))
    chosen, last = [], len(values) - 1
    for previous in reversed(before):
        if last >= 0:
            chosen.append(values[last])
            last = previous[last]
    chosen = np.array(chosen[::-1], int)
    return chosen[np.searchsorted(chosen, longest)].tolist()


# --- The loop -------------------------------------------------------------------------------------

# Positions that the cache starts with, since a step reads all of it and most labels are short; and
# how it grows when it is full. Each length is a loop of its own in the program, to be compiled.
FIRST_POSITIONS, GROWTH = 32, 4


def stages(max_length: int) -> list[int]:
    """Lengths that the cache grows through, `[32, 128, 200]` for 200."""
    lengths = [FIRST_POSITIONS]
    while lengths[-1] < max_length:
        lengths.append(GROWTH * lengths[-1])
    return [*lengths[:-1], max_length]


@functools.partial(jax.jit, static_argnames=("model", "max_length"))
def greedy(params, encoder_input_tokens: jax.Array, *, model: t5.T5, max_length: int) -> jax.Array:
    """The most probable token at each step, until EOS.

    Args:
      params: the model's parameters.
      encoder_input_tokens: int32 [batch, length], one sequence a row, 0 = padding.
      model: the network.
      max_length: tokens to produce at most, EOS included.

    Returns:
      int32 [batch, max_length]; after a row's EOS all 0. A row that never ended has no EOS.
    """
    rows = jnp.arange(encoder_input_tokens.shape[0])
    return _search(
        params, encoder_input_tokens, rows, np.uint32(0), net=model, decoding=Decoding(),
        max_length=max_length,
    )[0][:, 0]  # fmt: skip


@functools.partial(jax.jit, static_argnames=("net", "decoding", "max_length"))
def _search(params, inputs, numbers, seed, *, net, decoding: Decoding, max_length: int):
    """Answers to one batch.

    Args:
      params: the model's parameters.
      inputs: int32 [b, k], 0 = padding.
      numbers: int32 [b], of the inputs in the caller's order.
      seed: uint32 scalar, in place of the one in `decoding`.
      net: the network.
      decoding: how.
      max_length: tokens of an answer at most.

    Returns:
      int32 [b, n, max_length], 0 behind EOS, and float32 [b, n]: their log-probabilities.
    """
    rows, n = inputs.shape[0], decoding.num_answers
    # A row of padding only (the filler of a last batch) is finished before it starts.
    filler = ~jnp.any(inputs > 0, axis=1)
    if decoding.method == "beam":
        search = _Beams.start(filler, decoding, max_length)
    else:
        search = _Draws.start(filler, numbers, seed, decoding, max_length)
    variables = {"params": params}
    first, context = net.apply(variables, inputs, method="start_decoding")

    def step(state):
        position, last, cache, search = state
        states, cache = net.apply(
            variables, last[:, :, None], position, cache, context, method="decode_step"
        )
        logits = net.apply(variables, states[:, :, 0], method="unembed")
        last, parents, search = search.advance(logits, position, decoding)
        if parents is not None:
            cache = jax.tree.map(
                lambda x: _take(x.reshape(rows, n, *x.shape[1:]), parents).reshape(x.shape), cache
            )
        return position + 1, last, cache, search

    state = jnp.int32(0), jnp.broadcast_to(first[:, None], (rows, n)), None, search
    for length in stages(max_length):
        position, last, cache, search = state
        longer = net.empty_cache(rows, n, length)
        if cache is not None:
            longer = jax.tree.map(
                lambda new, old: jax.lax.dynamic_update_slice(new, old, (0,) * new.ndim),
                longer, cache,
            )  # fmt: skip
        state = jax.lax.while_loop(
            lambda state, length=length: (state[0] < length) & ~state[3].done(),
            step, (position, last, longer, search),
        )  # fmt: skip
    return state[3].result()


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x [b, n, ...] at index [b, m] of its second axis -> [b, m, ...]."""
    index = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")


def _write(tokens: jax.Array, new: jax.Array, position: jax.Array) -> jax.Array:
    """tokens [b, n, t] with new [b, n] at a position."""
    return jax.lax.dynamic_update_slice_in_dim(tokens, new[:, :, None], position, axis=2)


class _Draws(NamedTuple):
    """Greedy decoding, and samples: n answers to a row, each for itself.

    Attributes:
      tokens: int32 [b, n, t].
      sums: float32 [b, n], log-probabilities.
      finished: bool [b, n].
      keys: [b, n], random keys; None for greedy.
    """

    tokens: jax.Array
    sums: jax.Array
    finished: jax.Array
    keys: jax.Array | None

    @classmethod
    def start(cls, filler, numbers, seed, decoding: Decoding, max_length: int) -> "_Draws":
        shape, keys = (filler.shape[0], decoding.num_answers), None
        if decoding.method == "sample":
            key, fold = jax.random.key(seed, impl="threefry2x32"), jax.random.fold_in
            keys = jax.vmap(
                lambda row: jax.vmap(lambda n: fold(fold(key, row), n))(jnp.arange(shape[1]))
            )(numbers)
        return cls(
            jnp.zeros((*shape, max_length), jnp.int32), jnp.zeros(shape, jnp.float32),
            jnp.broadcast_to(filler[:, None], shape), keys,
        )  # fmt: skip

    def advance(self, logits, position, decoding: Decoding):
        """Takes logits [b, n, v] -> the next tokens [b, n], None, the new state."""
        if self.keys is None:
            token = jnp.argmax(logits, axis=-1)
        else:
            token = draw(logits, jax.vmap(jax.vmap(
                lambda key: jax.random.fold_in(key, position)
            ))(self.keys), decoding)  # fmt: skip
        chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
        log_prob = chosen - jax.nn.logsumexp(logits, axis=-1)
        token = jnp.where(self.finished, 0, token).astype(jnp.int32)
        return token, None, self._replace(
            tokens=_write(self.tokens, token, position),
            sums=self.sums + jnp.where(self.finished, 0.0, log_prob),
            finished=self.finished | (token == EOS),
        )  # fmt: skip

    def done(self):
        return jnp.all(self.finished)

    def result(self):
        return self.tokens, self.sums


def draw(logits: jax.Array, keys: jax.Array, decoding: Decoding) -> jax.Array:
    """Tokens from softmax(logits / temperature), among the top k and the top p of them.

    By the Gumbel trick: the largest of the logits, each with noise of its own.

    Args:
      logits: float32 [b, n, v].
      keys: [b, n], random keys.
      decoding: `temperature`, `top_k` and `top_p` are used.

    Returns:
      int32 [b, n].
    """
    logits, tokens = logits / decoding.temperature, None
    if 0 < decoding.top_k < logits.shape[-1]:
        logits, tokens = jax.lax.top_k(logits, decoding.top_k)
    if decoding.top_p < 1:
        logits = jnp.where(nucleus(logits, decoding.top_p), logits, -jnp.inf)
    noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:])))(keys)
    best = jnp.argmax(logits + noise, axis=-1)
    if tokens is None:
        return best
    return jnp.take_along_axis(tokens, best[..., None], axis=-1)[..., 0]


def nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """The fewest most probable tokens that together have at least probability `top_p`.

    Bisects the probability of the last one that is in: 30 sums over the vocabulary, which need no
    sorting, and of a vocabulary in slices on a mesh no gathering. Tokens that are as probable as
    the last one are in too.

    Args:
      logits: float32 [..., v].
      top_p: in (0, 1).

    Returns:
      bool [..., v].
    """
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    enough = top_p * jnp.sum(weights, axis=-1, keepdims=True)
    # The bits of floats that are not negative are ordered as the floats are.
    bits = jax.lax.bitcast_convert_type(weights, jnp.int32)
    low = jnp.zeros_like(enough, jnp.int32)
    high = jnp.full_like(low, np.float32(1).view(np.int32) + 1)  # above the largest, which is 1

    def halve(_, span):  # the tokens from `low` up have enough, those from `high` up do not
        low, high = span
        middle = (low + high) // 2
        mass = jnp.sum(jnp.where(bits >= middle, weights, 0.0), axis=-1, keepdims=True)
        return jnp.where(mass >= enough, middle, low), jnp.where(mass >= enough, high, middle)

    return bits >= jax.lax.fori_loop(0, 30, halve, (low, high))[0]


class _Beams(NamedTuple):
    """Beam search: of each row n sequences that go on, and the n best that have ended.

    Of the best 2n continuations those that end with EOS are kept if they are among the first n;
    the best n others go on. At `max_length` all end. So do fairseq and transformers (with
    `early_stopping="never"`); T5X also keeps those that are not among the first n.

    Attributes:
      tokens: int32 [b, n, t], of those that go on, best first.
      sums: float32 [b, n], their log-probabilities.
      kept: int32 [b, n, t], those that have ended, best first.
      kept_sums: float32 [b, n], their log-probabilities.
      scores: float32 [b, n], the same with the length penalty; -inf where there is none yet.
      closed: bool [b], rows whose kept ones no other can overtake.
    """

    tokens: jax.Array
    sums: jax.Array
    kept: jax.Array
    kept_sums: jax.Array
    scores: jax.Array
    closed: jax.Array

    @classmethod
    def start(cls, filler, decoding: Decoding, max_length: int) -> "_Beams":
        b, n = filler.shape[0], decoding.beam_size
        tokens, none = jnp.zeros((b, n, max_length), jnp.int32), jnp.full((b, n), -jnp.inf)
        # All begin alike: the first alone, lest all of them go the same way.
        return cls(tokens, none.at[:, 0].set(0.0), tokens, none, none, filler)

    def advance(self, logits, position, decoding: Decoding):
        """Takes logits [b, n, v] -> the next tokens [b, n], whose sequels they are, new state."""
        (b, n, v), t = logits.shape, self.tokens.shape[2]
        sums = self.sums[..., None] + jax.nn.log_softmax(logits)
        each = min(2 * n, v)
        sums, token = jax.lax.top_k(sums, each)  # of each beam; then of all of them
        sums, index = jax.lax.top_k(sums.reshape(b, -1), 2 * n)
        token, parent = jnp.take_along_axis(token.reshape(b, -1), index, axis=1), index // each
        tokens = _write(_take(self.tokens, parent), token, position)
        ended = (token == EOS) | (position == t - 1)

        kept = ended & (jnp.arange(2 * n) < n)[None]
        scores = jnp.where(kept, sums / _penalty(position + 1, decoding), -jnp.inf)
        scores, best = jax.lax.top_k(jnp.concatenate([self.scores, scores], axis=1), n)
        going, follow = jax.lax.top_k(jnp.where(ended, -jnp.inf, sums), n)
        # Sums only sink, and no divisor is larger than that of the longest.
        bound = going[:, 0] / _penalty(t, decoding)
        return _take(token, follow), _take(parent, follow), _Beams(
            tokens=_take(tokens, follow),
            sums=going,
            kept=_take(jnp.concatenate([self.kept, tokens], axis=1), best),
            kept_sums=_take(jnp.concatenate([self.kept_sums, sums], axis=1), best),
            scores=scores,
            closed=self.closed | (bound <= scores[:, -1]),
        )  # fmt: skip

    def done(self):
        return jnp.all(self.closed)

    def result(self):
        return self.kept, self.kept_sums


def _penalty(n: jax.Array | int, decoding: Decoding):
    """What the log-probability of n tokens is divided by."""
    return ((5 + n) / 6) ** decoding.length_penalty


@functools.partial(jax.jit, static_argnames=("net",))
def _score(params, inputs, targets, *, net):
    """Log-likelihoods [b, n] of targets [b, n, q], given inputs [b, k]; 0 = padding in both."""
    variables = {"params": params}
    first, context = net.apply(variables, inputs, method="start_decoding")
    first = jnp.broadcast_to(first[:, None, None], (*targets.shape[:2], 1))
    states, _ = net.apply(
        variables, jnp.concatenate([first, targets[:, :, :-1]], axis=2), jnp.int32(0),
        net.empty_cache(*targets.shape), context, method="decode_step",
    )  # fmt: skip

    def log_probs(at):  # one position at a time: logits of all of them would be the largest array
        states, targets = at
        logits = net.apply(variables, states, method="unembed")
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.where(targets > 0, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)

    return jax.lax.map(log_probs, (jnp.moveaxis(states, 2, 0), jnp.moveaxis(targets, 2, 0))).sum(0)
