"""Where arrays live on 8 CPU devices."""

import dataclasses

import jax
import numpy as np
import pytest

from distill import optim, partitioning, t5

CONFIG = t5.T5Config(vocab_size=384, emb_dim=256, num_heads=4, num_encoder_layers=2,
                     num_decoder_layers=3, head_dim=64, mlp_dim=512)  # fmt: skip


def mesh_of(**sizes):
    return partitioning.make_mesh(partitioning.MeshConfig(**sizes))


def test_mesh_takes_what_is_left_for_the_axis_of_minus_one():
    assert dict(mesh_of().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(mesh_of(data=2, fsdp=-1, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    "sizes,would_do",
    [
        (dict(data=3), "data = 8 would do"),
        (dict(tensor=3), "tensor = 1, 2, 4 or 8 would do"),
        (dict(data=2, fsdp=2, tensor=1), "data = 4; or fsdp = 4; or tensor = 2 would do"),
        (dict(data=2, fsdp=-1, tensor=3), "tensor = 1, 2 or 4 would do"),
        (dict(fsdp=3, tensor=3), "must divide 8: 1, 2, 4 or 8"),
    ],
)
def test_mesh_that_does_not_fit_the_devices_is_an_error(sizes, would_do):
    with pytest.raises(ValueError, match=f"there are 8.*{would_do}"):
        mesh_of(**sizes)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What arranging a mesh looks at; `slice_index` is a GPU's node, or its NVLink domain."""

    id: int
    slice_index: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "fake"


def cluster(nodes, gpus, processes_per_node=1):
    """Devices of GPU nodes, out of order."""
    each = gpus // processes_per_node
    devices = [FakeDevice(i, i // gpus, i // each) for i in range(nodes * gpus)]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]


@pytest.mark.parametrize("processes_per_node", [1, 4])
@pytest.mark.parametrize(
    "sizes",
    [
        dict(),
        dict(data=2, fsdp=4),
        dict(data=2, tensor=4),
        dict(data=4, fsdp=2),
        dict(data=2, fsdp=2, tensor=2),
        dict(data=4, tensor=2),
    ],
)
def test_slices_are_outermost(sizes, processes_per_node):
    """As many copies of the model as slices, or more: none of them spans two slices."""
    config = partitioning.MeshConfig(**sizes)
    mesh = partitioning.make_mesh(config, cluster(2, 4, processes_per_node))
    for copy in mesh.devices:  # fsdp x tensor
        assert len({d.slice_index for d in copy.flat}) == 1
    order = [d.slice_index for d in mesh.devices.flat]
    assert order == sorted(order)
    assert {d.id for d in mesh.devices.flat} == set(range(8))


def test_fsdp_may_span_slices_with_a_warning_and_tensor_never(caplog):
    mesh = partitioning.make_mesh(partitioning.MeshConfig(fsdp=4, tensor=2), cluster(2, 4))
    assert [{d.slice_index for d in part.flat} for part in mesh.devices[0]] == [{0}, {0}, {1}, {1}]
    assert "MeshConfig.data=2" in caplog.text
    # Over four slices data takes two parts and fsdp the rest.
    mesh = partitioning.make_mesh(partitioning.MeshConfig(data=2, fsdp=4), cluster(4, 2))
    assert [[d.slice_index for d in copy.flat] for copy in mesh.devices] == [
        [0, 0, 1, 1], [2, 2, 3, 3],
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"tensor = 8 .* 4 devices.* may be 1, 2 or 4"):
        partitioning.make_mesh(partitioning.MeshConfig(tensor=8), cluster(2, 4))
    with pytest.raises(ValueError, match=r"different numbers of devices: \{0: 4, 1: 2\}"):
        devices = [d for d in cluster(2, 4) if d.id < 6]
        partitioning.make_mesh(partitioning.MeshConfig(), devices)


def test_mesh_config_refuses_two_rests():
    with pytest.raises(ValueError, match="at most once"):
        partitioning.MeshConfig(data=-1, fsdp=-1)


def test_one_mesh_axis_serves_an_array_once():
    P = jax.P
    assert partitioning.spec(("batch", "length", "embed")) == P(("data", "fsdp"), None, None)
    assert partitioning.spec(("layers", "embed", "mlp")) == P(None, "fsdp", "tensor")


def test_parameters_and_optimizer_slots_are_sliced_alike():
    mesh = mesh_of(data=2, fsdp=2, tensor=2)
    shapes = t5.param_shapes(CONFIG)
    shardings = partitioning.param_shardings(mesh, shapes, t5.param_axes(CONFIG))
    P = jax.P
    kernel = ("decoder", "layers", "mlp", "wi_0", "kernel")

    def at(tree, path):
        for key in path:
            tree = tree[key]
        return tree

    assert at(shardings, kernel).spec == P(None, "fsdp", "tensor")
    for optimizer, expected in [
        (optim.AdamW(), {"mu": P(None, "fsdp", "tensor"), "nu": P(None, "fsdp", "tensor")}),
        (optim.Adafactor(), {"v_row": P(None, "fsdp"), "v_col": P(None, "tensor"), "v": P()}),
    ]:
        state = jax.eval_shape(optimizer.build(10).init, shapes)
        slots = partitioning.optimizer_shardings(mesh, state, shapes, shardings)
        found = {
            partitioning.path_name(path).split("/")[-6]: sharding.spec
            for path, sharding in jax.tree_util.tree_leaves_with_path(slots)
            if partitioning.path_name(path).endswith("/".join(kernel))
        }
        assert found == expected
        # And the slots can really be made there.
        params = jax.tree.map(np.zeros_like, jax.tree.map(lambda s: np.zeros(s.shape), shapes))
        made = jax.jit(optimizer.build(10).init, out_shardings=slots)(params)
        for leaf, sharding in zip(jax.tree.leaves(made), jax.tree.leaves(slots), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def refusal(config, **sizes):
    with pytest.raises(ValueError) as error:
        partitioning.param_shardings(
            mesh_of(**sizes), t5.param_shapes(config), t5.param_axes(config)
        )
    return str(error.value)


def test_all_axes_that_do_not_divide_are_named_with_sizes_that_would():
    config = dataclasses.replace(CONFIG, vocab_size=386, emb_dim=258, mlp_dim=510)
    message = refusal(config, fsdp=4, tensor=2, data=1)
    assert "fsdp = 4 does not divide embed = 258 (" in message
    assert "fsdp may be 1 or 2." in message and "tensor" not in message
    message = refusal(config, fsdp=2, tensor=4, data=1)
    assert "tensor = 4 does not divide" in message and "fsdp" not in message
    assert "vocab = 386 (token_embedder/embedding and 1 more)" not in message  # has its own name
    assert "vocab = 386 (decoder/logits_dense/kernel and 1 more)" in message
    assert "mlp = 510 (" in message and "heads" not in message
    assert "tensor may be 1 or 2." in message
    both = refusal(dataclasses.replace(config, emb_dim=257), fsdp=2, tensor=4, data=1)
    assert "fsdp may be 1." in both and "tensor may be 1 or 2." in both


def test_tensor_takes_whole_heads():
    """T5 1.1 small: 6 heads of 64 make 384, which 4 divides, but not the heads."""
    config = dataclasses.replace(CONFIG, num_heads=6, mlp_dim=768)
    message = refusal(config, data=2, tensor=4)
    assert "heads = 6 (" in message and "joined_kv" not in message
    assert "tensor may be 1 or 2." in message
    mesh = partitioning.make_mesh(partitioning.MeshConfig(tensor=3), jax.devices()[:6])
    partitioning.param_shardings(mesh, t5.param_shapes(config), t5.param_axes(config))


def test_tensor_divides_the_length_of_rows():
    partitioning.check_lengths(mesh_of(tensor=4), {"inputs": 288, "targets": 104})
    with pytest.raises(
        ValueError,
        match=r"'inputs': 60, 'targets': 24.*'inputs': 64, 'targets': 24.*tensor = 1, 2 ",
    ):
        partitioning.check_lengths(mesh_of(tensor=8), {"inputs": 60, "targets": 24})


def test_a_batch_is_cut_by_rows():
    mesh = mesh_of(data=4, fsdp=2)
    batch = partitioning.shard_batch(mesh, {"x": np.arange(32, dtype=np.int32).reshape(16, 2)})
    assert partitioning.batch_shards(mesh) == 8
    assert {s.data.shape for s in batch["x"].addressable_shards} == {(2, 2)}
