"""The same weights in Hugging Face's T5: the same logits and the same greedy tokens."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_t5 import batch_of

from distill import decode, t5

pytestmark = pytest.mark.parity


def hugging_face(folder, config: dict, batch: dict) -> dict:
    """What hugging_face_t5.py answers for transformers.T5Config(**config) on `batch`."""
    for package in ("torch", "transformers"):  # looked for, not imported: see the script
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    script = pathlib.Path(__file__).with_name("hugging_face_t5.py")
    np.savez(folder / "request.npz", config=json.dumps(config), **batch)
    command = [sys.executable, script, folder / "request.npz", folder / "answer.npz"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(folder / "answer.npz"))


def ours_from_torch(weights, config):
    """Our tree from a Hugging Face state dict: kernels are transposed, layers stacked."""

    def stack(stack_name, pattern, layers, transpose=True):
        arrays = [weights[f"{stack_name}.block.{i}.layer.{pattern}.weight"] for i in range(layers)]
        return jnp.asarray(np.stack([a.T if transpose else a for a in arrays]))

    def attention(stack_name, pattern, layers):
        names = dict(query="q", key="k", value="v", out="o")
        return {
            ours: {"kernel": stack(stack_name, f"{pattern}.{theirs}", layers)}
            for ours, theirs in names.items()
        }

    def tree(name, layers, mlp):
        names = ["wi"] if len(config.mlp_activations) == 1 else ["wi_0", "wi_1"]

        def norm(sub_layer):
            return {"scale": stack(name, f"{sub_layer}.layer_norm", layers, transpose=False)}

        blocks = {
            "mlp": {n: {"kernel": stack(name, f"{mlp}.DenseReluDense.{n}", layers)}
                    for n in [*names, "wo"]},
            "pre_mlp_layer_norm": norm(mlp),
        }  # fmt: skip
        if name == "encoder":
            blocks["attention"] = attention(name, "0.SelfAttention", layers)
            blocks["pre_attention_layer_norm"] = norm(0)
        else:
            blocks["self_attention"] = attention(name, "0.SelfAttention", layers)
            blocks["pre_self_attention_layer_norm"] = norm(0)
            blocks["encoder_decoder_attention"] = attention(name, "1.EncDecAttention", layers)
            blocks["pre_cross_attention_layer_norm"] = norm(1)
        bias = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        return {
            "layers": blocks,
            "relpos_bias": {"rel_embedding": jnp.asarray(weights[bias].T)},
            f"{name}_norm": {"scale": jnp.asarray(weights[f"{name}.final_layer_norm.weight"])},
        }

    params = {
        "token_embedder": {"embedding": jnp.asarray(weights["shared.weight"])},
        "encoder": tree("encoder", config.num_encoder_layers, 1),
        "decoder": tree("decoder", config.num_decoder_layers, 2),
    }
    if not config.logits_via_embedding:
        params["decoder"]["logits_dense"] = {"kernel": jnp.asarray(weights["lm_head.weight"].T)}
    return params


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_logits_and_greedy_tokens_equal_hugging_faces(version, tmp_path):
    gated = version == "1.1"
    batch = batch_of(np.random.default_rng(0), 3, [5, 12, 9], [12, 12, 12])
    theirs = hugging_face(
        tmp_path,
        dict(
            vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3,
            num_heads=4, feed_forward_proj="gated-gelu" if gated else "relu",
            tie_word_embeddings=not gated, dropout_rate=0.0, decoder_start_token_id=0,
        ),
        {k: np.asarray(batch[k]) for k in ("encoder_input_tokens", "decoder_input_tokens")},
    )  # fmt: skip
    config = t5.T5Config(
        vocab_size=96, dtype="float32", emb_dim=32, num_heads=4, num_encoder_layers=2,
        num_decoder_layers=3, head_dim=8, mlp_dim=48, dropout_rate=0.0,
        mlp_activations=("gelu", "linear") if gated else ("relu",), logits_via_embedding=not gated,
    )  # fmt: skip
    params = ours_from_torch(theirs, config)
    shapes = jax.tree.map(lambda x: x.shape, t5.param_shapes(config))
    assert jax.tree.map(jnp.shape, params) == shapes
    logits = t5.T5(config).apply({"params": params}, batch)
    # Scores are far from 0 with these weights, so relative to their size.
    want = theirs["logits"]
    np.testing.assert_allclose(logits, want, atol=1e-4 * np.abs(want).max())
    tokens = decode.greedy(params, jnp.asarray(batch["encoder_input_tokens"]),
                           model=t5.T5(config), max_length=10)  # fmt: skip
    want = theirs["tokens"]
    np.testing.assert_array_equal(np.asarray(tokens)[:, : want.shape[1]], want)
