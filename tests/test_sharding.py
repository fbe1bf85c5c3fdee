"""Nothing large is whole on every device, and the mesh changes no loss.

The compiled train step is read: what a device holds of every array above 1 MB. It is compiled from
shapes alone, so the sizes cost nothing; they are products of 8 and a prime, by which an axis, whole
or sliced, is recognised in the program.
"""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_objectives import batch_of, examples
from test_t5 import numpy_params

from distill import estimate, objectives, optim, partitioning, plan, t5, train

# The values and the arrays of a program count here, not its speed.
QUICK = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}
MEGABYTE = 1_000_000
ROWS, PARTS = 16 * 13, 2
LENGTHS = {"encoder": 8 * 17, "decoder": 8 * 11}
WIDE = t5.T5Config(vocab_size=8 * 509, dtype="float32", emb_dim=8 * 97, num_heads=8 * 3, head_dim=5,
                   mlp_dim=8 * 263, num_encoder_layers=19, num_decoder_layers=23)  # fmt: skip


def make_mesh(sizes, devices=None):
    devices = jax.devices()[: math.prod(sizes)] if devices is None else devices
    return partitioning.make_mesh(partitioning.MeshConfig(*sizes), devices)


def work_of(rows):
    return estimate.Work(rows, LENGTHS["encoder"], LENGTHS["decoder"])


def step_function(config, tx, mesh, parts):
    net = t5.T5(config, partitioning.activation_constraint(mesh))
    return train.jit_step(net, objectives.StepByStep(), tx, parts)


# --- Parameters, slots, batches -------------------------------------------------------------------

LARGE = t5.T5Config(vocab_size=32128, emb_dim=1024, num_heads=16, num_encoder_layers=24,
                    num_decoder_layers=24, head_dim=64, mlp_dim=2816)  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optimizer", [optim.Adafactor(), optim.AdamW()], ids=["factored", "adam"])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 1, 8), (1, 4, 2), (2, 2, 2)], ids=str)
def test_every_large_array_of_the_state_is_in_all_slices(sizes, optimizer, tied):
    """T5 1.1 large. What is not in all slices, such as the scales of norms, is below 1 MB."""
    mesh = make_mesh(sizes)
    config = dataclasses.replace(LARGE, logits_via_embedding=tied)
    state, batch, _ = plan.abstract_inputs(t5.T5(config), optimizer.build(10), mesh, work_of(2048))
    found = []
    for tree, slices in ((state, sizes[1] * sizes[2]), (batch, sizes[0] * sizes[1])):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            held = math.prod(x.sharding.shard_shape(x.shape))
            if x.size * x.dtype.itemsize > MEGABYTE and x.size // held < slices:
                found.append((partitioning.path_name(path), x.shape, x.sharding.spec))
    assert not found, "these are whole, or in fewer slices than the mesh has"


# --- What the compiled step holds -----------------------------------------------------------------

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}


def program_arrays(text):
    """(bytes, shape, line) of each array in a compiled program, without those inside of fusions."""
    inside = set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", text))
    computation = None
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            computation = head.group(1)
        elif " = " in line and computation not in inside:
            result = line.split(" = ", 1)[1]
            result = re.match(r"\(.*?\) [a-z]|\S+", result).group(0)
            for dtype, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]+)\]", result):
                shape = tuple(map(int, dims.split(",")))
                yield math.prod(shape) * BYTES.get(dtype, 4), shape, line.strip()


def axis_sizes(config, mesh, rows, parts):
    """Size of a dimension -> {(logical axis, is it whole)}; two axes may be one dimension."""
    batch, tensor = partitioning.batch_shards(mesh), mesh.shape["tensor"]
    axes = [
        ("batch", rows, batch), ("batch", rows // parts, batch), ("embed", config.emb_dim, 1),
        ("embed", config.emb_dim, mesh.shape["fsdp"]), ("vocab", config.vocab_size, tensor),
        ("mlp", config.mlp_dim, tensor), ("heads", config.num_heads, tensor),
        ("joined_kv", config.num_heads * config.head_dim, tensor),
        ("layers", config.num_encoder_layers, 1), ("layers", config.num_decoder_layers, 1),
        *(("length", length, tensor) for length in LENGTHS.values()),
    ]  # fmt: skip
    one = {}
    for name, size, shards in axes:
        one[size // shards] = {(name, False)}
    for name, size, shards in axes:
        if shards > 1:
            one[size] = {(name, True)}
    two = {a * b: one[a] | one[b] for a, b in itertools.product(one, one)}
    return two | one


def whole_arrays(text, config, mesh, rows, parts):
    """Arrays above 1 MB that lie whole where the mesh should slice them; with the reason."""
    known = axis_sizes(config, mesh, rows, parts)
    found = {}
    for size, shape, line in program_arrays(text):
        if size <= MEGABYTE or shape in found:
            continue
        dims = [known.get(d) for d in shape if d != 1]
        axes = set().union(*(d for d in dims if d))
        names, whole = {name for name, _ in axes}, {name for name, w in axes if w}
        is_weight = None not in dims and not names & {"batch", "length"}
        reason = ""
        if split := whole & {"batch", "vocab", "mlp", "heads", "joined_kv"}:
            reason = f"{split} whole"
        elif is_weight and "layers" in names and "embed" in whole:
            reason = "a whole stack of weights gathered over fsdp"
        elif {"layers", "embed", "batch"} <= names and "length" in whole:
            reason = "the stream of every layer, uncut along its length"
        elif not is_weight and not {name for name, w in axes if not w} & {"batch", "heads"}:
            reason = "not sliced at all"
        if reason:
            found[shape] = f"{shape}, {size / 1e6:.1f} MB, {reason}: {line[:300]}"
    return found


def compiled_step(config, mesh, tx, rows, parts):
    inputs = plan.abstract_inputs(t5.T5(config), tx, mesh, work_of(rows))
    return inputs, step_function(config, tx, mesh, parts).lower(*inputs).compile(QUICK)


# One-hot of the relative positions, [q, k, 32]: XLA:CPU makes it, on a TPU it is part of a product.
POSITIONS = {n * n * t5.RELPOS_BUCKETS for n in LENGTHS.values()}


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
def test_the_train_step_holds_nothing_large_whole(sizes):
    mesh = make_mesh(sizes)
    remat = "minimal" if sizes == (2, 2, 2) else "none"
    config = dataclasses.replace(WIDE, remat_policy=remat, dropout_rate=0.1 * (sizes == (2, 2, 2)))
    inputs, compiled = compiled_step(config, mesh, optim.Adafactor().build(10), ROWS, PARTS)
    found = whole_arrays(compiled.as_text(), config, mesh, ROWS, PARTS)
    found = {s: text for s, text in found.items() if math.prod(s) not in POSITIONS}
    assert not found, "\n".join(found.values())
    # And the new state is where the old one was, so that the next step is the same program.
    for old, new in zip(
        jax.tree.leaves(inputs[0]), jax.tree.leaves(compiled.output_shardings[0]), strict=True
    ):
        assert new.is_equivalent_to(old.sharding, old.ndim), (old, new)


# --- The same losses ------------------------------------------------------------------------------

TINY = t5.T5Config(vocab_size=96, dtype="float32", emb_dim=16, num_heads=8, num_encoder_layers=2,
                   num_decoder_layers=2, head_dim=4, mlp_dim=32, dropout_rate=0.1)  # fmt: skip
OPTIMIZERS = {
    "adafactor": optim.Adafactor(learning_rate=1e-2, min_dim_size_to_factor=8),
    "adamw": optim.AdamW(learning_rate=1e-3, schedule="constant"),
}


@functools.cache
def trained(sizes, optimizer, steps=3):
    """Scalars of each step, and the last parameters: dropout, packed rows, two micro-batches."""
    mesh, tx = make_mesh(sizes), OPTIMIZERS[optimizer].build(steps)
    pairs = examples(16, seed=3)
    arrays = batch_of(pairs, (16, 16), row_multiple=16)
    where = jax.tree.map(lambda x: x.sharding, train.abstract_state(t5.T5(TINY), tx, mesh))
    params = jax.device_put(numpy_params(TINY, scale=0.2), where.params)
    state = train.TrainState(
        jax.device_put(jnp.int32(0), where.step), params,
        jax.jit(tx.init, out_shardings=where.opt_state)(params),
    )  # fmt: skip
    batch = partitioning.shard_batch(mesh, arrays)
    key = jax.device_put(jax.random.key(7), partitioning.replicated(mesh))
    step = step_function(TINY, tx, mesh, parts=2).lower(state, batch, key).compile(QUICK)
    scalars = []
    for _ in range(steps):
        state, values = step(state, batch, key)
        scalars.append(jax.device_get(values))
    return scalars, jax.device_get(state.params)


@pytest.mark.parametrize(
    "optimizer,sizes",
    [
        *(("adafactor", sizes) for sizes in [(1, 4, 1), (1, 1, 8), (2, 2, 2)]),
        *(
            pytest.param(optimizer, sizes, marks=pytest.mark.slow)
            for optimizer in OPTIMIZERS
            for sizes in [(2, 1, 1), (8, 1, 1), (1, 8, 1), (4, 1, 2), (2, 4, 1), (1, 2, 4)]
        ),
        pytest.param("adamw", (2, 2, 2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_no_mesh_changes_the_losses(optimizer, sizes):
    """On 2, 4 and 8 devices, every axis alone and combined, as on one device: losses to 1e-5."""
    (want, want_params), (got, params) = trained((1, 1, 1), optimizer), trained(sizes, optimizer)
    for name in want[0]:
        np.testing.assert_allclose(
            [s[name] for s in got], [s[name] for s in want], rtol=1e-5, err_msg=name
        )
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(want_params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
