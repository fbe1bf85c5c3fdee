"""Where arrays live on 8 CPU devices."""

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


@pytest.mark.parametrize("sizes", [dict(data=3), dict(tensor=3), dict(data=2, fsdp=2, tensor=1)])
def test_mesh_that_does_not_fit_the_devices_is_an_error(sizes):
    with pytest.raises(ValueError, match="there are 8"):
        mesh_of(**sizes)


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


def test_an_axis_that_does_not_divide_is_named():
    config = t5.T5Config(vocab_size=384, num_heads=3, head_dim=3, emb_dim=64, mlp_dim=128)
    mesh = mesh_of(data=4, tensor=2)
    with pytest.raises(
        ValueError, match=r"decoder/layers/encoder_decoder_attention.*joined_kv.*9.*2 devices"
    ):
        partitioning.param_shardings(mesh, t5.param_shapes(config), t5.param_axes(config))


def test_a_batch_is_cut_by_rows():
    mesh = mesh_of(data=4, fsdp=2)
    batch = partitioning.shard_batch(mesh, {"x": np.arange(32, dtype=np.int32).reshape(16, 2)})
    assert partitioning.batch_shards(mesh) == 8
    assert {s.data.shape for s in batch["x"].addressable_shards} == {(2, 2)}
