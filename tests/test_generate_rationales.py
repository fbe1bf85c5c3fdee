"""From rows to rationales that a student trains on: the whole command, and its parts."""

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from distill import metrics, sources, task
from distill.teacher import (
    backends,
    batch,
    decisions,
    endpoint,
    generate,
    prompting,
    purchase,
)
from distill.teacher.store import Store

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def unbound():
    """Settings of the process as they were."""
    bound = sources.binding._bound
    yield
    sources.binding._bound = bound


def config(tmp_path, **settings):
    given = dict(mixture_or_task_name="arithmetic", store=str(tmp_path / "s.sqlite"))
    return generate.GenerateConfig(**given | settings)


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# --- The embedded teacher -------------------------------------------------------------------------


def test_the_scripted_teacher_writes_what_the_task_has(tmp_path, capsys):
    """Rationales and labels are those of the embedded rows, letter by letter."""
    found = generate.generate(config(tmp_path, num_examples=300))
    rows = task.dataset("arithmetic").rows("train")[:300]
    store = {record.id: record for record in sources.read_store(tmp_path / "s.jsonl")}
    assert len(store) == 300
    for row in rows:
        assert store[row.id].rationale == row.answers[0].rationale
        assert store[row.id].label == row.label
        assert store[row.id].input_sha256 == sources.input_sha256(row.input)
    assert (found.answers, found.parts[0].rows) == (300, 300)
    assert (tmp_path / "s.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    assert "--gin.RATIONALE_STORE=" in capsys.readouterr().out


def test_errors_are_as_frequent_as_asked_and_the_vote_mends_them(tmp_path):
    found = generate.generate(config(tmp_path, num_examples=600, error_rate=0.25, num_samples=5))
    right = found.parts[0].accuracy
    # 3,000 answers: four standard errors are .03.
    assert right["single answer"].value == pytest.approx(0.75, abs=0.032)
    assert right["vote"].value > 0.93
    with Store(tmp_path / "s.sqlite", write=False) as store:
        made = store.read("decisions", decisions.Decision)
        answers = {answer.key: answer for answer in store.answers()}
    assert len(made) == 3_000
    for decision in made:
        rationale = answers[decision.key].rationale
        assert decision.leaks and decision.words == 5
        assert rationale.endswith(f"then {answers[decision.key].label}.")
        assert decision.agrees == (answers[decision.key].label == decision.vote)


def test_another_seed_errs_elsewhere_and_is_another_answer(tmp_path):
    settings = dict(num_examples=200, error_rate=0.5)
    generate.generate(config(tmp_path, **settings))
    first = sources.read_store(tmp_path / "s.jsonl")
    generate.generate(config(tmp_path, **settings, seed=1))
    second = sources.read_store(tmp_path / "s.jsonl")
    assert [r.id for r in first] == [r.id for r in second]
    assert 50 < sum(a.label != b.label for a, b in zip(first, second, strict=True)) < 150
    with Store(tmp_path / "s.sqlite", write=False) as store:
        assert len(store.answers()) == 400


def test_rationalisation_asks_for_wrong_rows_only_and_brings_the_gold_label(tmp_path):
    found = generate.generate(
        config(tmp_path, num_examples=400, error_rate=0.3, rationalise=True,
               policy=decisions.Policy(answer_match=True))
    )  # fmt: skip
    with Store(tmp_path / "s.sqlite", write=False) as store:
        answers, made = store.answers(), store.read("decisions", decisions.Decision)
    plain = [a for a in answers if a.kind == "answer"]
    told = [a for a in answers if a.kind == "rationalised"]
    wrong = [d for d in made if d.right is False and d.confidence is not None]
    assert len(plain) == 400 and 80 < len(wrong) == len(told) < 160
    records = sources.read_store(tmp_path / "s.jsonl")
    gold = {row.id: row.label for row in task.dataset("arithmetic").rows("train")}
    kept = [record for record in records if record.label is not None]
    assert {record.id for record in kept} == set(list(gold)[:400])
    assert all(record.label == gold[record.id] for record in kept)
    assert found.parts[0].kept_rows == 400


def test_a_second_run_asks_nothing_and_more_samples_ask_for_the_rest(tmp_path, monkeypatch):
    asked = []
    original = generate.backends.Scripted.ask

    async def counting(self, requests):
        asked.extend(requests)
        return await original(self, requests)

    monkeypatch.setattr(generate.backends.Scripted, "ask", counting)
    generate.generate(config(tmp_path, num_examples=50))
    before = (tmp_path / "s.jsonl").read_bytes()
    generate.generate(config(tmp_path, num_examples=50))
    assert len(asked) == 50
    assert (tmp_path / "s.jsonl").read_bytes() == before
    generate.generate(config(tmp_path, num_examples=60, num_samples=2))
    assert len(asked) == 120
    assert len({request.key for request in asked}) == 120


def test_what_is_not_kept_is_there_without_content(tmp_path):
    generate.generate(
        config(tmp_path, num_examples=100, error_rate=0.5, weight_by_confidence=True,
               policy=decisions.Policy(answer_match=True))
    )  # fmt: skip
    records = sources.read_store(tmp_path / "s.jsonl")
    assert len(records) == 100
    reasons = {record.provenance["decision"] for record in records}
    assert reasons == {"kept", "wrong"}
    for record in records:
        kept = record.provenance["decision"] == "kept"
        assert (record.rationale is None) == (record.label is None) == (not kept)
        assert record.confidence == (1.0 if kept else None)


def test_one_store_serves_several_splits_and_datasets(tmp_path):
    for name, split in (
        ("arithmetic", "train"),
        ("arithmetic", "test"),
        ("arithmetic_noisy", "train"),
    ):
        generate.generate(
            config(tmp_path, mixture_or_task_name=name, split=split, num_examples=20,
                   prompt="arithmetic")
        )  # fmt: skip
    generate.generate(config(tmp_path, num_examples=10))
    ids = [record.id.rpartition("/")[0] for record in sources.read_store(tmp_path / "s.jsonl")]
    assert {name: ids.count(name) for name in ids} == {
        "arithmetic/test": 20, "arithmetic_noisy/train": 20, "arithmetic/train": 10,
    }  # fmt: skip
    with Store(tmp_path / "s.sqlite", write=False) as store:
        assert len(store.read("decisions", decisions.Decision)) == 50


# --- Where rows come from -------------------------------------------------------------------------


def test_a_file_of_inputs_has_the_ids_that_a_task_of_it_has(tmp_path):
    given = [
        {"input": "Ann has 7 nuts, gets 2.", "label": "9"},
        {"input": "Ben has 1 nuts, eats 1.", "id": "mine"},
        {"input": "Ann has 7 nuts, gets 2.", "label": "8"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in given))
    generate.generate(
        config(tmp_path, mixture_or_task_name="nuts", input_file=str(path), prompt="arithmetic")
    )
    records = sources.read_store(tmp_path / "s.jsonl")
    assert [r.id for r in records] == ["nuts/train/0", "nuts/mine", "nuts/train/2"]
    assert [r.label for r in records] == ["9", "0", "9"]
    with Store(tmp_path / "s.sqlite", write=False) as store:
        assert len(store.answers()) == 2  # One input twice is asked once.
        assert [row.gold for row in store.asked()] == ["9", None, "8"]
        made = store.read("decisions", decisions.Decision)
    assert [d.right for d in made] == [True, None, False]


def test_a_task_and_a_mixture_mean_their_dataset(tmp_path):
    for name in ("arithmetic_explain", "arithmetic_step_by_step_llm"):
        rows, metric_fn, options = generate.read_rows(config(tmp_path, mixture_or_task_name=name))
        assert {row.dataset for row in rows} == {"arithmetic"}
        assert rows[0].input.endswith(".") and not rows[0].input.startswith("explain")
        assert metric_fn is metrics.label_accuracy and list(options) == list("0123456789")


def test_a_task_that_seqio_has_from_elsewhere(tmp_path):
    import seqio

    import tasks  # noqa: F401 (registers)

    name = "foreign_sums"
    if name not in seqio.TaskRegistry.names():
        known = seqio.TaskRegistry.get("arithmetic_label")
        seqio.TaskRegistry.add(
            name, source=known.source, preprocessors=known.preprocessors,
            output_features=known.output_features, metric_fns=[],
        )  # fmt: skip
    rows, _, options = generate.read_rows(
        config(tmp_path, mixture_or_task_name=name, num_examples=5)
    )
    ours = task.dataset("arithmetic").rows("train")[:5]
    assert [row.input for row in rows] == [row.input for row in ours]
    assert [row.gold for row in rows] == [row.label for row in ours]
    assert options == ()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(mixture_or_task_name="arithmetik"), "Did you mean 'arithmetic"),
        (dict(split="dev"), "no split 'dev'; it has train"),
        (dict(teacher="gpt"), "TEACHER must be one of"),
        (dict(num_samples=0), "NUM_SAMPLES must be"),
        (dict(teacher="openai", num_samples=3), "TEMPERATURE=0 are all the same"),
        (dict(max_cost=5.0), "MAX_COST needs PRICE_PROMPT"),
        (dict(ask_again=("bad",)), "no class 'bad'"),
        (dict(prompt="arithmetic2"), "no prompt named 'arithmetic2'. Did you mean 'arithmetic'"),
        (dict(mixture_or_task_name="all_label", num_examples=1), "one at a time"),
        (dict(teacher="checkpoint"), "MODEL is missing"),
        (dict(use_batch_api=True), "USE_BATCH_API is for"),
        (dict(error_rate=2.0), "ERROR_RATE must be in"),
        (dict(store="/no/folder/s.sqlite"), "no folder for the store"),
        (dict(teacher="replay"), "no completions were released"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_mistake_is_named_with_its_fix(tmp_path, settings, message, shared):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        generate.generate(config(tmp_path, **settings, data_dir=str(shared / "datasets")))


def test_inputs_that_the_scripted_teacher_cannot_solve(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input": "What is love?"}\n')
    with pytest.raises(ValueError, match=r"TEACHER=scripted knows arithmetic.*1 answers are left"):
        generate.generate(
            config(tmp_path, mixture_or_task_name="x", input_file=str(path), prompt="arithmetic")
        )


# --- Released completions -------------------------------------------------------------------------

PUBLISHED = {
    ("cqa", ("train", "validation")): (0.742634, 3),
    ("cqa", ("test",)): (0.772318, 0),
    ("svamp", ("train", "validation")): (0.7350, 13),
    ("svamp", ("test",)): (0.7400, 2),
    ("esnli", ("validation",)): (0.731660, 4),
    ("esnli", ("test",)): (0.729947, 0),
}


@pytest.mark.parametrize(
    "dataset, splits", PUBLISHED, ids=[f"{name}-{splits[0]}" for name, splits in PUBLISHED]
)
def test_replay_reproduces_the_published_teacher(tmp_path, shared, dataset, splits):
    gold, said = [], []
    for split in splits:
        generate.generate(
            config(tmp_path, mixture_or_task_name=dataset, split=split, teacher="replay",
                   data_dir=str(shared / "datasets"), store=str(tmp_path / f"{split}.sqlite"))
        )  # fmt: skip
        with Store(tmp_path / f"{split}.sqlite", write=False) as store:
            rows = store.asked()
            answers = {answer.input_sha256: answer.label for answer in store.answers()}
        label_of = {r.id: r.label for r in sources.read_store(tmp_path / f"{split}.jsonl")}
        gold += [row.gold for row in rows]
        said += [label_of[row.id] for row in rows]
        assert len(answers) <= len(rows)
    metric_fn, _ = task.judging(dataset)
    metric_fn = getattr(task.dataset(dataset), "teacher_metric", None) or metric_fn
    accuracy, unparsed = PUBLISHED[dataset, splits]
    assert sum(label is None for label in said) == unparsed
    assert metric_fn(gold, [label or "" for label in said])["accuracy"] == pytest.approx(
        accuracy, abs=6e-7
    )


# --- A student as teacher -------------------------------------------------------------------------


def test_a_checkpoint_teaches_what_it_predicts(tmp_path):
    from test_evaluate import save

    from distill import predictor

    save(tmp_path / "run", 1, 0, mixture="arithmetic_step_by_step")
    settings = dict(teacher="checkpoint", num_examples=6)
    model = str(tmp_path / "run")
    generate.generate(config(tmp_path, **settings, connection=endpoint.EndpointConfig(model=model)))
    rows = task.dataset("arithmetic").rows("train")[:6]
    said = predictor.Predictor(model)([row.input for row in rows], explain=True)
    with Store(tmp_path / "s.sqlite", write=False) as store:
        answers = {answer.input_sha256: answer for answer in store.answers()}
    prompt = prompting.load("arithmetic")
    for row, answer in zip(rows, said, strict=True):
        bought = answers[sources.input_sha256(row.input)]
        text = prompt.complete(answer.rationale, answer.label, row.input)
        assert bought.text == text
        assert bought.provider == "checkpoint" and bought.tokens == 0
    # Samples are answers of their own, and another temperature another teacher.
    generate.generate(
        config(tmp_path, **settings, num_samples=2,
               connection=endpoint.EndpointConfig(model=model, temperature=1.5))
    )  # fmt: skip
    with Store(tmp_path / "s.sqlite", write=False) as store:
        assert len(store.answers()) == 18
    save(tmp_path / "plain", 1, 0, mixture="arithmetic_label")
    with pytest.raises(ValueError, match="trained on labels alone"):
        generate.generate(
            config(tmp_path, **settings,
                   connection=endpoint.EndpointConfig(model=str(tmp_path / "plain")))
        )  # fmt: skip


# --- An endpoint ----------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    pytest.importorskip("openai", reason="the `teacher` extra")
    import teacher_server

    monkeypatch.setenv("OPENAI_API_KEY", "sk-verysecret-0123456789abcdef")
    with teacher_server.start(tmp_path / "log.jsonl") as running:
        yield running


def teacher_server_at(log):
    import teacher_server

    return teacher_server.start(log)


def at(server, tmp_path, **settings):
    connection = dict(model="teacher", base_url=server.base_url)
    connection |= settings.pop("connection", {})
    given = dict(
        teacher="openai", num_examples=20, yes=True,
        connection=endpoint.EndpointConfig(**connection),
    )  # fmt: skip
    return config(tmp_path, **given | settings)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_an_endpoint_teaches_what_the_task_has(tmp_path, server, api):
    found = generate.generate(at(server, tmp_path, connection=dict(api=api)))
    assert found.parts[0].accuracy["vote"].value == 1.0
    assert server.stats()["requests"] == 20


def test_a_quote_comes_before_the_first_call_and_needs_a_yes(tmp_path, server, capsys):
    prices = purchase.Prices(1.0, 4.0)
    with pytest.raises(ValueError, match="give --yes"):
        generate.generate(at(server, tmp_path, yes=False, prices=prices))
    quote = capsys.readouterr().err
    assert "Estimate (from the prompt's exemplars): 20 requests" in quote and "cost 0.0" in quote
    assert server.stats()["requests"] == 0
    generate.generate(at(server, tmp_path, prices=prices))
    with Store(tmp_path / "s.sqlite", write=False) as store:
        tokens, cost = store.spent()
    stats = server.stats()
    assert tokens == stats["prompt_tokens"] + stats["completion_tokens"]
    assert cost == pytest.approx((stats["prompt_tokens"] + 4 * stats["completion_tokens"]) / 1e6)
    # Now it is known what an answer costs.
    with pytest.raises(ValueError, match="give --yes"):
        generate.generate(at(server, tmp_path, yes=False, num_examples=40, prices=prices))
    assert f"{tokens:,}" not in quote
    measured = capsys.readouterr().err
    assert "Estimate (from the answers in the store): 20 requests" in measured


def test_a_ceiling_ends_the_run_and_more_money_goes_on(tmp_path, server):
    prices = purchase.Prices(1.0, 1.0)
    with pytest.raises(ValueError, match=r"stopped: MAX_COST=.* answers are left"):
        generate.generate(at(server, tmp_path, prices=prices, max_cost=0.006, num_examples=200))
    some = server.stats()["requests"]
    assert 0 < some < 200
    generate.generate(at(server, tmp_path, prices=prices, max_cost=9.0, num_examples=200))
    assert server.stats()["requests"] == 200
    assert len(sources.read_store(tmp_path / "s.jsonl")) == 200


def test_odd_answers_survive_to_training(tmp_path, server):
    faults = ["content_nul", "content_surrogates", "content_bidi", "content_null", "refusal",
              "content_huge", "finish_length", "400_context"]  # fmt: skip
    rows = task.dataset("arithmetic").rows("train")
    server.script(
        *({"contains": row.input, "answers": [fault], "repeat": True}
          for row, fault in zip(rows[5:], faults, strict=False))
    )  # fmt: skip
    found = generate.generate(at(server, tmp_path))
    assert found.answers == 20 and found.classes["ok"] == 15
    source = sources.WithRationales(task.dataset("arithmetic"), str(tmp_path / "s.jsonl"))
    read = [row for row in source.rows("train") if row.answers][:20]
    assert sum(bool(row.rationales) for row in read) >= 12
    for row in read:
        for answer in row.rationales:
            answer.rationale.encode()
            assert "\0" not in answer.rationale


def test_an_endpoint_rationalises_in_a_second_round(tmp_path, server):
    task.import_module("tasks")
    row = task.dataset("arithmetic").rows("train")[3]
    server.script({"contains": row.input, "answers": [{"text": "No. The answer is 99."}]})
    settings = dict(rationalise=True, num_examples=5)
    pace = purchase.Pace(max_attempts=1)
    found = generate.generate(at(server, tmp_path, pace=pace, **settings))
    assert found.classes == {"ok": 6} and found.kinds == {"answer": 5, "rationalised": 1}
    # More samples make no new question of it.
    server.script({"contains": row.input, "answers": [{"text": "No. The answer is 99."}] * 3})
    sampled = dict(temperature=0.7)
    before = server.stats()["requests"]
    for samples, asked in ((1, 6), (2, 5)):
        generate.generate(at(server, tmp_path, connection=sampled, num_samples=samples, **settings))
        assert server.stats()["requests"] - before == asked
        before = server.stats()["requests"]
    records = [r for r in sources.read_store(tmp_path / "s.jsonl") if r.id == row.id]
    assert [(r.sample, r.provenance["kind"]) for r in records] == [
        (0, "answer"), (1, "answer"), (2, "rationalised")
    ]  # fmt: skip


# --- The batch API --------------------------------------------------------------------------------


def test_batches_bring_the_same_answers(tmp_path, server):
    generate.generate(at(server, tmp_path, use_batch_api=True, poll_seconds=0.05))
    batched = sources.read_store(tmp_path / "s.jsonl")
    stats = server.stats()
    assert "/v1/chat/completions" not in stats["paths"]
    generate.generate(at(server, tmp_path, store=str(tmp_path / "one_by_one.sqlite")))
    single = sources.read_store(tmp_path / "one_by_one.jsonl")
    assert [(r.id, r.rationale, r.label) for r in batched] == [
        (r.id, r.rationale, r.label) for r in single
    ]
    # What is there is not asked again, either way.
    before = server.stats()["requests"]
    generate.generate(at(server, tmp_path, use_batch_api=True, poll_seconds=0.05))
    generate.generate(at(server, tmp_path))
    assert server.stats()["requests"] == before


def test_an_expired_batch_keeps_what_it_has_and_the_rest_is_handed_in_again(tmp_path, server):
    server.settings(batch_outcome="expired", batch_share=0.5, batch_garbage=True)
    settings = dict(use_batch_api=True, poll_seconds=0.05)
    found = generate.generate(at(server, tmp_path, **settings))
    assert found.classes["ok"] == 10 and found.classes["transport"] == 10
    server.settings(batch_outcome="completed")
    found = generate.generate(at(server, tmp_path, **settings))
    assert found.classes["ok"] == 20
    keys = [answer.key for answer in server.answers()]
    assert len(keys) == len(set(keys)) == 20


def test_a_refused_batch_is_an_error_with_its_reason(tmp_path, server):
    server.settings(batch_outcome="failed")
    with pytest.raises(ValueError, match="refuses the job"):
        generate.generate(at(server, tmp_path, use_batch_api=True, poll_seconds=0.05))
    server.settings(batch_outcome="completed")
    found = generate.generate(at(server, tmp_path, use_batch_api=True, poll_seconds=0.05))
    assert found.classes["ok"] == 20


@pytest.mark.parametrize("at_step", ["upload", "create", "noted"])
def test_a_batch_is_found_again_by_a_run_that_died(tmp_path, server, at_step):
    """SIGKILL before the job was made, after it was but before we knew, and while waiting."""
    server.settings(batch_polls=3)
    script = tmp_path / "child.py"
    script.write_text(
        f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import test_generate_rationales as t
from distill.teacher import batch, generate, endpoint
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
guarded, note = endpoint.Endpoint.guarded, batch._note
async def dying(self, fn, *args, **kwargs):
    name = fn.__qualname__
    if {at_step!r} == "upload" and "Files.create" in name:
        die()
    made = await guarded(self, fn, *args, **kwargs)
    if {at_step!r} == "create" and "Batches.create" in name:
        die()
    return made
def noted(into, job):
    note(into, job)
    if {at_step!r} == "noted":
        die()
endpoint.Endpoint.guarded, batch._note = dying, noted
class server:
    base_url = {server.base_url!r}
generate.generate(t.at(server, pathlib.Path({str(tmp_path)!r}), use_batch_api=True))
"""
    )
    died = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert died.returncode == -signal.SIGKILL, died.stderr
    found = generate.generate(at(server, tmp_path, use_batch_api=True, poll_seconds=0.05))
    assert found.classes["ok"] == 20
    keys = [answer.key for answer in server.answers()]
    assert len(keys) == len(set(keys)) == 20  # Nothing was sold twice.


def handed_in(server, tmp_path, monkeypatch, **settings):
    """A run that hands a job in and ends before it is collected."""

    async def interrupted(_):
        raise backends.Failed("interrupted")

    with monkeypatch.context() as patch:
        patch.setattr(batch.asyncio, "sleep", interrupted)
        with pytest.raises(ValueError, match="stopped: interrupted"):
            generate.generate(at(server, tmp_path, use_batch_api=True, **settings))


def test_what_lies_in_a_job_is_not_bought_one_by_one_and_not_quoted(
    tmp_path, server, monkeypatch, capsys
):
    handed_in(server, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="20 of these answers lie in the batch API"):
        generate.generate(at(server, tmp_path))
    capsys.readouterr()
    found = generate.generate(at(server, tmp_path, use_batch_api=True, poll_seconds=0, yes=False))
    assert "Estimate" not in capsys.readouterr().err and found.classes == {"ok": 20}


def test_a_job_that_another_provider_does_not_know_is_not_forgotten(tmp_path, server, monkeypatch):
    handed_in(server, tmp_path, monkeypatch)
    with Store(tmp_path / "s.sqlite") as store:
        (job,) = store.read("batches", batch.Job)
        batch._note(store, dataclasses.replace(job, status="submitting", batch_id=None))
    with teacher_server_at(tmp_path / "other.jsonl") as other:
        generate.generate(at(other, tmp_path, use_batch_api=True, poll_seconds=0))
    generate.generate(at(server, tmp_path, use_batch_api=True, poll_seconds=0))
    keys = [answer.key for answer in server.answers()]
    assert len(keys) == len(set(keys)) == 20


def test_an_answer_belongs_to_the_input_that_was_handed_in(tmp_path, server, monkeypatch):
    handed_in(server, tmp_path, monkeypatch, num_examples=1)
    with Store(tmp_path / "s.sqlite") as store:
        (row,) = store.asked()
        changed = dataclasses.replace(
            row, input="other", input_sha256=sources.input_sha256("other")
        )
        store.ask([changed])
        (key,) = batch.handed_in(store)
    generate.generate(at(server, tmp_path, use_batch_api=True, poll_seconds=0, num_examples=2))
    with Store(tmp_path / "s.sqlite", write=False) as store:
        sha256 = {answer.key: answer.input_sha256 for answer in store.answers()}
    assert sha256[key] == row.input_sha256


def test_a_ceiling_hands_in_what_fits(tmp_path, server):
    prices = purchase.Prices(1.0, 1.0)
    settings = dict(prices=prices, max_cost=0.006, use_batch_api=True, poll_seconds=0)
    with pytest.raises(ValueError, match="stopped: MAX_COST"):
        generate.generate(at(server, tmp_path, **settings))
    assert 0 < len(server.answers()) < 20


def test_an_endpoint_without_batches_can_be_asked_one_by_one(tmp_path, server, monkeypatch):
    """A job that was refused is none."""
    guarded = endpoint.Endpoint.guarded

    async def refuses(self, fn, *args, **kwargs):
        if "Batches.create" in fn.__qualname__:
            raise backends.Hopeless("there is no such path")
        return await guarded(self, fn, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(endpoint.Endpoint, "guarded", refuses)
        with pytest.raises(ValueError, match="no such path"):
            generate.generate(at(server, tmp_path, use_batch_api=True))
    assert generate.generate(at(server, tmp_path)).classes == {"ok": 20}


@pytest.mark.parametrize(
    "at_status, change",
    [("in_progress", dict(status="queued")), ("completed", dict(output_file_id=None))],
)
def test_a_job_is_not_given_up_before_its_answers_came(
    tmp_path, server, monkeypatch, at_status, change
):
    """A status that is not known, and a job that is said to be complete but names no file."""
    from openai.resources import batches

    retrieve, polls = batches.AsyncBatches.retrieve, []

    async def odd(self, *args, **kwargs):
        found = await retrieve(self, *args, **kwargs)
        polls.append(found.status)
        if found.status == at_status and polls.count(at_status) == 1:
            found = found.model_copy(update=change)
        return found

    monkeypatch.setattr(batches.AsyncBatches, "retrieve", odd)
    for _ in range(2):
        with contextlib.suppress(ValueError):
            generate.generate(at(server, tmp_path, use_batch_api=True, poll_seconds=0))
    with Store(tmp_path / "s.sqlite", write=False) as store:
        assert set(store.keys().values()) == {"ok"} and len(store.keys()) == 20
        assert len(store.read("batches", batch.Job)) == 1
    assert len(server.answers()) == 20


# --- As a user ------------------------------------------------------------------------------------


def script(name, *arguments, timeout=300):
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / name, *arguments], capture_output=True, text=True,
        timeout=timeout, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_from_nothing_to_a_trained_student_in_four_commands(tmp_path):
    """docs/teacher.md, at a tiny size."""
    cache = f"--gin.CACHE_DIR={tmp_path}/cache"
    made = script(
        "generate_rationales.py", "--gin_file=teacher.gin",
        "--gin.MIXTURE_OR_TASK_NAME=arithmetic", f"--gin.STORE={tmp_path}/nuts.sqlite",
        "--gin.ERROR_RATE=0.2", "--gin.NUM_SAMPLES=3", "--gin.ANSWER_MATCH=True",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    flag = next(line for line in made.stdout.splitlines() if "RATIONALE_STORE" in line).strip()
    store = flag.partition("=")[2]
    looked = script(
        "inspect_task.py", "arithmetic_step_by_step", f"--rationale_store={store}",
        f"--cache_dir={tmp_path}/cache", f"--html={tmp_path}/task.html",
    )  # fmt: skip
    assert looked.returncode == 0, looked.stderr
    assert "answers to 4800 of 4800 rows" in " ".join(looked.stdout.split())
    trained = script(
        "train.py", "--gin_file=t5_1_1/tiny.gin", "--gin_file=step_by_step.gin",
        "--gin.MIXTURE_OR_TASK_NAME=arithmetic_step_by_step", f"--gin.MODEL_DIR={tmp_path}/run",
        "--gin.TRAIN_STEPS=4", "--gin.EVALUATOR_NUM_EXAMPLES=8", cache, flag,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    scored = script(
        "evaluate.py", "--gin_file=eval.gin", f"--gin.CHECKPOINT_PATH={tmp_path}/run",
        "--gin.SPLIT=test", "--gin.EVALUATOR_NUM_EXAMPLES=16", cache,
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    assert "arithmetic test, accuracy (n = 16)" in scored.stdout


def test_export_and_import_by_hand(tmp_path):
    generate.generate(config(tmp_path, num_examples=10))
    exported = script(
        "generate_rationales.py",
        f"--store={tmp_path}/s.sqlite",
        f"--export_to={tmp_path}/all.jsonl",
    )
    assert (exported.returncode, exported.stdout) == (0, "20 lines\n"), exported.stderr
    back = script(
        "generate_rationales.py", f"--store={tmp_path}/c.sqlite",
        f"--import_from={tmp_path}/all.jsonl",
    )  # fmt: skip
    assert back.returncode == 0, back.stderr
    with Store(tmp_path / "s.sqlite") as one, Store(tmp_path / "c.sqlite") as two:
        assert one.answers() == two.answers() and one.asked() == two.asked()
    wrong = script("generate_rationales.py", f"--export_to={tmp_path}/all.jsonl")
    assert wrong.returncode == 2 and "give --store" in wrong.stderr
