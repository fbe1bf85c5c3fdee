"""The report as files for others: a Markdown table, all values as CSV, and plots."""

import csv
import io
import re
from collections.abc import Sequence

from etils import epath

from distill import metrics
from distill.display import visible
from distill.report.results import TEACHER, Result
from distill.report.summary import Choice, Line, Report

# (on light, on dark) ground, each with a contrast of at least 3 to it. Eight colours and five
# markers have no common factor: forty students look different.
COLOURS = (
    ("#2b6cb0", "#63b3ed"), ("#b45309", "#f6ad55"), ("#2f855a", "#68d391"), ("#b83280", "#f687b3"),
    ("#6b46c1", "#b794f4"), ("#0e7490", "#4fd1d9"), ("#c53030", "#fc8181"), ("#4a5568", "#cbd5e0"),
)  # fmt: skip
_MARKERS = "os^Dv"
_GREY = "#4a5568"
_CSV = (
    "run", "run_path", "checkpoint", "step", "parameters", "tokens", "mixture", "dataset", "task",
    "split", "decoder", "metric", "value", "n", "standard_error", "low", "high", "chosen", "time",
)  # fmt: skip


def number(value: float) -> str:
    return f"{value:.3f}"


def interval(result: Result | metrics.McNemar) -> str:
    if result.low is None or result.high is None:
        return ""
    return f"[{number(result.low)}, {number(result.high)}]"


def count(value: float | None) -> str:
    """`76961152` -> `77M`."""
    if value is None:
        return ""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def parameters(report: Report, run: str) -> int | None:
    return next((r.parameters for r in report.results if r.run == run and r.parameters), None)


# --- Tables ---------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """Returns the main table, the pairs of students and the notes."""
    header = ["run", "decoder", "parameters", *(c.name for c in report.columns)]
    rows = [
        [
            report.names[student[0]],
            student[1],
            count(parameters(report, student[0])),
            *(_cell(report.choices.get((student, column))) for column in report.columns),
        ]
        for student in report.students
    ]
    if report.teacher:
        said = [report.teacher.get(column) for column in report.columns]
        rows.append(
            [TEACHER, "", "", *(f"{number(r.value)} {interval(r)}" if r else "" for r in said)]
        )
    of = ", ".join(f"{c.name}: {c.metric}" for c in report.columns)
    parts = [
        "# Evaluation",
        _markdown(
            f"At the step with the best validation value, on the test split ({of}); in brackets "
            "the 95 % interval over examples."
        ),
        markdown_table(header, rows),
    ]
    if report.comparisons:
        rows = [
            [
                c.column.name,
                report.label(c.a.result.student),
                report.label(c.b.result.student),
                f"{c.paired.difference:+.3f} {interval(c.paired)}",
                *(f"{n:,}" for n in (c.paired.only_a, c.paired.only_b, c.paired.n)),
                p_value(c.paired.p),
            ]
            for c in report.comparisons
        ]
        header = ["dataset", "A", "B", "A - B", "only A right", "only B right", "examples", "p"]
        parts += [
            "Pairs on the same examples (p: McNemar's exact test, not corrected for the number of "
            "pairs):",
            markdown_table(header, rows),
        ]
    if report.notes:
        parts.append("\n".join(f"- {_markdown(note)}" for note in report.notes))
    return "\n\n".join(parts) + "\n"


def _cell(choice: Choice | None) -> str:
    if choice is None:
        return ""
    if choice.shown is None:
        return f"no test at step {choice.step} (validation {number(choice.best.value)})"
    found = f"{number(choice.shown.value)} {interval(choice.shown)}".rstrip()
    step = f"step {choice.step}" if choice.best else f"latest, step {choice.step}"
    return f"{found} ({step})"


def _markdown(text: str) -> str:
    # `<` and `&` only where they could begin a tag or an entity, brackets where they make a link.
    return re.sub(r"([\\`*|]|<(?=[^\s\d])|&(?=\S)|\](?=[(\[]))", r"\\\1", visible(text))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [list(map(_markdown, row)) for row in (header, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(header))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |" for row in cells
    )


def csv_table(report: Report) -> str:
    """Returns all values; `chosen` is yes at a student's best step by validation."""
    steps = {
        (student, column.dataset, column.task): choice.step
        for (student, column), choice in report.choices.items()
        if choice.best
    }
    file = io.StringIO()
    writer = csv.DictWriter(file, _CSV, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for r in report.results:
        chosen = r.step is not None and r.step in (
            steps.get((r.student, r.dataset, task)) for task in (None, r.task)
        )
        row = vars(r) | {"run": report.names[r.run], "run_path": r.run}
        row["chosen"] = "yes" if chosen else "no"
        writer.writerow({k: visible(v) if isinstance(v, str) else v for k, v in row.items()})
    return file.getvalue()


# --- Plots ----------------------------------------------------------------------------------------


def draw(report: Report, path: epath.Path, over: str = "step") -> None:
    """Draws learning curves into a file, one plot for each metric of each dataset.

    Args:
      report: what to draw.
      path: of the file; its suffix is the format, `.png` or `.svg`.
      over: `step`, or `tokens` trained on; students whose tokens are not known are left out then.
    """
    import matplotlib
    from matplotlib import ticker
    from matplotlib.figure import Figure

    columns = min(3, len(report.columns))
    rows = -(-len(report.panels) // columns)
    # Names are text, not TeX; and the same results give the same file.
    with matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "distill"}):
        width = max(6.5, 4.4 * columns + 0.4)
        figure = Figure(figsize=(width, 3.2 * rows + 0.8), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat[len(report.panels) :]:
            axes.remove()
        handles, taught = {}, None
        for axes, panel in zip(grid.flat, report.panels, strict=False):
            for line in panel.lines:
                if handle := _draw_line(figure, axes, line, over):
                    handles[report.students[line.student]] = handle
            if panel.teacher:
                taught = axes.axhline(panel.teacher.value, color=_GREY, linestyle="--")
            axes.set_title(_short(panel.column.name), fontsize=11, loc="left")
            axes.set_ylabel(_short(f"{panel.metric}, {panel.split}"))
            axes.set_xlabel("step" if over == "step" else "training tokens")
            axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
            axes.xaxis.set_major_formatter(lambda value, _: count(value))
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        labels = [*(_short(report.label(student)) for student in handles), TEACHER]
        entry = 0.09 * max(map(len, labels)) + 0.6  # inches, roughly
        figure.legend(
            [*handles.values(), *([taught] if taught else [])],
            labels if taught else labels[:-1],
            loc="outside upper left", ncols=max(1, int(width / entry)), frameon=False,
        )  # fmt: skip
        figure.text(
            0.005, 0.005, "Bands and bars: 95 % intervals over examples. Stars, moved to the "
            "right: test at the chosen step.", fontsize=8, color=_GREY,
        )  # fmt: skip
        figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
        file = io.BytesIO()
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(file, format=path.suffix[1:], dpi=150, metadata=metadata)
    path.write_bytes(file.getvalue())


def _short(name: str, most: int = 40) -> str:
    """A name for a plot, which has no room for more; both ends stay."""
    name = visible(name)
    half = (most - 1) // 2
    return name if len(name) <= most else f"{name[:half]}\u2026{name[-half:]}"


def _draw_line(figure, axes, line: Line, over: str):
    """Draws a student's curve and returns what the legend shows of it, None where nothing is."""
    from matplotlib.transforms import ScaledTranslation

    def x(r: Result):
        return getattr(r, over)

    points = [r for r in line.points if x(r) is not None]
    if not points:
        return None
    colour = COLOURS[line.student % len(COLOURS)][0]
    (handle,) = axes.plot(
        [x(r) for r in points], [r.value for r in points], color=colour, linewidth=1.6,
        marker=_MARKERS[line.student % len(_MARKERS)], markersize=4,
    )  # fmt: skip
    sure = [r for r in points if interval(r)]
    axes.fill_between(
        [x(r) for r in sure], [r.low for r in sure], [r.high for r in sure],
        color=colour, alpha=0.13, linewidth=0,
    )  # fmt: skip
    # A band of one point has no width, and a test value none at all.
    for r, star in [(line.test, True), *((r, False) for r in sure if len(points) == 1)]:
        if r is None or x(r) is None:
            continue
        low, high = (r.low, r.high) if interval(r) else (r.value, r.value)
        # Beside its point, which it would hide; limits are not taken from what is moved.
        beside = ScaledTranslation(8 / 72 if star else 0, 0, figure.dpi_scale_trans)
        axes.errorbar(
            [x(r)], [r.value], color=colour, capsize=2, linestyle="none", zorder=4,
            # A resampled interval need not hold the value.
            yerr=[[max(0, r.value - low)], [max(0, high - r.value)]],
            marker="*" if star else None, markersize=11, markeredgecolor="white",
            transform=axes.transData + beside,
        )  # fmt: skip
        axes.update_datalim([(x(r), low), (x(r), high)])
        axes.autoscale_view()
    return handle
