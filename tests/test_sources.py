"""Where rows come from: the laws of reading, joining, filtering, and what is refused.

Files are written by the tests; the released data is read in `test_tasks.py`.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import textwrap

import numpy as np
import pytest

from distill import metrics, sources, task


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Every test binds for itself."""
    for field in dataclasses.fields(sources.Settings):
        monkeypatch.delenv(f"DISTILL_{field.name.upper()}", raising=False)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no_tfds"))
    sources.reset()
    yield
    sources.reset()


def rebind(**settings):
    sources.reset()
    sources.bind(**settings)


# --- Settings ---------------------------------------------------------------------------------


def test_settings_prefer_what_is_bound_then_the_environment(monkeypatch):
    monkeypatch.setenv("DISTILL_PARSING", "repaired")
    monkeypatch.setenv("DISTILL_MAX_BAD_ROWS", "3")
    sources.bind(parsing="reference")
    assert sources.settings() == sources.Settings(None, "reference", "keep", None, 3)
    with pytest.raises(ValueError, match="parsing is already 'reference'.*DISTILL_PARSING"):
        sources.bind(parsing="repaired")
    sources.bind(max_bad_rows="3")  # As a flag gives it.


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(parsing="fixed"), "PARSING must be one of reference, repaired, not 'fixed'"),
        (dict(teacher_filter="no"), "TEACHER_FILTER must be one of keep, drop"),
        (dict(max_bad_rows=-1), "MAX_BAD_ROWS must be a whole number, 0 or more, not -1"),
        (dict(max_bad_rows="x"), "MAX_BAD_ROWS must be a whole number"),
        (dict(max_bad_rows=True), "MAX_BAD_ROWS must be a whole number"),
    ],
)
def test_wrong_settings_are_refused_and_bind_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        sources.bind(data_dir="/data", **settings)
    assert sources.settings() == sources.Settings(None, "reference", "keep", None, 0)


# --- A dataset in the released layout ---------------------------------------------------------

# Row i has the input "in<i></s>put", the gold label "g<i>", the teacher's label "t<i>".
ROWS, TEST_ROWS = 25, 3


def write(root, split, rows, completions, shard=10):
    folder = root / "toy" / "llm"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": f"in{i}</s>put", "gold": f"g{i}"}) for i in range(rows)]
    (root / "toy" / f"toy_{split}.json").write_text("\n".join(lines) + "\n")
    for i, start in enumerate(range(0, len(completions), shard)):
        part = completions[start : start + shard]
        (folder / f"{split}_CoT_{i}.json").write_text(json.dumps(part))


def completion(i):
    # Row 12 has a rationale without a label, row 7 nothing that parses.
    return {12: "why12 =>", 7: ""}.get(i, f"why{i} => t{i}")


def parse(text):
    rationale, _, label = text.partition("=>")
    return rationale.strip(), label.strip()


def layout(**kwargs):
    return sources.ReleasedLayout(
        "toy",
        fields=("text", "gold"),
        parse=parse,
        example=lambda f: (f["text"], f["gold"]),
        **kwargs,
    )


@pytest.fixture
def data(tmp_path):
    write(tmp_path, "train", ROWS, [completion(i) for i in range(ROWS)])
    write(tmp_path, "test", TEST_ROWS, [completion(i) for i in range(TEST_ROWS)])
    return tmp_path


def test_shards_join_by_position_in_numeric_order(tmp_path):
    # Twelve shards: sorted by name, 10 would come before 2.
    write(tmp_path, "train", 12, [f"why{i} => t{i}" for i in range(12)], shard=1)
    sources.bind(data_dir=str(tmp_path))
    rows = layout().rows("train")
    assert [r.teacher.label for r in rows] == [f"t{i}" for i in range(12)]
    assert [r.answers[0].rationale for r in rows] == [f"why{i}" for i in range(12)]
    assert [r.id for r in rows] == [f"toy/train/{i}" for i in range(12)]


def test_hold_out_splits_the_train_file(data):
    sources.bind(data_dir=str(data))
    source = layout(holdout=True)
    order = np.random.default_rng(0).permutation(ROWS)
    assert [r.id for r in source.rows("validation")] == [f"toy/train/{i}" for i in order[:3]]
    assert [r.id for r in source.rows("train")] == [f"toy/train/{i}" for i in order[3:]]
    assert [r.id for r in source.rows("test")] == [f"toy/test/{i}" for i in range(TEST_ROWS)]


def test_valid_file_is_used_without_a_hold_out(data):
    write(data, "valid", 2, [])
    sources.bind(data_dir=str(data))
    assert [r.id for r in layout().rows("validation")] == ["toy/valid/0", "toy/valid/1"]
    assert len(layout().rows("train")) == ROWS


def test_files_are_those_that_decide_the_rows(data):
    sources.bind(data_dir=str(data))
    files = layout(holdout=True).files("train")
    names = [pathlib.Path(f).relative_to(data).as_posix() for f in files]
    assert names == ["toy/toy_train.json", *(f"toy/llm/train_CoT_{i}.json" for i in range(3))]


def test_report_counts_what_did_not_parse(data):
    sources.bind(data_dir=str(data))
    report = sources.source_report(layout(), "train")
    assert report == sources.SourceReport(
        rows=ROWS, parsed=ROWS - 2, unparsed=2, rationales=ROWS - 1, teacher_accuracy=0.0
    )
    right = sources.source_report(
        layout(),
        "train",
        lambda targets, predictions: {
            "accuracy": sum(t[1:] == p[1:] for t, p in zip(targets, predictions, strict=True))
            / ROWS
        },
    )
    assert right.teacher_accuracy == (ROWS - 2) / ROWS


def test_no_data_folder_names_the_flag():
    with pytest.raises(
        FileNotFoundError,
        match=r"toy_train\.json.*no data folder is set.*"
        r"--gin\.DATA_DIR.*DISTILL_DATA_DIR",
    ):
        layout().rows("train")


def test_wrong_data_folder_names_the_path(tmp_path):
    sources.bind(data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"nowhere/toy/toy_train\.json.*--gin\.DATA_DIR"):
        layout().rows("train")


def test_row_without_a_field_is_named_with_its_line(data):
    path = data / "toy" / "toy_train.json"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:6], '{"text": "x", "label": 1}', *lines[7:]]))
    sources.bind(data_dir=str(data))
    with pytest.raises(ValueError, match=r"toy_train\.json:7: the row lacks gold; it has text, "):
        layout().rows("train")


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"text": "x", ', "not valid JSON: .*double quotes"),
        ("[1, 2]", "a row must be a JSON object, not list"),
        ('{"text": "x", "gold": null}', "input and label must be text, got 'x', None"),
    ],
)
def test_bad_line_is_named_with_its_reason(data, line, reason):
    with open(data / "toy" / "toy_train.json", "a") as f:
        f.write(line + "\n")
    sources.bind(data_dir=str(data))
    with pytest.raises(ValueError, match=rf"toy_train\.json:{ROWS + 1}: {reason}"):
        layout().rows("train")


def test_completions_that_do_not_line_up_are_refused(data):
    os.remove(data / "toy" / "llm" / "train_CoT_1.json")  # 0 and 2 stay
    sources.bind(data_dir=str(data))
    with pytest.raises(ValueError, match=r"10 completions for 25 rows.*train_CoT_0\.json \(10\)"):
        layout().rows("train")


def test_completions_must_be_a_list_of_text(data):
    path = data / "toy" / "llm" / "test_CoT_0.json"
    sources.bind(data_dir=str(data))
    for content, reason in (('["a", "b", 3]', "JSON list of strings"), ("[", "not valid JSON")):
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"test_CoT_0\.json.*{reason}"):
            layout().rows("test")


def test_a_bad_row_takes_its_completion_with_it(data):
    path = data / "toy" / "toy_train.json"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], "", *lines[3:6], "{broken", *lines[7:]]))
    sources.bind(data_dir=str(data), max_bad_rows=1)
    rows = layout().rows("train")
    assert len(rows) == ROWS - 1
    for row in rows:  # The row 6 is gone, a blank line is none, and all others have their own.
        i = row.id.removeprefix("toy/train/")
        assert row.input == f"in{i}</s>put" and row.label == f"g{i}"
        assert i in ("7", "12") or row.teacher.label == f"t{i}"
    report = sources.source_report(layout(), "train")
    assert report.rows == ROWS - 1
    assert "left out 1 unusable of 26 lines" in report.notes[0]
    assert "toy_train.json:8: not valid JSON" in report.notes[0]


def test_a_bad_row_moves_no_other_between_splits(data):
    splits = ("train", "validation")
    source = layout(holdout=True)
    sources.bind(data_dir=str(data))
    before = {s: [r.id for r in source.rows(s)] for s in splits}
    path = data / "toy" / "toy_train.json"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["{", *lines[1:]]))
    rebind(data_dir=str(data), max_bad_rows=1)
    for split in splits:
        kept = [i for i in before[split] if i != "toy/train/0"]
        assert [r.id for r in source.rows(split)] == kept


def test_repairs_apply_in_turn_in_their_mode_only(data):
    def first(completion, fields, rationale, label):
        return rationale, label or f"from {fields['text']}"

    def second(completion, fields, rationale, label):
        return rationale, label.upper() if completion else None

    source = layout(repairs=(first, second))
    sources.bind(data_dir=str(data))
    assert source.rows("train") == layout().rows("train")
    rebind(data_dir=str(data), parsing="repaired")
    said = [r.answers[0].label for r in source.rows("train")]
    assert (said[0], said[12], said[7]) == ("T0", "FROM IN12</S>PUT", None)
    wrapped = sources.configured(sources.FirstOf((source, source)))
    for made in (source, wrapped):
        gains = sources.repair_gains(made, "train")
        assert gains == [("reference", 2, 0.0), ("first", 0, 0.0), ("second", 1, 0.0)]
    assert sources.repair_gains(reviews({"train": "x"}), "train") == []


# --- Do completions belong to their rows? -----------------------------------------------------

WORDS = np.array([f"w{i}" for i in range(3_000)])


def texts(n, seed=0, shared=3):
    """Inputs of ten words, and rationales of six of which some are the input's."""
    rng = np.random.default_rng(seed)
    inputs = [rng.choice(WORDS, 10) for _ in range(n)]
    said = [[*words[:shared], *rng.choice(WORDS, 6 - shared)] for words in inputs]
    return [" ".join(i) for i in inputs], [" ".join(s) for s in said]


@pytest.mark.parametrize("n", [20, 49, 50, 99, 100, 500])
def test_aligned_rationales_pass_and_shuffled_do_not(n):
    inputs, said = texts(n)
    assert sources.first_misaligned(inputs, said) is None
    order = np.random.default_rng(1).permutation(n)
    assert sources.first_misaligned(inputs, [said[i] for i in order]) is not None
    for shift in (1, -1, 2, 7):
        assert sources.first_misaligned(inputs, list(np.roll(said, shift))) is not None


@pytest.mark.parametrize("at", [0, 60, 130, 440])
def test_the_first_row_of_a_shift_is_found(at):
    inputs, said = texts(500)
    missing = [*said[:at], *said[at + 1 :], "a"]
    assert abs(sources.first_misaligned(inputs, missing) - at) <= 2


def test_rationales_that_share_no_rare_word_with_any_input_are_not_judged():
    inputs, said = texts(100)
    digits = [f"{i % 3}, then {i % 7}" for i in range(100)]
    assert sources.first_misaligned([f"{t} 1 2 3" for t in inputs], digits) is None
    assert sources.first_misaligned(inputs, [""] * 100) is None
    assert sources.first_misaligned(inputs[:19], said[1:20]) is None  # Too few to tell.


def test_shifted_completions_are_refused_with_the_row(tmp_path):
    inputs, said = texts(200)
    folder = tmp_path / "toy" / "llm"
    folder.mkdir(parents=True)
    lines = [json.dumps({"text": t, "gold": "g"}) for t in inputs]
    (tmp_path / "toy" / "toy_train.json").write_text("\n".join(lines))
    shifted = [f"{s} => t" for s in [*said[:120], *said[121:], "a"]]
    (folder / "train_CoT_0.json").write_text(json.dumps(shifted))
    sources.bind(data_dir=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"other rows, from about row 120 .*toy_train\.json:121\) on.*same release"
    ):
        layout().rows("train")
    assert len(layout(check_alignment=False).rows("train")) == 200


# --- JSON lines -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, reason",
    [
        (b"{", "not valid JSON: .* \\(column 2\\)"),
        (b'{"text": "a\0b"}', "not valid JSON: Invalid control character"),
        (b'{"text": "a\\u0000b"}', "the character NUL"),
        (b'{"text": "\xff"}', "not UTF-8: invalid start byte at byte 10"),
        ('{"text": "x"}'.encode("utf-16"), "not UTF-8"),
        (b'{"text": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"text": "x", "more": {"\\udc00": 1}}', "half of a surrogate pair"),
        (b'{"text": "x", "text": "y"}', "the field 'text' is given twice"),
        (b'{"text": "x", "more": {"a": 1, "a": 1}}', "the field 'a' is given twice"),
        (b'["text"]', "a row must be a JSON object, not list"),
        (b'"text"', "a row must be a JSON object, not str"),
        (b'{"txt": "x"}', "the row lacks text; it has txt"),
        (b'{"text": 1}', "text must be text, not int"),
        (b'{"text": null}', "text must be text, not null"),
        (b'{"text": "x", "n": NaN}', "NaN is not a finite number"),
        (b'{"text": "x", "n": -Infinity}', "-Infinity is not a finite number"),
        (b'{"text": "x", "n": 1e999}', "1e999 is not a finite number"),
        (b'{"text": "x", "n": ' + b"9" * 5000 + b"}", "limit .* for integer string"),
        (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"text": ' + b'{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_unusable_lines_are_named_or_left_out(tmp_path, line, reason):
    path = tmp_path / "x.jsonl"
    good = b'{"text": "\xf0\x9f\x98\x80 \xe2\x80\xa8 \\ud83d\\ude00"}'
    path.write_bytes(good + b"\r\n\r\n" + line + b"\n" + good)
    with pytest.raises(ValueError, match=rf"x\.jsonl:3: .*{reason}.*MAX_BAD_ROWS"):
        sources.read_json_lines(path, {"text": str})
    rebind(max_bad_rows=1)
    lines, report = sources.read_json_lines(path, {"text": str})
    # U+2028 does not end a line, and a whole pair is one character.
    assert [line.value for line in lines] == [{"text": "\U0001f600 \u2028 \U0001f600"}] * 2
    assert [(line.number, line.position) for line in lines] == [(1, 0), (4, 2)]
    assert (report.lines, report.used, report.blank, len(report.bad)) == (4, 2, 1, 1)
    assert report.bad[0].number == 3


def test_byte_order_mark_crlf_and_blank_lines_are_fine(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n \r\n\r\n{"a": 2}')
    lines, report = sources.read_json_lines(path, {"a": int})
    assert [line.value["a"] for line in lines] == [1, 2]
    assert report == sources.LinesReport(str(path), lines=4, used=2, blank=2)


def test_one_bad_line_too_many_is_an_error_that_names_them_all(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{\n[]\n{"a": 1}\n7\n')
    sources.bind(max_bad_rows=2)
    with pytest.raises(ValueError) as error:
        sources.read_json_lines(path, ["a"])
    for part in ("x.jsonl:5: a row must be", "More than 2", "line 2: not valid", "line 3: a row"):
        assert part in str(error.value)


def test_what_is_left_out_is_logged_once(tmp_path, caplog):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(["{"] * 9))
    sources.bind(max_bad_rows=9)
    with caplog.at_level("WARNING"):
        for _ in range(3):
            sources.read_json_lines(path, ["a"])
    (record,) = caplog.records
    assert "9 unusable of 9 lines" in record.getMessage()
    assert record.getMessage().count("not valid JSON") == 5  # The first few.


CORRUPTIONS = (
    "bytes",
    "bom",
    "crlf",
    "duplicate",
    "nul",
    "huge",
    "missing",
    "cut",
    "blank",
    "bomb",
)


def fuzzed(rng, kind):
    """A JSON-lines file of up to 12 rows, spoilt in one way."""
    rows = [
        {"id": f"r{i}", "text": " ".join(rng.choice(WORDS, 5)), "label": "yes", "n": 1.5}
        for i in range(int(rng.integers(1, 13)))
    ]
    at = int(rng.integers(len(rows)))
    if kind == "duplicate":
        rows[at]["id"] = "r0"
    elif kind == "missing":
        del rows[at][str(rng.choice(["id", "text", "label"]))]
    elif kind == "huge":
        rows[at]["text"] = "x" * 10_000_000
    lines = [json.dumps(row, ensure_ascii=bool(rng.integers(2))).encode() for row in rows]
    if kind == "blank":
        lines.insert(at, b" \t" * int(rng.integers(3)))
    elif kind == "bomb":
        lines[at] = b"[" * int(rng.integers(1, 100_000))
    content = b"\n".join(lines) + b"\n" * int(rng.integers(2))
    if kind == "bom":
        content = b"\xef\xbb\xbf" + content
    elif kind == "crlf":
        content = content.replace(b"\n", b"\r\n")
    elif kind == "cut":
        content = content[: int(rng.integers(len(content)))]
    elif kind in ("bytes", "nul"):
        spoilt = np.frombuffer(content, np.uint8).copy()
        places = rng.integers(len(spoilt), size=int(rng.integers(1, 6)))
        spoilt[places] = 0 if kind == "nul" else rng.integers(256, size=len(places))
        content = spoilt.tobytes()
    return content


def test_a_thousand_spoilt_files(tmp_path):
    """Lines in = used + blank + reported, in every file; strict mode names file, line, reason."""
    rng = np.random.default_rng(0)
    source = sources.JsonLines(
        "fuzz", {"train": "fuzz.jsonl"}, input="text", label="label", id="id"
    )
    path = tmp_path / "fuzz.jsonl"
    refused = 0
    for i in range(1_000):
        # A few lines of 10 MB, the others among all files.
        kind = "huge" if i % 250 == 0 else str(rng.choice([c for c in CORRUPTIONS if c != "huge"]))
        path.write_bytes(content := fuzzed(rng, kind))
        count = content.count(b"\n") + (not content.endswith(b"\n") and bool(content))
        rebind(data_dir=str(tmp_path), max_bad_rows=20)
        lines, report = sources.read_json_lines(
            path, ["id", "text", "label"], source._example, key=lambda made: made[0]
        )
        assert report.lines == count == len(lines) + report.blank + len(report.bad)
        assert report.used == len(lines)
        rows = source.rows("train")
        assert len(rows) == len({r.id for r in rows}) == len(lines)
        for row in rows:
            (row.id + row.input + row.label).encode("utf-8")
        rebind(data_dir=str(tmp_path))
        if report.bad:
            refused += 1
            with pytest.raises(ValueError) as error:
                source.rows("train")
            bad = report.bad[0]
            assert str(error.value).startswith(f"{path}:{bad.number}: {bad.reason}")
        else:
            assert source.rows("train") == rows
    assert 300 < refused < 900  # The test spoils something, and not everything.


def reviews(paths, **kwargs):
    fields = dict(input="text", label="sentiment", rationale="why", teacher_label="says", id="id")
    return sources.JsonLines("reviews", paths, **fields | kwargs)


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_declared_fields_become_rows(tmp_path):
    rows = [
        dict(id="a", text="t0", sentiment="good", why="because", says="bad"),
        dict(id="b", text="t1", sentiment="bad", why=["r0", "r1"], says=["x", None]),
        dict(id="c", text="t2", sentiment="bad", why=["r0", "r1"], says="x"),
        dict(id=7, text="t3", sentiment="bad", says="x", why=None),
        dict(id="e", text="t4", sentiment="bad"),
    ]
    write_lines(tmp_path / "reviews" / "train.jsonl", rows)
    sources.bind(data_dir=str(tmp_path))
    source = reviews({"train": "reviews/train.jsonl"})
    got = source.rows("train")
    assert [r.id for r in got] == [f"reviews/{i}" for i in ("a", "b", "c", "7", "e")]
    assert [r.input for r in got] == [f"t{i}" for i in range(5)]
    assert [r.label for r in got] == ["good", "bad", "bad", "bad", "bad"]
    answer = sources.Answer
    assert [r.answers for r in got] == [
        (answer("because", "bad"),),
        (answer("r0", "x"), answer("r1", None)),
        (answer("r0", "x"), answer("r1", "x")),
        (answer(None, "x"),),
        (),
    ]
    assert source.files("train") == [str(tmp_path / "reviews" / "train.jsonl")]
    assert source.splits == ("train",)
    with pytest.raises(ValueError, match="reviews has no split 'test'; it has train"):
        source.rows("test")
    shout = reviews({"train": "reviews/train.jsonl"}, input=lambda f: f["text"].upper(), id=None)
    assert [(r.id, r.input) for r in shout.rows("train")][1] == ("reviews/train/1", "T1")


@pytest.mark.parametrize(
    "row, reason",
    [
        (dict(id="a"), "'a' is given twice, first on line 1"),
        (dict(id=None), "an id must be text or a whole number, not None"),
        (dict(text=""), "the input must be text that is not empty"),
        (dict(sentiment=1), "the label must be text that is not empty, not 1"),
        (dict(why=3), "rationale must be text, a list of texts or null, not 3"),
        (dict(why=["a", "b", "c"], says=["x", "y"]), "3 rationales and 2 teacher labels"),
    ],
)
def test_rows_that_are_not_as_declared_are_named(tmp_path, row, reason):
    good = dict(id="a", text="t0", sentiment="good", why="because", says="bad")
    write_lines(tmp_path / "train.jsonl", [good, good | dict(id="b") | row])
    sources.bind(data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=rf"train\.jsonl:2: {reason}"):
        reviews({"train": "train.jsonl"}).rows("train")


def test_misspelt_declarations_are_found(tmp_path):
    write_lines(tmp_path / "train.jsonl", [dict(id="a", text="t", sentiment="s", why="w")])
    sources.bind(data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="no row has the field 'says'.*id, sentiment, text, why"):
        reviews({"train": "train.jsonl"}).rows("train")
    with pytest.raises(ValueError, match="no split may be named valid; allowed are train, "):
        reviews({"valid": "train.jsonl"})
    with pytest.raises(ValueError, match="named validation.*holdout=True makes validation"):
        reviews({"train": "a", "validation": "b"}, holdout=True)
    with pytest.raises(FileNotFoundError, match=r"reviews: no file .*nowhere\.jsonl.*DATA_DIR"):
        reviews({"train": "nowhere.jsonl"}).rows("train")


def test_a_hold_out_shares_nothing_with_train(tmp_path):
    write_lines(tmp_path / "train.jsonl", [dict(text=f"t{i}") for i in range(25)])
    sources.bind(data_dir=str(tmp_path))
    source = sources.JsonLines("plain", {"train": "train.jsonl"}, input="text", holdout=True)
    order = np.random.default_rng(0).permutation(25)
    ids = [[r.id for r in source.rows(s)] for s in ("validation", "train")]
    assert [*ids[0], *ids[1]] == [f"plain/train/{i}" for i in order] and len(ids[0]) == 3
    assert {r.label for r in source.rows("train")} == {None}
    assert source.files("validation") == source.files("train")


def test_a_dataset_is_one_short_file(tmp_path, monkeypatch):
    code = textwrap.dedent("""\
        from distill import metrics, sources, task

        task.register(
            "reviews",
            source=sources.JsonLines(
                "reviews",
                {"train": "reviews/train.jsonl", "test": "reviews/test.jsonl"},
                input="text", label="sentiment", rationale="why", teacher_label="says",
                holdout=True,
            ),
            metric_fns=[metrics.label_accuracy],
        )
    """)
    assert len(code.splitlines()) <= 40
    (tmp_path / "my_reviews.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [dict(text=f"t{i}", sentiment="good", why=f"w{i}", says="bad") for i in range(10)]
    for split in ("train", "test"):
        write_lines(tmp_path / "reviews" / f"{split}.jsonl", rows)
    task.reset()
    task.bind(data_dir=str(tmp_path))
    try:
        task.import_module("my_reviews")
        got = task.dataset("reviews").rows("train") + task.dataset("reviews").rows("validation")
        assert sorted(r.input for r in got) == [f"t{i}" for i in range(10)]
        assert {(r.label, r.teacher.label) for r in got} == {("good", "bad")}
        assert all(r.answers[0].rationale == r.input.replace("t", "w") for r in got)
    finally:
        task.reset()
        sys.modules.pop("my_reviews", None)


# --- TensorFlow datasets ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The same dataset prepared in both file formats, in two folders."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Thirty rows."""

        name = "tiny"
        VERSION = tfds.core.Version("1.2.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="r1")]

        def _info(self):
            features = {
                "uid": tfds.features.Text(),
                "choices": tfds.features.Sequence(tfds.features.Text()),
                "why": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["e", "n", "c"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, download):
            return {"train": self._generate_examples(30), "test": self._generate_examples(4)}

        def _generate_examples(self, n):
            for i in range(n):
                choices = ["é", f"c{i}"]
                yield i, {"uid": f"u{i}", "choices": choices, "why": f"w{i}", "label": i % 3}

    folders = {}
    for file_format in ("tfrecord", "array_record"):
        folders[file_format] = tmp_path_factory.mktemp(file_format)
        # As a user may keep it: among the datasets, or in a folder of its own.
        sub = folders[file_format] / ("tfds" if file_format == "tfrecord" else "")
        shards = tfds.download.DownloadConfig(num_shards=3)
        builder = Tiny(data_dir=sub, config="r1", file_format=file_format)
        builder.download_and_prepare(download_config=shards)
        older = pathlib.Path(builder.data_path).parent / "0.9.0"  # The newest is read.
        older.mkdir()
        (older / "dataset_info.json").touch()
    return folders


def tiny(builder="tiny/r1", **kwargs):
    fields = dict(
        input=lambda f: " ".join(f["choices"]),
        label=lambda f: "enc"[f["label"]],
        rationale="why",
        id="uid",
    )
    splits = {"train": "train", "test": "test"}
    return sources.Tfds("tiny", builder, splits, **fields | kwargs)


@pytest.mark.filterwarnings("default")  # TFDS's own.
def test_tfds_reads_both_formats_alike_and_in_one_order(prepared):
    rows = {}
    for file_format, folder in prepared.items():
        rebind(data_dir=str(folder))
        rows[file_format] = tiny().rows("train")
        assert tiny().rows("train") == rows[file_format]
        assert len(tiny(holdout=True).rows("validation")) == 3
        files = [pathlib.Path(f) for f in tiny().files("test")]
        assert all(f.exists() for f in files)
        assert [f.name for f in files] == [
            "dataset_info.json",
            "features.json",
            *(f"tiny-test.{file_format}-0000{i}-of-00003" for i in range(3)),
        ]
        assert tiny(builder="tiny/r1:1.2.0").rows("train") == rows[file_format]
        with pytest.raises(FileNotFoundError, match="no TensorFlow dataset tiny/r1:1.3.0"):
            tiny(builder="tiny/r1:1.3.0").rows("train")
    assert rows["tfrecord"] == rows["array_record"]
    assert sorted(r.id for r in rows["tfrecord"]) == sorted(f"tiny/u{i}" for i in range(30))
    for row in rows["tfrecord"]:
        i = int(row.id.removeprefix("tiny/u"))
        assert (row.input, row.label) == (f"é c{i}", "enc"[i % 3])
        assert row.answers == (sources.Answer(f"w{i}"),)


@pytest.mark.filterwarnings("default")
def test_tfds_rows_that_cannot_be_used_are_named(prepared):
    sources.bind(data_dir=str(prepared["tfrecord"]))
    with pytest.raises(ValueError, match="tiny: .*1.2.0: example 0 of train: KeyError: 'nope'"):
        tiny(label="nope").rows("train")
    with pytest.raises(ValueError, match="the id 'tiny/1' is given twice"):
        tiny(id=lambda f: 1).rows("train")


def test_absent_tfds_says_how_to_prepare_it(tmp_path):
    sources.bind(data_dir=str(tmp_path))
    (tmp_path / "tiny" / "r1" / "0.9.0").mkdir(parents=True)  # Unfinished: no dataset_info.json.
    for method in (tiny().rows, tiny().files):
        with pytest.raises(FileNotFoundError) as error:
            method("train")
        for part in (
            f"no TensorFlow dataset tiny/r1 in {tmp_path}, {tmp_path}/tfds, ",
            f"`tfds build tiny --config=r1 --data_dir={tmp_path}`",
            f"t.builder('tiny/r1', data_dir='{tmp_path}').download_and_prepare()",
        ):
            assert part in str(error.value)


# --- Composition ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Rows that are given; they are the same in both splits."""

    given: tuple[sources.Row, ...]
    splits: tuple[str, ...] = ("train", "test")

    def rows(self, split):
        return list(self.given)

    def files(self, split):
        return [f"fixed.{split}"]


def row(i, label, *answers):
    return sources.Row(f"fixed/{i}", f"in{i}", label, tuple(sources.Answer(*a) for a in answers))


def test_first_of_chooses_by_split_and_says_what_it_looked_for(data):
    os.remove(data / "toy" / "toy_train.json")
    other = dataclasses.replace(layout(), file="other_{stem}.json")
    sources.bind(data_dir=str(data))
    source = sources.FirstOf((layout(), other))
    assert source.files("test") == layout().files("test")
    assert source.rows("test") == layout().rows("test")
    with pytest.raises(FileNotFoundError, match=r"toy/toy_train\.json.*; or .*other_train\.json"):
        source.rows("train")
    write_lines(data / "toy" / "other_train.json", [dict(text="t", gold="g")] * ROWS)
    assert source.rows("train") == other.rows("train")
    assert source.splits == ("train", "validation", "test")
    with pytest.raises(ValueError, match="no split 'dev'; there are train, "):
        source.rows("dev")


def test_a_pool_trains_without_labels_and_is_never_evaluated():
    pool = Fixed((dataclasses.replace(row(0, "gold", ("r", "t")), id="pool/0"),))
    source = sources.WithPool(Fixed((row(0, "a"),)), pool)
    assert source.rows("train") == [
        row(0, "a"),
        sources.Row("pool/0", "in0", None, (sources.Answer("r", "t"),)),
    ]
    assert source.rows("test") == [row(0, "a")]
    assert source.files("train") == ["fixed.train", "fixed.train"]
    assert source.files("test") == ["fixed.test"]
    report = sources.source_report(source, "train")
    assert (report.rows, report.unlabeled, report.teacher_accuracy) == (2, 1, None)
    with pytest.raises(ValueError, match="the id 'fixed/0'.*another name"):
        sources.WithPool(source.source, source.source).rows("train")


def test_human_rationales_are_not_unparsed_labels():
    human = Fixed((row(0, "a", ("r", None)), row(1, "b", ("r", None), (None, None))))
    report = sources.source_report(human, "train")
    assert (report.unparsed, report.rationales, report.teacher_accuracy) == (0, 2, None)
    teacher = Fixed((*human.given, row(2, "a", (None, "a"))))
    assert sources.source_report(teacher, "train").unparsed == 2
    nothing = Fixed((row(0, "a", (None, None)),))
    assert sources.source_report(nothing, "train").unparsed == 1


# --- The rationale store ----------------------------------------------------------------------


def record(i, sample=0, **kwargs):
    text = kwargs.pop("text", f"in{i}")
    return sources.StoreRecord(f"fixed/{i}", sources.input_sha256(text), sample, **kwargs)


def test_a_store_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "store.jsonl"
    records = [
        record(1, 1, rationale="r \u2028 é", label="x", confidence=0.5, provenance={"model": "m"}),
        record(0, confidence=1),
    ]
    sources.write_store(path, records[:1])
    sources.write_store(path, records)
    assert sources.read_store(path) == records
    assert [p.name for p in tmp_path.iterdir()] == ["store.jsonl"]
    with path.open() as old:  # Who reads meanwhile reads the old store to its end.
        sources.write_store(path, [record(5)])
        assert old.read().count("\n") == 2
    sources.write_store(path, records)
    first = json.loads(path.read_text("utf-8").split("\n")[0])
    assert first == {
        "schema": 1, "id": "fixed/1", "input_sha256": records[0].input_sha256, "sample": 1,
        "rationale": "r \u2028 é", "label": "x", "confidence": 0.5, "provenance": {"model": "m"},
    }  # fmt: skip
    assert records[0].input_sha256 == hashlib.sha256(b"in1").hexdigest()


def test_a_failed_write_leaves_the_old_store(tmp_path):
    path = tmp_path / "store.jsonl"
    sources.write_store(path, [record(0)])
    for records, message in (
        ([record(1), record(2, rationale="\ud800")], "surrogates not allowed"),
        ([record(1), record(1)], "two records have"),
        ([record(1, provenance={"loss": float("nan")})], "not JSON compliant"),
    ):
        with pytest.raises(ValueError, match=message):
            sources.write_store(path, records)
        assert sources.read_store(path) == [record(0)]
        assert [p.name for p in tmp_path.iterdir()] == ["store.jsonl"]


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(schema=2), "schema 2; this version reads 1"),
        (dict(sample=-1), "sample must be 0 or more"),
        (dict(sample=True), "sample must be int, not bool"),
        (dict(sample=None), "sample must be int, not null"),
        (dict(input_sha256="abc"), "input_sha256 must be 64 hexadecimal digits"),
        (dict(input_sha256=None), "input_sha256 must be text, not null"),
        (dict(id=""), "id must not be empty"),
        (dict(rationale=["a"]), "rationale must be text or null, not a list"),
        (dict(confidence=1.01), r"confidence must be in \[0, 1\] or null"),
        (dict(confidence="0.5"), "confidence must be int or float or null, not text"),
        (dict(provenance=None), "provenance must be an object, not null"),
        (dict(lable="x"), "unknown field lable"),
    ],
)
def test_records_that_are_not_the_schema_are_named(tmp_path, change, reason):
    path = tmp_path / "store.jsonl"
    sources.write_store(path, [record(0)])
    path.write_text(path.read_text() + json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=rf"store\.jsonl:2: .*{reason}"):
        sources.read_store(path)
    path.write_text(path.read_text().splitlines()[0].replace('"label": null, ', ""))
    with pytest.raises(ValueError, match=r"store\.jsonl:1: the row lacks label"):
        sources.read_store(path)


def test_a_store_joins_by_id_in_sample_order(tmp_path):
    store = tmp_path / "store.jsonl"
    records = [
        record(2, 1, rationale="r1", label="x", confidence=0.25),
        record(9),
        record(2, 0, rationale="r0", label="y"),
        record(0, rationale="", label=None, confidence=0.0005),
    ]
    source = Fixed(tuple(row(i, "a", ("own", "own")) for i in range(3)))
    sources.bind(data_dir=str(tmp_path))
    for order in (records, records[::-1]):
        sources.write_store(store, order)
        joined = sources.WithRationales(source, "store.jsonl").rows("train")
        assert [r.answers for r in joined] == [
            (sources.Answer(None, None, 0),),
            (),
            (sources.Answer("r0", "y", 1000), sources.Answer("r1", "x", 250)),
        ]
    report = sources.source_report(sources.WithRationales(source, str(store)), "train")
    assert report.teacher_accuracy == 0.0 and report.unparsed == 1
    right = Fixed(tuple(row(i, "y", ("own", "own")) for i in range(3)))
    accuracy = sources.source_report(sources.WithRationales(right, str(store)), "train")
    assert accuracy.teacher_accuracy == 0.5  # Of the two that were asked.
    assert "answers to 2 of 3 rows; 1 of its ids are not rows of train" in report.notes[0]


def test_a_store_of_other_data_is_refused(tmp_path):
    store = tmp_path / "store.jsonl"
    source = Fixed(tuple(row(i, "a") for i in range(3)))
    joined = sources.WithRationales(source, str(store))
    with pytest.raises(FileNotFoundError, match=r"rationale store: no file .*store\.jsonl"):
        joined.rows("train")
    sources.write_store(store, [record(0), record(1, 0), record(1, 1, text="in1 ")])
    with pytest.raises(ValueError, match="sample 1 of 'fixed/1' answers another input"):
        joined.rows("train")
    for records in ([record(7)], []):
        sources.write_store(store, records)
        with pytest.raises(ValueError, match="none of its . ids is a training row.*'fixed/0'"):
            joined.rows("train")
        assert [r.answers for r in joined.rows("test")] == [()] * 3
    store.write_text("".join([json.dumps(vars(record(0)) | {"schema": 1}) + "\n"] * 2))
    with pytest.raises(ValueError, match=r"store\.jsonl:2: \('fixed/0', 0\) is given twice"):
        joined.rows("train")


# --- The teacher filter -----------------------------------------------------------------------

MIXED = (
    row(0, "a", ("r", "a")),  # good
    row(1, "a", ("r", "b")),  # disagrees
    row(2, "a", ("r", None)),  # unparsed
    row(3, "a"),  # not asked
    row(4, "a", ("r0", "b"), ("r1", "a"), ("r2", None)),  # one of three is good
    row(5, None, ("r", "b")),  # its own vote
    row(6, None, ("r0", "a"), ("r1", "b"), ("r2", "b")),
    row(7, None, ("r", None)),  # neither gold nor vote
)
GOOD = {
    0: MIXED[0],
    3: MIXED[3],
    4: row(4, "a", ("r1", "a")),
    5: MIXED[5],
    6: row(6, None, ("r1", "b"), ("r2", "b")),
}


@pytest.mark.parametrize(
    "policy, bad",
    [
        ("drop", {}),
        ("label_only", {
            1: row(1, "a", (None, "b")), 2: row(2, "a", (None, None)), 7: row(7, None, (None, None))
        }),
        ("keep_gold", {
            1: row(1, "a", (None, "a")), 2: row(2, "a", (None, "a")), 7: row(7, None, (None, None))
        }),
    ],
)  # fmt: skip
def test_filter_policies(policy, bad):
    rows, counts = sources.filter_rows(MIXED, policy)
    expected = GOOD | bad
    assert rows == [expected[i] for i in sorted(expected)]
    assert counts == sources.FilterCounts(
        answers=11, unparsed=3, disagreeing=3, bad_rows=3, touched=5
    )


def test_keep_changes_nothing_and_counts_all_the_same():
    rows, counts = sources.filter_rows(MIXED, "keep")
    assert rows == list(MIXED)
    assert counts == sources.FilterCounts(
        answers=11, unparsed=3, disagreeing=3, bad_rows=3, touched=0
    )
    with pytest.raises(ValueError, match="keep, drop, label_only, keep_gold, not 'gold'"):
        sources.filter_rows(MIXED, "gold")


def test_the_filter_compares_by_the_metric():
    rows = [row(0, "( 84.0 / 2.0 )", ("r", "(84 / 2)")), row(1, "( 1.0 )", ("r", "(2)"))]
    assert sources.filter_rows(rows, "drop", metrics.equation_accuracy)[0] == rows[:1]
    assert sources.filter_rows(rows, "drop", metrics.label_accuracy)[0] == []


def test_human_rationales_are_good():
    rows = [row(0, "a", ("r", None)), row(1, "a", (None, None))]
    kept, counts = sources.filter_rows(rows, "drop")
    assert kept == rows[:1]
    assert (counts.unparsed, counts.bad_rows) == (1, 1)


# --- What a run chose -------------------------------------------------------------------------


def test_settings_are_applied_when_rows_are_read(tmp_path):
    source = sources.configured(Fixed(MIXED))
    assert sources.configured(source) is source
    assert source.rows("train") == list(MIXED)  # The default is what was published.
    assert source.files("train") == ["fixed.train"]

    rebind(teacher_filter="drop")
    assert source.rows("train") == [GOOD[i] for i in sorted(GOOD)]
    assert source.rows("test") == list(MIXED)  # Only training rows are filtered.
    (note,) = sources.source_report(source, "train").notes
    assert "drop: of 11 answers 3 unparsed and 3 disagreeing; 3 bad rows" in note

    store = tmp_path / "store.jsonl"
    sources.write_store(store, [record(1, label="a"), record(2, label="b")])
    rebind(rationale_store="store.jsonl", data_dir=str(tmp_path), teacher_filter="drop")
    got = {r.id: r.answers for r in source.rows("train")}
    assert got == {
        f"fixed/{i}": (sources.Answer(None, "a"),) if i == 1 else () for i in (0, 1, 3, 4, 5, 6, 7)
    }
    assert source.files("test") == ["fixed.test", str(store)]


def test_a_store_replaces_the_published_count_too(data):
    published = layout(teacher_metric=lambda targets, predictions: {"accuracy": 0.5})
    source = sources.configured(published)
    sources.bind(data_dir=str(data))
    assert sources.source_report(source, "train").teacher_accuracy == 0.5
    answers = [
        sources.StoreRecord(r.id, sources.input_sha256(r.input), label=r.label)
        for r in published.rows("train")
    ]
    sources.write_store(data / "store.jsonl", answers)
    rebind(data_dir=str(data), rationale_store="store.jsonl")
    assert sources.source_report(source, "train").teacher_accuracy == 1.0
    assert sources.repair_gains(source, "train") == []


def test_remembered_reads_once_until_a_file_changes(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "a", "l": "x"}\nnot json\n')
    source = sources.JsonLines("toy", {"train": str(file)}, input="q", label="l")
    sources.bind(max_bad_rows=1)
    remembered = sources.Remembered(source)
    first = sources.source_report(remembered, "train")
    assert first.rows == 1 and "not valid JSON" in first.notes[0]
    assert remembered.rows("train") is remembered.rows("train")
    assert sources.source_report(remembered, "train") == first  # notes are not lost
    file.write_text('{"q": "a", "l": "x"}\n{"q": "bb", "l": "x"}\n')
    assert [row.input for row in remembered.rows("train")] == ["a", "bb"]
    assert sources.source_report(remembered, "train").notes == ()
