"""What a run asks the teacher, and what it answered."""

import dataclasses

CLASSES = ("ok", "empty", "truncated", "oversize", "malformed", "refused", "transport")


@dataclasses.dataclass(frozen=True)
class Asked:
    """One input of a run."""

    id: str
    dataset: str
    split: str
    input: str
    input_sha256: str
    gold: str | None


@dataclasses.dataclass(frozen=True)
class Bought:
    """One answer of the teacher to one input text."""

    key: str
    input_sha256: str
    sample: int
    kind: str  # "answer", or "rationalised": the gold label was given
    provider: str
    model: str
    parameters: str
    prompt: str
    prompt_sha256: str
    cls: str  # one of CLASSES
    text: str | None
    text_length: int
    finish_reason: str | None
    rationale: str | None
    label: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    cost: float | None
    latency: float
    attempts: int
    time: str
    error: str | None
