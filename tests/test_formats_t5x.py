"""T5X's folders: read from real files, both layouts, and hostile or incomplete input."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import msgpack
import numpy as np
import orbax.checkpoint as ocp
import pytest

from distill.formats import t5x, tensors


def whole(found):
    return {name: tensor.whole() for name, tensor in found.items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        assert got[name].tobytes() == array.tobytes(), name


@pytest.fixture
def folder(shared, tmp_path):
    """A writable copy of the checkpoint that T5X itself wrote."""
    source = shared / "fixtures" / "t5x_tiny" / "checkpoint_dir" / "checkpoint_1000"
    folder = pathlib.Path(shutil.copytree(source, tmp_path / "checkpoint_1000"))
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def test_reads_what_t5x_wrote(shared, folder):
    found = t5x.open_checkpoint(folder)
    config = json.loads((shared / "fixtures" / "t5x_tiny" / "config.json").read_text())
    assert found.step == 1000 and not found.slots
    assert {k: list(v.shape) for k, v in found.target.items()} == config["parameters"]
    assert {v.dtype for v in found.target.values()} == {np.dtype(np.float32)}
    for name, tensor in found.target.items():
        array = tensor.whole()
        assert array.shape == tensor.shape and array.dtype == tensor.dtype, name
    wo = found.target["encoder/layers_1/mlp/wo/kernel"]
    np.testing.assert_array_equal(wo.read((slice(3, 9), slice(1, 5))), wo.whole()[3:9, 1:5])


def test_the_optimizers_arrays_are_opened_when_asked_for(folder):
    slots = t5x.open_checkpoint(folder, slots=True).slots
    names = {name.rpartition("/")[0] for name in slots}
    assert names == t5x.open_checkpoint(folder).target.keys()
    assert {name.rpartition("/")[2] for name in slots} == {"v", "v_row", "v_col", "m"}
    assert slots["encoder/layers_0/mlp/wo/kernel/v"].whole().shape == (48, 32)
    assert slots["encoder/layers_0/mlp/wo/kernel/v_row"].shape == (1,)


def test_specs_in_the_file_are_never_opened(folder):
    want = whole(t5x.open_checkpoint(folder).target)
    path = folder / "checkpoint"
    content = path.read_bytes()
    for old, new in {b"file": b"evil", b"zarr": b"zorr", b"target.": b"/../../"}.items():
        assert content.count(old) > 50
        content = content.replace(old, new)  # same lengths: still valid msgpack
    path.write_bytes(content)
    assert_same(whole(t5x.open_checkpoint(folder).target), want)


@pytest.mark.parametrize("name", ["..", "a/b", "a.b", "", "x\0", "/etc"])
def test_names_in_the_file_that_are_no_names_are_refused(folder, name):
    spec = {"driver": "zarr", "kvstore": {}, "metadata": {"shape": [1]}}
    tree = {"target": {"encoder": {name: spec}}, "state": {"step": 1}}
    (folder / "checkpoint").write_bytes(msgpack.packb({"version": 3, "optimizer": tree}))
    with pytest.raises(ValueError, match="not a parameter name"):
        t5x.open_checkpoint(folder)


def test_small_arrays_inside_the_msgpack_file(folder):
    def pack(array, code=1):
        body = (array.shape, array.dtype.name, array.tobytes())
        return msgpack.ExtType(code, msgpack.packb(body))

    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, jnp.bfloat16)}

    def write(target, step):
        tree = {"target": target, "state": {"step": step}}
        (folder / "checkpoint").write_bytes(msgpack.packb({"version": 3, "optimizer": tree}))

    write({"x": {k: pack(v) for k, v in values.items()}}, pack(np.int32(7), 3))
    found = t5x.open_checkpoint(folder)
    assert_same(whole(found.target), {f"x/{k}": v for k, v in values.items()})
    assert found.step == 7
    for bad in (
        msgpack.ExtType(1, msgpack.packb(([9], "float32", b"1234"))),
        msgpack.ExtType(1, msgpack.packb(([1], "object", b"12345678"))),
        msgpack.ExtType(1, b"\xc1"),
        msgpack.ExtType(9, b""),
    ):
        write({"x": bad}, 7)
        with pytest.raises(ValueError, match="not msgpack as T5X writes it"):
            t5x.open_checkpoint(folder)


def test_missing_and_damaged_files_are_errors_not_zeros(folder):
    array = folder / "target.encoder.layers_1.mlp.wo.kernel"
    for name in ("0.0", ".zarray"):
        (array / name).rename(folder / "aside")
        with pytest.raises(FileNotFoundError, match="encoder/layers_1/mlp/wo/kernel"):
            whole(t5x.open_checkpoint(folder).target)
        (folder / "aside").rename(array / name)
    chunk = (array / "0.0").read_bytes()
    for damaged in (chunk[:-20], chunk[:200] + bytes([chunk[200] ^ 1]) + chunk[201:], b""):
        (array / "0.0").write_bytes(damaged)
        with pytest.raises(ValueError, match="encoder/layers_1/mlp/wo/kernel"):
            whole(t5x.open_checkpoint(folder).target)
    (array / "0.0").write_bytes(chunk)
    (array / ".zarray").write_text((array / ".zarray").read_text().replace("[48,32]", "[24,32]"))
    with pytest.raises(ValueError, match="encoder/layers_1/mlp/wo/kernel is .* on disk"):
        t5x.open_checkpoint(folder)


def test_folders_that_are_no_t5x_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError):
        t5x.open_checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match="no file 'checkpoint'"):
        t5x.open_checkpoint(tmp_path)
    for content in (
        b"", b"text", b"\x93\x01", b"\x81" * 5000, msgpack.packb([1]), msgpack.packb({}),
        msgpack.packb({"version": 0, "optimizer": {}}), msgpack.packb({"version": 3}),
        msgpack.packb({"version": 3, "optimizer": {"target": {}, "state": {}}}),
    ):  # fmt: skip
        (tmp_path / "checkpoint").write_bytes(content)
        with pytest.raises(ValueError, match="not a T5X checkpoint|not msgpack|no dict"):
            t5x.open_checkpoint(tmp_path)


# ---- Orbax's layout -----------------------------------------------------------------------------

STATE = {
    "target": {
        "encoder": {"layers_0": {"mlp": {"wo": {"kernel": np.arange(12.0).reshape(4, 3)}}}},
        "token_embedder": {"embedding": np.ones((5, 2), jnp.bfloat16)},
    },
    "state": {
        "step": np.int32(7),
        "param_states": {"token_embedder": {"embedding": {"v": np.arange(3, dtype=np.float32)}}},
    },
    "flax_mutables": {},
}


@pytest.mark.parametrize("ocdbt", [True, False])
def test_orbaxs_layout(tmp_path, ocdbt):
    with ocp.CheckpointManager(
        tmp_path, options=ocp.CheckpointManagerOptions(step_prefix="checkpoint"),
        item_handlers={"state": ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)},
    ) as manager:  # fmt: skip
        manager.save(7, args=ocp.args.Composite(state=ocp.args.PyTreeSave(STATE)))
    folder = tmp_path / "checkpoint_7"
    assert t5x.is_t5x(folder) and not t5x.is_t5x(tmp_path)
    found = t5x.open_checkpoint(folder, slots=True)
    assert found.step == 7
    assert_same(whole(found.target), t5x.flatten(STATE["target"]))
    assert_same(whole(found.slots), t5x.flatten(STATE["state"]["param_states"]))

    for file in sorted((folder / "state").rglob("*")):  # none of the files may be missed
        if file.is_file() and ("/d/" in str(file) or file.parent.name.startswith("target.")):
            content = file.read_bytes()
            file.unlink()
            with pytest.raises((ValueError, FileNotFoundError), match=r"checkpoint_7.*cannot be"):
                whole(t5x.open_checkpoint(folder).target)
            file.write_bytes(content)
            break
    else:
        pytest.fail("no file of an array was found")
    tree = folder / "state" / "_METADATA"
    content = tree.read_text()
    for bad in ("", "[]", "{}", '{"tree_metadata": 3}', content[:-9],
                content.replace('"key": "encoder"', '"key": 3')):  # fmt: skip
        tree.write_text(bad)
        with pytest.raises(ValueError, match="_METADATA"):
            t5x.open_checkpoint(folder)
    tree.write_text(content.replace('"key": "wo"', '"key": "../../wo"'))
    with pytest.raises(ValueError, match="not a parameter name|cannot be read"):
        t5x.open_checkpoint(folder)


# ---- writing ------------------------------------------------------------------------------------


def test_what_is_written_is_read_as_it_was(tmp_path):
    rng = np.random.default_rng(0)
    target = {
        "encoder/a/kernel": rng.normal(size=(5, 7)).astype(np.float32),
        "encoder/zeros/kernel": np.zeros((3, 2), np.float32),  # zarr leaves zeros out by default
        "decoder/b/scale": rng.normal(size=4).astype(jnp.bfloat16),
        "decoder/transposed/kernel": rng.normal(size=(6, 3)).astype(np.float32).T,
    }
    slots = {"encoder/a/kernel/v_row": np.ones(5, np.float32),
             "encoder/a/kernel/m": np.zeros(1, np.float32)}  # fmt: skip
    t5x.write_checkpoint(
        tmp_path / "x",
        {name: tensors.of(array) for name, array in target.items()},
        {name: tensors.of(array) for name, array in slots.items()},
        12,
    )
    found = t5x.open_checkpoint(tmp_path / "x", slots=True)
    assert found.step == 12
    assert_same(whole(found.target), target)
    assert_same(whole(found.slots), slots)


def test_large_arrays_are_written_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(t5x, "_CHUNK", 64)
    array = np.arange(70, dtype=np.float32).reshape(10, 7)
    t5x.write_checkpoint(tmp_path, {"a": tensors.of(array)}, {}, 0)
    assert len(list((tmp_path / "target.a").glob("*.0"))) == 5  # two rows of 28 bytes each
    assert_same(whole(t5x.open_checkpoint(tmp_path).target), {"a": array})
