"""Does a rationale lead to the label that stands beside it?

A *conclusion* is a function `(rationale, input) -> label or None`: what the rationale itself comes
to, before anyone says so, None where it comes to nothing that can be read. A dataset may have one
of its own; the ones here are for choices, equations, numbers and NLI. They read English word forms
where they say so, look at the last 2,000 characters, and never run anything.
"""

import re
from collections.abc import Callable, Sequence
from math import nan

from distill.metrics.equations import equation_value, plain_arithmetic
from distill.metrics.labels import listed_choices, same_label
from distill.metrics.statistics import Examples, mean_per_example
from distill.metrics.texts import words

Conclusion = Callable[[str, str], str | None]

_MAX_CHARACTERS = 2_000
_ANNOUNCEMENT = re.compile(r"\bthe answer is\b:?|\banswer:", re.I)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
_LEAD = re.compile(r"^of (?:the|these)(?: above)? choices,?(?: only\b)?", re.I)
# What is worked out, an equals sign, and the start of a number; bounded for the sake of time.
_WORKED = re.compile(r"([-(\d.][-+*/(). \d]{0,100}?) {0,2}(?:=|\bis\b|\bequals\b) {0,2}-?\d")
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?")
_HEDGE = re.compile(
    r"\bnot (?:necessarily|always|clear|specified|related)\b|\b(?:could|may|might|possibl[ey])\b"
    r"|\b(?:does not|doesn['’]t|do not|don['’]t) (?:mean|imply|say|have to|need)\b",
    re.I,
)
_NEGATION = re.compile(r"\b(?:not|cannot|no|never|nobody|nothing|none|neither)\b|n['’]t\b", re.I)


def announced_answer(rationale: str, input: str = "") -> str | None:
    """What follows the last `The answer is` or `Answer:` on its line, without `(x)`."""
    del input
    *_, last = (None, *_ANNOUNCEMENT.finditer(text := rationale[-_MAX_CHARACTERS:]))
    if last is None:
        return None
    said = text[last.end() :].strip(" \t").partition("\n")[0].rstrip()
    return re.sub(r"^\(\w\)\s*", "", said).removesuffix(".").rstrip() or None


def named_choice(rationale: str, input: str) -> str | None:
    """The choice of the input that the last sentence names; of several, the one it names first.

    `Of the above choices, only rugs can be placed under furniture.` names `rug`: an English plural
    is the same word, other forms are not. Of choices that begin at one place, the longer.
    """
    sentences = [s for s in _SENTENCE.split(rationale[-_MAX_CHARACTERS:]) if s.strip()]
    if not sentences:
        return None
    # `choice`, `above` and `only` are choices of some questions.
    said = words(_LEAD.sub("", sentences[-1].strip()))
    named = []
    for choice in listed_choices(input):
        name = words(choice)
        for start in range(len(said) - len(name) + 1):
            if name and all(map(_same_word, name, said[start:])):
                named.append((start, -len(name), choice))
                break
    return min(named)[2] if named else None


def _same_word(a: str, b: str) -> bool:
    """Whether two words are equal, or one is an English plural of the other."""
    one, more = sorted((a, b), key=len)
    return more in (one, f"{one}s", f"{one}es") or (one[-1] == "y" and more == f"{one[:-1]}ies")


def worked_equation(rationale: str, input: str = "") -> str | None:
    """The last equation that the text works out: `15 + 4` of `So 15 + 4 = 19 nuts are left.`

    What stands left of `=`, `is` or `equals` and a number, and has an operator and a value;
    thousands commas and currency signs are passed over. Whether the result is right does not
    matter, as the label is the equation.
    """
    del input
    text = plain_arithmetic(rationale[-_MAX_CHARACTERS:])
    for left in reversed(_WORKED.findall(text)):
        left = left.strip()
        # It may have begun before the equation: at a bracket, or in the sentence before.
        for equation in (left, left.lstrip("(. "), re.split(r"\. ", left)[-1]):
            if re.search(r"\d[ )]*[-+*/]", equation) and equation_value(equation) is not None:
                return equation
    return None


def last_number(rationale: str, input: str = "") -> str | None:
    """The last number of the text, without thousands commas: `8` of `9, then 4, then 8.`"""
    del input
    text = plain_arithmetic(rationale[-_MAX_CHARACTERS:])
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def nli_relation(rationale: str, input: str = "") -> str | None:
    """The relation that an English explanation speaks of, by its words alone.

    A hedge (`not necessarily`, `could`, `does not mean`) is neutral, any other negation
    contradiction, neither of them entailment; None for an empty text. The words do not always say:
    `docs/metrics.md` has how often that agrees with the label that the writer meant.
    """
    del input
    text = rationale[-_MAX_CHARACTERS:]
    if not text.strip():
        return None
    if _HEDGE.search(text):
        return "neutral"
    return "contradiction" if _NEGATION.search(text) else "entailment"


# By name, for a configuration.
CONCLUSIONS: dict[str, Conclusion] = {
    fn.__name__: fn
    for fn in (announced_answer, named_choice, worked_equation, last_number, nli_relation)
}


def conclusion_for(labels: Sequence[str], inputs: Sequence[str]) -> Conclusion:
    """Returns the conclusion that fits a dataset's labels.

    | labels                                             | conclusion         |
    |----------------------------------------------------|--------------------|
    | in most rows one of the choices the input lists    | `named_choice`     |
    | numbers                                            | `last_number`      |
    | equations                                          | `worked_equation`  |
    | entailment, neutral, contradiction                 | `nli_relation`     |
    | anything else                                      | `announced_answer` |

    Args:
      labels: the gold labels of a split.
      inputs: of the same rows.
    """
    listed = sum(
        label.strip() in listed_choices(x) for label, x in zip(labels, inputs, strict=True)
    )
    if listed > len(labels) / 2:
        return named_choice
    if all(_NUMBER.fullmatch(label.strip()) for label in labels):
        return last_number
    if all(equation_value(label) is not None for label in labels):
        return worked_equation
    if {label.strip() for label in labels} <= {"entailment", "neutral", "contradiction"}:
        return nli_relation
    return announced_answer


@mean_per_example
def rationale_consistency(targets: Sequence[str | None], predictions: Sequence[str]) -> Examples:
    """The fraction of rationales whose own conclusion is the predicted label.

    - `rationale_consistency`: of the rows with a conclusion, those where it is the label: equal
      text, or equations of the same value (`same_label`).
    - `no_conclusion`: the fraction of all rows without one. They do not count above.

    Args:
      targets: the conclusion of each row's rationale, from a function of this module; None or ""
        where it has none.
      predictions: the label predicted for the same row, by the same student.

    Raises:
      ValueError: the lists differ in length or are empty.
    """
    return {
        "rationale_consistency": [
            same_label(t, p) if t else nan for t, p in zip(targets, predictions, strict=True)
        ],
        "no_conclusion": [not t for t in targets],
    }
