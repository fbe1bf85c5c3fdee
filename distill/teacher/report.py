"""What the teacher's answers are worth: counts, agreement, lengths, cost, and failures to look at.

    print(text(summary(asked, bought, decisions)))

The same tables as text for a terminal and as one page (`html_page`) without scripts or external
resources. Nothing that a teacher or a dataset says is trusted: characters that a terminal or a
browser would act upon, or not show, are replaced by visible ones (`display.visible`), long texts
are shortened, and HTML is escaped.
"""

import dataclasses
import html
import textwrap
from collections.abc import Sequence

from distill import metrics
from distill.display import (
    STYLE,
    Bar,
    Table,
    clipped,
    escape,
    histogram_table,
    html_document,
    html_facts,
    html_table,
    percent,
    shortened,
    text_table,
    visible,
    visible_lines,
)
from distill.teacher.decisions import KEPT
from distill.teacher.summary import (
    MEASURES,
    SHORT,
    UNHEARD,
    Confidence,
    Example,
    Part,
    Report,
    summary,
)

__all__ = ["Report", "html_page", "summary", "text"]

_BINS = 12


# --- What is shown, in a terminal and in a page ---------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Section:
    """A heading and what is below it.

    Attributes:
      title: of it.
      tables: each with the columns whose text stands at the left.
      facts: (name, value)s.
      note: how to read it.
    """

    title: str
    tables: tuple[tuple[Table, tuple[int, ...]], ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    note: str = ""


def _title(report: Report) -> str:
    names = [f"{clipped(p.dataset, 40)} {clipped(p.split, 20)}" for p in report.parts]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"The teacher's answers: {', '.join(names[:3]) or 'none asked for'}{more}"


def _lead(report: Report) -> str:
    t = report.total
    inputs = f" with {_count(report.inputs, 'input')}" if report.inputs != t.rows else ""
    return (
        f"{_count(report.answers, 'answer')} to {_count(t.rows, 'row')}{inputs}; "
        f"{_count(report.kept, 'answer')} kept, for {_count(t.kept_rows, 'row')}."
    )


def _count(n: int, name: str) -> str:
    return f"{n:,} {name}{'' if n == 1 else 's'}"


def _notes(report: Report) -> list[str]:
    """What the user should know first, with what to do about it."""
    t, notes = report.total, []
    if unheard := t.rows - t.answered:
        notes.append(
            f"{_count(unheard, 'row')} {'has' if unheard == 1 else 'have'} no answer of the "
            "teacher: start the run again, which asks for what is missing only."
        )
    if (cut := report.classes.get("truncated", 0)) > 0.01 * report.answers:
        notes.append(
            f"{percent(cut / report.answers)} of the answers were cut off: allow the teacher more "
            "tokens, or stop it where its answer ends."
        )
    if (kept := t.accuracy.get("kept answer")) and kept.value < 1:
        notes.append(
            f"{percent(1 - kept.value)} of the labels that are kept are not the gold label: "
            "Policy.answer_match=True drops them."
        )
    if report.outside:
        notes.append(
            f"{_count(report.outside, 'label')} of {report.parsed:,} "
            f"{'is' if report.outside == 1 else 'are'} none of the options: is the prompt clear "
            "about them, and its label pattern?"
        )
    return notes


def _sections(report: Report) -> list[_Section]:
    made = [_yield_section(report), _accuracy_section(report)]
    if report.confidences:
        made.append(_agreement_section(report))
    return [*made, _rationale_section(report), _reason_section(report), _usage_section(report)]


def _yield_section(report: Report) -> _Section:
    t = report.total
    rows = [
        (name, f"{n:,}", *_share(n, t.rows))
        for name, n in (
            ("asked for", t.rows),
            ("with an answer", t.answered),
            ("with a label", t.parsed),
            ("with an answer kept", t.kept_rows),
        )
    ]
    counts = dict(report.classes)
    ok = counts.pop("ok", 0)
    counts = {"ok, with a label": report.parsed, "ok, unparsed": ok - report.parsed} | counts
    classes = [
        (clipped(name, 30), f"{n:,}", *_share(n, report.answers)) for name, n in counts.items() if n
    ]
    tables = [(("rows", "n", "share", ""), rows), (("answers by class", "n", "share", ""), classes)]
    made = [(table, (0,)) for table in tables if table[1]]
    if len(report.parts) > 1:
        made.insert(0, (_part_table(report.parts), (0, 1)))
    plain = {"answer": "plain"}
    kinds = ", ".join(
        f"{n:,} {clipped(plain.get(kind, kind), 20)}" for kind, n in report.kinds.items()
    )
    return _Section(
        "Yield",
        tuple(made),
        report.facts + ((("kinds", kinds),) if len(report.kinds) > 1 else ()),
        "An answer is of one input text; rows with the same input share it.",
    )


def _part_table(parts: Sequence[Part]) -> Table:
    header = ("dataset", "split", "rows", "answered", "kept for", "single answer", "vote")
    return header, [
        (clipped(p.dataset, 28), clipped(p.split, 12), f"{p.rows:,}", f"{p.answered:,}",
         f"{p.kept_rows:,}", _value(p.accuracy.get("single answer")),
         _value(p.accuracy.get("vote")))
        for p in parts
    ]  # fmt: skip


def _accuracy_section(report: Report) -> _Section:
    found = report.total.accuracy
    rows = [
        (name, _value(found[name]), _interval(found[name]), f"{found[name].n:,}",
         Bar(found[name].value))
        for name in MEASURES if name in found and name != "agreement"
    ]  # fmt: skip
    if not rows:
        return _Section("Labels against gold", note="No row has an answer and a gold label.")
    return _Section(
        "Labels against gold",
        (((("right", "share", "95 % interval", "rows", ""), rows), (0,)),),
        note="Means over rows with a gold label, and bootstrap intervals over rows. An answer "
        "without a label is wrong, unless the line says otherwise; one that did not arrive "
        f"({', '.join(UNHEARD)}) does not count. Rationalised answers count among the kept only.",
    )


def _agreement_section(report: Report) -> _Section:
    total = sum(c.rows for c in report.confidences)
    rows = [
        (_span(c), f"{c.rows:,}", f"{c.right / c.gold:.3f}" if c.gold else "-",
         *_share(c.rows, total))
        for c in report.confidences if c.rows
    ]  # fmt: skip
    agreement = report.total.accuracy.get("agreement")
    return _Section(
        "Agreement of the answers to one input",
        (((("confidence of the vote", "rows", "vote right", "share", ""), rows), (0,)),),
        facts=(
            ("two answers agree", f"{_value(agreement)} {_interval(agreement)} of the pairs, mean "
                                  f"over {_count(agreement.n, 'row')} with two labels and more"),
        ) if agreement else (),
        note="The confidence is the share of the answers with a label that gave the vote's. "
        "Policy.min_confidence is about each answer's own label.",
    )  # fmt: skip


def _span(c: Confidence) -> str:
    if c.low == c.high:
        return "1: all agree"
    return "< 1" if c.high == 1 else f"\u2264 {c.high:g}"


def _rationale_section(report: Report) -> _Section:
    rows = [
        (name, f"{n.n:,}", f"{n.mean:.1f}", f"{n.p50:,}", f"{n.p95:,}", f"{n.longest:,}",
         percent(report.leaks[name] / max(n.n, 1)))
        for name, n in report.lengths.items()
    ]  # fmt: skip
    header = ("of answers", "rationales", "words, mean", "p50", "p95", "longest", "with the label")
    tables = [((header, rows), (0,))]
    if len(report.words):
        tables.append((histogram_table(report.words, _BINS, ("words", "rationales", "")), ()))
    repeated = (
        f" {_count(report.duplicates, 'answer')} repeat{'s' if report.duplicates == 1 else ''} the "
        "rationale of another to the same input."
        if report.duplicates
        else ""
    )
    return _Section(
        "Rationales",
        tuple(tables),
        note="The histogram is of the first line. A rationale contains its label verbatim wherever "
        f"reasoning ends in the answer: no fault of chain of thought.{repeated}",
    )


def _reason_section(report: Report) -> _Section:
    total = sum(report.reasons.values())
    rows = [(clipped(name, 30), f"{n:,}", *_share(n, total)) for name, n in report.reasons.items()]
    if not rows:
        return _Section("Kept, and why not", note="No decision on any answer.")
    return _Section(
        "Kept, and why not",
        (((("reason", "decisions", "share", ""), rows), (0,)),),
        note="One decision for each row and answer to its input, by the first reason that holds.",
    )


def _usage_section(report: Report) -> _Section:
    u, kept = report.usage, report.kept
    facts = []
    if u.counted:
        each = f"{u.prompt_tokens / u.counted:,.0f} + {u.completion_tokens / u.counted:,.0f}"
        facts.append((
            "tokens",
            f"{u.prompt_tokens:,} of prompts + {u.completion_tokens:,} of completions, "
            f"{each} an answer{_known(u.counted, report.answers)}",
        ))  # fmt: skip
    if u.cost is not None:
        facts.append((
            "cost",
            f"{_money(u.cost)} in all, {_money(u.cost / report.inputs)} an input"
            + (f", {_money(u.cost / kept)} a kept answer" if kept else "")
            + _known(u.priced, report.answers),
        ))  # fmt: skip
    if u.latency:
        p50, p95 = u.latency
        facts.append(("latency", f"{p50:.3g} s median, {p95:.3g} s 95th percentile"))
    if report.answers:
        facts.append((
            "attempts",
            f"{u.attempts:,}, {u.attempts / report.answers:.2f} an answer; "
            f"{_count(u.retried, 'answer')} took several",
        ))  # fmt: skip
    note = "" if u.cost is not None else "No cost is known: the run was given no prices."
    return _Section("Tokens, cost and time", facts=tuple(facts), note=note)


def _share(n: int, total: int) -> tuple[str, Bar]:
    return percent(n / max(total, 1)), Bar(n / max(total, 1))


def _known(n: int, answers: int) -> str:
    return f" (known of {n:,} of {answers:,} answers)" if n < answers else ""


def _money(value: float) -> str:
    return f"{value:,.2f}" if abs(value) >= 100 else f"{value:.3g}"


def _value(e: metrics.Estimate | None) -> str:
    return "-" if e is None else f"{e.value:.3f}"


def _interval(e: metrics.Estimate) -> str:
    return f"[{e.low:.3f}, {e.high:.3f}]"


def _example_facts(e: Example) -> list[tuple[str, str]]:
    facts = (
        ("gold", e.gold),
        ("label", e.label),
        ("vote", e.vote if e.vote != e.label else None),
        ("finish reason", e.finish_reason),
        ("error", e.error),
        ("length", f"{e.text_length:,} characters, {_count(e.words, 'word')} of rationale"),
    )
    return [(name, value) for name, value in facts if value is not None]


def _marks(e: Example) -> list[str]:
    rightness = {True: ["right"], False: ["wrong"], None: []}[e.right]
    return [*(["rationalised"] if e.kind == "rationalised" else []), *rightness]


# --- As text --------------------------------------------------------------------------------------


def text(report: Report, *, examples: int = 2, width: int = 100) -> str:
    """Returns the report for a terminal.

    Args:
      report: from `summary`.
      examples: of each reason, at most `EXAMPLES`.
      width: of a line, characters. Tables take up to 100.
    """

    def filled(line: str, indent: int = 0, first: str = "") -> str:
        return textwrap.fill(
            visible(line), width, initial_indent=first or " " * indent,
            subsequent_indent=" " * indent, break_on_hyphens=False,
        )  # fmt: skip

    def facts(pairs: Sequence[tuple[str, str]], indent: int = 0) -> str:
        longest = max(len(name) for name, _ in pairs)
        return "\n".join(
            filled(value, indent + longest + 2, f"{'':{indent}}{name:<{longest}}  ")
            for name, value in pairs
        )

    made = [filled(_title(report)), filled(_lead(report))]
    made += [filled(note, 2, "! ") for note in _notes(report)]
    blocks = ["\n".join(made)]
    for section in _sections(report):
        parts = [f"{section.title}\n{'=' * len(section.title)}"]
        parts += [facts(section.facts)] if section.facts else []
        parts += [text_table(table, left) for table, left in section.tables]
        parts += [filled(section.note)] if section.note else []
        blocks.append("\n\n".join(parts))
    if report.examples and examples:
        blocks.append("Examples\n========")
    for reason, found in report.examples.items() if examples else ():
        lines = [f"{clipped(reason, 30)}: {_count(report.reasons[reason], 'decision')}"]
        for e in found[:examples]:
            lines.append(filled(", ".join([e.id, *_marks(e)]), 4, "  "))
            shown = [("input", shortened(e.input, SHORT)), *_example_facts(e)]
            if e.text:
                shown.append(("text", shortened(e.text, 2 * SHORT)))
            lines.append(facts(shown, 4))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


# --- As a page ------------------------------------------------------------------------------------

_STYLE = f"""{STYLE}
:root {{ --right: #276749; --wrong: #c53030; --rightground: #e6f6ec; --wrongground: #fdeaea; }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ --right: #68d391; --wrong: #fc8181; --rightground: #16301f; --wrongground: #3a1c1f; }} }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .8rem;
  margin: 1.2rem 0; }}
.cards div {{ border: 1px solid var(--hair); border-radius: 8px; padding: .6rem .9rem;
  background: var(--raised); }}
.cards b {{ display: block; font-size: 1.55rem; line-height: 1.25; font-weight: 600;
  font-variant-numeric: tabular-nums; }}
.cards small {{ display: block; color: var(--soft); }}
.notes {{ border-left: 3px solid var(--amber); background: var(--amberground); margin: 1rem 0;
  padding: .5rem 1rem .5rem 2rem; border-radius: 0 6px 6px 0; }}
.notes li {{ overflow-wrap: anywhere; margin: .15rem 0; }}
.tables {{ display: flex; flex-wrap: wrap; gap: 0 2.4rem; align-items: flex-start; }}
.wide {{ margin: .7rem 0; min-width: 0; }} th {{ white-space: nowrap; }}
p.note {{ max-width: 46rem; font-size: .92rem; }}
details {{ border-bottom: 1px solid var(--hair); padding: .45rem 0; }}
summary {{ cursor: pointer; }} summary span {{ color: var(--soft); margin-left: .6rem; }}
.example {{ padding: .5rem 1rem .7rem; }}
.example header {{ color: var(--soft); font-size: .86rem; overflow-wrap: anywhere; }}
.example .body {{ display: grid; gap: 0 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }}
.example .body > div {{ min-width: 0; margin-top: .4rem; }} .example small {{ color: var(--soft); }}
.example dl {{ font-size: .92rem; margin: .6rem 0 0; }}
.example pre {{ font: 13px/1.5 ui-monospace, monospace; margin: .15rem 0; padding: .5rem .7rem;
  border-radius: 4px; max-height: 18rem; overflow-y: auto; unicode-bidi: plaintext; }}
.mark {{ font-size: .82rem; padding: 0 .45em; border-radius: 4px; margin-left: .5em; }}
.mark.rationalised {{ background: var(--raised); }}
.mark.right {{ color: var(--right); background: var(--rightground); }}
.mark.wrong {{ color: var(--wrong); background: var(--wrongground); }}
@media (max-width: 40rem) {{ body {{ margin: 1rem auto; }} .wide {{ width: 100%; }}
  .cards {{ grid-template-columns: 1fr 1fr; }} table {{ font-size: .84rem; }}
  th, td {{ padding: .22rem .35rem; }}
  td.l, th {{ white-space: normal; }} td.bar {{ width: 4rem; min-width: 2.4rem; }}
  .example {{ padding: .4rem .7rem .6rem; }} }}
@media print {{ body {{ max-width: none; margin: 0; font-size: 12px; }}
  .example, tr {{ break-inside: avoid; }} }}
"""
_POLICY = "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def html_page(report: Report) -> str:
    """Returns the report as one HTML page that needs nothing else, and no JavaScript."""
    title = _title(report)
    body = [f"<h1>{escape(title)}</h1>", f"<p>{escape(_lead(report))}</p>", _html_cards(report)]
    if notes := _notes(report):
        body.append(f"<ul class=notes>{''.join(f'<li>{escape(n)}</li>' for n in notes)}</ul>")
    for section in _sections(report):
        body.append(f"<h2>{escape(section.title)}</h2>")
        body += [html_facts(section.facts)] if section.facts else []
        tables = "".join(html_table(table, left) for table, left in section.tables)
        body += [f"<div class=tables>{tables}</div>"] if tables else []
        body += [f"<p class=note>{escape(section.note)}</p>"] if section.note else []
    if report.examples:
        body.append("<h2>Examples</h2>")
    common = max(report.examples, key=lambda r: (r != KEPT, report.reasons[r]), default=None)
    for reason, found in report.examples.items():
        count = report.reasons[reason]
        shown = f", {len(found)} of them" if len(found) < count else ""
        is_open = " open" if reason == common else ""
        body.append(
            f"<details{is_open}><summary><b>{escape(clipped(reason, 30))}</b>"
            f"<span>{_count(count, 'decision')}{shown}</span></summary>"
            f"{''.join(map(_html_example, found))}</details>"
        )
    return html_document(title, "\n".join(body), style=_STYLE, policy=_POLICY)


def _html_cards(report: Report) -> str:
    t, u = report.total, report.usage
    cards = [(percent(t.kept_rows / max(t.rows, 1)), "of the rows have an answer kept")]
    for name, said in (
        ("single answer", "of single answers are right"),
        ("vote", "of votes are right"),
        ("kept answer", "of kept answers are right"),
    ):
        # With one answer to each input, its vote is no other number.
        if (e := t.accuracy.get(name)) and (name != "vote" or report.confidences):
            sure = f"{100 * e.low:.1f} to {100 * e.high:.1f}"
            cards.append((percent(e.value), f"{said} ({sure})"))
    if u.cost is not None:
        cards.append((_money(u.cost), f"spent on {_count(report.answers, 'answer')}"))
    elif u.counted:
        tokens = u.prompt_tokens + u.completion_tokens
        cards.append((f"{tokens:,}", "tokens of prompts and completions"))
    made = "".join(
        f"<div><b>{escape(value)}</b><small>{escape(name)}</small></div>" for value, name in cards
    )
    return f"<div class=cards>{made}</div>"


def _html_example(e: Example) -> str:
    def block(name: str, text: str) -> str:
        # Line breaks do no harm here, and show as themselves.
        return f"<small>{name}</small><pre>{html.escape(visible_lines(text))}</pre>"

    marks = "".join(f"<span class='mark {mark}'>{mark}</span>" for mark in _marks(e))
    said = block("completion", e.text) if e.text else ""
    return (
        f"<div class=example><header>{escape(e.id)}{marks}</header>"
        f"<div class=body><div>{block('input', e.input)}{html_facts(_example_facts(e))}</div>"
        f"<div>{said}</div></div></div>"
    )
