"""The short way through the benchmarks that have one: what they save is there and adds up."""

import json
import os
import statistics
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hugging_face_t5 import require_torch
from test_structure import HEAVY, ROOT

FOLDER = ROOT / "scripts" / "benchmarks"
# Times mean nothing here.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
BYTES = ("--mixture=arithmetic_step_by_step", "--vocabulary=bytes")


def run(script, *arguments, python_path=()):
    """Runs a benchmark; returns what it printed."""
    path = os.pathsep.join(map(str, [*python_path, ROOT]))
    flags = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"
    done = subprocess.run(
        [sys.executable, FOLDER / script, *map(str, arguments)], capture_output=True, text=True,
        timeout=500, env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": flags},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_about(about, *packages):
    assert about["machine"]["cores"] >= 1 and about["machine"]["device"]
    assert about["versions"].keys() >= {"python", "jax", "jaxlib", "flax", "optax", *packages}
    assert about["versions"]["jax"] and about["date"].startswith("20")
    assert about["command"].startswith("python ")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return f"--cache_dir={tmp_path_factory.mktemp('cache')}"


@pytest.mark.parity
def test_train_step(tmp_path, cache_dir):
    require_torch()
    file, rounds = tmp_path / "result.json", 2
    shown = run("train_step.py", *BYTES, cache_dir, "--model=t5_1_1/tiny", "--pairs=4",
                f"--rounds={rounds}", "--products=1", f"--json={file}")  # fmt: skip
    found = json.loads(file.read_text())
    check_about(found["about"], "torch", "transformers")
    loss = found["loss"]
    assert loss["relative_difference"] < 1e-4 and "loss equality" in shown
    for mine, theirs in zip(loss["ours"]["parts"], loss["torch"]["parts"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4) and mine > 1
    assert loss["ours"]["parts"][0] != pytest.approx(loss["ours"]["parts"][1], rel=1e-3)

    steps = {row["name"]: row for row in found["steps"]}
    assert steps.keys() == {"ours", "torch", "compute"}
    tokens = {}
    for name, row in steps.items():
        turns = row["turns"]["seconds"]
        assert len(turns) == len(row["turns"]["cpu_seconds"]) == rounds
        assert row["seconds_per_step"] == statistics.median(turns)
        assert row["pairs_per_second"] == pytest.approx(
            statistics.median(4 / seconds for seconds in turns)
        )
        assert 0 <= row["padding"] < 1 and row["cpu_seconds_per_step"] > 0
        tokens[name] = row["tokens_per_second"] / row["pairs_per_second"]  # of a pair
    assert tokens["ours"] == pytest.approx(tokens["torch"], rel=0.05)  # rates are two medians
    assert steps["ours"]["peak_bytes"] > 1e8 and steps["torch"]["peak_bytes"] > 1e8
    assert found["ratio"] == pytest.approx([
        b / a for a, b in zip(*(steps[n]["turns"]["seconds"] for n in ("ours", "torch")),
                              strict=True)
    ])  # fmt: skip
    assert found["loader"]["batches_per_second"] > 0
    names = {f"{library} {dtype}" for library in ("XLA", "torch") for dtype in
             ("float32", "bfloat16")}  # fmt: skip
    assert {row["name"] for row in found["products"]} == names
    assert all(len(row["turns"]) == rounds for row in found["products"])


def test_checkpoint(tmp_path):
    file = tmp_path / "result.json"
    run("checkpoint.py", "--model=t5_1_1/tiny", "--rounds=3", f"--folder={tmp_path}",
        f"--json={file}")  # fmt: skip
    found = json.loads(file.read_text())
    check_about(found["about"], "orbax-checkpoint")
    for name in ("blocking", "committed", "restore", "verify"):
        assert len(found["turns"][name]) == 3
        assert found[f"{name}_seconds"] == statistics.median(found["turns"][name])
    assert found["blocking_seconds"] < found["committed_seconds"]
    assert found["verify_seconds"] < found["restore_seconds"]
    # Parameters and two moments in float32, and random values hardly compress.
    assert found["state_bytes"] >= 12 * found["setting"]["parameters"]
    assert 0.9 < found["bytes"] / found["state_bytes"] < 1.1


def test_scaling(tmp_path):
    file = tmp_path / "result.json"
    run("scaling.py", "--axes=fsdp", "--devices=1,2", f"--json={file}")
    found = json.loads(file.read_text())
    check_about(found["about"])
    points = {(row["axis"], row["value"]): row for row in found["points"]}
    assert points.keys() == {("fsdp", 1), ("fsdp", 2)}
    for row in points.values():
        assert row["flops"] == pytest.approx(row["formula_flops"], rel=0.05)
        assert row["xla_flops"] < 0.8 * row["flops"]  # which counts a loop once
    assert not points["fsdp", 1]["collectives"] and points["fsdp", 1]["sent_bytes"] == 0
    assert points["fsdp", 2]["collectives"]["all-gather"]["count"] > 0
    # Half of three copies of the parameters, about: gathered twice, and their gradients.
    assert points["fsdp", 2]["sent_bytes"] > 1.35 * 4 * points["fsdp", 2]["parameters"]
    assert points["fsdp", 2]["relative_difference"] < 1e-5
    assert len(points["fsdp", 2]["losses"]["loss"]) == 2
    assert points["fsdp", 2]["losses"]["loss"][0] != points["fsdp", 2]["losses"]["loss"][1]
    (fit,) = found["exponents"]
    assert fit["flops"] == pytest.approx(-1, abs=0.05) and fit["formula_flops"] == pytest.approx(-1)
    assert [row["model"] for row in found["formula"]][-1] == "t5_1_1/xxl"


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_accelerator(tmp_path, cache_dir):
    """Real batches, then a machine without the data side; torch's rows are left to the dry run."""
    batches, out = tmp_path / "batches.npz", tmp_path / "rows.jsonl"
    run("accelerator.py", "--dry_run", f"--prepare={batches}", *BYTES, cache_dir)
    with np.load(batches, allow_pickle=False) as file:
        arrays = dict(file)
    assert "arithmetic_step_by_step" in str(arrays["source"])
    for number in range(4):
        of = {n.split(":", 3)[3]: a for n, a in arrays.items() if n.startswith(f"tiny:4:{number}:")}
        for group, stream in enumerate(("predict", "explain")):
            mine = of["decoder_target_tokens"][
                (of["decoder_loss_groups"] == group) & (of["decoder_loss_weights"] > 0)
            ]
            theirs = of[f"{stream}:targets"]
            assert len(theirs) == 4 and (np.sort(mine) == np.sort(theirs[theirs > 0])).all()

    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
        import sys

        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {(*HEAVY, "sentencepiece")!r}:
                    raise ImportError(f"a machine with an accelerator has no {{name}}")

        sys.meta_path.insert(0, Block())
    """)
    )
    names = "product,ours tiny,ours tiny fused"
    call = ("--dry_run", f"--batches={batches}", f"--only={names}", f"--out={out}")
    run("accelerator.py", *call, python_path=[tmp_path])
    about, *found = rows_of(out)
    check_about(about)
    assert about["kind"] == "about" and about["batches"] == str(arrays["source"])
    product, ours, fused = found
    assert [row["name"] for row in found] == names.split(",")
    assert fused["status"] == "not measured" and fused["error"] == "needs a GPU"
    assert product["status"] == ours["status"] == "measured", ours
    assert ours["seconds_per_step"] == statistics.median(ours["turns"])
    assert len(ours["turns"]) >= 3 and ours["compile_seconds"] > 0 and ours["platform"] == "cpu"
    tokens = np.mean([
        sum((arrays[f"tiny:4:{n}:{side}_segment_ids"] > 0).sum() for side in ("encoder", "decoder"))
        for n in range(4)
    ])  # fmt: skip
    assert ours["tokens_per_step"] == tokens
    # At least two products a parameter that is no embedding, forward and twice backward.
    assert ours["model_flops_per_step"] > 6 * 100_000 * tokens / 3
    rate = ours["model_flops_per_step"] / ours["seconds_per_step"]
    assert ours["mfu"] == pytest.approx(rate / product["flops_per_second"])
    assert ours["loss"][1] < ours["loss"][0] + 0.1

    run("accelerator.py", *call)  # goes on where the last call ended: what failed is tried again
    again, *rest = rows_of(out)[4:]
    assert again["kind"] == "about" and [row["name"] for row in rest] == ["ours tiny fused"]
    # Rows of other batches are somebody else's.
    np.savez(tmp_path / "others.npz", **arrays | {"source": np.array("others")})
    others = [a.replace("batches.npz", "others.npz") for a in call]
    run("accelerator.py", *others, "--only=product")
    assert [row.get("name") for row in rows_of(out)[6:]] == [None, "product"]


def test_accelerator_keeps_going_after_a_row_that_failed(tmp_path):
    batches, out = tmp_path / "batches.npz", tmp_path / "rows.jsonl"
    np.savez(batches, source=np.array("nothing"))
    shown = run("accelerator.py", "--dry_run", f"--batches={batches}", f"--out={out}",
                "--only=ours tiny,ours tiny fused")  # fmt: skip
    _, failed, fused = rows_of(out)
    assert failed["status"] == "failed"
    assert failed["error"].startswith("ValueError: --batches=") and "--prepare" in failed["error"]
    assert fused["status"] == "not measured" and "needs a GPU" in shown
