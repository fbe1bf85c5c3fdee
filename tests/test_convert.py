"""T5X checkpoints: read from real files, names both ways, and hostile or incomplete input."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

from distill import convert

NORMS = {
    "encoder": ("pre_attention_layer_norm", "pre_mlp_layer_norm"),
    "decoder": (
        "pre_self_attention_layer_norm",
        "pre_cross_attention_layer_norm",
        "pre_mlp_layer_norm",
    ),
}
ATTENTION = {"encoder": ("attention",), "decoder": ("self_attention", "encoder_decoder_attention")}


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


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        assert got[name].tobytes() == array.tobytes(), name


@pytest.fixture
def t5x(shared, tmp_path):
    """A writable copy of the checkpoint that T5X itself wrote."""
    source = shared / "fixtures" / "t5x_tiny" / "checkpoint_dir" / "checkpoint_1000"
    folder = pathlib.Path(shutil.copytree(source, tmp_path / "checkpoint_1000"))
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


# ---- files --------------------------------------------------------------------------------------


def test_reads_what_t5x_wrote(shared, t5x):
    flat, step = convert.read_t5x(t5x)
    config = json.loads((shared / "fixtures" / "t5x_tiny" / "config.json").read_text())
    assert step == 1000
    assert {k: list(v.shape) for k, v in flat.items()} == config["parameters"]
    assert {v.dtype for v in flat.values()} == {np.dtype(np.float32)}
    params = convert.from_t5x(flat)
    assert params["encoder"]["layers"]["attention"]["query"]["kernel"].shape == (2, 32, 32)
    assert params["decoder"]["layers"]["mlp"]["wo"]["kernel"].shape == (3, 48, 32)
    assert_same(convert.to_t5x(params), flat)


def test_specs_in_the_file_are_never_opened(t5x):
    want, _ = convert.read_t5x(t5x)
    path = t5x / "checkpoint"
    content = path.read_bytes()
    for old, new in {b"file": b"evil", b"zarr": b"zorr", b"target.": b"/../../"}.items():
        assert content.count(old) > 50
        content = content.replace(old, new)  # same lengths: still valid msgpack
    path.write_bytes(content)
    assert_same(convert.read_t5x(t5x)[0], want)


@pytest.mark.parametrize("name", ["..", "a/b", "a.b", "", "x\0", "/etc"])
def test_names_in_the_file_that_are_no_names_are_refused(t5x, name):
    spec = {"driver": "zarr", "kvstore": {}, "metadata": {"shape": [1]}}
    tree = {"target": {"encoder": {name: spec}}, "state": {"step": 1}}
    (t5x / "checkpoint").write_bytes(msgpack.packb({"version": 3, "optimizer": tree}))
    with pytest.raises(ValueError, match="not a parameter name"):
        convert.read_t5x(t5x)


def test_small_arrays_inside_the_msgpack_file(t5x):
    def pack(array, code=1):
        body = (array.shape, array.dtype.name, array.tobytes())
        return msgpack.ExtType(code, msgpack.packb(body))

    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, jnp.bfloat16)}

    def write(target, step):
        tree = {"target": target, "state": {"step": step}}
        (t5x / "checkpoint").write_bytes(msgpack.packb({"version": 3, "optimizer": tree}))

    write({"x": {k: pack(v) for k, v in values.items()}}, pack(np.int32(7), 3))
    flat, step = convert.read_t5x(t5x)
    assert_same(flat, {f"x/{k}": v for k, v in values.items()})
    assert step == 7
    write({"x": pack(np.ones(4, np.uint16))}, 7)  # how old T5X stored bfloat16
    with pytest.raises(ValueError, match="uint16"):
        convert.read_t5x(t5x)
    for bad in (
        msgpack.ExtType(1, msgpack.packb(([9], "float32", b"1234"))),
        msgpack.ExtType(1, msgpack.packb(([1], "object", b"12345678"))),
        msgpack.ExtType(1, b"\xc1"),
        msgpack.ExtType(9, b""),
    ):
        write({"x": bad}, 7)
        with pytest.raises(ValueError, match="not msgpack as T5X writes it"):
            convert.read_t5x(t5x)


def test_missing_and_damaged_files_are_errors_not_zeros(t5x):
    array = t5x / "target.encoder.layers_1.mlp.wo.kernel"
    for name in ("0.0", ".zarray"):
        (array / name).rename(t5x / "aside")
        with pytest.raises(FileNotFoundError, match="encoder/layers_1/mlp/wo/kernel"):
            convert.read_t5x(t5x)
        (t5x / "aside").rename(array / name)
    chunk = (array / "0.0").read_bytes()
    for damaged in (chunk[:-20], chunk[:200] + bytes([chunk[200] ^ 1]) + chunk[201:], b""):
        (array / "0.0").write_bytes(damaged)
        with pytest.raises(ValueError, match="encoder/layers_1/mlp/wo/kernel"):
            convert.read_t5x(t5x)
    (array / "0.0").write_bytes(chunk)
    (array / ".zarray").write_text((array / ".zarray").read_text().replace("[48,32]", "[24,32]"))
    with pytest.raises(ValueError, match="on disk"):
        convert.read_t5x(t5x)


def test_folders_that_are_no_t5x_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError):
        convert.read_t5x(tmp_path / "absent")
    with pytest.raises(ValueError, match="no file 'checkpoint'"):
        convert.read_t5x(tmp_path)
    for content in (
        b"", b"text", b"\x93\x01", b"\x81" * 5000, msgpack.packb([1]), msgpack.packb({}),
        msgpack.packb({"version": 0, "optimizer": {}}), msgpack.packb({"version": 3}),
        msgpack.packb({"version": 3, "optimizer": {"target": {}, "state": {}}}),
    ):  # fmt: skip
        (tmp_path / "checkpoint").write_bytes(content)
        with pytest.raises(ValueError, match="not a T5X checkpoint|not msgpack|no dict"):
            convert.read_t5x(tmp_path)


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_names_both_ways_are_bitwise(gated, tied):
    flat = make_flat(gated=gated, tied=tied)
    params = convert.from_t5x(flat)
    assert_same(convert.to_t5x(params), flat)
    assert_same(convert.to_t5x(jax.tree.map(jnp.asarray, params)), flat)
    decoder = params["decoder"]
    assert ("logits_dense" in decoder) is not tied
    assert set(decoder["layers"]["mlp"]) == ({"wi_0", "wi_1", "wo"} if gated else {"wi", "wo"})
    # 12 layers: sorted as text, layer 10 would come before layer 2.
    for i in range(12):
        stacked = decoder["layers"]["encoder_decoder_attention"]["out"]["kernel"][i]
        assert (
            stacked.tobytes()
            == flat[f"decoder/layers_{i}/encoder_decoder_attention/out/kernel"].tobytes()
        )


def test_every_row_of_the_table_is_used():
    flat = make_flat((1, 1)) | make_flat((1, 1), gated=False)
    assert {row.t5x.replace("{i}", "0") for row in convert.TABLE} == flat.keys()
    assert len({row.ours for row in convert.TABLE}) == len(convert.TABLE)


def test_each_missing_name_is_named():
    flat = make_flat((2, 2))
    for name in flat:
        if name == "decoder/logits_dense/kernel":
            continue  # without it the logits are tied
        with pytest.raises(ValueError, match=name):
            convert.from_t5x({k: v for k, v in flat.items() if k != name})


@pytest.mark.parametrize("index", ["01", "-1", "x", "99999999999", "2_0"])
def test_names_that_do_not_belong_are_named(index):
    for extra in (
        f"encoder/layers_{index}/mlp/wo/kernel", "optimizer/m", "decoder/layers_0/mlp/wi/kernel",
        "decoder/layers_0/self_attention/query/bias", "decoder", "",
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"unexpected: {extra}"):
            convert.from_t5x(make_flat((2, 2)) | {extra: np.zeros(1)})


def test_gaps_and_uneven_layers():
    flat = make_flat((2, 6))
    with pytest.raises(ValueError, match="decoder has no layers 2, 4 below layer 5"):
        convert.from_t5x({k: v for k, v in flat.items() if "layers_4" not in k
                          and "decoder/layers_2" not in k})  # fmt: skip
    name = "encoder/layers_1/mlp/wo/kernel"
    for other in (flat[name].astype(jnp.bfloat16), flat[name].T):
        with pytest.raises(ValueError, match="differ"):
            convert.from_t5x(flat | {name: other})
    params = convert.from_t5x(flat)
    params["encoder"]["layers"]["mlp"]["wo"]["kernel"] = np.zeros((3, 3, 4))
    with pytest.raises(ValueError, match="has 3 layers, others in encoder 2"):
        convert.to_t5x(params)
    del params["encoder"]["layers"]["mlp"]["wo"]
    params["extra"] = np.zeros(1)
    with pytest.raises(ValueError, match="encoder/layers/mlp/wo/kernel; 1 unexpected: extra"):
        convert.to_t5x(params)
