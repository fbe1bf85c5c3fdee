"""Hugging Face folders: every format read whole and in part, written, and refused if hostile."""

import contextlib
import http.server
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import threading
import tracemalloc

import flax.serialization
import ml_dtypes
import msgpack
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from distill.formats import hugging_face, msgpack_file, tensors

ROOT = pathlib.Path(__file__).resolve().parents[1]
DTYPES = [
    np.dtype(kind) for kind in
    (bool, "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", ml_dtypes.bfloat16)
]  # fmt: skip
SHAPES = [(), (1,), (7,), (0, 3), (3, 0), (5, 4), (2, 3, 4)]
T5 = {
    "shared.weight": (11, 4),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (6, 4),
    "decoder.final_layer_norm.weight": (4,),
}

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="torch is not installed"
)
needs_hub = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed"
)


def values(shape, dtype, seed=0):
    """Random bits of a dtype; in floats that makes NaNs of all kinds too."""
    rng = np.random.default_rng(seed)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    return np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)


def make_arrays(sep="."):
    arrays = {name.replace(".", sep): values(s, np.dtype("f4")) for name, s in T5.items()}
    for dtype in DTYPES:
        for i, shape in enumerate(SHAPES):
            arrays[f"{dtype.name}{sep}{i}"] = values(shape, dtype, i)
    return arrays


def nest(flat):
    tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def to_msgpack(flat):
    return flax.serialization.msgpack_serialize(nest(flat))


def make_folder(path, **files):
    """Writes config.json and files into a folder; returns it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text('{"model_type": "t5"}')
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def save(arrays, framework="pt"):
    return safetensors.numpy.save(arrays, metadata={"format": framework})


def index_of(weight_map):
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert (got[name].shape, got[name].dtype) == (array.shape, array.dtype), name
        whole = got[name].whole()
        assert isinstance(whole, np.ndarray), name
        assert (whole.shape, whole.dtype) == (array.shape, array.dtype), name
        assert whole.tobytes() == array.tobytes(), name


def assert_parts(got, want, tries=8):
    """Random parts, empty ones too, are equal to the parts of the whole."""
    rng = np.random.default_rng(1)
    for name, array in want.items():
        for _ in range(tries):
            ends = [sorted(rng.integers(0, n + 1, 2)) for n in array.shape]
            index = tuple(slice(int(a), int(b)) for a, b in ends)
            part = got[name].read(index)
            assert (part.shape, part.dtype) == (array[index].shape, array.dtype), (name, index)
            assert part.tobytes() == array[index].tobytes(), (name, index)


# ---- formats ------------------------------------------------------------------------------------


def test_safetensors(tmp_path):
    arrays = make_arrays()
    folder = make_folder(tmp_path, **{"model.safetensors": save(arrays)})
    opened = hugging_face.open_folder(folder)
    assert opened.config == {"model_type": "t5"} and not opened.flax
    assert os.fspath(opened.folder) == os.fspath(folder)
    assert hugging_face.is_hugging_face(folder)
    assert_same(opened.tensors, arrays)
    assert_parts(opened.tensors, arrays)


def test_sharded_safetensors(tmp_path):
    arrays = make_arrays()
    names = list(arrays)
    parts = {"a.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    files = {file: save({name: arrays[name] for name in part}) for file, part in parts.items()}
    weight_map = {name: file for file, part in parts.items() for name in part}
    files["model.safetensors.index.json"] = index_of(weight_map)
    folder = make_folder(tmp_path, **files)
    assert hugging_face.is_hugging_face(folder)
    assert_same(hugging_face.open_folder(folder).tensors, arrays)


def test_safetensors_of_flax_have_flax_names(tmp_path):
    make_folder(tmp_path, **{"model.safetensors": save(make_arrays("."), "flax")})
    opened = hugging_face.open_folder(tmp_path)
    assert opened.flax
    assert_same(opened.tensors, make_arrays("/"))
    both = {"a.b": np.zeros(1), "a/b": np.ones(1)}
    make_folder(tmp_path, **{"model.safetensors": save(both, "flax")})
    with pytest.raises(ValueError, match="model.safetensors: names that differ in"):
        hugging_face.open_folder(tmp_path)


@pytest.mark.parametrize("chunk", [2**30, 32, 40])
@pytest.mark.parametrize("block", [2**24, 1, 10])
def test_flax_msgpack(tmp_path, monkeypatch, chunk, block):
    """Chunks end within rows, and rows are gathered one or a few at a time."""
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", chunk)
    monkeypatch.setattr(msgpack_file, "_BLOCK", block)
    arrays = make_arrays("/")
    content = to_msgpack(arrays)
    assert (b"__msgpack_chunked_array__" in content) == (chunk < 100)
    opened = hugging_face.open_folder(make_folder(tmp_path, **{"flax_model.msgpack": content}))
    assert opened.flax
    assert_same(opened.tensors, arrays)
    assert_parts(opened.tensors, arrays)


def test_what_is_read_from_msgpack_is_a_copy_with_its_own_alignment(tmp_path):
    content = to_msgpack({"a" * n: values((5, 4), np.dtype("f8")) for n in range(1, 9)})
    make_folder(tmp_path, **{"flax_model.msgpack": content})
    for tensor in hugging_face.open_folder(tmp_path).tensors.values():
        part = tensor.whole()
        assert part.flags.aligned and part.flags.owndata and part.flags.writeable


def test_numpy_scalars_in_msgpack(tmp_path):
    content = to_msgpack({"a/step": np.float32(7.0), "b": np.zeros(2, np.int8)})
    make_folder(tmp_path, **{"flax_model.msgpack": content})
    step = hugging_face.open_folder(tmp_path).tensors["a/step"]
    assert step.shape == () and step.whole() == 7.0


def test_sharded_flax_msgpack(tmp_path):
    arrays = make_arrays("/")
    names = list(arrays)
    files, weight_map = {}, {}
    for i in range(3):
        part = {name: arrays[name] for name in names[i::3]}
        file = f"flax_model-0000{i + 1}-of-00003.msgpack"
        files[file] = to_msgpack(part)
        weight_map.update(dict.fromkeys(part, file))
    folder = make_folder(
        tmp_path, **files, **{"flax_model.msgpack.index.json": index_of(weight_map)}
    )
    assert hugging_face.is_hugging_face(folder)
    opened = hugging_face.open_folder(folder)
    assert opened.flax
    assert_same(opened.tensors, arrays)


def test_the_best_format_is_taken(tmp_path):
    def one(value):
        return {"x": np.full(1, value, np.float32)}

    def read():
        return float(hugging_face.open_folder(tmp_path).tensors["x"].whole()[0])

    make_folder(tmp_path, **{"pytorch_model.bin": b"never opened"})
    stages = [
        {"s.msgpack": to_msgpack(one(0)), "flax_model.msgpack.index.json": {"x": "s.msgpack"}},
        {"flax_model.msgpack": to_msgpack(one(1))},
        {"s.safetensors": save(one(2)), "model.safetensors.index.json": {"x": "s.safetensors"}},
        {"model.safetensors": save(one(3))},
    ]
    for value, stage in enumerate(stages):
        for name, content in stage.items():
            content = index_of(content) if isinstance(content, dict) else content
            make_folder(tmp_path, **{name: content})
        assert read() == value


def test_opening_and_reading_a_part_leaves_the_rest_in_the_file(tmp_path, monkeypatch):
    """Files of 80 MB; what Python allocates is traced, pages of a mapped file are not."""
    rows = np.zeros((10_000, 1000), np.float32)
    arrays = {"a": rows[:100], "b": rows, "c": rows}
    make_folder(tmp_path / "s", **{"model.safetensors": save(arrays)})
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 15_000_001)
    monkeypatch.setattr(msgpack_file, "_BLOCK", 200_000)
    make_folder(tmp_path / "m", **{"flax_model.msgpack": to_msgpack(arrays)})
    for folder in ("s", "m"):
        tracemalloc.start()
        try:
            opened = hugging_face.open_folder(tmp_path / folder)
            part = opened.tensors["b"].read((slice(4_000, 9_000), slice(3, 13)))
            opened.tensors["a"].whole()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert part.shape == (5_000, 10)
        assert peak < 4_000_000, folder


def test_a_part_that_is_not_there_is_an_error_with_file_and_name(tmp_path):
    make_folder(tmp_path, **{"model.safetensors": save({"a": np.zeros((3, 2))})})
    with pytest.raises(ValueError, match="model.safetensors: a cannot be read"):
        hugging_face.open_folder(tmp_path).tensors["a"].read((slice(0, 4), slice(0, 2)))


# ---- writing ------------------------------------------------------------------------------------


def test_write_and_read_back(tmp_path):
    arrays = make_arrays()
    arrays["transposed"] = values((6, 4), np.dtype("f4")).T
    arrays["strided"] = values((6, 8), np.dtype(ml_dtypes.bfloat16))[::2, ::-2]
    written = hugging_face.write_safetensors(
        make_folder(tmp_path), {name: tensors.of(array) for name, array in arrays.items()}
    )
    assert written == ["model.safetensors"]
    assert_same(hugging_face.open_folder(tmp_path).tensors, arrays)
    with safetensors.safe_open(tmp_path / written[0], framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_write_shards(tmp_path):
    arrays = {f"w{i}": values((n, 4), np.dtype("f4"), i).T for i, n in enumerate([9, 3, 2, 1, 1])}
    written = hugging_face.write_safetensors(
        make_folder(tmp_path / "new"),
        {name: tensors.of(array) for name, array in arrays.items()},
        max_shard_bytes=80,  # 144 alone, 48 + 32, 16 + 16
    )
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert written == [*shards, "model.safetensors.index.json"]
    assert index["metadata"]["total_size"] == 16 * 16
    expected = dict(
        zip(arrays, [shards[0], shards[1], shards[1], shards[2], shards[2]], strict=True)
    )
    assert index["weight_map"] == expected
    assert_same(hugging_face.open_folder(tmp_path / "new").tensors, arrays)


def test_write_holds_one_shard_at_a_time(tmp_path):
    tensor = tensors.Tensor((1000, 1000), np.dtype("f4"), lambda index: np.ones((1000, 1000), "f4"))
    tracemalloc.start()
    try:
        hugging_face.write_safetensors(
            tmp_path, {f"w{i}": tensor for i in range(8)}, max_shard_bytes=8_000_000
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000  # a shard, and one tensor to compare


def test_write_refuses(tmp_path):
    good = {"a": tensors.of(np.zeros(3))}
    for name in ("", "../a", "a\n", "x" * 201):
        with pytest.raises(ValueError, match="not a tensor's name"):
            hugging_face.write_safetensors(tmp_path, {name: good["a"]})
    with pytest.raises(ValueError, match="a is complex64"):
        hugging_face.write_safetensors(tmp_path, {"a": tensors.of(np.zeros(3, "c8"))})
    with pytest.raises(ValueError, match="local folder"):
        hugging_face.write_safetensors("gs://bucket/x", good)
    assert not list(tmp_path.iterdir())
    for there in ("model.safetensors", "model.safetensors.index.json", "flax_model.msgpack"):
        make_folder(tmp_path / there, **{there: b""})
        with pytest.raises(FileExistsError, match=there):
            hugging_face.write_safetensors(tmp_path / there, good)


def test_what_reads_back_different_is_an_error(tmp_path, monkeypatch):
    save_file = safetensors.numpy.save_file
    monkeypatch.setattr(
        safetensors.numpy, "save_file",
        lambda arrays, *args, **kwargs: save_file(
            {name: array + 1 for name, array in arrays.items()}, *args, **kwargs
        ),
    )  # fmt: skip
    with pytest.raises(OSError, match="w reads back different"):
        hugging_face.write_safetensors(tmp_path, {"w": tensors.of(np.zeros(3))})


# ---- hostile and damaged folders ----------------------------------------------------------------


def test_folders_that_are_none(tmp_path):
    assert not hugging_face.is_hugging_face(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        hugging_face.open_folder(tmp_path / "absent")
    with pytest.raises(ValueError, match="local folder"):
        hugging_face.open_folder("gs://bucket/flan-t5-base")
    with pytest.raises(ValueError, match="config.json is missing"):
        hugging_face.open_folder(tmp_path)
    make_folder(tmp_path)
    assert hugging_face.is_hugging_face(tmp_path)
    with pytest.raises(ValueError, match="no weights: none of model.safetensors, "):
        hugging_face.open_folder(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not JSON"), (b"{", "not JSON"), (b"\xff", "not JSON"), (b"[" * 90_000, "not JSON"),
        (b"[]", "no dict"), (b"3", "no dict"), (b" " * 1_000_001, "more than 1,000,000 bytes"),
    ],
)  # fmt: skip
def test_config_that_is_none(tmp_path, content, message):
    make_folder(tmp_path, **{"model.safetensors": save({"a": np.zeros(1)})})
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        hugging_face.open_folder(tmp_path)


KINDS = {"model.safetensors": (save, "."), "flax_model.msgpack": (to_msgpack, "/")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "file", ["../x", "/etc/passwd", "a/b", "a\\b", "..", "", ".hidden", "x\0", "c", 3, None, ["a"]]
)
def test_files_in_an_index_that_are_no_plain_names_are_not_opened(tmp_path, kind, file):
    pack, _ = KINDS[kind]
    content = pack({"a": np.zeros(1)})
    ending = "." + kind.split(".")[1]
    if isinstance(file, str) and "x" in file:
        file += ending
    make_folder(tmp_path / "folder", **{f"{kind}.index.json": index_of({"a": file})})
    for there in (tmp_path / f"x{ending}", tmp_path / "folder" / "c"):
        there.write_bytes(content)
    with pytest.raises(ValueError, match=f"{kind}.index.json: 'a' is said to be in .*plain file"):
        hugging_face.open_folder(tmp_path / "folder")


@pytest.mark.parametrize("kind", KINDS)
def test_indices_and_shards_that_disagree(tmp_path, kind):
    pack, _ = KINDS[kind]
    stem, ending = kind.split(".")
    one, two = f"{stem}-1.{ending}", f"{stem}-2.{ending}"

    def check(weight_map, message):
        make_folder(tmp_path, **{f"{kind}.index.json": index_of(weight_map)})
        with pytest.raises(ValueError, match=message):
            hugging_face.open_folder(tmp_path)

    make_folder(tmp_path, **{one: pack({"a": np.zeros(1), "b": np.zeros(1)})})
    check({"a": one, "b": one, "c": two}, f"names {two}, which is missing")
    make_folder(tmp_path, **{two: pack({"c": np.zeros(1)})})
    check({"a": one, "b": one, "c": two, "d": two}, f"{two} .*disagree: missing d; unexpected none")
    check({"a": one, "c": two}, f"{one} .*disagree: missing none; unexpected b")
    check({"a": one, "b": two, "c": two}, "disagree")
    for weight_map in ({}, [], "a", None, 3):
        check(weight_map, "no weight_map")
    (tmp_path / two).unlink()
    (tmp_path / two).symlink_to(tmp_path / "elsewhere")
    check({"a": one, "b": one, "c": two}, "missing")
    (tmp_path / "elsewhere").write_bytes(pack({"c": np.zeros(1)}))  # as in the hub's cache
    make_folder(tmp_path, **{f"{kind}.index.json": index_of({"a": one, "b": one, "c": two})})
    assert set(hugging_face.open_folder(tmp_path).tensors) == {"a", "b", "c"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["", "..", "../x", "a..b", "a\nb", "\x1b[2J", "a\0", "x" * 201])
def test_hostile_names_of_tensors(tmp_path, kind, name):
    pack, _ = KINDS[kind]
    if kind.endswith(".msgpack"):
        body = msgpack.packb(((1,), "float32", b"1234"))
        content = msgpack.packb({"t5": {name: msgpack.ExtType(1, body)}})
    else:
        content = pack({name: np.zeros(1)})
    make_folder(tmp_path, **{kind: content})
    with pytest.raises(ValueError, match=f"{kind}.*(not a tensor's name|a key in 't5')"):
        hugging_face.open_folder(tmp_path)


def header(entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0" * 8, b"\xff" * 16, (2**62).to_bytes(8, "little") + b"{}", header([]) + b"12",
        header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + bytes(4),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}) + bytes(8),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}) + bytes(5),
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}) + bytes(4),
        header({"a": {"dtype": "O", "shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
        header({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}) + bytes(4),
        header({"a": {"dtype": "F32", "shape": [0, 2**60], "data_offsets": [0, 0]}}),
        header({"a": {"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]}}) + bytes(4),
    ],
)  # fmt: skip
def test_damaged_safetensors(tmp_path, content):
    make_folder(tmp_path, **{"model.safetensors": content})
    with pytest.raises(ValueError, match="model.safetensors"):
        hugging_face.open_folder(tmp_path)


def array(shape=(2,), dtype="float32", content=bytes(8), code=1):
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, content)))


def chunked(shape, chunks, **others):
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": chunks, **others}


def nested(depth):
    tree = {"x": array()}
    for _ in range(depth):
        tree = {"d": tree}
    return tree


TWO = {"0": array(), "1": array()}


@pytest.mark.parametrize(
    "leaf",
    [
        3, -1, True, None, 1.5, "text", b"bytes", [array()], [],
        array(code=2), array(code=9), array(code=3), msgpack.ExtType(1, b""),
        msgpack.ExtType(1, b"\x93"), msgpack.ExtType(1, b"\xc1"), msgpack.Timestamp(1, 2),
        msgpack.ExtType(1, msgpack.packb(((2,), "float32", bytes(8))) + b"\0"),
        msgpack.ExtType(1, msgpack.packb(((2,), "float32", bytes(8), 1))),
        msgpack.ExtType(1, msgpack.packb(((2,), "float32"))),
        msgpack.ExtType(1, msgpack.packb(("2", "float32", bytes(8)))),
        msgpack.ExtType(1, msgpack.packb(((2,), b"float32", bytes(8)))),
        msgpack.ExtType(1, msgpack.packb(((2,), "float32", "12345678"))),
        array((3,)), array((1,)), array((2, 2)), array((-2,)), array((2.0,)), array((True, 2)),
        array((1,) * 40, "float64"), array((0, 2**60), content=b""), array(dtype="float33"),
        array(dtype="object"), array((1,), dtype="O"), array((1,), dtype="V8"),
        array(dtype="f4,f4"),
        array((1,), dtype="datetime64"), array(dtype="x" * 1000), array(dtype=">f4"),
        {3: array()}, {b"x": array()}, {None: array()}, {"a/b": array()}, {"": array()},
        {"k" * 300: array()}, nested(101),
        chunked({"0": 5}, TWO), chunked({"0": 2**62, "1": 4}, TWO), chunked({}, TWO),
        chunked({"0": 0}, {}), chunked({"1": 4}, TWO), chunked({"0": True, "1": 4}, TWO),
        chunked([4], TWO), chunked({"0": 4}, [array(), array()]), chunked({"0": 4}, {"0": array()}),
        chunked({"0": 4}, {"0": array(), "2": array()}), chunked({"0": 4}, TWO, more=array()),
        chunked({"0": 4}, {"0": array(), "1": array(dtype="int32")}),
        chunked({"0": 4}, {"0": array(), "1": array((2, 1))}), chunked({"0": 4}, {**TWO, "2": {}}),
        {**chunked({"0": 4}, TWO), "__msgpack_chunked_array__": False},
        {"__msgpack_chunked_array__": True},
    ],
    ids=lambda leaf: str(leaf)[:40],
)  # fmt: skip
def test_msgpack_with_anything_else_in_it(tmp_path, leaf):
    make_folder(tmp_path, **{"flax_model.msgpack": msgpack.packb({"good": array(), "bad": leaf})})
    with pytest.raises(ValueError, match="flax_model.msgpack.*bad"):
        hugging_face.open_folder(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"text", msgpack.packb([1]), msgpack.packb(array()), msgpack.packb(3),
        msgpack.packb({"a": array()}) + b"\xc0", b"\x82" + 2 * msgpack.packb({"a": array()})[1:],
        b"\xdf\xff\xff\xff\xff", b"\x81\xdb\xff\xff\xff\xff", b"\x81\xa1\xff\x80",
        b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", b"\x81\xa1a" * 5000,
    ],
    ids=lambda content: repr(content[:12]),
)  # fmt: skip
def test_files_that_are_no_flax_msgpack(tmp_path, content):
    make_folder(tmp_path, **{"flax_model.msgpack": content})
    with pytest.raises(ValueError, match="flax_model.msgpack is not a Flax msgpack file"):
        hugging_face.open_folder(tmp_path)


def test_chunked_forms_that_are_good(tmp_path):
    """So that the bad ones above are refused for what is bad in them; also nested deep."""
    marker_last = dict(reversed(chunked({"0": 2, "1": 2}, TWO).items()))
    tree = {"good": chunked({"0": 4}, TWO), "last": marker_last, "d": nested(97)}
    make_folder(tmp_path, **{"flax_model.msgpack": msgpack.packb(tree)})
    opened = hugging_face.open_folder(tmp_path).tensors
    assert [opened["good"].shape, opened["last"].shape, len(opened)] == [(4,), (2, 2), 3]


def small(kind):
    """The bytes of a file with a few arrays, one of which is chunked in msgpack."""
    pack, sep = KINDS[kind]
    arrays = {name.replace(".", sep): values(s, np.dtype("f4")) for name, s in T5.items()}
    return pack(arrays | {"z": np.ones(60), "s": values((3,), np.dtype(ml_dtypes.bfloat16))})


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_anywhere_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 200)
    content = small(kind)
    make_folder(tmp_path)
    rng = np.random.default_rng(0)
    cuts = {
        *range(40),
        *rng.integers(0, len(content), 200),
        *range(len(content) - 40, len(content)),
    }
    for damaged in [*(content[:cut] for cut in cuts), content + b"\0"]:
        (tmp_path / kind).write_bytes(damaged)
        with pytest.raises(ValueError, match=kind):
            hugging_face.open_folder(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits_are_refused_or_read_but_nothing_else(tmp_path, monkeypatch, kind):
    """Neither format has a checksum, so what is still well formed opens; it must not crash."""
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 200)
    content = small(kind)
    make_folder(tmp_path)
    rng = np.random.default_rng(0)
    refused = 0
    for at in {*range(100), *rng.integers(0, len(content), 300)}:
        flipped = bytearray(content)
        flipped[at] ^= 1 << int(rng.integers(8))
        (tmp_path / kind).write_bytes(flipped)
        try:
            opened = hugging_face.open_folder(tmp_path)
        except ValueError as error:
            assert kind in str(error)
            refused += 1
            continue
        for tensor in opened.tensors.values():
            assert tensor.whole().nbytes == tensor.nbytes
    assert 20 < refused < 350


# ---- .bin ---------------------------------------------------------------------------------------


def run_python(*args, **env):
    done = subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# Run by a process of its own: torch and TensorFlow crash each other in one.
WRITE_BINS = """
    import os, pathlib, pickle, runpy, sys
    import torch

    folder, script = pathlib.Path(sys.argv[1]), sys.argv[2]
    owned = str(folder / "owned")

    class Evil:
        def __reduce__(self):
            return open, (owned, "w")

    x = torch.arange(24.0).reshape(4, 6)
    parts = {
        "pytorch_model-1.bin": {
            "shared.weight": x, "encoder.embed_tokens.weight": x, "part": x[1:3],
            "transposed": x.T, "scalar": torch.tensor(3), "empty": torch.zeros(0, 3),
        },
        "pytorch_model-2.bin": {"half": x.bfloat16(), "p": torch.nn.Parameter(x.half())},
    }
    for name, part in parts.items():
        torch.save(part, folder / name)
    torch.save({"old": x}, folder / "pytorch_model-3.bin", _use_new_zipfile_serialization=False)

    bad = folder / "bad"
    bad.mkdir()
    torch.save({"a": x, "b": Evil()}, bad / "pytorch_model.bin")
    torch.save({"a": Evil()}, bad / "old.bin", _use_new_zipfile_serialization=False)
    for protocol in (0, 2, 4):
        (bad / f"raw{protocol}.bin").write_bytes(pickle.dumps({"a": Evil()}, protocol))
    torch.save([x], bad / "list.bin")
    torch.save({"a": 3}, bad / "number.bin")
    torch.save({3: x}, bad / "key.bin")
    torch.save({"a": x.to_sparse()}, bad / "sparse.bin")
    (bad / "empty.bin").touch()
    good = (folder / "pytorch_model-1.bin").read_bytes()
    for cut in range(1, len(good), len(good) // 8):
        (bad / f"cut{cut}.bin").write_bytes(good[:cut])

    main = runpy.run_path(script)["main"]
    for path in sorted(bad.iterdir()):
        try:
            main(str(folder), str(path))
        except SystemExit as error:
            assert str(path) in str(error.code) and "weights_only" not in str(error.code), error
            print(path.name)
        else:
            sys.exit(f"{path} was opened")
    main.__globals__["OLDEST_TORCH"] = (99, 0)
    try:
        main(str(folder), str(folder / "pytorch_model-1.bin"))
    except SystemExit as error:
        assert "too old" in str(error.code)
    else:
        sys.exit("an old torch was used")
    assert not os.path.exists(owned)
    pickle.loads((bad / "raw2.bin").read_bytes())  # it would have done something
    assert os.path.exists(owned)
    os.remove(owned)
"""


@pytest.fixture(scope="module")
def bins(tmp_path_factory):
    folder = make_folder(tmp_path_factory.mktemp("bins"))
    (folder / "write.py").write_text(textwrap.dedent(WRITE_BINS))
    script = ROOT / "distill" / "formats" / "torch_bin.py"
    refused = run_python(folder / "write.py", folder, script).split()
    assert len(refused) >= 17
    return folder


@needs_torch
def test_bin_is_read_in_another_process(bins, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    want = {
        "pytorch_model-1.bin": {
            "shared.weight": x, "encoder.embed_tokens.weight": x, "part": x[1:3],
            "transposed": x.T, "scalar": np.array(3), "empty": np.zeros((0, 3), np.float32),
        },
        "pytorch_model-2.bin": {"half": x.astype(ml_dtypes.bfloat16), "p": x.astype(np.float16)},
        "pytorch_model-3.bin": {"old": x},
    }  # fmt: skip
    weight_map = {name: file for file, part in want.items() for name in part}
    make_folder(bins, **{"pytorch_model.bin.index.json": index_of(weight_map)})
    assert hugging_face.is_hugging_face(bins)
    loaded = set(sys.modules)
    opened = hugging_face.open_folder(bins, read_bin=True)
    assert not {"torch", "transformers"} & (set(sys.modules) - loaded)
    assert not opened.flax
    assert not list(temporary.iterdir())  # already gone, and the tensors still are there
    merged = {name: array for part in want.values() for name, array in part.items()}
    assert_same(opened.tensors, merged)
    assert_parts(opened.tensors, merged)


@needs_torch
def test_hostile_bin_is_refused_and_not_run(bins):
    """Other ways to be hostile are tried in the fixture, in one process with one torch."""
    make_folder(bins / "bad")
    with pytest.raises(ValueError, match="bad/pytorch_model.bin .*Unsupported global.*open"):
        hugging_face.open_folder(bins / "bad", read_bin=True)
    assert not (bins / "owned").exists()


def test_bin_is_not_opened_unasked(tmp_path, monkeypatch):
    for name, content in (
        ("pytorch_model.bin.index.json", index_of({"a": "x.bin"})), ("pytorch_model.bin", b"x"),
    ):  # fmt: skip
        make_folder(tmp_path, **{name: content})
        message = f"{name} but none of model.safetensors, .*--read_bin.*convert_checkpoint.py.*copy"
        with pytest.raises(ValueError, match=message):
            hugging_face.open_folder(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pytorch_model.bin needs torch"):
        hugging_face.open_folder(tmp_path, read_bin=True)


# ---- the hub ------------------------------------------------------------------------------------


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "base").mkdir(parents=True)
    for text in ("google/flan-t5-base", "google/t5-v1_1-xxl", "org/name@refs/pr/3", "a/b@v1.0"):
        assert hugging_face.is_hub_id(text), text
    for text in (
        "t5-small", "runs/base", "/a/b", "./a", "../a", "a/..", "a/../b", "a/b/c", "gs://a/b", "a/",
        "gs://a", "é/a", "a/b@", "a/b@../c", "a/b@/c", "~/a", "a b/c", "a/b\n", "", "a\\b/c",
        "-a/b",
    ):  # fmt: skip
        assert not hugging_face.is_hub_id(text), text


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"pip install 'distill-step-by-step\[hub\]'"):
        hugging_face.download("google/flan-t5-base")


SHA = {"main": "a" * 40, "refs/pr/3": "b" * 40}


@contextlib.contextmanager
def hub(repos):
    """Serves {(repo, revision): {file: content}} as the hub does; yields (url, paths asked for)."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, status, content=b"", **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_GET(self):
            path = self.path.split("?")[0].replace("%2F", "/").strip("/")
            asked.append(path)
            listing = path.startswith("api/models/")
            org, name, *rest = path.removeprefix("api/models/").split("/")
            repo = f"{org}/{name}"
            if repo == "org/gated":
                return self.answer(403, X_Error_Code="GatedRepo")
            if not any(repo == known for known, _ in repos):
                return self.answer(404, X_Error_Code="RepoNotFound")
            rest = "/".join(rest)
            for (known, revision), files in repos.items():
                sha = SHA[revision]
                if known != repo:
                    continue
                if listing and rest in (f"revision/{revision}", f"revision/{sha}"):
                    info = {"id": repo, "sha": sha, "siblings": [{"rfilename": f} for f in files]}
                    return self.answer(200, json.dumps(info).encode())
                if listing and rest == f"tree/{sha}":
                    tree = [
                        {"type": "file", "path": f, "size": len(c), "oid": f"{sha[:8]}{i}"}
                        for i, (f, c) in enumerate(files.items())
                    ]
                    return self.answer(200, json.dumps(tree).encode())
                for i, (file, content) in enumerate(files.items()):
                    if not listing and rest == f"resolve/{sha}/{file}":
                        etag = f'"{sha[:8]}{i}"'
                        return self.answer(200, content, ETag=etag, X_Repo_Commit=sha)
            kind = "RevisionNotFound" if listing else "EntryNotFound"
            return self.answer(404, X_Error_Code=kind)

        do_HEAD = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


DOWNLOAD = """
    import json, sys
    from distill.formats import hugging_face
    for text in sys.argv[1:]:
        hub_id, _, flag = text.partition(" ")
        try:
            folder = hugging_face.download(hub_id, read_bin=bool(flag))
            answer = sorted(path.name for path in folder.iterdir())
            if not flag:
                opened = hugging_face.open_folder(folder)
                answer = [answer, opened.flax, float(opened.tensors["x"].whole()[0])]
        except ValueError as error:
            answer = str(error)
        print(json.dumps(answer))
    assert not {"torch", "tensorflow", "transformers"} & set(sys.modules)
"""


def download(url, home, *hub_ids, **env):
    """Downloads in a process of its own, which alone sees the environment of this hub."""
    answers = run_python(
        "-c", textwrap.dedent(DOWNLOAD), *hub_ids, HF_ENDPOINT=url, HF_HOME=str(home),
        HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1", NO_PROXY="127.0.0.1",
        no_proxy="127.0.0.1", HF_TOKEN="", **env,
    )  # fmt: skip
    return [json.loads(line) for line in answers.splitlines()]


@needs_hub
def test_download(tmp_path):
    def model(value):
        return save({"x": np.full(1, value)})

    common = {
        "config.json": b"{}", "spiece.model": b"pieces", "pytorch_model.bin": b"pickle",
        "README.md": b"text", "tf_model.h5": b"h5", "more/config.json": b"{}",
        "more/model.safetensors": b"not this", "adapter.safetensors": b"not this",
    }  # fmt: skip
    flax_weights = {"flax_model.msgpack": to_msgpack({"x": np.full(1, 2.0)})}
    shards = {
        "model.safetensors.index.json": index_of({"x": "model-1.safetensors"}),
        "model-1.safetensors": model(3.0), "model-2.safetensors": b"not in the index",
    }  # fmt: skip
    evil = {"model.safetensors.index.json": index_of({"x": "../../x.safetensors"})}
    repos = {
        ("org/both", "main"): common | flax_weights | {"model.safetensors": model(1.0)},
        ("org/both", "refs/pr/3"): common | {"model.safetensors": model(4.0)},
        ("org/flax", "main"): common | flax_weights,
        ("org/shards", "main"): common | flax_weights | shards,
        ("org/bin", "main"): common,
        ("org/evil", "main"): common | evil,
    }
    ids = [
        "org/both", "org/both@refs/pr/3", "org/flax", "org/shards", "org/bin", "org/evil",
        "org/absent", "org/both@v9", "org/gated",
    ]  # fmt: skip
    small = ["config.json", "spiece.model"]
    with hub(repos) as (url, asked):
        answers = dict(zip(ids, download(url, tmp_path, *ids), strict=True))
        wanted = {path.rpartition("resolve/")[2][41:] for path in asked if "/resolve/" in path}
        with_bin = download(url, tmp_path, "org/bin flag", "org/both flag")
    assert answers["org/both"] == [[*small[:1], "model.safetensors", *small[1:]], False, 1.0]
    assert answers["org/both@refs/pr/3"][2] == 4.0
    assert answers["org/flax"] == [[*small[:1], "flax_model.msgpack", *small[1:]], True, 2.0]
    files = ["config.json", "model-1.safetensors", "model.safetensors.index.json", "spiece.model"]
    assert answers["org/shards"] == [files, False, 3.0]
    assert wanted == {
        *small, "model.safetensors", "flax_model.msgpack", "model.safetensors.index.json",
        "model-1.safetensors",
    }  # fmt: skip
    assert with_bin[0] == [*small[:1], "pytorch_model.bin", *small[1:]]
    assert "pytorch_model.bin" not in with_bin[1]
    for hub_id, reason in {
        "org/bin": "none of model.safetensors, .*is not opened unasked: give --read_bin",
        "org/evil": "'../../x.safetensors', which is not a plain file name",
        "org/absent": "no such model, here or on the hub",
        "org/both@v9": "no revision 'v9'",
        "org/gated": "conditions accepted on its page, and HF_TOKEN set",
    }.items():
        with pytest.raises(ValueError, match=f"{hub_id} cannot .*{reason}.*give their folder"):
            raise ValueError(answers[hub_id])
    # The server is gone.
    again, absent = download(url, tmp_path, "org/both", "org/other")
    assert again == answers["org/both"]
    assert "org/other cannot be had" in absent and "give their folder" in absent
