"""Results: found, read, chosen by validation, compared, and written as tables and plots."""

import csv
import io
import json
import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree

import evaluation_results
import pytest
from etils import epath

from distill import report
from distill.report import results as results_lib
from distill.report import summary

ROOT = pathlib.Path(__file__).parents[1]


def row(value=0.5, run="/runs/a", step=1, split="test", dataset="toy", **fields):
    return {
        "run": run, "dataset": dataset, "task": f"{dataset}_predict", "split": split, "step": step,
        "metric": "accuracy", "value": value, "decoder": "greedy",
        "key": f"{run} {dataset} {split} {step}", "n": 10, **fields,
    }  # fmt: skip


def saved(folder, rows, predictions=None):
    """Writes a results file, and predictions by their path beside it; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for path, examples in (predictions or {}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("".join(json.dumps(e) + "\n" for e in examples))
    return folder


def answers(correct, **fields):
    return [
        {
            "example_id": f"e{i}",
            "prediction": "p",
            "label": "p" if c else "q",
            "correct": c,
            **fields,
        }
        for i, c in enumerate(correct)
    ]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluated")
    evaluation_results.write(folder, n=60)
    return folder


@pytest.fixture(scope="module")
def made(evaluated):
    return report.build([str(evaluated)])


# --- Found ----------------------------------------------------------------------------------------


def test_results_are_found_in_files_folders_and_globs(tmp_path):
    deep = saved(tmp_path / "runs/a/inference_eval", [row()]) / "results.jsonl"
    other = saved(tmp_path / "runs/b", [row()]) / "results.jsonl"
    saved(tmp_path / "runs/a/checkpoint_5/state", [row()])  # not searched
    (tmp_path / "runs/b/notes.jsonl").write_text("{}")

    def found(*patterns):
        files, notes = report.find([str(tmp_path / p) for p in patterns])
        return sorted(map(str, files)), notes

    assert found("runs") == ([str(deep), str(other)], [])
    assert found("runs/a") == ([str(deep)], [])
    assert found("runs/b/results.jsonl", "runs/*") == ([str(deep), str(other)], [])
    assert found("runs/b/*.jsonl") == ([str(other)], [])
    files, notes = found("runs", "rums")
    assert len(files) == 2 and notes == [f"{tmp_path}/rums: no results.jsonl here"]


def test_no_results_is_an_error_that_says_where_was_looked(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/x, {tmp_path}/y") as error:
        report.build([f"{tmp_path}/x", f"{tmp_path}/y"])
    assert "scripts/evaluate.py" in str(error.value)
    with pytest.raises(ValueError, match="give the folder before it"):
        report.build([f"{tmp_path}/**/results.jsonl"])


def test_a_file_without_a_student_is_an_error_that_says_why(tmp_path):
    folder = saved(tmp_path, [row(run="teacher", step=None), row(value=None)])
    with pytest.raises(ValueError, match=r"line 2: 'value' is missing"):
        report.build([str(folder)])


# --- Read -----------------------------------------------------------------------------------------


def read(path):
    return report.read([epath.Path(path)])


def test_a_later_line_of_a_key_and_metric_replaces_the_earlier(tmp_path):
    rows = [row(0.1), row(0.2, step=2), row(0.3), row(0.4, metric="f1")]
    values, notes = read(saved(tmp_path, rows) / "results.jsonl")
    assert [(v.step, v.metric, v.value) for v in values] == [
        (1, "accuracy", 0.3),
        (2, "accuracy", 0.2),
        (1, "f1", 0.4),
    ]
    assert not notes


def test_damaged_lines_are_named_and_a_torn_last_one_is_not(tmp_path):
    good = json.dumps(row())
    deep = "[" * 100_000
    missing = json.dumps({k: v for k, v in row().items() if k != "dataset"})
    lines = [good, '{"run": "/r', "[1]", deep, "", missing, json.dumps(row(float("nan"))),
             json.dumps(row(n=True)), json.dumps(row(task=None)), good[:-5]]  # fmt: skip
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(lines))
    values, notes = read(path)
    assert [v.value for v in values] == [0.5]
    assert notes == [
        f"{path}, lines 2, 3, 4: not a JSON object, left out",
        f"{path}, line 6: 'dataset' is missing or unusable, left out",
        f"{path}, line 7: 'value' is missing or unusable, left out",
        f"{path}, line 8: 'n' is missing or unusable, left out",
        f"{path}, line 9: 'task' is missing, left out",
    ]
    path.write_text("\n".join([good, *["x"] * 9, good]) + "\n")
    assert read(path)[1] == [f"{path}, lines 2, 3, 4 and 6 more: not a JSON object, left out"]


def test_a_student_whose_format_keeps_no_step_is_there(tmp_path):
    (tmp_path / "results.jsonl").write_text(json.dumps(row(step=None)) + "\n")
    values, notes = read(tmp_path / "results.jsonl")
    assert [v.step for v in values] == [0] and not notes


def test_the_teacher_of_several_runs_is_there_once(made):
    teachers = [r for r in made.results if r.run == "teacher"]
    assert len(teachers) == 3 * 2
    assert set(made.teacher) == set(made.columns)
    assert all(r.split == "test" for r in made.teacher.values())


@pytest.mark.parametrize(
    "paths,names",
    [
        (["/runs/a/small", "/runs/b/small", "/runs/b/base"], ["a/small", "b/small", "base"]),
        (["gs://x/run/", "gs://y/run"], ["x/run", "y/run"]),
        (["/run", "/a/run"], ["/run", "a/run"]),
        (["run", "a/run"], ["run", "a/run"]),
        (["/a/b"], ["b"]),
    ],
)
def test_names_are_the_shortest_that_tell_runs_apart(paths, names):
    assert list(report.shortest_names(paths).values()) == names


# --- Chosen ---------------------------------------------------------------------------------------


def choice_of(tmp_path, rows):
    made = report.build([str(saved(tmp_path, rows))])
    (choice,) = made.choices.values()
    return choice, made


def test_the_best_step_is_by_validation_and_never_by_test(tmp_path):
    validation = {1: 0.2, 2: 0.6, 3: 0.6, 4: 0.5}
    test = {1: 0.9, 2: 0.3, 3: 0.7, 4: 0.8}
    rows = [row(v, step=s, split="validation") for s, v in validation.items()]
    choice, made = choice_of(tmp_path, rows + [row(v, step=s) for s, v in test.items()])
    assert (choice.best.step, choice.shown.value, choice.latest) == (
        2,
        0.3,
        4,
    )  # earliest of equals
    assert "0.300 (step 2)" in report.markdown(made)
    chosen = {(r["split"], r["step"]): r["chosen"] for r in rows_of(report.csv_table(made))}
    assert [key for key, said in chosen.items() if said == "yes"] == [
        ("validation", "2"),
        ("test", "2"),
    ]


def test_without_validation_the_latest_is_shown_and_it_says_so(tmp_path):
    choice, made = choice_of(tmp_path, [row(0.9, step=1), row(0.1, step=2)])
    assert choice.best is None and choice.shown.step == 2
    assert "0.100 (latest, step 2)" in report.markdown(made)
    assert "No validation values of a on toy: the latest checkpoint is shown." in made.notes[0]
    assert (
        "latest, step 2, test" in report.html_report(made) and made.panels[0].lines[0].best is None
    )


def test_a_best_step_without_test_shows_no_other_test(tmp_path):
    rows = [row(0.5, step=1, split="validation"), row(0.4, step=2, split="validation")]
    choice, made = choice_of(tmp_path, [*rows, row(0.9, step=2)])
    assert choice.shown is None
    assert "no test at step 1 (validation 0.500)" in report.markdown(made)
    page = report.html_report(made)
    assert "no test" in page and "0.900" not in page[: page.index("id=values")]


def test_a_checkpoint_measured_twice_counts_over_most_examples(tmp_path):
    rows = [row(0.5, key="a", n=10), row(0.7, key="b", n=1000), row(0.6, key="c", n=20)]
    choice, made = choice_of(tmp_path, rows)
    assert choice.shown.value == 0.7 and len(made.results) == 3
    assert any("1 values were measured more than once" in note for note in made.notes)
    again = [row(0.5, key="a"), row(0.7, key="b")]
    assert choice_of(tmp_path / "again", again)[0].shown.value == 0.7  # the last of equals


def test_tasks_of_one_dataset_share_a_column_unless_a_student_has_several(tmp_path):
    rows = [row(task="toy_predict"), row(run="/runs/b", task="toy_label")]
    made = report.build([str(saved(tmp_path / "x", rows))])
    assert [c.name for c in made.columns] == ["toy"] and len(made.choices) == 2
    rows.append(row(0.9, run="/runs/b", task="toy_predict", key="k"))
    made = report.build([str(saved(tmp_path / "y", rows))])
    assert [c.name for c in made.columns] == ["toy, toy_label", "toy, toy_predict"]
    values = {(student[0], c.task): choice.shown.value
              for (student, c), choice in made.choices.items()}  # fmt: skip
    assert values == {
        ("/runs/a", "toy_predict"): 0.5,
        ("/runs/b", "toy_label"): 0.5,
        ("/runs/b", "toy_predict"): 0.9,
    }


def test_each_decoder_of_a_run_is_a_student_of_its_own(tmp_path):
    rows = [row(0.5), row(0.6, decoder="beam4", key="k")]
    made = report.build([str(saved(tmp_path, rows))])
    assert [made.label(s) for s in made.students] == ["a, greedy", "a, beam4"]
    named = report.build([str(saved(tmp_path / "x", [row(run="/runs/teacher")]))])
    assert named.label(named.students[0]) == "runs/teacher"  # not taken for the teacher
    assert [c.shown.value for c in made.choices.values()] == [0.5, 0.6]


def test_curves_have_validation_the_chosen_step_its_test_and_the_teacher(made):
    assert [(p.column.name, p.metric) for p in made.panels] == [
        ("cqa", "accuracy"), ("esnli", "accuracy"), ("svamp", "accuracy"), ("svamp", "unparsed"),
    ]  # fmt: skip
    for panel in made.panels:
        assert panel.split == "validation" and len(panel.lines) == 3
        accuracy = panel.metric == "accuracy"
        assert (panel.teacher is not None) == accuracy
        for line in panel.lines:
            assert [p.step for p in line.points] == list(evaluation_results.STEPS)
            assert {p.split for p in line.points} == {"validation"}
            choice = made.choices[made.students[line.student], panel.column]
            assert line.best == line.test.step == choice.best.step and line.test.split == "test"
            if accuracy:
                assert line.test == choice.shown
                assert choice.best.value == max(p.value for p in line.points)


# --- Predictions ----------------------------------------------------------------------------------


def test_pairs_are_compared_on_their_common_examples(tmp_path):
    a, b = answers([True] * 12 + [False] * 8), answers([True] * 4 + [False] * 14)
    rows = [row(predictions="a.jsonl"), row(run="/runs/b", predictions="b.jsonl")]
    made = report.build([str(saved(tmp_path, rows, {"a.jsonl": a, "b.jsonl": b[::-1]}))])
    paired = made.comparisons[0].paired
    assert len(made.comparisons) == 1 and (paired.n, paired.only_a, paired.only_b) == (18, 8, 0)
    assert paired.p == pytest.approx(2 * 0.5**8) and paired.difference == pytest.approx(8 / 18)
    assert f"| toy     | a   | b   | +0.444 [{paired.low:.3f}, {paired.high:.3f}] | 8" in (
        report.markdown(made)
    )


def test_examples_are_of_the_chosen_and_the_latest_step(made):
    steps = {}
    for e in made.examples:
        steps.setdefault((e.result.student, e.result.dataset), set()).add(e.result.step)
        choice = made.choices[e.result.student, next(
            c for c in made.columns if c.dataset == e.result.dataset)]  # fmt: skip
        assert (e.is_best, e.is_latest) == (e.result.step == choice.step, e.result.step == 2500)
        assert len(e.rows) == 60
    assert len(steps) == 9
    for (student, dataset), found in steps.items():
        column = next(c for c in made.columns if c.dataset == dataset)
        assert found == {made.choices[student, column].step, 2500}


@pytest.mark.parametrize(
    "label,teacher,right",
    [
        ("a", " a ", True), ("a", "b", False), ("a", None, None), (None, "a", None),
        ("( 84.0 / 2.0 )", "(84 / 2)", True), ("( 84.0 / 2.0 )", "84 / 3", False),
        ("1 +", "1 +", True), ("1 +", "1", False),
    ],
)  # fmt: skip
def test_the_teacher_is_right_by_text_or_by_value(label, teacher, right):
    said = {"example_id": "x", "prediction": "p", "label": label, "teacher": teacher}
    assert summary._prediction(said)["teacher_correct"] is right


def test_predictions_of_another_evaluation_are_no_examples_of_a_value(tmp_path):
    """The file of a checkpoint's predictions holds those of its last evaluation."""
    rows = [
        row(n=200, key="all", predictions="a.jsonl"),
        row(n=1, key="few", predictions="a.jsonl"),
    ]
    said = {"a.jsonl": answers([True], key="few")}
    made = report.build([str(saved(tmp_path, rows, said))])
    (choice,) = made.choices.values()
    assert choice.shown.n == 200 and not made.examples
    assert "the predictions are those of another evaluation" in " ".join(made.notes)
    made = report.build([str(saved(tmp_path, rows[1:], said))])
    assert [len(e.rows) for e in made.examples] == [1] and not made.notes[1:]


def test_missing_predictions_are_noted_and_the_values_stay(tmp_path):
    outside = tmp_path / "secret.jsonl"
    outside.write_text(json.dumps({"example_id": "x", "prediction": "secret"}) + "\n")
    rows = [
        row(run="/runs/a", predictions="gone.jsonl"), row(run="/runs/b", predictions=None),
        row(run="/runs/c", predictions="../secret.jsonl"),
        row(run="/runs/d", predictions=str(outside)),
        row(run="/runs/e", predictions="e.jsonl"),
    ]  # fmt: skip
    good = answers([True, False])
    made = report.build([
        str(saved(tmp_path / "x", rows, {"e.jsonl": [good[0], {"no": "id"}, good[1]]}))
    ])  # fmt: skip
    assert [e.result.run for e in made.examples] == ["/runs/e"] and len(made.choices) == 5
    assert len(made.examples[0].rows) == 2
    page, notes = report.html_report(made), "\n".join(made.notes)
    for name, file in (("a", "gone"), ("b", "none"), ("c", "../secret"), ("d", str(outside))):
        assert (
            f"{name}: no examples where the predictions are not beside the results: {file}" in notes
        )
    assert "e.jsonl: 1 lines without example_id or prediction" in notes
    assert "gone.jsonl" in page and '"secret"' not in page


# --- Written --------------------------------------------------------------------------------------


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_has_every_value(made):
    rows = rows_of(report.csv_table(made))
    assert len(rows) == len(made.results) == 3 * 5 * 2 * 4 + 6
    for r, value in zip(rows, made.results, strict=True):
        assert float(r["value"]) == value.value and r["run_path"] == value.run
        assert r["run"] == made.names[value.run] and r["step"] == str(value.step or "")


def test_markdown_has_a_row_a_student_and_the_teacher(made):
    lines = report.markdown(made).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:6]] == [
        "labels/small", "base", "step_by_step/small", "teacher",
    ]  # fmt: skip
    assert len({len(line) for line in table[:6]}) == 1  # aligned
    for (student, column), choice in made.choices.items():
        line = next(x for x in table if f"| {made.names[student[0]]} " in x)
        cell = line.split("|")[4 + made.columns.index(column)]
        assert f"{choice.shown.value:.3f} [{choice.shown.low:.3f}, " in cell
        assert f"(step {choice.step})" in cell


def test_text_from_data_is_no_markup_in_markdown(tmp_path):
    run = "/runs/a|b<img src=x>`c`*d*&amp;\x1b[0m[x](y)"
    made = report.build([str(saved(tmp_path, [row(run=run, decoder="<b>")]))])
    line = report.markdown(made).splitlines()[6]
    assert r"\<img src=x>" in line and r"a\|b" in line and "\x1b" not in line
    assert r"\`c\`\*d\*\&amp;<ESC>[0m[x\](y)" in line.replace(r"\<ESC", "<ESC") and r"\<b>" in line


@pytest.mark.parametrize("over", ["step", "tokens"])
def test_plots_are_pictures_and_the_same_each_time(made, tmp_path, over):
    for name in ("a.png", "b.svg"):
        path = epath.Path(tmp_path / name)
        report.draw(made, path, over)
        first = path.read_bytes()
        report.draw(made, path, over)
        assert path.read_bytes() == first
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert xml.etree.ElementTree.parse(tmp_path / "b.svg").getroot().tag.endswith("svg")


def test_plots_differ_by_what_they_run_over_and_do_without_tokens_and_intervals(made, tmp_path):
    pictures = []
    for over in ("step", "tokens"):
        report.draw(made, epath.Path(tmp_path / "a.svg"), over)
        pictures.append((tmp_path / "a.svg").read_text())
    assert "training tokens" in pictures[1] and pictures[0] != pictures[1]
    # TeX in a name is text.
    bare = report.build([str(saved(tmp_path / "x", [row(dataset="$\\frac{$"), row(0.4, step=2)]))])
    report.draw(bare, epath.Path(tmp_path / "c.png"), "tokens")
    report.draw(bare, epath.Path(tmp_path / "c.png"), "step")


def test_files_are_read_as_a_user_has_them(evaluated, tmp_path):
    command = [sys.executable, str(ROOT / "scripts/report.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output = tmp_path / "made/report"
    done = subprocess.run(
        [*command, str(evaluated / "*" / "*"), str(evaluated), f"--output_dir={output}",
         "--max_examples=7"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(output / "report.html")
    assert (output / "results.md").read_text() in done.stdout
    assert {p.name for p in output.iterdir()} == {
        "report.html", "results.md", "results.csv", "curves.png", "curves.svg",
    }  # fmt: skip
    for given, said in (([str(tmp_path / "none")], "No results"), ([], "Give at least one")):
        done = subprocess.run([*command, *given], capture_output=True, text=True, env=environment)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_the_results_file_s_name_is_the_evaluations():
    assert results_lib.FILE == "results.jsonl"
