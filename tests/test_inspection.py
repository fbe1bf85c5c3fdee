"""Inspection: counts that add up, every token shown, and nothing that data could do to a page."""

import dataclasses
import html.parser
import os
import pathlib
import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest

from distill import cache, data, inspection, packing, sources, vocabulary
from distill.inspection import page as page_lib

ROOT = pathlib.Path(__file__).parents[1]
BYTES = vocabulary.load("bytes")
FLOPS = packing.Flops(100.0, 120.0, 1.0, 1.0, 1.0)
NASTY = "<script>alert('1')</script> \"&\" \x1b[31m\x07 \u202eabc\u200d | \\ \ud800\tcaf\u00e9"


@pytest.fixture
def corpus_of(tmp_path):
    """Makes a corpus of (inputs, {task: targets or several}) per example; bytes are its ids."""

    def make(examples, population=None, name="toy", split="train", groups=None, weights=(1000,)):
        groups = groups or {"toy_predict": 0, "toy_explain": 1}
        ids = [f"{name}/{i}" for i in range(population or len(examples))]
        members, n = [], 0
        for stream, group in groups.items():
            rows = []
            for i, (inputs, targets) in enumerate(examples):
                for choice, target in enumerate(targets.get(stream, ())):
                    rows.append(
                        {
                            "inputs": encode(inputs), "targets": encode(target),
                            "example_id": ids[i], "label": target, "inputs_pretokenized": inputs,
                            "loss_group": group, "choice": choice,
                            "loss_weight": weights[n % len(weights)],
                        }
                    )  # fmt: skip
                    n += 1
            facts = dict(name=stream, rate=1.0, metrics=[], dataset=name, answer_form="label")
            members.append((facts, ids, rows))
        folder = tmp_path / "corpus"
        folder.mkdir(exist_ok=True)
        return cache.open_generation(
            folder / cache.write_generation(folder, f"{name}_step_by_step", split, members)
        )

    return make


def encode(text):
    return np.array([*(b + 3 for b in text.encode("utf-8", "replace")), 1], np.int32)


def random_examples(n, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (
            "x" * int(rng.integers(5, 90)),
            {
                "toy_predict": ["y" * int(rng.integers(1, 4))],
                "toy_explain": ["z" * int(rng.integers(5, 60)) for _ in range(rng.integers(0, 4))],
            },
        )
        for _ in range(n)
    ]


def inspect(corpus, examples=3, **settings):
    settings = dict(batch_size=8) | settings
    config = data.DataConfig(corpus.name, vocabulary="bytes", **settings)
    return inspection.inspect(corpus, config, BYTES, FLOPS, num_examples=examples)


# --- Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, {"inputs": 50, "targets": 20}])
def test_counts_add_up_and_are_those_of_training(corpus_of, lengths):
    examples = random_examples(60)
    corpus = corpus_of(examples, population=70)
    found = inspect(corpus, feature_lengths=lengths)
    assert found.pairs == 60
    truncated = {"inputs": 0, "targets": 0}
    for task, rows in zip(found.tasks, corpus.tasks, strict=True):
        targets = [len(t[task.name]) for _, t in examples]
        assert task.rows == sum(targets) == sum(task.loss_groups.values())
        assert task.examples == sum(n > 0 for n in targets)
        assert task.examples + task.without == task.population == 70
        assert task.choices == (task.rows / task.examples, max(targets))
        assert sum(n.total for n in task.lengths.values()) == rows.lengths.sum()
        for i, (feature, n) in enumerate(task.lengths.items()):
            assert n.longest == rows.lengths[:, i].max()
            assert n.mean == pytest.approx(rows.lengths[:, i].mean())
            truncated[feature] += n.truncated
            for q in (50, 95):
                p = n.percentile(q)
                assert (n.values <= p).mean() >= q / 100 > (n.values < p).mean()
    config = data.DataConfig(corpus.name, batch_size=8, feature_lengths=lengths)
    assert truncated == data.TrainBatches(corpus, config, FLOPS).truncated
    assert (sum(truncated.values()) > 0) == (lengths is not None)


def test_only_what_a_mixture_has_is_in_its_table(corpus_of):
    plain = [("a", {"toy_predict": ["b"], "toy_explain": ["c"]})] * 3
    header, rows = inspection.task_table(inspect(corpus_of(plain)).tasks)
    assert header == ["task", "rows", "examples", "of dataset", "without a row", "loss group"]
    assert rows == [["toy_predict", "3", "3", "3", "0", "label"],
                    ["toy_explain", "3", "3", "3", "0", "rationale"]]  # fmt: skip
    several = [("a", {"toy_predict": ["b"], "toy_explain": ["c", "dd"]})] * 3
    corpus = corpus_of(several, groups={"toy_predict": 7, "toy_explain": 1}, weights=(500, 1000))
    config = data.DataConfig(corpus.name)
    limits = dict(data.MAX_LENGTHS)
    tasks = [inspection.describe_task(rows, limits) for rows in corpus.tasks]
    tasks[1] = dataclasses.replace(tasks[1], rate=2.0)
    header, rows = inspection.task_table(tasks)
    assert header[6:] == ["mixing rate", "choices, mean (most)", "weight, mean (range)"]
    assert rows[1][5:] == ["rationale", "2", "2.00 (2)", "0.750 (0.5 to 1)"]
    assert rows[0][5] == "group 7"  # of a foreign task
    assert config.feature_lengths is None


@pytest.mark.parametrize("size", [dict(batch_size=8), dict(batch_size=None, pairs_per_step=5)])
def test_batches_are_those_of_an_epoch(corpus_of, monkeypatch, size):
    monkeypatch.setattr(data, "SHARD_PAIRS", 25)  # three shards
    corpus = corpus_of(random_examples(60))
    found = inspect(corpus, **size).batching
    batches = data.TrainBatches(corpus, data.DataConfig(corpus.name, **size), FLOPS)
    assert batches.num_shards == 3
    drawn = list(batches.iterate(data.Position(), epochs=1))
    assert (found.steps, found.examples) == (len(drawn), 60)
    assert found.tokens == pytest.approx(np.mean([b.tokens for b in drawn]))
    assert found.rows == max(len(b.arrays["encoder_input_tokens"]) for b in drawn)
    best = found.proposals[0]
    assert found.capacity == {"inputs": best.inputs, "targets": best.targets} and found.chosen
    assert len(found.proposals) == 5
    for padding, key in (
        (found.waste.inputs, "encoder_segment_ids"), (found.waste.targets, "decoder_segment_ids"),
    ):  # fmt: skip
        everything = np.concatenate([b.arrays[key] for b in drawn])
        assert padding == pytest.approx((everything == 0).mean())
    rows = sum(len(b.arrays["encoder_input_tokens"]) for b in drawn)
    computed = rows * float(FLOPS.row(best.inputs, best.targets))
    assert found.flops * found.steps == pytest.approx(3 * computed)
    needed = sum(
        FLOPS.row(
            len(b.arrays["encoder_segment_ids"][r][b.arrays["encoder_segment_ids"][r] == s]),
            len(b.arrays["decoder_segment_ids"][r][b.arrays["decoder_segment_ids"][r] == s]),
        )
        for b in drawn
        for r in range(len(b.arrays["encoder_segment_ids"]))
        for s in range(1, b.arrays["encoder_segment_ids"][r].max() + 1)
    )
    assert found.waste.flops == pytest.approx(computed / needed)


def test_only_training_rows_are_batched(corpus_of):
    found = inspect(corpus_of(random_examples(5), split="test"))
    assert found.batching is None
    for report in (inspection.text_report(found), inspection.html_report(found)):
        assert "Only the train split is packed into batches." in report
        assert "steps for" not in report


# --- Tokens ---------------------------------------------------------------------------------------


def test_pieces_of_bytes_are_the_text():
    piece = inspection.pieces_of(BYTES)
    assert "".join(piece(i) for i in BYTES.encode("a b|c")) == "a\u2581b|c"
    assert [piece(i) for i in BYTES.encode("\u00e9\n")] == ["<0xC3>", "<0xA9>", "<LF>"]
    assert [piece(i) for i in (0, 1, 2, 259, -1)] == ["<pad>", "</s>", "<unk>", "<id 259>",
                                                      "<id -1>"]  # fmt: skip


def test_pieces_of_sentencepiece_are_its_own(tmp_path):
    import sentencepiece

    texts = [f"the {a} and the {b} are {a + b} in all" for a in range(30) for b in range(30)]
    with (tmp_path / "spiece.model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=330, pad_id=0, eos_id=1,
            unk_id=2, bos_id=-1, byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    vocab = vocabulary.load(str(tmp_path))
    piece = inspection.pieces_of(vocab)
    pieces = [piece(i) for i in vocab.encode("the 7 and the 12 are all")]
    assert "".join(pieces) == "\u2581the\u25817\u2581and\u2581the\u258112\u2581are\u2581all"
    assert len(pieces) < 20
    assert [piece(i) for i in vocab.encode("\u00e9")[-2:]] == ["<0xC3>", "<0xA9>"]
    assert piece(vocab.eos_id) == "</s>" and piece(vocab.size) == f"<id {vocab.size}>"


def test_a_foreign_vocabulary_shows_its_text():
    class Marks(vocabulary.Vocabulary):
        size = 9
        encode = as_seqio = _decode = None

        def decode(self, ids):
            return {3: "a b", 4: "\u0301", 5: "\u0301\u202e"}[ids[0]]

    piece = inspection.pieces_of(Marks())
    assert piece(3) == "a\u2581b"
    # A combining mark would sit on the separator.
    assert piece(4) == "\u25cc\u0301" and piece(5) == "\u25cc\u0301<U+202E>"


@pytest.mark.parametrize("limit", [None, 2, 3, 4, 5, 6, 9])
def test_what_is_not_cut_is_what_is_trained_on(limit):
    ids = np.array([5, 6, 7, 8, 1])
    tokens = inspection.tokens_of(ids, str, 2, limit)
    kept = [int(p) for p, cut in zip(tokens.pieces, tokens.cut, strict=True) if not cut]
    assert kept == data.truncate(ids, limit or 9).tolist()
    assert tokens.pieces == ("5", "6", "7", "8", "1")
    assert tokens.special == (False, False, False, False, True)


def test_examples_go_from_the_shortest_to_the_longest(corpus_of):
    lengths = np.random.default_rng(0).permutation(np.arange(10, 31))
    corpus = corpus_of([("x" * n, {"toy_predict": ["y"], "toy_explain": ["z"]}) for n in lengths])
    shown = {
        number: [len(e.text) for e in inspect(corpus, number).examples]
        for number in (0, 1, 2, 3, 21, 99)
    }
    assert shown[0] == [] and shown[1] == [20] and shown[2] == [10, 30]
    assert shown[3] == [10, 20, 30]
    assert shown[21] == shown[99] == sorted(lengths)
    for e in inspect(corpus, 3).examples:
        assert [(s.task, s.loss_group) for s in e.sequences] == [
            ("toy_predict", "label"), ("toy_explain", "rationale"),
        ]  # fmt: skip


def shown_in_text(report):
    """The tokens of every side of every sequence, read back from the text."""
    sides = []
    for line in report.split("Example ", 1)[1].splitlines():
        if line.endswith(" tokens:"):
            sides.append([])
        elif line.startswith("      ") and not line.startswith("      ---"):
            tokens = re.findall(r"(?:\\.|[^\\|])+", line[6:])
            sides[-1] += [re.sub(r"\\(.)", r"\1", t) for t in tokens]
    return sides


class Page(html.parser.HTMLParser):
    """The tags of a page, in balance, and the tokens that it shows."""

    VOID = ("meta", "img", "wbr", "br")

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.sides, self.classes, self.attrs = [], [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attrs += [(tag, *attr) for attr in attrs]
        attrs = dict(attrs)
        if tag not in self.VOID:
            self.open.append((tag, attrs.get("class", "")))
        if tag == "div" and attrs.get("class") == "tokens":
            self.sides.append([])
        if tag == "span" and self.open[-2] == ("div", "tokens"):
            self.sides[-1].append("")
            self.classes.append(attrs["class"])

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        if [tag for tag, _ in self.open[-2:]] == ["div", "span"] and self.sides:
            self.sides[-1][-1] += text


def test_every_token_of_an_example_is_shown(corpus_of):
    examples = [
        (NASTY + "x" * 30 * i, {"toy_predict": ["a|b"], "toy_explain": [NASTY, "c\\|d\u0301"]})
        for i in range(3)
    ]
    corpus = corpus_of(examples)
    found = inspect(corpus, feature_lengths={"inputs": 80, "targets": 12})
    piece = inspection.pieces_of(BYTES)
    expected = []
    for example in found.examples:
        before = None
        for task in corpus.tasks:
            for record in task.read(range(len(task))):
                if record.example_id != example.example_id:
                    continue
                inputs = record.inputs.tolist()
                if inputs != before:  # those of a second choice are said to be the same
                    expected.append([piece(i) for i in inputs])
                before = inputs
                expected.append([piece(i) for i in record.targets])
    assert len(expected) == 3 * (2 + 2)  # both tasks have the same inputs here
    report = inspection.text_report(found, width=60)
    assert shown_in_text(report) == expected
    assert report.count("inputs as before") == 6
    for line in report.split("Example ", 1)[1].splitlines():
        assert not line.startswith("      ") or len(line) <= 60
    page = Page(inspection.html_report(found))
    assert page.sides == expected
    targets = sum(
        len(side) for e in found.examples for s in e.sequences for side in [s.targets.pieces]
    )
    assert sum("label" in c or "rationale" in c for c in page.classes) == targets
    cut = sum(c.split()[-1] == "cut" for c in page.classes)
    assert cut == sum(
        max(0, len(side) - limit)
        for i, side in enumerate(expected)
        for limit in [80 if i % 4 == 0 else 12]
    )  # fmt: skip


def test_of_many_rationales_a_few_are_shown_and_the_others_counted(corpus_of):
    corpus = corpus_of([("a", {"toy_predict": ["b"], "toy_explain": [f"r{i}" for i in range(9)]})])
    (example,) = inspect(corpus, 1).examples
    assert [s.choice for s in example.sequences] == [0, 0, 1, 2] and example.left_out == 6
    report = inspection.text_report(inspect(corpus, 1))
    assert "and 6 more sequences, of which one is drawn per epoch" in report


# --- Reports --------------------------------------------------------------------------------------


def test_colours_only_where_they_are_asked_for(corpus_of):
    found = inspect(corpus_of(random_examples(5)))
    plain = inspection.text_report(found)
    coloured = inspection.text_report(found, colour=True)
    assert "\x1b" not in plain and coloured.count("\x1b[36m") and coloured.count("\x1b[33m")
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain


def nasty_inspection(corpus_of):
    """Everything that comes from data or the user is hostile."""
    groups = {NASTY: 0, "$x_{<b>": 1}
    examples = [(NASTY, {name: [NASTY, NASTY + "2"] for name in groups})] * 3
    found = inspect(corpus_of(examples, groups=groups))
    example = dataclasses.replace(found.examples[0], example_id=NASTY, label=NASTY, text=NASTY)
    report = sources.SourceReport(5, 4, 1, 3, 0.8, 1, notes=(NASTY,))
    return dataclasses.replace(
        found,
        name=NASTY,
        facts={"vocabulary": NASTY},
        examples=(example, *found.examples[1:]),
        teacher=(
            inspection.TeacherReport(NASTY, report, (("reference", 1, 0.5), (NASTY, 0, 1.0))),
        ),
    )


def test_a_page_is_harmless_whatever_a_row_holds(corpus_of):
    made = inspection.html_report(nasty_inspection(corpus_of))
    page = Page(made)
    assert set(page.tags) <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "b", "i", "div",
        "span", "wbr", "table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "img",
        "details", "summary", "pre",
    }  # fmt: skip
    assert {name for _, name, _ in page.attrs} <= {
        "lang",
        "charset",
        "http-equiv",
        "content",
        "name",
        "class",
        "width",
        "alt",
        "src",
    }
    images = [value for _, name, value in page.attrs if name == "src"]
    assert len(images) == 2 and all(i.startswith("data:image/png;base64,iVBOR") for i in images)
    assert not re.search(r"https?:|url\(|@import", made)  # nothing is fetched
    assert ("meta", "content", f"default-src 'none'; {page_lib._POLICY}") in page.attrs
    assert all(unicodedata.category(c)[0] != "C" or c == "\n" for c in made)
    made.encode("utf-8")


def test_a_terminal_gets_no_control_character(corpus_of):
    found = nasty_inspection(corpus_of)
    for text in (inspection.text_report(found), inspection.teacher_text(found.teacher)):
        assert all(unicodedata.category(c)[0] != "C" or c == "\n" for c in text)
        assert "<ESC>[31m" in text


def test_both_reports_say_what_was_found(corpus_of):
    found = inspect(corpus_of(random_examples(40), population=50))
    report = sources.SourceReport(1234, 1200, 34, 1100, 0.75, notes=("3 left out",))
    gains = (("reference", 40, 0.5), ("repair_it", 34, 0.75))
    found = dataclasses.replace(found, teacher=(inspection.TeacherReport("toy", report, gains),))
    text = inspection.text_report(found) + inspection.teacher_text(found.teacher)
    page = inspection.html_report(found)
    tables = [
        inspection.task_table(found.tasks), inspection.length_table(found.tasks),
        inspection.proposal_table(found.batching.proposals),
        inspection.teacher_table(found.teacher),
    ]  # fmt: skip
    for said in (text, page):
        for header, rows in tables:
            for cell in [*header, *(cell for row in rows for cell in row)]:
                assert cell.replace("<0", "&lt;0" if said is page else "<0") in said
        for name, value in inspection.batch_facts(found.batching):
            assert name in said and value in said
        assert "toy: 3 left out" in said
    assert ["1,234", "1,200", "34", "1,100", "0.750000"] == [
        tables[3][1][0][i] for i in (1, 3, 4, 5, 6)
    ]
    assert tables[3][1][1:] == [["  reference", "", "", "", "40", "", "0.500000"],
                                ["  + repair_it", "", "", "", "34", "", "0.750000"]]  # fmt: skip


# --- The command ----------------------------------------------------------------------------------

TOY_TASKS = """
from distill import metrics, sources, task

class Toy:
    splits = ("train",)
    def files(self, split):
        return []
    def rows(self, split):
        return [sources.Row(f"toy/{i}", f"<script>{i}", "yes" if i % 3 else "no",
                            tuple(sources.Answer(f"since {k}", "yes", 500) for k in range(i % 4)))
                for i in range(24)]

task.register("toy", source=Toy(), metric_fns=[metrics.label_accuracy])
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The command, started three times at once: most of its time is imports."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "toy_tasks.py").write_text(TOY_TASKS)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DISTILL_")}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "XLA_FLAGS": "", "COLUMNS": "100"}

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, str(ROOT / "scripts/inspect_task.py"), f"--cache_dir={folder}/cache",
             "--model=t5_1_1/tiny.gin", *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment,
        )  # fmt: skip

    running = {
        "arithmetic": start("arithmetic_step_by_step", "--examples=1", "--noteacher"),
        "toy": start("toy_step_by_step", "--module=toy_tasks", "--pairs_per_step=4",
                     f"--html={folder}/made/toy.html"),
        "wrong": start("toy_step_by_step", "--module=toy_tasks", "--model=t5_1_1/tony.gin"),
    }  # fmt: skip
    done = {name: (*p.communicate(timeout=300), p.returncode) for name, p in running.items()}
    return done, folder


def test_the_command_describes_the_embedded_task(commands):
    out, err, code = commands[0]["arithmetic"]
    assert code == 0, err
    assert "arithmetic_step_by_step, train: 9,600 rows of 4,800 examples" in out
    assert re.search(r"arithmetic_explain +4,800 +4,800 +4,800 +0 +rationale", out)
    assert "vocabulary: bytes (259 ids)" in out and "student: t5_1_1/tiny (287,872 param" in out
    assert re.search(r"epoch +\d+ steps for 4,800 examples", out)
    assert re.search(r"p\|r\|e\|d\|i\|c\|t\|:\|\u2581\|", out)
    assert "The teacher" not in out and "\x1b" not in out


def test_the_command_knows_weights_and_several_rationales_and_writes_a_page(commands):
    done, folder = commands
    out, err, code = done["toy"]
    assert code == 0, err
    # 24 rows with 0, 1, 2, 3 rationales in turn, each of weight 0.5.
    assert re.search(
        r"toy_explain +36 +18 +24 +6 +rationale +2\.00 \(3\) +0\.500 \(0\.5 to 0\.5\)", out
    )
    assert "4.0 examples in" in out and "6 steps for 24 examples" in out
    # The teacher says yes where it says anything, which is right in 12 of 18 rows.
    teacher = out[out.index("The teacher:") :]
    assert re.search(r"toy +24 +24 +18 +0 +18 +0\.666667", teacher)
    assert "Traceback" not in err and "oneDNN" not in err
    page = (folder / "made/toy.html").read_text("utf-8")
    assert str(folder / "made/toy.html") in out
    assert "0.666667" in page and "script" not in Page(page).tags and len(Page(page).sides) >= 6


def test_the_command_says_what_is_wrong_in_one_message(commands):
    out, err, code = commands[0]["wrong"]
    assert code == 2 and not out
    assert "Error: --model: there is no file t5_1_1/tony.gin. Did you mean t5_1_1/tiny.gin" in err
    assert "Traceback" not in err
