"""Plans by formula, the search, and the command; tests/test_topology.py compiles."""

import dataclasses
import json
import subprocess
import sys

import pytest
from test_structure import ROOT

from distill import convert, estimate, objectives, optim, partitioning, plan

XL = dataclasses.replace(
    convert.released_config("t5_1_1/xl"), dtype="bfloat16", remat_policy="minimal"
)


def setup(model=XL, rows=128, parts=1, **mesh):
    return plan.Setup(
        model, optim.Adafactor(), objectives.StepByStep(), partitioning.MeshConfig(**mesh),
        estimate.Work(rows, 1024, 256, parts),
    )  # fmt: skip


def test_gpus_are_planned_by_formula():
    where = plan.topology("h100-80gb:8")
    assert where.devices is None and where.size == 8
    found = plan.estimated(setup(fsdp=8), where)
    assert not found.verified and found.fits
    assert found.memory["parameters"] == pytest.approx(2_849_757_184 * 4 / 8, rel=1e-3)
    text = plan.describe(found, steps=10_000)
    assert "by formula, unverified" in text and "chip-hours, 10,000 steps" in text
    assert found.chip_hours(3600) == pytest.approx(8 * found.step_seconds)


@pytest.mark.parametrize("name", ["v5e", "v5e:", "v7:2x2", "h100:8", "v5e:axb", "v5e:4", "v5e:0x4"])
def test_unknown_topologies_name_the_known(name):
    with pytest.raises(ValueError, match=f"--topology={name}.*(Chips: v4|2x4)"):
        plan.topology(name)


def test_search_prefers_what_is_fast_and_fits():
    where = plan.topology("a100-40gb:8")
    tried = list(plan.search(setup(), where))
    assert len(tried) == 3 and all(p.fits for _, p in tried)
    best = tried[0][1]
    for policy in ("none", "minimal", "full"):
        for parts in (1, 4, 16):
            model = dataclasses.replace(XL, remat_policy=policy)
            for fsdp, tensor in ((8, 1), (4, 2), (1, 8)):
                other = plan.estimated(setup(model, 128, parts, fsdp=fsdp, tensor=tensor), where)
                assert other.peak > 0.9 * other.chip.hbm or (
                    best.step_seconds <= other.step_seconds + 0.1 * other.seconds["network"]
                )
    flags = plan.recommendation(tried[0][0])
    assert "--gin.MeshConfig.fsdp=" in flags and "--gin.T5Config.remat_policy=" in flags


def test_search_says_that_nothing_fits():
    xxl = dataclasses.replace(convert.released_config("t5_1_1/xxl"), dtype="bfloat16")
    tried = list(plan.search(setup(xxl), plan.topology("a100-40gb:1")))
    assert tried and not any(p.fits for _, p in tried)


def test_rows_that_no_mesh_divides():
    with pytest.raises(ValueError, match="BATCH_SIZE=7 .* choose a multiple of 16"):
        list(plan.search(setup(rows=7), plan.topology("h100-80gb:16")))


@pytest.mark.parametrize(
    "message, bytes_",
    [
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
         "required for HLO temporaries (18.50G) exceeds available HBM (15.75G).", 18.5 * 2**30 + 7),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 900.5M of 15.75G hbm.",
         900.5 * 2**20),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 30M of 16M vmem.", None),
        ("INTERNAL: something else", None),
    ],
)  # fmt: skip
def test_what_the_compiler_says_of_memory(message, bytes_):
    assert plan.needed(message, held=7) == bytes_


def test_search_leaves_out_what_training_would_refuse():
    work = estimate.Work(2, 100, 50)
    with pytest.raises(ValueError, match="cannot be divided"):  # tensor = 4 does not divide 50
        list(plan.search(dataclasses.replace(setup(), work=work), plan.topology("h100-80gb:8")))


def command(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "scripts/plan.py", "--gin_file=t5_1_1/xl.gin",
         "--gin_file=step_by_step.gin", *arguments],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_the_command(tmp_path):
    done = command("--topology=h200-141gb:8", "--search", f"--output={tmp_path / 'plan.json'}",
                   "--gin.BATCH_SIZE=64")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "64 rows of 1024 + 256 tokens" in done.stdout
    assert "fastest that fits: --gin.MeshConfig.data=" in done.stdout
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["fits"] and not saved["verified"] and saved["tokens"] == 64 * 1280


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--topology is missing"),
        (["--topology=h100:8"], "Chips: v4, v5e"),
        (["--topology=h100-80gb:8", "--gin.PAIRS_PER_STEP=64"], "--gin.PAIRS_PER_STEP=None"),
        (
            ["--topology=h100-80gb:8", "--gin.BATCH_SIZE=12", "--gin.MeshConfig.fsdp=8"],
            "16 would do",
        ),
        (["--topology=h100-80gb:8", "--output=/no/such/folder/x.json"], "there is no folder"),
        (["--topology=h100-80gb:8", "--decode_rows=8"], "possible for TPUs"),
        (["--topology=h100-80gb:8", "--gin.MeshConfig.fsdp=3"], "there are 8"),
    ],
)
def test_errors_of_the_command(arguments, message):
    done = command(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
