"""Hugging Face's T5 on machines without torch: frozen numbers, and weights drawn by their name.

`python tests/hugging_face_t5.py --goldens` computes the numbers anew, with torch and transformers.
"""

import dataclasses
import json

import hugging_face_t5
import jax
import numpy as np
import pytest
import safetensors.numpy
from hugging_face_t5 import GOLDEN_MODELS, GOLDENS, WEIGHTS, golden_batches, seeded_weights

from distill import convert, decode, export, objectives, t5, train

# How a folder of either family says what it is, in the two generations of transformers: those up
# to 4 tell T5 1.1 by untied embeddings, 5 calls every T5 tied and has a field of its own.
STYLES = {
    "v1_1": {
        "transformers 4": {"tie_word_embeddings": False},
        "transformers 5": {"tie_word_embeddings": True, "scale_decoder_outputs": False},
    },
    "v1_0": {
        "transformers 4": {},
        "transformers 5": {"tie_word_embeddings": True, "scale_decoder_outputs": True},
    },
}
CASES = [(name, style) for name in GOLDEN_MODELS for style in STYLES[name]]


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDENS) as stored:
        return {
            name: {key.split("/")[1]: stored[key] for key in stored if key.startswith(f"{name}/")}
            for name in GOLDEN_MODELS
        }


def imported(folder, name: str, style: str):
    """Our params and model, read from a folder as Hugging Face has it."""
    sizes = GOLDEN_MODELS[name]
    config = {key: sizes[key] for key in sizes if key not in ("seed", "tied", "eos")}
    config |= {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    config |= {"dropout_rate": 0.1, "layer_norm_epsilon": 1e-6, "decoder_start_token_id": 0}
    config |= {"relative_attention_num_buckets": 32, "eos_token_id": 1, "pad_token_id": 0}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | STYLES[name][style]))
    safetensors.numpy.save_file(seeded_weights(sizes), folder / WEIGHTS, {"format": "pt"})
    weights = convert.open_weights(folder)
    model = dataclasses.replace(weights.model, dtype="float32", dropout_rate=0.0)
    return convert.read_params(weights), model


def test_the_file_is_small_and_of_these_models(golden):
    assert GOLDENS.stat().st_size < 100_000
    for name, sizes in GOLDEN_MODELS.items():
        batch, prompts = golden_batches(name)
        weights = seeded_weights(sizes)
        assert list(golden[name]["names"]) == sorted(weights)
        sums = [weights[n].sum(dtype=np.float64) for n in sorted(weights)]
        np.testing.assert_allclose(
            sums, golden[name]["weight_sums"], rtol=1e-5, atol=1e-5,
            err_msg="numpy draws other weights than when the goldens were computed",
        )  # fmt: skip
        for key, array in (batch | {"prompts": prompts}).items():
            np.testing.assert_array_equal(array, golden[name][key])


@pytest.mark.parametrize("name,style", CASES)
def test_logits_and_greedy_tokens_equal_hugging_faces(golden, name, style, tmp_path):
    want, (batch, prompts) = golden[name], golden_batches(name)
    params, model = imported(tmp_path, name, style)
    logits = logits_of(params, model, batch)
    real = batch["decoder_target_tokens"] > 0
    np.testing.assert_allclose(
        logits[real], want["logits"], rtol=0, atol=1e-4 * np.abs(want["logits"]).max()
    )
    ended = (want["tokens"] == hugging_face_t5.EOS).any(axis=1)
    assert 0 < ended.sum() < len(ended) and want["margins"].min() > 1e-3  # no ties
    tokens = decode.greedy(
        params, prompts, model=t5.T5(model), max_length=hugging_face_t5.MAX_NEW_TOKENS
    )
    np.testing.assert_array_equal(tokens, want["tokens"])


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_loss_and_gradients_equal_hugging_faces(golden, name, tmp_path):
    """The gradients go to torch's names by the way of an export, as do weights."""
    want, (batch, _) = golden[name], golden_batches(name)
    params, model = imported(tmp_path, name, "transformers 5")
    loss, gradients = loss_and_gradients(params, model, batch)
    np.testing.assert_allclose(loss, want["loss"], rtol=1e-5)
    export.save_hugging_face(tmp_path / "gradients", gradients, model)
    found = safetensors.numpy.load_file(tmp_path / "gradients" / WEIGHTS)
    weights = seeded_weights(GOLDEN_MODELS[name])
    for i, tensor in enumerate(want["names"]):
        norm, along = want["gradient_norms"][i], want["gradient_products"][i]
        assert np.linalg.norm(found[tensor]) == pytest.approx(norm, rel=1e-4), tensor
        size = norm * np.linalg.norm(weights[tensor])
        assert abs(np.vdot(found[tensor], weights[tensor]) - along) <= 1e-4 * size, tensor


def logits_of(params, model, batch):
    apply = jax.jit(lambda params, batch: t5.T5(model).apply({"params": params}, batch))
    return np.asarray(apply(params, batch))


def loss_and_gradients(params, model, batch):
    """Mean cross entropy over the real targets, by our objective, and its gradients."""
    real = (batch["decoder_target_tokens"] > 0).astype(np.int32)
    batch = batch | {"decoder_loss_weights": real, "decoder_loss_groups": np.zeros_like(real)}
    objective = objectives.Standard(z_loss=0.0)

    def compute(params, batch):
        forward = train.make_forward(t5.T5(model), params)
        return objective(forward, batch, objectives.group_counts(batch))

    (loss, _), gradients = jax.jit(jax.value_and_grad(compute, has_aux=True))(params, batch)
    return float(loss), jax.device_get(gradients)
