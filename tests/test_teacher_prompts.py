"""The teacher's prompts: exemplars that are right and new, and answers read as published."""

import collections
import dataclasses
import json
import pathlib
import random
import re
import time

import pytest

from distill import metrics, task
from distill.teacher import prompting

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ("anli1", "arithmetic", "cqa", "esnli", "gsm8k", "svamp")
NLI = ("anli1", "esnli")
# `{label}` and `{input}` in data are data.
MINIMAL = """
task = "reviews"
question = "Review: {input}\\nMood:"
completion = " {rationale} So it is {label}."
stop = "Review:"
[[exemplars]]
input = "Broke on day one, {label} {input}."
rationale = "It broke at once."
label = "bad"
"""


def exemplars(*names):
    """(prompt, exemplar) of all prompts or of some."""
    return [(p, e) for p in map(prompting.load, names or NAMES) for e in p.exemplars]


def words(text):
    return re.findall(r"\w+", text.replace("</s>", " ").lower())


def write(folder, text, name="mine.toml"):
    path = folder / name
    path.write_text(text, "utf-8")
    return path


# --- The files ------------------------------------------------------------------------------------


def test_the_prompts_of_the_datasets_load():
    assert prompting.names() == NAMES
    for name in NAMES:
        prompt = prompting.load(name)
        assert prompt.name == prompt.task == name
        assert len(prompt.exemplars) == 10
        assert prompt.instruction and prompt.hint and prompt.stop


def test_every_exemplar_reads_back_and_what_follows_is_cut():
    for prompt, e in exemplars():
        said = prompt.complete(e.rationale, e.label, e.input)
        assert said == said.strip()
        assert prompt.parse(said) == (e.rationale, e.label)
        next_question = prompt.text(prompt.exemplars[0].input)
        assert prompt.parse(f" {said}\n\n{prompt.question}{next_question}") == (
            e.rationale,
            e.label,
        )
        assert prompt.parse(prompt.complete(e.rationale, None, e.input)) == (None, None)
        assert prompt.parse(prompt.complete(None, e.label, e.input)) == (None, e.label)


def test_every_exemplar_stands_in_the_prompt_as_it_would_be_answered():
    for prompt, e in exemplars():
        said = prompt.complete(e.rationale, e.label, e.input)
        for label in (None, "L"):
            assert prompt.text("an input", label).count(f"{said}\n\n") == 1
            contents = [m["content"] for m in prompt.messages("an input", label)]
            assert contents.count(said) == 1


@pytest.mark.parametrize("name", NAMES)
def test_questions_have_the_input_and_only_a_hint_gives_the_label_away(name):
    prompt = prompting.load(name)
    gold = "( 10.0 * 45.0 )" if name == "svamp" else "a gold label"
    for text in (prompt.text("Xyzzy."), prompt.messages("Xyzzy.")[-1]["content"]):
        assert text.count("Xyzzy.") == 1 and gold not in text
    for text in (prompt.text("Xyzzy.", gold), prompt.messages("Xyzzy.", gold)[-1]["content"]):
        assert text.count("Xyzzy.") == 1 and text.count(gold) == 1
    # The exemplars are put as the question is.
    for e in prompt.exemplars[:-1]:
        hinted = prompt.messages(e.input, e.label)[-1]["content"]
        assert f"{hinted} {e.rationale}" in prompt.text("Xyzzy.", gold)
        assert f"{hinted} {e.rationale}" not in prompt.text("Xyzzy.")
        assert {"role": "user", "content": hinted} in prompt.messages("Xyzzy.", gold)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("label", [None, "a gold label"])
def test_chat_messages_alternate_and_begin_with_system(name, label):
    messages = prompting.load(name).messages("Xyzzy.", label)
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 10, "user"]
    assert all(set(m) == {"role", "content"} and m["content"].strip() for m in messages)


def test_nli_inputs_are_shown_as_premise_and_hypothesis():
    for name in NLI:
        text = prompting.load(name).text("It rains.</s>It is wet.")
        assert "</s>" not in text
        assert "\n\nPremise: It rains.\nHypothesis: It is wet.\nReasoning" in text
        assert text.count("Premise: ") == text.count("\nHypothesis: ") == 11
        for e in prompting.load(name).exemplars:
            assert e.input.count("</s>") == 1


def test_cqa_answers_have_the_letter_of_their_choice():
    prompt = prompting.load("cqa")
    text = "What?\nAnswer Choices:\n(a) sea (salt)\n(b) sea\n(c) {letter}\n(d) x.*\n(e) e"
    for label, answer in {
        "sea": "(b) sea",
        "sea (salt)": "(a) sea (salt)",
        "{letter}": "(c) {letter}",
        "x.*": "(d) x.*",
        "xyz": "(?) xyz",  # No choice, but still a label.
    }.items():
        said = prompt.complete("Why.", label, text)
        assert said == f"Why. So the answer is {answer}."
        assert f"The right answer is {answer}." in prompt.text(text, label)
        if "(salt)" not in label:
            assert prompt.parse(said) == ("Why.", label)
    assert prompt.complete("Why.", "sea") == "Why. So the answer is (?) sea."


# --- The labels -----------------------------------------------------------------------------------


def test_cqa_labels_are_choices_and_every_letter_is_right_twice(tasks):
    letters = collections.Counter()
    for prompt, e in exemplars("cqa"):
        options = tasks.cqa.options(e.input)
        assert len(set(options)) == 5 and e.label in options
        (letter,) = re.findall(r"\((.)\) ", prompt.complete(e.rationale, e.label, e.input))
        assert options["abcde".index(letter)] == e.label
        letters[letter] += 1
    assert letters == dict.fromkeys("abcde", 2)


@pytest.mark.parametrize("name", NLI)
def test_nli_labels_are_the_three_in_balance(name, tasks):
    labels = collections.Counter(e.label for _, e in exemplars(name))
    assert set(labels) == set(tasks.esnli.LABELS)
    assert sorted(labels.values()) == [3, 3, 4]


SUM = re.compile(r"(\d[\d.]*(?: [-+*/] \d[\d.]*)+) = (\d+(?:\.\d+)?)")


def test_svamp_equations_are_those_of_the_rationale():
    last = collections.Counter()
    for _, e in exemplars("svamp"):
        sums = SUM.findall(e.rationale)
        assert sums and all(metrics.equation_value(a) == float(b) for a, b in sums)
        assert metrics.equation_value(e.label) == float(sums[-1][1])
        assert set(re.findall(r"\d+", e.label)) <= set(re.findall(r"\d+", e.input))
        assert re.fullmatch(r"\([\d ()*/+-]+\)", e.label) and ".0" not in e.label
        last[sums[-1][0].split()[1]] += 1
    assert set(last) == set("+-*/") and max(last.values()) <= 3


def test_gsm8k_sums_are_right_and_end_in_the_label():
    for _, e in exemplars("gsm8k"):
        sums = SUM.findall(e.rationale)
        assert len(sums) >= 3 and e.rationale.count("=") == len(sums)
        assert all(metrics.equation_value(a) == pytest.approx(float(b)) for a, b in sums)
        assert e.label == sums[-1][1]


def test_arithmetic_is_worked_out_as_the_task_does(tasks):
    for _, e in exemplars("arithmetic"):
        who, start, story = re.fullmatch(r"(\w+) has (\d) nuts, (.*)\.", e.input).groups()
        amounts = [int(start)]
        for change in story.split(", "):
            verb, number = re.fullmatch(r"(gets|eats) (\d)", change).groups()
            amounts.append(amounts[-1] + (int(number) if verb == "gets" else -int(number)))
        assert who in tasks.arithmetic.NAMES and all(0 <= a <= 9 for a in amounts)
        # Written as the task writes it, and of no problem that is held out.
        row = tasks.arithmetic.NutsSource("nuts")._row("id", who, tuple(amounts), tuple(amounts))
        assert (row.input, row.answers[0].rationale, row.label) == (e.input, e.rationale, e.label)
        assert tasks.arithmetic._split_of(tuple(amounts)) == "train"
    assert {e.label for _, e in exemplars("arithmetic")} == set(map(str, range(10)))


# --- Against the data -----------------------------------------------------------------------------


def released_rows(tasks, shared):
    """(where, input) of all rows of all released files that are there."""
    for name in ("anli", "cqa", "esnli", "svamp"):
        layout = getattr(tasks, name).RELEASED
        for path in sorted((shared / "datasets" / layout.name).glob(f"{layout.name}_*.json")):
            for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
                yield f"{path}:{number}", layout.example(json.loads(line))[0]


def test_no_exemplar_is_in_the_data(tasks, shared):
    """Not as a whole, and not in eight words: neither in training rows nor in others."""
    whole, eight = {}, {}
    for prompt, e in exemplars():
        if prompt.name == "arithmetic":
            continue  # Its rows are all made of the same words.
        said = words(e.input)
        whole[tuple(said)] = e.input
        eight |= {tuple(said[i : i + 8]): e.input for i in range(len(said) - 7)}
    counted = 0
    for where, text in released_rows(tasks, shared):
        counted += 1
        said = words(text)
        assert tuple(said) not in whole, where
        for i in range(len(said) - 7):
            assert tuple(said[i : i + 8]) not in eight, (where, said[i : i + 8])
    assert counted > 1000


def test_no_arithmetic_exemplar_is_a_row(tasks):
    shown = {e.input for _, e in exemplars("arithmetic")}
    for name in ("arithmetic", "arithmetic_noisy"):
        for split in ("train", "validation", "test"):
            assert not shown & {row.input for row in task.dataset(name).rows(split)}


def completions(shared, name):
    paths = sorted((shared / "datasets" / name / "llm").glob("*_CoT_*.json"))
    return [c for path in paths for c in json.loads(path.read_text("utf-8"))]


@pytest.mark.parametrize("name, count", [("cqa", 10_962), ("svamp", 1_000), ("esnli", 19_666)])
def test_released_completions_are_read_as_published(tasks, shared, name, count):
    prompt, published = prompting.load(name), getattr(tasks, name).parse
    released = completions(shared, name)
    assert len(released) == count
    for completion in released:
        assert prompt.parse(completion) == published(completion), completion


def variations(prompt, answers, rng):
    """Completions from right to mangled: cut off, gone on, announced twice or not at all."""
    start = ["", "Why. ", "Why so? It (a) is.\n", "  (3 + 4) = 7. ", "The premise says so.\n\n"]
    rest = [
        "",
        "\n\n",
        f"\n\n{prompt.stop}",
        f"\n\n{prompt.stop} x {prompt.marker} (b) y.",
        " x",
        "\n",
    ]
    for _ in range(5_000):
        said = rng.choice(start)
        for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 3])):
            said += f"{prompt.marker}{rng.choice([' ', '', '  ', chr(10)])}{rng.choice(answers)}"
            said += rng.choice(["", ".", ".", "..", "!", " ."])
        said += rng.choice(rest)
        yield said[: rng.randrange(len(said) + 1)] if rng.random() < 0.3 else said


@pytest.mark.parametrize(
    "name, answers",
    [
        ("cqa", ["(a) sea", "(b) a (c) b", "sea", "(é) x y", "(d) (e) z", "(a)", "(a", "(\n) x"]),
        (
            "svamp",
            ["(84 / 2)", "(1) + (2)", "( 1\n) (2)", "4", ")(", "((8 + 2) * 3", "(a) and (b)"],
        ),
    ],
)
def test_any_completion_is_read_as_published(tasks, name, answers):
    prompt, published = prompting.load(name), getattr(tasks, name).parse
    seen = set()
    for completion in variations(prompt, answers, random.Random(0)):
        rationale, label = published(completion.lstrip())
        # An empty text is none; no label ends in white space.
        expected = rationale or None, (label or "").strip() or None
        assert prompt.parse(completion) == expected, completion
        seen.add(tuple(part is not None for part in expected))
    assert len(seen) == 4


def test_anli_completions_are_read_as_published(tasks):
    """But for the last character, which the published rule drops whatever it is."""
    prompt, published = prompting.load("anli1"), tasks.anli.parse
    answers = [*tasks.esnli.LABELS, "neutral or entailment", "not known", "Neutral", "a\nb", ""]
    seen = collections.Counter()
    for completion in variations(prompt, answers, random.Random(0)):
        rationale, label = published(completion.lstrip())
        said = completion.partition("Premise")[0].rpartition("So the answer is")[2].strip()
        if label is not None and not said.endswith("."):
            assert said.startswith(label)
            label = said
        expected = rationale or None, (label or "").strip() or None
        assert prompt.parse(completion) == expected, completion
        seen[label == said, label in tasks.esnli.LABELS] += 1
    assert min(seen.values()) > 50 and len(seen) == 4
    made = [
        ("It is said.", "entailment"),
        ("Nothing is said.", "neutral"),
        ("No.", "contradiction"),
    ]
    for rationale, label in made:
        said = prompt.complete(rationale, label)
        assert prompt.parse(said) == published(said) == (rationale, label)


def test_what_people_s_models_write_instead():
    """Endings that the published rules do not know, and that cost nothing."""
    for name, end in (("anli1", "So the answer is neutral"), ("esnli", "\nAnswer: neutral.")):
        assert prompting.load(name).parse(f"Why. {end}") == ("Why.", "neutral")
    gsm8k = prompting.load("gsm8k").parse
    for end, label in {"$1224.50.": "1224.50", "-3": "-3", "5 apples.": "5", "none.": None}.items():
        assert gsm8k(f"Why. The answer is {end}") == ("Why.", label)


# --- Hostile texts --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_any_text_is_read_in_linear_time(name):
    prompt = prompting.load(name)
    n = 500_000
    pieces = [" ", "\n", "(", ")", "(a", "9", "9.", "-", ".", "\x00", "\ud800", "\u202e", "a\u0301"]
    pieces += [prompt.marker, prompt.marker[:-1], prompt.stop[:-1], prompt.marker + " (a)"]
    for piece in pieces:
        many = piece * (n // len(piece))
        for text in (many, f"Why. {prompt.marker} {many}", f"{many} {prompt.marker} (a) neutral"):
            began = time.perf_counter()
            rationale, label = prompt.parse(text)
            # Quadratic would be minutes.
            assert time.perf_counter() - began < 2, (piece, text[:40])
            assert label is None or len(label) <= prompting.MAX_ANSWER


def test_random_texts_are_read_without_an_error():
    rng = random.Random(0)
    for prompt in map(prompting.load, NAMES):
        pieces = [
            prompt.marker,
            prompt.stop,
            "(",
            ")",
            ".",
            "\n",
            " ",
            "a",
            "\x1b",
            "\ud83d",
            "é",
            "1",
        ]
        for _ in range(2_000):
            text = "".join(rng.choices(pieces, k=rng.randrange(20)))
            for part in prompt.parse(text):
                assert part is None or (part and part == part.rstrip())
            assert prompt.text(text, text) and prompt.messages(text, text)
            prompt.complete(text, text, text)


@pytest.mark.parametrize(
    "pattern, problem",
    [
        ("(a+)+$", "one repetition"),
        ("((?:a|aa)*)b", "one repetition.* not of a group"),
        ("(a*)a*b", "one repetition"),
        ("(a*+)b", "one repetition"),
        ("((?:a?){30})", "one repetition"),
        ("(a?a?a?a?a?a?a*)b", "5 choices"),
        ("(" + "a?" * 13 + ")", "12 choices"),
        (r"(a)\1", "refers back"),
        ("(?P<x>a)", "no other"),
        ("(?x)(a) *", "no other"),
        ("(?>a)(b)", "no other"),
        ("a", "one group, the label, not 0"),
        ("(a)(b)", "one group, the label, not 2"),
        ("(", "no regular expression"),
        ("(a{99999999999})", "no regular expression"),
    ],
)
def test_patterns_that_could_take_long_are_refused(pattern, problem, tmp_path):
    assert re.search(problem, prompting.pattern_problem(pattern))
    with pytest.raises(ValueError, match="mine.toml: label_pattern .*" + problem):
        prompting.load(write(tmp_path, f"label_pattern = '{pattern}'\n{MINIMAL}"))


@pytest.mark.parametrize(
    "pattern",
    [r"(\*\+\?\{)", "([*+?|){]*)", r"\((.*?)\)(?!\()", "(?im)^(a|b|c)$", "(?<=x)(a{2})",
     "([]*+]+)", r"(\w+?)\Z", "(" + "|".join("abcdefghijklm") + ")", r"([^\]*]+)", r"(\\1)",
     "(a??a??a??a*?)b"],
)  # fmt: skip
def test_patterns_that_are_quick_are_taken(pattern):
    assert prompting.pattern_problem(pattern) is None


@pytest.mark.parametrize(
    "pattern", ["(?s)(a?a?a?a?a?.*)b", "((?:a|a)(?:a|a)(?:a|a)(?:a|a)(?:a|a).*)b",
                "(" + "(?:a|a)" * 12 + ")b"]
)  # fmt: skip
def test_the_slowest_patterns_that_are_taken_are_quick(pattern):
    assert prompting.pattern_problem(pattern) is None
    began = time.perf_counter()
    assert re.search(pattern, "a" * prompting.MAX_ANSWER) is None
    assert time.perf_counter() - began < 5


# --- Files of one's own ---------------------------------------------------------------------------


def test_a_file_of_one_s_own(tmp_path):
    prompt = prompting.load(write(tmp_path, MINIMAL))
    assert (prompt.name, prompt.task, prompt.marker) == ("mine", "reviews", "So it is")
    assert prompt.text("Nice {rationale}") == (
        "Review: Broke on day one, {label} {input}.\nMood: It broke at once. So it is bad.\n\n"
        "Review: Nice {rationale}\nMood:"
    )
    assert [m["role"] for m in prompt.messages("Nice")] == ["user", "assistant", "user"]
    assert prompt.parse("Why. So it is very good.\n\nReview: x") == ("Why.", "very good")
    with pytest.raises(ValueError, match="'mine' cannot ask for the reasons.*`hint`"):
        prompt.text("Nice", "good")
    # As an editor under Windows would save it.
    windows = tmp_path / "mine2.toml"
    windows.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert dataclasses.replace(prompting.load(windows), name="mine") == prompt


def test_the_example_of_the_docs(tmp_path):
    docs = (ROOT / "docs" / "teacher.md").read_text("utf-8")
    file, shown = re.findall(r"```(?:toml)?\n(task = .*?|Say what.*?)```", docs, re.DOTALL)
    prompt = prompting.load(write(tmp_path, file))
    assert shown.startswith(prompt.text("Nice colour, but it hums.") + "\n(")
    said = re.search(r'parse\("(.*)"\)', docs)[1].replace(r"\n", "\n")
    assert shown.endswith(f"{prompt.parse(said)}\n")
    assert None not in prompt.parse(said)
    for field in dataclasses.fields(prompt)[1:]:
        assert re.search(rf"^\| `\[*{field.name}\]*` \|", docs, re.MULTILINE), field.name


def test_a_prompt_without_exemplars_is_its_instruction(tmp_path):
    text = "instruction = 'End with: So it is <mood>.'\n" + MINIMAL.partition("[[")[0]
    prompt = prompting.load(write(tmp_path, text))
    assert prompt.text("Nice") == "End with: So it is <mood>.\n\nReview: Nice\nMood:"
    assert [m["role"] for m in prompt.messages("Nice")] == ["system", "user"]


def test_rewriting_is_literal_and_in_order(tmp_path):
    prompt = prompting.load(write(tmp_path, MINIMAL + "[rewrite]\n'a.' = 'b'\n'b' = '{input}'\n"))
    assert prompt.text("a.c ac").endswith("Review: {input}c ac\nMood:")
    assert prompt.exemplars[0].input.startswith("Broke")


def test_the_hash_is_of_what_is_sent_and_how_it_is_read(tmp_path):
    hint = "hint = 'Review: {input} {label}'\n"
    prompt = prompting.load(write(tmp_path, hint + MINIMAL))
    same = prompting.load(write(tmp_path, "# A remark.\n" + MINIMAL + "\n" * 3, "other.toml"))
    assert dataclasses.replace(same, hint=prompt.hint).sha256 == prompt.sha256
    exemplar = prompt.exemplars[0]
    changed = {
        "question": "Review: {input}\nmood:",
        "completion": " {rationale} So it is {label}",
        "instruction": "Judge.",
        "exemplars": (dataclasses.replace(exemplar, rationale="It broke."),),
        "answer": "'{label}'",
        "label_pattern": r"(\w+)",
        "stop": "Review",
        "hint": "Review: {input} ({label})",
        "rewrite": (("x", "y"),),
    }
    assert {*changed, "name", "task"} == {f.name for f in dataclasses.fields(prompt)}
    changed["answer"], pattern = "'{label}'", "'(.*)'"
    hashes = {prompt.sha256}
    for field, value in changed.items():
        also = {"label_pattern": pattern} if field == "answer" else {}
        hashes.add(dataclasses.replace(prompt, **{field: value}, **also).sha256)
    assert len(hashes) == 1 + len(changed)
    assert dataclasses.replace(prompt, name="n", task="t").sha256 == prompt.sha256


def edited(old, new):
    assert old in MINIMAL
    return MINIMAL.replace(old, new, 1)


EXEMPLAR = MINIMAL[MINIMAL.index("[[") :]


@pytest.mark.parametrize(
    "text, message",
    [
        (edited('task = "reviews"\n', ""), "lacks task"),
        (edited('"reviews"', '" "'), "task must name the dataset"),
        (edited('task = "reviews"', "task = 3"), "task must be text in quotes, not 3"),
        ("completon = 'x'\n" + MINIMAL, "unknown field 'completon'. Did you mean 'completion'?"),
        ("name = 'x'\n" + MINIMAL, "unknown field 'name'"),
        (edited("rationale =", "rational ="), r"exemplar 1 \('Brok.*unknown field 'rational'. Did"),
        (edited('label = "bad"', ""), "exemplar 1 .*lacks label"),
        (edited('label = "bad"', "label = 3"), "exemplar 1 .*label must be text in quotes, not 3"),
        (edited('label = "bad"', 'label = ""'), "exemplar 1 .*label is empty"),
        (edited("[[exemplars]]", "[exemplars]"), r"exemplars must be tables.*\[\[exemplars\]\]"),
        (edited("[[exemplars]]", "[[exemplar]]"), "unknown field 'exemplar'. Did you mean 'exemp"),
        (edited("{input}", "{inputs}"), "question must contain {input}, once"),
        (edited("{input}", "{input} {input}"), "question must contain {input}, once"),
        (edited("{rationale}", "{label} {rationale}"), "{rationale}, then {label}, once"),
        (edited("So it is ", ""), "completion is .*must stand what tells them apart"),
        (edited("So it is {label}", "So it is"), "completion must contain"),
        (edited('stop = "Review:"', 'stop = "Q:"'), "stop 'Q:' is not in question"),
        ("hint = 'It is {label}. {input}'\n" + MINIMAL, "stop 'Review:' is not in hint"),
        ("hint = 'Review: {input}'\n" + MINIMAL, "hint must contain {label}"),
        ("hint = 'Review: {label}'\n" + MINIMAL, "hint must contain {input}"),
        ("answer = 'x'\n" + MINIMAL, "answer must contain {label}"),
        ("answer = '{letter}{letter}{label}'\n" + MINIMAL, "answer may have {letter} once"),
        ("answer = '{letter}) {label}'\n" + MINIMAL, "exemplar 1 .*'bad' is on no line"),
        (MINIMAL + "[rewrite]\n'' = 'x'\n", "rewrite replaces an empty text"),
        (MINIMAL + "[rewrite]\nx = 3\n", "rewrite: x must be text in quotes, not 3"),
        ("rewrite = 'x'\n" + MINIMAL, "rewrite must be a table"),
        ("label_pattern = '(good)'\n" + MINIMAL, r"exemplar 1 .*reads back.* label None.*\(good"),
        (edited("It broke at", "So it is"), "exemplar 1 .*reads back as rationale None"),
        (edited("It broke at", "Review: it"), "exemplar 1 .*must not hold 'So it is' or 'Review:'"),
        (edited("It broke at", " It broke at"), "exemplar 1 .*begin or end in white space"),
        (MINIMAL + EXEMPLAR.replace("Broke on", "broke  ON"), "exemplar 2 .*input of exemplar 1"),
        ("x = \n" + MINIMAL, r"Invalid value \(at line 1"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"mine.toml: .*{message}"):
        prompting.load(write(tmp_path, text))


def test_files_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b'task = "\xff"')
    with pytest.raises(ValueError, match="mine.toml: 'utf-8' codec"):
        prompting.load(path)


def test_prompts_that_do_not_exist(tmp_path):
    with pytest.raises(ValueError, match="no prompt named 'svmp'. Did you mean 'svamp'?.*gsm8k"):
        prompting.load("svmp")
    with pytest.raises(FileNotFoundError, match="no prompt file .*mine.toml"):
        prompting.load(tmp_path / "mine.toml")
