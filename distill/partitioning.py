"""Where every array lives: the mesh, one table of axis rules, and the shardings they give.

The only module that uses `jax.sharding`. Parameters and activations carry logical axis names
(T5X's); AXIS_RULES maps those to the mesh axes `data` (batch), `fsdp` (batch, and parameters in
slices) and `tensor` (heads, feed-forward and vocabulary). One mesh axis serves an array once: where
`batch` has taken `fsdp`, `embed` stays whole.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXIS_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "vocab": ("tensor",),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "joined_kv": ("tensor",),
    "embed": ("fsdp",),
    "length": (),
    "stream_length": ("tensor",),
    "kv": (),
    "layers": (),
    "relpos_buckets": (),
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 once, for whatever is left.

    Attributes:
      data: copies of the model, each with its share of the batch.
      fsdp: slices of parameters and optimizer state; splits the batch as well. None = chosen by
        `estimate.choose_mesh`; where nothing chooses, 1.
      tensor: slices of heads, feed-forward and vocabulary; talks most, keep it inside a host. None
        = chosen likewise.
    """

    data: int = -1
    fsdp: int | None = None
    tensor: int | None = None

    def __post_init__(self):
        sizes = [1 if s is None else s for s in dataclasses.astuple(self)]
        if sum(s == -1 for s in sizes) > 1 or any(s == 0 or s < -1 for s in sizes):
            raise ValueError(
                f"MeshConfig sizes must be positive, with -1 at most once (= the rest), not {self}."
            )

    @property
    def sizes(self) -> dict[str, int]:
        """Of each axis, in order; 1 for what is not chosen."""
        return {axis: 1 if s is None else s for axis, s in dataclasses.asdict(self).items()}


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """Builds the mesh over all devices, or over those given.

    Devices of one slice (a TPU slice, a GPU node, an NVLink domain) talk faster than slices do, so
    slices are outermost: `data` goes over them first, then `fsdp`, and `tensor` never. `fsdp` over
    slices is allowed, with a warning, since a model may need the memory of all of them.

    Args:
      config: sizes of the axes.
      devices: None = all devices of all processes.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `tensor` does not fit into
        a slice; names sizes that do.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _sizes(config, len(devices))
    grid = _arrange(tuple(sizes.values()), devices)
    # Auto: under Explicit axes, the default of jax.make_mesh, most linen layers fail.
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def abstract_mesh(config: MeshConfig, devices: int) -> AbstractMesh:
    """A mesh of so many devices that are not there, for shardings and the sizes they give.

    Raises:
      ValueError: as `make_mesh`.
    """
    sizes = _sizes(config, devices)
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def _sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    sizes = config.sizes
    fixed = math.prod(s for s in sizes.values() if s != -1)
    if devices % fixed or (-1 not in sizes.values() and fixed != devices):
        raise ValueError(_misfit(sizes, devices))
    return {axis: devices // fixed if s == -1 else s for axis, s in sizes.items()}


def describe(sizes: Mapping[str, int]) -> str:
    """`data=2 fsdp=4`: the axes of `mesh.shape` that have more than one device."""
    return " ".join(f"{axis}={n}" for axis, n in sizes.items() if n > 1) or "one device"


def divisors(n: int) -> list[int]:
    """Of a positive integer, from 1 up."""
    return [d for d in range(1, n + 1) if n % d == 0]


def _choice(numbers: list[int]) -> str:
    """`1, 2 or 4`."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def _misfit(sizes: dict[str, int], count: int) -> str:
    """Why sizes do not fit the number of devices, and which would."""
    rest, fixed = -1 in sizes.values(), math.prod(s for s in sizes.values() if s != -1)
    ways = []
    for axis, size in sizes.items():
        others = fixed // size
        if size != -1 and count % others == 0:
            fits = divisors(count // others) if rest else [count // others]
            ways.append(f"{axis} = {_choice(fits)}")
    advice = f"With the other axes as they are, {'; or '.join(ways)} would do."
    if not ways:
        advice = f"Each axis, and their product, must divide {count}: {_choice(divisors(count))}."
    return (
        f"A mesh of {sizes} needs {'a multiple of ' if rest else ''}{fixed} devices; there are "
        f"{count}. {advice} (--gin.MeshConfig.data / fsdp / tensor; -1 = what is left.)"
    )


def _arrange(shape: tuple[int, int, int], devices: list) -> np.ndarray:
    """The devices as an array of this shape (data, fsdp, tensor), slices outermost.

    Not `jax.make_mesh`: that refuses several slices, which is what two GPU nodes are to JAX, and
    splits a physical axis of the torus between logical ones on v5e only, so that it finds no
    layout for, say, 32 x 2 chips of a v5p 4x4x4.
    """
    slices: dict[int, list] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    count, each = len(slices), len(devices) // len(slices)
    if any(len(members) != each for members in slices.values()):
        found = {index: len(members) for index, members in sorted(slices.items())}
        raise ValueError(f"The slices have different numbers of devices: {found}. Use equal ones.")
    data, fsdp, tensor = shape
    if each % tensor:
        raise ValueError(
            f"tensor = {tensor} does not fit into one of the {count} slices (or GPU nodes) of "
            f"{each} devices; --gin.MeshConfig.tensor may be {_choice(divisors(each))}."
        )
    # `tensor` divides a slice, so what `data` leaves of the slices always divides `fsdp`.
    outer_data = math.gcd(data, count)
    outer_fsdp = count // outer_data
    if outer_fsdp > 1:
        logging.warning(
            "fsdp = %d spans slices (or GPU nodes): parameters are gathered over the network "
            "between them. If a copy fits into %s of them, set MeshConfig.data=%d.",
            fsdp, "one" if outer_data == 1 else "fewer", count,
        )  # fmt: skip
    inner = (data // outer_data, fsdp // outer_fsdp, tensor)
    blocks = [
        mesh_utils.create_device_mesh(inner, slices[index], allow_split_physical_axes=True)
        for index in sorted(slices)
    ]
    grid = np.stack(blocks).reshape(outer_data, outer_fsdp, *inner)
    return grid.transpose(0, 2, 1, 3, 4).reshape(shape)


def _mesh_axes(axes: tuple[str | None, ...]) -> list[tuple[str, ...]]:
    """For each logical axis the mesh axes that split it; names further left choose first."""
    used: set[str] = set()
    result = []
    for axis in axes:
        free = tuple(m for m in AXIS_RULES[axis] if m not in used) if axis else ()
        used.update(free)
        result.append(free)
    return result


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axis names -> PartitionSpec, by AXIS_RULES."""
    return PartitionSpec(*(names or None for names in _mesh_axes(axes)))


def _shards(mesh: Mesh, mesh_axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[m] for m in mesh_axes)


def param_shardings(mesh: Mesh, shapes: Any, axes: Any) -> Any:
    """Sharding of every parameter.

    Args:
      mesh: from `make_mesh`; an `AbstractMesh` will do.
      shapes: tree of arrays or ShapeDtypeStructs.
      axes: the same tree with a tuple of logical axis names at each leaf (`t5.param_axes`).

    Raises:
      ValueError: axes do not divide by the mesh; names all of them, and the sizes of the mesh axis
        that divide every parameter. Heads are an axis (of the position biases), so that `tensor`
        takes whole heads although `joined_kv` might be cut between them.
    """
    # (mesh axes, logical axis, size) -> parameters that have it
    found: dict[tuple[tuple[str, ...], str, int], list[str]] = {}

    def one(path, shape, names):
        for size, name, mesh_axes in zip(shape.shape, names, _mesh_axes(names), strict=True):
            if mesh_axes:
                found.setdefault((mesh_axes, name, size), []).append(path_name(path))
        return NamedSharding(mesh, spec(names))

    shardings = jax.tree_util.tree_map_with_path(one, shapes, axes)
    faults = []
    for mesh_axes in dict.fromkeys(key[0] for key in found):
        shards, name = _shards(mesh, mesh_axes), "*".join(mesh_axes)
        sizes = [size for group, _, size in found if group == mesh_axes]
        wrong = [
            f"{axis} = {size} ({paths[0]}{f' and {len(paths) - 1} more' * (len(paths) > 1)})"
            for (group, axis, size), paths in found.items()
            if group == mesh_axes and size % shards
        ]
        if wrong:
            fits = [n for n in divisors(math.gcd(*sizes)) if mesh.size % n == 0]
            faults.append(
                f"{name} = {shards} does not divide {', '.join(wrong)}; with {mesh.size} devices "
                f"{name} may be {_choice(fits)}."
            )
    if faults:
        raise ValueError("The mesh does not divide the model: " + " ".join(faults))
    return shardings


def path_name(path) -> str:
    """A tree path as `encoder/layers/mlp/wo/kernel`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def optimizer_shardings(mesh: Mesh, opt_state: Any, params: Any, shardings: Any) -> Any:
    """Sharding of every optimizer slot: where its parameter lives.

    A slot belongs to the parameter whose path ends its own. One of the parameter's shape lives
    where it lives; Adafactor's factored rows and columns, which lack one of its axes, live likewise
    without that axis; counters are replicated.

    Args:
      mesh: from `make_mesh`.
      opt_state: `jax.eval_shape(tx.init, params)`.
      params: tree of the parameters' shapes.
      shardings: `param_shardings` of them.
    """
    by_path = {
        path_name(path): (leaf.shape, sharding.spec)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(shardings), strict=True
        )
    }

    def one(path, slot):
        names = path_name(path).split("/")
        for start in range(len(names)):
            if found := by_path.get("/".join(names[start:])):
                return NamedSharding(mesh, _slot_spec(slot.shape, *found, first="v_col" in names))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, opt_state)


def _slot_spec(slot_shape, shape, entries: PartitionSpec, first: bool) -> PartitionSpec:
    if slot_shape == shape:
        return entries
    lacking = [i for i in range(len(shape)) if shape[:i] + shape[i + 1 :] == slot_shape]
    if not lacking:
        return PartitionSpec()
    # Equal sizes leave it open which axis was averaged away: optax drops the later one for v_row,
    # the earlier for v_col.
    drop = lacking[0] if first else lacking[-1]
    return PartitionSpec(*(e for i, e in enumerate(entries) if i != drop))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`."""
    return NamedSharding(mesh, spec(("batch",)))


def batch_shards(mesh: Mesh) -> int:
    """Number of slices that the rows of a batch are cut into; BATCH_SIZE must divide by it."""
    return _shards(mesh, AXIS_RULES["batch"])


def _whole_processes(devices: int, processes: int) -> list[int]:
    """Sizes of `tensor` that divide the devices of a process, or are a multiple of them."""
    each = devices // processes
    return [n for n in divisors(devices) if each % n == 0 or n % each == 0]


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of the rows of a batch this process reads: (number, of how many equal parts).

    Processes whose devices hold the same rows, since `tensor` spans them, read the same part.

    Raises:
      ValueError: processes share some rows, but not all.
    """
    shards = batch_shards(mesh)
    rows_of: dict[int, set[int]] = {}
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((shards,)).items():
        rows_of.setdefault(device.process_index, set()).add(rows.start or 0)
    parts = sorted({tuple(sorted(rows)) for rows in rows_of.values()})
    if sum(map(len, parts)) != shards or len(set(map(len, parts))) > 1:
        raise ValueError(
            f"The mesh {dict(mesh.shape)} gives the {len(rows_of)} processes overlapping rows of a "
            f"batch. With {mesh.size // len(rows_of)} devices to a process, "
            f"--gin.MeshConfig.tensor may be {_choice(_whole_processes(mesh.size, len(rows_of)))}."
        )
    return parts.index(tuple(sorted(rows_of[jax.process_index()]))), len(parts)


def check_lengths(mesh: Mesh, lengths: dict[str, int]) -> None:
    """Raises ValueError where `tensor` does not divide the length of rows, and names lengths.

    Between the products the residual stream lies in slices of its length; it would stay whole.

    Args:
      mesh: from `make_mesh`.
      lengths: tokens of a row, `{"inputs": n, "targets": m}`.
    """
    shards = _shards(mesh, AXIS_RULES["stream_length"])
    if any(length % shards for length in lengths.values()):
        fits = {name: -(-length // shards) * shards for name, length in lengths.items()}
        raise ValueError(
            f"tensor = {shards} does not divide rows of {dict(lengths)} tokens: "
            f'--gin.TASK_FEATURE_LENGTHS="{fits}" would do, or --gin.MeshConfig.tensor = '
            f"{_choice([n for n in divisors(math.gcd(*lengths.values())) if mesh.size % n == 0])}."
        )


def shard_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a batch -> global arrays on the mesh."""
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()
    }


def shard_whole(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """An array that every process holds whole -> a global one with its rows over the mesh."""
    return jax.make_array_from_callback(array.shape, batch_sharding(mesh), lambda i: array[i])


def gather(array: jax.Array) -> np.ndarray:
    """The whole array on every process, wherever its rows are."""
    if jax.process_count() == 1:
        return np.asarray(jax.device_get(array))
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array, tiled=True)


@dataclasses.dataclass(frozen=True)
class Activations:
    """The `constrain` of `t5.T5`: keeps activations on their slices of a mesh."""

    mesh: Mesh

    def __call__(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """Pins an activation to the mesh by its logical axis names."""
        sharding = NamedSharding(self.mesh, self._spec(x.shape, axes))
        return jax.lax.with_sharding_constraint(x, sharding)

    def per_device(self, function: Callable, *arrays: tuple[jax.Array | None, tuple]) -> jax.Array:
        """`function` of arrays, where each device has its slices and needs no other's.

        For what XLA cannot slice by itself, such as a kernel.

        Args:
          function: takes the arrays, returns one that is shaped and sliced like the first.
          *arrays: (array or None, its logical axis names).
        """
        specs = tuple(
            PartitionSpec() if x is None else self._spec(x.shape, axes) for x, axes in arrays
        )
        # check_vma=False: kernels do not declare over which mesh axes their results vary.
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=specs, out_specs=specs[0], check_vma=False
        )
        return mapped(*(x for x, _ in arrays))

    def _spec(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> PartitionSpec:
        split = (
            names if names and size % _shards(self.mesh, names) == 0 else None
            for size, names in zip(shape, _mesh_axes(axes), strict=True)
        )  # an axis that does not divide (one token of decoding) stays whole
        return PartitionSpec(*split)


def activation_constraint(mesh: Mesh) -> Activations | None:
    """What `t5.T5` takes as `constrain`; None on one device, where there is nothing to pin."""
    return None if mesh.size == 1 else Activations(mesh)
