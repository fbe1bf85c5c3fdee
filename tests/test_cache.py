"""The row cache: what it keeps, when it is fresh, what a crash or a second builder does to it."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from distill import cache

TOY_TASKS = """
import dataclasses, pathlib
from distill import metrics, sources, task

@dataclasses.dataclass(frozen=True)
class Lines:
    splits = ("train", "validation")
    def files(self, split):
        return [str(pathlib.Path(sources.settings().data_dir) / f"{split}.txt")]
    def rows(self, split):
        lines = pathlib.Path(self.files(split)[0]).read_text().splitlines()
        return [sources.Row(f"toy/{split}/{i}", line, line[::-1], (sources.Answer(line.upper()),))
                for i, line in enumerate(lines)]

task.register("toy", source=Lines(), metric_fns=[metrics.label_accuracy])
"""

PROBE = """
import json, sys
from distill import cache
config = cache.RowsConfig("toy_step_by_step", "toy_tasks", data_dir=sys.argv[1],
                          cache_dir=sys.argv[2])
corpus = cache.load(config, sys.argv[3])
print(json.dumps({"tensorflow": "tensorflow" in sys.modules, "rows": [len(t) for t in corpus.tasks],
                  "fingerprint": corpus.fingerprint, "label": corpus.tasks[0].read([0])[0].label}))
"""


def probe(folder, split="train"):
    result = subprocess.run(
        [sys.executable, "-c", PROBE, str(folder / "data"), str(folder / "cache"), split],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip
    if result.returncode:
        return result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_a_fresh_cache_needs_no_tensorflow_and_a_stale_one_is_rebuilt(tmp_path):
    module = "from toy_helper import SUFFIX\n" + TOY_TASKS.replace("line.upper()", "line + SUFFIX")
    (tmp_path / "toy_tasks.py").write_text(module)
    (tmp_path / "toy_helper.py").write_text("SUFFIX = '1'\n")
    (tmp_path / "data").mkdir()
    rows = tmp_path / "data" / "train.txt"
    rows.write_text("abc\ndef\n")
    cold = probe(tmp_path)
    assert cold["rows"] == [2, 2] and cold["label"] == "cba"
    assert not cold["tensorflow"]  # tokenising has a process of its own
    (index,) = (tmp_path / "cache").rglob("index.json")
    built = index.stat().st_mtime_ns
    assert probe(tmp_path) == cold and index.stat().st_mtime_ns == built
    # A comment in the task module: read again, the same rows.
    (tmp_path / "toy_tasks.py").write_text(module + "\n# a comment\n")
    assert probe(tmp_path) == cold and index.stat().st_mtime_ns > built
    # What the module imports decides the rows too.
    (tmp_path / "toy_helper.py").write_text("SUFFIX = '2'\n")
    helped = probe(tmp_path)
    assert helped["rows"] == [2, 2] and helped["fingerprint"] != cold["fingerprint"]
    # Other rows: read again, another fingerprint.
    rows.write_text("abc\ndef\nghi\n")
    changed = probe(tmp_path)
    assert changed["rows"] == [3, 3] and changed["fingerprint"] != helped["fingerprint"]
    assert "no split 'test'" in probe(tmp_path, "test")
    rows.unlink()
    assert "train.txt" in probe(tmp_path)


def test_all_splits_that_were_built_together_are_fresh(tmp_path, monkeypatch):
    toy_folder(tmp_path, 5)
    (tmp_path / "data" / "validation.txt").write_text("abc\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = cache.RowsConfig(
        "toy_step_by_step", "toy_tasks", data_dir=str(tmp_path / "data"),
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    splits = ["train", "validation", "test"]
    assert cache.prepare(config, splits) == splits
    assert cache.prepare(config, splits) == []
    assert cache.prepare(config, splits, rebuild=True) == splits


def rows_of(n, first=0):
    """Rows as `task.tokenized_rows` gives them."""
    return [
        {
            "inputs": np.arange(2, 3 + i % 5), "targets": np.array([i + 2, 1]),
            "example_id": f"toy/{i}", "label": f"l{i} \u2028\u00e9", "loss_group": i % 2,
            "inputs_pretokenized": f"text {i}", "choice": 0, "loss_weight": 1000 - i,
        }
        for i in range(first, n)
    ]  # fmt: skip


FACTS = dict(name="toy_label", rate=2.0, metrics=["m.f"], dataset="toy", answer_form="label")


def write(folder, rows, population=None, facts=FACTS):
    folder.mkdir(exist_ok=True)
    name = cache.write_generation(folder, "toy", "train", [(facts, population, rows)])
    return cache.open_generation(folder / name)


def test_rows_come_back_as_they_were(tmp_path):
    rows = rows_of(20)
    corpus = write(tmp_path / "a", rows, [f"toy/{i}" for i in range(30)])
    (task,) = corpus.tasks
    assert len(task) == 20 and len(task.population) == 30
    assert {k: getattr(task, k) for k in FACTS} == FACTS | {"metrics": ("m.f",)}
    order = [7, 3, 3, 19]
    for i, record, tokens in zip(order, task.read(order), task.read_tokens(order), strict=True):
        for got in (record.inputs, tokens[0]):
            np.testing.assert_array_equal(got, rows[i]["inputs"])
        for got in (record.targets, tokens[1]):
            np.testing.assert_array_equal(got, rows[i]["targets"])
        assert record.example_id == rows[i]["example_id"] and record.label == rows[i]["label"]
        assert record.text == rows[i]["inputs_pretokenized"]
        assert task.lengths[i].tolist() == [len(rows[i]["inputs"]), 2]
        assert task.weights[i] == 1000 - i and task.loss_groups[i] == i % 2
        assert task.keys[i] == task.population[i]
    assert task.read([]) == []
    assert corpus.loss_groups == {0, 1}


def test_a_corpus_is_pickled_as_its_folder(tmp_path):
    corpus = write(tmp_path / "a", rows_of(2000))
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    np.testing.assert_array_equal(again.tasks[0].lengths, corpus.tasks[0].lengths)


def test_the_fingerprint_is_that_of_the_rows(tmp_path):
    base = write(tmp_path / "a", rows_of(5)).fingerprint
    assert write(tmp_path / "b", rows_of(5)).fingerprint == base
    changed = []
    for field, value in [
        ("inputs", np.array([9, 1])), ("label", "x"), ("loss_weight", 5), ("choice", 1),
        ("example_id", "toy/9"), ("loss_group", 1),
    ]:  # fmt: skip
        rows = rows_of(5)
        rows[0][field] = value
        changed.append(write(tmp_path / field, rows).fingerprint)
    changed.append(write(tmp_path / "rate", rows_of(5), facts=FACTS | {"rate": 1.0}).fingerprint)
    assert len({base, *changed}) == 8


def test_two_examples_with_one_id_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two examples have the id 'toy/1'"):
        write(tmp_path / "a", rows_of(3), ["toy/0", "toy/1", "toy/1"])
    assert not list((tmp_path / "a").iterdir())  # nothing half-built stays


def test_a_row_without_tokens_is_refused(tmp_path):
    rows = rows_of(3)
    rows[1]["inputs"] = rows[1]["targets"] = np.zeros(0, np.int32)
    with pytest.raises(ValueError, match="example 'toy/1' has no tokens"):
        write(tmp_path / "a", rows)


def test_rows_of_one_id_need_a_choice_each(tmp_path):
    rows = rows_of(3)
    rows[1]["example_id"] = "toy/0"
    with pytest.raises(ValueError, match="two examples have the id 'toy/0'"):
        write(tmp_path / "a", rows)
    rows[1]["choice"] = 1
    assert len(write(tmp_path / "a", rows).tasks[0]) == 3


def test_a_damaged_generation_is_replaced(tmp_path):
    corpus = write(tmp_path / "a", rows_of(500))
    record = corpus.folder / "0.array_record"
    record.write_bytes(record.read_bytes()[:100])
    assert not cache._is_whole(corpus.folder)
    again = write(tmp_path / "a", rows_of(500))
    assert again.folder == corpus.folder and cache._is_whole(again.folder)
    assert again.tasks[0].read([499])[0].example_id == "toy/499"


def test_a_metric_is_another_generation_of_the_same_rows(tmp_path):
    first = write(tmp_path / "a", rows_of(5))
    other = write(tmp_path / "a", rows_of(5), facts=FACTS | {"metrics": ["m.g"]})
    assert other.fingerprint == first.fingerprint and other.folder != first.folder
    assert other.tasks[0].metrics == ("m.g",)


def test_a_displaced_generation_is_kept_for_its_readers(tmp_path):
    reading = write(tmp_path / "a", rows_of(500))
    (tmp_path / "a" / "index.json").write_text(json.dumps({"generation": reading.folder.name}))
    old = time.time() - 2 * cache.GRACE
    os.utime(reading.folder, (old, old))  # built long ago, and current until now
    new = write(tmp_path / "a", rows_of(3))
    cache._replace_index(tmp_path / "a", {"generation": new.folder.name})
    assert reading.tasks[0].read([7])[0].example_id == "toy/7"
    os.utime(reading.folder, (old, old))  # displaced long ago
    cache._replace_index(tmp_path / "a", {"generation": new.folder.name})
    assert not reading.folder.exists() and new.folder.exists()


def test_cache_dir_must_be_local():
    with pytest.raises(ValueError, match="CACHE_DIR=gs://b/c must be a local folder"):
        cache.RowsConfig("toy_label", cache_dir="gs://b/c")


@pytest.mark.parametrize(
    "setting", [dict(parsing="Repaired"), dict(max_bad_rows=2.7), dict(teacher_filter="x")]
)
def test_bad_settings_are_refused_at_once(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting)).upper()} must be"):
        cache.RowsConfig("toy_label", **setting)


def start_probe(folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-c", PROBE, str(folder / "data"), str(folder / "cache"), "train"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip


def toy_folder(folder, lines):
    (folder / "toy_tasks.py").write_text(TOY_TASKS)
    (folder / "data").mkdir()
    (folder / "data" / "train.txt").write_text("".join(f"line {i}\n" for i in range(lines)))


def test_two_processes_that_build_at_once_do_not_harm_it(tmp_path):
    toy_folder(tmp_path, 3000)
    both = [start_probe(tmp_path) for _ in range(2)]
    said = [json.loads(p.communicate()[0].splitlines()[-1]) for p in both]
    assert said[0] == said[1] and said[0]["rows"] == [3000, 3000]
    (split,) = (tmp_path / "cache").iterdir()
    assert len(list(split.iterdir())) == 2  # the index, and one generation


def test_a_builder_that_is_killed_leaves_nothing_that_is_read(tmp_path):
    toy_folder(tmp_path, 20_000)
    killed = start_probe(tmp_path)
    building = tmp_path / "cache"
    while not list(building.rglob("0.array_record")):
        assert killed.poll() is None
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not list(building.rglob("index.json"))
    assert probe(tmp_path)["rows"] == [20_000, 20_000]
    # Half-built folders are removed once they are too old for anyone to be at work there.
    (split,) = building.iterdir()
    (half,) = split.glob(".building.*")
    old = time.time() - 2 * cache.GRACE
    os.utime(half, (old, old))
    (tmp_path / "data" / "train.txt").write_text("another\n")
    assert probe(tmp_path)["rows"] == [1, 1]
    assert not half.exists()


def test_settings_have_caches_of_their_own(monkeypatch):
    for name in ("DATA_DIR", "VOCABULARY", "PARSING", "CACHE_DIR"):
        monkeypatch.delenv(f"DISTILL_{name}", raising=False)
    base = cache.RowsConfig("toy_label", cache_dir="/c", data_dir="/d")
    folders = {cache._folder(base, "train"), cache._folder(base, "test")}
    for change in (
        dict(parsing="repaired"), dict(teacher_filter="drop"), dict(rationale_store="/s"),
        dict(allow_missing=("a",)), dict(vocabulary="/v"), dict(data_dir="/e"),
        dict(max_bad_rows=3), dict(mixture_or_task_module="other"),
    ):  # fmt: skip
        folders.add(cache._folder(dataclasses.replace(base, **change), "train"))
    assert len(folders) == 10
    monkeypatch.setenv("DISTILL_PARSING", "repaired")
    from_environment = cache.RowsConfig("toy_label", cache_dir="/c", data_dir="/d")
    assert from_environment.parsing == "repaired"
    assert cache.RowsConfig("x", allow_missing="esnli, gsm8k").allow_missing == ("esnli", "gsm8k")


SOURCES = """
import json, sys
from distill import cache
config = cache.RowsConfig("cqa_step_by_step", data_dir=sys.argv[1], cache_dir=sys.argv[2])
built = cache.prepare(config, ["test"])
print(json.dumps([built, [len(t) for t in cache.load(config, "test").tasks]]))
"""


def test_a_file_that_appears_later_makes_the_cache_stale(tmp_path):
    folder = tmp_path / "data" / "cqa"
    folder.mkdir(parents=True)
    row = {"question": "q", "choices": list("abcde"), "answer": "a"}
    (folder / "cqa_test.json").write_text(json.dumps(row) + "\n")

    def run():
        done = subprocess.run(
            [sys.executable, "-c", SOURCES, str(tmp_path / "data"), str(tmp_path / "cache")],
            capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    assert run() == [["test"], [0, 1]]
    assert run() == [[], [0, 1]]
    (folder / "llm").mkdir()
    (folder / "llm" / "test_CoT_0.json").write_text('["Why. So the answer is (a) a."]')
    assert run() == [["test"], [1, 1]]
    (tmp_path / "data" / "another_dataset").mkdir()  # is no concern of this one
    assert run() == [[], [1, 1]]
