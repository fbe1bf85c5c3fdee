"""The train step compiles for TPUs that are not there, sliced over data, fsdp and tensor."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from distill import evaluate, objectives, optim, partitioning, t5, train

pytestmark = [pytest.mark.topology, pytest.mark.filterwarnings("ignore")]


def test_train_step_compiles_for_a_v5e_slice():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (the tpu-aot extra)")
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = partitioning.make_mesh(
        partitioning.MeshConfig(data=2, fsdp=2, tensor=2), list(topology.devices)
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
        batch_shards=partitioning.batch_shards(mesh),
    )  # fmt: skip
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch, on(key, scalar)).compile()
    memory = compiled.memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, opt_state)))
    # Parameters and slots are in 4 slices (fsdp x tensor), not copied to every chip.
    assert memory.argument_size_in_bytes < held / 4 * 1.2
    assert memory.temp_size_in_bytes > 0
