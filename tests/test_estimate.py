"""Formulas of memory, products and the mesh."""

import dataclasses

import pytest

from distill import convert, estimate, objectives, optim, plan
from distill.estimate import CHIPS, GIB, Work
from distill.partitioning import MeshConfig

BASE, XL, XXL = (
    dataclasses.replace(convert.released_config(f"t5_1_1/{name}"), dtype="bfloat16")
    for name in ("base", "xl", "xxl")
)


# GiB of a chip at its peak, code included, as libtpu 0.0.51 compiled the train step with rows of
# 1,024 + 256 tokens (jax 0.12.0.1, 2026-11-21): scripts/plan.py, commands in docs/scale.md.
COMPILED = [
    ("xxl", "v5p:4x4x4", (16, 4), 128, "minimal", 1, "Adafactor", 7.857),
    ("xxl", "v5p:4x4x4", (16, 4), 128, "full", 1, "Adafactor", 4.018),
    ("xxl", "v4:4x4x4", (16, 4), 128, "minimal", 1, "Adafactor", 7.746),
    ("xxl", "v6e:8x8", (16, 4), 128, "minimal", 1, "Adafactor", 7.723),
    ("xxl", "v5e:16x16", (32, 8), 256, "minimal", 1, "Adafactor", 3.790),
    ("xxl", "v5p:4x4x4", (16, 4), 128, "full", 2, "Adafactor", 3.667),
    ("base", "v5e:2x4", (4, 1), 64, "minimal", 1, "Adafactor", 3.603),
    ("large", "v5e:2x4", (8, 1), 128, "minimal", 2, "Adafactor", 8.202),
    ("xxl", "v5p:4x4x4", (16, 4), 128, "full", 4, "Adafactor", 3.102),
    ("xxl", "v5p:4x4x4", (16, 4), 128, "attention", 1, "Adafactor", 5.576),
    ("small", "v5e:2x2", (1, 1), 64, "minimal", 1, "Adafactor", 2.817),
    ("base", "v5e:2x4", (4, 2), 64, "full", 1, "AdamW", 2.097),
]
DEVICES = {
    "v4:4x4x4": 64, "v5p:4x4x4": 64, "v6e:8x8": 64, "v5e:16x16": 256, "v5e:2x4": 8, "v6e:2x4": 8,
    "v5e:2x2": 4, "v5p:2x2x1": 4, "v5e:4x4": 16,
}  # fmt: skip


def chosen(model, chip, devices, rows=128, optimizer=None, **sizes):
    mesh = estimate.choose_mesh(
        MeshConfig(**sizes), model, optimizer or optim.Adafactor(), rows,
        CHIPS[chip] if chip else None, devices,
    )  # fmt: skip
    return mesh.sizes


@pytest.mark.parametrize(
    "model, chip, devices, expected",
    [
        (BASE, "v5e", 8, dict(data=-1, fsdp=1, tensor=1)),  # 2 GB a copy
        (XL, "v5e", 16, dict(data=-1, fsdp=4, tensor=1)),  # 23 GB
        (XXL, "v5p", 64, dict(data=-1, fsdp=4, tensor=1)),  # 89 GB
        (XXL, "v5e", 256, dict(data=-1, fsdp=8, tensor=2)),  # 128 rows, so 128 shares
        (XXL, None, 8, dict(data=-1, fsdp=1, tensor=1)),  # CPUs
    ],
)
def test_mesh_is_chosen_for_model_and_devices(model, chip, devices, expected):
    assert chosen(model, chip, devices) == expected


def test_slots_of_adamw_need_more_slices():
    assert chosen(XL, "v5p", 8)["fsdp"] == 1
    assert chosen(XL, "v5p", 8, optimizer=optim.AdamW())["fsdp"] == 2


def test_what_is_given_stays():
    assert chosen(XXL, "v5p", 64, fsdp=32) == dict(data=-1, fsdp=32, tensor=1)
    assert chosen(XXL, "v5p", 64, tensor=4)["tensor"] == 4
    assert chosen(XXL, "v5p", 64, data=64) == dict(data=64, fsdp=1, tensor=1)
    assert chosen(XXL, "v5p", 64, data=2) == dict(data=2, fsdp=32, tensor=1)
    assert chosen(BASE, None, 8, rows=4) == dict(data=-1, fsdp=1, tensor=1)  # CPUs


def test_tensor_is_only_chosen_where_it_divides():
    odd = dataclasses.replace(BASE, vocab_size=32101)
    assert chosen(BASE, "v5e", 8, rows=4)["tensor"] == 2
    assert chosen(odd, "v5e", 8, rows=4)["tensor"] == 1
    assert chosen(BASE, "v5e", 8, rows=4, fsdp=8)["tensor"] == 1
    assert chosen(XXL, "v5e", 256, rows=None)["tensor"] == 1  # rows are rounded up


def test_products_of_a_step_are_those_of_the_published_formula():
    """8.7e13 a chip of 64 for XXL with 128 rows of 1,024 + 256 (performance facts, by hand)."""
    made, needed = estimate.flops(XXL, Work(128, 1024, 256))
    assert made == needed == pytest.approx(64 * 8.7145e13, rel=1e-4)


def test_recomputation_grows_with_the_policy():
    work = Work(128, 1024, 256)
    share = []
    for policy in ("none", "minimal", "attention", "out", "full"):
        made, needed = estimate.flops(dataclasses.replace(XXL, remat_policy=policy), work)
        share.append(1 - needed / made)
    assert share == sorted(share) and share[0] == 0
    assert share[1] == pytest.approx(0.0123, abs=2e-4)
    assert share[-1] < 1 / 4  # one forward pass in four is all that there is


def test_memory_by_hand():
    """XXL, minimal, 8 rows on a device, tensor 4: each layer keeps what REMAT_POLICIES name."""
    model = dataclasses.replace(XXL, remat_policy="minimal")
    memory = estimate.memory(model, Work(128, 1024, 256), dict(data=1, fsdp=16, tensor=4), 7e8, 1e6)
    inputs, targets, stream, wide = 8 * 1024, 8 * 256, 2 * 4096 // 4, 2 * 2 * 10240 // 4
    encoder = inputs * (5 * stream + wide)  # the stream, attention's output, q, k, v
    decoder = targets * (7 * stream + wide) + inputs * 2 * stream  # and keys, values of the inputs
    assert memory.saved == 24 * (encoder + decoder)
    # Most is needed where the backward pass enters the decoder: scores of two types and their
    # gradients, the stream on its way, three times the encoder's, and two slices of logits.
    scores = 2 * 6 * 8 * 16 * 256 * 1024
    logits = 2 * 8 * 256 * 32128 // 4 * 4
    assert memory.workspace == scores + (8 * targets + 3 * inputs) * 2 * 4096 + logits
    assert memory.gradients == 7e8
    assert memory.total == pytest.approx(
        memory.saved + 2 * 7e8 + 1e6 + memory.batch + memory.workspace + memory.code
    )
    two = estimate.memory(model, Work(256, 1024, 256, 2), dict(data=1, fsdp=16, tensor=4), 7e8, 1e6)
    assert two.saved == memory.saved and two.gradients == 7e8 * (
        1 + 1 + 1 / 2
    )  # sum, bfloat16 copy


def test_large_logits_are_not_held_whole():
    """A vocabulary ten times as large needs no more, once slices are taken."""
    mesh, work = dict(data=1, fsdp=1, tensor=1), Work(512, 512, 256)
    model = dataclasses.replace(BASE, remat_policy="full", attention="fused")
    large = dataclasses.replace(model, vocab_size=10 * model.vocab_size)
    totals = [estimate.memory(m, work, mesh, 1e9, 0).total for m in (model, large)]
    assert totals[0] == totals[1]


@pytest.mark.parametrize("name, topology, sizes, rows, policy, parts, optimizer, peak", COMPILED)
def test_memory_is_near_what_compilers_said(
    name, topology, sizes, rows, policy, parts, optimizer, peak
):
    """The table in docs/scale.md: within 15 %."""
    model = dataclasses.replace(
        convert.released_config(f"t5_1_1/{name}"), dtype="bfloat16", remat_policy=policy
    )
    setup = plan.Setup(
        model, getattr(optim, optimizer)(), objectives.StepByStep(),
        MeshConfig(-1, *sizes), Work(rows, 1024, 256, parts),
    )  # fmt: skip
    where = plan.Topology(topology, CHIPS[topology.split(":")[0]], None, DEVICES[topology])
    assert plan.estimated(setup, where).peak == pytest.approx(peak * GIB, rel=0.15)


def test_memory_shrinks_with_the_policy():
    mesh = dict(data=1, fsdp=16, tensor=4)
    totals = []
    for policy in ("minimal", "attention", "out", "full"):
        model = dataclasses.replace(XXL, remat_policy=policy)
        memory = estimate.memory(model, Work(128, 1024, 256), mesh, 7e8, 1e6)
        totals.append(memory.total)
    assert totals == sorted(totals, reverse=True)
