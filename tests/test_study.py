"""Studies: manifests, the runs they mean, what is read off the results, and a real one."""

import fcntl
import json
import math
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from distill import configure, objectives, results, students, study, train
from distill.study import files, manifest, pool, summary

ROOT = pathlib.Path(__file__).resolve().parents[1]
MANIFESTS = sorted((ROOT / "gin_configs" / "studies").rglob("*.toml"))

BASIC = """
title = "a study"
dataset = "arithmetic"
files = ["t5_1_1/tiny.gin", "quickstart.gin"]
baseline = "labels"
evaluations = 2

[settings]
TRAIN_STEPS = 4

[axes]
TRAIN_FRACTION = [0.25, 1.0]
RANDOM_SEED = [0, 1]

[[arms]]
name = "labels"
task = "label"
tokens_of = "both"

[[arms]]
name = "both"
task = "step_by_step"
axes.ALPHA = [0.3, 0.5]

[[when]]
arm = "both"
ALPHA = 0.3
settings.AdamW.learning_rate = 1e-3
"""


def study_of(tmp_path, text=BASIC) -> study.Study:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return study.read(str(path))


# --- Manifests ------------------------------------------------------------------------------------


def test_cells_are_the_product_of_the_axes_of_each_arm(tmp_path):
    cells = study_of(tmp_path).cells()
    assert len(cells) == 2 * 2 + 2 * 2 * 2 == len({cell.name for cell in cells})
    assert cells[0].name == "labels+TRAIN_FRACTION=0.25+RANDOM_SEED=0"
    assert cells[-1].name == "both+TRAIN_FRACTION=1.0+RANDOM_SEED=1+ALPHA=0.5"
    assert {cell.task for cell in cells} == {"arithmetic_label", "arithmetic_step_by_step"}
    rates = {c.point.get("ALPHA"): c.settings.get("AdamW.learning_rate") for c in cells}
    assert rates == {None: None, 0.3: 1e-3, 0.5: None}


def test_reference_has_the_same_values(tmp_path):
    made = study_of(tmp_path)
    for cell in made.cells()[:4]:
        other = made.reference(cell)
        assert other.arm.name == "both" and other.point["ALPHA"] == 0.3
        assert all(other.point[axis] == value for axis, value in cell.point.items())


def test_command_gives_what_the_manifest_says(tmp_path):
    made = study_of(tmp_path)
    cells = {cell.arm.name: cell for cell in made.cells()}  # the last of each

    def given(cell, *user):
        argv = ["x", *made.command(cell, user), "--gin.MODEL_DIR=/nowhere"]
        return configure.resolved_arguments(train.train, argv)

    both = given(cells["both"])
    assert both["objective"] == objectives.StepByStep(alpha=0.5, z_loss=0.0)
    assert both["data"].train_fraction == 1.0 and both["config"].random_seed == 1
    assert not both["config"].test_at_end
    assert isinstance(given(cells["labels"])["objective"], objectives.Standard)
    assert given(cells["labels"], "DROPOUT_RATE=0.2")["model"].dropout_rate == 0.2


@pytest.mark.parametrize(
    "setting", ["RANDOM_SEED=3", "MIXTURE_OR_TASK_NAME=svamp_label", "TRAIN_STEPS_RELATIVE=9"]
)
def test_what_the_study_decides_is_not_the_users(tmp_path, setting):
    with pytest.raises(ValueError, match=f"--gin.{setting.partition('=')[0]}: "):
        study_of(tmp_path).check_settings([setting])
    study_of(tmp_path).check_settings(["TRAIN_STEPS=3", "DATA_DIR=/data"])


def test_a_reference_needs_a_run_with_the_same_values(tmp_path):
    text = BASIC.replace('tokens_of = "both"', 'tokens_of = "both"\naxes.ALPHA = [0.9]')
    made = study_of(tmp_path, text)
    with pytest.raises(ValueError, match="'both', whose tokens it takes, has no run with ALPHA"):
        made.reference(made.cells()[0])


def test_results_of_other_settings_are_refused(tmp_path):
    made = study_of(tmp_path)
    labels, both = made.cells()[0], made.cells()[-1]
    out = str(tmp_path / "out")

    def keep(job, cell):
        kept = {"made_with": job.identity(cell), "lines": [{"test": 1}]}
        path = tmp_path / "out" / "cells" / f"{cell.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept))

    job = study.Job(made, out, ["DROPOUT_RATE=0.1", "DATA_DIR=/data"])
    for cell in (labels, both):
        assert study.read_result(job, cell) is None
        keep(job, cell)
        assert study.read_result(job, cell) == [{"test": 1}]
    # Another place, another order: the same run.
    moved = study.Job(made, out, ["DATA_DIR=/elsewhere", "DROPOUT_RATE=0.1"])
    assert study.read_result(moved, labels) == [{"test": 1}]
    with pytest.raises(ValueError, match="DROPOUT_RATE was 0.1, is 0.5. Give the same"):
        study.read_result(study.Job(made, out, ["DROPOUT_RATE=0.5"]), both)
    # What its length follows from counts, too.
    longer = study_of(tmp_path, BASIC.replace("axes.ALPHA", "settings.BATCH_SIZE = 4\naxes.ALPHA"))
    with pytest.raises(ValueError, match="tokens_of was"):
        study.read_result(study.Job(longer, out, job.settings), labels)
    # And a run that is under way.
    (tmp_path / "out" / "cells" / f"{both.name}.json").unlink()
    folder = job.run_dir(both)
    folder.mkdir(parents=True)
    (folder / "study.json").write_text(json.dumps({"made_with": job.identity(both)}))
    assert study.read_result(job, both) is None
    with pytest.raises(ValueError, match="study.json is of other settings"):
        study.read_result(study.Job(made, out, ["DROPOUT_RATE=0.5"]), both)


def test_trained_on_one_dataset_and_tested_on_another(tmp_path):
    text = BASIC.replace('name = "both"', 'name = "both"\ndataset = "arithmetic_noisy"')
    (cell,) = [c for c in study_of(tmp_path, text).cells() if c.arm.name == "both"][:1]
    assert cell.task == "arithmetic_noisy_step_by_step"
    assert cell.point["dataset"] == "arithmetic"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("title =", "titel =", "Did you mean title"),
        ('task = "label"', 'task = "lable"', "Did you mean label"),
        ('tokens_of = "both"', 'tokens_of = "bth"', "tokens_of must be one of"),
        ('tokens_of = "both"', 'tokens_of = "labels"', "tokens_of must be one of"),
        ('tokens_of = "both"', 'tokens_of = "both"\nsettings.TRAIN_STEPS = 3', "has both"),
        ("RANDOM_SEED = [0, 1]", "RANDOM_SEED = [0, 0]", "a value twice"),
        ("RANDOM_SEED = [0, 1]", "RANDOM_SEED = 3", "must be a list of values"),
        ('dataset = "arithmetic"', "", "names no dataset"),
        ('baseline = "labels"', 'baseline = "gold"', "baseline is 'gold'"),
        ("ALPHA = 0.3", "BETA = 0.3", "no arm has this axis"),
        ("TRAIN_STEPS = 4", 'MODEL_DIR = "/tmp/x"', "set by the study: each run has a folder"),
        ("TRAIN_STEPS = 4", "TRAIN_STEPS_RELATIVE = 4", "TRAIN_STEPS is the number of updates"),
        ("evaluations = 2", "evaluations = 0", "must be positive"),
        ('name = "both"', 'name = "labels"', "two arms are called"),
        ("[axes]", "[axes", "not TOML"),
    ],
)  # fmt: skip
def test_a_bad_manifest_names_file_and_entry(tmp_path, old, new, said):
    assert old in BASIC
    with pytest.raises(ValueError, match="mine.toml: .*") as error:
        study_of(tmp_path, BASIC.replace(old, new, 1))
    assert said in str(error.value)


def test_an_unknown_manifest_lists_those_there_are():
    with pytest.raises(FileNotFoundError, match="Did you mean arithmetic_alpha.toml"):
        study.read("aritmetic_alpha.toml")


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_shipped_manifests_resolve(path):
    made = study.read(str(path))
    # Every value of every axis once.
    seen = set()
    for cell in made.cells():
        values = {(cell.arm.name, axis, str(value)) for axis, value in cell.point.items()}
        if values <= seen:
            continue
        seen |= values
        argv = ["x", *made.command(cell), "--gin.MODEL_DIR=/nowhere"]
        given = configure.resolved_arguments(train.train, argv)
        both = isinstance(given["objective"], objectives.StepByStep)
        assert both == ("step_by_step" in cell.arm.task)
    head = path.read_text().split("title =")[0]
    name = path.relative_to(ROOT / "gin_configs" / "studies")
    assert f"scripts/study.py {name} " in head, "the header has the command"


# --- What is read off -----------------------------------------------------------------------------


def without_alpha(axis="TRAIN_FRACTION = [0.25, 1.0]", text=BASIC):
    """The manifest with another axis, and none of an arm's own."""
    text = text.replace("TRAIN_FRACTION = [0.25, 1.0]", axis).split("[[when]]")[0]
    return text.replace("axes.ALPHA = [0.3, 0.5]", "")


def line(arm, fraction, seed, test, **more):
    found = {
        "arm": arm, "dataset": "arithmetic", "tested_on": "arithmetic", "task": "arithmetic_label",
        "TRAIN_FRACTION": fraction,
        "RANDOM_SEED": seed, "test": test, "validation": test, "parameters": 1000,
        "examples": round(1000 * fraction), "steps": 10, "tokens": 10_000, "n": 400,
        "standard_error": 0.02, "metric": "accuracy", "teacher": 0.9,
    }  # fmt: skip
    return found | more


def summed(tmp_path, values) -> summary.Summary:
    """values: {(arm, fraction): accuracies of seeds 0, 1, ...}."""
    lines = [
        line(arm, fraction, seed, test)
        for (arm, fraction), tests in values.items() for seed, test in enumerate(tests)
    ]  # fmt: skip
    return study.summarize(study_of(tmp_path, without_alpha()), lines)


def test_means_over_seeds_have_students_interval(tmp_path):
    from scipy import stats

    found = summed(tmp_path, {("labels", 0.25): [0.2, 0.3, 0.7], ("both", 0.25): [0.5, 0.5, 0.9]})
    point = found.points[0]
    low, high = stats.t.interval(0.95, 2, point.mean, stats.sem(point.test))
    assert point.mean == pytest.approx(0.4)
    assert (point.mean - point.half_width, point.mean + point.half_width) == pytest.approx(
        (low, high)
    )
    (difference,) = found.differences  # seed by seed: 0.3, 0.2, 0.2
    assert difference.mean == pytest.approx(0.7 / 3)
    _, high = stats.t.interval(0.95, 2, 0.7 / 3, stats.sem([0.3, 0.2, 0.2]))
    assert difference.mean + difference.half_width == pytest.approx(high)
    assert difference.verdict == "better"


def test_one_seed_has_no_interval(tmp_path):
    found = summed(tmp_path, {("labels", 1.0): [0.2], ("both", 1.0): [0.5]})
    assert math.isnan(found.points[0].half_width)
    assert found.differences[0].verdict == "one seed"
    assert "nan" not in study.markdown(found)


def test_examples_to_match_the_baseline_lie_where_the_curve_crosses(tmp_path):
    values = {
        ("labels", 0.25): [0.1, 0.1], ("labels", 1.0): [0.5, 0.5],
        ("both", 0.25): [0.3, 0.3], ("both", 1.0): [0.7, 0.7],
    }  # fmt: skip
    (crossing,) = summed(tmp_path, values).examples
    # Half way from 0.3 to 0.7 is half way from 250 to 1000 on a logarithmic axis.
    assert crossing.at == pytest.approx(500)
    assert (crossing.low, crossing.high, crossing.reached) == pytest.approx((500, 500, 1))
    text = study.markdown(summed(tmp_path, values))
    assert "both reaches labels on 1,000 examples (0.5000) with 500 examples, 50% of them" in text


def test_a_level_that_is_not_reached_is_said_to_be_so(tmp_path):
    values = {
        ("labels", 0.25): [0.4, 0.5], ("labels", 1.0): [0.8, 0.9],
        ("both", 0.25): [0.3, 0.4], ("both", 1.0): [0.7, 0.8],
    }  # fmt: skip
    (crossing,) = summed(tmp_path, values).examples
    assert crossing.at is None and crossing.low is None and 0 <= crossing.reached < 0.5
    assert "at none of 250 to 1,000 examples" in study.markdown(summed(tmp_path, values))


def test_intervals_of_a_crossing_are_wider_where_seeds_differ(tmp_path):
    rng = np.random.default_rng(0)

    def width(spread):
        values = {
            (arm, fraction): list(level + spread * rng.standard_normal(6))
            for arm, fraction, level in (
                ("labels", 0.25, 0.1), ("labels", 1.0, 0.5), ("both", 0.25, 0.3), ("both", 1.0, 0.7)
            )
        }  # fmt: skip
        (crossing,) = summed(tmp_path, values).examples
        return crossing.high - crossing.low

    assert 0 < width(0.005) < width(0.05)


def test_the_smallest_student_that_passes_the_teacher(tmp_path):
    text = without_alpha("T5Config.emb_dim = [32, 64, 96]")
    made = study_of(tmp_path, text)
    lines = [
        line(arm, 1.0, seed, test, parameters=size * 100, **{"T5Config.emb_dim": size})
        for arm, tests in (("labels", (0.5, 0.6, 0.7)), ("both", (0.6, 0.91, 0.99)))
        for size, test in zip((32, 64, 96), tests, strict=True)
        for seed in (0, 1)
    ]
    found = study.summarize(made, lines)
    assert [(c.arm, c.at) for c in found.sizes] == [("labels", None), ("both", 6400.0)]
    assert found.axes == ["T5Config.emb_dim"]


def test_datasets_are_told_apart_and_mixtures_are_not_seeds(tmp_path):
    text = without_alpha('dataset = ["cqa", "all"]', BASIC.replace('dataset = "arithmetic"', ""))
    made = study_of(tmp_path, text)
    lines = [
        line(arm, 1.0, seed, test + shift, dataset=dataset, tested_on="cqa", task="cqa_label")
        for arm, shift in (("labels", 0.0), ("both", 0.1))
        for dataset, test in (("cqa", 0.1), ("all", 0.8))
        for seed in (0, 1)
    ]
    found = study.summarize(made, lines)
    assert [(p.arm, p.axes["dataset"], round(p.mean, 3)) for p in found.points] == [
        ("labels", "cqa", 0.1), ("labels", "all", 0.8), ("both", "cqa", 0.2), ("both", "all", 0.9)
    ]  # fmt: skip
    assert [round(d.mean, 3) for d in found.differences] == [0.1, 0.1]
    assert "dataset" in study.markdown(found)


def test_several_datasets_have_a_column_in_both_tables(tmp_path):
    text = without_alpha('dataset = ["cqa", "svamp"]', BASIC.replace('dataset = "arithmetic"', ""))
    lines = [
        line(arm, 1.0, 0, 0.5, dataset=dataset, tested_on=dataset, task=f"{dataset}_label")
        for arm in ("labels", "both") for dataset in ("cqa", "svamp")
    ]  # fmt: skip
    shown = study.markdown(study.summarize(study_of(tmp_path, text), lines, missing=3))
    rows = [row.split("|")[1:3] for row in shown.splitlines() if row.startswith("| svamp")]
    assert len(rows) == 3  # two points, one difference
    assert "3 runs are missing" in shown


def test_a_baseline_without_a_seed_is_compared_on_the_others(tmp_path):
    found = summed(tmp_path, {("labels", 1.0): [0.2, 0.3], ("both", 1.0): [0.4, 0.6, 0.9]})
    (difference,) = found.differences
    assert difference.seeds == 2 and difference.mean == pytest.approx(0.25)


def test_files_are_the_same_for_the_same_results(tmp_path):
    values = {
        (arm, fraction): [0.2 + fraction / 2, 0.3 + fraction / 2]
        for arm in ("labels", "both") for fraction in (0.25, 1.0)
    }  # fmt: skip
    found = summed(tmp_path, values)
    for name in ("a", "b"):
        written = study.write(found, str(tmp_path / name))
    assert [p.name for p in written] == [
        "results.jsonl", "results.md", "train_fraction.png", "train_fraction.svg",
    ]  # fmt: skip
    for path in written:
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()
    image = (tmp_path / "a" / "train_fraction.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 20_000
    assert len((tmp_path / "a" / "results.jsonl").read_text().splitlines()) == 8


def test_an_axis_of_names_has_no_plot(tmp_path):
    text = without_alpha('PARSING = ["reference", "repaired"]')
    lines = [
        line("labels", 1.0, 0, 0.5, PARSING=parsing) for parsing in ("reference", "repaired")
    ]  # fmt: skip
    found = study.summarize(study_of(tmp_path, text), lines)
    assert [p.suffix for p in files.write(found, str(tmp_path / "out"))] == [".jsonl", ".md"]
    assert "| labels | repaired | 1,000 " in " ".join(study.markdown(found).split())


# --- The pool, with processes that do nothing else than end ---------------------------------------


def cells(number):
    arm = manifest.Arm("a", "label")
    return [manifest.Cell(f"cell{i}", arm, {}, {}) for i in range(number)]


def python(code):
    return lambda cell: [sys.executable, "-c", code, cell.name]


def test_one_that_fails_does_not_stop_the_others(tmp_path):
    code = (
        "import sys; print('Error: out of cheese') if '1' in sys.argv[1] else 0;"
        "sys.exit({'cell1': 2, 'cell2': 76}.get(sys.argv[1], 0))"
    )
    (tmp_path / "cell1.txt").write_text("Error: of an earlier attempt\n")
    (tmp_path / "cell3.txt").write_text("Error: of an earlier attempt\n")
    outcome = pool.run_cells(cells(4), python(code), str(tmp_path), 2)
    assert sorted(outcome.done) == ["cell0", "cell3"]
    assert outcome.failed == {"cell1": "Error: out of cheese"}
    assert outcome.busy == ["cell2"] and not outcome.stopped
    assert "out of cheese" in (tmp_path / "cell1.txt").read_text()


def test_a_run_that_was_preempted_goes_on(tmp_path):
    code = (
        "import os, sys; seen = os.path.exists(sys.argv[1]); open(sys.argv[1], 'w');"
        "sys.exit(0 if seen else 75)"
    )
    command = lambda cell: [sys.executable, "-c", code, str(tmp_path / "seen")]  # noqa: E731
    outcome = pool.run_cells(cells(1), command, str(tmp_path / "logs"))
    assert outcome.done == ["cell0"]


def test_sigterm_is_passed_on_and_nothing_is_started_after_it(tmp_path):
    code = (
        "import signal, sys, time;"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75));"
        "open(sys.argv[1] + '.up', 'w'); time.sleep(60)"
    )

    def command(cell):
        return [sys.executable, "-c", code, str(tmp_path / cell.name)]

    def terminate():
        while not (tmp_path / "cell0.up").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    outcome = pool.run_cells(cells(3), command, str(tmp_path / "logs"), 1)
    assert outcome.stopped == ["cell0"] and not outcome.done and outcome.signalled
    assert not (tmp_path / "cell1.up").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_workers_share_out_what_there_is(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(pool.glob, "glob", lambda at: ["a", "b"] if "nvidia" in at else [])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert pool.places(None) == [{"CUDA_VISIBLE_DEVICES": card} for card in "01"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,5,7")
    assert pool.places(None) == [{"CUDA_VISIBLE_DEVICES": card} for card in "0257"]
    assert pool.places(2) == [{"CUDA_VISIBLE_DEVICES": "0,2"}, {"CUDA_VISIBLE_DEVICES": "5,7"}]
    with pytest.raises(ValueError, match="--workers=5, but there are 4 GPUs"):
        pool.places(5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 1, 2, 0}, raising=False)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert pool.places(None) == [{}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert pool.places(2) == [{"STUDY_CORES": "0,1"}, {"STUDY_CORES": "2,3"}]


def test_a_run_keeps_to_its_cores():
    code = "import os; from distill.study import pool; pool.take_place();"
    code += "print(len(os.sched_getaffinity(0)))"
    core = str(min(os.sched_getaffinity(0)))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "STUDY_CORES": core},
    )  # fmt: skip
    assert done.stdout == "1\n"


def test_a_run_that_another_process_has_in_hand_is_left_alone(tmp_path):
    made = study_of(tmp_path)
    job = study.Job(made, str(tmp_path / "out"))
    folder = job.run_dir(made.cells()[0])
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit) as ended:
            study.run_cell(job, made.cells()[0])
    assert ended.value.code == study.EXIT_BUSY
    assert not (folder / "study.json").exists()


# --- A real one -----------------------------------------------------------------------------------

SMALL = """
title = "a study"
dataset = "arithmetic"
files = ["t5_1_1/tiny.gin", "quickstart.gin"]
evaluations = 2

[settings]
TRAIN_STEPS = 4

[[arms]]
name = "labels"
task = "label"
tokens_of = "both"
settings.TASK_FEATURE_LENGTHS = {inputs = 44, targets = 4}

[[arms]]
name = "both"
task = "step_by_step"
dataset = "arithmetic_noisy"
"""


def environment(tmp_path):
    return {
        **os.environ, "PYTHONPATH": str(ROOT), "DISTILL_CACHE_DIR": str(tmp_path / "cache"),
        "XLA_FLAGS": "",
    }  # fmt: skip


def run_study(tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, "scripts/study.py", str(tmp_path / "small.toml"),
         f"--output_dir={tmp_path / 'out'}", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=500,
        env=environment(tmp_path),
    )  # fmt: skip


def test_a_study_goes_on_and_its_results_are_the_same_to_the_last_bit(tmp_path):
    (tmp_path / "small.toml").write_text(SMALL)
    done = run_study(tmp_path, "--workers=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 runs, 2 to do here" in done.stdout and "2 of 2 runs are done" in done.stdout
    out = tmp_path / "out"
    first = (out / "results.jsonl").read_bytes()
    labels, both = map(json.loads, first.splitlines())
    assert (labels["arm"], both["arm"]) == ("labels", "both")
    assert both["trained_on"] == "arithmetic_noisy_step_by_step"
    assert both["dataset"] == "arithmetic" and both["teacher"] == 1.0 and both["n"] == 1200
    assert both["steps"] == 4 and both["chosen_step"] in (2, 4)
    assert 0 <= both["validation"] <= 1 and 0 <= labels["validation"] <= 1
    assert labels["tokens"] == pytest.approx(both["tokens"], rel=0.1)
    assert labels["steps"] > both["steps"]

    # Training has not looked at the test split.
    kept = results.Store(out / "runs" / "both+RANDOM_SEED=0" / students.RESULTS).lines()
    tested = {line["key"] for line in kept if line["split"] == "test" and line["run"] != "teacher"}
    assert len(tested) == 1 and not tested.pop().startswith("training/")

    # One run again: the same bits. The other is not touched.
    kept = (out / "cells" / "labels+RANDOM_SEED=0.json").stat().st_mtime_ns
    (out / "cells" / "both+RANDOM_SEED=0.json").unlink()
    subprocess.run(["rm", "-r", str(out / "runs" / "both+RANDOM_SEED=0")], check=True)
    listed = run_study(tmp_path, "--list")
    (command,) = listed.stdout.splitlines()
    assert listed.returncode == 0 and "--cell=both+RANDOM_SEED=0" in command
    # As a scheduler would run it, from another folder.
    subprocess.run(
        shlex.split(command), cwd=tmp_path, env=environment(tmp_path), check=True, timeout=500
    )
    again = run_study(tmp_path)
    assert "2 of 2 runs are done" in again.stdout, again.stdout + again.stderr
    assert (out / "results.jsonl").read_bytes() == first
    assert (out / "cells" / "labels+RANDOM_SEED=0.json").stat().st_mtime_ns == kept

    # Other settings are another study.
    other = run_study(tmp_path, "--gin.DROPOUT_RATE=0.5")
    assert other.returncode == 2
    assert "DROPOUT_RATE was 0.0, is 0.5" not in other.stderr  # it was not given at all
    assert "DROPOUT_RATE was not given, is 0.5" in other.stderr and "--output_dir" in other.stderr
