"""A student for use: texts in, labels out.

    predictor = distill.Predictor("/tmp/svamp")
    for answer in predictor(["Ann has 3 nuts, gets 4."], explain=True):
        print(answer.label, answer.probability, answer.rationale)

`infer` does that for a file of JSON lines; `scripts/infer.py` is its command.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import queue
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
from absl import logging
from tqdm import tqdm

from distill import decode, metrics, prompts, results, students

# Tokens of a label, as the published code decodes. A longer one is asked for again: the program for
# a rationale's length takes two to three times as long to compile.
LABEL_LENGTH = 64
# Lines are read and written in blocks of so many batches: sorted by length, they pad less.
_BATCHES = 8
# Seconds without a new line after which those that are there are answered.
_PAUSE = 0.2
# What an output line has beside the fields of the input's.
_NAMES = ("label", "probability", "rationale", "line", "student")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a student says to one input.

    Attributes:
      label: its answer.
      probability: that it gives this answer: of the whole text that it wrote, or, among given
        options, of this one.
      rationale: its reasons; None where it was not asked.
    """

    label: str
    probability: float
    rationale: str | None = None


class Predictor:
    """Answers texts in the form that the student was trained on."""

    def __init__(
        self, path: str, *, vocabulary: str | None = None, form: str | None = None,
        batch_size: int = 64,
    ):  # fmt: skip
        """Reads a student onto all devices.

        Args:
          path: a run (its latest checkpoint is taken), one checkpoint of ours or of T5X, or a
            folder in Hugging Face's format.
          vocabulary: as in `vocabulary.load`; None = the student's own.
          form: how it answers, see `prompts.FORMS`; None = as it was trained, which a converted
            checkpoint, or one of a mixture with a name of its own, does not say.
          batch_size: inputs answered together; does not change the answers.

        Raises:
          FileNotFoundError: there is no checkpoint.
          ValueError: there are several, it is damaged, or no T5; the form or the vocabulary is
            not known or not its own.
        """
        checkpoint, *others = students.find(path)
        if others:
            raise ValueError(f"{path} has {1 + len(others)} runs; give one of them.")
        if not form and not checkpoint.form:
            trained = checkpoint.metadata.get("mixture")
            raise ValueError(
                f"{checkpoint.path} does not say in which form it answers"
                + (f" (it was trained on {trained!r})" if trained else "")
                + ". Give form= (--form=): label, the label to a bare input; predict, the same to "
                f"{prompts.PREDICT + 'input'!r}, as students that learn step by step; "
                "rationale_label or label_rationale, both in one text."
            )
        self.form = form or checkpoint.form
        if self.form not in prompts.FORMS or prompts.FORMS[self.form].explains:
            known = ", ".join(f for f, form in prompts.FORMS.items() if not form.explains)
            raise ValueError(f"form must be one of {known}, not {self.form!r}.")
        if checkpoint.form not in (None, self.form):
            raise ValueError(
                f"{checkpoint.path} answers to the form {checkpoint.form!r}, not {form!r}: leave "
                "form out."
            )
        self.checkpoint = checkpoint
        self.student = students.load(checkpoint, vocabulary)
        self.batch_size = batch_size

    @property
    def explains(self) -> bool:
        """Whether the student was trained to give reasons."""
        if prompts.FORMS[self.form].answer_form != "label":
            return True
        return self.form == "predict" and self.checkpoint.explains is not False

    def __call__(
        self, inputs: Sequence[str], *, explain: bool = False,
        options: Sequence[str] | None = None,
        decoding: decode.Decoding = decode.Decoding(),  # noqa: B008 (frozen)
    ) -> list[Answer]:  # fmt: skip
        """Answers each input, in order.

        Args:
          inputs: texts, without a prompt.
          explain: ask for the reasons as well.
          options: labels to choose from by their likelihood; None = what the student writes.
          decoding: how it writes; of several answers the first is taken.

        Raises:
          ValueError: an input is empty, the student was not trained to explain, or it cannot choose
            because it writes more than a label.
        """
        if explain and not self.explains:
            raise ValueError(
                f"{self.checkpoint.path} was trained on labels alone (form {self.form!r}), so that "
                "it cannot explain."
            )
        form = prompts.FORMS[self.form]
        if options and form.answer_form != "label":
            raise ValueError(f"A student of the form {self.form!r} writes more than a label.")
        if empty := [i for i, text in enumerate(inputs) if not text.strip()]:
            raise ValueError(f"Input {empty[0]} is empty.")
        if not inputs:
            return []
        asked = self._tokens(form.prefix, inputs)
        if options:
            filled = self._filled(asked)
            scores = self.student.likelihoods(filled, [options] * len(filled), self.batch_size)
            answers = [_chosen(options, log_probs) for log_probs in scores[: len(asked)]]
        else:
            # A draw that is made again because it was long would favour short ones.
            short = form.answer_form == "label" and decoding.method == "greedy"
            texts, log_probs = self._write(asked, decoding, LABEL_LENGTH if short else None)
            answers = [
                Answer(
                    metrics.answer(text, form.answer_form), math.exp(log_prob),
                    metrics.rationale(text, form.answer_form) if explain else None,
                )
                for text, log_prob in zip(texts, log_probs, strict=True)
            ]  # fmt: skip
        if explain and form.answer_form == "label":
            reasons = self._tokens(prompts.EXPLAIN, inputs)
            texts, _ = self._write(reasons, decoding)
            answers = [
                dataclasses.replace(answer, rationale=text)
                for answer, text in zip(answers, texts, strict=True)
            ]
        return answers

    def _tokens(self, prefix: str, inputs: Sequence[str]) -> list[np.ndarray]:
        encode = self.student.vocabulary.encode_input
        return [np.array(encode(prefix + text), np.int32) for text in inputs]

    def _write(
        self, asked: Sequence[np.ndarray], decoding: decode.Decoding, first: int | None = None
    ) -> tuple[list[str], list[float]]:
        """Texts and their log-probabilities.

        Args:
          asked: the tokens of each input.
          decoding: how it writes.
          first: tokens to try with; what does not end there is asked for again, with the student's
            own target length. None = with that at once.
        """
        limit = self.student.limit("targets")
        length = min(first or limit, limit)
        generated = self.student.answer(
            self._filled(asked), decoding, max_length=length, batch_size=self.batch_size
        )
        texts = [texts[0] for texts in self.student.texts(generated)][: len(asked)]
        log_probs = [log_probs[0] for log_probs in generated.log_probs][: len(asked)]
        # An answer that ends is shorter, by its EOS.
        cut = [i for i in range(len(asked)) if len(generated.tokens[i][0]) == length]
        if cut and length < limit:
            for i, *found in zip(cut, *self._write([asked[i] for i in cut], decoding), strict=True):
                texts[i], log_probs[i] = found
        elif cut:
            logging.warning(
                "%d of %d answers were cut at %d tokens, the student's target length.",
                len(cut), len(asked), limit,
            )  # fmt: skip
        return texts, log_probs

    def _filled(self, asked: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """Few inputs, filled up to a power of two in number (with copies) and in length (padding).

        Each number and each length needs a program of its own, and where inputs come one by one
        each could be new.
        """
        if len(asked) >= self.batch_size:
            return asked
        filled = [*asked, *[min(asked, key=len)] * (_power_of_two(len(asked)) - len(asked))]
        longest = max(range(len(filled)), key=lambda i: len(filled[i]))
        length = len(filled[longest])
        more = min(_power_of_two(length), self.student.limit("inputs")) - length
        filled[longest] = np.pad(filled[longest], (0, max(0, more)))
        return filled


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _chosen(options: Sequence[str], log_probs: np.ndarray) -> Answer:
    shares = np.exp(log_probs - np.max(log_probs))
    best = int(np.argmax(log_probs))
    return Answer(options[best], float(shares[best] / shares.sum()))


# --- Files ----------------------------------------------------------------------------------------


def infer(
    predictor: Predictor, source: str, output: str, *, field: str = "input", explain: bool = False,
    options: Sequence[str] | None = None, prefix: str = "",
) -> tuple[int, int]:  # fmt: skip
    """Answers a file of JSON lines, in order; goes on where an earlier call ended.

    An output line is the input's object with `label`, `probability`, `rationale` (where asked),
    `line` (of the input, from 1) and `student`. A line that cannot be used is reported and has no
    output line. Where the input pauses, as a pipe may, what has come is answered.

    Args:
      predictor: the student.
      source: a file of objects that have the text under `field`; `-` = standard input.
      output: a file, which is only appended to; `-` = standard output.
      field: name of the text.
      explain: as in `Predictor`.
      options: likewise.
      prefix: of the names of what is added.

    Returns:
      (answered, unusable) lines of this call.

    Raises:
      FileNotFoundError: there is no such input.
      ValueError: the output is that of another student or input, or of one that was asked in
        another way; an object has a field of its own that an answer would replace.
    """
    names = {n: prefix + n for n in _NAMES if explain or n != "rationale"}
    example = f"--prefix=student_ names ours {', '.join(f'student_{n}' for n in names)}."
    if field in names.values():
        raise ValueError(f"--field={field}: an answer has a field of this name. {example}")
    asked = [predictor.checkpoint.fingerprint, predictor.form, explain, list(options or ())]
    digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    student = f"{predictor.checkpoint.path}@{digest[:8]}"
    answered = unusable = 0
    with _reader(source) as lines, _writer(output) as (file, last):
        numbered = enumerate(lines, 1)
        if last:
            _skip(numbered, last, names, student, source, output, field)
        bar = tqdm(unit="line", dynamic_ncols=True, disable=not sys.stderr.isatty())
        with bar:
            for block in _blocks(numbered, _BATCHES * predictor.batch_size):
                usable = []
                for number, line in block:
                    try:
                        row = _parsed(line, field)
                    except ValueError as e:
                        logging.warning("%s:%d: %s; skipped", source, number, e)
                        unusable += 1
                        continue
                    if own := [name for name in names.values() if name in row]:
                        raise ValueError(
                            f"{source}:{number} has a field {own[0]!r} of its own, which an "
                            f"answer's would replace. {example}"
                        )
                    usable.append((number, row))
                found = predictor(
                    [row[field] for _, row in usable], explain=explain, options=options
                )
                for (number, row), answer in zip(usable, found, strict=True):
                    said = {**dataclasses.asdict(answer), "line": number, "student": student}
                    row |= {name: said[n] for n, name in names.items()}
                    file.write(json.dumps(results.finite(row), ensure_ascii=False) + "\n")
                file.flush()
                answered += len(usable)
                bar.update(len(block))
    return answered, unusable


def _blocks(numbered: Iterator[tuple[int, str]], most: int) -> Iterator[list[tuple[int, str]]]:
    """Yields lines in blocks of `most`, or of those that are there when the input pauses."""
    lines: queue.Queue = queue.Queue(most)

    def read() -> None:
        end = None
        try:
            for line in numbered:
                lines.put(line)
        except Exception as error:  # raised where the lines are taken
            end = error
        lines.put(end)

    threading.Thread(target=read, daemon=True).start()  # a pipe cannot be read with a time limit
    more = True
    while more:
        block = []
        with contextlib.suppress(queue.Empty):
            while more and len(block) < most:
                item = lines.get(timeout=_PAUSE if block else None)
                if more := isinstance(item, tuple):
                    block.append(item)
        if block:
            yield block
    if item is not None:
        raise item


def _parsed(line: str, field: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # half an emoji has no UTF-8
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not valid JSON ({e})") from e
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    if not isinstance(row.get(field), str) or not row[field].strip():
        raise ValueError(f"no text under {field!r} (--field)")
    return row


def _reader(source: str) -> IO[str]:
    if source == "-":
        return open(sys.stdin.fileno(), encoding="utf-8", errors="replace", closefd=False)
    return open(os.path.expanduser(source), encoding="utf-8", errors="replace")


class _writer:
    """Opens the output to append to it, after cutting off a torn last line."""

    def __init__(self, output: str):
        self.output = output

    def __enter__(self) -> tuple[IO[str], dict[str, Any] | None]:
        if self.output == "-":
            self.file = open(sys.stdout.fileno(), "w", encoding="utf-8", closefd=False)
            return self.file, None
        path, last = os.path.expanduser(self.output), None
        if os.path.exists(path):
            with open(path, "rb+") as f:
                for line in f:
                    if not line.endswith(b"\n"):
                        f.seek(-len(line), os.SEEK_END)
                        f.truncate()
                        break
                    last = line
        self.file = open(path, "a", encoding="utf-8")
        try:
            return self.file, None if last is None else dict(json.loads(last))
        except (TypeError, ValueError) as e:
            self.file.close()
            raise ValueError(f"{self.output} is not an output of infer: choose another.") from e

    def __exit__(self, *_) -> None:
        self.file.close()


def _skip(
    numbered: Iterator[tuple[int, str]], last: dict[str, Any], names: Mapping[str, str],
    student: str, source: str, output: str, field: str,
) -> None:  # fmt: skip
    """Passes over what was answered before, which must have been this input, by this student."""
    before, end = last.get(names["student"]), last.get(names["line"])
    if before is None or end is None:
        raise ValueError(
            f"{output} has no field {names['student']!r}: it was written with another --prefix, or "
            "is no output of infer. Choose another --output, or delete it."
        )
    if before != student:
        raise ValueError(
            f"{output} has the answers of {before}, not of {student} (the last part stands for the "
            "weights, --form, --explain and --options): choose another --output, or delete it."
        )
    for number, line in numbered:
        if number == end:
            with_text = json.loads(line) if line.strip().startswith("{") else {}
            if with_text.get(field) == last.get(field):
                logging.info("%s: going on behind line %d", output, number)
                return
            break
    raise ValueError(
        f"Line {end} of {source} is not the one that {output} ends with: it has the "
        "answers to another input. Choose another --output, or delete it."
    )
