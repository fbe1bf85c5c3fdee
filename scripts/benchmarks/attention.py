r"""Ways to compute attention and to look up embeddings: time, temporary memory, differences.

    python scripts/benchmarks/attention.py --rows=16 --lengths=288,104 --layers=2

Attention: forward and backward pass of T5 1.1 small's encoder and decoder, all but the logits, on
packed rows with dropout: ours (`plain`), `jax.nn.dot_product_attention`, and on a
GPU `fused` too. Embedding: forward and backward pass of the gather that we use, and of a product
with one-hot vectors. The contestants take turns; times are medians.
"""

import dataclasses
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from distill import configure, convert, t5, train

_ROWS = flags.DEFINE_integer("rows", 16, "Packed rows.", lower_bound=1)
_LENGTHS = flags.DEFINE_list("lengths", ["288", "104"], "Tokens of a row: inputs, targets.")
_SEQUENCES = flags.DEFINE_integer("sequences", 4, "Packed into each row.", lower_bound=1)
_LAYERS = flags.DEFINE_integer("layers", 2, "Of encoder and decoder each.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each contestant.", lower_bound=1)
_ONLY = flags.DEFINE_enum("only", None, ["attention", "embedding"], "Leave out the other.")


def library_attention(self: t5.Attention, query, keys, values, bias: t5.Parts):
    """Stands in for `t5.Attention._fused`."""
    visible = bias.query_segments[:, :, None] == bias.key_segments[:, None, :]
    visible &= bias.query_segments[:, :, None] > 0
    values = jnp.einsum("bhdk->bkhd", self.dropout(jnp.einsum("bkhd->bhdk", values)))
    return jax.nn.dot_product_attention(
        query, keys, values, bias.relative, visible[:, None], scale=1.0, is_causal=bias.causal,
        implementation="xla",
    )  # fmt: skip


def packed_batch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows without padding, cut evenly."""
    batch = {}
    for side, length in zip(("encoder", "decoder"), map(int, _LENGTHS.value), strict=True):
        tokens = rng.integers(2, 32_000, (_ROWS.value, length)).astype(np.int32)
        ids = 1 + np.arange(length, dtype=np.int32) * _SEQUENCES.value // length
        batch |= {f"{side}_input_tokens": tokens, f"{side}_target_tokens": tokens}
        batch[f"{side}_segment_ids"] = np.tile(ids, (_ROWS.value, 1))
    return batch


def take_turns(compiled: dict, *operands) -> None:
    """Prints median seconds, temporary memory, and how far each is from the first."""
    results, seconds = {}, {name: [] for name in compiled}
    for turn in range(_ROUNDS.value + 1):  # the first is not counted
        for name, function in compiled.items():
            start = time.perf_counter()
            results[name] = jax.block_until_ready(function(*operands))
            if turn:
                seconds[name].append(time.perf_counter() - start)
    (first, want), *_ = results.items()
    for name, got in results.items():
        away = max(
            float(jnp.abs(x - y).max() / jnp.abs(y).max())
            for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
        )
        median = statistics.median(seconds[name])
        ratio = median / statistics.median(seconds[first])
        memory = compiled[name].memory_analysis().temp_size_in_bytes / 1e6
        print(
            f"  {name:24} {median:.4f} s ({min(seconds[name]):.4f} to {max(seconds[name]):.4f}), "
            f"{ratio:.3f} of {first}; temporaries {memory:.0f} MB; away {away:.1e}"
        )


def compare_attention(rng: np.random.Generator) -> None:
    config = dataclasses.replace(
        convert.released_config("t5_1_1/small"), dtype=_DTYPE.value, dropout_rate=0.1,
        num_encoder_layers=_LAYERS.value, num_decoder_layers=_LAYERS.value,
    )  # fmt: skip
    fused = dataclasses.replace(config, attention="fused")
    params, batch = t5.init_params(config, jax.random.key(0)), packed_batch(rng)

    def compiled(config):
        net = t5.T5(config)

        def loss(params, batch, key):
            states = train.make_forward(net, params, key).states(batch).astype(jnp.float32)
            return jnp.mean(jnp.square(states) * jnp.arange(states.shape[-1]))

        step = jax.jit(jax.value_and_grad(loss))
        return step.lower(params, batch, jax.random.key(1)).compile()

    contestants = {"plain": compiled(config)}
    with mock.patch.object(t5.Attention, "_fused", library_attention):
        contestants["dot_product_attention"] = compiled(fused)
    if jax.default_backend() == "gpu":
        contestants["fused"] = compiled(fused)
    print(f"attention, {_ROWS.value} rows of {' + '.join(_LENGTHS.value)}, {_DTYPE.value}:")
    take_turns(contestants, params, batch, jax.random.key(1))


def compare_embedding(rng: np.random.Generator) -> None:
    config = convert.released_config("t5_1_1/small")
    tokens = packed_batch(rng)["encoder_input_tokens"]
    shape = (config.vocab_size, config.emb_dim)
    table = jnp.asarray(rng.normal(size=shape), jnp.float32)
    d_out = jnp.asarray(rng.normal(size=(*tokens.shape, config.emb_dim)), _DTYPE.value)

    def gather(table, tokens):
        return jnp.take(table.astype(_DTYPE.value), tokens, axis=0)

    def one_hot(table, tokens):
        return jax.nn.one_hot(tokens, len(table), dtype=d_out.dtype) @ table.astype(d_out.dtype)

    def compiled(look_up):
        def both(table, tokens, d_out):
            out, back = jax.vjp(lambda table: look_up(table, tokens), table)
            return out, back(d_out)

        return jax.jit(both).lower(table, tokens, d_out).compile()

    print(f"embedding, {tokens.size} tokens of {shape[0]} x {shape[1]}, {_DTYPE.value}:")
    take_turns(
        {"gather": compiled(gather), "one-hot product": compiled(one_hot)}, table, tokens, d_out
    )


def run(argv):
    del argv
    train.keep_freed_memory()  # as in training
    rng = np.random.default_rng(0)
    if _ONLY.value != "embedding":
        compare_attention(rng)
    if _ONLY.value != "attention":
        compare_embedding(rng)


def main(argv):
    configure.run_main(run, argv)


if __name__ == "__main__":
    app.run(main)
