"""Weights in: names of each format, what a checkpoint is, whether it fits, and reading it."""

import dataclasses
import json
import re

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from test_formats_t5x import assert_same, whole

from distill import checkpoints, convert, export, optim, partitioning, students, t5
from distill.formats import t5x, tensors

NORMS = {
    "encoder": ("pre_attention_layer_norm", "pre_mlp_layer_norm"),
    "decoder": (
        "pre_self_attention_layer_norm",
        "pre_cross_attention_layer_norm",
        "pre_mlp_layer_norm",
    ),
}
ATTENTION = {"encoder": ("attention",), "decoder": ("self_attention", "encoder_decoder_attention")}
MODEL = t5.T5Config(
    vocab_size=250, dtype="float32", emb_dim=12, num_heads=2, num_encoder_layers=2,
    num_decoder_layers=3, head_dim=4, mlp_dim=20, dropout_rate=0.0,
)  # fmt: skip
OLD = dataclasses.replace(MODEL, mlp_activations=("relu",), logits_via_embedding=True)
FORMS = ("t5x", "torch", "flax")


def make_flat(layers=(2, 12), gated=True, tied=False):
    """T5X names and small arrays, written down here independently of the table in convert."""
    names = ["token_embedder/embedding"] + ([] if tied else ["decoder/logits_dense/kernel"])
    for stack, count in zip(("encoder", "decoder"), layers, strict=True):
        names += [f"{stack}/{stack}_norm/scale", f"{stack}/relpos_bias/rel_embedding"]
        for i in range(count):
            base = f"{stack}/layers_{i}"
            names += [f"{base}/{norm}/scale" for norm in NORMS[stack]]
            mlp = ("wi_0", "wi_1", "wo") if gated else ("wi", "wo")
            names += [f"{base}/mlp/{name}/kernel" for name in mlp]
            for block in ATTENTION[stack]:
                names += [f"{base}/{block}/{n}/kernel" for n in ("query", "key", "value", "out")]
    rng = np.random.default_rng(0)
    shapes = {"scale": (3,)}
    return {
        name: rng.normal(size=shapes.get(name.split("/")[-1], (3, 4))).astype(np.float32)
        for name in names
    }


def lazy(arrays):
    return {name: tensors.of(array) for name, array in arrays.items()}


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), t5.param_shapes(model)
    )


def assert_same_tree(got, want):
    assert_same(t5x.flatten(got), t5x.flatten(want))


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_t5x_names_both_ways_are_bitwise(gated, tied):
    flat = make_flat(gated=gated, tied=tied)
    ours = convert.to_ours(lazy(flat), "t5x")
    assert_same(whole(convert.from_ours(ours, "t5x")), flat)
    assert ("decoder/logits_dense/kernel" in ours) is not tied
    mlp = {name.split("/")[-2] for name in ours if name.startswith("decoder/layers/mlp")}
    assert mlp == ({"wi_0", "wi_1", "wo"} if gated else {"wi", "wo"})
    # 12 layers: sorted as text, layer 10 would come before layer 2.
    out = ours["decoder/layers/encoder_decoder_attention/out/kernel"]
    assert out.shape == (12, 3, 4)
    for i in range(12):
        name = f"decoder/layers_{i}/encoder_decoder_attention/out/kernel"
        np.testing.assert_array_equal(out.whole()[i], flat[name])
    np.testing.assert_array_equal(
        out.read((slice(2, 11), slice(1, 3), slice(0, 2))), out.whole()[2:11, 1:3, :2]
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", [MODEL, OLD], ids=["1.1", "1.0"])
def test_every_format_both_ways_is_bitwise(form, model):
    params = t5x.flatten(random_params(model))
    theirs = convert.from_ours(lazy(params), form)
    assert_same(whole(convert.to_ours(theirs, form)), params)
    # A part of a transposed, stacked array is that part.
    query = convert.to_ours(theirs, form)["encoder/layers/attention/query/kernel"]
    index = (slice(1, 2), slice(3, 9), slice(2, 8))
    np.testing.assert_array_equal(
        query.read(index), params["encoder/layers/attention/query/kernel"][index]
    )


def test_names_of_hugging_face():
    """Some names as the released files have them, with the orientation of the array."""
    ours = lazy(t5x.flatten(random_params(MODEL)))
    torch, flax = convert.from_ours(ours, "torch"), convert.from_ours(ours, "flax")
    wo, bias = "encoder/layers/mlp/wo/kernel", "decoder/relpos_bias/rel_embedding"
    for name, want in {
        "shared.weight": ours["token_embedder/embedding"].whole(),
        "lm_head.weight": ours["decoder/logits_dense/kernel"].whole().T,
        "encoder.block.1.layer.1.DenseReluDense.wo.weight": ours[wo].whole()[1].T,
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight":
            ours[bias].whole().T,
        "decoder.final_layer_norm.weight": ours["decoder/decoder_norm/scale"].whole(),
    }.items():  # fmt: skip
        np.testing.assert_array_equal(torch[name].whole(), want, name)
    for name, want in {
        "shared/embedding": ours["token_embedder/embedding"].whole(),
        "lm_head/kernel": ours["decoder/logits_dense/kernel"].whole(),
        "encoder/block/1/layer/1/DenseReluDense/wo/kernel": ours[wo].whole()[1],
        "decoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding":
            ours[bias].whole().T,
        "decoder/final_layer_norm/weight": ours["decoder/decoder_norm/scale"].whole(),
        "decoder/block/2/layer/2/layer_norm/weight":
            ours["decoder/layers/pre_mlp_layer_norm/scale"].whole()[2],
    }.items():  # fmt: skip
        np.testing.assert_array_equal(flax[name].whole(), want, name)
    assert len(torch) == len(flax) == len(convert.from_ours(ours, "t5x"))


def test_every_row_of_the_table_is_used():
    flat = make_flat((1, 1)) | make_flat((1, 1), gated=False)
    assert {row.t5x.replace("{i}", "0") for row in convert.TABLE} == flat.keys()
    for form in ("ours", "torch", "flax"):
        assert len({getattr(row, form) for row in convert.TABLE}) == len(convert.TABLE)


def test_each_missing_name_is_named():
    flat = lazy(make_flat((2, 2)))
    for name in flat:
        if name == "decoder/logits_dense/kernel":
            continue  # without it the logits are tied
        with pytest.raises(ValueError, match=name):
            convert.to_ours({k: v for k, v in flat.items() if k != name}, "t5x")


@pytest.mark.parametrize("index", ["01", "-1", "x", "99999999999", "2_0"])
def test_names_that_do_not_belong_are_named(index):
    for extra in (
        f"encoder/layers_{index}/mlp/wo/kernel", "optimizer/m", "decoder/layers_0/mlp/wi/kernel",
        "decoder/layers_0/self_attention/query/bias", "decoder", "",
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"unexpected: {extra}"):
            convert.to_ours(lazy(make_flat((2, 2)) | {extra: np.zeros(1)}), "t5x")


def test_gaps_and_uneven_layers():
    flat = make_flat((2, 6))
    with pytest.raises(ValueError, match="decoder has no layers 2, 4 below layer 5"):
        convert.to_ours(lazy({k: v for k, v in flat.items() if "layers_4" not in k
                              and "decoder/layers_2" not in k}), "t5x")  # fmt: skip
    name = "encoder/layers_1/mlp/wo/kernel"
    for other in (flat[name].astype(jnp.bfloat16), flat[name].T):
        with pytest.raises(ValueError, match="differ"):
            convert.to_ours(lazy(flat | {name: other}), "t5x")
    ours = convert.to_ours(lazy(flat), "t5x")
    ours["encoder/layers/mlp/wo/kernel"] = tensors.of(np.zeros((3, 3, 4)))
    with pytest.raises(ValueError, match="has 3 layers, others in encoder 2"):
        convert.from_ours(ours, "t5x")
    del ours["encoder/layers/mlp/wo/kernel"]
    ours["extra"] = tensors.of(np.zeros(1))
    with pytest.raises(ValueError, match="encoder/layers/mlp/wo/kernel; 1 unexpected: extra"):
        convert.from_ours(ours, "t5x")


# ---- what a checkpoint is -----------------------------------------------------------------------

CONFIG = {
    "model_type": "t5", "vocab_size": 250, "d_model": 12, "d_kv": 4, "d_ff": 20, "num_layers": 2,
    "num_decoder_layers": 3, "num_heads": 2, "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False, "dropout_rate": 0.0, "relative_attention_num_buckets": 32,
}  # fmt: skip
OLD_CONFIG = CONFIG | {"feed_forward_proj": "relu", "tie_word_embeddings": True}


def write_hugging_face(folder, arrays, config=CONFIG):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    safetensors.numpy.save_file(contiguous, folder / "model.safetensors")
    return str(folder)


def torch_arrays(model, seed=0):
    return whole(convert.from_ours(lazy(t5x.flatten(random_params(model, seed))), "torch"))


@pytest.mark.parametrize("model", [MODEL, OLD], ids=["1.1", "1.0"])
def test_opens_hugging_face(tmp_path, model):
    config = CONFIG if model is MODEL else OLD_CONFIG
    arrays = torch_arrays(model)
    # What released files have beside the parameters.
    arrays["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.ones(
        (32, 2), np.float32
    )
    arrays["encoder.embed_tokens.weight"] = arrays["shared.weight"]
    arrays["decoder.embed_tokens.weight"] = arrays["shared.weight"]
    if model is OLD:
        arrays["lm_head.weight"] = arrays["shared.weight"]
    weights = convert.open_weights(write_hugging_face(tmp_path, arrays, config))
    assert dataclasses.replace(weights.model, dtype="float32") == model
    assert weights.kind == convert.HUGGING_FACE and weights.step == 0
    assert "EncDecAttention.relative_attention_bias" in " ".join(weights.notes)
    assert_same_tree(convert.read_params(weights), random_params(model))
    # Torch files in which only the aliases of the embedding are there.
    del arrays["shared.weight"]
    weights = convert.open_weights(write_hugging_face(tmp_path, arrays, config))
    assert_same_tree(convert.read_params(weights), random_params(model))


@pytest.mark.parametrize("scanned", [False, True])
def test_opens_flaxs_msgpack(tmp_path, scanned):
    params = random_params(MODEL)
    arrays = whole(convert.from_ours(lazy(t5x.flatten(params)), "flax"))
    if scanned:
        layered = re.compile(r"(encoder|decoder)/block/([0-9]+)/(.+)")
        bias = "layer/0/SelfAttention/relative_attention_bias/embedding"
        for stack, depth in (("encoder", 2), ("decoder", 3)):  # a scan gives every layer one
            for i in range(1, depth):
                arrays[f"{stack}/block/{i}/{bias}"] = arrays[f"{stack}/block/0/{bias}"]
        groups = {}
        for name in sorted(arrays):
            if match := layered.fullmatch(name):
                groups.setdefault((match[1], match[3]), []).append(arrays.pop(name))
        for (stack, name), layers in groups.items():
            arrays[f"{stack}/block/FlaxT5Layers/{name}"] = np.stack(layers)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    content = flax.serialization.msgpack_serialize(t5x.nest(arrays))
    (tmp_path / "flax_model.msgpack").write_bytes(content)
    weights = convert.open_weights(str(tmp_path))
    assert_same_tree(convert.read_params(weights), params)
    if scanned:
        name = "decoder/block/FlaxT5Layers/layer/0/SelfAttention/relative_attention_bias/embedding"
        arrays[name] = arrays[name] + np.arange(3, dtype=np.float32)[:, None, None]
        content = flax.serialization.msgpack_serialize(t5x.nest(arrays))
        (tmp_path / "flax_model.msgpack").write_bytes(content)
        with pytest.raises(ValueError, match="bias in every layer"):
            convert.open_weights(str(tmp_path))


def test_transformers_5_ties_what_is_equal(tmp_path):
    """It writes `tie_word_embeddings: true` for every T5, and one array where both are equal."""
    arrays = torch_arrays(MODEL)
    five = CONFIG | {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    weights = convert.open_weights(write_hugging_face(tmp_path, arrays, five))
    assert not weights.model.logits_via_embedding
    assert_same_tree(convert.read_params(weights), random_params(MODEL))
    del arrays["lm_head.weight"]
    weights = convert.open_weights(write_hugging_face(tmp_path, arrays, five))
    params = convert.read_params(weights)
    np.testing.assert_array_equal(
        params["decoder"]["logits_dense"]["kernel"], arrays["shared.weight"].T
    )
    assert any("embedding" in note for note in weights.notes)
    five["scale_decoder_outputs"] = True  # T5 1.0
    weights = convert.open_weights(write_hugging_face(tmp_path, arrays, five))
    assert weights.model.logits_via_embedding


def _without(name):
    return lambda arrays: arrays.pop(name)


def _set(name, value):
    return lambda arrays: arrays.__setitem__(name, value(arrays))


WO = "decoder.block.1.layer.2.DenseReluDense.wo.weight"
BIAS = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
SPOILED = {
    "tensor missing": ({}, _without(WO), WO),
    "embedding missing": ({}, _without("shared.weight"), "shared.weight"),
    "embedding missing, tied": (OLD_CONFIG | {"feed_forward_proj": "gated-gelu"},
                                _without("shared.weight"), "shared.weight"),
    "layer missing": ({}, lambda a: [a.pop(n) for n in list(a) if "decoder.block.1." in n],
                      "decoder has no layers 1"),
    "norm missing": ({}, _without("encoder.final_layer_norm.weight"), "encoder.final_layer_norm"),
    "tied where untied": ({}, _without("lm_head.weight"), "lm_head.weight is missing"),
    "untied where tied": (OLD_CONFIG | {"feed_forward_proj": "gated-gelu"}, None,
                          "lm_head.weight is not shared.weight"),
    "an embedding of its own": ({}, _set("encoder.embed_tokens.weight",
                                         lambda a: a["shared.weight"] + 1), "encoder.embed_tokens"),
    "transposed": ({}, _set(WO, lambda a: a[WO].T), "wo.weight differ"),
    "all transposed": ({}, lambda a: a.update({n: x.T for n, x in a.items() if ".wo." in n}),
                       "encoder/layers/mlp/wo/kernel"),
    "one row more": ({}, _set(WO, lambda a: np.ones((13, 20), np.float32)), "differ"),
    "wrong size": ({}, _set("decoder.final_layer_norm.weight", lambda a: np.ones(7, np.float32)),
                   "decoder/decoder_norm/scale"),
    "wrong rank": ({}, _set("shared.weight", lambda a: np.ones(7, np.float32)), "shape"),
    "integers": ({}, _set("shared.weight", lambda a: np.ones((250, 12), np.int32)),
                 r"int32\[250,12\]"),
    "float64": ({}, _set("shared.weight", lambda a: np.ones((250, 12))), r"float64\[250,12\]"),
    "hostile name": ({}, _set("../../x", lambda a: np.ones(1, np.float32)), r"\.\./\.\./x"),
    "unknown name": ({}, _set("encoder.block.0.layer.0.SelfAttention.q.bias",
                              lambda a: np.ones(8, np.float32)), "q.bias"),
    "UMT5's biases": ({}, _set(BIAS, lambda a: np.ones((32, 2), np.float32)), "unexpected"),
    "UMT5": ({"model_type": "umt5"}, None, "UMT5.*every layer"),
    "another model": ({"model_type": "longt5"}, None, "longt5"),
    "exact GELU": ({"feed_forward_proj": "gelu"}, None, "feed_forward_proj='gelu'"),
    "not gated": ({"feed_forward_proj": "relu"}, None, "gated"),
    "another width": ({"d_model": 16}, None, "d_model=16, the arrays have 12"),
    "other heads": ({"num_heads": 4}, None, "num_heads=4, the arrays have 2"),
    "activations as a list": ({"feed_forward_proj": ["relu"]}, None, "feed_forward_proj="),
    "other epsilon": ({"layer_norm_epsilon": 1e-5}, None, "layer_norm_epsilon=1e-05"),
    "another start": ({"decoder_start_token_id": 3}, None, "decoder_start_token_id=3"),
    "other padding": ({"pad_token_id": 1}, None, "pad_token_id=1"),
    "other buckets": ({"relative_attention_num_buckets": 64}, None, "num_buckets=64"),
    "another end": ({"eos_token_id": 2}, None, "eos_token_id=2"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_each_wrong_folder_is_refused_by_name(tmp_path, case):
    changes, spoil, message = SPOILED[case]
    arrays = torch_arrays(MODEL)
    if spoil:
        spoil(arrays)
    path = write_hugging_face(tmp_path, arrays, CONFIG | changes)
    with pytest.raises(ValueError, match=message) as caught:
        convert.read_params(convert.open_weights(path))
    assert str(tmp_path) in str(caught.value)


def test_truncated_safetensors(tmp_path):
    path = write_hugging_face(tmp_path, torch_arrays(MODEL))
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    for size in (0, 5, 200, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            convert.open_weights(path)


def test_what_is_no_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        convert.open_weights(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"config\.json"):
        convert.open_weights(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="model.safetensors is a file: give its folder"):
        convert.open_weights(str(tmp_path / "model.safetensors"))
    (tmp_path / "model.safetensors").rename(tmp_path / "tf_model.h5")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no weights"):
        convert.open_weights(str(tmp_path))
    for path in (tmp_path / "absent", "gs:/typo/path", "../absent/folder", "t5-small", ""):
        with pytest.raises(FileNotFoundError, match="google-t5/t5-small"):
            convert.open_weights(str(path))
    monkeypatch.setattr(convert.hugging_face, "download", lambda *_, **__: tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="No checkpoint at google/t5-none"):
        convert.open_weights("google/t5-none")


@pytest.mark.parametrize(
    "name,activations",
    [("gated-silu", ("silu", "linear")), ("gated-relu", ("relu", "linear")), (None, None)],
)
def test_activations_of_hugging_face(tmp_path, name, activations):
    config = {k: v for k, v in CONFIG.items() if k != "feed_forward_proj"}
    config |= {"eos_token_id": [1]}  # newer files have lists
    config |= {"feed_forward_proj": name} if name else {"model_type": "mt5"}  # its default
    path = write_hugging_face(tmp_path, torch_arrays(MODEL), config)
    weights = convert.open_weights(path)
    assert weights.model.mlp_activations == (activations or ("gelu", "linear"))


def test_the_newest_whoever_wrote_it(tmp_path):
    """A MODEL_DIR that was T5X's, in which training went on."""
    export.save_t5x(tmp_path, random_params(MODEL, 9), MODEL, 9)
    for step, kind in ((8, convert.T5X), (10, convert.OURS)):
        with checkpoints.Checkpointer(tmp_path, keep=None) as saver:
            metadata = {"model": dataclasses.asdict(MODEL), "step": step}
            saver.save(step, {"params": random_params(MODEL, step)}, metadata)
        weights = convert.open_weights(str(tmp_path))
        assert weights.kind == kind
    assert_same_tree(convert.read_params(weights), random_params(MODEL, 10))


def test_the_newest_of_a_folder_of_t5xs(tmp_path):
    for step in (9, 10):
        export.save_t5x(tmp_path, random_params(MODEL, step), MODEL, step)
    weights = convert.open_weights(str(tmp_path))
    assert (weights.path.name, weights.step, weights.kind) == ("checkpoint_10", 10, convert.T5X)
    assert_same_tree(convert.read_params(weights), random_params(MODEL, 10))


@pytest.mark.parametrize("axis", [0, 1])
def test_t5xs_scanned_stacks(tmp_path, axis):
    """As T5X's scalable T5 has them, which gives each layer a relative bias."""
    params = random_params(MODEL)
    flat = {}
    for name, array in t5x.flatten(params).items():
        stack, *rest = name.split("/")
        if rest[0] == "layers":
            if "attention/" in name and rest[-2] == "out":  # heads and channels apart
                array = array.reshape(len(array), 2, 4, 12)
            elif "attention/" in name:
                array = array.reshape(len(array), 12, 2, 4)
            flat["/".join([stack, stack, *rest[1:]])] = np.moveaxis(array, 0, axis)
        elif rest[0] == "relpos_bias":
            depth = {"encoder": 2, "decoder": 3}[stack]
            flat["/".join([stack, stack, *rest])] = np.stack([array] * depth, axis)
        else:
            flat[name] = array
    t5x.write_checkpoint(tmp_path / "same", lazy(flat), {}, 3)
    weights = convert.open_weights(str(tmp_path / "same"))
    assert_same_tree(convert.read_params(weights), params)
    for name in ("encoder/layers/attention/query/kernel", "encoder/layers/attention/out/kernel"):
        tensor, index = weights.tensors[name], (slice(1, 2), slice(3, 6), slice(1, 7))
        np.testing.assert_array_equal(tensor.read(index), t5x.flatten(params)[name][index])
    name = "decoder/decoder/relpos_bias/rel_embedding"
    flat[name] = flat[name] * np.expand_dims(
        np.arange(3, dtype=np.float32), tuple(i for i in range(3) if i != axis)
    )
    t5x.write_checkpoint(tmp_path / "other", lazy(flat), {}, 3)
    with pytest.raises(ValueError, match="bias in every layer of the decoder"):
        convert.open_weights(str(tmp_path / "other"))


# ---- whether it fits ----------------------------------------------------------------------------


def abstract_weights(model, kind=convert.HUGGING_FACE):
    """As if opened: shapes only, so that full sizes cost nothing."""

    def unread(index):
        pytest.fail("read before it was known to fit")

    shapes = t5x.flatten(t5.param_shapes(model))
    found = {n: tensors.Tensor(x.shape, np.dtype(np.float32), unread) for n, x in shapes.items()}
    return convert.Weights("/some/where", kind, found, model, 0)


def released(name, **changes):
    vocab, emb, heads, encoder, decoder, head_dim, mlp = convert.RELEASED[name]
    old = name.startswith("t5_1_0")
    sizes = dict(
        vocab_size=vocab, emb_dim=emb, num_heads=heads, num_encoder_layers=encoder,
        num_decoder_layers=decoder, head_dim=head_dim, mlp_dim=mlp, logits_via_embedding=old,
        mlp_activations=("relu",) if old else ("gelu", "linear"),
    )  # fmt: skip
    return t5.T5Config(**sizes | changes)


@pytest.mark.parametrize(
    "have,want,lines",
    [
        ("t5_1_0/base", "t5_1_1/base",
         [r"decoder/layers/mlp/wi/kernel +\(absent\) +float\[12,768,3072\]",
          r"decoder/logits_dense/kernel +float\[768,32128\] +\(absent\)",
          r"mlp_activations: want \('gelu', 'linear'\), have \('relu',\)",
          r"logits_via_embedding: want False, have True",
          r"this is t5_1_0/base: use --gin_file=t5_1_0/base.gin"]),
        ("t5_1_1/large", "t5_1_1/base", ["emb_dim: want 768, have 1024", "t5_1_1/large.gin"]),
        ("mt5/base", "t5_1_1/base", ["vocab_size: want 32128, have 250112", "mt5/base.gin"]),
        ("byt5/small", "t5_1_1/small", ["num_decoder_layers: want 8, have 4", "byt5/small.gin"]),
    ],
)  # fmt: skip
def test_a_misfit_is_a_table_with_its_cause(have, want, lines):
    with pytest.raises(ValueError) as caught:
        convert.load(abstract_weights(released(have)), released(want))
    for line in lines:
        assert re.search(line, str(caught.value)), (line, str(caught.value))


@pytest.mark.parametrize(
    "changes", [dict(logits_via_embedding=True), dict(mlp_activations=("silu", "linear")),
                dict(head_dim=32), dict(vocab_size=32200)],
)  # fmt: skip
def test_no_model_file_is_named_that_would_not_help(changes):
    other = released("t5_1_1/small", **changes)
    assert convert.released(other) is None
    with pytest.raises(ValueError) as caught:
        convert.require_fit(abstract_weights(other), released("t5_1_1/small"))
    assert "t5_1_1/small.gin" not in str(caught.value) and "want" in str(caught.value)


def test_a_misfit_that_shapes_do_not_show():
    silu = released("t5_1_1/small", mlp_activations=("silu", "linear"))
    with pytest.raises(ValueError, match="mlp_activations: want .'silu'"):
        convert.require_fit(abstract_weights(released("t5_1_1/small")), silu)
    # T5X's files do not tell which gated activation it was.
    convert.require_fit(abstract_weights(released("t5_1_1/small"), convert.T5X), silu)


def test_full_sizes_fit_themselves():
    for name in convert.RELEASED:
        convert.require_fit(abstract_weights(released(name)), released(name))
        assert convert.released(released(name)) == name
    assert convert.released(MODEL) is None


@pytest.mark.parametrize("have,want", [(250, 256), (256, 250), (250, 131)])
def test_padding_of_the_vocabulary(tmp_path, have, want, caplog):
    stored = dataclasses.replace(MODEL, vocab_size=have)
    params = random_params(stored)
    export.save_hugging_face(tmp_path / "x", params, stored)
    weights = convert.open_weights(str(tmp_path / "x"))
    model = dataclasses.replace(MODEL, vocab_size=want)
    got = convert.load(weights, model)
    kept = min(have, want)
    embedding, kernel = params["token_embedder"]["embedding"], params["decoder"]["logits_dense"]
    np.testing.assert_array_equal(got["token_embedder"]["embedding"][:kept], embedding[:kept])
    np.testing.assert_array_equal(
        got["decoder"]["logits_dense"]["kernel"][:, :kept], kernel["kernel"][:, :kept]
    )
    assert got["token_embedder"]["embedding"].shape == (want, 12)
    for i in range(kept, want):  # like the padding token
        np.testing.assert_array_equal(got["token_embedder"]["embedding"][i], embedding[0])
        column = got["decoder"]["logits_dense"]["kernel"][:, i]
        np.testing.assert_array_equal(column, kernel["kernel"][:, 0])
    assert f"has {have} rows in its embedding, the model {want}" in caplog.text
    with pytest.raises(ValueError, match="vocab_size: want 300"):
        convert.load(weights, dataclasses.replace(MODEL, vocab_size=300))


# ---- reading ------------------------------------------------------------------------------------

SHARDED = dataclasses.replace(MODEL, vocab_size=256, emb_dim=16, num_heads=4, mlp_dim=24)


@pytest.mark.parametrize("kind", ["hugging_face", "t5x", "ours"])
def test_each_device_reads_its_part(tmp_path, kind):
    params = random_params(SHARDED)
    if kind == "hugging_face":
        export.save_hugging_face(tmp_path / "x", params, SHARDED)
    elif kind == "t5x":
        export.save_t5x(tmp_path / "x", params, SHARDED, 5)
    else:
        with checkpoints.Checkpointer(tmp_path / "x") as saver:
            metadata = {"model": dataclasses.asdict(SHARDED), "step": 5}
            saver.save(5, {"params": params}, metadata)
    weights = convert.open_weights(str(tmp_path / "x"))
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=2, fsdp=2, tensor=2))
    abstract = students.abstract_params(t5.T5(SHARDED), mesh)
    largest = []
    watched = {}
    for name, tensor in weights.tensors.items():

        def read(index, tensor=tensor, name=name):
            part = tensor.read(index)
            largest.append(part.nbytes / tensor.nbytes)
            return part

        watched[name] = dataclasses.replace(tensor, read=read)
    weights = dataclasses.replace(weights, tensors=watched)
    got = convert.load(weights, SHARDED, abstract)
    assert_same_tree(jax.device_get(got), params)
    assert jax.tree.all(jax.tree.map(lambda x, a: x.sharding == a.sharding, got, abstract))
    if kind != "ours":  # Orbax reads the shards
        split = [x for x in jax.tree.leaves(got) if not x.is_fully_replicated]
        assert len(split) > 20
        assert sum(part <= 0.5 for part in largest) >= 2 * len(split)


def test_what_several_devices_hold_is_read_once(tmp_path):
    export.save_t5x(tmp_path, random_params(SHARDED), SHARDED)
    weights = convert.open_weights(str(tmp_path))
    name, reads = "encoder/layers/mlp/wo/kernel", []

    def read(index, tensor=weights.tensors[name]):
        reads.append(index)
        return tensor.read(index)

    weights.tensors[name] = dataclasses.replace(weights.tensors[name], read=read)
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=4, tensor=2))
    convert.load(weights, SHARDED, students.abstract_params(t5.T5(SHARDED), mesh))
    assert len(reads) == 2  # 8 devices, two slices


def test_half_precision_is_read_as_float32(tmp_path):
    arrays = torch_arrays(MODEL)
    for dtype in (jnp.bfloat16, np.float16):
        stored = {name: array.astype(dtype) for name, array in arrays.items()}
        weights = convert.open_weights(write_hugging_face(tmp_path, stored))
        got = whole(convert.from_ours(lazy(t5x.flatten(convert.read_params(weights))), "torch"))
        assert_same(got, {name: array.astype(np.float32) for name, array in stored.items()})


def test_a_damaged_array_is_named(tmp_path):
    folder = export.save_t5x(tmp_path, random_params(MODEL), MODEL)
    next((folder / "target.encoder.layers_1.mlp.wo.kernel").glob("0*")).write_bytes(b"x")
    with pytest.raises(ValueError, match="encoder/layers_1/mlp/wo/kernel cannot be read"):
        convert.read_params(convert.open_weights(str(folder)))


# ---- Adafactor ----------------------------------------------------------------------------------

FACTORED = dataclasses.replace(
    MODEL, vocab_size=256, emb_dim=128, num_heads=2, head_dim=64, mlp_dim=192
)


def optimizer_state(params, updates=3):
    tx = optim.Adafactor().build(10)
    state = tx.init(params)
    for seed in range(updates):
        _, state = tx.update(random_params(FACTORED, seed + 1), state, params)
    return tx, state


def test_adafactors_state_goes_to_t5x_and_back(tmp_path):
    params = jax.tree.map(jnp.asarray, random_params(FACTORED))
    tx, state = optimizer_state(params)
    with checkpoints.Checkpointer(tmp_path / "ours") as saver:
        metadata = {"model": dataclasses.asdict(FACTORED), "step": 1003}
        saver.save(1003, {"params": params, "opt_state": state}, metadata)
    ours = convert.open_weights(str(tmp_path / "ours"), slots=True)
    folder = export.save_t5x(tmp_path / "t5x", ours, FACTORED, ours.step, ours.slots)
    theirs = convert.open_weights(str(folder), slots=True)
    kernel = t5x.open_checkpoint(folder, slots=True).slots
    assert kernel["encoder/layers_0/mlp/wo/kernel/v_row"].shape == (128,)
    assert kernel["encoder/layers_0/mlp/wo/kernel/v_col"].shape == (192,)
    assert kernel["encoder/layers_0/mlp/wo/kernel/v"].shape == (1,)

    shardings = jax.tree.map(lambda x: x.sharding, state)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
    got = convert.load_slots(theirs, abstract)
    for (path, have), want in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(state), strict=True
    ):
        name = partitioning.path_name(path)
        if name.endswith("/0/count"):  # of the second moments: T5X's step
            assert (np.asarray(have) == 1003).all()
        elif name.endswith("count"):  # of the learning rate
            assert (np.asarray(have) == 0).all()
        else:
            np.testing.assert_array_equal(have, want, name)

    # A vocabulary that is padded takes the slots along.
    larger = dataclasses.replace(FACTORED, vocab_size=250)
    abstract = jax.eval_shape(tx.init, t5.param_shapes(larger))
    cut = {
        partitioning.path_name(p): x
        for p, x in jax.tree_util.tree_leaves_with_path(convert.load_slots(theirs, abstract))
    }
    full = {partitioning.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(state)}
    name = next(n for n in full if n.endswith("v_col/token_embedder/embedding"))
    np.testing.assert_array_equal(cut[name], full[name][:250])

    # Another optimizer, or one that factors otherwise, starts afresh.
    for other in (optim.AdamW(), optim.Adafactor(min_dim_size_to_factor=256)):
        abstract = jax.eval_shape(other.build(10).init, params)
        assert convert.load_slots(theirs, abstract) is None
    without = convert.open_weights(str(export.save_t5x(tmp_path / "no", ours, FACTORED, 1003)),
                                   slots=True)  # fmt: skip
    assert convert.load_slots(without, jax.eval_shape(tx.init, params)) is None
