"""The same weights in Hugging Face's T5: the same logits and the same greedy tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_t5 import batch_of

from distill import decode, t5

pytestmark = [
    pytest.mark.parity,
    # torch 2.13 on Python 3.12 and transformers 5 warn about themselves.
    pytest.mark.filterwarnings("ignore"),
]


def ours_from_torch(model, config):
    """Our tree from a Hugging Face model: kernels are transposed, layers stacked."""
    weights = {k: v.detach().numpy() for k, v in model.state_dict().items()}

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
def test_logits_and_greedy_tokens_equal_hugging_faces(version):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    gated = version == "1.1"
    theirs = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3,
            num_heads=4, feed_forward_proj="gated-gelu" if gated else "relu",
            tie_word_embeddings=not gated, dropout_rate=0.0, decoder_start_token_id=0,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():  # weights of a size at which mistakes show
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    config = t5.T5Config(
        vocab_size=96, dtype="float32", emb_dim=32, num_heads=4, num_encoder_layers=2,
        num_decoder_layers=3, head_dim=8, mlp_dim=48, dropout_rate=0.0,
        mlp_activations=("gelu", "linear") if gated else ("relu",), logits_via_embedding=not gated,
    )  # fmt: skip
    params = ours_from_torch(theirs, config)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda x: x.shape,
                                                           t5.param_shapes(config))  # fmt: skip
    batch = batch_of(np.random.default_rng(0), 3, [5, 12, 9], [12, 12, 12])
    got = t5.T5(config).apply({"params": params}, batch)
    inputs = torch.tensor(batch["encoder_input_tokens"], dtype=torch.long)
    with torch.no_grad():
        want = theirs(
            input_ids=inputs,
            attention_mask=(inputs > 0).long(),
            decoder_input_ids=torch.tensor(batch["decoder_input_tokens"], dtype=torch.long),
        ).logits.numpy()
        tokens = theirs.generate(
            input_ids=inputs, attention_mask=(inputs > 0).long(), max_new_tokens=10,
            do_sample=False, num_beams=1, eos_token_id=1, pad_token_id=0, use_cache=False,
        ).numpy()[:, 1:]  # fmt: skip
    # Scores are far from 0 with these weights, so relative to their size.
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    ours = np.asarray(
        decode.greedy(params, jnp.asarray(batch["encoder_input_tokens"]), model=t5.T5(config),
                      max_length=10)
    )  # fmt: skip
    np.testing.assert_array_equal(ours[:, : tokens.shape[1]], tokens)
