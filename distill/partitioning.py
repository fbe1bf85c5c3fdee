"""Where every array lives: the mesh, one table of axis rules, and the shardings they give.

The only module that uses `jax.sharding`. Parameters and activations carry logical axis names
(T5X's); AXIS_RULES maps those to the mesh axes `data` (batch), `fsdp` (batch, and parameters in
slices) and `tensor` (heads, feed-forward and vocabulary). One mesh axis serves an array once: where
`batch` has taken `fsdp`, `embed` stays whole.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

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
      fsdp: slices of parameters and optimizer state; splits the batch as well.
      tensor: slices of heads, feed-forward and vocabulary; talks most, keep it inside a host.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if sum(s == -1 for s in sizes) > 1 or any(s == 0 or s < -1 for s in sizes):
            raise ValueError(
                f"MeshConfig sizes must be positive, with -1 at most once (= the rest), not {self}."
            )


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """Builds the mesh over all devices, or over those given.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(dataclasses.asdict(config))
    fixed = int(np.prod([s for s in sizes.values() if s != -1]))
    if len(devices) % fixed or (-1 not in sizes.values() and fixed != len(devices)):
        raise ValueError(
            f"A mesh of {sizes} needs "
            f"{'a multiple of ' if -1 in sizes.values() else ''}{fixed} devices; there are "
            f"{len(devices)}. Set --gin.MeshConfig.data / fsdp / tensor to match."
        )
    shape = tuple(len(devices) // fixed if s == -1 else s for s in sizes.values())
    # Auto: under Explicit axes, the default of make_mesh, most linen layers fail.
    return jax.make_mesh(shape, tuple(sizes), (AxisType.Auto,) * len(shape), devices=devices)


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
    return int(np.prod([mesh.shape[m] for m in mesh_axes]))


def param_shardings(mesh: Mesh, shapes: Any, axes: Any) -> Any:
    """Sharding of every parameter.

    Args:
      mesh: from `make_mesh`.
      shapes: tree of arrays or ShapeDtypeStructs.
      axes: the same tree with a tuple of logical axis names at each leaf (`t5.param_axes`).

    Raises:
      ValueError: an axis does not divide by the mesh; names parameter, axis and sizes.
    """

    def one(path, shape, names):
        for size, name, mesh_axes in zip(shape.shape, names, _mesh_axes(names), strict=True):
            if size % _shards(mesh, mesh_axes):
                raise ValueError(
                    f"Parameter {path_name(path)} has axis {name!r} of size {size}, which does not "
                    f"divide by the {_shards(mesh, mesh_axes)} devices of mesh axis "
                    f"{'*'.join(mesh_axes)}. Choose a size of that mesh axis which divides {size}."
                )
        return NamedSharding(mesh, spec(names))

    return jax.tree_util.tree_map_with_path(one, shapes, axes)


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
            "batch. Choose MeshConfig.tensor so that it divides the devices of a process, or is a "
            "multiple of them."
        )
    return parts.index(tuple(sorted(rows_of[jax.process_index()]))), len(parts)


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


def activation_constraint(mesh: Mesh):
    """The `constrain` of `t5.T5`: pins an activation to the mesh by its logical axis names."""
    if mesh.size == 1:
        return None

    def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        split = (
            names if names and size % _shards(mesh, names) == 0 else None
            for size, names in zip(x.shape, _mesh_axes(axes), strict=True)
        )  # an axis that does not divide (one token of decoding) stays whole
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*split)))

    return constrain
