"""Set-up of all tests: 8 CPU devices, strict ranks, and what may be skipped."""

import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile

# Before anything imports jax, also in pytest-xdist's workers.
os.environ["JAX_PLATFORMS"] = "cpu"
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
# Most programs are compiled by several tests, workers and child processes: all share one folder.
_PROGRAMS = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _PROGRAMS = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="programs")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# TensorFlow's start-up notes.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_unconfigure(config):
    del config
    if _PROGRAMS:  # of the process that made it, not of xdist's workers
        shutil.rmtree(_PROGRAMS, ignore_errors=True)


# Files are dealt to the workers in this order; a long one at the end would leave a worker idle.
LONG = (
    "test_train_from.py", "test_report.py", "test_mutual_information.py", "test_train.py",
    "test_study.py", "test_benchmarks.py", "test_decode_parity.py",
    "test_evaluate.py", "test_topology.py", "test_bfloat16_parameters.py", "test_objectives.py",
    "test_sharding.py", "test_cache.py", "test_generate_rationales.py", "test_teacher_purchase.py",
    "test_published_objective.py", "test_multihost.py", "test_parity.py", "test_goldens.py",
    "test_task.py", "test_t5.py", "test_decode.py", "test_export.py", "test_convert.py",
)  # fmt: skip


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    if config.getoption("--slow") or "slow" in (config.getoption("-m") or ""):
        return
    kept = [item for item in items if "slow" not in item.keywords]
    left_out = [item for item in items if "slow" in item.keywords]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With DISTILL_REQUIRE_PARITY=1 a skipped parity or topology test has failed."""
    report = yield
    required = os.environ.get("DISTILL_REQUIRE_PARITY", "0") not in ("", "0")
    marked = "parity" in item.keywords or "topology" in item.keywords
    if report.skipped and required and marked and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} must run under DISTILL_REQUIRE_PARITY=1, but: {reason}"
    return report


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of shared datasets and fixtures ($DISTILL_SHARED, else ../shared)."""
    given = os.environ.get("DISTILL_SHARED")
    path = pathlib.Path(given) if given else ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"no shared folder at {path}; DISTILL_SHARED names another")
    return path


@pytest.fixture
def tasks(monkeypatch):
    """Registers the project's tasks, on bytes and without a data folder."""
    from distill import task  # imports TensorFlow

    monkeypatch.delenv("DISTILL_DATA_DIR", raising=False)
    monkeypatch.delenv("DISTILL_VOCABULARY", raising=False)
    task.reset()
    task.import_module("tasks")
    yield sys.modules["tasks"]
    task.reset()


@pytest.fixture(scope="module")
def browser():
    """A running Chromium; needs the `browser` extra."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the `browser` extra")
    spec = importlib.util.spec_from_file_location("shots", ROOT / "scripts/report_screenshots.py")
    shots = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shots)
    with sync_api.sync_playwright() as playwright:
        try:
            browser = shots.launch(playwright)
        except sync_api.Error as e:
            pytest.skip(f"no Chromium: {e}")
        yield browser
        browser.close()
