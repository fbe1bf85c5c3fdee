"""Decoding over an explicit cache of keys and values.

The loop holds the whole state: tokens so far, cache, which rows are finished. A step writes one
position of the cache and the loop ends as soon as every row has produced EOS.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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

    Inputs of like length are decoded together, in batches of one number of rows and, between two
    powers of two, one padded length.

    Args:
      params: the model's parameters, on the mesh.
      net: the network.
      inputs: token ids of each input, without padding.
      mesh: from `partitioning.make_mesh`.
      decoding: greedy, beams or samples, and their settings.
      max_length: tokens of an answer at most, EOS included.
      batch_size: inputs decoded together, at most; the next multiple of the batch shards where
        these do not divide it.
      progress: called after each batch with the number of inputs that are done.

    Raises:
      ValueError: `max_length` or `batch_size` is not positive, or an input is empty.
    """
    tokens: list[list[np.ndarray]] = [[] for _ in inputs]
    log_probs: list[list[float]] = [[] for _ in inputs]
    done = 0
    shards = partitioning.batch_shards(mesh)
    lengths = np.array([len(x) for x in inputs])
    rows_of_batch = -(-batch_size // shards) * shards
    for rows, padded in length_buckets(lengths, rows_of_batch):
        batch = np.zeros((rows_of_batch, padded), np.int32)
        for r, index in enumerate(rows):
            batch[r, : lengths[index]] = inputs[index]
        found = _greedy(
            params, partitioning.shard_whole(mesh, batch), model=net, max_length=max_length
        )
        output, sums = map(partitioning.gather, found)
        for r, index in enumerate(rows):
            answer = output[r]
            tokens[index].append(
                answer[: int(np.argmax(answer == EOS))] if EOS in answer else answer
            )
            log_probs[index].append(float(sums[r]))
        done += len(rows)
        if progress is not None:
            progress(done)
    return Generated(tokens, log_probs)


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
    return _greedy(params, encoder_input_tokens, model=model, max_length=max_length)[0]


@functools.partial(jax.jit, static_argnames=("model", "max_length"))
def _greedy(params, encoder_input_tokens, *, model, max_length):
    cfg, batch = model.config, encoder_input_tokens.shape[0]
    variables = {"params": params}
    cross, cross_bias = model.apply(variables, encoder_input_tokens, method="start_decoding")
    shape = (cfg.num_decoder_layers, batch, max_length, cfg.num_heads, cfg.head_dim)
    cache = (jnp.zeros(shape, cfg.compute_dtype), jnp.zeros(shape, cfg.compute_dtype))

    def not_done(state):
        position, _, _, _, finished, _ = state
        return (position < max_length) & ~jnp.all(finished)

    def step(state):
        position, last, output, total, finished, cache = state
        logits, new = model.apply(
            variables, last, position, cache, cross, cross_bias, method="decode_step"
        )
        cache = jax.tree.map(
            lambda old, one: jax.lax.dynamic_update_slice_in_dim(old, one, position, axis=2),
            cache, new,
        )  # fmt: skip
        token = jnp.where(finished, 0, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        best = jnp.max(jax.nn.log_softmax(logits), axis=-1)
        total += jnp.where(finished, 0.0, best)
        output = jax.lax.dynamic_update_slice_in_dim(output, token[:, None], position, axis=1)
        return position + 1, token, output, total, finished | (token == EOS), cache

    # A row of padding only (the filler of a last batch) is finished before it starts.
    finished = ~jnp.any(encoder_input_tokens > 0, axis=1)
    start = jnp.zeros((batch,), jnp.int32)
    output = jnp.zeros((batch, max_length), jnp.int32)
    total = jnp.zeros((batch,), jnp.float32)
    state = jnp.int32(0), start, output, total, finished, cache
    return jax.lax.while_loop(not_done, step, state)[2:4]


def length_buckets(lengths: np.ndarray, batch_size: int, multiple: int = 32) -> Iterator:
    """Groups rows of like length, so that short ones are not padded to the longest.

    Args:
      lengths: tokens of each input, [n].
      batch_size: rows per batch.
      multiple: a batch's length is rounded up to a power of two times this, so that few programs
        are compiled.

    Yields:
      (indices of at most batch_size rows, padded length).
    """
    order = np.argsort(-lengths, kind="stable")  # the longest first: memory is known at once
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        padded = multiple
        while padded < lengths[rows[0]]:
            padded *= 2
        yield rows, padded
