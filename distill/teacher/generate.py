"""From the rows of a dataset to rationales that a student is trained on: the whole way.

`generate` reads the rows, says what it will cost, asks the teacher for what the store does not have
yet, decides what becomes of every answer, and writes the rationale store that training reads.
"""

import asyncio
import collections
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from absl import logging
from etils import epath
from tqdm import tqdm

from distill import metrics, sources, task
from distill.teacher import (
    backends,
    batch,
    decisions,
    endpoint,
    limits,
    prompting,
    purchase,
    report,
    summary,
)
from distill.teacher import store as store_lib

TEACHERS = ("scripted", "openai", "checkpoint", "replay")
_BYTES_A_TOKEN = 4  # of English; what is set aside before a call counts half of that
_GUESSED_LATENCY = 2.0  # seconds, until some answers were timed


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What is asked, of whom, and what becomes of it.

    Attributes:
      mixture_or_task_name: a dataset (`svamp`), or a SeqIO task or mixture, whose inputs are asked.
      store: SQLite file of the answers; goes on where it was interrupted.
      mixture_or_task_module: that registers the tasks.
      split: of the dataset.
      input_file: JSON lines with `input` and, if there are, `id` and `label`, in the place of the
        dataset's rows; the ids are then those that `sources.JsonLines` gives.
      num_examples: only the first so many rows; None = all.
      prompt: a name, or a TOML file; None = the dataset's.
      teacher: `scripted`, `openai`, `checkpoint` or `replay`, see `backends`.
      connection: where the teacher is (`openai`); its model, temperature and top_p also are those
        of `checkpoint`.
      num_samples: answers to each input.
      rationalise: where no answer is right, ask again for the reasons of the gold label.
      error_rate: of `scripted`.
      seed: of `scripted` and `checkpoint`.
      use_batch_api: of `openai`: hand everything in and collect it later, see `batch`.
      poll_seconds: between two looks at what was handed in.
      vocabulary: of `checkpoint`, where it does not say it.
      pace: how fast.
      prices: of the teacher, for the estimate and the ceiling.
      max_total_tokens: ceiling over all that the store has seen; None = none.
      max_cost: the same, in the currency of the prices.
      ask_again: classes of answers that are asked for again.
      policy: which answers are kept for training.
      weight_by_confidence: an answer trains with the share of the samples that agree with it.
      output: the rationale store for training; None = the store's name with .jsonl.
      report: HTML page; None = the store's name with .html.
      yes: do not ask before spending.
      data_dir: see `sources.Settings`.
      max_bad_rows: see `sources.Settings`.
    """

    mixture_or_task_name: str
    store: str
    mixture_or_task_module: str = "tasks"
    split: str = "train"
    input_file: str | None = None
    num_examples: int | None = None
    prompt: str | None = None
    teacher: str = "scripted"
    connection: endpoint.EndpointConfig = endpoint.EndpointConfig()  # noqa: RUF009 (frozen)
    num_samples: int = 1
    rationalise: bool = False
    error_rate: float = 0.0
    seed: int = 0
    use_batch_api: bool = False
    poll_seconds: float = 30.0
    vocabulary: str | None = None
    pace: purchase.Pace = purchase.Pace()  # noqa: RUF009 (frozen)
    prices: purchase.Prices = purchase.Prices()  # noqa: RUF009 (frozen)
    max_total_tokens: int | None = None
    max_cost: float | None = None
    ask_again: Sequence[str] = store_lib.UNHEARD
    policy: decisions.Policy = decisions.Policy()  # noqa: RUF009 (frozen)
    weight_by_confidence: bool = False
    output: str | None = None
    report: str | None = None
    yes: bool = False
    data_dir: str | None = None
    max_bad_rows: int | None = None

    def __post_init__(self):
        if self.teacher not in TEACHERS:
            raise ValueError(f"TEACHER must be one of {', '.join(TEACHERS)}, not {self.teacher!r}")
        for field in ("num_samples", "num_examples", "max_total_tokens"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{field.upper()} must be a positive integer, not {value!r}")
        if self.max_cost is not None and self.prices.prompt is None:
            raise ValueError("MAX_COST needs PRICE_PROMPT and PRICE_COMPLETION, per million tokens")
        sampled = self.connection.temperature > 0
        if self.num_samples > 1 and not sampled and self.teacher in ("openai", "checkpoint"):
            raise ValueError(
                f"NUM_SAMPLES={self.num_samples} of a teacher at TEMPERATURE=0 are all the same: "
                "set --gin.TEMPERATURE=0.7"
            )
        if self.use_batch_api and self.teacher != "openai":
            raise ValueError("USE_BATCH_API is for TEACHER=openai: leave it at False")
        if isinstance(self.ask_again, str):
            raise ValueError(
                f"ASK_AGAIN must be a tuple: --gin.ASK_AGAIN=\"('{self.ask_again}',)\""
            )
        if self.max_cost is not None and not self.max_cost > 0:
            raise ValueError(f"MAX_COST must be positive or None, not {self.max_cost!r}")
        if unknown := set(self.ask_again) - set(store_lib.CLASSES):
            raise ValueError(
                f"ASK_AGAIN: there is no class {min(unknown)!r}; there are "
                f"{', '.join(store_lib.CLASSES)}"
            )

    def beside(self, suffix: str, given: str | None) -> epath.Path:
        """The path of a file that has the store's name unless it is given."""
        if given is not None:
            return epath.Path(given).expanduser()
        path = epath.Path(self.store).expanduser()
        return path.with_name(path.name.removesuffix(".sqlite") + suffix)


def generate(config: GenerateConfig) -> summary.Report:
    """Asks a teacher about every row, and writes what a student can be trained on.

    Raises:
      FileNotFoundError: data, prompt, key file or checkpoint are missing.
      ValueError: a setting is wrong, the teacher is hopeless (a wrong key, no such model), or the
        estimate was declined. What was answered until then is kept.
    """
    rows, metric_fn, options = read_rows(config)
    prompt = prompting.load(config.prompt or rows[0].dataset)
    backend = make_backend(config, rows[0].dataset, prompt)
    parameters = json.dumps(backend.parameters, sort_keys=True, ensure_ascii=False)
    with store_lib.Store(config.store) as store:
        store.ask(rows)
        first: dict[str, store_lib.Asked] = {}
        for row in rows:
            first.setdefault(row.input_sha256, row)
        request = functools.partial(_request, backend, parameters, prompt)
        wanted = [
            request(row, sample) for row in first.values() for sample in range(config.num_samples)
        ]
        asked = {request.key for request in wanted}
        answered = set()
        rounds = [lambda: wanted]
        if config.rationalise:
            rounds.append(
                lambda: _to_rationalise(config, store, rows, asked, request, metric_fn, options)
            )
        budget = limits.Budget(config.max_total_tokens, config.max_cost, *store.spent())
        outcome = purchase.Outcome()
        for make_requests in rounds:
            requests = make_requests()
            answered |= {request.key for request in requests}
            outcome = _buy(config, backend, requests, store, prompt, parameters, budget)
            if outcome.stopped:
                break
        found = _conclude(config, store, rows, answered, metric_fn, options)
    if outcome.stopped:
        raise ValueError(
            f"stopped: {outcome.stopped}. {outcome.left} answers are left. The same command goes "
            "on; what is in the store is not bought again"
        )
    return found


# --- What is asked --------------------------------------------------------------------------------


def read_rows(
    config: GenerateConfig,
) -> tuple[list[store_lib.Asked], metrics.MetricFn, task.Options]:
    """Returns the rows to ask about, the metric that says which labels are right, and the labels.

    Raises:
      FileNotFoundError: the data is missing.
      ValueError: there is no such dataset or split, or it has no row.
    """
    task.bind(data_dir=config.data_dir, max_bad_rows=config.max_bad_rows)
    task.import_module(config.mixture_or_task_module)
    name = config.mixture_or_task_name
    if config.input_file is not None or name in task.datasets():
        known = {name: name if name in task.datasets() else None}
    else:
        known = task.datasets_of(name)
    if len(known) > 1:
        raise ValueError(
            f"{name} is of several datasets: {', '.join(known)}. Ask about one at a time: each has "
            "its own prompt"
        )
    ((dataset, ours),) = known.items()
    if config.input_file is not None:
        rows = _rows_of_file(config, dataset)
    elif ours:
        source = task.dataset(ours)
        if config.split not in source.splits:
            raise ValueError(
                f"{ours} has no split {config.split!r}; it has {', '.join(source.splits)}"
            )
        rows = [(r.id, r.input, r.label) for r in source.rows(config.split)]
    else:
        rows = [
            (row["example_id"], row["inputs_pretokenized"], row["label"] or None)
            for row in task.tokenized_rows(dataset, config.split)
        ]
    rows = rows[: config.num_examples]
    if not rows:
        raise ValueError(
            f"{config.input_file or dataset}, {config.split}: there is no row; see SPLIT"
        )
    asked = [
        store_lib.Asked(i, dataset, config.split, text, sources.input_sha256(text), gold)
        for i, text, gold in rows
    ]
    return asked, *(task.judging(ours) if ours else (metrics.label_accuracy, ()))


def _rows_of_file(config: GenerateConfig, dataset: str) -> list[tuple[str, str, str | None]]:
    lines, report = sources.read_json_lines(config.input_file, {"input": str}, key=_id_of)
    if report.bad:
        logging.warning("%s", report)
    rows = []
    for line in lines:
        own = _id_of(line.value)
        label = line.value.get("label")
        if label is not None and not isinstance(label, str):
            raise ValueError(f"{config.input_file}:{line.number}: label must be text or null")
        row_id = f"{config.split}/{line.position}" if own is None else own
        rows.append((f"{dataset}/{row_id}", line.value["input"], label))
    return rows


def _id_of(fields: Mapping) -> str | None:
    return None if fields.get("id") is None else str(fields["id"])


def make_backend(
    config: GenerateConfig, dataset: str, prompt: prompting.Prompt
) -> backends.Backend:
    """Returns who answers to the rows of a dataset."""
    connection = config.connection
    match config.teacher:
        case "scripted":
            return backends.Scripted(prompt, error_rate=config.error_rate, seed=config.seed)
        case "openai":
            return endpoint.Endpoint(connection, prompt)
        case "replay":
            completions = sources.released_completions(task.dataset(dataset), config.split)
            return backends.Replay(dataset, completions)
        case _:
            if not connection.model:
                raise ValueError("MODEL is missing: the run or checkpoint that is the teacher")
            return backends.Checkpoint(
                connection.model, prompt, vocabulary=config.vocabulary, seed=config.seed,
                temperature=connection.temperature, top_p=connection.top_p,
            )  # fmt: skip


def _request(
    backend: backends.Backend, parameters: str, prompt: prompting.Prompt, row: store_lib.Asked,
    sample: int, given_label: str | None = None,
) -> backends.Request:  # fmt: skip
    key = store_lib.key_of(
        provider=backend.provider, model=backend.model, parameters=parameters,
        prompt_sha256=prompt.sha256, input_sha256=row.input_sha256, sample=sample,
        given_label=given_label,
    )  # fmt: skip
    return backends.Request(key, row, sample, given_label)


def _to_rationalise(config, store, rows, asked, request, metric_fn, options):
    """Returns requests for the reasons of the gold label, for rows without a right answer."""
    plain = [answer for answer in store.answers() if answer.key in asked]
    judged = decisions.decide(rows, plain, config.policy, metric_fn, options)
    right = {decision.id for decision in judged if decision.right}
    wrong = {
        (row.input_sha256, row.gold): row
        for row in rows
        if row.gold is not None and row.id not in right
    }
    # Sample 0 whatever NUM_SAMPLES is: the same question is not bought under two keys.
    return [request(row, 0, row.gold) for row in wrong.values()]


# --- Buying ---------------------------------------------------------------------------------------


def _buy(config, backend, requests, store, prompt, parameters, budget) -> purchase.Outcome:
    """Asks for what the store does not have, after saying what that costs."""
    kept = {key for key, cls in store.keys().items() if cls not in config.ask_again}
    missing = [request for request in requests if request.key not in kept]
    logging.info(
        "%s of %s, prompt %s: %d answers wanted, %d in the store, %d to ask for",
        backend.model, backend.provider, prompt.name, len(requests),
        len(requests) - len(missing), len(missing),
    )  # fmt: skip
    if not missing:
        return purchase.Outcome()
    paid = isinstance(backend, endpoint.Endpoint)
    handed_in = batch.handed_in(store) & {request.key for request in missing} if paid else set()
    if handed_in and not config.use_batch_api:
        raise ValueError(
            f"{len(handed_in)} of these answers lie in the batch API and would be bought twice: "
            "collect them first, with --gin.USE_BATCH_API=True"
        )
    if handed_in:
        logging.info("%d of them were handed in before", len(handed_in))
    unpaid = [request for request in missing if request.key not in handed_in]
    if paid and unpaid:
        quote = make_quote(backend, unpaid, prompt, config, store)
        print(quote, file=sys.stderr)
        if not config.yes:
            _confirm()
    sizes = _sizes(backend, config) if paid else lambda request: purchase.Size(0, 0)
    with tqdm(total=len(missing), unit="answer", smoothing=0.05, file=sys.stderr) as bar:
        classes = collections.Counter()

        def progress(answer: store_lib.Bought) -> None:
            classes[answer.cls] += 1
            others = {cls: n for cls, n in classes.items() if cls != "ok"}
            bar.set_postfix(
                {**others, "spent": f"{budget.cost:.4f}"} if budget.cost else others, refresh=False
            )
            bar.update()

        async def run() -> purchase.Outcome:
            shared = dict(
                prompt=prompt, parameters=parameters, sizes=sizes, prices=config.prices,
                budget=budget, progress=progress,
            )  # fmt: skip
            try:
                if config.use_batch_api:
                    try:
                        return await batch.buy(
                            backend, missing, store, poll_seconds=config.poll_seconds, **shared
                        )
                    except backends.Failed as e:
                        return purchase.Outcome(left=len(missing) - bar.n, stopped=str(e))
                # What computes here has nothing to wait for: more at a time only hold up each
                # other, the writer and Ctrl-C.
                pace = config.pace if paid else dataclasses.replace(config.pace, concurrency=1)
                return await purchase.buy(backend, missing, store, pace=pace, **shared)
            finally:
                await backend.close()

        return asyncio.run(run())


def _sizes(backend: endpoint.Endpoint, config: GenerateConfig) -> Callable:
    """The most tokens of a request: of its text twice as many as English has."""
    limit = backend.max_tokens

    def sizes(request: backends.Request) -> purchase.Size:
        size = backend.prompt_bytes(request)
        return purchase.Size(size * 2 // _BYTES_A_TOKEN + 16, limit)

    return sizes


@dataclasses.dataclass(frozen=True)
class Quote:
    """What asking will come to, by estimate; `str` is the text for the user.

    Attributes:
      requests: to be sent.
      prompt_tokens: of all of them.
      completion_tokens: of all replies.
      cost: None without prices.
      seconds: at the pace that is allowed.
      measured: whether it rests on answers that are in the store, not on the exemplars.
    """

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    seconds: float
    measured: bool

    def __str__(self) -> str:
        basis = "from the answers in the store" if self.measured else "from the prompt's exemplars"
        cost = "unknown: give PRICE_PROMPT, PRICE_COMPLETION" if self.cost is None \
            else f"{self.cost:,.{2 if self.cost >= 1 else 4}f}"  # fmt: skip
        return (
            f"Estimate ({basis}): {self.requests:,} requests, {self.prompt_tokens:,} + "
            f"{self.completion_tokens:,} tokens (prompts + completions), cost {cost}, about "
            f"{_duration(self.seconds)}."
        )


def make_quote(
    backend: endpoint.Endpoint,
    requests: Sequence[backends.Request],
    prompt: prompting.Prompt,
    config: GenerateConfig,
    store: store_lib.Store,
) -> Quote:
    """Returns what asking will come to, from a sample of the requests and what is known already."""
    some = requests[:: max(1, len(requests) // 200)]
    size = sum(map(backend.prompt_bytes, some)) / len(some)
    spoken = [prompt.complete(e.rationale, e.label, e.input) for e in prompt.exemplars]
    said = sum(len(text.encode()) for text in spoken) / max(1, len(spoken)) / _BYTES_A_TOKEN
    asked, latency = size / _BYTES_A_TOKEN, _GUESSED_LATENCY
    known = [
        answer
        for answer in store.answers()
        if answer.model == backend.model and answer.prompt_sha256 == prompt.sha256
        and answer.prompt_tokens and answer.completion_tokens
    ]  # fmt: skip
    if known:
        asked, said, latency = (
            sum(getattr(answer, field) for answer in known) / len(known)
            for field in ("prompt_tokens", "completion_tokens", "latency")
        )
    n = len(requests)
    prompt_tokens, completion_tokens = round(n * asked), round(n * said)
    pace = config.pace
    seconds = max(
        n * latency / pace.concurrency,
        60 * n / (pace.requests_per_minute or math.inf),
        60 * (prompt_tokens + completion_tokens) / (pace.tokens_per_minute or math.inf),
    )
    cost = config.prices.of(prompt_tokens, completion_tokens)
    return Quote(n, prompt_tokens, completion_tokens, cost, seconds, bool(known))


def _confirm() -> None:
    if not sys.stdin.isatty():
        raise ValueError("This costs money: look at the estimate above, and give --yes")
    if input("Go on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError("Nothing was asked.")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# --- What becomes of it ---------------------------------------------------------------------------


def _conclude(config, store, rows, answered, metric_fn, options) -> summary.Report:
    """Decides about every answer of this run, and writes what training and people read."""
    answers = [answer for answer in store.answers() if answer.key in answered]
    decided = decisions.decide(rows, answers, config.policy, metric_fn, options)
    store.decide(decisions.Decision, decided, rows[0].dataset, config.split)
    output = config.beside(".jsonl", config.output)
    made = list(records(rows, answers, decided, config.weight_by_confidence))
    sources.write_store(
        output, _of_other_splits(output, store, rows[0].dataset, config.split) + made
    )
    found = summary.summary(rows, answers, decided)
    page = config.beside(".html", config.report)
    page.write_text(report.html_page(found))
    print(report.text(found, examples=1))
    kept = sum(decision.kept for decision in decided)
    print(f"\n{kept} of {len(decided)} answers kept. For training:")
    print(f"  --gin.RATIONALE_STORE={output}")
    print(f"The report as a page: {page}")
    return found


def _of_other_splits(
    output: epath.Path, store: store_lib.Store, dataset: str, split: str
) -> list[sources.StoreRecord]:
    """What earlier runs into this store wrote about other datasets and splits."""
    if not output.exists():
        return []
    others = {row.id for row in store.asked() if (row.dataset, row.split) != (dataset, split)}
    return [record for record in sources.read_store(output) if record.id in others]


def records(
    rows: Sequence[store_lib.Asked],
    answers: Sequence[store_lib.Bought],
    decided: Sequence[decisions.Decision],
    weight_by_confidence: bool = False,
) -> Iterable[sources.StoreRecord]:
    """Yields the rationale store: every answer, those that are not kept without their content."""
    row_of = {row.id: row for row in rows}
    answer_of = {answer.key: answer for answer in answers}
    last = collections.defaultdict(lambda: -1)  # sample of a row
    for decision in decided:
        row, answer = row_of[decision.id], answer_of[decision.key]
        if answer.cls == "transport":
            continue  # It was not answered.
        # The rationalised ones, which come last, go on counting.
        last[row.id] = answer.sample if answer.kind == "answer" else last[row.id] + 1
        yield sources.StoreRecord(
            id=row.id,
            input_sha256=row.input_sha256,
            sample=last[row.id],
            rationale=answer.rationale if decision.kept else None,
            label=answer.label if decision.kept else None,
            confidence=decision.confidence if weight_by_confidence and decision.kept else None,
            provenance={
                "key": answer.key, "provider": answer.provider, "model": answer.model,
                "parameters": answer.parameters, "prompt": answer.prompt,
                "prompt_sha256": answer.prompt_sha256, "kind": answer.kind, "class": answer.cls,
                "decision": decision.reason, "time": answer.time,
            },
        )  # fmt: skip
