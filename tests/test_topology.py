"""TPUs that are not there: meshes on all kinds of them, and a train step compiled for one."""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest

from distill import evaluate, objectives, optim, partitioning, t5, train

pytestmark = [pytest.mark.topology, pytest.mark.filterwarnings("ignore")]


def devices_of(name, **settings):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (the tpu-aot extra)")
    from jax.experimental import topologies

    # There is no TPU to share: other processes (of pytest-xdist, say) may have libtpu loaded, too.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return list(topologies.get_topology_desc(name, "tpu", **settings).devices)


MEGACORE = {"chip_config_name": "megacore"}  # two cores as one device, JAX's default on a v4


@pytest.mark.parametrize(
    "name,settings,sizes",
    [
        ("v4:2x2x1", MEGACORE, [(1, 4, 1), (2, 1, 2), (1, 2, 2)]),
        ("v5e:2x4", {}, [(1, 8, 1), (2, 2, 2), (1, 2, 4)]),
        ("v5p:2x2x1", {}, [(1, 4, 1), (2, 1, 2), (1, 2, 2)]),
        ("v6e:2x4", {}, [(1, 8, 1), (2, 2, 2), (1, 2, 4)]),
        # jax.make_mesh finds no layout of these on v4, v5p and v6e.
        ("v4:4x4x4", MEGACORE, [(1, 32, 2), (8, 8, 1), (4, 8, 2)]),
        ("v5p:4x4x4", {}, [(1, 32, 2), (8, 8, 1), (4, 8, 2)]),
        ("v6e:8x8", {}, [(1, 32, 2), (4, 16, 1), (2, 4, 8)]),
        ("v5e:4x4", {"num_slices": 2}, [(2, 16, 1), (4, 4, 2), (2, 1, 16), (1, 32, 1), (32, 1, 1)]),
        ("v5p:2x2x2", {"num_slices": 2}, [(2, 4, 2), (1, 16, 1), (2, 8, 1)]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_state_is_placed_on_every_kind_of_slice(name, settings, sizes, monkeypatch):
    """Every array has a place, slices are outermost, and processes read whole parts of a batch."""
    devices = devices_of(name, **settings)
    config = t5.T5Config(vocab_size=32128, emb_dim=768, num_heads=16, mlp_dim=2048,
                         num_encoder_layers=2, num_decoder_layers=2)  # fmt: skip
    processes = {d.process_index for d in devices}
    for data, fsdp, tensor in sizes:
        mesh = partitioning.make_mesh(partitioning.MeshConfig(data, fsdp, tensor), devices)
        assert {d.id for d in mesh.devices.flat} == {d.id for d in devices}
        params = evaluate.abstract_params(t5.T5(config), mesh)
        shardings = jax.tree.map(lambda x: x.sharding, params)
        slots = jax.eval_shape(optim.Adafactor().build(10).init, params)
        partitioning.optimizer_shardings(mesh, slots, params, shardings)
        kernel = params["encoder"]["layers"]["mlp"]["wi_0"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape) == (2, 768 // fsdp, 2048 // tensor)
        in_order = [getattr(d, "slice_index", 0) for d in mesh.devices.flat]
        assert in_order == sorted(in_order)
        shares = set()
        for process in processes:
            monkeypatch.setattr(jax, "process_index", functools.partial(int, process))
            shares.add(partitioning.batch_share(mesh))
        parts = {count for _, count in shares}
        assert len(parts) == 1 and {number for number, _ in shares} == set(range(*parts))


def test_tensor_does_not_leave_a_tpu_slice():
    devices = devices_of("v5e:2x4", num_slices=2)
    with pytest.raises(ValueError, match=r"2 slices .* 8 devices; .*tensor may be 1, 2, 4 or 8"):
        partitioning.make_mesh(partitioning.MeshConfig(tensor=16), devices)


def test_train_step_compiles_for_a_v5e_slice():
    mesh = partitioning.make_mesh(
        partitioning.MeshConfig(data=2, fsdp=2, tensor=2), devices_of("v5e:2x4")
    )
    config = t5.T5Config(vocab_size=1024, dtype="bfloat16", emb_dim=256, num_heads=4, mlp_dim=512,
                         num_encoder_layers=2, num_decoder_layers=2)  # fmt: skip
    net = t5.T5(config, partitioning.activation_constraint(mesh))
    tx = optim.Adafactor().build(10)
    params = evaluate.abstract_params(net, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    slots = jax.eval_shape(tx.init, params)

    def on(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    opt_state = jax.tree.map(
        on, slots, partitioning.optimizer_shardings(mesh, slots, params, shardings)
    )
    scalar = partitioning.replicated(mesh)
    state = train.TrainState(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=scalar), params, opt_state
    )
    lengths = dict(encoder=256, decoder=128)
    batch = {
        f"{side}_{name}": jax.ShapeDtypeStruct(
            (16, length), jnp.int32, sharding=partitioning.batch_sharding(mesh)
        )
        for side, length in lengths.items()
        for name in ("input_tokens", "segment_ids")
    }
    for name in ("target_tokens", "loss_weights", "loss_groups"):
        batch[f"decoder_{name}"] = batch["decoder_input_tokens"]
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = functools.partial(
        train.train_step, net=net, objective=objectives.StepByStep(), tx=tx, num_microbatches=2,
    )  # fmt: skip
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch, on(key, scalar)).compile()
    memory = compiled.memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, opt_state)))
    # Parameters and slots are in 4 slices (fsdp x tensor), not copied to every chip.
    assert memory.argument_size_in_bytes < held / 4 * 1.2
    assert memory.temp_size_in_bytes > 0
