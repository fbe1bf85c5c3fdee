"""T5X checkpoint folders, without T5X.

Two layouts, both read with tensorstore:

- T5X's own: a msgpack file `checkpoint` with the tree of the train state, in which each partitioned
  array is replaced by a tensorstore spec and small ones are stored in place, and one zarr folder
  per partitioned array, `target.encoder.layers_0.mlp.wo.kernel`. The specs in the file name a
  driver and a path; they are never opened. The spec is built here, from the array's own name.
- Orbax's, which T5X writes with `use_orbax`: a folder `state` whose file `_METADATA` lists the
  tree, and the arrays as zarr, in folders of their own or together in an OCDBT database.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np
import tensorstore as ts
from etils import epath

from distill.formats import tensors
from distill.formats.tensors import Tensor

VERSION = 3  # of what is written; 2 differs in nothing that is read here
_FILE = "checkpoint"
_ORBAX = "state"
_ORBAX_TREE = "_METADATA"
_STATES = "param_states"
_CHUNK = 64 << 20  # bytes
_CACHE = 512 << 20  # bytes of decoded chunks that are kept


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a T5X checkpoint holds.

    Attributes:
      folder: where it is.
      target: the parameters, by names such as "encoder/layers_0/mlp/wo/kernel".
      slots: the optimizer's, "encoder/layers_0/mlp/wo/kernel/v_row"; empty unless asked for.
      step: global step.
    """

    folder: epath.Path
    target: dict[str, Tensor]
    slots: dict[str, Tensor]
    step: int


def is_t5x(folder: epath.PathLike) -> bool:
    """Whether a folder looks like one T5X checkpoint."""
    folder = epath.Path(folder)
    return (folder / _FILE).is_file() or (folder / _ORBAX / _ORBAX_TREE).exists()


def open_checkpoint(folder: epath.PathLike, *, slots: bool = False) -> Checkpoint:
    """Opens a T5X checkpoint: reads its tree, and the shape and dtype of each array.

    Args:
      folder: `.../checkpoint_<step>`, local or gs://.
      slots: whether to open the optimizer's arrays too.

    Raises:
      FileNotFoundError: if there is no such folder, or the folder of an array is missing.
      ValueError: if it is not a T5X checkpoint, or is damaged.
    """
    folder = epath.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    orbax = not (folder / _FILE).exists() and (folder / _ORBAX / _ORBAX_TREE).exists()
    tree, base, database = _orbax_tree(folder) if orbax else (_msgpack_tree(folder), folder, False)
    target, state = tree.get("target"), tree.get("state")
    if not isinstance(target, dict) or not isinstance(state, dict) or "step" not in state:
        raise ValueError(f"{folder} is not a T5X checkpoint: it has no target or no step")
    wanted = {("target", name): leaf for name, leaf in flatten(target).items()}
    if slots and isinstance(state.get(_STATES), dict):
        leaves = flatten(state[_STATES])
        wanted |= {("state", f"{_STATES}/{name}"): leaf for name, leaf in leaves.items()}
    if orbax:
        wanted["state", "step"] = state["step"]
    found = _tensors(base, wanted, database)
    step = found.pop(("state", "step")).whole() if orbax else state["step"]
    return Checkpoint(
        folder,
        {name: tensor for (kind, name), tensor in found.items() if kind == "target"},
        {name.partition("/")[2]: tensor for (kind, name), tensor in found.items()
         if kind == "state"},
        int(step),
    )  # fmt: skip


def write_checkpoint(
    folder: epath.PathLike, target: Mapping[str, Tensor], slots: Mapping[str, Tensor], step: int
) -> None:
    """Writes T5X's own layout.

    Args:
      folder: an empty or absent folder; local or gs://.
      target: the parameters.
      slots: the optimizer's arrays, by "<parameter>/<slot>"; may be empty.
      step: global step.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"target/{name}": tensor for name, tensor in target.items()}
    arrays |= {f"state/{_STATES}/{name}": tensor for name, tensor in slots.items()}
    leaves: dict[str, Any] = {}
    for name, tensor in arrays.items():
        if tensor.shape == (1,):  # Adafactor's empty slots; T5X keeps them in the tree, too
            leaves[name] = _encode_array(tensor.whole())
            continue
        file = name.replace("/", ".")
        rows = max(1, _CHUNK * tensor.shape[0] // max(1, tensor.nbytes))
        metadata = {
            "shape": list(tensor.shape),
            "chunks": [min(rows, tensor.shape[0]), *tensor.shape[1:]],
            "compressor": {"id": "gzip", "level": 1},
        }
        leaves[name] = {
            "driver": "zarr", "dtype": tensor.dtype.name,
            "kvstore": {"driver": "file", "path": file + "/"}, "metadata": metadata,
        }  # fmt: skip
        # Zeros are written, too: a chunk that is not there could not be told from a lost one.
        spec = _zarr(folder, file) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
        store = ts.open(spec, dtype=tensor.dtype.name, create=True).result()
        store.write(np.ascontiguousarray(tensor.whole())).result()
    tree = {"target": {}, "state": {_STATES: {}}, **nest(leaves)}
    tree["state"]["step"] = _encode_array(np.asarray(step, np.int32))
    (folder / _FILE).write_bytes(msgpack.packb({"version": VERSION, "optimizer": tree}))


# ---- trees --------------------------------------------------------------------------------------


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"/"-joined path: leaf}; checks each key, since names end up in paths.

    Raises:
      ValueError: if a key is not made of letters, digits and underscores.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z0-9_]{1,100}", key):
            raise ValueError(f"not a parameter name: {str(key)[:120]!r} in {prefix or 'the tree'}")
        if isinstance(value, Mapping) and not _is_spec(value):
            flat.update(flatten(value, f"{prefix}{key}/"))
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def _is_spec(value: Any) -> bool:
    """True for the dict that T5X leaves in the msgpack file where an array has its own folder."""
    return isinstance(value, Mapping) and {"driver", "kvstore", "metadata"} <= value.keys()


def _msgpack_tree(folder: epath.Path) -> dict[str, Any]:
    path = folder / _FILE
    if not path.exists():
        raise ValueError(f"{folder} is not a T5X checkpoint: it has no file {_FILE!r}")
    try:
        content = msgpack.unpackb(path.read_bytes(), ext_hook=_decode_array, raw=False)
    # Its errors for bad data are ValueErrors, except the one for nesting that is too deep.
    except (ValueError, TypeError, msgpack.exceptions.UnpackException) as error:
        raise ValueError(f"{path} is not msgpack as T5X writes it: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no dict")
    version, tree = content.get("version"), content.get("optimizer")
    if not isinstance(version, int) or version < 2 or not isinstance(tree, dict):
        raise ValueError(f"{folder} is not a T5X checkpoint of version 2 or 3: version {version!r}")
    return tree


def _orbax_tree(folder: epath.Path) -> tuple[dict[str, Any], epath.Path, bool]:
    """Returns the tree with None-free leaves, where the arrays lie, and whether in a database."""
    path = folder / _ORBAX / _ORBAX_TREE
    try:
        content = json.loads(path.read_bytes())
        names = [
            "/".join(key["key"] for key in entry["key_metadata"])
            for entry in content["tree_metadata"].values()
            if not entry["value_metadata"]["skip_deserialize"]  # empty nodes
        ]
        if content.get("use_zarr3"):
            raise ValueError("it is written in zarr 3, which T5X does not use")
        tree = nest({name: _ORBAX for name in names})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not a tree as Orbax writes it: {error}") from error
    return tree, folder / _ORBAX, bool(content.get("use_ocdbt"))


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


def _encode_array(array: np.ndarray) -> msgpack.ExtType:
    body = (array.shape, array.dtype.name, array.tobytes())
    return msgpack.ExtType(1, msgpack.packb(body))


# ---- arrays -------------------------------------------------------------------------------------


def _tensors(
    folder: epath.Path, leaves: Mapping[tuple[str, str], Any], database: bool
) -> dict[tuple[str, str], Tensor]:
    """Opens the arrays of (kind, name), all at once."""
    context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE}})
    stored = {}
    for (kind, name), leaf in leaves.items():
        if isinstance(leaf, str) or _is_spec(leaf):
            spec = _zarr(folder, f"{kind}/{name}".replace("/", "."), database)
            stored[kind, name] = ts.open(spec, open=True, read=True, context=context)
    result = {}
    for key, leaf in leaves.items():
        name = key[1]
        if key in stored:
            shape = leaf["metadata"].get("shape") if _is_spec(leaf) else None
            result[key] = _stored(folder, name, stored[key], shape)
        elif isinstance(leaf, np.ndarray):
            result[key] = tensors.of(leaf)
        else:
            raise ValueError(f"{folder}: {name} is neither an array nor a spec but {type(leaf)}")
    return result


def _stored(folder: epath.Path, name: str, opening: Any, shape: Any) -> Tensor:
    def result_of(future: Any) -> Any:
        try:
            return future.result()
        except (ValueError, KeyError, TypeError) as error:
            missing = "NOT_FOUND" in str(error)
            kind = FileNotFoundError if missing else ValueError
            raise kind(f"{folder}: {name} cannot be read: {error}") from error

    store = result_of(opening)
    if shape is not None and list(store.shape) != list(shape):
        raise ValueError(f"{folder}: {name} is {store.shape} on disk and {shape} in {_FILE!r}")
    return Tensor(
        tuple(store.shape),
        np.dtype(store.dtype.numpy_dtype),
        lambda index: np.asarray(result_of(store[index].read())),
    )


def _zarr(folder: epath.Path, name: str, database: bool = False) -> dict[str, Any]:
    """The spec of an array, from where we know it to be."""
    path = os.fspath(folder)
    if path.startswith("gs://"):
        bucket, _, path = path.removeprefix("gs://").partition("/")
        base = {"driver": "gcs", "bucket": bucket, "path": path.rstrip("/") + "/"}
    elif "://" in path:
        raise ValueError(f"T5X checkpoints are read from a local path or gs://; got {folder}")
    else:
        base = {"driver": "file", "path": os.path.abspath(path) + "/"}
    if database:
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    else:
        kvstore = {**base, "path": f"{base['path']}{name}/"}
    # Without fill_missing_data_reads a missing chunk reads as zeros. A chunk in the cache is not
    # looked for again: several devices read their parts of it.
    return {
        "driver": "zarr", "kvstore": kvstore, "fill_missing_data_reads": False,
        "recheck_cached_data": "open",
    }  # fmt: skip
