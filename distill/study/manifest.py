"""A study's manifest: a TOML file that says which runs there are.

    title = "Accuracy against examples"
    dataset = "arithmetic"
    files = ["t5_1_1/tiny.gin", "quickstart.gin"]   # as behind --gin_file=
    baseline = "label-only"                         # the arm that the others are compared with

    [settings]                                      # as behind --gin., of every run
    TRAIN_STEPS = 1000                              # updates, from whatever a run starts from

    [axes]                                          # every arm takes every combination
    TRAIN_FRACTION = [0.25, 0.5, 1.0]
    RANDOM_SEED = [0, 1, 2]

    [[arms]]
    name = "label-only"
    task = "label"                                  # of the dataset: arithmetic_label
    tokens_of = "step-by-step"                      # as many steps as take its training tokens

    [[arms]]
    name = "step-by-step"
    task = "step_by_step"
    axes.ALPHA = [0.3, 0.5]                         # of this arm alone

    [[when]]                                        # settings of some of the runs
    model = "t5_1_1/xxl.gin"
    settings.PAIRS_PER_STEP = 32

An arm may name a `dataset` of its own, such as one with other rationales for the same examples: it
is trained on that and tested like the others. The names of axes and settings are gin's; two are
not: `dataset`, and `model`, a gin file that comes before `files`. A task that is a mixture of two
streams is trained step-by-step, every other one on one loss; `files` name a run that is
step-by-step, such as `published.gin`.
"""

import dataclasses
import difflib
import itertools
import math
import pathlib
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from distill import configure, prompts

SEED, STEPS = "RANDOM_SEED", "TRAIN_STEPS_RELATIVE"
# Axes that are no settings of gin.
DATASET, MODEL = "dataset", "model"
# What a study sets itself, and what to do instead.
_OURS = {
    "MODEL_DIR": "each run has a folder of its own, in --output_dir",
    "MIXTURE_OR_TASK_NAME": "it follows from dataset and the arm's task",
    "TEST_AT_END": "the step that validation chooses is tested, once",
    STEPS: "in a study TRAIN_STEPS is the number of updates",
    "EVAL_PERIOD": "set evaluations in the manifest",
    "CHECKPOINT_PERIOD": "a run is saved whenever it is evaluated",
    "CHECKPOINTS_TO_KEEP": "the newest and the best are kept",
    "OBJECTIVE": "it follows from the arm's task",
}
_SETTING = re.compile(r"([A-Za-z_]\w*/)*[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_MAX_CELLS = 10_000


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train a student.

    Attributes:
      name: in tables and plots.
      task: of a dataset, what is behind its name: `step_by_step`, `label`, `label_llm`, ...
      settings: of its runs alone, by gin's names.
      axes: of its runs alone.
      tokens_of: the arm whose number of training tokens its runs get, instead of TRAIN_STEPS.
      dataset: to train on, where it is not the one that it is tested on.
    """

    name: str
    task: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    axes: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    tokens_of: str | None = None
    dataset: str | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
      name: unique, and safe as the name of a folder.
      arm: how it is trained.
      point: its value on every axis.
      settings: of gin, all but MODEL_DIR and those that a run chooses itself.
    """

    name: str
    arm: Arm
    point: Mapping[str, Any]
    settings: Mapping[str, Any]

    @property
    def task(self) -> str:
        """The SeqIO task or mixture that it is trained on."""
        return f"{self.arm.dataset or self.point[DATASET]}_{self.arm.task}"


@dataclasses.dataclass(frozen=True)
class Study:
    """A manifest, checked.

    Attributes:
      name: of the file, without suffix.
      title: of the plots.
      files: gin files of every run; the model's, where it is no axis, among them.
      baseline: the arm that the others are compared with; None = the first.
      evaluations: how often a run is evaluated on the validation split; its best step is tested.
      arms: ways to train.
      settings: of every run.
      axes: that every arm has.
      when: (values on axes or of `arm`, settings): settings of the runs that have these values.
    """

    name: str
    title: str
    files: Sequence[str]
    arms: Sequence[Arm]
    baseline: str | None = None
    evaluations: int = 10
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    axes: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    when: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]] = ()

    def cells(self) -> list[Cell]:
        """All runs, arm by arm, in the order of the axes."""
        varied = {
            axis for arm in self.arms for axis, values in self.axes_of(arm).items()
            if len(values) > 1 or axis == SEED
        }  # fmt: skip
        found: dict[str, Cell] = {}
        for arm in self.arms:
            axes = self.axes_of(arm)
            for values in itertools.product(*axes.values()):
                cell = self._cell(arm, dict(zip(axes, values, strict=True)), varied)
                if cell.name in found:
                    raise ValueError(f"{self.name}: two runs are called {cell.name!r}.")
                found[cell.name] = cell
        return list(found.values())

    def axes_of(self, arm: Arm) -> dict[str, Sequence[Any]]:
        return {**self.axes, **arm.axes}

    def _cell(self, arm: Arm, point: dict[str, Any], varied: set[str]) -> Cell:
        settings = {**self.settings, **arm.settings}
        for values, extra in self.when:
            if all({**point, "arm": arm.name}.get(k) == v for k, v in values.items()):
                settings |= extra
        settings |= {k: v for k, v in point.items() if k not in (DATASET, MODEL)}
        parts = [f"{axis}={_word(value)}" for axis, value in point.items() if axis in varied]
        return Cell("+".join([_word(arm.name), *parts]), arm, point, settings)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def reference(self, cell: Cell) -> Cell:
        """The run of the arm in `tokens_of` with the same values; of its own axes the first."""
        arm = self.arm(cell.arm.tokens_of)
        point = {}
        for axis, values in self.axes_of(arm).items():
            if cell.point.get(axis, values[0]) not in values:
                raise ValueError(
                    f"{cell.name}: {arm.name!r}, whose tokens it takes, has no run with "
                    f"{axis} = {cell.point[axis]}."
                )
            point[axis] = cell.point.get(axis, values[0])
        return self._cell(arm, point, set())

    def files_of(self, cell: Cell) -> list[str]:
        """The gin files of a run."""
        files = ([cell.point[MODEL]] if MODEL in cell.point else []) + list(self.files)
        if prompts.split_name(cell.task)[1] not in prompts.MIXTURES:
            files.append("standard.gin")
        return files

    def settings_of(self, cell: Cell, user: Sequence[str] = ()) -> dict[str, str]:
        """The gin settings of a run, all but its folder and length, as they are written.

        Args:
          cell: the run.
          user: settings `NAME=value` that hold before the manifest's.
        """
        settings = {name: _gin(value) for name, value in cell.settings.items()}
        settings |= {"MIXTURE_OR_TASK_NAME": cell.task, "TEST_AT_END": "False"}
        return settings | {name: value for name, _, value in (s.partition("=") for s in user)}

    def command(self, cell: Cell, user: Sequence[str] = ()) -> list[str]:
        """Arguments of `scripts/train.py`, but for MODEL_DIR and the run's length."""
        return [
            *(f"--gin_file={file}" for file in self.files_of(cell)),
            *(f"--gin.{name}={text}" for name, text in self.settings_of(cell, user).items()),
        ]

    def check_settings(self, user: Sequence[str]) -> None:
        """Raises ValueError where a setting of the user's is the study's to make."""
        axes = {axis for arm in self.arms for axis in self.axes_of(arm)}
        for name in (setting.partition("=")[0] for setting in user):
            if name in axes:
                raise ValueError(f"--gin.{name}: it is an axis of the study; change the manifest.")
            if name in _OURS:
                raise ValueError(f"--gin.{name}: {_OURS[name]}")


def _word(value: Any) -> str:
    """A value in a file's name."""
    text = str(value).removesuffix(".gin")
    return re.sub(r"[^A-Za-z0-9.=_-]+", "-", text).strip("-.") or "-"


def _gin(value: Any) -> str:
    return value if isinstance(value, str) else repr(value)


def read(path: str) -> Study:
    """Reads a manifest.

    Args:
      path: of the file; or a name in `gin_configs/studies`, such as `arithmetic.toml`.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is no TOML, or says what no study can be; the message names file and entry.
    """
    file = _find(path)
    try:
        said = tomllib.loads(file.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{file}: not TOML: {e}") from None
    try:
        return _study(file.stem, said)
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from None


def _find(path: str) -> epath.Path | pathlib.Path:
    here = epath.Path(path).expanduser()
    if here.is_file():
        return here
    packaged = [pathlib.Path(root) / "studies" for root in configure.packaged_roots()]
    for folder in packaged:
        if (folder / path).is_file():
            return folder / path
    known = sorted({
        str(file.relative_to(folder))
        for folder in packaged if folder.is_dir() for file in folder.glob("**/*.toml")
    })  # fmt: skip
    close = difflib.get_close_matches(path, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else f" There are: {', '.join(known)}."
    raise FileNotFoundError(f"There is no manifest {path}.{hint}")


def _study(name: str, said: dict[str, Any]) -> Study:
    _known("the manifest", said, {
        "title": str, "dataset": str, "model": str, "files": list, "baseline": str,
        "evaluations": int, "settings": dict, "axes": dict, "arms": list, "when": list,
    })  # fmt: skip
    axes = {DATASET: [said["dataset"]]} if "dataset" in said else {}
    axes |= {MODEL: [said["model"]]} if "model" in said else {}
    axes |= _axes("axes", said.get("axes", {}))
    if not said.get("arms"):
        raise ValueError("it has no [[arms]]: ways to train, each with a name and a task")
    arms = [_arm(number, arm) for number, arm in enumerate(said["arms"], 1)]
    study = Study(
        name=name,
        title=said.get("title", name),
        files=said.get("files", []),
        arms=arms,
        baseline=said.get("baseline"),
        evaluations=said.get("evaluations", Study.evaluations),
        settings=_settings("settings", said.get("settings", {})),
        axes={**axes, SEED: axes.pop(SEED, [0])},  # the last one: it varies fastest
        when=[_when(number, when) for number, when in enumerate(said.get("when", []), 1)],
    )
    _check(study)
    return study


def _arm(number: int, said: Any) -> Arm:
    where = f"arm {number}"
    _known(where, said, {
        "name": str, "task": str, "settings": dict, "axes": dict, "tokens_of": str, "dataset": str,
    })  # fmt: skip
    for key in ("name", "task"):
        if not said.get(key):
            raise ValueError(f"{where} has no {key}")
    return Arm(
        name=said["name"],
        task=said["task"],
        settings=_settings(where, said.get("settings", {})),
        axes=_axes(where, said.get("axes", {})),
        tokens_of=said.get("tokens_of"),
        dataset=said.get("dataset"),
    )


def _when(number: int, said: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    where = f"when {number}"
    if not isinstance(said, dict) or not isinstance(said.get("settings"), dict) or len(said) < 2:
        raise ValueError(f"{where} needs values of axes (or an arm) and [when.settings]")
    values = _flat({k: v for k, v in said.items() if k != "settings"})
    return values, _settings(where, said["settings"])


def _check(study: Study) -> None:
    """Raises ValueError where the parts do not fit each other."""
    names = [arm.name for arm in study.arms]
    for arm in study.arms:
        axes = study.axes_of(arm)
        if names.count(arm.name) > 1:
            raise ValueError(f"two arms are called {arm.name!r}")
        if DATASET not in axes:
            raise ValueError('it names no dataset: dataset = "cqa", or an axis of that name')
        if arm.tokens_of == arm.name or arm.tokens_of not in (None, *names):
            raise ValueError(f"arm {arm.name!r}: tokens_of must be one of the other arms: {names}")
        if arm.tokens_of and study.arm(arm.tokens_of).tokens_of:
            raise ValueError(f"arm {arm.name!r}: {arm.tokens_of!r} has tokens_of itself")
        form = arm.task.removesuffix("_llm")
        if form not in (*prompts.MIXTURES, *prompts.FORMS):
            close = difflib.get_close_matches(form, [*prompts.MIXTURES, *prompts.FORMS], n=1)
            raise ValueError(
                f"arm {arm.name!r}: there is no task {arm.task!r}."
                + (f" Did you mean {close[0]}?" if close else "")
                + f" Known: {', '.join([*prompts.MIXTURES, *prompts.FORMS])}, each with _llm for "
                "the teacher's labels."
            )
        if arm.tokens_of and "TRAIN_STEPS" in {*arm.settings, *arm.axes}:
            raise ValueError(f"arm {arm.name!r} has both TRAIN_STEPS and tokens_of")
    if study.baseline not in (None, *names):
        raise ValueError(f"baseline is {study.baseline!r}, the arms are {names}")
    if study.evaluations < 1:
        raise ValueError(f"evaluations must be positive, not {study.evaluations}")
    known = {axis for arm in study.arms for axis in study.axes_of(arm)} | {"arm"}
    for values, _ in study.when:
        if unknown := set(values) - known:
            raise ValueError(f"when {unknown.pop()!r}: no arm has this axis; there are {known}")
    number = sum(math.prod(map(len, study.axes_of(arm).values())) for arm in study.arms)
    if number > _MAX_CELLS:
        raise ValueError(f"it has {number:,} runs; {_MAX_CELLS:,} are the limit")
    study.cells()


def _known(where: str, said: Any, kinds: Mapping[str, type]) -> None:
    if not isinstance(said, dict):
        raise ValueError(f"{where} must be a table, not {said!r}")
    for key, value in said.items():
        if key not in kinds:
            close = difflib.get_close_matches(key, kinds, n=1)
            hint = f" Did you mean {close[0]}?" if close else f" Known: {', '.join(kinds)}."
            raise ValueError(f"{where}: there is no {key!r}.{hint}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise ValueError(f"{where}: {key} must be a {kinds[key].__name__}, not {value!r}")


def _settings(where: str, said: dict[str, Any]) -> dict[str, Any]:
    found = _flat(said)
    for name in found:
        if name in _OURS:
            raise ValueError(f"{where}: {name} is set by the study: {_OURS[name]}")
    return found


def _axes(where: str, said: dict[str, Any]) -> dict[str, list[Any]]:
    found = _settings(where, said)
    for name, values in found.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}: {name} must be a list of values, not {values!r}")
        if any(values.count(value) > 1 for value in values):
            raise ValueError(f"{where}: {name} has a value twice: {values}")
    return found


def _flat(said: Mapping[str, Any]) -> dict[str, Any]:
    """`T5Config.emb_dim = 64` is a table in TOML: {"T5Config": {"emb_dim": 64}}, as gin names it.

    A macro is upper case; its tables are values (`TASK_FEATURE_LENGTHS = {inputs = 44}`).
    """
    found = {}
    for name, value in said.items():
        if not _SETTING.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a setting")
        if isinstance(value, dict) and not name.isupper():
            found |= {f"{name}.{inner}": v for inner, v in _flat(value).items()}
        else:
            found[name] = value
    return found
