"""Answers to texts: from Python, and of files of JSON lines."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from test_evaluate import counted, save
from test_evaluate import run as run  # the fixture: a run with five checkpoints

import distill
from distill import decode, metrics, predictor, prompts, students

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / "scripts" / "infer.py"
TEXTS = [f"Ann has {n} nuts, gets {n % 3}." for n in range(40)]


@pytest.fixture(autouse=True)
def programs(tmp_path_factory, monkeypatch):
    """Where the command keeps what it compiles."""
    monkeypatch.setenv("DISTILL_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "programs"))


@pytest.fixture(scope="module")
def student(run):
    return predictor.Predictor(str(run), batch_size=4)


def lines(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def write(path, rows):
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return str(path)


def test_three_lines_of_python(run):
    answers = distill.Predictor(str(run))(TEXTS[:3], explain=True)
    assert len(answers) == 3 and all(a.rationale is not None for a in answers)
    # What a student is asked, and what its probability is of.
    student = students.load(*students.find(str(run)))
    for text, answer in zip(TEXTS, answers, strict=False):
        for prompt, said in ((prompts.PREDICT, answer.label), (prompts.EXPLAIN, answer.rationale)):
            ids = student.vocabulary.encode_input(prompt + text)
            generated = student.answer([ids], max_length=student.limit("targets"))
            assert student.texts(generated)[0][0] == said
            if prompt == prompts.PREDICT:
                assert answer.probability == pytest.approx(
                    np.exp(generated.log_probs[0][0]), rel=1e-4
                )


def test_answers_do_not_depend_on_the_company(student):
    together = student(TEXTS[:9])
    assert [a.label for a in together] == [student([text])[0].label for text in TEXTS[:9]]


def test_a_label_is_as_long_as_the_student_writes_it(student, monkeypatch, caplog):
    """64 tokens are tried first; what they cut is written to the end, and a cut there is said."""
    texts, asked = ["short", "long " * 20, "endless " * 99], []

    def generate(params, net, inputs, mesh, decoding, *, max_length, **_):
        asked.append(max_length)
        encode = student.student.vocabulary.encode
        said = [[np.array(encode(texts[len(x) - 12][:max_length]), np.int32)] for x in inputs]
        return decode.Generated(said, [[-1.0] for _ in said])

    monkeypatch.setattr(decode, "generate", generate)
    monkeypatch.setattr(predictor.Predictor, "_filled", lambda self, asked: asked)
    answers = student(["xy", "xyz", "wxyz"])  # and the prompt, and EOS: 12, 13 and 14 tokens
    assert [a.label for a in answers] == ["short", "long " * 20, ("endless " * 99)[:256]]
    assert asked == [64, 256]
    assert "1 of 2 answers were cut at 256 tokens" in caplog.text


def test_inputs_that_come_one_by_one_need_few_programs(run):
    """One for each power of two of their number and of their length."""
    student = predictor.Predictor(str(run))
    with jax.log_compiles(), counted() as names:
        for number, length in ((17, 16), (18, 9), (24, 12), (25, 20), (30, 11), (32, 22)):
            student(["x" * length, *["x"] * (number - 1)], options=["1"])
    assert sum("_score" in name for name in names) == 1


def test_options_are_chosen_by_likelihood(student):
    for answer in student(TEXTS[:5], options=["yes", "no", "perhaps"]):
        assert answer.label in ("yes", "no", "perhaps") and 1 / 3 <= answer.probability <= 1


def test_samples_differ_by_seed_and_greedy_answers_do_not(student):
    def said(seed):
        how = decode.Decoding("sample", temperature=2.0, seed=seed)
        return [a.label for a in student(TEXTS[:4], decoding=how)]

    assert said(0) == said(0) != said(1)


def test_forms(tmp_path):
    save(tmp_path / "label", 1, 0, mixture="arithmetic_label")
    save(tmp_path / "cot", 1, 0, mixture="arithmetic_rationale_label")
    label = predictor.Predictor(str(tmp_path / "label"))
    assert label.form == "label" and label(TEXTS[:1])[0].rationale is None
    with pytest.raises(ValueError, match="trained on labels alone.*cannot explain"):
        label(TEXTS[:1], explain=True)
    single = predictor.Predictor(str(tmp_path / "cot"))
    (answer,) = single(TEXTS[:1], explain=True)
    assert isinstance(answer.rationale, str)
    with pytest.raises(ValueError, match="writes more than a label"):
        single(TEXTS[:1], options=["1", "2"])
    with pytest.raises(ValueError, match="Input 1 is empty"):
        label(["a", " "])
    assert label([]) == []
    with pytest.raises(ValueError, match="answers to the form 'label', not 'predict'"):
        predictor.Predictor(str(tmp_path / "label"), form="predict")
    with pytest.raises(ValueError, match="form must be one of label, predict"):
        predictor.Predictor(str(tmp_path / "label"), form="explain")
    save(tmp_path / "alone", 1, 0, mixture="arithmetic_predict")
    with pytest.raises(ValueError, match="trained on labels alone.*cannot explain"):
        predictor.Predictor(str(tmp_path / "alone"))(TEXTS[:1], explain=True)


def test_a_form_that_nobody_knows_has_to_be_given(tmp_path):
    save(tmp_path, 1, 0, mixture="my_mixture")
    with pytest.raises(ValueError, match=r"trained on 'my_mixture'\). Give form= .*predict"):
        predictor.Predictor(str(tmp_path))
    assert predictor.Predictor(str(tmp_path), form="predict").explains


def test_a_file_is_answered_in_order_and_bad_lines_are_skipped(student, tmp_path, caplog):
    rows = [{"input": text, "id": i} for i, text in enumerate(TEXTS[:6])]
    source = write(tmp_path / "in.jsonl", [
        rows[0], "not json", rows[1], '["a"]', {"id": 7}, {"input": 3}, {"input": " "}, "",
        '{"input": "half an emoji \\ud83d"}', rows[2], *rows[3:],
    ])  # fmt: skip
    output = tmp_path / "out.jsonl"
    assert predictor.infer(student, source, str(output), explain=True) == (6, 7)
    found = lines(output)
    assert [(row["id"], row["line"]) for row in found] == [
        (0, 1), (1, 3), (2, 10), (3, 11), (4, 12), (5, 13),
    ]  # fmt: skip
    for row, answer in zip(found, student(TEXTS[:6], explain=True), strict=True):
        assert (row["label"], row["rationale"]) == (answer.label, answer.rationale)
        assert row["input"] == TEXTS[row["id"]]
    for number, reason in ((2, "not valid JSON"), (4, "not a JSON object"), (5, "no text under")):
        assert f"in.jsonl:{number}: {reason}" in caplog.text
    # All is done: nothing is added, not even by a second call.
    predictor.infer(student, source, str(output), explain=True)
    assert lines(output) == found


def test_an_interrupted_file_goes_on(run, student, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"question": text} for text in TEXTS * 4])
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    predictor.infer(student, source, str(whole), field="question")
    command = [
        sys.executable, str(SCRIPT), f"--checkpoint_path={run}", f"--input={source}",
        f"--output={killed}", "--field=question", "--batch_size=4",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as child:
        while child.poll() is None and not (killed.exists() and killed.stat().st_size):
            time.sleep(0.002)
        os.kill(child.pid, signal.SIGKILL)
    done = killed.read_bytes()
    assert 0 < done.count(b"\n") < len(TEXTS) * 4
    killed.write_bytes(done + b'{"torn": ')
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert killed.read_bytes() == whole.read_bytes()
    assert f"{len(TEXTS) * 4 - done.count(bytes([10]))} lines answered" in again.stderr


def test_another_input_or_student_is_refused(run, student, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"input": text} for text in TEXTS[:3]])
    output = str(tmp_path / "out.jsonl")
    predictor.infer(student, source, output)
    other = write(tmp_path / "other.jsonl", [{"input": text} for text in TEXTS[3:6]])
    with pytest.raises(ValueError, match="answers to another input"):
        predictor.infer(student, other, output)
    second = predictor.Predictor(str(run / "checkpoint_10"))
    with pytest.raises(ValueError, match="choose another --output"):
        predictor.infer(second, source, output)
    for text in ("no json", "[1]"):
        with pytest.raises(ValueError, match="is not an output of infer"):
            predictor.infer(student, source, write(tmp_path / "text", [text]))
    for how in (dict(explain=True), dict(options=["1", "2"])):
        with pytest.raises(ValueError, match="stands for the weights.*choose another --output"):
            predictor.infer(student, source, output, **how)
    with pytest.raises(ValueError, match="written with another --prefix"):
        predictor.infer(student, source, output, prefix="student_")


def test_a_field_of_ones_own_is_never_replaced(student, tmp_path):
    rows = [{"input": TEXTS[0], "label": "gold", "rationale": "mine"}]
    source, output = write(tmp_path / "in.jsonl", rows), str(tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="in.jsonl:1 has a field 'label'.*--prefix=student_ names"):
        predictor.infer(student, source, output)
    predictor.infer(student, source, output, prefix="student_")
    predictor.infer(student, source, output, prefix="student_")  # goes on behind the last line
    (row,) = lines(output)
    assert {name: row[name] for name in rows[0]} == rows[0]
    assert row.keys() - rows[0].keys() == {
        "student_label", "student_probability", "student_line", "student_student",
    }  # fmt: skip
    assert row["student_label"] == student(TEXTS[:1])[0].label
    kept = write(tmp_path / "kept.jsonl", [{"input": TEXTS[0], "rationale": "mine"}])
    predictor.infer(student, kept, str(tmp_path / "kept.out"))  # that is not asked for
    assert lines(tmp_path / "kept.out")[0]["rationale"] == "mine"
    with pytest.raises(ValueError, match="--field=label: an answer has a field of this name"):
        predictor.infer(student, source, output, field="label")


def test_a_pipe(run):
    command = [sys.executable, str(SCRIPT), f"--checkpoint_path={run}", "--input=-", "--output=-"]
    text = "".join(json.dumps({"input": t}) + "\n" for t in TEXTS[:3]) + "bad\n"
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=True)
    assert [json.loads(line)["input"] for line in done.stdout.splitlines()] == TEXTS[:3]
    assert "-:4: not valid JSON" in done.stderr and "3 lines answered, 1 skipped" in done.stderr
    assert all(
        isinstance(json.loads(line)["probability"], float) for line in done.stdout.splitlines()
    )


def test_a_pipe_that_pauses_is_answered(run):
    """As that of `tail -f`: an answer comes before the next line, and before the end."""
    command = [sys.executable, str(SCRIPT), f"--checkpoint_path={run}", "--input=-", "--output=-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        watch = threading.Timer(240, child.kill)
        watch.start()
        for text in TEXTS[:2]:
            child.stdin.write(json.dumps({"input": text}).encode() + b"\n")
            child.stdin.flush()
            assert json.loads(child.stdout.readline())["input"] == text
        child.stdin.close()
        assert child.wait() == 0
        watch.cancel()


def test_an_error_of_the_input_is_raised(student):
    def broken():
        yield 1, "a"
        raise OSError("gone")

    blocks = predictor._blocks(broken(), 4)
    assert next(blocks) == [(1, "a")]
    with pytest.raises(OSError, match="gone"):
        next(blocks)


def test_blocks_are_full_where_the_input_is_there():
    numbered = list(enumerate("abcdefg", 1))
    blocks = list(predictor._blocks(iter(numbered), 3))
    assert blocks == [numbered[:3], numbered[3:6], numbered[6:]]
    assert list(predictor._blocks(iter([]), 3)) == []


def test_flags_are_checked(run):
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2 and "--checkpoint_path is missing" in done.stderr


@pytest.mark.parametrize(
    "text, form, answer, rationale",
    [("2 and 2. So the answer is 4", "rationale_label", "4", "2 and 2."),
     ("cut off", "rationale_label", "", "cut off"),
     ("4 Explanation: 2 and 2.", "label_rationale", "4", "2 and 2."),
     ("4", "label_rationale", "4", ""),
     ("4", "label", "4", None)],
)  # fmt: skip
def test_a_text_is_cut_into_answer_and_rationale(text, form, answer, rationale):
    assert metrics.answer(text, form) == answer and metrics.rationale(text, form) == rationale
