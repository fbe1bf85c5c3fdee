"""The released data of Hsieh et al. 2023: rows, and completions joined by position."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from distill import metrics
from distill.sources.binding import in_data_folder, settings
from distill.sources.jsonlines import UNUSABLE, Line, read_json, read_json_lines, reason
from distill.sources.rows import Answer, Row, check_split, held_out

# (completion, fields of the row, rationale, label) -> (rationale, label)
Repair = Callable[[str, Mapping[str, Any], str | None, str | None], tuple[str | None, str | None]]


@dataclasses.dataclass(frozen=True)
class ReleasedLayout:
    """A dataset in the layout of the released data of Hsieh et al. 2023.

    `<data_dir>/<name>/<name>_{train,valid,test}.json` are JSON lines, and
    `<name>/llm/{train,valid,test}_CoT_{0,1,..}.json` are JSON lists of the teacher's raw
    completions, aligned with the rows by position. Completions may be absent; the streams that
    need them then say so.

    Attributes:
      name: of the dataset and its folder.
      fields: the fields every row must have.
      example: a row's fields -> (input, label); ValueError for a value that it cannot use.
      parse: a completion -> (rationale, label), None for what it does not contain.
      repairs: applied in turn to what `parse` found, if `settings().parsing` is "repaired". They
        see the completion and the row's fields, and must not look at the gold label.
      holdout: True where the dataset has no valid file: the validation split is then the first
        ceil(n / 10) of `numpy.random.default_rng(0).permutation(n)` over the train file, and
        the train split is the rest, in that order.
      teacher_metric: counts the teacher's labels in a report, where that was published otherwise
        than the dataset's first metric counts.
      check_alignment: refuse completions that are about other rows (`first_misaligned`). False
        for rationales that do not take up words of their input.
      file: of the rows, in the dataset's folder; `{stem}` is train, valid or test.
      read: (path, stem) -> the fields of every row, where the file is not JSON lines.
    """

    name: str
    fields: tuple[str, ...]
    example: Callable[[Mapping[str, Any]], tuple[str, str]]
    parse: Callable[[str], tuple[str | None, str | None]]
    repairs: tuple[Repair, ...] = ()
    holdout: bool = False
    teacher_metric: metrics.MetricFn | None = None
    check_alignment: bool = True
    splits: tuple[str, ...] = ("train", "validation", "test")
    file: str = "{name}_{stem}.json"
    read: Callable[[epath.Path, str], list[Mapping[str, Any]]] | None = None

    def rows(self, split: str) -> list[Row]:
        """Returns the rows of a split.

        Raises:
          FileNotFoundError: the data folder or the file is missing.
          ValueError: a line is not JSON or lacks a field, or the completions do not line up.
        """
        repairs = self.repairs if settings().parsing == "repaired" else ()
        return self._rows(*self._taught(split), split, repairs)

    def files(self, split: str) -> list[str]:
        """Returns the row file and the completion files of a split."""
        stem = self._stem(split)
        return [str(p) for p in (self._path(stem), *self._shards(stem))]

    def completions(self, split: str) -> dict[str, str]:
        """Returns id -> the teacher's raw completion, for the rows of a split that have one."""
        taught, _ = self._taught(split)
        texts = {self._id(split, t): t.completion for t in taught if t.completion is not None}
        return {row.id: texts[row.id] for row in self.rows(split) if row.id in texts}

    def _id(self, split: str, taught: "_Taught") -> str:
        return f"{self.name}/{self._stem(split)}/{taught.position}"

    def _rows(
        self, taught: "list[_Taught]", count: int, split: str, repairs: Sequence[Repair]
    ) -> list[Row]:
        rows = {}
        for t in taught:
            answers = ()
            if t.completion is not None:
                rationale, label = self.parse(t.completion)
                for repair in repairs:
                    rationale, label = repair(t.completion, t.fields, rationale, label)
                answers = (Answer(rationale or None, label or None),)
            rows[t.position] = Row(self._id(split, t), t.input, t.label, answers)
        return held_out(rows, count, split) if self.holdout else list(rows.values())

    def _taught(self, split: str) -> "tuple[list[_Taught], int]":
        """Returns the examples behind a split, with their completions, and the file's rows."""
        stem = self._stem(split)
        path = self._path(stem)
        if self.read:
            lines = []
            for i, fields in enumerate(self.read(path, stem)):
                try:
                    lines.append(Line(i + 1, i, self._example(fields)))
                except UNUSABLE as e:
                    raise ValueError(f"{path}: row {i} of {stem}: {reason(e)}") from e
            count = len(lines)
        else:
            lines, report = read_json_lines(path, self.fields, self._example)
            count = report.used + len(report.bad)
        completions = self._completions(stem, count, path)
        taught = [
            _Taught(line.position, *line.value, completions and completions[line.position])
            for line in lines
        ]
        if completions and self.check_alignment:
            said = [self.parse(t.completion)[0] or "" for t in taught]
            row = first_misaligned([t.input for t in taught], said)
            if row is not None:
                line = lines[row]
                raise ValueError(
                    f"{self.name}: the teacher's completions belong to other rows, from about row "
                    f"{line.position} ({path}:{line.number}) on. Its input begins "
                    f"{taught[row].input[:60]!r}, and its completion {said[row][:60]!r}. They are "
                    "joined by position: is a completion missing, or a file in another order? Get "
                    "both files from the same release. (check_alignment=False, for rationales "
                    "that do not take up words of their input)"
                )
        return taught, count

    def _example(self, fields: Mapping[str, Any]) -> tuple[Mapping[str, Any], str, str]:
        text, label = self.example(fields)
        if not isinstance(text, str) or not isinstance(label, str):
            raise ValueError(f"input and label must be text, got {text!r}, {label!r}")
        return fields, text, label

    def _stem(self, split: str) -> str:
        check_split(self.name, split, self.splits)
        if split == "validation":
            return "train" if self.holdout else "valid"
        return split

    def _path(self, stem: str) -> epath.Path:
        file = self.file.format(name=self.name, stem=stem)
        return in_data_folder(self.name, f"{self.name}/{file}")

    def _shards(self, stem: str) -> list[epath.Path]:
        folder, shards = self._path(stem).parent / "llm", []
        while (shard := folder / f"{stem}_CoT_{len(shards)}.json").exists():
            shards.append(shard)
        return shards

    def _completions(self, stem: str, rows: int, path: epath.Path) -> list[str] | None:
        """Returns one completion for each row, or None where there are no completion files."""
        shards = self._shards(stem)
        if not shards:
            return None
        completions, seen = [], []
        for shard in shards:
            part = read_json(shard)
            if not isinstance(part, list) or not all(isinstance(c, str) for c in part):
                raise ValueError(f"{shard}: must be a JSON list of strings, one for each row")
            completions += part
            seen.append(f"{shard} ({len(part)})")
        if len(completions) != rows:
            raise ValueError(
                f"{self.name}: {len(completions)} completions for {rows} rows of {path}; they are "
                f"joined by position, so the numbers must agree. Read: {', '.join(seen)}. Is a "
                "file missing or from another version of the data?"
            )
        return completions


@dataclasses.dataclass(frozen=True)
class _Taught:
    """A row of the released layout before its completion is parsed."""

    position: int
    fields: Mapping[str, Any]
    input: str
    label: str
    completion: str | None


# A word is rare if at most this fraction of the inputs has it.
_COMMON = 0.1
_WINDOW = 50  # judged rows
_LEAST = 20  # judged rows; fewer say too little
_MARGIN = 0.1


def first_misaligned(inputs: Sequence[str], rationales: Sequence[str]) -> int | None:
    """Returns about where rationales stop being about their own inputs; None if they are.

    A rationale takes up the rare words of its input. A row's margin is the share of its
    rationale's rare words, weighted by the log of their rarity, that its own input has, minus the
    mean share that the two inputs beside it have. Rows whose rationale has no rare word of any
    input (another language, numbers) are not judged. The mean margin over 50 judged rows must be
    0.1. On the six released files that come with completions it is, over all windows:

    | completions         | cqa             | svamp           | e-SNLI          |
    |---------------------|-----------------|-----------------|-----------------|
    | as released         | 0.275 and more  | 0.656 and more  | 0.305 and more  |
    | shuffled            | 0.012 and less  | 0.016 and less  | 0.024 and less  |
    | shifted by one      | -0.125 and less | -0.331 and less | -0.041 and less |
    | shifted by two      | 0.014 and less  | 0.038 and less  | 0.069 and less  |

    (e-SNLI has three rows with each premise.) Two rows that changed places are not found.

    Args:
      inputs: of all rows.
      rationales: of the same rows, "" where there is none.
    """
    words = [set(re.findall(r"\w+", text.lower())) for text in inputs]
    counts = collections.Counter(word for some in words for word in some)
    most = max(1, _COMMON * len(words))
    rarity = {w: math.log(len(words) / n) for w, n in counts.items() if n <= most}
    judged, margins = [], []
    for i, rationale in enumerate(rationales):
        said = {w: rarity[w] for w in re.findall(r"\w+", rationale.lower()) if w in rarity}
        if not said:
            continue
        own, before, after = (
            sum(r for w, r in said.items() if w in words[j])
            for j in (i, i - 1, (i + 1) % len(words))
        )
        judged.append(i)
        margins.append((own - (before + after) / 2) / sum(said.values()))
    ends = list(range(_WINDOW, len(judged), _WINDOW))
    ends[-1:] = [len(judged)]  # The last window has the rest too.
    if len(judged) < _LEAST:
        return None
    for start, end in zip([0, *ends], ends, strict=False):
        if np.mean(margins[start:end]) < _MARGIN:
            # Where the running sum stops rising, which may be in the window before.
            start = max(0, start - _WINDOW)
            risen = np.cumsum(np.subtract(margins[start:end], _MARGIN))
            return judged[start + int(np.argmax([0, *risen]))]
    return None
