"""Sources whose rows are made of declared fields: JSON lines and TensorFlow datasets."""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from distill.sources.binding import in_data_folder, settings
from distill.sources.jsonlines import UNUSABLE, read_json_lines, reason
from distill.sources.rows import Answer, Row, check_split, held_out

# The name of a field, or a function of all fields of a row.
Field = str | Callable[[Mapping[str, Any]], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Declared:
    """A source whose rows are made of declared fields; its user names files or a builder.

    Every field is given by its name, or as a function of a row's fields.

    Attributes:
      input: the text of the problem.
      label: the gold label; None for data without labels.
      rationale: a text, a list of texts (several answers), or null; a row may lack the field.
      teacher_label: the label that the rationale leads to, in the same forms; one text holds for
        all rationales of a row. None where the rationales are a human's, who was shown the gold
        label: they train `explain`, and there is no `_llm` variant.
      id: unique in its file; without it, the position in the file identifies a row.
      holdout: take the validation split out of the train split, as in `ReleasedLayout`.
    """

    input: Field
    label: Field | None = None
    rationale: Field | None = None
    teacher_label: Field | None = None
    id: Field | None = None
    holdout: bool = False

    def rows(self, split: str) -> list[Row]:
        """Returns the rows of a split, in the order of the data.

        Raises:
          FileNotFoundError: the data is not there.
          ValueError: a row is not as declared.
        """
        rows, count = self._read(self._stem(split))
        return held_out(rows, count, split) if self.holdout else list(rows.values())

    @property
    def splits(self) -> tuple[str, ...]:
        given = self._given()
        if not self.holdout:
            return tuple(given)
        return "train", "validation", *(s for s in given if s != "train")

    def __post_init__(self):
        given = self._given()
        allowed = ("train", "test") if self.holdout else ("train", "validation", "test")
        if unknown := [s for s in given if s not in allowed]:
            why = " (holdout=True makes validation out of train)" if self.holdout else ""
            raise ValueError(
                f"{self.name}: no split may be named {', '.join(unknown)}; allowed are "
                f"{', '.join(allowed)}{why}"
            )

    def _stem(self, split: str) -> str:
        check_split(self.name, split, self.splits)
        return "train" if self.holdout and split == "validation" else split

    def _required(self) -> list[str]:
        return [f for f in (self.input, self.label, self.id) if isinstance(f, str)]

    def _example(self, fields: Mapping[str, Any]) -> tuple[str | None, str, str | None, tuple]:
        """Returns (id, input, label, answers) of a row's fields."""
        row_id = None if self.id is None else _value(fields, self.id)
        wrong = isinstance(row_id, bool) or not isinstance(row_id, str | int)
        if self.id is not None and wrong:
            raise ValueError(f"an id must be text or a whole number, not {row_id!r}")
        text = _text(_value(fields, self.input), "input")
        label = None if self.label is None else _text(_value(fields, self.label), "label")
        return (None if row_id is None else str(row_id)), text, label, self._answers(fields)

    def _answers(self, fields: Mapping[str, Any]) -> tuple[Answer, ...]:
        rationales = self._samples(fields, self.rationale, "rationale")
        labels = self._samples(fields, self.teacher_label, "teacher_label")
        if len(labels) == 1:
            labels *= max(1, len(rationales))
        rationales = rationales or [None] * len(labels)
        labels = labels or [None] * len(rationales)
        if len(rationales) != len(labels):
            raise ValueError(
                f"{len(rationales)} rationales and {len(labels)} teacher labels; give as many, or "
                "one label for all"
            )
        return tuple(Answer(r, said) for r, said in zip(rationales, labels, strict=True))

    def _samples(
        self, fields: Mapping[str, Any], field: Field | None, what: str
    ) -> list[str | None]:
        """Returns the texts of a field that may be absent, a text or a list."""
        if field is None or (isinstance(field, str) and field not in fields):
            return []
        value = _value(fields, field)
        values = list(value) if isinstance(value, list | tuple) else [value]
        if wrong := [v for v in values if not isinstance(v, str | None)]:
            raise ValueError(f"{what} must be text, a list of texts or null, not {wrong[0]!r}")
        if values == [None]:
            return []
        return [v or None for v in values]

    def _row(self, stem: str, position: int, example: tuple) -> Row:
        row_id, text, label, answers = example
        row_id = f"{stem}/{position}" if row_id is None else row_id
        return Row(f"{self.name}/{row_id}", text, label, answers)


def _value(fields: Mapping[str, Any], field: Field) -> Any:
    return fields[field] if isinstance(field, str) else field(fields)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(
            f"the {what} must be text that is not empty, not {value!r} (declare a function of the "
            "row's fields where it needs to be made)"
        )
    return value


@dataclasses.dataclass(frozen=True)
class JsonLines(_Declared):
    """Rows of JSON-lines files, one for each split.

        JsonLines(
            "reviews",
            {"train": "reviews/train.jsonl", "test": "reviews/test.jsonl"},
            input="text", label="sentiment", rationale="why", teacher_label="teacher_says",
            holdout=True,
        )

    Attributes:
      name: of the dataset; the ids of its rows begin with it.
      paths: split (train, validation, test) -> file, absolute or relative to the data folder.
    """

    name: str
    paths: Mapping[str, str]

    def files(self, split: str) -> list[str]:
        """Returns the file behind a split."""
        return [str(in_data_folder(self.name, self.paths[self._stem(split)]))]

    def _given(self) -> Sequence[str]:
        return tuple(self.paths)

    def _read(self, stem: str) -> tuple[dict[int, Row], int]:
        path = in_data_folder(self.name, self.paths[stem])
        seen: set[str] = set()

        def example(fields):
            seen.update(fields)
            return self._example(fields)

        lines, report = read_json_lines(path, self._required(), example, key=lambda made: made[0])
        for what in ("rationale", "teacher_label"):
            field = getattr(self, what)
            if stem == "train" and lines and isinstance(field, str) and field not in seen:
                raise ValueError(
                    f"{path}: no row has the field {field!r}, which {self.name} declares as its "
                    f"{what}; the rows have {', '.join(sorted(seen))}"
                )
        rows = {line.position: self._row(stem, line.position, line.value) for line in lines}
        return rows, report.used + len(report.bad)


@dataclasses.dataclass(frozen=True)
class Tfds(_Declared):
    """Rows of a prepared TensorFlow dataset, in TFRecord or ArrayRecord files.

    It is looked for in `<data_dir>`, in `<data_dir>/tfds`, then where TFDS prepares by default
    ($TFDS_DATA_DIR, ~/tensorflow_datasets); nothing is downloaded. Texts come as str, sequences as
    lists. The order is that of the prepared files.

    Attributes:
      name: of the dataset; the ids of its rows begin with it.
      builder: such as "gsm8k", "anli/r1" or "anli/r1:0.1.0"; without a version, the newest.
      from_splits: split (train, validation, test) -> a split of the builder.
    """

    name: str
    builder: str
    from_splits: Mapping[str, str]

    def files(self, split: str) -> list[str]:
        """Returns the files behind a split."""
        builder = self._open()
        info = builder.info.splits[self.from_splits[self._stem(split)]]
        about = [builder.data_path / name for name in ("dataset_info.json", "features.json")]
        return [str(path) for path in (*about, *info.filepaths)]

    def _given(self) -> Sequence[str]:
        return tuple(self.from_splits)

    def _read(self, stem: str) -> tuple[dict[int, Row], int]:
        builder, split = self._open(), self.from_splits[stem]
        rows, ids = {}, set()
        for position, raw in enumerate(_tfds_examples(builder, split)):
            try:
                fields = {key: _plain(value) for key, value in raw.items()}
                row = self._row(stem, position, self._example(fields))
                if row.id in ids:
                    raise ValueError(f"the id {row.id!r} is given twice")
            except UNUSABLE as e:
                where = f"{builder.data_path}: example {position} of {split}"
                raise ValueError(f"{self.name}: {where}: {reason(e)}") from e
            ids.add(row.id)
            rows[position] = row
        return rows, len(rows)

    def _open(self) -> Any:
        """Returns the builder of the prepared files, which needs no code of the dataset."""
        folder = self._folder()
        import tensorflow_datasets as tfds  # Slow, and it needs TensorFlow.

        return tfds.builder_from_directory(folder)

    def _folder(self) -> epath.Path:
        path, _, wanted = self.builder.partition(":")
        data_dir = settings().data_dir
        roots = [epath.Path(data_dir), epath.Path(data_dir) / "tfds"] if data_dir else []
        default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        for root in (*roots, epath.Path(default).expanduser()):
            folder = root / path
            versions = [
                version
                for version in (folder.iterdir() if folder.exists() else ())
                if re.fullmatch(r"\d+\.\d+\.\d+", version.name)
                and wanted in ("", version.name)
                and (version / "dataset_info.json").exists()
            ]
            if versions:
                return max(versions, key=lambda v: [int(n) for n in v.name.split(".")])
        to = data_dir or default
        name, _, config = path.partition("/")
        raise FileNotFoundError(
            f"{self.name}: no TensorFlow dataset {self.builder} in "
            f"{', '.join(map(str, (*roots, default)))}. Prepare it with `tfds build {name}"
            f"{f' --config={config}' if config else ''} --data_dir={to}` (needs apache-beam), or "
            f'with `python -c "import tensorflow_datasets as t; t.builder({path!r}, '
            f'data_dir={str(to)!r}).download_and_prepare()"`'
        )


def _tfds_examples(builder: Any, split: str) -> Any:
    """Yields the examples of a split in the order of the files, whatever their format."""
    import tensorflow_datasets as tfds

    if builder.info.file_format.value == "array_record":
        return iter(builder.as_data_source(split))
    # One file after the other; by default TFDS interleaves sixteen of them.
    config = tfds.ReadConfig(
        interleave_cycle_length=1, interleave_block_length=1, try_autocache=False
    )
    dataset = builder.as_dataset(split=split, shuffle_files=False, read_config=config)
    return tfds.as_numpy(dataset)


def _plain(value: Any) -> Any:
    """Returns bytes as str, arrays as lists, numpy's scalars as Python's."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
