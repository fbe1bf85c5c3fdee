"""Checkpoints under real faults: flipped and missing files, kills, full disks, foreign folders."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from distill import checkpoints

ROOT = pathlib.Path(__file__).resolve().parent.parent


def make_state(seed: int = 0):
    """A small state with each kind of leaf that a run has; values from numpy."""
    rng = np.random.default_rng(seed)
    params = {
        "encoder": {"layers": {"kernel": jnp.asarray(rng.normal(size=(2, 8, 16)), jnp.float32)}},
        "scale": jnp.asarray(rng.normal(size=(8,)), jnp.bfloat16),
    }
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3), optax.identity())
    return {"params": params, "opt_state": tx.init(params), "step": jnp.int32(seed)}


def abstract(tree, sharding=None):
    def leaf(x):
        x = x if hasattr(x, "dtype") else np.asarray(x)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, tree)


def assert_bitwise(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert a.tobytes() == b.tobytes(), path


def save(folder, *steps, **options):
    """Saves `make_state(step)` for each step and waits."""
    with checkpoints.Checkpointer(folder, **options) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), {"step": step})


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path: pathlib.Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A MODEL_DIR with checkpoints 1 and 2; copy it before damaging it."""
    folder = tmp_path_factory.mktemp("saved")
    save(folder, 1, 2)
    return folder


@pytest.fixture
def model_dir(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "model"))


# ---- what goes in comes out ---------------------------------------------------------------------


def test_every_kind_of_leaf_round_trips_bitwise(tmp_path):
    rng = np.random.default_rng(0)
    state = make_state(3) | {
        "odd": {
            "nan": np.asarray([np.nan, -0.0, np.inf, 1e-45], np.float32),
            "bf16_bits": rng.integers(0, 2**16, 64, np.uint16).view(jnp.bfloat16),
            "int64": np.int64(-(2**62)),
            "bool": np.asarray([True, False]),
            "python": [3, 2.5],
            "none": None,
            "not_contiguous": rng.normal(size=(6, 4)).T,
        }
    }
    metadata = {"step": 3, "data": {"position": 17}, "loss": float("inf"), "name": "ä\u2028"}
    with checkpoints.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state, metadata)
        restored, got = checkpointer.restore(abstract(state))
    assert_bitwise(restored, state)
    assert got == metadata == checkpoints.read_metadata(tmp_path / "checkpoint_3")
    assert type(restored["opt_state"][1][0]) is type(state["opt_state"][1][0])


def test_leaf_names_are_keys_joined_with_slashes(saved):
    manifest = json.loads((saved / "checkpoint_1" / "manifest.json").read_bytes())
    assert manifest["leaves"]["params/encoder/layers/kernel"] == [[2, 8, 16], "float32"]
    assert manifest["leaves"]["opt_state/1/0/mu/scale"] == [[8], "bfloat16"]
    assert manifest["leaves"]["step"] == [[], "int32"]


def test_donated_and_overwritten_buffers_are_safe(tmp_path):
    big = jnp.asarray(np.random.default_rng(0).normal(size=(1000, 1000)), jnp.float32)
    host = np.arange(1000, dtype=np.float32)
    want = {"params": {"big": np.array(big), "host": host.copy()}}
    overwrite = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    with checkpoints.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, {"params": {"big": big, "host": host}}, {})
        for _ in range(5):
            big = overwrite(big)
        host[:] = -1
        restored, _ = checkpointer.restore(abstract(want))
    assert_bitwise(restored, want)


def test_restores_onto_other_shardings(tmp_path):
    devices = jax.devices()
    if len(devices) < 8:
        pytest.skip("needs 8 devices: XLA_FLAGS=--xla_force_host_platform_device_count=8")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    one = jax.sharding.SingleDeviceSharding(devices[0])
    value = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
    for step, (source, target) in enumerate([(one, split), (split, one), (split, split)]):
        state = {"params": {"w": jax.device_put(value, source)}}
        with checkpoints.Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(step, state, {})
            restored, _ = checkpointer.restore(abstract(state, target))
        assert restored["params"]["w"].sharding == target
        assert_bitwise(restored, state)


# ---- damage -------------------------------------------------------------------------------------


def test_a_flipped_bit_in_any_file_is_detected(model_dir):
    folder = model_dir / "checkpoint_2"
    rng, target = random.Random(0), abstract(make_state(2))
    names = [path for path in files(folder) if path.name != "manifest.json"]
    assert len(names) > 15
    for path in names:
        before = path.read_bytes()
        flip(path, rng.randrange(len(before)))
        problems = checkpoints.verify(folder)
        assert len(problems) == 1 and str(path) in problems[0]
        with pytest.raises(ValueError, match=path.name):
            checkpoints.restore(folder, target)
        path.write_bytes(before)
    assert checkpoints.verify(folder) == []


def test_a_flipped_bit_anywhere_in_the_manifest_is_detected(model_dir):
    path = model_dir / "checkpoint_2" / "manifest.json"
    before = path.read_bytes()
    rng = random.Random(0)
    for at in [0, len(before) - 1, *rng.sample(range(len(before)), 60)]:
        flip(path, at)
        assert checkpoints.verify(path.parent) != [], at
        path.write_bytes(before)
    for cut in (0, 1, len(before) // 2, len(before) - 1):
        path.write_bytes(before[:cut])
        assert checkpoints.verify(path.parent) != [], cut
    assert checkpoints.Checkpointer(model_dir).steps() == [1]
    assert path.parent.is_dir()  # skipped, kept as evidence


def test_any_removed_file_is_detected(model_dir):
    folder = model_dir / "checkpoint_2"
    for path in files(folder):
        aside = model_dir / "aside"
        path.rename(aside)
        assert len(checkpoints.verify(folder)) == 1
        with pytest.raises(ValueError):
            checkpoints.restore(folder, abstract(make_state(2)))
        aside.rename(path)
    assert checkpoints.verify(folder) == []


def test_damaged_newest_is_set_aside_and_the_one_before_is_used(model_dir, caplog):
    victim = max(files(model_dir / "checkpoint_2" / "state"), key=lambda p: p.stat().st_size)
    flip(victim, 100)
    with checkpoints.Checkpointer(model_dir) as checkpointer:
        target = abstract(make_state(1))
        with pytest.raises(ValueError, match="damaged"):
            checkpointer.restore(target, step=2)
        assert (model_dir / "checkpoint_2").is_dir()  # an explicit step is only reported
        restored, metadata = checkpointer.restore(target)
        assert metadata == {"step": 1} and checkpointer.steps() == [1]
        assert_bitwise(restored, make_state(1))
        lines = [r.getMessage() for r in caplog.records if "corrupt" in r.getMessage()]
        assert len(lines) == 1 and victim.name in lines[0]
        checkpointer.save(2, make_state(2), {})  # its place is free again
        checkpointer.wait()
        assert checkpointer.steps() == [1, 2]
        for name in ("checkpoint_1", "checkpoint_2"):
            flip(model_dir / name / "metadata.json", 0)
        with pytest.raises(FileNotFoundError, match="no intact checkpoint"):
            checkpointer.restore(target)
    assert (model_dir / "checkpoint_2.corrupt-1").is_dir()


def test_a_target_that_differs_is_refused_with_all_rows_and_nothing_is_set_aside(model_dir):
    target = abstract(make_state(2))
    target["params"]["scale"] = jax.ShapeDtypeStruct((8,), jnp.float32)
    target["params"]["encoder"]["layers"]["kernel"] = jax.ShapeDtypeStruct((3, 8, 16), jnp.float32)
    target["params"]["new"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    del target["step"]
    shutil.rmtree(model_dir / "checkpoint_2" / "state")  # found before any array is looked for
    checkpointer = checkpoints.Checkpointer(model_dir)
    for attempt in (
        lambda: checkpointer.restore(target),
        lambda: checkpointer.restore(target, step=2),
        lambda: checkpoints.restore(model_dir / "checkpoint_2", target),
    ):
        with pytest.raises(ValueError, match="4 of 9 leaves differ") as error:
            attempt()
        rows = [line.split() for line in str(error.value).splitlines()[1:]]
        assert rows == [
            ["leaf", "want", "have"],
            ["params/encoder/layers/kernel", "float32[3,8,16]", "float32[2,8,16]"],
            ["params/new", "int32[1]", "(absent)"],
            ["params/scale", "float32[8]", "bfloat16[8]"],
            ["step", "(absent)", "int32[]"],
        ]
    assert checkpointer.steps() == [1, 2]


def test_a_cast_by_jax_is_refused(tmp_path):
    state = {"step": np.int64(2**40)}
    with checkpoints.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state, {})
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        with pytest.raises(ValueError, match="jax_enable_x64"):
            checkpointer.restore(abstract(state, device))
        assert_bitwise(checkpointer.restore(abstract(state))[0], state)


def test_params_alone_do_not_need_the_optimizer(model_dir):
    folder, state = model_dir / "checkpoint_2", make_state(2)
    shutil.rmtree(folder / "state" / "opt_state")
    params, metadata = checkpoints.restore(folder, abstract(state["params"]), subtree="params")
    assert_bitwise(params, state["params"])
    assert metadata == {"step": 2}
    assert checkpoints.restore(folder, abstract(state["step"]), subtree="step")[0] == 2
    with pytest.raises(ValueError, match="opt_state"):
        checkpoints.restore(folder, abstract(state))
    with pytest.raises(ValueError, match="it has opt_state, params, step"):
        checkpoints.restore(folder, abstract(state["params"]), subtree="ema")
    flip(next(p for p in files(folder / "state" / "params") if p.parent.name == "d"), 20)
    with pytest.raises(ValueError, match="damaged"):
        checkpoints.restore(folder, abstract(state["params"]), subtree="params")


# ---- kills and failing disks --------------------------------------------------------------------

CHILD = """
import sys
import numpy as np
from distill import checkpoints

def state(step):
    rng = np.random.default_rng(step)
    return {"params": {str(i): rng.normal(size=(64, 1024)) for i in range(8)}, "step": step}

with checkpoints.Checkpointer(sys.argv[1], keep=2) as checkpointer:
    step = checkpointer.latest() or 0
    while True:
        step += 1
        checkpointer.save(step, state(step), {"step": step}, float(-step))
        checkpointer.wait()
        print(step, flush=True)
"""


def child(code: str, *args, **options) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **options,
    )  # fmt: skip


def test_sigkill_during_saves_loses_nothing_committed(tmp_path):
    rng = random.Random(time.time_ns())
    for _ in range(6):
        process = child(CHILD, tmp_path)
        committed = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        committed = int(rest[-1]) if rest else committed
        with checkpoints.Checkpointer(tmp_path, keep=2) as checkpointer:
            latest = checkpointer.latest()
            assert latest in (committed, committed + 1)  # killed between manifest and print
            values = np.random.default_rng(latest)
            want = {
                "params": {str(i): values.normal(size=(64, 1024)) for i in range(8)},
                "step": latest,
            }
            restored, metadata = checkpointer.restore(abstract(want))
            assert metadata == {"step": latest}
            assert_bitwise(restored, want)
            assert checkpoints.verify(tmp_path / f"checkpoint_{latest}") == []
            # Opening removed what the kill left: every byte belongs to a committed checkpoint.
            owners = {path.relative_to(tmp_path).parts[0] for path in files(tmp_path)}
            assert owners == {f"checkpoint_{step}" for step in checkpointer.steps()}


FULL_DISK = """
import resource, sys
import numpy as np
from distill import checkpoints

state = {"params": {"w": np.random.default_rng(0).normal(size=(512, 512))}}
checkpointer = checkpoints.Checkpointer(sys.argv[1])
checkpointer.save(1, state, {})
checkpointer.wait()
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
for step in (2, 3):  # a write that fails half way, twice in a row
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        checkpointer.save(step, state, {})
        print("started", step)
        if step == 2:
            checkpointer.wait()
        else:
            checkpointer.save(4, state, {})
    except RuntimeError as error:
        print("raised", step, "not saved" in str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, limits)
checkpointer.wait()  # raised once
checkpointer.save(4, state, {})
checkpointer.save(2, state, {})
checkpointer.close()
print(checkpointer.steps())
"""


def test_a_failed_write_surfaces_once_and_later_saves_work(tmp_path):
    out = child(FULL_DISK, tmp_path).communicate(timeout=60)[0].splitlines()
    assert out == ["started 2", "raised 2 True", "started 3", "raised 3 True", "[1, 2, 4]"]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_1", "checkpoint_2", "checkpoint_4"]
    assert all(checkpoints.verify(tmp_path / name) == [] for name in os.listdir(tmp_path))


def test_too_full_a_disk_is_found_before_writing(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    checkpoints._require_space(tmp_path / "not" / "yet", free // 2)
    with pytest.raises(OSError, match="bytes .* of state plus 10 %.* are free") as error:
        checkpoints._require_space(tmp_path, free)
    assert f"{free:,}" in str(error.value)


def test_a_save_asks_for_its_space_first(tmp_path, monkeypatch):
    # A pretended disk: were the check to go missing, a truly huge state would fill the real one.
    usage = shutil.disk_usage(tmp_path)._replace(free=4_399)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage)
    with checkpoints.Checkpointer(tmp_path / "model") as checkpointer:
        with pytest.raises(OSError, match="needs 4,400 bytes .*4,000 of state"):
            checkpointer.save(0, {"params": {"w": np.zeros(1000, np.float32)}}, {})
    assert not (tmp_path / "model").exists()


# ---- retention and folders ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "rules", "deleted"),
    [
        ([None] * 5, (2, 1, None), [0, 1, 2]),
        ([0.9, 0.1, 0.2, 0.3], (1, 1, None), [1, 2]),
        ([0.9, 0.1, 0.8, 0.3], (1, 2, None), [1]),
        ([0.5, 0.5, 0.1], (1, 1, None), [0]),  # of equal ones the newer is better
        ([None] * 7, (1, 0, 3), [1, 2, 4, 5]),
        ([0.1, 0.2], (None, 0, None), []),
        ([-5.0, None, None], (1, 1, None), [1]),
    ],
)
def test_retention_rules(metrics, rules, deleted):
    assert checkpoints._to_delete(dict(enumerate(metrics)), *rules) == deleted


def test_non_finite_metrics_are_never_best(tmp_path):
    with checkpoints.Checkpointer(tmp_path, keep=1, keep_best=1) as checkpointer:
        for step, metric in enumerate([0.1, 0.7, float("nan"), float("inf"), 0.2, None]):
            checkpointer.save(step, make_state(step), {}, metric)
        checkpointer.wait()
        assert checkpointer.steps() == [1, 5]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_1", "checkpoint_5"]


def test_a_committed_step_is_not_saved_again(model_dir):
    with checkpoints.Checkpointer(model_dir) as checkpointer:
        with pytest.raises(FileExistsError, match="already a committed"):
            checkpointer.save(2, make_state(5), {})
        restored, _ = checkpointer.restore(abstract(make_state(2)))
    assert_bitwise(restored, make_state(2))


def test_foreign_folders_are_left_alone(model_dir, caplog):
    foreign = {
        "checkpoint_1000/checkpoint": b"T5X",
        "checkpoint_1000/target.token_embedder.embedding/.zarray": b"{}",
        "checkpoint_7/notes.txt": b"mine",
        "checkpoint_8/state/x": b"another program's",
        "checkpoint_09/metadata.json": b"{}",
        "checkpoint_3.corrupt/metadata.json": b"{}",
        "logs/metadata.json": b"{}",
        "checkpoint_12": b"a file",
    }
    for name, content in foreign.items():
        (model_dir / name).parent.mkdir(exist_ok=True, parents=True)
        (model_dir / name).write_bytes(content)
    (model_dir / "checkpoint_5").mkdir()
    with checkpoints.Checkpointer(model_dir, keep=1) as checkpointer:
        assert checkpointer.steps() == [1, 2] == checkpointer.steps()
        lines = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
        assert len(lines) == 4  # one each, once
        for name, why in {"1000": "T5X", "7": "not written by", "8": "not written by"}.items():
            assert any(f"checkpoint_{name} " in line and why in line for line in lines)
            with pytest.raises(FileExistsError, match=f"checkpoint_{name}:"):
                checkpointer.save(int(name), make_state(), {})
        checkpointer.save(5, make_state(5), {})  # an empty folder is not in the way
        checkpointer.wait()
        assert checkpointer.steps() == [5]
    for name, content in foreign.items():
        assert (model_dir / name).read_bytes() == content


def test_retention_keeps_what_the_user_put_into_a_checkpoint(model_dir):
    (model_dir / "checkpoint_1" / "predictions.jsonl").write_text("{}")
    save(model_dir, 3, 4, keep=1)
    assert files(model_dir / "checkpoint_1") == [model_dir / "checkpoint_1" / "predictions.jsonl"]


def test_leftovers_are_removed_at_open_and_when_in_the_way(model_dir):
    with checkpoints.Checkpointer(model_dir) as checkpointer:
        for step in (1, 2):
            (model_dir / f"checkpoint_{step}" / "manifest.json").unlink()
        assert checkpointer.steps() == []
        checkpointer.save(2, make_state(9), {})
        restored, _ = checkpointer.restore(abstract(make_state(9)))
        assert_bitwise(restored, make_state(9))
    checkpoints.Checkpointer(model_dir).close()
    assert os.listdir(model_dir) == ["checkpoint_2"]


def test_list_checkpoints(model_dir, tmp_path):
    folder = model_dir / "checkpoint_2"
    assert [str(p) for p in checkpoints.list_checkpoints(model_dir)] == [
        str(model_dir / "checkpoint_1"), str(folder)]  # fmt: skip
    assert [str(p) for p in checkpoints.list_checkpoints(str(folder))] == [str(folder)]
    shutil.copytree(folder, model_dir / "checkpoint_30")  # says step 2 inside
    copy = shutil.copytree(folder, tmp_path / "initial")
    assert len(checkpoints.list_checkpoints(model_dir)) == 2
    assert [p.name for p in checkpoints.list_checkpoints(copy)] == ["initial"]
    (tmp_path / "empty").mkdir()
    assert checkpoints.list_checkpoints(tmp_path / "empty") == []
    with pytest.raises(FileNotFoundError):
        checkpoints.list_checkpoints(tmp_path / "absent")
    with pytest.raises(FileNotFoundError):
        checkpoints.restore(tmp_path / "absent", {"a": np.zeros(1)})
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="unfinished save"):
        checkpoints.list_checkpoints(folder)


def test_restore_of_nothing(tmp_path):
    with checkpoints.Checkpointer(tmp_path / "new") as checkpointer:
        assert checkpointer.steps() == [] and checkpointer.latest() is None
        with pytest.raises(FileNotFoundError):
            checkpointer.restore({"a": np.zeros(1)})
        with pytest.raises(FileNotFoundError):
            checkpointer.restore({"a": np.zeros(1)}, step=4)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("step", "state", "metadata", "error"),
    [
        (-1, {"a": np.zeros(1)}, {}, ValueError),
        ("1", {"a": np.zeros(1)}, {}, TypeError),
        (1, {"a": {"b/c": np.zeros(1)}}, {}, ValueError),
        (1, {"a": {"b.c": np.zeros(1)}}, {}, ValueError),
        (1, {"..": np.zeros(1)}, {}, ValueError),
        (1, {"a": {1: np.zeros(1), "1": np.ones(1)}}, {}, ValueError),
        (1, {"a": np.zeros((0, 3))}, {}, ValueError),
        (1, {"a": None}, {}, ValueError),
        (1, np.zeros(1), {}, ValueError),
        (1, {"a": "text"}, {}, TypeError),
        (1, {"a": np.asarray([None])}, {}, TypeError),
        (1, {"a": jax.random.key(0)}, {}, TypeError),
        (1, {"a": np.zeros(1)}, {"x": object()}, TypeError),
    ],
)
def test_what_cannot_be_stored_is_refused_before_writing(tmp_path, step, state, metadata, error):
    with checkpoints.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(error):
            checkpointer.save(step, state, metadata)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep_best": -1}, {"keep_every": 0}])
def test_retention_numbers_are_checked(tmp_path, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        checkpoints.Checkpointer(tmp_path, **options)


NO_RENAME = """
import os, pathlib, shutil, sys
sys.path.insert(0, {tests!r})
import test_checkpoints as t
from distill import checkpoints

def refuse(*args, **kwargs):
    raise OSError("this storage has no rename")

for module, name in ((os, "rename"), (os, "replace"), (os, "renames"), (shutil, "move")):
    setattr(module, name, refuse)
checkpoints._is_local = lambda path: False  # as for gs://
try:
    pathlib.Path({folder!r}).rename("elsewhere")
    sys.exit("renamed")
except OSError:
    pass
with checkpoints.Checkpointer({folder!r}, keep=2, keep_best=1) as saver:
    for step, metric in ((1, 0.9), (2, 0.1), (3, 0.2), (4, 0.3)):
        saver.save(step, t.make_state(step), {{"step": step}}, metric)
    saver.wait()
    assert saver.steps() == [1, 3, 4], saver.steps()  # best, and the newest two
    state, metadata = saver.restore(t.abstract(t.make_state(4)))
    t.assert_bitwise(state, t.make_state(4))
    assert metadata == {{"step": 4}}

# Killed in a save: all of it is there but what commits.
torn = pathlib.Path({folder!r}) / "checkpoint_5"
shutil.copytree(torn.with_name("checkpoint_4"), torn)
(torn / "manifest.json").unlink()
# Killed while the manifest was written, where an object may come in parts.
cut = pathlib.Path({folder!r}) / "checkpoint_6"
shutil.copytree(torn.with_name("checkpoint_4"), cut)
(cut / "manifest.json").write_bytes((cut / "manifest.json").read_bytes()[:-9])
assert [p.name for p in checkpoints.list_checkpoints({folder!r})] == [
    "checkpoint_1", "checkpoint_3", "checkpoint_4"
]
with checkpoints.Checkpointer({folder!r}, keep=2) as saver:
    assert saver.latest() == 4 and not torn.exists()
    assert saver.restore(t.abstract(t.make_state(4)))[1] == {{"step": 4}}
    saver.save(5, t.make_state(5), {{"step": 5}})
assert checkpoints.verify(torn) == []
"""


def test_commits_without_any_rename(tmp_path):
    """The contract of object stores: a manifest written last commits, and nothing is renamed.

    Orbax and epath reach real ones through clients that are not here, and know no `memory://`. So
    a local folder stands in, in a process where every rename of Python fails and paths count as
    remote; what Orbax writes in C++ are single objects there too.
    """
    script = NO_RENAME.format(tests=str(ROOT / "tests"), folder=str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
