"""A study's results as files: JSON lines, a Markdown table, and plots."""

import io
import math
from collections.abc import Sequence

from etils import epath

from distill import results
from distill.report.files import COLOURS, count, markdown_table
from distill.study.manifest import DATASET
from distill.study.summary import (
    EXAMPLES,
    Crossing,
    Point,
    Summary,
    beside,
    curves,
    is_size,
)

_MARKERS = "os^DvP*X"


def write(summary: Summary, output_dir: str) -> list[epath.Path]:
    """Writes `results.jsonl`, `results.md` and a plot for each axis; returns their paths."""
    folder = epath.Path(output_dir).expanduser()
    results.write_lines(folder / "results.jsonl", summary.lines)
    results.write_text(folder / "results.md", markdown(summary))
    written = [folder / "results.jsonl", folder / "results.md"]
    for axis in summary.axes:
        if all(_is_number(p.position(axis)) for p in summary.points if axis in p.axes):
            for suffix in ("png", "svg"):
                written.append(folder / f"{axis.lower().replace('.', '-')}.{suffix}")
                draw(summary, axis, written[-1])
    return written


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- Tables ---------------------------------------------------------------------------------------


def markdown(summary: Summary) -> str:
    """Returns the table of all settings, the differences, and what was read off the curves."""
    study, points = summary.study, summary.points
    # A mixture is tested on its datasets; else the dataset's column says it.
    mixes = any(p.axes.get(DATASET, p.dataset) != p.dataset for p in points)
    shown = [a for a in summary.axes if a not in EXAMPLES and (a != DATASET or mixes)]
    several = len({p.dataset for p in points}) > 1
    header = [
        *(["tested on"] if several else []), "arm", *shown, "examples", "steps", "training tokens",
        "seeds", "test", "95 % over seeds", "sd", "validation",
    ]  # fmt: skip
    rows = [
        [
            *([p.dataset] if several else []), p.arm, *(str(p.axes.get(a, "")) for a in shown),
            f"{p.examples:,}", f"{p.steps:,.0f}", count(p.tokens), str(len(p.seeds)),
            f"{p.mean:.4f}", _plus_minus(p.half_width),
            f"{p.test.std(ddof=1):.4f}" if len(p.test) > 1 else "",
            "" if math.isnan(p.validation.mean()) else f"{p.validation.mean():.4f}",
        ]
        for p in points
    ]  # fmt: skip
    parts = [f"# {study.title}"]
    for dataset in dict.fromkeys(p.dataset for p in points):
        first = next(p for p in points if p.dataset == dataset)
        teacher = "" if first.teacher is None else f"; the teacher has {first.teacher:.4f}"
        parts.append(
            f"{dataset}: {first.metric} on {first.n:,} test examples at the step that is best on "
            f"validation (standard error over examples about {first.standard_error:.4f}){teacher}."
        )
    parts.append(markdown_table(header, rows))
    if summary.differences:
        rows = [
            [
                *([d.point.dataset] if several else []), d.point.arm + _axes_of(d.point, shown),
                d.baseline.arm
                + _axes_of(d.baseline, [axis for axis in shown if axis not in d.point.axes]),
                f"{d.point.examples:,}", str(d.seeds),
                f"{d.mean:+.4f} {_plus_minus(d.half_width)}".rstrip(), d.verdict,
            ]
            for d in summary.differences
        ]  # fmt: skip
        parts.append("Differences, seed by seed (95 % interval of the mean, Student's t):")
        header = [
            *(["tested on"] if several else []), "arm", "minus", "examples", "seeds", "difference",
            "",
        ]  # fmt: skip
        parts.append(markdown_table(header, rows))
    said = [_said(c, "examples") for c in summary.examples]
    said += [_said(c, "parameters") for c in summary.sizes]
    if said:
        parts.append("\n".join(f"- {line}" for line in said))
    if summary.missing:
        parts.append(f"{summary.missing} runs are missing.")
    return "\n\n".join(parts) + "\n"


def _axes_of(point: Point, shown: Sequence[str]) -> str:
    values = [f"{axis} {point.axes[axis]}" for axis in shown if axis in point.axes]
    return f" ({', '.join(values)})" if values else ""


def _said(crossing: Crossing, unit: str) -> str:
    """A sentence about a crossing."""
    first, last = (f"{x:,.0f}" for x in crossing.span)
    where = ", ".join([crossing.dataset, *crossing.where])
    start = f"{where}: {crossing.arm} reaches {crossing.line} ({crossing.level:.4f})"
    if crossing.at is None:
        said = f"{start} at none of {first} to {last} {unit}"
    else:
        share = f", {crossing.at / crossing.of:.0%} of them" if crossing.of else ""
        at_first = (
            " (its first point, so perhaps earlier)" if crossing.at == crossing.span[0] else ""
        )
        said = f"{start} with {crossing.at:,.0f} {unit}{share}{at_first}"
    if crossing.reached is None:
        return f"{said}; one seed, so no interval."
    if crossing.low is None:
        return f"{said}; {crossing.reached:.0%} of resampled seeds reach it."
    high = "beyond the last" if math.isinf(crossing.high) else f"{crossing.high:,.0f}"
    return f"{said}; 95 % over seeds {crossing.low:,.0f} to {high}."


def _plus_minus(half_width: float) -> str:
    return "" if math.isnan(half_width) else f"+- {half_width:.4f}"


# --- Plots ----------------------------------------------------------------------------------------


def draw(summary: Summary, axis: str, path: epath.Path) -> None:
    """Draws the metric over an axis into a file: a panel a dataset, a curve an arm.

    Points are means over seeds, bars their 95 % intervals, small points the seeds themselves. A
    value of another axis that several curves differ in is written beside the arm.

    Args:
      summary: what to draw.
      axis: of the manifest.
      path: of the file; its suffix is the format, `.png` or `.svg`.
    """
    import matplotlib
    from matplotlib.figure import Figure

    points = [p for p in summary.points if axis in p.axes]
    datasets = list(dict.fromkeys(p.dataset for p in points))
    arms = list(dict.fromkeys(_label(group[0], axis, summary) for group in
                              curves(points, axis).values()))  # fmt: skip
    columns = min(2, len(datasets))
    rows = -(-len(datasets) // columns)
    with matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "distill"}):
        figure = Figure(figsize=(6.4 * columns, 4.2 * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for unused in grid.flat[len(datasets) :]:
            unused.remove()
        for panel, dataset in zip(grid.flat, datasets, strict=False):
            _panel(panel, summary, axis, dataset, arms)
        figure.suptitle(summary.study.title, fontsize=11)
        drawn = io.BytesIO()
        figure.savefig(drawn, format=path.suffix[1:], dpi=150, metadata=_undated(path))
    results.write_bytes(path, drawn.getvalue())


def _label(point: Point, axis: str, summary: Summary) -> str:
    return ", ".join([point.arm, *beside(point, axis, summary.axes)])


def _axis_name(axis: str) -> str:
    if axis in EXAMPLES:
        return "training examples"
    if is_size(axis):
        return "parameters of the student"
    return {"ALPHA": "alpha, the weight of the label's loss"}.get(axis, axis)


def _undated(path: epath.Path) -> dict[str, None]:
    """The same results give the same file."""
    return {"Date": None} if path.suffix == ".svg" else {}


def _panel(panel, summary: Summary, axis: str, dataset: str, arms: Sequence[str]) -> None:
    lines = [group for key, group in curves(summary.points, axis).items() if key[0] == dataset]
    first = lines[0][0]
    for group in lines:
        label = _label(group[0], axis, summary)
        number = arms.index(label)  # the same colour in every panel
        colour, marker = COLOURS[number % len(COLOURS)][0], _MARKERS[number % len(_MARKERS)]
        xs = [p.position(axis) for p in group]
        bars = [0 if math.isnan(p.half_width) else p.half_width for p in group]
        panel.errorbar(
            xs, [p.mean for p in group], yerr=bars, color=colour, marker=marker, capsize=3,
            label=label, linewidth=1.6, markersize=6, elinewidth=1,
        )  # fmt: skip
        for x, p in zip(xs, group, strict=True):
            panel.plot([x] * len(p.test), p.test, ".", color=colour, alpha=0.45, markersize=5)
    if first.teacher is not None:
        panel.axhline(first.teacher, color="black", linestyle="--", linewidth=1)
        panel.annotate(
            f"teacher {first.teacher:.3f}", (0.01, first.teacher), fontsize=8, va="bottom",
            xycoords=("axes fraction", "data"),
        )  # fmt: skip
    if axis in EXAMPLES:
        for crossing in summary.examples:
            if crossing.at is not None and crossing.dataset == dataset:
                panel.axhline(crossing.level, color="grey", linestyle=":", linewidth=1)
                panel.plot([crossing.at], [crossing.level], "*", color="black", markersize=11)
    if axis in EXAMPLES or is_size(axis):
        from matplotlib import ticker

        panel.set_xscale("log")
        ticks = sorted({p.position(axis) for group in lines for p in group})
        panel.set_xticks(ticks, labels=[count(x) if x >= 1e5 else f"{x:,.0f}" for x in ticks])
        panel.xaxis.set_minor_locator(ticker.NullLocator())
    panel.set_xlabel(_axis_name(axis))
    panel.set_ylabel(f"test {first.metric}")
    panel.set_title(f"{dataset} (bars: 95 % over seeds)", fontsize=9)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
