"""Arrays in files that have not been read yet, and what can be made of them without reading."""

import dataclasses
from collections.abc import Callable, Collection, Sequence

import numpy as np

# One slice with start and stop for each axis.
Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array in a file.

    Attributes:
      shape: of the whole array.
      dtype: as stored; bfloat16 is that of ml_dtypes.
      read: reads the part of an index: [rows of slice 0, rows of slice 1, ...]. It raises OSError
        or ValueError, with the file and the name in it, where the file cannot be read.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def whole(self) -> np.ndarray:
        """Reads all of it."""
        return self.read(everything(self.shape))


def everything(shape: tuple[int, ...]) -> Index:
    """The index of a whole array."""
    return tuple(slice(0, n) for n in shape)


def of(array: np.ndarray) -> Tensor:
    """An array in memory as a Tensor."""
    array = np.asarray(array)
    return Tensor(array.shape, array.dtype, lambda index: array[index])


def cast(tensor: Tensor, dtype: np.dtype) -> Tensor:
    """Reads as another type."""
    return Tensor(tensor.shape, dtype, lambda index: tensor.read(index).astype(dtype))


def transposed(tensor: Tensor) -> Tensor:
    """[a, b] -> [b, a]."""
    return Tensor(tensor.shape[::-1], tensor.dtype, lambda index: tensor.read(index[::-1]).T)


def axis_first(tensor: Tensor, axis: int) -> Tensor:
    """Moves an axis to the front."""

    def read(index: Index) -> np.ndarray:
        inner = list(index[1:])
        inner.insert(axis, index[0])
        return np.moveaxis(tensor.read(tuple(inner)), axis, 0)

    rest = tuple(n for i, n in enumerate(tensor.shape) if i != axis)
    return Tensor((tensor.shape[axis], *rest), tensor.dtype, read)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape and dtype as one, with a new axis in front."""

    def read(index: Index) -> np.ndarray:
        layers, inner = index[0], index[1:]
        chosen = tensors[layers]
        out = np.empty((len(chosen), *(s.stop - s.start for s in inner)), tensors[0].dtype)
        for i, tensor in enumerate(chosen):  # one at a time: threads would hold a layer each
            out[i] = tensor.read(inner)
        return out

    return Tensor((len(tensors), *tensors[0].shape), tensors[0].dtype, read)


def layer(tensor: Tensor, i: int) -> Tensor:
    """One entry of the first axis, without that axis."""
    return Tensor(
        tensor.shape[1:], tensor.dtype, lambda index: tensor.read((slice(i, i + 1), *index))[0]
    )


def merged(tensor: Tensor, axis: int) -> Tensor:
    """Joins an axis with the one after it, as `reshape` does."""
    size = tensor.shape[axis + 1]

    def read(index: Index) -> np.ndarray:
        start, stop = index[axis].start, index[axis].stop
        first, last = start // size, -(-stop // size)
        outer = (slice(first, last), slice(0, size))
        part = tensor.read((*index[:axis], *outer, *index[axis + 1 :]))
        part = part.reshape(*part.shape[:axis], -1, *part.shape[axis + 2 :])
        before = (slice(None),) * axis
        return part[(*before, slice(start - first * size, stop - first * size))]

    joined = tensor.shape[axis] * size
    return Tensor((*tensor.shape[:axis], joined, *tensor.shape[axis + 2 :]), tensor.dtype, read)


def with_rows(tensor: Tensor, rows: int, fill: int, axis: int = 0) -> Tensor:
    """Cuts an axis to `rows` entries, or appends copies of its entry `fill` up to as many."""
    have = tensor.shape[axis]
    shape = (*tensor.shape[:axis], rows, *tensor.shape[axis + 1 :])

    def part(index: Index, start: int, stop: int) -> np.ndarray:
        return tensor.read((*index[:axis], slice(start, stop), *index[axis + 1 :]))

    def read(index: Index) -> np.ndarray:
        start, stop = index[axis].start, index[axis].stop
        parts = [part(index, start, min(stop, have))] if start < have else []
        if stop > have:
            parts.append(np.repeat(part(index, fill, fill + 1), stop - max(start, have), axis))
        return np.concatenate(parts, axis)

    return Tensor(shape, tensor.dtype, read)


def some(names: Collection[object], most: int = 20) -> str:
    """Joins names for an error message: at most 20 of them, sorted, each shortened."""
    text = ", ".join(str(name)[:200] for name in sorted(names)[:most]) or "none"
    return text + (f" and {len(names) - most} more" if len(names) > most else "")
