"""The report on a teacher: its numbers against numpy, and nothing that a text could do to it."""

import collections
import dataclasses
import html.parser
import math
import re
import unicodedata

import numpy as np
import pytest
from teacher_answers import asked, bought, rationalised

from distill import metrics
from distill.teacher import report, store
from distill.teacher import summary as summary_lib
from distill.teacher.decisions import KEPT, REASONS, Policy, decide

NASTY = (
    "</pre></script><script>pwned=1</script><img src=x onerror=\"pwned=1\" style='x'>--> &amp;"
    "\u202etxet\u2066 \0 \x1b[31m \ud800 \u2028 \ufeff $x %s {0} <style>body{display:none}"
)
VOID = {"meta"}


def run(rows=200, samples=5, seed=0, policy=Policy(), datasets=(("toy", "train"),)):  # noqa: B008
    """Makes (asked, bought, decisions) at random, with every class and reason."""
    rng = np.random.default_rng(seed)
    given, answers, decisions = [], [], []
    for dataset, split in datasets:
        some, said = [], []
        for i in range(rows):
            text = f"{dataset} {split} {i}"
            gold = None if rng.random() < 0.1 else str(rng.choice(["a", "b", "c"]))
            some.append(asked(text, gold, dataset=dataset, split=split))
            for s in range(int(rng.integers(0, samples + 1))):
                cls = "ok" if rng.random() < 0.8 else str(rng.choice(store.CLASSES))
                label = None if rng.random() < 0.1 else str(rng.choice([gold or "a", "a", "b"]))
                words = " ".join(["so", label or "?", *["it", "is"] * int(rng.integers(0, 20))])
                known = rng.random() < 0.7
                said.append(bought(
                    text, s, label, rationale=words if rng.random() < 0.9 else None, cls=cls,
                    cost=float(rng.random()) if known else None, latency=float(rng.random()) * 9,
                    prompt_tokens=int(rng.integers(1, 99)) if known else None,
                    completion_tokens=int(rng.integers(1, 99)) if known else None,
                    attempts=int(rng.integers(1, 4)), model=str(rng.choice(["m", "n"])),
                ))  # fmt: skip
            if gold and rng.random() < 0.2:
                said.append(rationalised(text, label=gold))
        decisions += decide(some, said, policy, options=["a", "b"])
        given, answers = given + some, answers + said
    return given, answers, decisions


STRICT = Policy(answer_match=True, min_words=4, max_words=30, leaks="keep", duplicates="drop",
                min_confidence=0.3)  # fmt: skip


# --- Numbers --------------------------------------------------------------------------------------


def test_counts_are_those_of_the_run():
    given, answers, decisions = run(policy=STRICT)
    made = report.summary(given, answers, decisions)
    assert made.total.rows == made.inputs == 200
    assert made.total.gold == sum(row.gold is not None for row in given)
    assert made.classes == collections.Counter(a.cls for a in answers)
    assert list(made.classes) == [c for c in store.CLASSES if c in made.classes]
    assert made.kinds == collections.Counter(a.kind for a in answers)
    assert made.answers == len(answers) == len(decisions)
    assert made.reasons == collections.Counter(d.reason for d in decisions)
    assert list(made.reasons) == [r for r in (KEPT, *REASONS) if r in made.reasons]
    assert made.parsed == sum(d.parsed for d in decisions)
    assert made.kept == sum(d.kept for d in decisions) > 0
    assert made.outside == sum(d.in_options is False for d in decisions) > 0
    assert made.duplicates == sum(d.duplicate_of is not None for d in decisions) > 0
    heard = {d.id for a, d in zip(by_key(answers, decisions), decisions, strict=True)
             if a.cls not in ("malformed", "transport")}  # fmt: skip
    assert made.total.answered == len(heard)
    assert made.total.parsed == len({d.id for d in decisions if d.vote is not None})
    assert made.total.kept_rows == len({d.id for d in decisions if d.kept})
    assert made.parts == (dataclasses.replace(made.total, dataset="toy", split="train"),)


def by_key(answers, decisions):
    found = {a.key: a for a in answers}
    return [found[d.key] for d in decisions]


def test_accuracy_and_agreement_against_numpy():
    given, answers, decisions = run(policy=STRICT)
    gold = {row.id: row.gold for row in given}
    of_row = collections.defaultdict(list)
    for a, d in zip(by_key(answers, decisions), decisions, strict=True):
        of_row[d.id].append((a, d))
    want = {name: np.full(len(given), np.nan) for name in summary_lib.MEASURES}
    for i, row in enumerate(given):
        found = of_row[row.id]
        plain = [
            (a, d) for a, d in found
            if a.kind == "answer" and a.cls not in ("malformed", "transport")
        ]  # fmt: skip
        labels = [a.label for a, d in plain if d.parsed]
        pairs = [x == y for i, x in enumerate(labels) for y in labels[:i]]
        if pairs:
            want["agreement"][i] = np.mean(pairs)
        if gold[row.id] is None:
            continue
        if plain:
            right = [a.cls == "ok" and a.label == gold[row.id] for a, _ in plain]
            counts = collections.Counter(labels)
            vote = max(counts, key=counts.get) if labels else None
            want["single answer"][i] = np.mean(right)
            want["vote"][i] = vote == gold[row.id]
            want["at least one answer"][i] = any(right)
        if labels:
            want["single answer with a label"][i] = np.mean([x == gold[row.id] for x in labels])
        if kept := [a.label == gold[row.id] for a, d in found if d.kept]:
            want["kept answer"][i] = np.mean(kept)
    got = report.summary(given, answers, decisions).total.accuracy
    assert list(got) == list(summary_lib.MEASURES)
    # The same draws of rows, averaged the long way.
    long_way = metrics.mean_per_example(lambda targets, _: want)
    for name, e in metrics.estimates(long_way, given, given).items():
        assert got[name].value == pytest.approx(np.nanmean(want[name]))
        assert got[name].n == e.n == np.sum(~np.isnan(want[name]))
        assert (got[name].low, got[name].high) == pytest.approx((e.low, e.high))
    assert got["kept answer"].value == got["kept answer"].low == 1  # answer_match
    assert 0.3 < got["single answer"].low < got["single answer"].high < 0.6


def test_confidences_against_numpy():
    given, answers, decisions = run(rows=300)
    made = report.summary(given, answers, decisions).confidences
    gold = {row.id for row in given if row.gold is not None}
    votes = {}
    for d in decisions:
        if d.agrees:
            votes.setdefault(d.id, d)
    values = np.array([d.confidence for d in votes.values()])
    edges = [0, 0.2, 0.4, 0.6, 0.8, 1]
    want = [((values > a) & (values <= b) & (values < 1)).sum()
            for a, b in zip(edges, edges[1:], strict=False)]  # fmt: skip
    assert [c.rows for c in made] == [*want, (values == 1).sum()]
    assert [(c.low, c.high) for c in made[:5]] == list(zip(edges, edges[1:], strict=False))
    for c in made:
        inside = [d for d in votes.values()
                  if (d.confidence == 1 if c.low == 1 else c.low < d.confidence <= c.high < 1
                      or c.high == 1 and 0.8 < d.confidence < 1)]  # fmt: skip
        assert c.rows == len(inside)
        assert c.gold == sum(d.id in gold for d in inside)
        assert c.right == sum(d.right is True for d in inside)
    # With one answer to each input there is nothing to agree with.
    made = report.summary(*run(samples=1))
    assert made.confidences == () and "agreement" not in made.total.accuracy
    assert "Agreement" not in report.text(made)
    assert "of votes are right" not in report.html_page(made)
    rows, answers = [asked(gold="a")], [bought(sample=i, label="a") for i in range(2)]
    made = report.summary(rows, answers, decide(rows, answers, Policy()))
    assert "of votes are right" in report.html_page(made)
    said = report.text(made)  # with confidences that there are
    assert "1: all agree" in said and "≤ 0.2" not in said


def test_lengths_leaks_and_usage_against_numpy():
    given, answers, decisions = run(policy=STRICT)
    made = report.summary(given, answers, decisions)
    pairs = list(zip(by_key(answers, decisions), decisions, strict=True))
    for name, some in (
        ("with a label", [(a, d) for a, d in pairs if d.parsed and a.rationale]),
        ("kept", [(a, d) for a, d in pairs if d.kept and a.rationale]),
    ):
        words = np.array([len(a.rationale.replace("?", "").split()) for a, _ in some])
        n = made.lengths[name]
        assert (n.n, n.longest) == (len(words), words.max())
        assert n.mean == pytest.approx(words.mean())
        for got, q in ((n.p50, 0.5), (n.p95, 0.95)):
            assert (words <= got).mean() >= q > (words < got).mean()
        assert made.leaks[name] == sum(a.label in a.rationale.split() for a, _ in some)
    assert sorted(made.words) == sorted(d.words for a, d in pairs if d.parsed and a.rationale)
    priced = [a for a in answers if a.cost is not None]
    u = made.usage
    assert u.cost == pytest.approx(np.sum([a.cost for a in priced]))
    assert u.priced == u.counted == len(priced) < len(answers)
    assert u.prompt_tokens == np.sum([a.prompt_tokens for a in priced])
    assert u.completion_tokens == np.sum([a.completion_tokens for a in priced])
    assert u.attempts == np.sum([a.attempts for a in answers])
    assert u.retried == np.sum([a.attempts > 1 for a in answers])
    arrived = [a.latency for a in answers if a.cls != "transport"]
    assert u.latency == (np.percentile(arrived, 50, method="inverted_cdf"),
                         np.percentile(arrived, 95, method="inverted_cdf"))  # fmt: skip
    said = report.text(made)
    assert f"(known of {len(priced):,} of {len(answers):,} answers)" in said
    assert f"{u.cost:.2f} in all, {u.cost / 200:.3g} an input" in said and u.cost > 100
    assert f"{u.cost / made.kept:.3g} a kept answer" in said


def test_an_answer_of_several_rows_is_paid_for_once():
    rows = [asked("q", "a", id="1"), asked("q", "b", id="2"), asked("p", "a", id="3")]
    answers = [bought("q", 0, "a", cost=2.0), bought("p", 0, "b", cost=3.0),
               bought("another", 0, "a", cost=50.0)]  # fmt: skip
    made = report.summary(rows, answers, decide(rows, answers, Policy(answer_match=True)))
    assert (made.total.rows, made.inputs, made.answers, made.usage.cost) == (3, 2, 2, 5.0)
    assert made.reasons == {KEPT: 1, "wrong": 2} and made.kept == 1
    assert made.total.accuracy["single answer"].value == pytest.approx(1 / 3)
    assert "2 answers to 3 rows with 2 inputs; 1 answer kept, for 1 row." in report.text(made)
    # A row of two mixtures is one.
    again = [*rows, dataclasses.replace(rows[0], dataset="more")]
    made = report.summary(again, answers, decide(again, answers, Policy()))
    assert made.total.rows == 3 and [p.dataset for p in made.parts] == ["toy"]


def test_parts():
    given, answers, decisions = run(rows=50, datasets=(("a", "train"), ("b", "test")))
    made = report.summary(given, answers, decisions)
    assert [(p.dataset, p.split, p.rows) for p in made.parts] == [("a", "train", 50),
                                                                 ("b", "test", 50)]  # fmt: skip
    for p in made.parts:
        rows = [row for row in given if row.dataset == p.dataset]
        ids = {row.id for row in rows}
        alone = report.summary(rows, answers, [d for d in decisions if d.id in ids])
        assert alone.parts == (p,)
    assert sum(p.kept_rows for p in made.parts) == made.total.kept_rows
    assert "a train, b test" in report.text(made).splitlines()[0]
    many = report.summary(*run(rows=1, datasets=[(f"d{i}", "train") for i in range(9)]))
    assert report.text(many).startswith(
        "The teacher's answers: d0 train, d1 train, d2 train and 6 more\n"
    )


def test_a_decision_on_something_else_is_an_error():
    given, answers, decisions = run(rows=5)
    for rows, some in ((given[1:], answers), (given, answers[1:])):
        with pytest.raises(ValueError, match="is about what was not asked or not answered"):
            report.summary(rows, some, decisions)


def test_examples_are_spread_over_each_reason():
    given, answers, decisions = run(rows=400, policy=STRICT)
    made = report.summary(given, answers, decisions)
    assert list(made.examples) == [r for r in (*REASONS, KEPT) if r in made.reasons]
    assert len(made.examples) > 10
    for reason, found in made.examples.items():
        ids = [d.id for d in decisions if d.reason == reason]
        n = min(len(ids), 5)
        assert [e.id for e in found] == [ids[i * len(ids) // n] for i in range(n)]
        for e in found:
            assert e.right in (None, True, False) and e.input in e.id
    long = "".join(chr(ord("a") + i % 26) for i in range(10**6))
    (e,) = report.summary(
        [asked("q")], [bought(label="x", text=long)], decide([asked("q")], [bought()], Policy())
    ).examples["unparsed"]
    assert e.text.startswith(long[:400]) and e.text.endswith(long[-200:]) and len(e.text) < 800
    assert e.text_length == 10**6


def test_nothing_asked_and_nothing_answered():
    for rows in ([], [asked()], [asked(gold="a"), asked("p", "b")]):
        made = report.summary(rows, [bought("other")], [])
        assert made.answers == made.kept == 0 and not made.examples and not made.total.accuracy
        assert made.usage.cost is None and made.usage.latency is None
        for said in (report.text(made), report.html_page(made)):
            assert "nan" not in said and "No row has an answer and a gold label." in said
        n = len(rows)
        missing = f"{n} row{'s have' if n > 1 else ' has'} no answer of the teacher"
        assert (missing in report.text(made)) == (n > 0)


def test_notes_say_what_to_do():
    rows = [asked(str(i), "a") for i in range(50)]

    def notes(answers, policy=Policy(), options=None):  # noqa: B008
        made = report.summary(rows, answers, decide(rows, answers, policy, options=options))
        return [line for line in report.text(made, width=1000).splitlines() if line[:2] == "! "]

    good = [bought(str(i), 0, "a") for i in range(50)]
    assert notes(good) == []
    assert "1 row has no answer" in notes(good[1:])[0]
    assert "1 row has no answer" in notes([bought("0", 0, cls="transport"), *good[1:]])[0]
    cut = [bought("0", 0, cls="truncated"), *good[1:]]
    assert [n[:34] for n in notes(cut)] == ["! 2.0% of the answers were cut off"]
    wrong = [bought("0", 0, "b"), *good[1:]]
    assert notes(wrong)[0].startswith("! 2.0% of the labels that are kept are not the gold label")
    assert notes(wrong, Policy(answer_match=True)) == []
    assert "1 label of 50 is none of the options" in notes(wrong, options=["a"])[1]


# --- What is shown --------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Reads a page; every element that is opened must be closed, in order."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attrs, self.open, self.said = set(), [], [], collections.Counter()
        self.text = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attrs += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def hostile_run():
    """Everything that comes from data, a teacher or the user is hostile, and some of it 1 MB."""
    given, answers = [], []
    for i, cls in enumerate((*store.CLASSES, "ok", "ok", "ok")):
        text = f"{NASTY}{i}" + ("x" * 10**6 if i % 2 else "")
        given.append(asked(text, gold=NASTY if i % 3 else None, dataset=f"{NASTY}{i // 8}",
                           split=NASTY))  # fmt: skip
        label = (NASTY, NASTY + "x" * 10**6, None)[i % 3]
        answers.append(bought(
            text, 0, label, rationale=text, text=text, key=f"{NASTY}{i}", cls=cls,
            provider=NASTY, model=text, parameters=text, prompt=text, prompt_sha256=NASTY,
            finish_reason=text, error=text, time=text,
        ))  # fmt: skip
        answers.append(rationalised(text, label=label, key=f"{NASTY}told{i}", rationale=NASTY))
    return given, answers, decide(given, answers, Policy(), options=[NASTY])


def test_a_page_is_harmless_whatever_the_texts_are():
    made = report.html_page(report.summary(*hostile_run()))
    page = Page(made)
    assert page.tags <= {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "p", "ul", "li",
        "div", "table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "b", "small", "span",
        "details", "summary", "pre",
    }  # fmt: skip
    assert {name for _, name, _ in page.attrs} <= {
        "lang", "charset", "http-equiv", "content", "name", "class", "style", "open",
    }  # fmt: skip
    styles = {value for _, name, value in page.attrs if name == "style"}
    assert styles and all(re.fullmatch(r"width:\d+\.\d\d%", style) for style in styles)
    assert not re.search(r"https?:|url\(|@import|javascript:", made)
    policy = next(v for tag, name, v in page.attrs if name == "content" and "default" in v)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'")
    assert all(unicodedata.category(c)[0] != "C" or c == "\n" for c in made)
    made.encode("utf-8")
    assert len(made) < 500_000
    said = "".join(page.text)
    assert "<script>pwned=1</script>" in said and "<U+202E>txet" in said and "<ESC>[31m" in said


def test_a_terminal_gets_no_control_character_and_no_long_line():
    for made in (report.summary(*hostile_run()), report.summary(*run())):
        for width in (60, 100):
            lines = report.text(made, examples=5, width=width).split("\n")
            for line in lines:
                assert all(unicodedata.category(c)[0] != "C" for c in line)
                table = re.search(r"\S {2,}\S", line) or set(line) <= {"-"}
                assert len(line) <= (100 if table else width), line
    assert "<ESC>[31m" in "".join(report.text(report.summary(*hostile_run())))


def test_both_reports_say_what_was_found():
    given, answers, decisions = run(policy=STRICT, datasets=(("a", "train"), ("b", "test")))
    made = report.summary(given, answers, decisions)
    text, page = report.text(made, width=1000), "\n".join(Page(report.html_page(made)).text)
    t = made.total
    for said in (text, page):
        for name, e in t.accuracy.items():
            assert f"{e.value:.3f}" in said and f"[{e.low:.3f}, {e.high:.3f}]" in said
            assert name in said or name == "agreement"
        assert f"{made.parsed:,}" in said and f"{made.classes['ok'] - made.parsed:,}" in said
        for name, n in (*list(made.classes.items())[1:], *made.reasons.items()):
            assert name in said and f"{n:,}" in said
        for name, n in made.lengths.items():
            assert f"{n.mean:.1f}" in said and f"{made.leaks[name] / n.n:.1%}" in said
        for name, value in made.facts:
            assert name in said and value in said
        assert f"{len(answers):,} answers to 400 rows; {made.kept:,} answers kept, for" in said
        for found in made.examples.values():
            for e in found[:2]:
                assert e.id in said
    shown = sum(len(found) for found in made.examples.values())
    assert page.count("finish reason") == shown and text.count("finish reason") < shown
    assert "Examples" not in report.text(made, examples=0)


def test_marks_and_facts_of_an_example():
    rows = [asked("q", "a")]
    answers = [bought("q", 0, "a", rationale="so it is", text="so it is"),
               bought("q", 1, "a"), bought("q", 2, "b", error="odd"),
               rationalised("q", label="a", text=None)]  # fmt: skip
    made = report.summary(rows, answers, decide(rows, answers, Policy(answer_match=True)))
    text = report.text(made)
    assert "wrong: 1 decision\n  toy/train/q, wrong\n" in text
    assert "not needed: 1 decision\n  toy/train/q, rationalised, right\n" in text
    block = text.split("toy/train/q, wrong\n")[1].split("\n\n")[0]
    assert [tuple(line.split(maxsplit=1)) for line in block.splitlines()] == [
        ("input", "q"), ("gold", "a"), ("label", "b"), ("vote", "a"), ("finish", "reason  stop"),
        ("error", "odd"), ("length", "31 characters, 4 words of rationale"),
        ("text", "since it is so The answer is b."),
    ]  # fmt: skip
    page = report.html_page(made)
    assert page.count("<span class='mark right'>right</span>") == 3
    assert page.count("<span class='mark rationalised'>rationalised</span>") == 1
    assert page.count("<small>completion</small>") == 3
    assert re.findall(r"<details( open)?><summary><b>([\w ]+)</b>", page) == [
        (" open", "wrong"), ("", "not needed"), ("", "kept"),
    ]  # fmt: skip


def test_money_is_readable():
    for cost, said in ((12345.678, "12,345.68 in all"), (0.01234, "0.0123 in all"), (0.0, "0 in")):
        made = report.summary([asked()], [bought(label="a", cost=cost)], [])
        assert said in report.text(made)
    assert math.isclose(made.usage.cost, 0)
    made = report.summary([asked()], [bought(label="a")], [])
    assert "No cost is known" in report.text(made)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(browser, tmp_path, scheme):
    for i, made in enumerate((report.summary(*run(policy=STRICT)), report.summary(*hostile_run()))):
        path = tmp_path / f"{i}.html"
        path.write_text(report.html_page(made), "utf-8")
        page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme=scheme)
        logged, requested = [], []
        page.on("console", lambda message, logged=logged: logged.append(message.text))
        page.on("request", lambda r, requested=requested: requested.append(r.url))
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.evaluate("window.pwned") is None
        assert not logged and requested == [path.as_uri()]
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 29)"}[scheme]
        page.close()
