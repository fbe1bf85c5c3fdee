"""The architecture as laws: floors of imports, and what may not appear in the source."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# docs/architecture.md. A module imports only from lower floors.
FLOORS = {
    "attention": 0,
    "losses": 0,
    "packing": 0,
    "metrics": 0,
    "vocabulary": 0,
    "prompts": 0,
    "results": 0,
    "cluster": 0,
    "display": 0,
    "compilation": 1,
    "t5": 1,
    "partitioning": 1,
    "optim": 1,
    "sources": 1,
    "hlo": 0,
    "estimate": 2,
    "task": 2,
    "decode": 2,
    "objectives": 2,
    "cache": 3,
    "data": 4,
    "checkpoints": 2,
    "formats": 0,
    "convert": 3,
    "export": 4,
    "t5x_adapter": 3,
    "students": 5,
    "scoring": 6,
    "predictor": 6,
    "teacher": 7,  # A student can teach.
    "evaluate": 7,
    "train": 7,
    "plan": 8,
    "study": 10,  # it runs commands
    "report": 8,
    "inspection": 8,
    "configure": 9,
}
# What the accelerator runs; see `test_accelerator_side_imports_little`.
ACCELERATOR_SIDE = (
    "t5", "attention", "objectives", "losses", "optim", "partitioning", "decode", "train",
    "estimate", "plan", "hlo",
)  # fmt: skip
HEAVY = (
    "grain", "array_record", "seqio", "gin", "tensorflow", "tensorflow_datasets", "torch", "t5x",
)  # fmt: skip
# Module -> the only files of distill/ that import it.
ONLY_IN = {
    "gin": {"configure"},
    "jax.sharding": {"partitioning"},
    "flax.linen": {"t5"},
    "jax.experimental.pallas": {"attention"},
    "orbax": {"checkpoints"},
    "seqio": {"task", "vocabulary", "t5x_adapter"},
    "tensorflow": {"task", "t5x_adapter"},
    "t5x": {"t5x_adapter"},
    "clu": {"t5x_adapter"},
    "array_record": {"cache"},
    "torch": {"formats"},
    "safetensors": {"formats"},
    "huggingface_hub": {"formats"},
    "sacrebleu": {"metrics"},
    "openai": {"teacher"},
}

MODULES = sorted((ROOT / "distill").rglob("*.py"))
SOURCES = sorted(
    path for folder in ("distill", "tasks", "gin_configs", "scripts")
    for path in (ROOT / folder).rglob("*.py")
)  # fmt: skip


def name_of(path: pathlib.Path) -> str:
    """`distill/teacher/client.py` -> `teacher`."""
    return path.relative_to(ROOT / "distill").parts[0].removesuffix(".py")


def imports(path: pathlib.Path):
    """Yields (module, line) for every import, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def starts(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def test_every_module_has_a_floor():
    names = {name_of(path) for path in MODULES} - {"__init__"}
    assert names <= set(FLOORS), "add the new module to FLOORS and to docs/architecture.md"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_from_lower_floors(path):
    own = name_of(path)
    for module, line in imports(path):
        for above in ("tasks", "gin_configs", "scripts", "tests"):
            assert not starts(module, above), f"{path}:{line}: distill never imports {above}"
        parts = module.split(".")
        if parts[0] != "distill" or len(parts) < 2 or parts[1] == "__version__":
            continue
        other = parts[1]
        if own == "__init__":
            pytest.fail(f"{path}:{line}: `import distill` imports nothing")
        if other != own:
            assert FLOORS[other] < FLOORS[own], (
                f"{path}:{line}: {own} (floor {FLOORS[own]}) imports {other} "
                f"(floor {FLOORS[other]})"
            )


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_confined_imports(path):
    for module, line in imports(path):
        for confined, allowed in ONLY_IN.items():
            if starts(module, confined):
                assert name_of(path) in allowed, f"{path}:{line}: {confined} only in {allowed}"


def forbidden_calls(tree: ast.AST):
    """Yields (what, line) of code that runs or unpickles data."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
            for name in names:
                if name.split(".")[0] in ("pickle", "cPickle", "dill", "cloudpickle", "shelve"):
                    yield name, node.lineno
        if not isinstance(node, ast.Call):
            continue
        for keyword in node.keywords:
            if keyword.arg == "allow_pickle" and getattr(keyword.value, "value", 1) is not False:
                yield "allow_pickle", node.lineno
        name = ast.unparse(node.func)
        if name in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system"):
            yield name, node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_source_runs_no_data(path):
    found = list(forbidden_calls(ast.parse(path.read_text("utf-8"))))
    assert not found, f"{path}: {found}"


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from pickle import loads", "eval('1')", "exec('1')", "yaml.load(f)",
     "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=flag)"],
)  # fmt: skip
def test_forbidden_calls_are_found(code):
    assert list(forbidden_calls(ast.parse(code)))


@pytest.mark.parametrize("code", ["np.load(f, allow_pickle=False)", "model.eval()", "re.compile"])
def test_harmless_calls_are_not(code):
    assert not list(forbidden_calls(ast.parse(code)))


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "path", sorted((ROOT / "scripts").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_scripts_name_what_is_there(path):
    """No test runs most benchmarks; a name that has moved would be found by their user."""
    tree = ast.parse(path.read_text("utf-8"))
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "distill":
            for alias in node.names:
                if (ROOT / "distill" / f"{alias.name}.py").exists():
                    modules[alias.asname or alias.name] = alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in modules:
                module = importlib.import_module(f"distill.{modules[node.value.id]}")
                assert hasattr(module, node.attr), f"{path}:{node.lineno}: {ast.unparse(node)}"


def test_accelerator_side_imports_little():
    present = [m for m in ACCELERATOR_SIDE if (ROOT / "distill" / f"{m}.py").exists()]
    assert len(present) >= 6
    run_python(f"""
        import sys

        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {HEAVY!r}:
                    raise ImportError(f"the accelerator side must not import {{name}}")

        sys.meta_path.insert(0, Block())
        import importlib
        for name in {present!r}:
            importlib.import_module(f"distill.{{name}}")
    """)


@pytest.mark.parametrize("module", ["distill", "distill.configure"])
def test_import_is_light(module):
    # configure is the one that may import gin.
    heavy = set(HEAVY) - ({"gin"} if module.endswith("configure") else set())
    loaded = run_python(f"import sys, {module}; print('\\n'.join(sys.modules))").split()
    assert not heavy & set(loaded)


def test_no_assert_for_user_input():
    """House rule: `assert` is for tests."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            assert not isinstance(node, ast.Assert), f"{path}:{node.lineno}"
            bare = isinstance(node, ast.ExceptHandler) and node.type is None
            assert not bare, f"{path}:{node.lineno}: bare except"


def test_no_utils():
    assert not [p for p in SOURCES if re.search(r"utils|helpers", p.name)]
