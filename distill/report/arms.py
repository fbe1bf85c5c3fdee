"""Tables and plots of finished runs, from the metrics that they wrote."""

import dataclasses
import json
import math
from collections.abc import Sequence

from etils import epath


@dataclasses.dataclass(frozen=True)
class Arm:
    """One student of a comparison, evaluated on the test split.

    Attributes:
      name: how it was trained.
      examples: labelled examples it could train on.
      tokens: real tokens trained on, inputs and targets, repeats counted.
      steps: updates.
      accuracy: on the test split, in [0, 1].
      n: test examples.
      model_dir: where its metrics are.
      task: the SeqIO task that it was scored on.
    """

    name: str
    examples: int
    tokens: int
    steps: int
    accuracy: float
    n: int
    model_dir: str
    task: str

    @property
    def standard_error(self) -> float:
        """Of the accuracy over test examples, binomial; it knows nothing of other seeds."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.n)


def comparison(baseline: Arm, student: Arm) -> str:
    """A table of two students, and in words whether they differ.

    The difference counts as one where it exceeds 1.96 of its standard errors (95 %); below that the
    verdict is "no effect at this size".
    """
    header = ("student", "examples", "training tokens", "steps", "test accuracy", "std. error")
    rows = [header]
    for arm in (baseline, student):
        rows.append(
            (
                arm.name,
                f"{arm.examples:,}",
                f"{arm.tokens:,}",
                f"{arm.steps:,}",
                f"{arm.accuracy:.4f}",
                f"{arm.standard_error:.4f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    difference = student.accuracy - baseline.accuracy
    error = math.hypot(student.standard_error, baseline.standard_error)
    verdict = f"{student.name} minus {baseline.name}: {difference:+.4f} +- {error:.4f}"
    if abs(difference) <= 1.96 * error:
        verdict += ": no effect at this size"
    elif difference > 0:
        verdict += f": {student.name} is better"
    else:
        verdict += f": {student.name} is worse"
    return "\n".join([*lines, "", f"{verdict} (one seed; +- is over {student.n:,} test examples)"])


def curve(
    model_dir: str, kind: str, metric: str, by: str = "step"
) -> tuple[list[float], list[float]]:
    """A metric over a run, as its metrics file has it; of a repeated step the last line holds.

    Args:
      model_dir: of the run.
      kind: e.g. `train`, or `inference_eval/<task>/validation`.
      metric: name of the values.
      by: name of what they are plotted over.

    Returns:
      (positions, values) in the order of the steps.

    Raises:
      FileNotFoundError: the run wrote no such metrics.
    """
    path = epath.Path(model_dir).expanduser() / kind / "metrics.jsonl"
    points = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if row.get(metric) is not None and row.get(by) is not None:
            points[row["step"]] = (row[by], row[metric])
    ordered = [points[step] for step in sorted(points)]
    return [x for x, _ in ordered], [y for _, y in ordered]


def learning_curves(path: str, arms: Sequence[Arm], title: str, chance: float | None = None):
    """Draws validation accuracy over training tokens for each arm, as a PNG.

    Args:
      path: of the file.
      arms: the runs.
      title: of the plot.
      chance: accuracy of always giving the most frequent label, drawn as a line.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for i, arm in enumerate(arms):
        kind = f"inference_eval/{arm.task}/validation"
        tokens, accuracy = curve(arm.model_dir, kind, "accuracy", by="tokens")
        _, errors = curve(arm.model_dir, kind, "standard_error", by="tokens")
        axes.plot(tokens, accuracy, marker="o", markersize=4, color=f"C{i}", label=arm.name)
        axes.fill_between(
            tokens,
            [a - e for a, e in zip(accuracy, errors, strict=True)],
            [a + e for a, e in zip(accuracy, errors, strict=True)],
            color=f"C{i}",
            alpha=0.2,
            linewidth=0,
        )
        axes.errorbar(
            [arm.tokens], [arm.accuracy], yerr=[arm.standard_error], color=f"C{i}", marker="*",
            markersize=12, capsize=4, linestyle="none", label=f"{arm.name}, test",
        )  # fmt: skip
    if chance is not None:
        axes.axhline(chance, color="grey", linestyle=":", label="most frequent label")
    axes.set_xlabel("training tokens (inputs and targets, without padding)")
    axes.set_ylabel("label accuracy")
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if x else "0")
    axes.set_title(f"{title} (bands and bars: 1 standard error)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
