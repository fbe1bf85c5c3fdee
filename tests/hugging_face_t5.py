"""T5 as Hugging Face's transformers computes it with torch, in a process of its own.

    python tests/hugging_face_t5.py FOLDER      # answers FOLDER/request.json; `ask` runs this
    python tests/hugging_face_t5.py --goldens   # writes goldens/hugging_face_t5.npz anew

A process of its own, because the Triton that comes with torch's CUDA build and TensorFlow crash
each other (segmentation fault at `import triton`, torch 2.13 and TensorFlow 2.21), and the other
tests of a worker import TensorFlow. So torch and transformers are imported inside functions that
only this script's own process calls, and tests may import the rest.

Weights are drawn with numpy by torch's parameter name (`seeded_weights`), so that a machine without
torch draws the same ones and compares with what torch once computed from them: the goldens.
"""

import importlib.util
import json
import math
import pathlib
import subprocess
import sys
import zlib

import numpy as np

GOLDENS = pathlib.Path(__file__).with_name("goldens") / "hugging_face_t5.npz"
WEIGHTS = "model.safetensors"
MAX_NEW_TOKENS = 12
EOS = 1

# Sizes under transformers' names. `tied` is ours: which of the two families it is.
V1_1 = dict(feed_forward_proj="gated-gelu", tied=False)
V1_0 = dict(feed_forward_proj="relu", tied=True)
GOLDEN_MODELS = {  # 4,768 and 4,856 parameters
    "v1_1": dict(
        vocab_size=64, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_decoder_layers=2,
        num_heads=3, seed=11, **V1_1,
    ),
    "v1_0": dict(
        vocab_size=64, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_decoder_layers=3,
        num_heads=3, seed=35, eos=(33, 1.25), **V1_0,
    ),
}  # fmt: skip


# --- Without torch --------------------------------------------------------------------------------


def weight_shapes(sizes: dict) -> dict[str, tuple[int, ...]]:
    """{torch's parameter name: shape} of a T5; kernels are [out, in]."""
    width, inner, hidden = sizes["d_model"], sizes["num_heads"] * sizes["d_kv"], sizes["d_ff"]
    wi = ("wi_0", "wi_1") if sizes["feed_forward_proj"].startswith("gated-") else ("wi",)
    shapes = {"shared.weight": (sizes["vocab_size"], width)}
    for stack, depth in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        attentions = ("SelfAttention", "EncDecAttention")[: 1 if stack == "encoder" else 2]
        for i in range(sizes[depth]):
            for j, attention in enumerate(attentions):
                layer = f"{stack}.block.{i}.layer.{j}"
                shapes |= {f"{layer}.{attention}.{n}.weight": (inner, width) for n in "qkv"}
                shapes[f"{layer}.{attention}.o.weight"] = (width, inner)
                shapes[f"{layer}.layer_norm.weight"] = (width,)
            layer = f"{stack}.block.{i}.layer.{len(attentions)}"
            shapes |= {f"{layer}.DenseReluDense.{n}.weight": (hidden, width) for n in wi}
            shapes[f"{layer}.DenseReluDense.wo.weight"] = (width, hidden)
            shapes[f"{layer}.layer_norm.weight"] = (width,)
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shapes[bias] = (32, sizes["num_heads"])
        shapes[f"{stack}.final_layer_norm.weight"] = (width,)
    if not sizes["tied"]:
        shapes["lm_head.weight"] = (sizes["vocab_size"], width)
    return shapes


def seeded_weights(sizes: dict) -> dict[str, np.ndarray]:
    """Draws a model's weights: float32, each a function of `sizes["seed"]` and its own name.

    A parameter is `default_rng([seed, crc32(name)]).standard_normal(shape)`, in float64, times the
    scale that keeps every part of the model at work: activations of size 1, attention neither even
    nor saturated, norm scales and position biases that cannot be confused. With random logits a
    sequence hardly ever ends; `sizes["eos"] = (token, factor)` gives EOS the row of that token
    times the factor, so that a part of the rows of a batch end.
    """
    weights = {}
    for name, shape in weight_shapes(sizes).items():
        rng = np.random.default_rng([sizes["seed"], zlib.crc32(name.encode())])
        value = rng.standard_normal(shape)
        if name.endswith("layer_norm.weight"):
            value = 1 + 0.3 * value
        elif name == "shared.weight":
            # Tied logits repeat the input where the residual stream is mostly the embedding.
            value *= 0.15 if sizes["tied"] else 1.0
        elif not name.endswith("relative_attention_bias.weight"):
            value /= math.sqrt(shape[1])
            if name.endswith(".q.weight"):
                value *= 2 / math.sqrt(sizes["d_kv"])
        if name == ("shared.weight" if sizes["tied"] else "lm_head.weight") and "eos" in sizes:
            token, factor = sizes["eos"]
            value[EOS] = factor * value[token]
        weights[name] = value.astype(np.float32)
    return weights


def random_batch(seed: int, vocab: int, lengths: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    """A batch under T5X's keys: one row for each (input tokens, target tokens), padded with 0."""
    rng = np.random.default_rng(seed)
    inputs, targets = (
        np.zeros((len(lengths), max(sides)), np.int32) for sides in zip(*lengths, strict=True)
    )
    for row, sides in enumerate(lengths):
        for array, length in zip((inputs, targets), sides, strict=True):
            array[row, :length] = rng.integers(3, vocab, length)
            array[row, length - 1] = EOS
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1] * (targets > 0)
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": shifted,
        "decoder_target_tokens": targets,
    }


def golden_batches(name: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The batch and the inputs to continue of a golden model, [8, length].

    One row is longer than the 128 tokens beyond which all offsets share a position bucket.
    """
    seed, vocab = GOLDEN_MODELS[name]["seed"], GOLDEN_MODELS[name]["vocab_size"]
    batch = random_batch(seed, vocab, [(5, 4), (140, 9), (17, 1)])
    prompts = random_batch(seed + 1, vocab, [(n, 1) for n in (1, 3, 8, 13, 21, 30, 34, 40)])
    return batch, prompts["encoder_input_tokens"]


def require_torch() -> None:
    """Skips the test where torch or transformers is missing; looks for them, imports nothing."""
    import pytest

    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def ask(folder: pathlib.Path, request: dict, arrays: dict | None = None) -> tuple[dict, dict]:
    """Has this script answer a request in a process of its own.

    Args:
      folder: for the request, the answer, and the models that the script saves.
      request: `{"task": "make" | "load" | "train" | "search", ...}`, see the function of that name.
      arrays: numpy arrays that belong to it.

    Returns:
      (arrays, facts) of the answer.
    """
    require_torch()
    (folder / "request.json").write_text(json.dumps(request))
    np.savez(folder / "request.npz", **(arrays or {}))
    done = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads((folder / "answer.json").read_text())
    with np.load(folder / "answer.npz") as answer:
        return dict(answer), facts


# --- With torch: only in the script's own process -------------------------------------------------


def seeded_model(sizes: dict):
    """transformers' model with `seeded_weights`."""
    import torch
    import transformers

    own = ("tied", "seed", "eos")
    config = transformers.T5Config(
        **{name: value for name, value in sizes.items() if name not in own},
        tie_word_embeddings=sizes["tied"], dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    if not sizes["tied"]:
        # transformers 5 ties the logits of every fresh T5, and only loading can untie them.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    weights = seeded_weights(sizes)
    parameters = dict(model.named_parameters())
    assert {n: tuple(p.shape) for n, p in parameters.items()} == weight_shapes(sizes)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(weights[name]))
    return model


def forward(model, inputs: np.ndarray, targets: np.ndarray):
    """transformers' output, with its own loss over the real targets; 0 is padding in both."""
    import torch

    inputs, labels = (  # torch keeps the strides of a slice, and transformers wants none
        torch.tensor(np.ascontiguousarray(array), dtype=torch.long) for array in (inputs, targets)
    )
    labels[labels == 0] = -100
    return model(input_ids=inputs, attention_mask=(inputs > 0).long(), labels=labels)


def generate(model, prompts: np.ndarray) -> dict[str, np.ndarray]:
    """Greedy continuations [rows, MAX_NEW_TOKENS], 0 after EOS, and how clear each choice was.

    `margins` has the distance between the two best logits of each step.
    """
    import torch

    inputs = torch.tensor(prompts, dtype=torch.long)
    config = model.config
    with torch.no_grad():
        found = model.generate(
            input_ids=inputs, attention_mask=(inputs > 0).long(), do_sample=False, num_beams=1,
            max_new_tokens=MAX_NEW_TOKENS, output_logits=True, return_dict_in_generate=True,
            # With a cache transformers 5.23 fails for stacks of unequal depth.
            use_cache=config.num_layers == config.num_decoder_layers,
        )  # fmt: skip
    best = torch.stack(found.logits, dim=1).topk(2, dim=-1).values
    short = ((0, 0), (0, MAX_NEW_TOKENS - len(found.logits)))  # when every row has ended
    return {
        "tokens": np.pad(found.sequences.numpy()[:, 1:], short).astype(np.int32),
        "margins": np.pad((best[..., 0] - best[..., 1]).numpy(), short),
    }


def computed(model, batch: dict, prompts: np.ndarray) -> dict[str, np.ndarray]:
    """Logits, loss and tokens; leaves the loss's gradients in the model's parameters."""
    output = forward(model, batch["encoder_input_tokens"], batch["decoder_target_tokens"])
    output.loss.backward()
    found = {"logits": output.logits.detach().numpy(), "loss": output.loss.detach().numpy()}
    return found | generate(model, prompts)


def make(folder: pathlib.Path, request: dict, arrays: dict) -> tuple[dict, dict]:
    """Builds `request["sizes"]`, saves it in `model/` and its gradients, as a model, `gradients/`.

    `arrays` are a batch under T5X's keys and `prompts`; without them only the model is saved.
    """
    import torch

    model = seeded_model(request["sizes"])
    model.save_pretrained(folder / "model")
    if not arrays:
        return {}, {}
    found = computed(model, arrays, arrays["prompts"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(folder / "gradients")
    return found, {}


def load(folder: pathlib.Path, request: dict, arrays: dict) -> tuple[dict, dict]:
    """Loads `model/` as a user does: what was missing, what it computes, ids of `texts`."""
    import transformers

    model, info = transformers.T5ForConditionalGeneration.from_pretrained(
        folder / "model", output_loading_info=True
    )
    facts = {"loading": {name: sorted(map(str, found)) for name, found in info.items()}}
    facts["tied"] = model.lm_head.weight is model.shared.weight
    if request["texts"]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
        facts["tokenizer"] = type(tokenizer).__name__
        facts["ids"] = [tokenizer(text)["input_ids"] for text in request["texts"]]
        facts["special"] = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return computed(model.eval(), arrays, arrays["prompts"]), facts


def train(folder: pathlib.Path, request: dict, arrays: dict) -> tuple[dict, dict]:
    """Trains `model/` with the published objective, by the formula; saves it in `trained/`.

    Two forward passes a step, one over the step's inputs that ask for a label and one over those
    that ask for a rationale, each padded for itself; every loss is the mean over its own real
    tokens. Clipping, optimizer and schedule are the defaults of Hugging Face's trainer.

    `arrays` have {predict,explain}_{inputs,targets} [steps, pairs, length], 0 = padding; `request`
    has `alpha` and `learning_rate`.
    """
    import torch
    import transformers

    model = transformers.T5ForConditionalGeneration.from_pretrained(folder / "model").train()
    steps = len(arrays["predict_inputs"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=request["learning_rate"], betas=(0.9, 0.999), eps=1e-8,
        weight_decay=0.0,
    )  # fmt: skip
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, steps)
    curves = {"total": [], "label": [], "rationale": [], "grad_norm": []}
    for step in range(steps):
        losses = []
        for stream in ("predict", "explain"):
            sides = [arrays[f"{stream}_{side}"][step] for side in ("inputs", "targets")]
            losses.append(forward(model, *(side[:, side.any(axis=0)] for side in sides)).loss)
        loss = request["alpha"] * losses[0] + (1 - request["alpha"]) * losses[1]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for curve, value in zip(curves.values(), (loss, *losses, norm), strict=True):
            curve.append(float(value))
    model.save_pretrained(folder / "trained")
    return {name: np.array(curve) for name, curve in curves.items()}, {}


def search(folder: pathlib.Path, request: dict, arrays: dict) -> tuple[dict, dict]:
    """Saves `request["sizes"]` in `model/` and continues `arrays["prompts"]` with it.

    Once for each of `request["searches"]`, settings of transformers' `generate`. Of the i-th it
    returns `tokens_i` [rows, length], with 0 behind EOS, and where that is greedy `margins_i`
    [rows, length], the distances between the two best logits.
    """
    import torch

    model = seeded_model(request["sizes"])
    model.save_pretrained(folder / "model")
    inputs, found = torch.tensor(arrays["prompts"], dtype=torch.long), {}
    for i, settings in enumerate(request["searches"]):
        with torch.no_grad():
            output = model.generate(
                input_ids=inputs, attention_mask=(inputs > 0).long(), do_sample=False,
                output_logits=True, return_dict_in_generate=True, **settings,
            )  # fmt: skip
        found[f"tokens_{i}"] = output.sequences.numpy()[:, 1:].astype(np.int32)
        if settings["num_beams"] == 1:
            best = torch.stack(output.logits, dim=1).topk(2, dim=-1).values
            found[f"margins_{i}"] = (best[..., 0] - best[..., 1]).numpy()
    return found, {}


def write_goldens() -> None:
    """Writes what torch computes for GOLDEN_MODELS, but for the weights, which are drawn anew."""
    golden = {}
    for name, sizes in GOLDEN_MODELS.items():
        model, weights = seeded_model(sizes), seeded_weights(sizes)
        batch, prompts = golden_batches(name)
        found = computed(model, batch, prompts)
        real = batch["decoder_target_tokens"] > 0
        gradients = {n: p.grad.numpy().astype(np.float64) for n, p in model.named_parameters()}
        golden |= {f"{name}/{key}": array for key, array in batch.items()}
        golden |= {
            f"{name}/prompts": prompts,
            f"{name}/logits": found["logits"][real],
            f"{name}/loss": found["loss"],
            f"{name}/tokens": found["tokens"],
            f"{name}/margins": found["margins"],
            f"{name}/names": np.array(sorted(weights)),
            # Tells other random numbers of numpy from another model.
            f"{name}/weight_sums": np.array([weights[n].sum(dtype=np.float64)
                                             for n in sorted(weights)]),
            f"{name}/gradient_norms": np.array([np.linalg.norm(gradients[n])
                                                for n in sorted(weights)]),
            # Along the weights: a transposed gradient has the same norm.
            f"{name}/gradient_products": np.array([np.vdot(gradients[n], weights[n])
                                                   for n in sorted(weights)]),
        }  # fmt: skip
    GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS, **golden)
    print(f"{GOLDENS}: {GOLDENS.stat().st_size:,} bytes")


def main(argument: str) -> None:
    import torch

    torch.set_num_threads(1)
    if argument == "--goldens":
        return write_goldens()
    folder = pathlib.Path(argument)
    request = json.loads((folder / "request.json").read_text())
    with np.load(folder / "request.npz") as given:
        arrays = dict(given)
    answer = {"make": make, "load": load, "train": train, "search": search}[request["task"]]
    found, facts = answer(folder, request, arrays)
    np.savez(folder / "answer.npz", **found)
    (folder / "answer.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
