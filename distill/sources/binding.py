"""What a run chooses about all its sources, bound once for the process."""

import dataclasses
import os
import re
from typing import Any

from etils import epath

from distill.sources.rows import warn_once


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run chooses about all its sources; None = from the environment, else the default.

    Attributes:
      data_dir: the folder that holds the datasets, local or gs:// (DISTILL_DATA_DIR).
      parsing: how the teacher's completions are read: `reference` (the published rules) or
        `repaired` (DISTILL_PARSING).
      teacher_filter: what becomes of training rows whose teacher label is unparsed or disagrees
        with gold: `keep`, `drop`, `label_only` or `keep_gold` (DISTILL_TEACHER_FILTER).
      rationale_store: a rationale store, whose answers replace those of the sources
        (DISTILL_RATIONALE_STORE).
      max_bad_rows: lines of a JSON-lines file that may be unusable; they are reported and left
        out (DISTILL_MAX_BAD_ROWS).
    """

    data_dir: str | None = None
    parsing: str | None = None
    teacher_filter: str | None = None
    rationale_store: str | None = None
    max_bad_rows: int | None = None


_DEFAULTS = {"parsing": "reference", "teacher_filter": "keep", "max_bad_rows": 0}
CHOICES = {
    "parsing": ("reference", "repaired"),
    "teacher_filter": ("keep", "drop", "label_only", "keep_gold"),
}
_bound = Settings()


def bind(**values: Any) -> None:
    """Sets fields of `Settings`, once for the whole process; None leaves a field as it is.

    Args:
      **values: fields of `Settings`.

    Raises:
      ValueError: another value is already bound, or the value is not allowed.
    """
    global _bound
    new = dataclasses.replace(_bound)
    for field, value in values.items():
        if value is None:
            continue
        value = checked(field, value)
        old = getattr(_bound, field)
        if old is not None and str(old).rstrip("/") != str(value).rstrip("/"):
            raise ValueError(already_bound(field, old, value))
        new = dataclasses.replace(new, **{field: value if old is None else old})
    _bound = new


def already_bound(field: str, old: Any, new: Any) -> str:
    """Returns the message for a setting that cannot change any more."""
    return (
        f"{field} is already {old!r} and cannot become {new!r}: it is fixed once tasks are "
        f"registered or read. Set it before, with --gin.{field.upper()}=... or "
        f"DISTILL_{field.upper()}, or use another process"
    )


def settings() -> Settings:
    """Returns what is bound, completed from the environment and the defaults.

    What comes from the environment is bound by being asked for.
    """
    missing = {}
    for field in dataclasses.fields(Settings):
        if getattr(_bound, field.name) is None:
            value = os.environ.get(f"DISTILL_{field.name.upper()}") or None
            if value is not None:
                missing[field.name] = value
    bind(**missing)
    unset = {k: v for k, v in _DEFAULTS.items() if getattr(_bound, k) is None}
    return dataclasses.replace(_bound, **unset)


def checked(field: str, value: Any) -> Any:
    """Returns the value of a setting; of max_bad_rows, as an int.

    Raises:
      ValueError: it is not allowed.
    """
    if field in CHOICES and value not in CHOICES[field]:
        raise ValueError(
            f"{field.upper()} must be one of {', '.join(CHOICES[field])}, not {value!r}"
        )
    if field != "max_bad_rows":
        return value
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,9}", str(value)):
        raise ValueError(f"{field.upper()} must be a whole number, 0 or more, not {value!r}")
    return int(value)


def reset() -> None:
    """Forgets the settings. For tests and notebooks only."""
    global _bound
    _bound = Settings()
    warn_once.cache_clear()


def in_data_folder(name: str, relative: str) -> epath.Path:
    """Returns the path of a file or folder that must be in the data folder."""
    fix = "set the folder that holds the datasets with --gin.DATA_DIR=... or DISTILL_DATA_DIR=..."
    folder = settings().data_dir
    if epath.Path(relative).is_absolute():
        path, where = epath.Path(relative), ""
    elif folder is None:
        raise FileNotFoundError(
            f"{name} is read from <data folder>/{relative}, but no data folder is set: {fix}"
        )
    else:
        there = "" if epath.Path(folder).exists() else ", which does not exist"
        path, where = epath.Path(folder) / relative, f" (data folder {folder}{there})"
    if not path.exists():
        raise FileNotFoundError(f"{name}: no file {path}{where}: add it, or {fix}")
    return path
