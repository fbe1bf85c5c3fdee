"""The report as one HTML page: tables made here, curves and examples drawn by its own script.

Text of data sets and models reaches the page in two ways only: escaped in a table, or as JSON in a
block that no browser runs, which the script shows as text. The policy names the one script and the
one style by their hashes, so that nothing else could run or be fetched.
"""

import base64
import hashlib
import importlib.resources
import json
import re
import string
import urllib.parse
from typing import Any

from distill.display import escape, html_document, visible_lines
from distill.report.files import COLOURS, count, interval, number, p_value, parameters
from distill.report.results import TEST, VALIDATION, Result
from distill.report.summary import Choice, Column, Comparison, Examples, Line, Report

MAX_EXAMPLES = 1000
_PLOT = (150, 14)  # of a cell: width and height


def html_report(report: Report, max_examples: int = MAX_EXAMPLES) -> str:
    """Returns the page.

    Args:
      report: what it shows.
      max_examples: of each file of predictions, the first so many can be looked at.
    """
    files = importlib.resources.files("distill.report")
    style, body, *scripts = (
        files.joinpath(name).read_text("utf-8")
        for name in ("page.css", "page.html", "page.js", "curves.js", "examples.js")
    )
    script = "\n".join(scripts)
    light, dark = (
        "".join(f"--c{i}:{pair[ground]};" for i, pair in enumerate(COLOURS)) for ground in (0, 1)
    )
    in_dark = f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    style = f":root {{ {light} }}\n{in_dark}\n{style}"
    runs = dict.fromkeys(run for run, _ in report.students)
    measured = {(r.run, r.step) for r in report.results if r.run in runs}
    days = sorted({r.time[:10] for r in report.results if r.time})
    body = string.Template(body).substitute(
        summary=escape(
            f"{_plural(len(runs), 'run')}, {_plural(len(measured), 'checkpoint')}, "
            f"{_plural(len({c.dataset for c in report.columns}), 'dataset')}"
            + (f", evaluated {' to '.join(dict.fromkeys((days[0], days[-1])))}" if days else "")
        ),
        notes="".join(f"<li>{escape(note)}</li>" for note in report.notes),
        notes_hidden="" if report.notes else "hidden",
        best=_best_table(report),
        pairs=_pairs_table(report),
        pairs_hidden="" if report.comparisons else "hidden",
        values=_values_table(report),
        data=_json(_data(report, max_examples)),
        script=script,
    )
    policy = (
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return html_document("Evaluation", body, style=style, policy=policy)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _plural(n: int, name: str) -> str:
    return f"{n:,} {name}{'' if n == 1 else 's'}"


def _json(data: Any) -> str:
    """Returns JSON in ASCII that holds no `<`, so that it cannot end the element around it."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


# --- Tables ---------------------------------------------------------------------------------------


def _best_table(report: Report) -> str:
    head, scales = [], {}
    for column in report.columns:
        shown = [c.shown for (_, of), c in report.choices.items() if of == column and c.shown]
        said = report.teacher.get(column)
        ends = [
            v for r in [*shown, *([said] if said else [])] for v in (r.low, r.value, r.high)
            if v is not None
        ]  # fmt: skip
        margin = 0.04 * (max(ends) - min(ends)) or 0.01 if ends else 0
        scales[column] = (min(ends) - margin, max(ends) + margin) if ends else (0, 1)
        sizes = sorted({r.n for r in shown if r.n})
        n = (
            f", {sizes[0]:,}{f' to {sizes[-1]:,}' if len(sizes) > 1 else ''} examples"
            if sizes
            else ""
        )
        head.append(
            f"<th scope=col>{escape(column.name)}<small>{escape(column.metric)}{n}</small></th>"
        )
    rows = []
    for i, student in enumerate(report.students):
        facts = [student[1]]
        if size := parameters(report, student[0]):
            facts.append(f"{count(size)} parameters")
        cells = "".join(
            f"<td>{_cell(report, report.choices.get((student, c)), c, i, scales[c])}</td>"
            for c in report.columns
        )
        rows.append(
            f'<tr><th scope=row title="{escape(student[0])}">{_swatch(i)}'
            f"{_broken(report.names[student[0]])}<small>{escape(', '.join(facts))}</small></th>"
            f"{cells}</tr>"
        )
    if report.teacher:
        cells = "".join(
            f"<td>{_value(r, _plot(r, None, scales[c]))}"
            + f"<small>{escape('' if r.split == TEST else r.split)}</small></td>"
            if (r := report.teacher.get(c))
            else "<td></td>"
            for c in report.columns
        )
        rows.append(
            "<tr class=teacher><th scope=row>teacher<small>its labels</small></th>"
            + cells
            + "</tr>"
        )
    return (
        "<table class=best><thead><tr><th scope=col>student</th>"
        f"{''.join(head)}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _cell(
    report: Report, choice: Choice | None, column: Column, student: int, scale: tuple[float, float]
) -> str:
    if choice is None:
        return ""
    if choice.shown is None:
        best = choice.best
        return (
            f"<span class=none>no test</span><small>step {best.step:,}, validation "
            f"{number(best.value)}</small>"
        )
    shown = choice.shown
    said = report.teacher.get(column)
    plot = _plot(shown, said if said and said.split == shown.split else None, scale, student)
    how = (
        f"step {shown.step:,}, validation {number(choice.best.value)}"
        if choice.best
        else f"latest, step {shown.step:,}, {shown.split}"
    )
    of_set = next((e for e in report.examples if e.result == shown), None)
    href = f"#{_fragment(set=set_name(report, of_set))}" if of_set else ""
    return f"{_value(shown, plot, href)}<small>{escape(how)}</small>"


def _value(result: Result, plot: str, href: str = "") -> str:
    value = number(result.value)
    if href:
        value = f'<a href="{escape(href)}">{value}</a>'
    sure = f"<span class=interval>{interval(result)}</span>"
    return f"<div class=value><b>{value}</b> {sure}</div>{plot}"


def _plot(
    result: Result, teacher: Result | None, scale: tuple[float, float], student: int | None = None
) -> str:
    """The value and its interval on the column's scale, and the teacher's as a dashed line."""
    width, height = _PLOT

    def x(value: float) -> str:
        return f"{(value - scale[0]) / (scale[1] - scale[0]) * (width - 8) + 4:.1f}"

    middle = height / 2
    marks = [f'<path class=rail d="M0 {middle}H{width}"/>']
    if teacher:
        marks.append(f'<path class=told d="M{x(teacher.value)} 0V{height}"/>')
    if result.low is not None and result.high is not None:
        marks.append(f'<path class=bar d="M{x(result.low)} {middle}H{x(result.high)}"/>')
    marks.append(f'<circle cx="{x(result.value)}" cy="{middle}" r="3.5"/>')
    colour = "told" if student is None else f"s{student % len(COLOURS)}"
    return (
        f'<svg class="dot {colour}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" aria-hidden="true">{"".join(marks)}</svg>'
    )


def _swatch(student: int) -> str:
    return (
        f'<svg class="swatch s{student % len(COLOURS)}" data-mark="{student}" width="14" '
        'height="14" viewBox="-7 -7 14 14" aria-hidden="true"></svg>'
    )


def _signed(value: float) -> str:
    return _minus(f"{value:+.3f}")


def _minus(text: str) -> str:
    return text.replace("-", "\u2212")


def _broken(name: str) -> str:
    """A name that may be broken after its parts."""
    return re.sub("([/_])", r"\1<wbr>", escape(name))


def _pairs_table(report: Report) -> str:
    def row(c: Comparison) -> str:
        a, b, found = set_name(report, c.a), set_name(report, c.b), c.paired
        cells = [
            f"<td class=l>{escape(c.column.name)}</td>",
            f"<td class=l>{escape(report.label(c.a.result.student))}</td>",
            f"<td class=l>{escape(report.label(c.b.result.student))}</td>",
            f"<td data-v={found.difference!r}>{_signed(found.difference)}</td>",
            f"<td data-v={found.low!r}>{_minus(interval(found))}</td>",
        ]
        for show, n in (("only", found.only_a), ("other", found.only_b)):
            href = escape(f"#{_fragment(set=a, vs=b, show=show)}")
            cells.append(f'<td data-v={n}><a href="{href}">{n:,}</a></td>')
        cells.append(f"<td data-v={found.n}>{found.n:,}</td>")
        cells.append(f"<td data-v={found.p!r}>{p_value(found.p)}</td>")
        return f"<tr>{''.join(cells)}</tr>"

    names = (
        "dataset",
        "A",
        "B",
        "A \u2212 B",
        "95 % interval",
        "only A right",
        "only B right",
        "examples",
        "p",
    )
    return _sortable(names, 3, "".join(map(row, report.comparisons)))


def _values_table(report: Report) -> str:
    def row(r: Result) -> str:
        texts = (report.names[r.run], r.decoder, r.dataset, r.task, r.split, r.metric)
        numbers = (
            (r.step, f"{r.step:,}" if r.step is not None else ""),
            (r.tokens, f"{r.tokens:,}" if r.tokens is not None else ""),
            (r.value, number(r.value)),
            (r.low, interval(r)),
            (r.n, f"{r.n:,}" if r.n is not None else ""),
        )
        cells = [f"<td class=l>{escape(text or '')}</td>" for text in texts]
        cells += [f"<td data-v={'' if v is None else repr(v)}>{shown}</td>" for v, shown in numbers]
        return f"<tr>{''.join(cells)}</tr>"

    names = ("run", "decoder", "dataset", "task", "split", "metric", "step", "training tokens",
             "value", "95 % interval", "examples")  # fmt: skip
    return _sortable(names, 6, "".join(map(row, report.results)), "values")


def _sortable(names: tuple[str, ...], left: int, rows: str, name: str = "pairs") -> str:
    head = "".join(
        f"<th scope=col{' class=l' if i < left else ''}><button type=button>{n}</button></th>"
        for i, n in enumerate(names)
    )
    return (
        f"<table class=sortable id={name}-table><thead><tr>{head}</tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )


# --- What the script draws ------------------------------------------------------------------------


def set_name(report: Report, examples: Examples) -> str:
    """Names a file of predictions in links: they hold for a report that is made again."""
    r = examples.result
    parts = (report.names[r.run], r.decoder or "", r.task, r.split, str(r.step))
    return visible_lines("/".join(part for part in parts if part))


def _fragment(**state: str) -> str:
    return urllib.parse.urlencode(state, safe="/")


def _data(report: Report, max_examples: int) -> dict[str, Any]:
    """Returns the curves and the examples; texts that several students share are there once."""
    texts: dict[tuple, int] = {}
    sets = []
    for examples in report.examples:
        rows = []
        for row in examples.rows[:max_examples]:
            shared = tuple(
                _shown(row[name]) for name in ("example_id", "input", "label", "teacher",
                                               "teacher_rationale", "human_rationale",
                                               "teacher_correct")
            )  # fmt: skip
            generated = row["generated"] if row["generated"] != row["prediction"] else None
            own = (
                row["prediction"],
                row["correct"],
                row["rationale"],
                row["probability"],
                generated,
            )
            rows.append([texts.setdefault(shared, len(texts)), *map(_shown, own)])
        r = examples.result
        sets.append(
            {
                "name": set_name(report, examples),
                "student": _shown(report.label(r.student)),
                "dataset": _shown(r.dataset),
                "task": _shown(r.task),
                "split": _shown(r.split),
                "step": r.step,
                "tags": [
                    *(["chosen"] if examples.is_best else []),
                    *(["latest"] if examples.is_latest else []),
                ],
                "total": len(examples.rows),
                "rows": rows,
            }
        )
    sets.sort(key=lambda s: (s["split"] != TEST, s["split"] != VALIDATION))  # as chosen first
    return {
        "students": [_shown(report.label(student)) for student in report.students],
        "panels": [
            {
                "name": _shown(panel.column.name),
                "metric": _shown(panel.metric),
                "split": _shown(panel.split),
                "teacher": panel.teacher and panel.teacher.value,
                "lines": [_line(line) for line in panel.lines],
            }
            for panel in report.panels
        ],
        "texts": list(texts),
        "sets": sets,
    }


def _line(line: Line) -> dict[str, Any]:
    def point(r: Result | None):
        return r and [r.step, r.tokens, r.value, r.low, r.high]

    return {
        "student": line.student,
        "best": line.best,
        "test": point(line.test),
        "points": [point(r) for r in line.points],
    }


def _shown(value: Any) -> Any:
    return visible_lines(value) if isinstance(value, str) else value
