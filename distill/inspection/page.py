"""The report as one HTML page, without scripts or external resources."""

import base64
import html
import io
from collections.abc import Sequence

import numpy as np

from distill.display import (
    STYLE,
    escape,
    histogram,
    html_document,
    html_facts,
    html_table,
    visible,
    visible_lines,
)
from distill.inspection.facts import (
    FEATURES,
    Batching,
    Example,
    Inspection,
    TaskSummary,
    TeacherReport,
    Tokens,
)
from distill.inspection.text import (
    batch_facts,
    details,
    example_title,
    left_out,
    length_table,
    proposal_table,
    task_table,
    teacher_table,
    with_known_inputs,
)

_COLOURS = {"label": "#2b6cb0", "rationale": "#b45309"}
_STYLE = f"""{STYLE}
.tokens {{ font: 13px/1.9 ui-monospace, monospace; margin: .1rem 0 .6rem; }}
.t {{ border: 1px solid var(--line); border-radius: 3px; background: var(--raised); padding: 0 .2em;
     margin: 0 1px; white-space: pre-wrap; overflow-wrap: anywhere; }}
.t.label {{ border-color: var(--blue); background: var(--blueground); }}
.t.rationale {{ border-color: var(--amber); background: var(--amberground); }}
.t.other {{ border-color: var(--violet); background: var(--violetground); }}
.t.special {{ border-style: dashed; border-width: 2px; font-weight: 700; }}
.t.cut {{ opacity: .55; text-decoration: line-through; }}
.feature {{ color: var(--soft); font-size: .88rem; }}
"""
# No script and no request, whatever a row holds.
_POLICY = "img-src data:; style-src 'unsafe-inline'"
_PLOT_BINS = 40


def html_report(found: Inspection) -> str:
    """Returns the report as one HTML page that needs nothing else, and no JavaScript."""
    title = f"{found.name}, {found.split}"
    rows = sum(t.rows for t in found.tasks)
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{rows:,} rows of {found.pairs:,} examples.</p>",
        html_facts(list(found.facts.items())),
        "<h2>Tasks</h2>",
        html_table(task_table(found.tasks), left=(0, 5)),
        "<p class=note>A row is one sequence; an example is what its sequences (predict, explain) "
        "share. <i>of dataset</i>: examples of its split. Of several rows for one example "
        "(<i>choices</i>), one is drawn per epoch.</p>",
    ]
    if found.teacher is not None:
        body += ["<h2>The teacher</h2>", _html_teacher(found.teacher)]
    body += ["<h2>Lengths</h2>", html_table(length_table(found.tasks), left=(0, 1))]
    body += [_html_plot(t) for t in found.tasks if t.rows]
    if found.batching:
        body += ["<h2>Batches</h2>", _html_batches(found.batching)]
    else:
        body += ["<p class=note>Only the train split is packed into batches.</p>"]
    if found.examples:
        body += ["<h2>Examples</h2>", _html_legend(found.examples)]
        body += [_html_example(e) for e in found.examples]
    return html_document(title, "\n".join(body), style=_STYLE, policy=_POLICY)


def _html_teacher(reports: Sequence[TeacherReport]) -> str:
    if not reports:
        return "<p>No dataset of this mixture was made by task.register.</p>"
    notes = "".join(
        f"<p>{escape(t.dataset)}: {escape(note)}</p>" for t in reports for note in t.report.notes
    )
    return (
        html_table(teacher_table(reports))
        + notes
        + "<p class=note><i>gold</i>: rows with a gold label. <i>parsed</i>, <i>unparsed</i>: rows "
        "with and without a teacher label. The accuracy is over the rows with a gold label that "
        "the teacher was asked; unparsed is wrong.</p>"
    )


def _html_batches(b: Batching) -> str:
    best = " The first is used." if b.chosen else ""
    return (
        html_facts(batch_facts(b))
        + f"<h3>Row lengths that waste least, for batches of {escape(b.size)}</h3>"
        + html_table(proposal_table(b.proposals), left=())
        + "<p class=note>In tokens; tried on a sample. The FLOPs factor is what is computed over "
        f"what the real tokens need; within 0.5 % of the least, the shortest is the best.{best}</p>"
    )


def _group_class(loss_group: str) -> str:
    return loss_group if loss_group in _COLOURS else "other"


def _html_legend(examples: Sequence[Example]) -> str:
    groups = dict.fromkeys(s.loss_group for e in examples for s in e.sequences)
    boxes = ["<span class=t>input, no loss</span>"]
    boxes += [
        f'<span class="t {_group_class(g)}">target, loss group {escape(g)}</span>' for g in groups
    ]
    boxes += ['<span class="t special">&lt;/s&gt;</span> an id without text (end of sequence)']
    if any(
        any(tokens.cut)
        for e in examples for s in e.sequences for tokens in (s.inputs, s.targets)
    ):  # fmt: skip
        boxes += ['<span class="t cut">cut off</span>']
    return (
        f"<p class=tokens>{' '.join(boxes)}</p><p class=note>One box is one token; \u2581 is a "
        "space. From the shortest example to the longest.</p>"
    )


def _html_example(example: Example) -> str:
    parts = [f"<h3>{escape(example_title(example))}</h3>"]
    for s, known in with_known_inputs(example):
        parts.append(
            f"<p><b>{escape(s.task)}</b>, loss group <b>{escape(s.loss_group)}</b>"
            f"{escape(details(s))}</p>"
        )
        for feature in FEATURES:
            tokens = getattr(s, feature)
            if feature == "inputs" and known:
                parts.append("<div class=feature>inputs as before</div>")
                continue
            group = _group_class(s.loss_group) if feature == "targets" else ""
            parts.append(
                f"<div class=feature>{feature}, {len(tokens.pieces):,} tokens</div>"
                f"<div class=tokens>{_html_tokens(tokens, group)}</div>"
            )
    if example.left_out:
        parts.append(f"<p class=note>{left_out(example)}</p>")
    # Line breaks do no harm here, and show as themselves.
    text = html.escape(visible_lines(example.text))
    parts.append(
        f"<details><summary>the input before tokenising</summary><pre>{text}</pre></details>"
    )
    return f"<div class=example>{''.join(parts)}</div>"


def _html_tokens(tokens: Tokens, group: str) -> str:
    made = []
    for piece, special, cut in zip(tokens.pieces, tokens.special, tokens.cut, strict=True):
        classes = ["t", group, "special" if special else "", "cut" if cut else ""]
        # Pieces are visible already. Browsers break lines between the boxes.
        made.append(f'<span class="{" ".join(filter(None, classes))}">{html.escape(piece)}</span>')
    return "<wbr>".join(made)


def _html_plot(task: TaskSummary) -> str:
    png = base64.b64encode(length_plot(task)).decode("ascii")
    name = escape(task.name)
    return (
        f'<img width=1000 alt="Histograms of input and target tokens of {name}" '
        f'src="data:image/png;base64,{png}">'
    )


def length_plot(task: TaskSummary) -> bytes:
    """Returns the length histograms of a task as a PNG."""
    from matplotlib.figure import Figure

    colours = dict.fromkeys(FEATURES, "#718096")
    if len(task.loss_groups) == 1:
        colours["targets"] = _COLOURS.get(next(iter(task.loss_groups)), "#6b46c1")
    figure = Figure(figsize=(10, 2.7), layout="constrained")
    for axes, feature in zip(figure.subplots(1, 2), FEATURES, strict=True):
        lengths = task.lengths[feature]
        edges, counts = histogram(lengths.values, _PLOT_BINS)
        axes.bar(  # Whole numbers: a bar is around the values that it counts.
            edges[:-1] - 0.5, counts, width=np.diff(edges), align="edge", color=colours[feature],
            edgecolor="white", linewidth=0.4,
        )  # fmt: skip
        for position, style, name in (
            (lengths.percentile(50), "-", f"median {lengths.percentile(50):,}"),
            (lengths.percentile(95), "--", f"p95 {lengths.percentile(95):,}"),
            (lengths.limit, ":", f"cut at {lengths.limit:,}"),
        ):
            if position <= edges[-1]:
                axes.axvline(position, color="#1a202c", linestyle=style, linewidth=1, label=name)
        axes.set_xlabel(f"{feature} (tokens, in bins of {edges[1] - edges[0]:,})")
        axes.set_ylabel("rows")
        axes.grid(alpha=0.3, axis="y")
        axes.set_axisbelow(True)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.legend(  # Above the bars, which may be anywhere.
            fontsize=8, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 0.98)
        )
        axes.spines[["top", "right"]].set_visible(False)
    # The name is text, not TeX: a `$` in it would be read as mathematics.
    figure.suptitle(visible(task.name), x=0.01, ha="left", fontsize=10, parse_math=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110, metadata={"Software": None})
    return png.getvalue()
