"""The cache of compiled programs: where it lies, who decides, and what cannot stop a run."""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import pytest

from distill import cluster, compilation, configure, evaluate, train

ROOT = pathlib.Path(__file__).resolve().parents[1]
SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """jax's settings as in a fresh process; nothing is compiled while they are changed."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_below_the_cache_folder(tmp_path):
    folder = compilation.keep_programs(tmp_path / "cache")
    assert folder == tmp_path / "cache" / "programs"
    assert folder.stat().st_mode & 0o77 == 0  # what lies there will be run
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == compilation.MIN_SECONDS
    assert compilation.keep_programs(tmp_path / "other") is None  # a second run of the process
    assert jax.config.jax_compilation_cache_dir == str(folder)


def test_a_folder_of_the_user_and_the_switch_go_first(tmp_path):
    jax.config.update("jax_compilation_cache_dir", "/theirs")  # as JAX_COMPILATION_CACHE_DIR does
    assert compilation.keep_programs(tmp_path) is None
    assert jax.config.jax_compilation_cache_dir == "/theirs"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)  # JAX_ENABLE_COMPILATION_CACHE=0
    assert compilation.keep_programs(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_the_users_threshold_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "7")
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    assert compilation.keep_programs(tmp_path)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before


def test_several_processes_need_a_folder_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "is_several", lambda: True)
    assert compilation.keep_programs(tmp_path) is None
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.parametrize("how", ["file", "read-only"])
def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path, how, caplog, monkeypatch):
    if how == "file":
        (tmp_path / "cache").touch()
    else:  # not by chmod: the administrator may write everywhere
        monkeypatch.setattr(os, "access", lambda *_: False)
    assert compilation.keep_programs(tmp_path / "cache") is None
    assert jax.config.jax_compilation_cache_dir is None
    assert "Compiled programs are not kept" in caplog.text


def test_the_oldest_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation, "MAX_BYTES", 250)
    folder = tmp_path / "programs"
    folder.mkdir()
    for age, name in enumerate(("newest", "newer", "old", "oldest")):
        (folder / name).write_bytes(b"x" * 100)
        os.utime(folder / name, (1_000_000 - age, 1_000_000 - age))
    compilation.keep_programs(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["newer", "newest"]


@pytest.mark.parametrize("fn", [train.train, evaluate.evaluate])
def test_commands_with_a_cache_folder_keep_their_programs(fn, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(compilation, "keep_programs", kept.append)
    monkeypatch.setenv("DISTILL_CACHE_DIR", str(tmp_path / "default"))
    argument = {train.train: "data", evaluate.evaluate: "config"}[fn]
    configure._keep_programs({argument: types.SimpleNamespace(cache_dir="/given"), "x": 1})
    configure._keep_programs({argument: types.SimpleNamespace(cache_dir=None)})
    configure._keep_programs({"x": 1})
    assert kept == ["/given", str(tmp_path / "default")]


# Two updates of a small student; every bit of their losses, and what the cache did.
RUN = """
import collections, functools, json, sys
import jax, numpy as np, optax
from distill import compilation, objectives, t5, train

events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.split("/")[-1]]))
compilation.MIN_SECONDS = 0  # else it would depend on the load what is kept
compilation.keep_programs(sys.argv[1])
model = t5.T5Config(
    vocab_size=64, dtype="float32", emb_dim=16, num_heads=2, num_encoder_layers=1,
    num_decoder_layers=1, head_dim=8, mlp_dim=16,
)
rng = np.random.default_rng(0)
params = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(x.dtype),
                      t5.param_shapes(model))
tx = optax.sgd(0.1)
state = train.TrainState(np.int32(0), params, tx.init(params))
step = jax.jit(functools.partial(
    train.train_step, net=t5.T5(model), objective=objectives.StepByStep(), tx=tx))
tokens = rng.integers(2, 64, (4, 8), np.int32)
names = ("encoder_input_tokens", "decoder_input_tokens", "decoder_target_tokens")
batch = {name: tokens for name in names}
batch |= {"decoder_loss_groups": tokens % 2, "decoder_loss_weights": np.full_like(tokens, 1000)}
losses = []
for _ in range(2):
    state, scalars = step(state, batch, jax.random.key(1))
    losses.append(float(scalars["loss"]).hex())
print(json.dumps({"losses": losses, "hits": events["cache_hits"], "new": events["cache_misses"]}))
"""


def test_a_warm_run_loads_its_programs_and_computes_the_same(tmp_path):
    def run():
        # Compiling is nearly all that this test does, and it is not about fast programs.
        env = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
        env.pop("JAX_COMPILATION_CACHE_DIR", None)
        done = subprocess.run(
            [sys.executable, "-c", RUN, tmp_path], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    cold, _ = run()
    programs = {path: path.read_bytes() for path in (tmp_path / "programs").glob("*-cache")}
    assert cold["new"] == len(programs) > 1 and not cold["hits"]
    warm, said = run()
    assert warm == {"losses": cold["losses"], "hits": len(programs), "new": 0}
    assert "Error" not in said
    (train_step,) = (path for path in programs if "jit_train_step" in path.name)
    train_step.write_bytes(programs[train_step][:-100])  # as after SIGKILL
    damaged, said = run()
    assert damaged["losses"] == cold["losses"] and damaged["hits"] == len(programs) - 1
    assert "Error reading persistent compilation cache entry for 'jit_train_step'" in said
