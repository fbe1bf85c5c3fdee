"""Cached decoding against the plain network, and how rows are grouped for it."""

import jax
import jax.numpy as jnp
import numpy as np
from test_t5 import TINY, batch_of, numpy_params

from distill import decode, t5


def test_cached_decoding_equals_teacher_forcing():
    """Each greedy token is the argmax of the uncached model on the tokens before it."""
    params = numpy_params(TINY, seed=7)
    inputs = batch_of(np.random.default_rng(7), 3, [5, 12, 8], [1, 1, 1])["encoder_input_tokens"]
    net = t5.T5(TINY)
    output = np.asarray(decode.greedy(params, jnp.asarray(inputs), model=net, max_length=10))
    fed = np.pad(output, ((0, 0), (1, 0)))[:, :-1]
    # Mask by position, not by target: everything up to the row's end is real.
    batch = {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": fed,
        "decoder_target_tokens": np.ones_like(fed),
    }
    want = np.argmax(net.apply({"params": params}, batch), axis=-1)
    for row in range(3):
        ended = np.flatnonzero(output[row] == decode.EOS)
        length = ended[0] + 1 if len(ended) else output.shape[1]
        np.testing.assert_array_equal(output[row, :length], want[row, :length])
        assert not output[row, length:].any()


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


def test_length_buckets_cover_every_row_once_in_few_shapes():
    lengths = np.random.default_rng(0).integers(1, 300, 1000)
    seen, shapes = [], set()
    for rows, (size, padded) in decode.length_buckets(lengths, 64):
        assert len(rows) <= size <= 64
        assert lengths[rows].max() <= padded
        seen += rows.tolist()
        shapes.add((size, padded))
    assert sorted(seen) == list(range(1000))
    assert len(shapes) <= 5
