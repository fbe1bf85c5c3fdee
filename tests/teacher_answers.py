"""Rows and answers for the tests of the teacher's decisions and report, as short as they can be."""

import hashlib

from distill.teacher import store


def asked(input="q", gold=None, id=None, dataset="toy", split="train"):
    return store.Asked(
        id=id or f"{dataset}/{split}/{input}",
        dataset=dataset,
        split=split,
        input=input,
        input_sha256=_sha256(input),
        gold=gold,
    )


def bought(input="q", sample=0, label=None, rationale="since it is so", **fields):
    """An answer of class ok; its key is `<input>.<sample>` unless given."""
    text = fields.get("text", f"{rationale} The answer is {label}.")
    fields = dict(
        key=f"{input}.{sample}", kind="answer", provider="openai", model="m", parameters="{}",
        prompt="toy", prompt_sha256=_sha256("toy"), cls="ok", text=text,
        text_length=len(text or ""), finish_reason="stop", prompt_tokens=None,
        completion_tokens=None, tokens=0, cost=None, latency=1.0, attempts=1,
        time="2026-11-22T10:00:00Z", error=None,
    ) | fields  # fmt: skip
    return store.Bought(
        input_sha256=_sha256(input), sample=sample, label=label, rationale=rationale, **fields
    )


def rationalised(input="q", sample=9, label=None, **fields):
    return bought(input, sample, label, **{"rationale": "as told", "kind": "rationalised"} | fields)


def _sha256(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
