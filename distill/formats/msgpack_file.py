"""Flax's msgpack files: where each array lies in one, without reading the arrays.

The file of a T5 XXL is 44 GB, and Flax reads all of it to give one array. Here the file is mapped
into memory and its structure walked, which touches a few bytes per array. What may be in it:

    tree   map {str: tree | array | chunks}
    array  extension type 1 (3 for a scalar) that holds [shape, dtype's name, bytes]
    chunks map {"__msgpack_chunked_array__": true, "shape": {"0": int, ...},
           "chunks": {"0": array [n], ...}}, Flax's form of an array above 1 GiB, flat

Anything else is refused, and so is a file that ends early or late.
"""

import math
import mmap
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from distill.formats.tensors import Index, Tensor

CHUNKED = "__msgpack_chunked_array__"
DEPTH = 100  # of nested maps
_BLOCK = 2**24  # elements of a chunked array that are gathered at once

# First byte -> what follows, and the bytes of its length (or, of an int, of its value).
_SIZED = {
    **{0xC4 + i: ("bytes", 2**i) for i in range(3)},
    **{0xC7 + i: ("extension", 2**i) for i in range(3)},
    **{0xCC + i: ("int", 2**i) for i in range(4)},
    **{0xD9 + i: ("str", 2**i) for i in range(3)},
    **{0xDC + i: ("list", 2 ** (i + 1)) for i in range(2)},
    **{0xDE + i: ("map", 2 ** (i + 1)) for i in range(2)},
}
# First byte -> what follows, and its length or value.
_FIXED = {
    **{i: ("int", i) for i in range(0x80)},
    **{0x80 + i: ("map", i) for i in range(16)},
    **{0x90 + i: ("list", i) for i in range(16)},
    **{0xA0 + i: ("str", i) for i in range(32)},
    0xC2: ("bool", 0),
    0xC3: ("bool", 1),
    **{0xD4 + i: ("extension", 2**i) for i in range(5)},
}
# Those of numbers; by name, numpy would also make objects and records.
_DTYPES = {
    np.dtype(kind).name: np.dtype(kind)
    for kind in (
        bool, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64,
        np.float16, np.float32, np.float64, ml_dtypes.bfloat16,
    )
}  # fmt: skip


class _Array(NamedTuple):
    """An array in the file; its bytes start at `at`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    at: int


def open_file(path: epath.PathLike) -> dict[str, Tensor]:
    """Finds the arrays of a file that Flax's `to_bytes` wrote.

    Args:
      path: local.

    Returns:
      {"/"-joined keys: Tensor}. They keep the file mapped, and read copies: an array of a file
      lies at any byte, and JAX on a CPU would otherwise share its memory.

    Raises:
      OSError: if the file cannot be opened.
      ValueError: if it is not such a file, or not all of it; with the file and the key.
    """
    try:
        with open(os.fspath(path), "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        tree, at = _node(data, 0, "", 0)
        if at != len(data):
            raise ValueError(f"{len(data) - at} bytes follow its end")
        if not isinstance(tree, dict):
            raise ValueError("it holds no map")
        return {name: _tensor(data, chunks) for name, chunks in _leaves(tree, "")}
    except ValueError as error:
        raise ValueError(f"{path} is not a Flax msgpack file, or damaged: {error}") from error


# ---- structure ----------------------------------------------------------------------------------


def _head(data: mmap.mmap, at: int, end: int) -> tuple[str, int, int]:
    """Reads the head of one msgpack object.

    Args:
      data: the file.
      at: where the object starts.
      end: where what contains it ends.

    Returns:
      (what it is, its length or value, where its content starts).
    """
    first = _take(data, at, 1, end)[0]
    if first in _FIXED:
        return *_FIXED[first], at + 1
    if first not in _SIZED:
        raise ValueError(f"nothing that Flax writes for arrays starts with byte {first:#04x}")
    kind, width = _SIZED[first]
    return kind, int.from_bytes(_take(data, at + 1, width, end), "big"), at + 1 + width


def _take(data: mmap.mmap, at: int, count: int, end: int) -> bytes:
    if at + count > end:
        raise ValueError(f"{count} bytes at {at} reach beyond {end}, where they should end")
    return data[at : at + count]


def _expect(data: mmap.mmap, at: int, end: int, wanted: str) -> tuple[int, int]:
    """Reads the head of an object that has to be of one kind."""
    kind, count, at = _head(data, at, end)
    if kind != wanted:
        raise ValueError(f"{kind} where {wanted} belongs")
    return count, at


def _text(data: mmap.mmap, at: int, end: int, most: int) -> tuple[str, int]:
    count, at = _expect(data, at, end, "str")
    if count > most:
        raise ValueError(f"a text of {count} bytes; at most {most} are allowed")
    return _take(data, at, count, end).decode(), at + count


def _node(data: mmap.mmap, at: int, name: str, depth: int) -> tuple[Any, int]:
    """Reads the structure that starts at `at`.

    Returns:
      (dict, _Array, int or bool; where it ends).
    """
    if depth > DEPTH:
        raise ValueError(f"maps are nested deeper than {DEPTH}: {name[:200]!r}")
    try:
        kind, count, at = _head(data, at, len(data))
        if kind == "extension":
            return _array(data, at, count)
        if kind in ("int", "bool"):
            return (count if kind == "int" else bool(count)), at
        if kind != "map":
            raise ValueError(f"{kind} where a map or an array belongs")
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from error
    node: dict[str, Any] = {}
    for _ in range(count):
        try:
            key, at = _text(data, at, len(data), most=200)
            if not key or "/" in key or key in node:
                raise ValueError(f"key {key!r} is empty, there twice or contains '/'")
        except ValueError as error:
            raise ValueError(f"a key in {name!r}: {error}") from error
        node[key], at = _node(data, at, f"{name}/{key}" if name else key, depth + 1)
    return node, at


def _array(data: mmap.mmap, at: int, count: int) -> tuple[_Array, int]:
    """Reads all but the elements of an array in an extension of `count` bytes."""
    code, at = _take(data, at, 1, len(data))[0], at + 1
    if code not in (1, 3):
        raise ValueError(f"extension type {code}; an array is 1, a scalar 3")
    end = at + count
    if end > len(data):
        raise ValueError(f"{count} bytes at {at} reach beyond the end of the file")
    parts, at = _expect(data, at, end, "list")
    dimensions, at = _expect(data, at, end, "list")
    if parts != 3 or dimensions > 32 or (code == 3 and dimensions):
        raise ValueError(f"an array of {parts} parts and {dimensions} axes")
    shape = []
    for _ in range(dimensions):
        size, at = _expect(data, at, end, "int")
        shape.append(size)
    dtype_name, at = _text(data, at, end, most=20)
    if dtype_name not in _DTYPES:
        raise ValueError(f"dtype {dtype_name!r} is none of {', '.join(_DTYPES)}")
    dtype = _DTYPES[dtype_name]
    size, at = _expect(data, at, end, "bytes")
    if at + size != end or size != math.prod(shape) * dtype.itemsize:
        raise ValueError(
            f"{size} bytes, with {end - at} left, for {dtype_name} of shape {tuple(shape)}"
        )
    return _Array(tuple(shape), dtype, at), end


def _leaves(tree: dict[str, Any], name: str) -> Iterator[tuple[str, list[_Array]]]:
    """Yields ("/"-joined keys, [array]) or, of a chunked one, [array of its shape, chunk, ...]."""
    for key, node in tree.items():
        path = f"{name}/{key}" if name else key
        if isinstance(node, _Array):
            yield path, [node]
        elif isinstance(node, dict) and CHUNKED in node:
            yield path, _chunks(node, path)
        elif isinstance(node, dict):
            yield from _leaves(node, path)
        else:
            raise ValueError(f"{path!r}: {node!r} where a map or an array belongs")


def _chunks(node: dict[str, Any], name: str) -> list[_Array]:
    sizes = _numbered(node.get("shape"), int)
    chunks = _numbered(node.get("chunks"), _Array)
    if not (
        node.keys() == {CHUNKED, "shape", "chunks"}
        and node[CHUNKED] is True
        and sizes
        and chunks
        and all(len(chunk.shape) == 1 and chunk.dtype == chunks[0].dtype for chunk in chunks)
        and 0 < math.prod(sizes) == sum(chunk.shape[0] for chunk in chunks)
    ):
        raise ValueError(f"{name!r}: a chunked array whose shape and chunks do not fit")
    return [_Array(tuple(sizes), chunks[0].dtype, chunks[0].at), *chunks]


def _numbered(node: Any, kind: type) -> list[Any]:
    """{"0": a, "1": b} -> [a, b]; [] if it is anything else."""
    if not isinstance(node, dict) or node.keys() != {str(i) for i in range(len(node))}:
        return []
    values = [node[str(i)] for i in range(len(node))]
    return values if all(type(value) is kind for value in values) else []


# ---- elements -----------------------------------------------------------------------------------


def _tensor(data: mmap.mmap, arrays: list[_Array]) -> Tensor:
    array, *chunks = arrays
    if not chunks:
        return Tensor(array.shape, array.dtype, lambda index: np.array(_view(data, array)[index]))
    return Tensor(array.shape, array.dtype, lambda index: _gather(data, array, chunks, index))


def _view(data: mmap.mmap, array: _Array) -> np.ndarray:
    count = math.prod(array.shape)
    return np.frombuffer(data, array.dtype, count, array.at).reshape(array.shape)


def _gather(data: mmap.mmap, array: _Array, chunks: list[_Array], index: Index) -> np.ndarray:
    """Reads a part of a chunked array, some rows of axis 0 at a time.

    A chunk ends anywhere in a row, and a part of each row of 4 GB may be all that is wanted.
    """
    views, starts = [_view(data, chunk) for chunk in chunks], [0]
    for view in views:
        starts.append(starts[-1] + len(view))
    row = math.prod(array.shape[1:])
    step = max(1, _BLOCK // row)
    rows, *others = index
    out = np.empty([axis.stop - axis.start for axis in index], array.dtype)
    for first in range(rows.start, rows.stop, step):
        last = min(first + step, rows.stop)
        flat = [
            view[max(first * row - start, 0) : last * row - start]
            for start, view in zip(starts, views, strict=False)
            if start < last * row and start + len(view) > first * row
        ]
        block = np.concatenate(flat).reshape(last - first, *array.shape[1:])
        out[first - rows.start : last - rows.start] = block[:, *others]
    return out
