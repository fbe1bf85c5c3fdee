"""The report as text, and the tables that the page has too."""

import itertools
from collections.abc import Iterator, Sequence

from distill import packing
from distill.display import Table, histogram_table, percent, text_table, visible
from distill.inspection.facts import (
    FEATURES,
    Batching,
    Example,
    Inspection,
    SequenceTokens,
    TaskSummary,
    TeacherReport,
    Tokens,
)

# --- Tables ---------------------------------------------------------------------------------------


def task_table(tasks: Sequence[TaskSummary]) -> Table:
    """Rows, examples and what else decides how a task is trained on, where tasks have it."""
    columns = {
        "task": lambda t: t.name,
        "rows": lambda t: f"{t.rows:,}",
        "examples": lambda t: f"{t.examples:,}",
        "of dataset": lambda t: f"{t.population:,}",
        "without a row": lambda t: f"{t.without:,}",
        "loss group": lambda t: ", ".join(
            name if len(t.loss_groups) == 1 else f"{name} ({n:,})"
            for name, n in t.loss_groups.items()
        ),
    }
    if len({t.rate for t in tasks}) > 1:
        columns["mixing rate"] = lambda t: f"{t.rate:g}"
    if any(t.choices[1] > 1 for t in tasks):
        columns["choices, mean (most)"] = lambda t: f"{t.choices[0]:.2f} ({t.choices[1]})"
    if any(t.weighted for t in tasks):
        columns["weight, mean (range)"] = lambda t: (
            f"{t.weights[1]:.3f} ({t.weights[0]:g} to {t.weights[2]:g})"
        )
    return list(columns), [[cell(t) for cell in columns.values()] for t in tasks]


def length_table(tasks: Sequence[TaskSummary]) -> Table:
    """Token counts of each task and feature, and how many of its rows are cut."""
    header = ["task", "tokens", "mean", "p50", "p95", "max", "total", "cut at", "rows cut"]
    rows = []
    for t in tasks:
        for feature, n in t.lengths.items():
            share = n.truncated / max(t.rows, 1)
            rows.append(
                [t.name, feature, f"{n.mean:.1f}", f"{n.percentile(50):,}",
                 f"{n.percentile(95):,}", f"{n.longest:,}", f"{n.total:,}", f"{n.limit:,}",
                 f"{n.truncated:,} ({percent(share)})"]
            )  # fmt: skip
    return header, rows


def proposal_table(proposals: Sequence[packing.Proposal]) -> Table:
    """Row lengths, what of them would be padding, and the FLOPs over those needed."""
    header = ["inputs", "targets", "padding of inputs", "padding of targets", "FLOPs factor"]
    return header, [
        [f"{p.inputs:,}", f"{p.targets:,}", percent(p.waste.inputs), percent(p.waste.targets),
         f"{p.waste.flops:.3f}"]
        for p in proposals
    ]  # fmt: skip


def teacher_table(reports: Sequence[TeacherReport]) -> Table:
    """Numbers of each dataset, and of each repair below it."""
    header = ["dataset", "rows", "gold", "parsed", "unparsed", "rationales", "teacher accuracy"]
    rows = []
    for t in reports:
        r = t.report
        rows.append(
            [t.dataset, f"{r.rows:,}", f"{r.rows - r.unlabeled:,}", f"{r.parsed:,}",
             f"{r.unparsed:,}", f"{r.rationales:,}", _accuracy(r.teacher_accuracy)]
        )  # fmt: skip
        for step, unparsed, accuracy in t.gains:
            name = f"  {step}" if step == t.gains[0][0] else f"  + {step}"
            rows.append([name, "", "", "", f"{unparsed:,}", "", _accuracy(accuracy)])
    return header, rows


def batch_facts(b: Batching) -> list[tuple[str, str]]:
    """What a step and an epoch are, as (name, value)."""
    origin = "least waste on this data and student" if b.chosen else "as given"
    inputs, targets = (b.capacity[f] for f in FEATURES)
    return [
        ("row", f"{inputs:,} input + {targets:,} target tokens ({origin})"),
        ("step", f"{b.examples / b.steps:,.1f} examples in {b.rows:,} rows of "
                 f"{inputs + targets:,} tokens, {b.tokens:,.0f} of them real"),
        ("epoch", f"{b.steps:,} steps for {b.examples:,} examples"),
        ("padding", f"{percent(b.waste.inputs)} of inputs, {percent(b.waste.targets)} of "
                    f"targets, {b.waste.flops:.3f} x the FLOPs needed"),
        ("compute", f"{_flops(b.flops)} a step, {_flops(b.flops * b.steps)} an epoch "
                    "(forward and backward, padding included)"),
    ]  # fmt: skip


def _accuracy(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


def _flops(value: float) -> str:
    for name, unit in (("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if value >= unit:
            return f"{value / unit:.3g} {name}FLOP"
    return f"{value / 1e6:.3g} MFLOP"


# --- The report as text ---------------------------------------------------------------------------

_GROUP_COLOURS = {"label": "36", "rationale": "33"}  # cyan, yellow
_DIM, _BOLD, _REVERSE = "2", "1", "7"
_BINS = 10


def text_report(found: Inspection, *, colour: bool = False, width: int = 100) -> str:
    """Returns the report for a terminal, without what the teacher said.

    Args:
      found: from `inspect`.
      colour: use ANSI colours.
      width: of a line, characters.
    """
    rows = sum(t.rows for t in found.tasks)
    facts = "".join(f"\n{name}: {visible(value)}" for name, value in found.facts.items())
    parts = [
        f"{visible(found.name)}, {found.split}: {rows:,} rows of {found.pairs:,} examples{facts}",
        text_table(task_table(found.tasks), left=(0, 5)),
        text_table(length_table(found.tasks), left=(0, 1)),
        *(_text_histograms(t) for t in found.tasks if t.rows),
    ]
    if found.batching:
        parts += [_text_batches(found.batching)]
    else:
        parts += ["Only the train split is packed into batches."]
    parts += [_text_example(e, colour, width) for e in found.examples]
    return "\n\n".join(parts)


def teacher_text(reports: Sequence[TeacherReport]) -> str:
    """Returns what the teacher said, for a terminal."""
    if not reports:
        return "The teacher: no dataset of this mixture was made by task.register."
    lines = ["The teacher:", text_table(teacher_table(reports))]
    for t in reports:
        lines += [f"{visible(t.dataset)}: {visible(note)}" for note in t.report.notes]
    return "\n".join(lines)


def _paint(text: str, code: str | None, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour and code else text


def _text_histograms(task: TaskSummary) -> str:
    """Both histograms of a task, side by side."""
    sides = []
    for feature in FEATURES:
        table = histogram_table(
            task.lengths[feature].values, _BINS, (f"{feature}, tokens", "rows", "")
        )
        sides.append(text_table(table, left=()).splitlines())
    width = max(map(len, sides[0]))
    lines = [
        f"  {a.ljust(width)}   {b}".rstrip() for a, b in itertools.zip_longest(*sides, fillvalue="")
    ]
    return "\n".join([f"{visible(task.name)}, rows by length:", *lines])


def _text_batches(b: Batching) -> str:
    table = text_table(proposal_table(b.proposals), left=()).splitlines()
    best = " (the first is used)" if b.chosen else ""
    facts = batch_facts(b)
    width = max(len(name) for name, _ in facts)
    return "\n".join(
        [
            f"Row lengths that waste least, for batches of {b.size}{best};",
            "within 0.5 % of the least FLOPs, the shortest is the best:",
            *table,
            "",
            "Training on it:",
            *(f"  {name.ljust(width)}  {value}" for name, value in facts),
        ]
    )


def _text_example(example: Example, colour: bool, width: int) -> str:
    lines = [_paint(example_title(example), _BOLD, colour)]
    for s, known in with_known_inputs(example):
        group = _paint(s.loss_group, _GROUP_COLOURS.get(s.loss_group), colour)
        lines.append(f"  {visible(s.task)}, loss group {group}{details(s)}")
        for feature in FEATURES:
            code = _GROUP_COLOURS.get(s.loss_group) if feature == "targets" else None
            tokens = getattr(s, feature)
            if feature == "inputs" and known:
                lines.append("    inputs as before")
                continue
            lines.append(f"    {feature}, {len(tokens.pieces):,} tokens:")
            lines += _text_tokens(tokens, code, colour, max(width - 6, 20))
    if example.left_out:
        lines.append(f"  {left_out(example)}")
    return "\n".join(lines)


def example_title(example: Example) -> str:
    rank = {0.0: "the shortest", 1.0: "the longest"}.get(
        example.rank, f"longer than {example.rank:.0%}"
    )
    label = f"gold label {visible(example.label)!r}" if example.label else "no gold label"
    return f"Example {visible(example.example_id)} ({rank}), {label}"


def details(s: SequenceTokens) -> str:
    choice = f", choice {s.choice}" if s.choice else ""
    weight = f", weight {s.weight:g}" if s.weight != 1 else ""
    return choice + weight


def with_known_inputs(example: Example) -> Iterator[tuple[SequenceTokens, bool]]:
    """Yields each sequence, and whether it has the inputs of the one before, as choices do."""
    before = None
    for s in example.sequences:
        yield s, s.inputs == before
        before = s.inputs


def left_out(example: Example) -> str:
    return f"and {example.left_out:,} more sequences, of which one is drawn per epoch"


def _text_tokens(tokens: Tokens, code: str | None, colour: bool, width: int) -> list[str]:
    """Tokens with `|` between them, broken into lines; a `|` inside a token is `\\|`."""
    lines, line, used, in_cut = [], [], 0, False

    def end() -> None:
        nonlocal line, used
        if line:
            lines.append("      " + _paint("|", _DIM, colour).join(line))
        line, used = [], 0

    each = zip(tokens.pieces, tokens.special, tokens.cut, strict=True)
    for piece, special, cut in each:
        if cut != in_cut:
            end()
            lines.append(
                f"      --- {sum(tokens.cut):,} tokens are cut: ---" if cut else "      ---"
            )
            in_cut = cut
        text = piece if special else piece.replace("\\", "\\\\").replace("|", "\\|")
        if line and used + len(text) + 1 > width:
            end()
        paint = _DIM if cut else _REVERSE if special else code
        line.append(_paint(text, paint, colour))
        used += len(text) + 1
    end()
    return lines
