"""TPUs that are not there: meshes on all kinds of them, and a train step compiled for one."""

import dataclasses
import functools
import importlib.util
import os

import jax
import pytest

from distill import estimate, objectives, optim, partitioning, plan, students, t5

pytestmark = [pytest.mark.topology, pytest.mark.filterwarnings("ignore")]


def devices_of(name, **settings):
    require_libtpu()
    from jax.experimental import topologies

    for variable, value in plan.NO_TPU.items():
        os.environ.setdefault(variable, value)
    return list(topologies.get_topology_desc(name, "tpu", **settings).devices)


def require_libtpu():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (the tpu-aot extra)")


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
        params = students.abstract_params(t5.T5(config), mesh)
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


def small(**changes):
    """XXL's shape in small: the same ratios of widths, a few layers."""
    model = t5.T5Config(vocab_size=4096, dtype="bfloat16", emb_dim=512, num_heads=8, head_dim=64,
                        mlp_dim=1280, num_encoder_layers=3, num_decoder_layers=3,
                        remat_policy="minimal")  # fmt: skip
    setup = plan.Setup(
        model, optim.Adafactor(), objectives.StepByStep(),
        partitioning.MeshConfig(fsdp=4, tensor=2), estimate.Work(64, 512, 128),
    )  # fmt: skip
    return dataclasses.replace(setup, **changes)


@pytest.fixture(scope="module")
def compiled():
    require_libtpu()
    return plan.compile_train(small(), plan.topology("v5e:2x4"))


def test_the_step_of_training_compiles_for_a_v5e_slice(compiled):
    assert compiled.verified and compiled.fits and compiled.error is None
    assert compiled.mesh == {"data": 1, "fsdp": 4, "tensor": 2}
    whole = 4 * t5.param_count(small().model)
    # In 8 slices, fsdp x tensor; position biases only in two, the scales of norms in four.
    assert whole / 8 <= compiled.memory["parameters"] < whole / 8 * 1.02
    assert compiled.memory["optimizer"] < compiled.memory["parameters"] / 10
    assert compiled.memory["temporaries"] > 0 and compiled.memory["code"] > 0
    assert set(compiled.sent) >= {"all-gather", "reduce-scatter"}
    assert compiled.seconds.keys() == {"compute", "memory", "network"}
    assert 0 < compiled.mfu < 1


def test_products_of_the_compiled_step_are_those_of_the_formula(compiled):
    guess = plan.estimated(small(), plan.topology("v5e:2x4"))
    assert compiled.flops == pytest.approx(guess.flops, rel=0.02)
    assert guess.memory["parameters"] == compiled.memory["parameters"]
    assert guess.memory["optimizer"] == compiled.memory["optimizer"]
    assert not guess.verified


def test_what_does_not_fit_is_said():
    require_libtpu()
    where = plan.topology("v5e:2x2")
    huge = dataclasses.replace(small().model, num_encoder_layers=40, remat_policy="none")
    found = plan.compile_train(
        small(model=huge, mesh=partitioning.MeshConfig(), work=estimate.Work(256, 1024, 256)), where
    )
    assert not found.fits and "Ran out of memory" in found.error
    assert found.peak > found.chip.hbm
    assert "DOES NOT FIT" in plan.describe(found)


def test_shapes_that_libtpu_does_not_know():
    require_libtpu()
    with pytest.raises(ValueError, match="--topology=v5e:3x5"):
        plan.topology("v5e:3x5")
