"""Who can be a teacher, beside an endpoint on the network: what all of them share, and three.

| TEACHER      | answers                                                                        |
|--------------|--------------------------------------------------------------------------------|
| `scripted`   | the exact rationale of the arithmetic task, wrong as often as asked: no network|
| `replay`     | the completions that were released with a dataset                              |
| `checkpoint` | a student of this project, such as a larger one                                |
| `openai`     | any OpenAI-compatible endpoint, see `endpoint`                                  |
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from distill import decode, predictor
from distill.teacher import prompting, store


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer that is wanted.

    Attributes:
      key: see `store.Bought`.
      row: that it is about (of several with the same input, the first).
      sample: see `store.Bought`.
      given_label: the gold label, where its reasons are asked for.
    """

    key: str
    row: store.Asked
    sample: int
    given_label: str | None = None


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came back: a completion, or something else that the teacher stands by.

    Attributes:
      text: the completion; None where there is none.
      finish_reason: as the provider gave it.
      refused: why the teacher would not answer; None where it did.
      prompt_tokens: as the provider counted; None where it did not.
      completion_tokens: the same.
    """

    text: str | None
    finish_reason: str | None = None
    refused: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class Failed(Exception):
    """An attempt brought nothing; another may.

    Attributes:
      retry_after: seconds that the provider asked to wait; None where it did not.
      too_many: it said that there are too many requests.
      may_cost: the teacher may have worked, so that the attempt may have cost something.
      malformed: something came back, but no reply.
    """

    def __init__(
        self,
        why: str,
        *,
        retry_after: float | None = None,
        too_many: bool = False,
        may_cost: bool = True,
        malformed: bool = False,
    ):
        super().__init__(why)
        self.retry_after, self.too_many = retry_after, too_many
        self.may_cost, self.malformed = may_cost, malformed


class Hopeless(ValueError):
    """No request of this run can succeed: a wrong key, no credit, an unknown model."""


class Backend(Protocol):
    """Who answers.

    Attributes:
      provider: see `store.Bought`.
      model: see `store.Bought`.
      parameters: of a request; they are part of an answer's key.
      batch: requests that are best answered together.
    """

    provider: str
    model: str
    parameters: Mapping[str, Any]
    batch: int

    async def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Answers at most `batch` requests, once each.

        Raises:
          Failed: another attempt may bring an answer.
          Hopeless: none will.
        """

    async def close(self) -> None:
        """Lets go of connections."""


class Scripted:
    """Writes the running amounts of the arithmetic task, exactly; the embedded default.

    An answer is a function of input, sample and seed. In `error_rate` of them one sum is wrong, and
    what follows goes on from the mistake, as a language model's would.
    """

    provider, model, batch = "scripted", "arithmetic", 256

    def __init__(self, prompt: prompting.Prompt, *, error_rate: float = 0.0, seed: int = 0):
        if not 0 <= error_rate <= 1:
            raise ValueError(f"ERROR_RATE must be in [0, 1], not {error_rate!r}")
        self._prompt = prompt
        self.parameters = {"error_rate": float(error_rate), "seed": seed}

    async def ask(self, requests: Sequence[Request]) -> list[Reply]:
        return [Reply(self._answer(request), "stop") for request in requests]

    async def close(self) -> None:
        pass

    def _answer(self, request: Request) -> str:
        text = request.row.input
        start = re.search(r"has (\d+)", text)
        changes = re.findall(r"(gets|eats) (\d+)", text)
        if not start or not changes:
            raise Hopeless(
                f"TEACHER=scripted knows arithmetic such as 'Ann has 7 nuts, gets 2, eats 5.', not "
                f"{text[:60]!r}. Choose an endpoint (TEACHER=openai), a checkpoint, or replay"
            )
        # Two numbers in [0, 1) that nothing but input, sample and seed decide.
        identity = json.dumps([text, request.sample, self.parameters["seed"]])
        digest = hashlib.sha256(identity.encode()).digest()
        luck, place = (int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in (0, 8))
        errs = luck < self.parameters["error_rate"] and request.given_label is None
        amounts, amount = [], int(start[1])
        for verb, change in changes:
            amount += int(change) if verb == "gets" else -int(change)
            amounts.append(amount)
        if errs:
            # One sum is off, and with it all that follow; amounts stay the digits that they are.
            wrong, slip = divmod(int(place * 9 * len(changes)), 9)
            amounts[wrong:] = [(amount + slip + 1) % 10 for amount in amounts[wrong:]]
        amounts = list(map(str, amounts))
        return self._prompt.complete(", then ".join(amounts) + ".", amounts[-1], text)


class Replay:
    """Gives the completions that were released with a dataset."""

    provider, batch = "replay", 256

    def __init__(self, dataset: str, completions: Mapping[str, str]):
        """Takes a dataset's name, and the completions by the ids of its rows."""
        self.model = dataset
        self.parameters: Mapping[str, Any] = {}
        self._completions = completions

    async def ask(self, requests: Sequence[Request]) -> list[Reply]:
        for request in requests:
            if request.sample or request.given_label is not None:
                raise Hopeless(
                    "TEACHER=replay has one completion for each row: leave NUM_SAMPLES at 1 and "
                    "RATIONALISE at False"
                )
        return [Reply(self._completions.get(request.row.id), "stop") for request in requests]

    async def close(self) -> None:
        pass


class Checkpoint:
    """Asks a student of this project for its label and its reasons."""

    provider = "checkpoint"

    def __init__(
        self,
        path: str,
        prompt: prompting.Prompt,
        *,
        vocabulary: str | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
        batch: int = 64,
    ):
        """Reads a student; see `distill.Predictor`.

        Args:
          path: a run, one checkpoint, or a folder in Hugging Face's format.
          prompt: says how rationale and label are written into one completion.
          vocabulary: of the student, where it does not say it.
          temperature: of the samples; 0 is greedy.
          top_p: of the samples.
          max_tokens: of a text; None = as long as the student was trained for.
          seed: of the samples.
          batch: inputs answered together.

        Raises:
          ValueError: the student was not trained to explain; see `distill.Predictor` for others.
        """
        self._student = predictor.Predictor(path, vocabulary=vocabulary, batch_size=batch)
        if not self._student.explains:
            raise ValueError(
                f"{path} was trained on labels alone, so that it has no rationales to teach. Take "
                "a student of a step_by_step or rationale_label mixture"
            )
        self._prompt, self.batch = prompt, batch
        self.model = self._student.checkpoint.fingerprint
        self.parameters = {
            "temperature": float(temperature), "top_p": None if top_p is None else float(top_p),
            "max_tokens": max_tokens, "seed": seed,
        }  # fmt: skip

    async def ask(self, requests: Sequence[Request]) -> list[Reply]:
        if any(request.given_label is not None for request in requests):
            raise Hopeless("TEACHER=checkpoint cannot be given a label: leave RATIONALISE at False")
        replies: dict[str, Reply] = {}
        # Sample n of every input is drawn with a seed of its own.
        for sample in sorted({request.sample for request in requests}):
            some = [request for request in requests if request.sample == sample]
            answers = self._student(
                [r.row.input for r in some], explain=True, decoding=self._decoding(sample)
            )
            for request, answer in zip(some, answers, strict=True):
                text = self._prompt.complete(answer.rationale, answer.label, request.row.input)
                replies[request.key] = Reply(text, "stop")
        return [replies[request.key] for request in requests]

    async def close(self) -> None:
        pass

    def _decoding(self, sample: int) -> decode.Decoding:
        if not self.parameters["temperature"]:
            return decode.Decoding()
        return decode.Decoding(
            "sample", num_samples=1, temperature=self.parameters["temperature"],
            top_p=self.parameters["top_p"], seed=self.parameters["seed"] * 1000 + sample,
        )  # fmt: skip
