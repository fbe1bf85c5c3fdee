"""Weights in and out: T5X checkpoints <-> our parameter tree, by one table of names.

A T5X checkpoint is a folder with a msgpack file `checkpoint` (the tree of the train state, in which
each partitioned array is replaced by a tensorstore spec and small ones are stored in place) and one
zarr folder per partitioned array: `target.encoder.layers_0.mlp.wo.kernel`. The specs in the file
name a driver and a path; they are never opened. The spec is built here, from the array's own name.

Our tree has T5X's names, with the layers of each stack on axis 0 of one array:
`encoder/layers_<i>/mlp/wo/kernel` [mlp, embed] -> `encoder/layers/mlp/wo/kernel`
[layers, mlp, embed].
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np
import tensorstore as ts
from etils import epath

PyTree = Any

LAYER = "{i}"  # stands for the layer's index in the other formats' names


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter's name in each format.

    Attributes:
      ours: path in our tree; with "layers" in it, the array has the layers on axis 0.
      t5x: path in T5X's tree; `{i}` is the layer.
      optional: whether a model may lack it (tied logits; either `wi` or `wi_0` and `wi_1`).
    """

    ours: str
    t5x: str
    optional: bool = False


def _table() -> tuple[Row, ...]:
    blocks = {
        "encoder": ("attention", "pre_attention_layer_norm", "pre_mlp_layer_norm"),
        "decoder": (
            "self_attention",
            "encoder_decoder_attention",
            "pre_self_attention_layer_norm",
            "pre_cross_attention_layer_norm",
            "pre_mlp_layer_norm",
        ),
    }
    rows = [Row("token_embedder/embedding", "token_embedder/embedding")]
    for stack, parts in blocks.items():
        for name in ("relpos_bias/rel_embedding", f"{stack}_norm/scale"):
            rows.append(Row(f"{stack}/{name}", f"{stack}/{name}"))
        names = [f"mlp/{name}/kernel" for name in ("wi", "wi_0", "wi_1", "wo")]
        for part in parts:
            if part.endswith("attention"):
                names += [f"{part}/{name}/kernel" for name in ("query", "key", "value", "out")]
            else:
                names.append(f"{part}/scale")
        for name in names:
            optional = name.startswith("mlp/wi")
            rows.append(Row(f"{stack}/layers/{name}", f"{stack}/layers_{LAYER}/{name}", optional))
    rows.append(Row("decoder/logits_dense/kernel", "decoder/logits_dense/kernel", optional=True))
    return tuple(rows)


TABLE = _table()


def read_t5x(folder: epath.PathLike) -> tuple[dict[str, np.ndarray], int]:
    """Reads the parameters of a T5X checkpoint; the optimizer's state is left alone.

    Args:
      folder: `.../checkpoint_<step>`, local or gs://.

    Returns:
      ({T5X name such as "encoder/layers_0/mlp/wo/kernel": array as stored}, global step).

    Raises:
      FileNotFoundError: if there is no such folder, or a chunk of an array is missing.
      ValueError: if it is not a T5X checkpoint, or is damaged.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    content = _read_msgpack(folder / "checkpoint")
    version = content.get("version")
    optimizer = content.get("optimizer")
    if not isinstance(version, int) or version < 2 or not isinstance(optimizer, dict):
        raise ValueError(f"{folder} is not a T5X checkpoint of version 2 or 3: version {version!r}")
    target, state = optimizer.get("target"), optimizer.get("state")
    if not isinstance(target, dict) or not isinstance(state, dict) or "step" not in state:
        raise ValueError(f"{folder} is not a T5X checkpoint: it has no target or no step")
    leaves = _flatten(target)
    stored = {  # opened all at once, read in parallel
        name: _open_zarr(folder, name) for name, leaf in leaves.items() if _is_spec(leaf)
    }
    params = {}
    for name, leaf in leaves.items():
        if name in stored:
            params[name] = _read_zarr(folder, name, leaf, stored[name])
        elif isinstance(leaf, np.ndarray):
            params[name] = leaf
        else:
            raise ValueError(f"{folder}: {name} is neither an array nor a spec but {type(leaf)}")
        # Old T5X wrote bfloat16 as uint16; taken as numbers they would be nonsense.
        if not jnp.issubdtype(params[name].dtype, jnp.floating):
            raise ValueError(f"{folder}: {name} is {params[name].dtype}, not a floating type")
    return params, int(state["step"])


def from_t5x(flat: Mapping[str, np.ndarray]) -> PyTree:
    """Turns T5X's names into our tree.

    Args:
      flat: {T5X name: array}, as from `read_t5x`.

    Returns:
      Nested dict of numpy arrays, dtypes unchanged.

    Raises:
      ValueError: if names are missing (a gap in the layers, for instance) or unexpected, or if
        the layers of a stack differ in shape or dtype; it lists all of them.
    """
    depth = {stack: _depth(flat, stack) for stack in ("encoder", "decoder")}
    _require_names(flat.keys(), {row: _t5x_names(row, depth) for row in TABLE})
    ours: dict[str, np.ndarray] = {}
    for row in TABLE:
        names = _t5x_names(row, depth)
        if names[0] not in flat:
            continue
        arrays = [np.asarray(flat[name]) for name in names]
        kinds = {(array.shape, array.dtype.name) for array in arrays}
        if len(kinds) > 1:
            raise ValueError(f"the layers of {row.t5x} differ: {sorted(kinds)}")
        ours[row.ours] = np.stack(arrays) if LAYER in row.t5x else arrays[0]
    return _nest(ours)


def to_t5x(params: PyTree) -> dict[str, np.ndarray]:
    """Turns our tree into T5X's names; the inverse of `from_t5x`, bit for bit.

    Args:
      params: nested dict of arrays.

    Raises:
      ValueError: if names are missing or unexpected, or the layers of a stack disagree in number.
    """
    ours = {name: np.asarray(leaf) for name, leaf in _flatten(params).items()}
    _require_names(ours.keys(), {row: [row.ours] for row in TABLE})
    depth: dict[str, int] = {}
    for name, array in ours.items():
        stack, *rest = name.split("/")
        if rest[0] == "layers" and depth.setdefault(stack, len(array)) != len(array):
            raise ValueError(f"{name} has {len(array)} layers, others in {stack} {depth[stack]}")
    flat = {}
    for row in TABLE:
        if row.ours in ours:
            array = ours[row.ours]
            layers = list(array) if LAYER in row.t5x else [array]
            flat.update(zip(_t5x_names(row, depth), layers, strict=True))
    return flat


# ---- names --------------------------------------------------------------------------------------


def _depth(flat: Mapping[str, Any], stack: str) -> int:
    """Returns the number of layers of a stack that T5X's names imply, at least 1.

    It counts the indices rather than trusting the largest: one hostile `layers_999999999` must
    not make a list of missing names that fills the memory.
    """
    indices = set()
    for name in flat:
        match = re.match(rf"{stack}/layers_(0|[1-9][0-9]{{0,4}})/", name)
        if match:
            indices.add(int(match[1]))
    missing = sorted(set(range(max(indices, default=0))) - indices)
    if missing:
        raise ValueError(f"{stack} has no layers {_some(missing)} below layer {max(indices)}")
    return max(len(indices), 1)


def _t5x_names(row: Row, depth: Mapping[str, int]) -> list[str]:
    if LAYER not in row.t5x:
        return [row.t5x]
    return [row.t5x.replace(LAYER, str(i)) for i in range(depth[row.t5x.split("/")[0]])]


def _require_names(have: Any, names: Mapping[Row, list[str]]) -> None:
    """Raises one ValueError with all missing and all unexpected names.

    Args:
      have: the names that are there.
      names: for each row of the table, the names it stands for in this model.
    """
    gated = any(re.search(r"/mlp/wi_[01]/", name) for name in have)
    missing, known = [], set()
    for row, alternatives in names.items():
        there = [name for name in alternatives if name in have]
        if "/mlp/wi" in row.ours:
            needed = gated != ("/mlp/wi/" in row.ours)
        else:
            needed = not row.optional or bool(there)
        if needed:
            known.update(alternatives)
            missing += sorted(set(alternatives) - set(there))
    unexpected = sorted(set(have) - known)
    if missing or unexpected:
        raise ValueError(
            "these are not the parameters of a T5: "
            f"{len(missing)} missing: {_some(missing)}; "
            f"{len(unexpected)} unexpected: {_some(unexpected)}"
        )


def _some(items: list[Any], most: int = 20) -> str:
    """Joins items for an error message, at most 20 of them, each shortened."""
    text = ", ".join(str(item)[:120] for item in items[:most]) or "none"
    return text + (f" and {len(items) - most} more" if len(items) > most else "")


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"/"-joined path: leaf}; checks each key, since names end up in paths.

    Raises:
      ValueError: if a key is not made of letters, digits and underscores.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z0-9_]{1,100}", key):
            raise ValueError(f"not a parameter name: {str(key)[:120]!r} in {prefix or 'the tree'}")
        if isinstance(value, Mapping) and not _is_spec(value):
            flat.update(_flatten(value, f"{prefix}{key}/"))
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


# ---- T5X's files --------------------------------------------------------------------------------


def _is_spec(value: Any) -> bool:
    """True for the dict that T5X leaves in the msgpack file where an array has its own folder."""
    return isinstance(value, Mapping) and {"driver", "kvstore", "metadata"} <= value.keys()


def _read_msgpack(path: epath.Path) -> dict[str, Any]:
    if not path.exists():
        raise ValueError(f"{path.parent} is not a T5X checkpoint: it has no file 'checkpoint'")
    try:
        content = msgpack.unpackb(path.read_bytes(), ext_hook=_decode_array, raw=False)
    # Its errors for bad data are ValueErrors, except the one for nesting that is too deep.
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ValueError(f"{path} is not msgpack as T5X writes it: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no dict")
    return content


def _decode_array(code: int, data: bytes) -> Any:
    """Decodes the two extension types of Flax's msgpack: 1 is an array, 3 a numpy scalar.

    Raises:
      ValueError: on any other type, or if dtype, shape and bytes do not agree.
    """
    if code not in (1, 3):
        raise ValueError(f"unknown extension type {code}")
    shape, dtype, buffer = msgpack.unpackb(data, raw=False)
    dtype = jnp.dtype(dtype)  # knows bfloat16, which numpy alone does not
    if dtype.hasobject:
        raise ValueError(f"refused dtype {dtype}")
    array = np.frombuffer(buffer, dtype).reshape(shape).copy()
    return array if code == 1 else array[()]


def _open_zarr(folder: epath.Path, name: str) -> Any:
    """Starts to open the zarr folder of one parameter; returns tensorstore's future."""
    path = os.fspath(folder / f"target.{name.replace('/', '.')}")
    if path.startswith("gs://"):
        bucket, _, path = path.removeprefix("gs://").partition("/")
        kvstore = {"driver": "gcs", "bucket": bucket, "path": path + "/"}
    elif "://" in path:
        raise ValueError(f"T5X checkpoints are read from a local path or gs://; got {folder}")
    else:
        kvstore = {"driver": "file", "path": os.path.abspath(path) + "/"}
    # Without the last option a missing chunk reads as zeros.
    spec = {"driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False}
    return ts.open(spec, open=True, read=True)


def _read_zarr(folder: epath.Path, name: str, leaf: Mapping[str, Any], opened: Any) -> np.ndarray:
    try:
        store = opened.result()
        shape = tuple(leaf["metadata"]["shape"])
        if tuple(store.shape) != shape:
            raise ValueError(f"{name} is {store.shape} on disk and {shape} in 'checkpoint'")
        return np.asarray(store.read().result())
    except (ValueError, KeyError, TypeError) as error:
        missing = "NOT_FOUND" in str(error)
        kind = FileNotFoundError if missing else ValueError
        raise kind(f"{folder}: {name} cannot be read: {error}") from error


def is_t5x(folder: epath.PathLike) -> bool:
    """Whether a folder looks like one T5X checkpoint: it holds the msgpack file `checkpoint`."""
    return (epath.Path(folder) / "checkpoint").exists()


def require_fit(folder: epath.PathLike, params: PyTree, abstract: PyTree) -> None:
    """Compares imported parameters with those that the model wants.

    Args:
      folder: where they came from, for the message.
      params: tree of arrays.
      abstract: tree of jax.ShapeDtypeStruct.

    Raises:
      ValueError: names or shapes differ; the message is a want/have table.
    """
    want = {name: tuple(x.shape) for name, x in _flatten(abstract).items()}
    have = {name: tuple(x.shape) for name, x in _flatten(params).items()}
    rows = [
        f"  {name}: want {want.get(name, 'nothing')}, have {have.get(name, 'nothing')}"
        for name in sorted({*want, *have})
        if want.get(name) != have.get(name)
    ]
    if rows:
        raise ValueError(
            f"{folder} does not fit the model; choose the --gin_file of its size "
            "(t5_1_1/... or t5_1_0/...):\n" + "\n".join(rows)
        )
