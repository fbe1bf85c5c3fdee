"""Command line and gin: from flags and files to checked dataclasses, or one readable error.

This is the only module that imports gin. `scripts/*.py` are a docstring and `configure.run(fn)`.

gin accepts misspelt macros, never checks a name's origin and runs whatever module a file imports.
So gin's own parser is first run with a delegate that resolves nothing (`_Quote`): it gives every
statement of every file, include and `--gin.` flag as data, and no module is imported and no
reference looked up until all of it has passed. What passed is then written out as one flat text
with full names (`Resolved.text`), and only that text reaches gin. It is also what `config.gin`
holds, so that a run's record is the very text that the run was started from.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import logging as std_logging
import math
import os
import pathlib
import re
import sys
import tokenize
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import gin
from absl import flags, logging
from gin import config_parser

from distill import __version__, cluster

COMMAND_LINE = "command line"
# Modules that a gin file may import without --gin_allow_import.
ALLOWED_IMPORTS = ("__gin__", "distill", "gin", "tasks")
# Where names without a prefix are looked for, inside the installed `gin_configs` package.
PACKAGED_ROOTS = ("models", "runs", "objectives", ".")
# Far above any config; keeps a wrong path (a checkpoint, a dataset) from being tokenised.
MAX_FILE_BYTES = 1 << 20

_PARSE_ERRORS = (
    SyntaxError,
    tokenize.TokenError,
    ValueError,
    TypeError,
    IndexError,
    StopIteration,
    RecursionError,
    MemoryError,
)
_SECRET_NAME = re.compile(
    r"(^|_)(api_?key|secret|password|passwd|credentials?|(access|auth|bearer|hf|api)_?token)$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(r"^(sk-|hf_|ghp_|AKIA|AIza)[A-Za-z0-9_-]{16,}$")
# How to give a macro that has no value; others get `--gin.NAME=...`.
_EXAMPLES = {
    "MODEL": "--gin_file=t5_1_1/small.gin",
    "MODEL_DIR": "--gin.MODEL_DIR=/tmp/my_run",
    "MIXTURE_OR_TASK_NAME": "--gin.MIXTURE_OR_TASK_NAME=svamp_step_by_step",
    "CHECKPOINT_PATH": "--gin.CHECKPOINT_PATH=/tmp/my_run",
}
# Macros of T5X that mean nothing here, and why.
_NOT_HERE = {
    "LOSS_NORMALIZING_FACTOR": "the loss is always a mean over the batch's real tokens",
    "USE_CACHED_TASKS": "tokenised rows are always cached, in CACHE_DIR",
}


class ConfigError(ValueError):
    """A mistake in flags or gin files. Its message is all that the user sees."""


# ---------------------------------------------------------------- statements as data


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/name` or `@scope/name()`; `repr` is gin's syntax."""

    scope: str
    name: str
    evaluate: bool

    def __repr__(self) -> str:
        prefix = f"{self.scope}/" if self.scope else ""
        return f"@{prefix}{self.name}{'()' if self.evaluate else ''}"


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%NAME`; `repr` is gin's syntax."""

    name: str

    def __repr__(self) -> str:
        return f"%{self.name}"


REQUIRED = Macro("gin.REQUIRED")


class _Quote(config_parser.ParserDelegate):
    """Keeps references and macros as names, so that parsing has no effect."""

    def configurable_reference(self, scoped_configurable_name, evaluate):
        scope, _, name = scoped_configurable_name.rpartition("/")
        return Reference(scope, name, evaluate)

    def macro(self, macro_name):
        return REQUIRED if macro_name in ("REQUIRED", "gin.REQUIRED") else Macro(macro_name)


@dataclasses.dataclass(frozen=True)
class Where:
    """The place of a statement."""

    file: str  # a path, or COMMAND_LINE
    line: int = 0
    packaged: bool = False  # one of the files that this project ships

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file

    @property
    def typed(self) -> bool:
        return self.file == COMMAND_LINE


@dataclasses.dataclass(frozen=True)
class _Binding:
    """One assignment as read; `imports` maps the names bound in its file to modules."""

    scope: str
    selector: str  # the macro's name where `arg` is empty
    arg: str
    value: Any
    where: Where
    imports: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Setting:
    """The last value that was given to a macro or parameter, and where."""

    value: Any
    where: Where


@dataclasses.dataclass(frozen=True)
class Key:
    """A parameter of a configurable, by full name: `scope/module.Name.arg`."""

    scope: str
    name: str
    arg: str

    def __str__(self) -> str:
        return f"{self.scope + '/' if self.scope else ''}{self.name}.{self.arg}"


def _parts(value: Any) -> Iterator[Any]:
    """Yields `value` and everything inside its lists, tuples and dicts."""
    yield value
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item)


def _map_references(fn: Callable[[Reference], Reference], value: Any) -> Any:
    if isinstance(value, Reference):
        return fn(value)
    if isinstance(value, Mapping):
        return {_map_references(fn, k): _map_references(fn, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_references(fn, item) for item in value)
    return value


def _statements(text: str, name: str) -> list[Any]:
    """Parses gin text without resolving anything. Raises ConfigError with name and line."""
    try:
        return list(config_parser.ConfigParser(text, _Quote()))
    except _PARSE_ERRORS as error:
        message, line = _parse_error(error)
        place = f"{name}:{line}" if line else name
        raise ConfigError(f"{place}: not gin syntax: {message}") from None


def _parse_error(error: BaseException) -> tuple[str, int]:
    """Returns message and line of any of the parser's exceptions."""
    if isinstance(error, SyntaxError):
        # gin passes its own Location tuple, which does not always have the fields that
        # SyntaxError expects; Python then keeps it in `args` only.
        location = error.args[1] if len(error.args) > 1 else ()
        line = location[1] if len(location) > 1 and isinstance(location[1], int) else 0
        return str(error.args[0]).splitlines()[0], line
    if isinstance(error, tokenize.TokenError):
        return str(error.args[0]), error.args[1][0]
    if isinstance(error, RecursionError | MemoryError):
        return "nested too deeply", 0
    return f"{type(error).__name__}: {error}".splitlines()[0], 0


def _is_literal(value: Any) -> bool:
    """Whether gin reads `repr(value)` back as the same value."""
    # `type(...)` because subclasses (IntEnum, numpy floats) print in other ways.
    kinds = (str, int, float, bool, bytes, type(None), list, tuple, dict, Reference, Macro)
    return all(
        type(part) in kinds and not (isinstance(part, float) and not math.isfinite(part))
        for part in _parts(value)
    )


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, sorted(set(known)), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""


# ---------------------------------------------------------------- the command line's values


def parse_value(text: str) -> Any:
    """Returns the value of `--gin.NAME=text`: gin's meaning, else the text itself as a string.

    Numbers, True, False, None, quoted strings, lists, tuples, dicts, `@ref()` and `%MACRO` mean
    what they mean in a gin file. Anything else is a string and needs no quotes; a leading `~/` is
    then the home folder, because no shell expands it after `=`.

    Raises:
        ConfigError: The text is empty, or opens one of gin's constructs and does not parse.
    """
    stripped = text.strip()
    if not stripped:
        raise ConfigError("has no value; write '' for an empty string")
    opens = stripped[0] in "@%([{'\""
    # In gin `5#b` is 5 and a comment; in a shell the user meant a name.
    if opens or "#" not in stripped:
        try:
            parsed = list(config_parser.ConfigParser(f"value = {stripped}\n", _Quote()))
        except _PARSE_ERRORS as error:
            if opens:
                raise ConfigError(
                    f"{stripped} starts like gin but does not parse ({_parse_error(error)[0]}); "
                    "put it in quotes if it is a string"
                ) from None
        else:
            if len(parsed) == 1 and isinstance(parsed[0], config_parser.BindingStatement):
                if _is_literal(parsed[0].value):
                    return parsed[0].value
    return os.path.expanduser(text) if text.startswith("~/") else text


def _command_line_binding(text: str) -> _Binding:
    """Turns `NAME=value` or `module.Class.param=value` into a binding."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"([A-Za-z_]\w*/)*[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", key):
        raise ConfigError(f"--gin.{text}: write --gin.NAME=value or --gin.module.Class.param=value")
    try:
        parsed = parse_value(value)
    except ConfigError as error:
        raise ConfigError(f"--gin.{key}: {error}") from None
    scope, selector, arg = config_parser.parse_binding_key(key)
    return _Binding(scope, selector, arg, parsed, Where(COMMAND_LINE), {})


# ---------------------------------------------------------------- files


def packaged_roots() -> list[str]:
    """Folders of the installed gin_configs package; finds it without importing it."""
    spec = importlib.util.find_spec("gin_configs")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    roots = [os.path.normpath(os.path.join(f, root)) for f in folders for root in PACKAGED_ROOTS]
    return [root for root in roots if os.path.isdir(root)]


class _Reader:
    """Reads gin files and their includes into a list of bindings; imports nothing."""

    def __init__(self, search_paths: Sequence[str], allow_imports: Sequence[str]):
        self.packaged = packaged_roots()
        self.roots = [*self.packaged, os.getcwd(), *map(os.path.expanduser, search_paths)]
        self.allowed = (*ALLOWED_IMPORTS, *allow_imports)
        self.bindings: list[_Binding] = []
        self.modules: list[str] = []
        self.files: list[str] = []
        self._open: list[str] = []

    def read(self, name: str, including: Where | None = None) -> None:
        """Reads one file, named on the command line or by an include at `including`."""
        path = self._locate(name, including)
        if path in self._open:
            raise ConfigError(f"{including}: {name} includes itself: {' -> '.join(self._open)}")
        if including is None:
            self.files.append(path)
        packaged = any(_inside(path, root) for root in self.packaged)
        if any(_inside(path, os.path.join(root, "t5x")) for root in self.packaged):
            raise ConfigError(
                f"{path} is for T5X itself: python -m t5x.train --gin_file={path} (docs/t5x.md). "
                "Here, give a model file and a run file: --gin_file=t5_1_1/base.gin "
                "--gin_file=step_by_step.gin"
            )
        imports: dict[str, str] = {}
        self._open.append(path)
        for statement in _statements(_read_text(path), path):
            where = Where(path, statement.location.line_num, packaged)
            match statement:
                case config_parser.ImportStatement():
                    self._import(statement, where, imports)
                case config_parser.IncludeStatement():
                    self.read(statement.filename, including=where)
                case config_parser.BindingStatement(scope, selector, arg, value):
                    if not _is_literal(value):
                        raise ConfigError(f"{where}: {value!r} cannot be written in a config")
                    self.bindings.append(_Binding(scope, selector, arg, value, where, imports))
        self._open.pop()

    def _import(
        self, statement: config_parser.ImportStatement, where: Where, imports: dict[str, str]
    ) -> None:
        module = statement.module
        if module.split(".")[0] == "__gin__":
            if module != "__gin__.dynamic_registration":
                raise ConfigError(f"{where}: unknown gin feature: {statement.format()}")
            return
        if not _is_allowed(module, self.allowed):
            raise ConfigError(
                f'{where}: "{statement.format()}" is refused, because importing a module runs it. '
                f"Allowed: {', '.join(self.allowed)}. If you trust it: --gin_allow_import={module}"
            )
        if module not in self.modules and module.split(".")[0] != "gin":
            self.modules.append(module)
        plain = not statement.is_from and not statement.alias
        imports[statement.bound_name()] = module.split(".")[0] if plain else module

    def _locate(self, name: str, including: Where | None) -> str:
        if "://" in name:
            if including is None:
                return name
            raise ConfigError(f"{including}: include of {name}: only local files are included")
        name = os.path.expanduser(name)
        explicit = os.path.isabs(name) or name.split(os.sep)[0] in (".", "..")
        if including is not None:
            folder = os.path.dirname(including.file)
            roots = [folder] if name.startswith(".") else [folder, *self.roots]
        else:
            roots = [os.getcwd()] if explicit else self.roots
        candidates = [os.path.normpath(os.path.join(root, name)) for root in roots]
        found = list(dict.fromkeys(path for path in candidates if os.path.isfile(path)))
        if not found:
            raise ConfigError(self._not_found(name, roots, including))
        if including is not None:
            permitted = [os.path.dirname(including.file), *self.roots]
            if not any(_inside(found[0], root) for root in permitted):
                raise ConfigError(
                    f"{including}: include of {found[0]} is refused: it is neither beside this "
                    f"file nor under a search root. If you trust it: "
                    f"--gin_search_paths={os.path.dirname(found[0])}"
                )
        elif len(found) > 1:
            logging.warning(
                "--gin_file=%s means %s; write a path that starts with ./ or / for %s",
                name,
                found[0],
                " or ".join(found[1:]),
            )
        return found[0]

    def _not_found(self, name: str, roots: Sequence[str], including: Where | None) -> str:
        known = set()
        for root in self.packaged:
            known.update(str(p.relative_to(root)) for p in pathlib.Path(root).rglob("*.gin"))
        for root in roots:
            with contextlib.suppress(OSError):
                known.update(entry for entry in os.listdir(root) if entry.endswith(".gin"))
        # A user often has the right file and the wrong folder, or the folder left out.
        short = sorted(k for k in known if not any(k.endswith(f"/{other}") for other in known))
        names = [os.path.basename(k) for k in short]
        close = difflib.get_close_matches(os.path.basename(name), names, n=1, cutoff=0.6)
        same = [k for k, last in zip(short, names, strict=True) if last in close]
        hint = f" Did you mean {' or '.join(same[:6])}?" if same else ""
        who = f"{including}: include" if including else "--gin_file"
        return f"{who}: there is no file {name}.{hint} Looked in: {', '.join(roots)}"


def _inside(path: str, root: str) -> bool:
    if "://" in path or "://" in root:
        return False
    return pathlib.Path(path).resolve().is_relative_to(pathlib.Path(root).resolve())


def _is_allowed(module: str, allowed: Iterable[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


def _read_text(path: str) -> str:
    if "://" in path:
        from etils import epath  # 0.1 s; needed for gs:// only.

        source = epath.Path(path)
    else:
        source = pathlib.Path(path)
    try:
        data = source.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: {len(data)} bytes is too much for a gin file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason})") from None
    if "\0" in text:
        raise ConfigError(f"{path}: holds a NUL byte; not a gin file")
    return text


# ---------------------------------------------------------------- names


class _Names:
    """Resolves selectors to configurables, and nothing else to anything.

    From `distill` only public frozen dataclasses can be named, and the function that the command
    runs; from modules that the user allowed, any public class or function that they define.
    """

    def __init__(self, fn: Callable[..., Any], reader: _Reader):
        self.fn = fn
        self.fn_name = _full_name(fn)
        self.allowed = (*reader.allowed, fn.__module__)
        self.objects: dict[str, Any] = {self.fn_name: fn}
        for module in reader.modules:
            self._add(module)

    def _add(self, module: str) -> None:
        try:
            imported = importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"a gin file imports {module}: {error}") from None
        for name, value in vars(imported).items():
            if not name.startswith("_") and self._is_configurable(value):
                self.objects.setdefault(_full_name(value), value)

    def _is_configurable(self, value: Any) -> bool:
        module = getattr(value, "__module__", None)
        if not isinstance(module, str) or not _is_allowed(module, self.allowed):
            return False
        name = getattr(value, "__qualname__", "")
        if name.startswith("_") or "." in name:
            return False
        if self.is_foreign(_full_name(value)):
            return inspect.isclass(value) or inspect.isfunction(value)
        # Frozen leaves out flax modules, which are dataclasses too.
        return inspect.isclass(value) and (
            dataclasses.is_dataclass(value) and value.__dataclass_params__.frozen
        )

    def is_foreign(self, name: str) -> bool:
        """Whether a configurable comes from a module that the user allowed."""
        return name != self.fn_name and not _is_allowed(name, ALLOWED_IMPORTS)

    def resolve(self, selector: str, imports: Mapping[str, str], where: Where) -> str:
        """Returns the full name of `selector`, as imported in its file or by its last parts."""
        head, _, tail = selector.partition(".")
        if head in imports and tail:
            module, _, name = f"{imports[head]}.{tail}".rpartition(".")
            if _is_allowed(module, self.allowed) and _module_exists(module):
                self._add(module)
                value = getattr(sys.modules[module], name, None)
                if value is self.fn or (not name.startswith("_") and self._is_configurable(value)):
                    return _full_name(value)
        matches = [name for name in self.objects if f".{name}".endswith(f".{selector}")]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise ConfigError(f"{where}: {selector} is ambiguous: {', '.join(sorted(matches))}")
        short = {name.rpartition(".")[2] for name in self.objects}
        raise ConfigError(
            f"{where}: nothing that can be configured is called {selector}."
            f"{_did_you_mean(selector.rpartition('.')[2], short)} Known here: "
            f"{', '.join(sorted(short))}. Another module has to be imported in the gin file."
        )

    def parameters(self, name: str) -> Mapping[str, inspect.Parameter]:
        try:
            return inspect.signature(self.objects[name]).parameters
        except ValueError:
            return {}

    def check_parameter(self, name: str, arg: str, where: Where) -> None:
        known = self.parameters(name)
        if arg in known or any(p.kind is p.VAR_KEYWORD for p in known.values()):
            return
        raise ConfigError(
            f"{where}: {name.rpartition('.')[2]} has no parameter {arg}."
            f"{_did_you_mean(arg, known)} It has: {', '.join(known)}"
        )


def _module_exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # Its parent is a class or a plain module.
        return False


def _full_name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


# ---------------------------------------------------------------- the resolved configuration


@dataclasses.dataclass
class Resolved:
    """A checked configuration. `arguments()` builds what `fn` is called with."""

    names: _Names
    files: list[str]
    macros: dict[str, Setting]
    parameters: dict[Key, Setting]
    used_macros: list[str] = dataclasses.field(default_factory=list)
    used_names: list[str] = dataclasses.field(default_factory=list)

    def text(self, annotate: bool = False) -> str:
        """The configuration as one gin file: what this run uses, defaults included.

        Args:
            annotate: Say behind every line where its value was set.
        """
        used = {key: s for key, s in self.parameters.items() if key.name in self.used_names}
        for name in self.used_names:
            for arg, default in _literal_defaults(self.names.objects[name]).items():
                used.setdefault(Key("", name, arg), Setting(default, Where("default")))
        modules = sorted({name.rpartition(".")[0] for name in self.used_names})
        lines = [
            f"# Resolved configuration of {self.names.fn_name}, distill {__version__}.",
            "# To repeat the run, give this file alone as --gin_file.",
            "from __gin__ import dynamic_registration",
            *(f"import {module}" for module in modules),
            "",
        ]
        rows = [(macro, self.macros[macro]) for macro in sorted(self.used_macros)]
        rows += sorted(((str(key), setting) for key, setting in used.items()), key=lambda r: r[0])
        group = None
        for label, setting in rows:
            head = label.rpartition(".")[0]
            if head != group and group is not None:
                lines.append("")
            group = head
            line = f"{label} = {setting.value!r}"
            lines.append(f"{line:<60}  # {setting.where}" if annotate else line)
        return "\n".join(lines) + "\n"

    def arguments(self) -> dict[str, Any]:
        """Builds the arguments of `fn`: every `@reference()` is evaluated by gin.

        Raises:
            ConfigError: A dataclass refused its values.
        """
        gin.clear_config()
        gin.parse_config(self.text())
        gin.finalize()
        try:
            return gin.get_bindings(self.names.fn)
        except (ValueError, TypeError, KeyError, FileNotFoundError) as error:
            # gin appends one "In call to configurable" per level; the innermost says enough.
            message, _, trace = str(error).partition("\n  In call to configurable ")
            # TypeErrors get another block of gin's before it.
            message = message.partition("\n  No values supplied by Gin")[0]
            owner = trace.partition("'")[2].partition("'")[0]
            if owner and owner not in message:
                message = f"{owner}: {message}"
            raise ConfigError(message) from error


def _literal_defaults(configurable: Any) -> dict[str, Any]:
    """Defaults of a dataclass, or of a function's arguments, that gin can write down."""
    if not dataclasses.is_dataclass(configurable):
        return {}
    defaults = {}
    for field in dataclasses.fields(configurable):
        if not field.init:
            continue
        if field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            continue
        if _is_literal(value):
            defaults[field.name] = value
    return defaults


def resolve(
    fn: Callable[..., Any],
    gin_files: Sequence[str] = (),
    gin_bindings: Sequence[str] = (),
    *,
    search_paths: Sequence[str] = (),
    allow_imports: Sequence[str] = (),
) -> Resolved:
    """Reads and checks a configuration of `fn`; builds nothing yet.

    Args:
        fn: The function that the command runs.
        gin_files: Names as for --gin_file; a later file wins.
        gin_bindings: `NAME=value` as behind `--gin.`; they win over files.
        search_paths: More folders to look for files in.
        allow_imports: More modules that gin files may import.

    Raises:
        ConfigError: Anything that is wrong, with file and line.
    """
    reader = _Reader(search_paths, allow_imports)
    for name in gin_files:
        reader.read(name)
    reader.bindings += [_command_line_binding(text) for text in gin_bindings]
    _refuse_secrets(reader.bindings)
    resolved = _apply(_Names(fn, reader), reader)
    _check(resolved)
    return resolved


def _refuse_secrets(bindings: Iterable[_Binding]) -> None:
    """Configs are printed, logged and copied: a key must never get into one."""
    for binding in bindings:
        name = binding.arg or binding.selector
        strings = [part for part in _parts(binding.value) if isinstance(part, str)]
        if (_SECRET_NAME.search(name) and strings) or any(map(_SECRET_VALUE.match, strings)):
            raise ConfigError(
                f"{binding.where}: {name} looks like a secret (value not shown). Secrets are read "
                "from the environment or a file, never from a flag or gin."
            )


def _apply(names: _Names, reader: _Reader) -> Resolved:
    """Applies bindings in order; the last one wins."""
    macros: dict[str, Setting] = {}
    parameters: dict[Key, Setting] = {}
    for binding in reader.bindings:
        where = binding.where

        def full(reference: Reference, binding=binding) -> Reference:
            name = names.resolve(reference.name, binding.imports, binding.where)
            return _check_reference(names, dataclasses.replace(reference, name=name), binding)

        setting = Setting(_map_references(full, binding.value), where)
        if not binding.arg:
            name = f"{binding.scope}/{binding.selector}" if binding.scope else binding.selector
            _set(macros, name, setting)
        else:
            name = names.resolve(binding.selector, binding.imports, where)
            names.check_parameter(name, binding.arg, where)
            _set(parameters, Key(binding.scope, name, binding.arg), setting)
    return Resolved(names, reader.files, macros, parameters)


def _check_reference(names: _Names, reference: Reference, binding: _Binding) -> Reference:
    if reference.name == names.fn_name:
        raise ConfigError(f"{binding.where}: {reference} is what the command runs, not a value")
    if not reference.evaluate and not names.is_foreign(reference.name):
        raise ConfigError(f"{binding.where}: write {reference}() with parentheses")
    return reference


def _set(settings: dict[Any, Setting], key: Any, setting: Setting) -> None:
    before = settings.get(key)
    if before is not None:
        # `X = %gin.REQUIRED` says that a value is needed, so it never takes one away. (In gin it
        # does, and the order of two files then decides whether a run starts.)
        if setting.value == REQUIRED:
            return
        # Files of the package replace the values of those they include on purpose.
        ours = setting.where.packaged and before.where.packaged
        if before.value not in (REQUIRED, setting.value) and not setting.where.typed and not ours:
            logging.info(
                "%s = %r (%s) replaces %r (%s)",
                key,
                setting.value,
                setting.where,
                before.value,
                before.where,
            )
    settings[key] = setting


def _check(resolved: Resolved) -> None:
    """Finds what the run uses; raises one ConfigError for all that is unused or missing."""
    names = resolved.names
    if not any(key.name == names.fn_name for key in resolved.parameters):
        runs = [os.path.basename(p) for r in packaged_roots() for p in _run_files(r)]
        raise ConfigError(
            f"no gin file configures {names.fn_name}. Give a model file and a run file, for "
            f"example --gin_file=t5_1_1/tiny.gin --gin_file=step_by_step.gin. "
            f"Run files: {', '.join(runs)}"
        )
    missing = _walk(resolved)
    problems = _unused(resolved)
    if missing:
        example = " ".join(_EXAMPLES.get(name, f"--gin.{name}=...") for name in missing)
        needed = ", ".join(f"{name} (for {where})" for name, where in missing.items())
        problems.append(f"no value for {needed}. Give for example: {example}")
    if problems:
        raise ConfigError("\n".join(problems))


def _run_files(root: str) -> list[str]:
    if os.path.basename(root) != "runs":
        return []
    return sorted(f for f in os.listdir(root) if f.endswith(".gin") and not f.startswith("_"))


def _walk(resolved: Resolved) -> dict[str, str]:
    """Follows references from `fn`; fills `used_*`; returns what has no value -> who needs it."""
    names = resolved.names
    by_name: dict[str, dict[Key, Setting]] = collections.defaultdict(dict)
    for key, setting in resolved.parameters.items():
        by_name[key.name][key] = setting
    missing: dict[str, str] = {}
    open_nodes: list[str] = []

    def visit_value(label: str, setting: Setting) -> None:
        for part in _parts(setting.value):
            if part == REQUIRED:
                missing.setdefault(label, str(setting.where))
            elif isinstance(part, Macro) and part.name not in resolved.macros:
                missing.setdefault(part.name, f"{label}, {setting.where}")
            elif isinstance(part, Macro):
                visit(f"%{part.name}", {part.name: resolved.macros[part.name]}, setting)
            elif isinstance(part, Reference):
                visit(part.name, by_name[part.name], setting)

    def visit(node: str, settings: Mapping[Any, Setting], user: Setting | None) -> None:
        if node in open_nodes:
            chain = " -> ".join([*open_nodes[open_nodes.index(node) :], node])
            raise ConfigError(f"{user.where if user else node}: refers to itself: {chain}")
        used, entry = (
            (resolved.used_macros, node[1:])
            if node.startswith("%")
            else (resolved.used_names, node)
        )
        if entry in used:
            return
        open_nodes.append(node)
        for key, setting in settings.items():
            visit_value(key if isinstance(key, str) else _short(key), setting)
        if not node.startswith("%"):
            given = {key.arg for key in settings}
            for arg, parameter in names.parameters(node).items():
                needed = parameter.default is parameter.empty and parameter.kind in (
                    parameter.POSITIONAL_OR_KEYWORD,
                    parameter.KEYWORD_ONLY,
                )
                if needed and arg not in given:
                    missing.setdefault(_short(Key("", node, arg)), node)
        open_nodes.pop()
        used.append(entry)

    visit(names.fn_name, by_name[names.fn_name], None)
    for name in sorted(by_name):
        if names.is_foreign(name):  # The user's own code may call it, which nobody can see here.
            visit(name, by_name[name], None)
    return missing


def _short(key: Key) -> str:
    """`TrainConfig.model_dir`, or with scope: what the user can give behind `--gin.`."""
    return str(dataclasses.replace(key, name=key.name.rpartition(".")[2]))


def _unused(resolved: Resolved) -> list[str]:
    """Says which settings have no effect: misspelt macros, and typed ones that cannot matter."""
    values = [s.value for s in (*resolved.macros.values(), *resolved.parameters.values())]
    referenced = {p.name for value in values for p in _parts(value) if isinstance(p, Macro)}
    problems = []
    for name, setting in resolved.macros.items():
        if name in resolved.used_macros:
            continue
        if name not in referenced:
            if setting.where.packaged:
                continue
            if name in _NOT_HERE:
                problems.append(f"{setting.where}: there is no {name}: {_NOT_HERE[name]}")
                continue
            problems.append(
                f"{setting.where}: nothing uses the macro {name}."
                f"{_did_you_mean(name, referenced) or ' Known: ' + ', '.join(sorted(referenced))}"
            )
        elif setting.where.typed:
            problems.append(f"--gin.{name}: this run does not use it ({_who_uses(resolved, name)})")
    used = ", ".join(name.rpartition(".")[2] for name in resolved.used_names)
    for key, setting in resolved.parameters.items():
        if setting.where.typed and key.name not in resolved.used_names:
            problems.append(f"--gin.{_short(key)}: this run does not use it; it uses {used}")
    return problems


def _who_uses(resolved: Resolved, macro: str) -> str:
    users = [
        _short(key) for key, s in resolved.parameters.items() if Macro(macro) in _parts(s.value)
    ]
    return f"only {', '.join(users)} would" if users else "only other unused macros would"


# ---------------------------------------------------------------- the command


_operative: Resolved | None = None


def operative_config() -> str:
    """The text of the configuration of the running command, for `MODEL_DIR/config.gin`.

    It names every value that the run uses, with the defaults of this version, and is itself a
    gin file: `--gin_file=MODEL_DIR/config.gin` repeats the run.
    """
    if _operative is None:
        raise RuntimeError("configure.run() has not resolved a configuration yet")
    return _operative.text()


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags that every command has (T5X's names)."""

    def define(kind, name, default, text):
        kind(name, default, text, flag_values=values, module_name="distill")

    define(flags.DEFINE_multi_string, "gin_file", [], "A gin file; repeat it, a later one wins.")
    define(flags.DEFINE_multi_string, "gin_bindings", [], "NAME=value, as --gin.NAME=value.")
    define(flags.DEFINE_list, "gin_search_paths", [], "More folders to find gin files in.")
    define(
        flags.DEFINE_list,
        "gin_allow_import",
        [],
        "Modules that gin files may import beside distill and tasks. Importing runs them.",
    )
    define(flags.DEFINE_string, "tfds_data_dir", None, "Where TFDS keeps its datasets.")
    define(
        flags.DEFINE_list,
        "seqio_additional_cache_dirs",
        [],
        "Folders with outputs of seqio_cache_tasks.",
    )
    define(
        flags.DEFINE_string,
        "coordinator_address",
        None,
        "host:port of process 0 of a multi-process run. Not needed where the environment knows it "
        '(TPU pods, SLURM, Open MPI, indexed Kubernetes jobs); "auto" makes it an error that it '
        'does not, "none" ignores it.',
    )
    define(flags.DEFINE_integer, "process_count", None, "Number of processes.")
    define(flags.DEFINE_integer, "process_index", None, "This process, from 0.")
    define(
        flags.DEFINE_integer,
        "initialization_timeout",
        cluster.INITIALIZATION_TIMEOUT,
        "Seconds to wait for the other processes at the start.",
    )
    define(
        flags.DEFINE_integer,
        "heartbeat_timeout",
        cluster.HEARTBEAT_TIMEOUT,
        "Seconds of silence after which another process counts as dead.",
    )
    define(flags.DEFINE_bool, "dry_run", False, "Check and print the resolved config only.")


def parse_argv(argv: Sequence[str]) -> flags.FlagValues:
    """Parses a command line; `--gin.NAME=value` becomes an item of `gin_bindings`.

    Raises:
        ConfigError: An unknown flag, a bad value or a stray argument.
    """
    values = flags.FlagValues()
    define_flags(values)
    # absl would take `--gin.X` for an unknown flag, so rewrite first, as T5X does.
    rewritten = [re.sub(r"^--?gin\.", "--gin_bindings=", arg, count=1) for arg in argv]
    try:
        rest = values(rewritten, known_only=True)
        rest = flags.FLAGS(rest)
    except flags.UnrecognizedFlagError as error:
        known = [*values, *flags.FLAGS]
        hint = _did_you_mean(error.flagname, known) or " See --help."
        raise ConfigError(f"there is no flag --{error.flagname}.{hint}") from None
    except flags.Error as error:
        raise ConfigError(str(error)) from None
    if len(rest) > 1:
        raise ConfigError(f"unexpected argument {rest[1]!r}; settings are --gin.NAME=value")
    return values


def _help_text() -> str:
    values = flags.FlagValues()
    define_flags(values)
    doc = (sys.modules["__main__"].__doc__ or "").strip()
    return (
        f"{doc}\n\nFlags:\n{values.get_help().partition(chr(10))[2].strip(chr(10))}\n\n"
        "  --gin.NAME=value: Sets a macro; --gin.Class.param=value a parameter. Strings need no "
        "quotes.\n  --verbosity=1: Debug messages, and tracebacks of errors.\n"
    )


def _start_processes(values: flags.FlagValues) -> None:
    """Joins the other processes; must come before anything asks JAX for its devices."""
    try:
        cluster.start(
            values.coordinator_address,
            values.process_count,
            values.process_index,
            initialization_timeout=values.initialization_timeout,
            heartbeat_timeout=values.heartbeat_timeout,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def start_processes(argv: Sequence[str]) -> None:
    """Joins the other processes of a command line's run, as `execute` does; twice is no harm."""
    _start_processes(parse_argv(argv))


def _export_data_folders(values: flags.FlagValues) -> None:
    """Hands data folders to modules that import TFDS and SeqIO later, or never."""
    if values.tfds_data_dir:
        os.environ["TFDS_DATA_DIR"] = os.path.expanduser(values.tfds_data_dir)
    if values.seqio_additional_cache_dirs:
        folders = map(os.path.expanduser, values.seqio_additional_cache_dirs)
        os.environ["DISTILL_SEQIO_CACHE_DIRS"] = ",".join(folders)


def execute(fn: Callable[..., Any], argv: Sequence[str]) -> Any:
    """Parses `argv`, resolves the configuration and calls `fn`. Errors pass through.

    Returns:
        What `fn` returned; None where --dry_run left it uncalled.
    """
    global _operative
    values = parse_argv(argv)
    _operative = _resolve_flags(fn, values)
    if not values.dry_run:
        _start_processes(values)
        if not cluster.is_first() and logging.get_verbosity() == logging.INFO:
            logging.set_verbosity(logging.WARNING)  # one process says what the run does
    for path in _operative.files:
        logging.info("gin file: %s", path)
    _export_data_folders(values)
    arguments = _operative.arguments()
    if values.dry_run:
        print(_operative.text(annotate=True))
        return None
    model_dir = getattr(arguments.get("config"), "model_dir", None)
    if model_dir:
        _write_config(model_dir, _operative.text())
    _keep_programs(arguments)
    return fn(**arguments)


def resolved_arguments(fn: Callable[..., Any], argv: Sequence[str]) -> dict[str, Any]:
    """What `execute` would call `fn` with."""
    return _resolve_flags(fn, parse_argv(argv)).arguments()


def _resolve_flags(fn: Callable[..., Any], values: flags.FlagValues) -> Resolved:
    return resolve(
        fn,
        values.gin_file,
        values.gin_bindings,
        search_paths=values.gin_search_paths,
        allow_imports=values.gin_allow_import,
    )


def _write_config(model_dir: str, text: str) -> None:
    """Writes `MODEL_DIR/config.gin`; says what differs from the run that was there before."""
    import jax  # Here, because checking a configuration does not need it.
    from etils import epath

    if jax.process_index() != 0:
        return
    path = epath.Path(model_dir).expanduser() / "config.gin"
    try:
        before = path.read_text() if path.exists() else text
        difference = difflib.unified_diff(
            before.splitlines(), text.splitlines(), "before", "now", n=0, lineterm=""
        )
        # Without a checkpoint there is no run yet that could be mistaken for this one.
        if before != text and any(path.parent.glob("checkpoint_*")):
            logging.warning("%s changes:\n%s", path, "\n".join(difference))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"MODEL_DIR: cannot write {path}: {error.strerror or error}") from error


def _keep_programs(arguments: Mapping[str, Any]) -> None:
    """Keeps compiled programs beside the tokenised rows, for commands that have a CACHE_DIR."""
    from distill import cache, compilation  # here, as in _write_config

    folders = [value.cache_dir for value in arguments.values() if hasattr(value, "cache_dir")]
    if folders:
        compilation.keep_programs(folders[0] or cache.default_dir())


def _worth_showing(record: Any) -> bool:
    """Drops the INFO lines of libraries (Orbax alone writes dozens per checkpoint)."""
    own = os.path.dirname(os.path.abspath(__file__)) + os.sep
    foreign = "site-packages" in record.pathname and not record.pathname.startswith(own)
    return not foreign or record.levelno > 20 or logging.get_verbosity() > logging.INFO


def run(fn: Callable[..., Any], argv: Sequence[str] | None = None) -> None:
    """Runs a command whose arguments come from gin, as `run_main` does.

    Args:
        fn: For example `train.train`.
        argv: The command line; `sys.argv` by default.
    """
    run_main(lambda argv: execute(fn, argv), argv)


def run_main(main: Callable[[Sequence[str]], Any], argv: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0, 2 for a user's error (message only), else what `main` raises.

    Where several processes are one run, one that fails does not wait for the others.

    Args:
        main: Takes the command line.
        argv: The command line; `sys.argv` by default.
    """
    argv = list(sys.argv if argv is None else argv)
    if any(arg in ("--help", "-h", "-help", "--helpfull", "--helpshort") for arg in argv[1:]):
        print(_help_text())
        sys.exit(0)
    # A script's own folder is on the path, the one that the user is in is not; tasks may lie there.
    sys.path.append(os.getcwd())
    logging.use_absl_handler()
    logging.get_absl_handler().addFilter(_worth_showing)
    logging.get_absl_handler().setFormatter(std_logging.Formatter("%(message)s"))
    # absl hides INFO by default, where a run says what it does.
    flags.FLAGS.set_default("verbosity", logging.INFO)
    try:
        main(argv)
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        wants = os.environ.get("DISTILL_TRACEBACK") or logging.get_verbosity() > logging.INFO
        if wants:
            traceback.print_exc()
        print(f"Error: {error}", file=sys.stderr)
        if not wants and not isinstance(error, ConfigError):
            print("(DISTILL_TRACEBACK=1 shows where this was raised.)", file=sys.stderr)
        cluster.abandon(2)
        sys.exit(2)
    except (Exception, KeyboardInterrupt):
        if cluster.is_several():
            traceback.print_exc()
            cluster.abandon(1)
        raise
    sys.exit(0)
