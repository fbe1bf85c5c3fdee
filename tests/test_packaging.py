"""What ships: gin files that work, commands in their headers that exist, metadata that fits."""

import importlib
import pathlib
import re
import shlex
import tomllib
import zipfile

import pytest

import distill
from distill import configure, convert

ROOT = pathlib.Path(__file__).resolve().parents[1]
GIN = ROOT / "gin_configs"
# Those in t5x/ are for T5X's own parser; tests/test_t5x_adapter.py reads them with it.
T5X_FILES = sorted((GIN / "t5x").glob("*.gin"))
FILES = sorted(set(GIN.rglob("*.gin")) - set(T5X_FILES))
MODELS = sorted((GIN / "models").rglob("*.gin"))
RUNS = [path for path in sorted((GIN / "runs").glob("*.gin")) if not path.name.startswith("_")]
TRAIN_RUNS = [path for path in RUNS if path.name not in ("eval.gin", "teacher.gin")]
# Script -> module of distill and function, where they are not named as the script is.
COMMANDS = {"generate_rationales": ("teacher.generate", "generate")}
NEEDED = ["MODEL_DIR=/tmp/x", "MIXTURE_OR_TASK_NAME=t"]
# emb, heads, encoder layers, decoder layers, head_dim, mlp, gated: T5X and the T5 paper's table.
SIZES = {
    "t5_1_1/small": (512, 6, 8, 8, 64, 1024, True),
    "t5_1_1/base": (768, 12, 12, 12, 64, 2048, True),
    "t5_1_1/large": (1024, 16, 24, 24, 64, 2816, True),
    "t5_1_1/xl": (2048, 32, 24, 24, 64, 5120, True),
    "t5_1_1/xxl": (4096, 64, 24, 24, 64, 10240, True),
    "t5_1_0/small": (512, 8, 6, 6, 64, 2048, False),
    "t5_1_0/base": (768, 12, 12, 12, 64, 3072, False),
    "t5_1_0/large": (1024, 16, 24, 24, 64, 4096, False),
    "t5_1_0/xl": (1024, 32, 24, 24, 128, 16384, False),
    "t5_1_0/xxl": (1024, 128, 24, 24, 128, 65536, False),
    "mt5/small": (512, 6, 8, 8, 64, 1024, True),
    "mt5/base": (768, 12, 12, 12, 64, 2048, True),
    "mt5/large": (1024, 16, 24, 24, 64, 2816, True),
    "mt5/xl": (2048, 32, 24, 24, 64, 5120, True),
    "mt5/xxl": (4096, 64, 24, 24, 64, 10240, True),
    "byt5/small": (1472, 6, 12, 4, 64, 3584, True),
    "byt5/base": (1536, 12, 18, 6, 64, 3968, True),
    "byt5/large": (1536, 16, 36, 12, 64, 3840, True),
    "byt5/xl": (2560, 32, 36, 12, 64, 6720, True),
    "byt5/xxl": (4672, 64, 36, 12, 64, 12352, True),
}
VOCABULARY = {"mt5": 250112, "byt5": 384}


def short(path: pathlib.Path) -> str:
    return str(path.relative_to(GIN))


def headers(path: pathlib.Path) -> list[str]:
    """The commands in the comment at the top of a gin file."""
    lines = []
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    joined = "\n".join(lines).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.startswith("python ")]


def resolve_train(files, bindings):
    from distill import train

    return configure.resolve(train.train, files, bindings)


def test_every_model_is_covered():
    names = {str(path.relative_to(GIN / "models").with_suffix("")) for path in MODELS}
    assert names == {*SIZES, "t5_1_1/tiny"}
    assert convert.RELEASED.keys() == SIZES.keys()


@pytest.mark.parametrize("name", SIZES)
def test_model_sizes(name):
    model = resolve_train([f"{name}.gin", "finetune.gin"], NEEDED).arguments()["model"]
    got = (model.emb_dim, model.num_heads, model.num_encoder_layers, model.num_decoder_layers,
           model.head_dim, model.mlp_dim, len(model.mlp_activations) == 2)  # fmt: skip
    assert got == SIZES[name] and model.vocab_size == VOCABULARY.get(name.split("/")[0], 32128)
    assert convert.released(model) == name
    gated = SIZES[name][-1]
    assert model.mlp_activations == (("gelu", "linear") if gated else ("relu",))
    assert model.logits_via_embedding == (not gated)


@pytest.mark.parametrize("path", MODELS, ids=short)
def test_models_set_architecture_only(path):
    """A model file that set dropout or a dtype would reset what a run file before it said."""
    text = path.read_text("utf-8")
    assert re.findall(r"^[A-Z_]+ =", text, re.MULTILINE) == ["MODEL ="]
    assert "dropout_rate" not in text and "dtype" not in text


@pytest.mark.parametrize("path", TRAIN_RUNS, ids=short)
@pytest.mark.parametrize("order", [1, -1])
def test_runs_resolve_in_either_order(path, order):
    files = ["t5_1_1/tiny.gin", path.name][::order]
    resolved = resolve_train(files, NEEDED)
    unused = set(resolved.macros) - set(resolved.used_macros)
    assert not unused, f"{path.name} sets macros that its own run does not use: {unused}"
    resolved.arguments()


def test_published_setting():
    given = resolve_train(["t5_1_1/tiny.gin", "published.gin"], NEEDED).arguments()
    assert given["data"].pairs_per_step == 64 and given["data"].batch_size is None
    assert given["data"].feature_lengths is None  # cut at the published limits, rows by the data
    assert given["config"].train_steps == 10000
    optimizer = given["optimizer"]
    assert type(optimizer).__name__ == "AdamW" and optimizer.learning_rate == 5e-5
    assert (optimizer.schedule, optimizer.warmup_steps) == ("linear", 0)
    assert (optimizer.weight_decay, optimizer.clip_norm) == (0, 1)
    assert (given["objective"].alpha, given["objective"].z_loss) == (0.5, 0)
    assert given["model"].dropout_rate == 0.1


def test_defaults_are_t5x():
    given = resolve_train(["t5_1_1/tiny.gin", "step_by_step.gin"], NEEDED).arguments()
    optimizer = given["optimizer"]
    assert type(optimizer).__name__ == "Adafactor"
    assert (optimizer.learning_rate, optimizer.schedule) == (1e-3, "constant")
    assert (given["objective"].alpha, given["objective"].z_loss) == (0.5, 1e-4)
    assert given["data"].batch_size == 128 and given["data"].pairs_per_step is None


def test_standard_behind_published():
    files = ["t5_1_1/tiny.gin", "published.gin", "standard.gin"]
    given = resolve_train(files, NEEDED).arguments()
    assert type(given["objective"]).__name__ == "Standard" and given["objective"].z_loss == 0


def test_eval():
    from distill import evaluate

    resolved = configure.resolve(evaluate.evaluate, ["eval.gin"], ["CHECKPOINT_PATH=/tmp/x"])
    assert set(resolved.macros) == set(resolved.used_macros)
    assert resolved.arguments()["config"].checkpoint_path == "/tmp/x"


def test_teacher():
    from distill.teacher import generate

    given = ["MIXTURE_OR_TASK_NAME=svamp", "STORE=/tmp/x.sqlite"]
    resolved = configure.resolve(generate.generate, ["teacher.gin"], given)
    assert set(resolved.macros) == set(resolved.used_macros)
    # What the file leaves alone is what the dataclasses say.
    config = resolved.arguments()["config"]
    assert config == generate.GenerateConfig("svamp", "/tmp/x.sqlite")


@pytest.mark.parametrize("path", FILES, ids=short)
def test_header_command_works(path):
    if path.name.startswith("_"):
        return  # Included by others; not a file that is given.
    commands = headers(path)
    assert commands, "the header says how to use the file"
    for command in commands:
        _, script, *arguments = shlex.split(command)
        assert (ROOT / script).is_file()
        values = configure.parse_argv([script, *arguments])
        assert any(path.match(f"*/{name}") for name in values.gin_file)
        name, function = COMMANDS.get(stem := pathlib.Path(script).stem, (stem, stem))
        fn = getattr(importlib.import_module(f"distill.{name}"), function)
        configure.resolve(fn, values.gin_file, values.gin_bindings)


@pytest.mark.parametrize("path", FILES, ids=short)
def test_names_of_files_are_unambiguous(path):
    """`--gin_file=name` looks below models, runs and objectives in turn."""
    root = path.relative_to(GIN).parts[0]
    name = path.relative_to(GIN / root)
    assert [f for f in FILES if f.relative_to(GIN / f.relative_to(GIN).parts[0]) == name] == [path]


@pytest.mark.parametrize("path", T5X_FILES, ids=short)
def test_files_for_t5x_say_so_and_are_refused_here(path):
    assert path.read_text("utf-8").startswith("# FOR T5X ONLY (docs/t5x.md)")
    assert path.name.startswith("_") or f"gin_configs/t5x/{path.name}" in "".join(headers(path))
    assert not [f for f in FILES if f.name == path.name], "a file of ours has this name"
    with pytest.raises(configure.ConfigError, match="is for T5X itself"):
        resolve_train([f"t5x/{path.name}"], NEEDED)


def test_tasks_in_commands_exist():
    task = pytest.importorskip("distill.task")
    task.import_module("tasks")
    import seqio

    names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names(), *task.datasets()}
    for path in [*FILES, *T5X_FILES, *sorted((ROOT / "scripts").glob("*.py"))]:
        for given in re.findall(r"MIXTURE_OR_TASK_NAME=([\w,]+)", path.read_text("utf-8")):
            assert names.issuperset(given.split(",")), f"{path}: {given}"


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", distill.__version__)
    assert f"## [{distill.__version__}]" in (ROOT / "CHANGELOG.md").read_text("utf-8") or (
        "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    )


def test_pyproject_has_tool_settings_only():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert set(settings) == {"build-system", "tool"}


def test_constraints_are_inside_the_bounds():
    from packaging.requirements import Requirement

    text = (ROOT / "setup.py").read_text("utf-8")
    quoted = re.findall(r'"([A-Za-z][\w.-]*(?:\[[\w,]+\])?(?:[<>=]=?[\w.,<>=]+))"', text)
    bounds = [Requirement(item) for item in quoted if not item.startswith(("python", ">="))]
    assert len(bounds) > 20
    versions: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            versions.setdefault(pin.name.lower(), []).append(str(pin.specifier).lstrip("="))
    for bound in bounds:
        if bound.name == "gcsfs" and bound.name not in versions:
            continue
        for version in versions[bound.name.lower()]:
            assert bound.specifier.contains(version), f"{bound} but constraints.txt has {version}"


@pytest.mark.slow
def test_wheel_holds_the_gin_files_the_prompts_and_the_report_s_page(tmp_path):
    import subprocess
    import sys

    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet",
         "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    page = [path for path in (ROOT / "distill/report").iterdir() if path.is_file()]
    teacher = sorted((ROOT / "distill/teacher/prompts").glob("*.toml"))
    assert teacher
    for path in [*FILES, *T5X_FILES, *page, *teacher]:
        assert str(path.relative_to(ROOT)) in names
    assert {"gin_configs/t5x/__init__.py", "tasks/__init__.py", "distill/configure.py"} <= names
