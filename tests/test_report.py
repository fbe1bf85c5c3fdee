"""The comparison's verdict, curves from metrics files, and the quickstart as a user runs it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from distill import report

ROOT = pathlib.Path(__file__).parents[1]


def arm(name, accuracy, n=1000, **settings):
    settings = dict(examples=10, tokens=1000, steps=5, model_dir="", task="t") | settings
    return report.Arm(name, accuracy=accuracy, n=n, **settings)


@pytest.mark.parametrize(
    "baseline,student,verdict",
    [
        (0.50, 0.52, "no effect at this size"),  # 0.02 is 0.9 of its standard errors
        (0.50, 0.48, "no effect at this size"),
        (0.50, 0.60, "b is better"),
        (0.60, 0.50, "b is worse"),
    ],
)
def test_a_difference_inside_the_error_is_no_effect(baseline, student, verdict):
    text = report.comparison(arm("a", baseline), arm("b", student))
    assert text.splitlines()[-1].split(": ")[2].startswith(verdict)
    for number in (f"{baseline:.4f}", f"{student:.4f}", "0.0158" if baseline == 0.5 else "0.0155"):
        assert number in text


def test_a_curve_takes_the_last_line_of_a_step_and_skips_what_is_missing(tmp_path):
    folder = tmp_path / "inference_eval" / "t" / "validation"
    folder.mkdir(parents=True)
    rows = [
        {"step": 1, "accuracy": 0.1, "tokens": 10},
        {"step": 2, "accuracy": 0.2, "tokens": 20},
        {"step": 2, "accuracy": 0.3, "tokens": 20},  # written again by a resumed run
        {"step": 3, "accuracy": None, "tokens": 30},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    curve = report.curve(str(tmp_path), "inference_eval/t/validation", "accuracy", by="tokens")
    assert curve == ([10, 20], [0.1, 0.3])


def test_quickstart_compares_equal_tokens_and_draws_the_curves(tmp_path):
    result = subprocess.run(
        [sys.executable, str(ROOT / "scripts/quickstart.py"), f"--output_dir={tmp_path}",
         "--gin.PAIRS_PER_STEP=16", "--gin.EVALUATOR_NUM_EXAMPLES=4", "--steps=4",
         "--gin.EVAL_STEPS=1"],
        capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "",
             "DISTILL_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = {
        line.split()[0]: line.split()[1:4]
        for line in result.stdout.splitlines()
        if line.startswith(("label-only  ", "step-by-step  "))
    }
    assert rows["label-only"][0] == rows["step-by-step"][0] == "4,800"
    tokens = [int(rows[name][1].replace(",", "")) for name in rows]
    assert max(tokens) / min(tokens) < 1.1  # a step is 9 % of so short a run
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert "(one seed" in result.stdout
