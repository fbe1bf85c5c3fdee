"""The command line and gin: what is accepted, what is refused, and how that reads."""

import os
import pathlib
import subprocess
import sys

import pytest

from distill import configure
from distill.configure import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]

# A library of its own, so that these tests say what gin files may do, not what training needs.
LIBRARY = """
import dataclasses

CALLS = []

@dataclasses.dataclass(frozen=True)
class Size:
    width: int
    names: tuple = ("a",)
    extra: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.width, int):
            raise ValueError(f"width must be an int, not {self.width!r}")

@dataclasses.dataclass(frozen=True)
class Config:
    folder: str
    size: Size
    rate: float | None = None
    note: object = None

@dataclasses.dataclass(frozen=True)
class Spare:
    rate: float = 1.0

class _Hidden:
    pass

def work(*, config, other=None):
    CALLS.append(config)

def danger(command="x"):
    CALLS.append(command)
"""
BASE = """
from __gin__ import dynamic_registration
import gin_test_library as lib

FOLDER = %gin.REQUIRED
RATE = 0.5
SPARE_RATE = 2.0
work.config = @lib.Config()
lib.Config.folder = %FOLDER
lib.Config.rate = %RATE
lib.Config.size = @lib.Size()
lib.Size.width = 3
lib.Spare.rate = %SPARE_RATE
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """The library as if it were part of distill: only its frozen dataclasses can be named."""
    (tmp_path / "gin_test_library.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        configure, "ALLOWED_IMPORTS", (*configure.ALLOWED_IMPORTS, "gin_test_library")
    )
    sys.modules.pop("gin_test_library", None)
    (tmp_path / "base.gin").write_text(BASE)
    import gin
    import gin_test_library

    # gin keeps registered classes for the life of the process, under their full names.
    gin.enter_interactive_mode()
    yield gin_test_library
    gin.exit_interactive_mode()
    sys.modules.pop("gin_test_library", None)


def arguments(library, *bindings, files=("base.gin",), **kwargs):
    return configure.resolve(library.work, files, bindings, **kwargs).arguments()


def refused(library, *bindings, files=("base.gin",), **kwargs) -> str:
    with pytest.raises(ConfigError) as error:
        configure.resolve(library.work, files, bindings, **kwargs).arguments()
    return str(error.value)


# ---- values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("gs://x/y", "gs://x/y"),
        ("/tmp/1e5", "/tmp/1e5"),
        ("bytes", "bytes"),
        ("svamp_step_by_step", "svamp_step_by_step"),
        ("/tmp/a,b", "/tmp/a,b"),
        ("2024-01-01", "2024-01-01"),
        ("1e5abc", "1e5abc"),
        ("5#b", "5#b"),
        ("/tmp/it's", "/tmp/it's"),
        ("a = 3", "a = 3"),
        ("a\nimport os", "a\nimport os"),
        ("host:80", "host:80"),
        ("$x", "$x"),
        ("x()", "x()"),
        ("1, 2", "1, 2"),
        ("~/x", os.path.expanduser("~/x")),
        ("'~/x'", "~/x"),
        ("'gs://x'", "gs://x"),
        ('"5"', "5"),
        ("''", ""),
        ("5", 5),
        ("-5", -5),
        ("1e-4", 1e-4),
        ("True", True),
        ("None", None),
        ("(1, 'a')", (1, "a")),
        ("{'inputs': 1}", {"inputs": 1}),
        ("[%A, @b.C()]", [configure.Macro("A"), configure.Reference("", "b.C", True)]),
        ("%A", configure.Macro("A")),
        ("@s/b.C", configure.Reference("s", "b.C", False)),
        ("1e999", "1e999"),
    ],
)
def test_values_of_the_command_line(text, value):
    got = configure.parse_value(text)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("text", ["", "  ", "@", "%41", "[1, 2", "{a}_b", "'open", "@/tmp"])
def test_values_that_start_like_gin_must_be_gin(text):
    with pytest.raises(ConfigError):
        configure.parse_value(text)


# ---- what a configuration comes to


def test_files_macros_and_flags(library):
    config = arguments(library, "FOLDER=/x/y", "Size.names=('b',)")["config"]
    assert config == library.Config("/x/y", library.Size(3, ("b",)), 0.5)
    assert type(config) is library.Config


def test_later_file_wins_and_flags_win_over_files(library, tmp_path):
    (tmp_path / "more.gin").write_text("RATE = 0.7\nFOLDER = 'f'\n")
    assert arguments(library, files=["base.gin", "more.gin"])["config"].rate == 0.7
    assert arguments(library, "RATE=0.1", files=["base.gin", "more.gin"])["config"].rate == 0.1
    assert arguments(library, files=["more.gin", "base.gin"])["config"].rate == 0.5


def test_required_never_takes_a_value_away(library, tmp_path):
    (tmp_path / "more.gin").write_text("FOLDER = 'f'\n")
    assert arguments(library, files=["more.gin", "base.gin"])["config"].folder == "f"


def test_scopes_and_blocks(library, tmp_path):
    (tmp_path / "more.gin").write_text(
        "import gin_test_library as lib\n"
        "lib.Config.size = @big/lib.Size()\nbig/lib.Size:\n  width = 9\nFOLDER = 'f'\n"
    )
    assert arguments(library, files=["base.gin", "more.gin"])["config"].size.width == 9


def test_setting_twice_is_logged(library, tmp_path, caplog):
    (tmp_path / "more.gin").write_text("RATE = 0.7\nFOLDER = 'f'\n")
    with caplog.at_level("INFO", logger="absl"):
        arguments(library, files=["base.gin", "more.gin"])
    assert "RATE = 0.7" in caplog.text and "base.gin:6" in caplog.text


def test_text_is_a_fixed_point(library, tmp_path):
    first = configure.resolve(
        library.work, ["base.gin"], ["FOLDER=a\n'b\"", "Config.note={'k': (1, [None, 'ü'])}"]
    )
    (tmp_path / "config.gin").write_text(first.text(), encoding="utf-8")
    again = configure.resolve(library.work, ["config.gin"])
    assert again.text() == first.text()
    assert again.arguments() == first.arguments()
    # Defaults are part of it, so that another version's defaults do not change the run.
    assert "Size.extra = {}" in first.text()
    # What the run does not use is not.
    assert "Spare" not in first.text()


def test_annotated_text_names_the_places(library):
    text = configure.resolve(library.work, ["base.gin"], ["FOLDER=f"]).text(annotate=True)
    assert "base.gin:6" in text and "# command line" in text and "# default" in text


# ---- mistakes


def test_missing_values_are_listed_with_an_example(library):
    message = refused(library)
    assert "FOLDER" in message and "--gin.FOLDER=" in message


def test_undefined_macro_is_missing(library):
    assert "NOWHERE" in refused(library, "FOLDER=f", "RATE=%NOWHERE")


def test_missing_parameter(library, tmp_path):
    text = BASE.replace("lib.Size.width = 3", "")
    (tmp_path / "base.gin").write_text(text)
    assert "Size.width" in refused(library, "FOLDER=f")


def test_misspelt_macro(library, tmp_path):
    assert "Did you mean FOLDER?" in refused(library, "FODLER=f")
    (tmp_path / "more.gin").write_text("\nRTAE = 0.7\n")
    message = refused(library, "FOLDER=f", files=["base.gin", "more.gin"])
    assert "more.gin:2" in message and "Did you mean RATE?" in message


def test_misspelt_parameter_and_class(library):
    assert "Did you mean width?" in refused(library, "FOLDER=f", "Size.widht=3")
    assert "Did you mean Size?" in refused(library, "FOLDER=f", "Sise.width=3")


def test_settings_without_effect(library):
    assert "does not use it" in refused(library, "FOLDER=f", "Spare.rate=3")
    assert "only Spare.rate would" in refused(library, "FOLDER=f", "SPARE_RATE=3")


def test_errors_of_dataclasses_are_short(library):
    assert refused(library, "FOLDER=f", "Size.width=x") == "Size: width must be an int, not 'x'"


@pytest.mark.parametrize(
    "bindings", [("FOLDER=%FOLDER",), ("FOLDER=f", "Config.note=@lib.Config()"), ("FOLDER=f", "x"),
                 ("FOLDER=f", "=3"), ("FOLDER=f", "a b=3"), ("FOLDER=f", "RATE=@lib.Size")],
)  # fmt: skip
def test_refused_bindings(library, bindings):
    refused(library, *bindings)


def test_nothing_configured(library):
    assert "--gin_file=" in refused(library, "FOLDER=f", files=[])


@pytest.mark.parametrize(
    "text", ["x = (", "x = 1 2", "\0", "x = 'a", "= 3", "x = " + "[" * 2000, "x = {[1]: 2}",
             "x = $", "  x = 3\n y", "import", "include 3", "x = 1e999", "x = f'{1}'",
             "from __gin__ import a"],
)  # fmt: skip
def test_broken_files_give_one_line(library, tmp_path, text):
    (tmp_path / "broken.gin").write_text(text)
    message = refused(library, files=["broken.gin"])
    assert "broken.gin" in message and "\n" not in message


def test_missing_file_names_close_ones(library):
    message = refused(library, files=["smal.gin"])
    assert "t5_1_1/small.gin" in message and os.getcwd() in message
    assert "t5_1_1/small.gin" in refused(library, files=["small.gin"])


@pytest.mark.parametrize(
    "binding", ["API_KEY=abc", "Config.secret=abc", "FOLDER=sk-abcdefghijklmnopqrstuvwxyz"]
)
def test_secrets_are_refused_and_not_shown(library, binding):
    message = refused(library, binding)
    assert "secret" in message and binding.partition("=")[2] not in message


# ---- gin files run nothing


@pytest.mark.parametrize(
    "line", ["import canary", "from canary import x", "import canary as gin", "import os",
             "import distill_evil", "from os import path"],
)  # fmt: skip
@pytest.mark.parametrize("included", [False, True])
def test_foreign_imports_are_refused_before_anything_runs(library, tmp_path, line, included):
    for name in ("canary", "distill_evil"):
        (tmp_path / f"{name}.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    (tmp_path / "bad.gin").write_text(f"x = 1\n{line}\n")
    if included:
        (tmp_path / "outer.gin").write_text("include 'bad.gin'")
    message = refused(library, files=["outer.gin" if included else "bad.gin"])
    assert "bad.gin:2" in message and "--gin_allow_import" in message
    assert not (tmp_path / "ran").exists()


def test_named_modules_may_be_imported(library, tmp_path):
    (tmp_path / "mine.py").write_text("def make(x=1):\n    return x\n")
    (tmp_path / "more.gin").write_text(
        "from __gin__ import dynamic_registration\nimport mine\nFOLDER = 'f'\nRATE = @mine.make()\n"
        "mine.make.x = 4\n"
    )
    files = ["base.gin", "more.gin"]
    assert "--gin_allow_import=mine" in refused(library, files=files)
    assert arguments(library, files=files, allow_imports=["mine"])["config"].rate == 4


@pytest.mark.parametrize(
    "name", ["lib.danger", "lib._Hidden", "lib.dataclasses.replace", "lib.CALLS.append", "lib.work",
             "os.system", "danger", "lib.Size.__init__", "gin.singleton"],
)  # fmt: skip
def test_only_dataclasses_can_be_named(library, tmp_path, name):
    refused(library, "FOLDER=f", f"RATE=@{name}()")
    (tmp_path / "more.gin").write_text(f"import gin_test_library as lib\nRATE = @{name}()\n")
    refused(library, "FOLDER=f", files=["base.gin", "more.gin"])
    assert not library.CALLS


def test_includes_stay_inside(library, tmp_path):
    outside = tmp_path.parent / f"{tmp_path.name}_outside.gin"
    outside.write_text("RATE = 0.9\n")
    for written in (outside, f"../{outside.name}"):
        (tmp_path / "more.gin").write_text(f"\ninclude '{written}'\n")
        message = refused(library, "FOLDER=f", files=["base.gin", "more.gin"])
        assert "more.gin:2" in message and "--gin_search_paths" in message
    trusted = arguments(
        library, "FOLDER=f", files=["base.gin", "more.gin"], search_paths=[str(tmp_path.parent)]
    )
    assert trusted["config"].rate == 0.9
    (tmp_path / "link.gin").symlink_to(outside)
    (tmp_path / "more.gin").write_text("include 'link.gin'\n")
    assert "refused" in refused(library, "FOLDER=f", files=["base.gin", "more.gin"])


def test_include_cycle(library, tmp_path):
    (tmp_path / "a.gin").write_text("include 'b.gin'")
    (tmp_path / "b.gin").write_text("include 'a.gin'")
    assert "includes itself" in refused(library, files=["a.gin"])


# ---- the command


def test_argv():
    values = configure.parse_argv(
        ["x", "--gin_file=a", "--gin_file", "b", "--gin.A=1", "--gin.s/b.C.d=x=y",
         "--gin_search_paths=p,q", "--dry_run", "--process_index=0"]
    )  # fmt: skip
    assert values.gin_file == ["a", "b"]
    assert values.gin_bindings == ["A=1", "s/b.C.d=x=y"]
    assert values.gin_search_paths == ["p", "q"] and values.dry_run and values.process_index == 0


@pytest.mark.parametrize(
    ("argv", "says"),
    [(["--gin_fil=a"], "gin_file"), (["MODEL_DIR=x"], "--gin.NAME=value"),
     (["--process_count=x"], "process_count")],
)  # fmt: skip
def test_bad_argv(argv, says):
    with pytest.raises(ConfigError, match=says):
        configure.parse_argv(["x", *argv])


def test_processes_need_each_other(library, monkeypatch):
    import jax

    started = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **kwargs: started.append((args, kwargs))
    )
    base = ["x", "--gin_file=base.gin", "--gin.FOLDER=f"]
    address = "--coordinator_address=h:1"
    for flags in (
        ["--process_index=0"],
        [address],
        [address, "--process_count=2", "--process_index=2"],
    ):
        with pytest.raises(ConfigError):
            configure.execute(library.work, base + flags)
    assert not started
    configure.execute(
        library.work,
        [*base, "--coordinator_address=h:1", "--process_count=2", "--process_index=1"],
    )
    ((args, settings),) = started
    assert not args and settings["coordinator_address"] == "h:1"
    assert (settings["num_processes"], settings["process_id"]) == (2, 1)
    assert library.CALLS and "FOLDER = 'f'" in configure.operative_config()


def test_config_gin_is_written_and_changes_are_shown(tmp_path, caplog):
    configure._write_config(str(tmp_path / "run"), "A = 1\nB = 2\n")
    assert (tmp_path / "run" / "config.gin").read_text() == "A = 1\nB = 2\n"
    assert not caplog.records
    configure._write_config(str(tmp_path / "run"), "A = 1\nB = 4\n")
    assert not caplog.text  # nothing was trained with the first one
    (tmp_path / "run" / "checkpoint_1").mkdir()
    configure._write_config(str(tmp_path / "run"), "A = 1\nB = 2\n")
    caplog.clear()
    configure._write_config(str(tmp_path / "run"), "A = 1\nB = 3\n")
    assert "-B = 2" in caplog.text and "+B = 3" in caplog.text and "A = 1" not in caplog.text
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="MODEL_DIR"):
        configure._write_config(str(tmp_path / "file"), "A = 1\n")


SCRIPT = '''
"""Says what it does."""
import sys
from distill import configure
import gin_test_library
configure.ALLOWED_IMPORTS += ("gin_test_library",)

def fail(*, config, other=None):
    raise {error}

fail.__module__, fail.__qualname__ = "gin_test_library", "work"
gin_test_library.work = fail
configure.run(fail)
'''


def command(library, tmp_path, *argv, error="SystemExit(0)", env=()):
    (tmp_path / "script.py").write_text(SCRIPT.format(error=error))
    return subprocess.run(
        [sys.executable, "script.py", *argv],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", **dict(env)},
    )


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [("ValueError('too wide')", 2, "Error: too wide"),
     ("FileNotFoundError('no such data')", 2, "Error: no such data"),
     ("RuntimeError('a bug')", 1, "Traceback"), ("SystemExit(75)", 75, "")],
)  # fmt: skip
def test_exit_codes(library, tmp_path, error, code, says):
    done = command(library, tmp_path, "--gin_file=base.gin", "--gin.FOLDER=f", error=error)
    assert done.returncode == code and says in done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)


def test_config_error_is_only_its_message(library, tmp_path):
    done = command(library, tmp_path, "--gin_file=base.gin")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("Error: no value for FOLDER") and done.stderr.count("\n") == 1
    loud = command(library, tmp_path, "--gin_file=base.gin", env={"DISTILL_TRACEBACK": "1"}.items())
    assert "Traceback" in loud.stderr and loud.returncode == 2


def test_dry_run_and_help(library, tmp_path):
    bug = "RuntimeError('ran')"
    done = command(
        library, tmp_path, "--gin_file=base.gin", "--gin.FOLDER=f", "--dry_run", error=bug
    )
    assert done.returncode == 0 and "FOLDER = 'f'" in done.stdout
    done = command(library, tmp_path, "--help", error=bug)
    assert done.returncode == 0
    for text in ("Says what it does.", "--gin_file", "--gin.NAME=value", "--coordinator_address"):
        assert text in done.stdout
