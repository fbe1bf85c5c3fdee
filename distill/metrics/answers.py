"""How a target holds its label, and how to find the label in what a student wrote."""

# Alone, after a rationale (as the teacher's completions end), or before one. No separator has a
# newline: SentencePiece makes a space of it.
ANSWER_FORMS = ("label", "rationale_label", "label_rationale")
_ANSWER = "So the answer is"
_EXPLANATION = "Explanation:"


def answer_target(form: str, label: str, rationale: str | None = None) -> str:
    """Returns the target text of a form; `answer` gives the label back.

    | form              | target                                 | without a rationale        |
    |-------------------|----------------------------------------|----------------------------|
    | `label`           | `{label}`                              | `{label}`                  |
    | `rationale_label` | `{rationale} So the answer is {label}` | `So the answer is {label}` |
    | `label_rationale` | `{label} Explanation: {rationale}`     | `{label}`                  |

    Raises:
      ValueError: there is no such form.
    """
    _check_form(form)
    if form == "rationale_label":
        return f"{rationale} {_ANSWER} {label}" if rationale else f"{_ANSWER} {label}"
    if form == "label_rationale" and rationale:
        return f"{label} {_EXPLANATION} {rationale}"
    return label


def answer(text: str, form: str) -> str:
    """Returns the label that a generated text holds, without outer whitespace but for `label`.

    `rationale_label`: what follows the *last* `So the answer is`, because a rationale may use the
    words too; "" where there is none: a student that was cut off has not answered, and its
    reasoning is no label. `label_rationale`: what stands before the *first* `Explanation:`, the
    whole text where there is none, since the label comes first. `label`: the text as it is.

    Raises:
      ValueError: there is no such form.
    """
    _check_form(form)
    if form == "rationale_label":
        _, found, label = text.rpartition(_ANSWER)
        return label.strip() if found else ""
    if form == "label_rationale":
        return text.partition(_EXPLANATION)[0].strip()
    return text


def rationale(text: str, form: str) -> str | None:
    """Returns the rationale that a generated text holds; None where its form has none.

    The other side of `answer`: `rationale_label`: what stands before the last `So the answer is`,
    the whole text where there is none; `label_rationale`: what follows the first `Explanation:`.

    Raises:
      ValueError: there is no such form.
    """
    _check_form(form)
    if form == "rationale_label":
        before, found, _ = text.rpartition(_ANSWER)
        return (before if found else text).strip()
    if form == "label_rationale":
        return text.partition(_EXPLANATION)[2].strip()
    return None


def _check_form(form: str) -> None:
    if form not in ANSWER_FORMS:
        raise ValueError(f"an answer's form must be one of {', '.join(ANSWER_FORMS)}, not {form!r}")
