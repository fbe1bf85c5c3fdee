"""The optimizers against plain numpy, and the schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_t5 import TINY, numpy_params

from distill import optim


def leaf(tree, *path):
    for key in path:
        tree = tree[key]
    return np.asarray(tree)


def numpy_adafactor(param, grads, lr, decay_rate=0.8, eps1=1e-30, eps2=1e-3):
    """Shazeer and Stern 2018, algorithms 4 and 5 for a matrix, without momentum."""
    row = col = 0.0
    for t, g in enumerate(grads, start=1):
        decay = 1 - t**-decay_rate
        square = g**2 + eps1
        row = decay * row + (1 - decay) * square.mean(1)
        col = decay * col + (1 - decay) * square.mean(0)
        update = g / np.sqrt(np.outer(row, col) / row.mean())
        update /= max(1.0, np.sqrt((update**2).mean()))
        param = param - lr * max(eps2, np.sqrt((param**2).mean())) * update
    return param


def test_adafactor_treats_each_layer_of_a_stack_as_an_array_of_its_own():
    config = dataclasses.replace(TINY, emb_dim=128, mlp_dim=160)
    params = numpy_params(config)
    # Layers of different size, so that a scale taken over the whole stack would show.
    layers = jnp.array([1.0, 10.0]).reshape(2, 1, 1)
    path = ("encoder", "layers", "mlp", "wi_0", "kernel")
    params["encoder"]["layers"]["mlp"]["wi_0"]["kernel"] *= layers
    tx = optim.Adafactor(learning_rate=0.1).build(10)
    state, step = tx.init(params), jax.jit(tx.update)
    history, trained = [], params
    for seed in range(3):
        grads = numpy_params(config, seed=seed + 1)
        history.append(leaf(grads, *path))
        updates, state = step(grads, state, trained)
        trained = optax.apply_updates(trained, updates)
    for layer in range(2):
        want = numpy_adafactor(leaf(params, *path)[layer], [g[layer] for g in history], 0.1)
        np.testing.assert_allclose(leaf(trained, *path)[layer], want, rtol=2e-4, atol=2e-5)


def test_adamw_equals_numpy_and_does_not_decay_norm_scales():
    params = numpy_params(TINY)
    grads = numpy_params(TINY, seed=1)
    tx = optim.AdamW(learning_rate=0.1, schedule="constant", weight_decay=0.5, clip_norm=None)
    tx = tx.build(10)
    updates, _ = tx.update(grads, tx.init(params), params)
    g = leaf(grads, "token_embedder", "embedding")
    w = leaf(params, "token_embedder", "embedding")
    want = -0.1 * (g / (np.abs(g) + 1e-8) + 0.5 * w)  # the first step's bias-corrected moments
    got = leaf(updates, "token_embedder", "embedding")
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    scale_g = leaf(grads, "decoder", "decoder_norm", "scale")
    np.testing.assert_allclose(
        leaf(updates, "decoder", "decoder_norm", "scale"),
        -0.1 * scale_g / (np.abs(scale_g) + 1e-8), rtol=1e-4, atol=1e-6,
    )  # fmt: skip


def test_clipping_bounds_the_global_norm():
    params = numpy_params(TINY)
    clipped = optim.AdamW(clip_norm=1.0, b1=0.0, b2=0.0, eps=1e6).build(10)
    plain = optim.AdamW(clip_norm=None, b1=0.0, b2=0.0, eps=1e6).build(10)
    grads = jax.tree.map(lambda x: 100 * x, numpy_params(TINY, seed=1))
    norms = [
        optax.tree.norm(tx.update(grads, tx.init(params), params)[0]) for tx in (clipped, plain)
    ]
    # With a huge eps the update is proportional to the gradient.
    np.testing.assert_allclose(norms[1] / norms[0], optax.tree.norm(grads), rtol=1e-3)


@pytest.mark.parametrize(
    "kind,warmup,points",
    [
        ("constant", 0, {0: 1.0, 5: 1.0, 100: 1.0}),
        ("constant", 4, {0: 0.25, 1: 0.4375, 4: 1.0, 50: 1.0}),
        ("linear", 0, {0: 1.0, 50: 0.5, 100: 0.0, 200: 0.0}),
        ("linear", 20, {20: 1.0, 60: 0.5, 100: 0.0}),
        ("rsqrt", 16, {0: 0.25, 16: 0.25, 64: 0.125}),
    ],
)
def test_schedules(kind, warmup, points):
    rate = optim.schedule(kind, 1.0, warmup, total_steps=100)
    for step, value in points.items():
        assert float(rate(step)) == pytest.approx(value, abs=1e-6), step


@pytest.mark.parametrize("settings", [dict(schedule="cosine"), dict(learning_rate=-1.0),
                                      dict(clip_norm=0.0)])  # fmt: skip
def test_bad_settings_are_named(settings):
    for kind in (optim.AdamW, optim.Adafactor):
        with pytest.raises(ValueError, match=f"{kind.__name__}.{next(iter(settings))}"):
            kind(**settings)
