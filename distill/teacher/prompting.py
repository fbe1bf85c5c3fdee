"""What a teacher is shown, and how its answer is read: a few-shot prompt, one TOML file.

    instruction                       system: instruction

    Q: <input of an exemplar>         user: Q: <input of an exemplar>
    A: <rationale> <marker> <label>   assistant: <rationale> <marker> <label>

    Q: <input>                        user: Q: <input>
    A:                                A:

Left `Prompt.text`, right `Prompt.messages`. Few-shot chains of thought are Wei et al. 2022 (arXiv
2201.11903); asking for the reasons of a label that is given, *rationalisation*, is Zelikman et al.
2022 (STaR, arXiv 2203.14465), who show the hint with the exemplars too. docs/teacher.md tells how
to write a file.
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib.resources
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

MAX_ANSWER = 1_000  # characters behind the marker in which a label is searched
_BETWEEN = "\n\n"  # exemplars
_VERSION = 1  # of how a prompt is put together and read; part of its hash
_UNKNOWN_LETTER = "?"

# A regular expression tries every way to match before it fails: at most MAX_ANSWER starts x
# MAX_ANSWER lengths of a repetition x 2 for each choice. These limits keep that below 1e8 steps.
# Two repetitions, or one of a group, would take hours or centuries on a text made for it.
_MAX_CHOICES = {0: 12, 1: 5}  # by the number of repetitions
_GROUP = re.compile(r"\((?:\?(?:[aims]*[:)]|<?[=!]))?")  # `(`, `(?:`, `(?s:`, `(?i)`, `(?=`, ..


@dataclasses.dataclass(frozen=True)
class Exemplar:
    """A worked example.

    Attributes:
      input: as a row of the dataset has it (`Row.input`).
      rationale: the reasons, without the label's announcement.
      label: as a student is to write it.
    """

    input: str
    rationale: str
    label: str


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A few-shot prompt and the form of its answers.

    In the templates `{input}`, `{rationale}`, `{label}` and `{letter}` are replaced, all at once;
    other braces stay as they are.

    Attributes:
      name: of the prompt: that of its file.
      task: the dataset it was written for.
      question: how an input is put, `Q: {input}\\nA:`. Has `{input}` once.
      completion: how it is answered, ` {rationale} The answer is {label}.`: `{rationale}`, the
        marker, `{label}`. White space at its start stands between question and answer in `text`.
      instruction: above the exemplars, or the system message; "" for none.
      exemplars: worked examples, in this order.
      answer: how a label stands in a completion. `({letter}) {label}` takes the letter from the
        line of the input that reads so, as in `(d) math problem`; `?` where no line does.
      label_pattern: regular expression with one group, the label. It is searched in the first
        1,000 characters behind the marker, without outer white space. From the label, the end of
        `completion` (here the period) is taken off. See `pattern_problem` for what it may hold.
      stop: with what the teacher would go on to a question of its own, `Q:`; part of `question`
        before the input. To be sent to the endpoint, and cut again by `parse`. "" for none.
      hint: how an input is put when its label is given, with `{input}` once and `{label}`; "" for
        a prompt that cannot rationalise.
      rewrite: literal replacements (old, new) in an input before it is shown, in this order.

    Raises:
      ValueError: a field is not as said here, or an exemplar's completion does not read back as
        its rationale and label.
    """

    name: str
    task: str
    question: str
    completion: str
    instruction: str = ""
    exemplars: tuple[Exemplar, ...] = ()
    answer: str = "{label}"
    label_pattern: str = "(?s)(.+)"
    stop: str = ""
    hint: str = ""
    rewrite: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        if not self.task.strip():
            raise ValueError("task must name the dataset that the prompt was written for")
        _check_template("question", self.question, ("input",))
        _check_template("completion", self.completion, ("rationale", "label"))
        if not self.completion.partition("{rationale}")[2].partition("{label}")[0].strip():
            raise ValueError(
                f"completion is {self.completion!r}: between {{rationale}} and {{label}} must "
                "stand what tells them apart, such as `The answer is`"
            )
        _check_template("answer", self.answer, ("label",))
        if self.answer.count("{letter}") > 1:
            raise ValueError(f"answer may have {{letter}} once, not as in {self.answer!r}")
        if problem := pattern_problem(self.label_pattern):
            raise ValueError(f"label_pattern {self.label_pattern!r} {problem}")
        if self.hint:
            _check_template("hint", self.hint, ("input",))
            if "{label}" not in self.hint:
                raise ValueError(f"hint must contain {{label}}, which it gives away: {self.hint!r}")
        for field in ("question", "hint"):
            template = getattr(self, field)
            if template and self.stop not in template.partition("{input}")[0]:
                raise ValueError(
                    f"stop {self.stop!r} is not in {field} {template!r} before {{input}}, so it "
                    "would not end an answer where the teacher goes on to a question of its own"
                )
        if any(not old for old, _ in self.rewrite):
            raise ValueError("rewrite replaces an empty text; name the text to replace")
        self._check_exemplars()

    def _check_exemplars(self):
        seen: dict[str, int] = {}
        for number, e in enumerate(self.exemplars, start=1):
            where = f"exemplar {number} ({_shown(e.input)})"
            for field in dataclasses.fields(e):
                if not getattr(e, field.name).strip():
                    raise ValueError(f"{where}: {field.name} is empty")
            first = seen.setdefault(" ".join(e.input.split()).casefold(), number)
            if first != number:
                raise ValueError(f"{where} has the input of exemplar {first}; leave one out")
            answer = self._answer(e.label, e.input)
            if "{letter}" in self.answer and self._letter(e.label, e.input) is None:
                raise ValueError(
                    f"{where}: its label {e.label!r} is on no line of its input in the form "
                    f"{self.answer!r}; write it as the input does"
                )
            read = self.parse(self.complete(e.rationale, e.label, e.input))
            if read != (e.rationale, e.label):
                raise ValueError(
                    f"{where}: its completion reads back as rationale {_shown(read[0])} and label "
                    f"{_shown(read[1])}, not {_shown(e.rationale)} and {e.label!r}. The rationale "
                    f"must not hold {self.marker!r}"
                    + (f" or {self.stop!r}" if self.stop else "")
                    + f" nor begin or end in white space, and label_pattern {self.label_pattern!r} "
                    f"must find the label in {answer!r}"
                )

    @property
    def marker(self) -> str:
        """What announces the label, `The answer is`: what `completion` has before it."""
        return self.completion.partition("{rationale}")[2].partition("{label}")[0].strip()

    @functools.cached_property
    def sha256(self) -> str:
        """Hexadecimal hash of all that changes what is sent or how an answer is read."""
        fields = dataclasses.asdict(self) | {"version": _VERSION}
        for unsent in ("name", "task"):
            del fields[unsent]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def text(self, input: str, label: str | None = None) -> str:
        """Returns the prompt for a model that continues a text.

        Args:
          input: of a row.
          label: its label, to be given reasons for: all questions are put with the hint.

        Raises:
          ValueError: a label, and the prompt has no hint.
        """
        parts = [self.instruction] if self.instruction else []
        for e in self.exemplars:
            question = self._question(e.input, None if label is None else e.label)
            parts.append(question + self._completion(e.rationale, e.label, e.input))
        return _BETWEEN.join([*parts, self._question(input, label)])

    def messages(self, input: str, label: str | None = None) -> list[dict[str, str]]:
        """Returns the prompt for a chat model: `text` in turns."""
        turns = [("system", self.instruction)] if self.instruction else []
        for e in self.exemplars:
            turns.append(("user", self._question(e.input, None if label is None else e.label)))
            turns.append(("assistant", self.complete(e.rationale, e.label, e.input)))
        turns.append(("user", self._question(input, label)))
        return [{"role": role, "content": content.strip()} for role, content in turns]

    def parse(self, text: str) -> tuple[str | None, str | None]:
        """Returns (rationale, label) of an answer, None for what it does not have.

        The answer is cut where the next question begins; the marker must be in it once. (With two
        of them it is not known where the reasons end and which label is meant.) Takes any text,
        in time linear in its length.
        """
        said = text.lstrip()
        if self.stop:
            said = said.partition(self.stop)[0]
        parts = said.split(self.marker, 2)
        if len(parts) != 2:
            return None, None
        rationale, answer = parts
        found = re.search(self.label_pattern, answer.strip()[:MAX_ANSWER])
        label = (found[1] if found else None) or ""
        label = label.strip().removesuffix(self.completion.partition("{label}")[2].strip())
        return rationale.rstrip() or None, label.strip() or None

    def complete(self, rationale: str | None, label: str | None, input: str | None = None) -> str:
        """Returns an answer in the form of this prompt, without outer white space.

        For teachers that give the parts. Without a label it ends before the marker.

        Args:
          rationale: None where there is none.
          label: None where there is none.
          input: that is answered, for the letter of the label.
        """
        return self._completion(rationale or "", label, input).strip()

    def _completion(self, rationale: str, label: str | None, input: str | None) -> str:
        if label is None:
            return self.completion.partition("{rationale}")[0] + rationale
        return _fill(self.completion, rationale=rationale, label=self._answer(label, input))

    def _question(self, input: str, label: str | None) -> str:
        shown = input
        for old, new in self.rewrite:
            shown = shown.replace(old, new)
        if label is None:
            return _fill(self.question, input=shown)
        if not self.hint:
            raise ValueError(
                f"prompt {self.name!r} cannot ask for the reasons of a given label: give its file "
                "a `hint` with {input} and {label}"
            )
        return _fill(self.hint, input=shown, label=self._answer(label, input))

    def _answer(self, label: str, input: str | None) -> str:
        letter = self._letter(label, input or "") or _UNKNOWN_LETTER
        return _fill(self.answer, label=label, letter=letter)

    def _letter(self, label: str, input: str) -> str | None:
        """The letter in the first line of an input that has the label in the form `answer`."""
        if "{letter}" not in self.answer:
            return None
        before, _, after = self.answer.partition("{letter}")
        before, after = (re.escape(_fill(part, label=label)) for part in (before, after))
        found = re.search(rf"^{before}(.){after}[ \t]*$", input, re.MULTILINE)
        return found and found[1]


def pattern_problem(pattern: str) -> str | None:
    """Says what is wrong with a `label_pattern`; None for a good one.

    It must have one group, and its time must be bounded whatever the text: at most one repetition
    (`*`, `+` or `{..}`, greedy or lazy), of a character or a class and not of a group; at most five
    choices (`?` and `|`), twelve where there is no repetition; no references back, and no groups
    that are conditional, named, atomic or verbose.
    """
    try:
        groups = re.compile(pattern).groups
    except (re.error, OverflowError, RecursionError) as e:
        return f"is no regular expression: {e}"
    if groups != 1:
        return f"must have one group, the label, not {groups} (`(?:..)` is none)"
    if re.search(r"\\[1-9]", pattern.replace(r"\\", "")):
        return r"refers back to a group (`\1`), which may take for ever"
    # What is in escapes and classes counts for nothing; what is left of a group is its `(`.
    rest = re.sub(r"\[\^?\]?[^\]]*\]", "x", re.sub(r"\\.", "x", pattern))
    rest = _GROUP.sub("(", rest)
    if "(?" in rest:
        return "may have `(?:..)`, `(?=..)`, `(?!..)`, `(?<=..)`, `(?<!..)`, `(?s)`; no other `(?`"
    rest = re.sub(r"([*+?}])\?", r"\1", rest)
    repetitions = re.findall(r".?[*+{]", rest)
    if len(repetitions) > 1 or ")" in "".join(repetitions):
        return (
            "may have one repetition (`*`, `+` or `{..}`), and not of a group: others take for "
            "ever on some texts. The text behind the marker comes without outer white space, so "
            "that `\\s*` is not needed"
        )
    choices, most = rest.count("?") + rest.count("|"), _MAX_CHOICES[len(repetitions)]
    if choices > most:
        return f"may have {most} choices (`?` and `|`), not {choices}"
    return None


def names() -> tuple[str, ...]:
    """The prompts that come with this package, sorted."""
    files = (file.name for file in _folder().iterdir())
    return tuple(sorted(n.removesuffix(".toml") for n in files if n.endswith(".toml")))


def load(name_or_path: epath.PathLike) -> Prompt:
    """Returns a prompt by its name (`names`) or by the path of its TOML file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: there is no prompt of that name, or its file is not as it must be; the message
        names the file, the field and the fix.
    """
    given = str(name_or_path)
    if given in names():
        name, path = given, _folder().joinpath(f"{given}.toml")
    else:
        path = epath.Path(given)
        name = path.stem
        if path.suffix != ".toml":
            raise ValueError(
                f"no prompt named {given!r}.{_did_you_mean(given, names())} Known are "
                f"{', '.join(names())}; your own is given by the path of its file, <name>.toml"
            )
        if not path.exists():
            raise FileNotFoundError(
                f"no prompt file {given}; it is relative to the folder of the command. Known "
                f"prompts are {', '.join(names())}"
            )
    try:
        return _prompt(name, tomllib.loads(path.read_bytes().decode("utf-8-sig")))
    except ValueError as e:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors too.
        raise ValueError(f"{path}: {e}") from e


def _folder():
    return importlib.resources.files("distill.teacher").joinpath("prompts")


def _prompt(name: str, fields: Mapping[str, Any]) -> Prompt:
    known = [field for field in dataclasses.fields(Prompt) if field.name != "name"]
    _check_names("", fields, [f.name for f in known])
    if missing := [
        f.name for f in known if f.default is dataclasses.MISSING and f.name not in fields
    ]:
        raise ValueError(f"lacks {', '.join(missing)}")
    given = dict(fields)
    exemplars = given.pop("exemplars", [])
    rewrite = given.pop("rewrite", {})
    if not isinstance(exemplars, list) or not all(isinstance(e, dict) for e in exemplars):
        raise ValueError("exemplars must be tables, each under its own [[exemplars]]")
    if not isinstance(rewrite, dict):
        raise ValueError("rewrite must be a table of texts: [rewrite], then 'old' = 'new'")
    _check_texts("", given)
    _check_texts("rewrite: ", rewrite)
    parts = [field.name for field in dataclasses.fields(Exemplar)]
    for number, exemplar in enumerate(exemplars, start=1):
        where = f"exemplar {number} ({_shown(exemplar.get('input'))}): "
        _check_names(where, exemplar, parts)
        if missing := [part for part in parts if part not in exemplar]:
            raise ValueError(f"{where}lacks {', '.join(missing)}")
        _check_texts(where, exemplar)
    return Prompt(
        name=name,
        exemplars=tuple(Exemplar(**e) for e in exemplars),
        rewrite=tuple(rewrite.items()),
        **given,
    )


def _check_names(where: str, fields: Iterable[str], known: list[str]) -> None:
    for field in fields:
        if field not in known:
            raise ValueError(
                f"{where}unknown field {field!r}.{_did_you_mean(field, known)} Known are "
                f"{', '.join(known)}"
            )


def _check_texts(where: str, fields: Mapping[str, Any]) -> None:
    for field, value in fields.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}{field} must be text in quotes, not {_shown(value)}")


def _check_template(field: str, template: str, needed: tuple[str, ...]) -> None:
    found = [p for p in re.findall(r"\{(\w+)\}", template) if p in needed]
    if found != list(needed):
        wanted = ", then ".join(f"{{{name}}}" for name in needed)
        raise ValueError(f"{field} must contain {wanted}, once; it is {template!r}")


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fill(template: str, **values: str) -> str:
    """Replaces the placeholders at once: an input that holds `{label}` stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), template)
